// Package esxi is one VMware ESXi host: its inventory, its snapshots, what
// changed on a disk, the bytes of frozen disks, and the few changes a restore
// needs. It speaks SOAP and HTTPS (/folder) on port 443, and runs commands over SSH
// where the licence forbids changes through the API or port 443 is closed. It
// needs nothing installed on the host.
//
// Promises:
//
//   - The host's certificate is compared with a pinned SHA-256 thumbprint on
//     every connection, before a byte is sent; certificate authorities are not
//     asked. So is the host's SSH key with its fingerprint.
//   - A refused login is never tried again by the same Host, because ESXi locks
//     accounts after a few failures. An expired session is renewed silently.
//   - A disk is read from frozen links only. A link that a VM may be writing to
//     is refused before the first request.
//   - Not more than four data requests are in flight a host, and all of them
//     wait together when the host says that it is busy.
//   - Every answer to a ranged read is checked (status, range, total size, type)
//     before its bytes are believed, and a broken transfer goes on where it
//     broke.
//   - Reads are repeated when the network fails; changes are not, they are
//     looked up instead: did the snapshot appear, is the VM registered?
//
// The package knows no repository and keeps nothing on the local disk.
package esxi

import (
	"log/slog"
	"time"
)

// Config says how to reach one host.
type Config struct {
	// Name is what the operator calls the host; it appears in messages only.
	// Empty: Address.
	Name string
	// Address is host or host:port; the port is 443 unless given. Empty: port
	// 443 is not used, and SSH must say where the host is.
	Address string
	User    string
	// Password is asked at every login, so a changed password file is read
	// again; its result is not kept.
	Password func() (string, error)
	// Thumbprint is the SHA-256 of the host's certificate in hexadecimal, with
	// or without colons, in either case. Required: see Certificate.
	Thumbprint string
	// SSH says how to reach the host's shell; nil goes without. It is used where
	// the API is not enough: see Ways.
	SSH *SSHConfig
	// Logger receives retries and session renewals; nil discards them.
	Logger *slog.Logger
	// Clock tells the time for back-off; nil means time.Now.
	Clock func() time.Time
}

// SSHConfig says how to reach a host's shell. The user must be allowed to run
// vim-cmd and to write to datastores: root, as a rule.
type SSHConfig struct {
	// Address is host or host:port; the port is 22 unless given. Empty: the host
	// of Config.Address.
	Address string
	// Fingerprint is "SHA256:" and the base64 of the SHA-256 of the host's SSH
	// key, as ssh-keygen -l prints it. Required: see HostKey.
	Fingerprint string
	User        string // "": Config.User
	// Password is asked at every login, as Config.Password; nil is Config.Password
	// unless there is a Key, and then no password is sent.
	Password func() (string, error)
	// Key is a private key, PEM or OpenSSH's format; it is offered before a
	// password. Passphrase is asked once, by Connect, when the key has one.
	Key        []byte
	Passphrase func() (string, error)
}

// About is what the host says about itself.
type About struct {
	Product string // e.g. "VMware ESXi"
	Version string // e.g. "7.0.3"
	Build   string // e.g. "20036589"
	APIType string // "HostAgent" on a standalone host
}

// VM is one registered virtual machine as it was when it was fetched.
type VM struct {
	ID              string // the host's own name for it; stable while it is registered
	Name            string // as people read it
	UUID            string // BIOS UUID
	InstanceUUID    string
	GuestID         string
	HardwareVersion string // e.g. "vmx-19"
	Power           string // poweredOn, poweredOff or suspended
	ConfigPath      string // "[datastore1] web01/web01.vmx"
	NVRAMPath       string // "" when it has none
	Disks           []Disk // in controller order: IDE, SCSI, SATA, NVMe
	Snapshots       []SnapshotInfo
	ChangeTracking  bool
	// NeedsConsolidation: links of removed snapshots were left behind; see
	// Consolidate.
	NeedsConsolidation bool
	// Invalid is why the host cannot use this VM (its files are gone, its
	// datastore is away); "" when it can. Other fields are then mostly empty.
	Invalid string
}

// Disk is one virtual disk.
type Disk struct {
	Key      int32  // stable in the life of the VM
	Label    string // e.g. "Hard disk 1"
	Capacity int64  // bytes
	// Chain is the datastore paths of the disk's descriptors, base first.
	Chain    []string
	ChangeID string // "" without change tracking
	UUID     string // ddb.uuid in the host's notation
	Mode     string // persistent, independent_persistent, …
	// Adapter is the controller as a .vmx names it: ide, buslogic, lsilogic,
	// lsisas1068, pvscsi, sata, nvme.
	Adapter string
	// Controller and Unit are the place, e.g. "scsi0" and 1 for scsi0:1.
	Controller string
	Unit       int32
	Thin       bool
	// Unsupported is why this disk cannot be backed up; "" when it can.
	Unsupported string

	// frozen is set by a snapshot only: every link of Chain is read-only to the
	// VM. OpenDisk opens nothing else.
	frozen bool
}

// SnapshotInfo is one snapshot in a VM's tree.
type SnapshotInfo struct {
	ID          string // for RemoveSnapshot
	Parent      string // ID of the snapshot it was made on; "" at the root
	Name        string
	Description string
	Created     time.Time
	Quiesced    bool
	Current     bool // the one the running link stands on

	number int32 // among the VM's snapshots, as the shell names it
}

// Snapshot is one snapshot with the VM's disks as it froze them.
type Snapshot struct {
	ID       string
	Name     string
	VM       VM     // as it was after the snapshot, running links included
	Disks    []Disk // as frozen: chains without the running link; ChangeID of this moment
	Quiesced bool
}

// Extent is a range of a disk in bytes.
type Extent struct {
	Offset, Length int64
}

// Datastore is one datastore the host sees.
type Datastore struct {
	Name       string
	Type       string // VMFS, NFS, …
	Capacity   int64  // bytes
	Free       int64  // bytes
	URL        string // e.g. "/vmfs/volumes/5e0026d9-…"
	Accessible bool
}

// Cert is what a host shows before anything is believed of it.
type Cert struct {
	Thumbprint string // SHA-256, upper-case hexadecimal with colons
	Subject    string
	NotAfter   time.Time
}
