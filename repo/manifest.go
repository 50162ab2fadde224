package repo

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/tree"
)

// FormatVersion is the version of the repository format this package writes.
const FormatVersion = 1

// How a generation's bytes were found.
const (
	ModeFull        = "full"        // every allocated area was read
	ModeIncremental = "incremental" // only areas known to have changed were read
	ModeScan        = "scan"        // everything was read and compared with the parent
	ModeImport      = "import"      // taken from local files
)

// What state the guest's file systems are in.
const (
	ConsistencyCrash    = "crash"    // as after a power cut
	ConsistencyQuiesced = "quiesced" // the guest was asked to settle
	ConsistencyOff      = "off"      // the VM was powered off
	ConsistencyUnknown  = "unknown"
)

// Manifest is what a generation says about itself. Commit fills Format,
// Sequence, Previous and Tool.
type Manifest struct {
	Format      int            `json:"format"`
	Sequence    uint64         `json:"sequence"`
	VM          VMID           `json:"vm"`
	Time        time.Time      `json:"time"` // UTC, whole seconds
	Mode        string         `json:"mode"`
	Reason      string         `json:"reason,omitempty"`
	Consistency string         `json:"consistency"`
	Tool        string         `json:"tool,omitempty"`
	Host        HostInfo       `json:"host"`
	Guest       GuestInfo      `json:"guest"`
	Disks       []DiskManifest `json:"disks"`
	Files       []ManifestFile `json:"files,omitempty"`
	// Previous is the SHA-256, in hexadecimal, of the VM's manifest file with
	// the next lower sequence number; empty for the first. A generation taken
	// away or put in later breaks the chain.
	Previous string `json:"previous,omitempty"`
	Stats    Stats  `json:"stats"`
}

// HostInfo says what the VM ran on.
type HostInfo struct {
	Product string `json:"product,omitempty"`
	Version string `json:"version,omitempty"`
	Build   string `json:"build,omitempty"`
}

// GuestInfo says what the VM was.
type GuestInfo struct {
	UUID            string `json:"uuid,omitempty"`
	InstanceUUID    string `json:"instance_uuid,omitempty"`
	GuestID         string `json:"guest_id,omitempty"`
	HardwareVersion string `json:"hardware_version,omitempty"`
	PowerState      string `json:"power_state,omitempty"`
}

// DiskManifest is one disk of a generation.
type DiskManifest struct {
	Key         int32  `json:"key"`
	Label       string `json:"label,omitempty"`
	Name        string `json:"name"`       // base of the file names: web01 gives web01.vmdk and web01-flat.vmdk
	Capacity    int64  `json:"capacity"`   // bytes
	DataBytes   int64  `json:"data_bytes"` // bytes that are not holes
	Root        []byte `json:"root"`       // the tree's root record, 48 bytes; from DiskTree
	Levels      int    `json:"levels"`     // of the tree; from DiskTree
	ChangeID    string `json:"change_id,omitempty"`
	UUID        string `json:"uuid,omitempty"`
	BackingPath string `json:"backing_path,omitempty"`
	Adapter     string `json:"adapter,omitempty"`
	Descriptor  string `json:"descriptor,omitempty"` // the VMDK descriptor to show: standalone, flat, no change tracking
	Mode        string `json:"mode,omitempty"`       // how this disk was read
	Reason      string `json:"reason,omitempty"`
	// Tracking is for the next backup, where the host's own word cannot be had.
	Tracking *TrackingCopy `json:"tracking,omitempty"`
	Stats    Stats         `json:"stats"`
}

// TrackingCopy is a host's change tracking file of a disk as it was at a generation.
type TrackingCopy struct {
	Table  []byte `json:"table"`  // the file, one zstd frame
	Proved int    `json:"proved"` // how many backups in a row it was right
}

// ManifestFile is a small file of the VM kept in the manifest itself.
type ManifestFile struct {
	Name string `json:"name"`
	Data []byte `json:"data"`
}

// Stats counts what making a generation or one of its disks took.
type Stats struct {
	BytesCapacity int64   `json:"bytes_capacity"`
	BytesChanged  int64   `json:"bytes_changed"`
	BytesRead     int64   `json:"bytes_read"`
	BytesAudited  int64   `json:"bytes_audited"`
	BytesStored   int64   `json:"bytes_stored"`
	Seconds       float64 `json:"seconds"`
}

// Limits of a manifest. They keep what a reader must hold in memory bounded.
const (
	maxManifestFiles = 64 << 20 // bytes of all Files together
	maxDisks         = 256      // ESXi allows 4 controllers of up to 64 disks
)

// validate refuses what could not be shown as a folder or read as disks.
func (m *Manifest) validate(blockSize int) error {
	if err := m.VM.Validate(); err != nil {
		return err
	}
	if m.Time.IsZero() || m.Time.Year() < 1970 || m.Time.Year() > 9999 {
		return fmt.Errorf("the generation's time %v is out of range", m.Time)
	}
	if len(m.Disks) > maxDisks {
		return fmt.Errorf("%d disks, %d is the limit", len(m.Disks), maxDisks)
	}
	seen := map[string]bool{publicManifestName: true}
	name := func(s string) error {
		if err := validateName("file", s); err != nil {
			return err
		}
		if seen[s] {
			return fmt.Errorf("two files of the generation are called %q", s)
		}
		seen[s] = true
		return nil
	}
	var total int
	for _, f := range m.Files {
		if err := name(f.Name); err != nil {
			return err
		}
		total += len(f.Data)
	}
	if total > maxManifestFiles {
		return fmt.Errorf("the VM's small files are %d bytes together, %d is the limit", total, maxManifestFiles)
	}
	for i := range m.Disks {
		d := &m.Disks[i]
		if err := errors.Join(name(d.Name+".vmdk"), name(d.Name+"-flat.vmdk")); err != nil {
			return err
		}
		if err := d.validate(blockSize); err != nil {
			return fmt.Errorf("disk %d (%s): %w", i, d.Name, err)
		}
	}
	return nil
}

func (d *DiskManifest) validate(blockSize int) error {
	if d.Capacity < 0 || d.Capacity > tree.MaxCapacity {
		return fmt.Errorf("a capacity of %d bytes is out of range", d.Capacity)
	}
	if d.DataBytes < 0 || d.DataBytes > d.Capacity {
		return fmt.Errorf("%d bytes of data on a disk of %d", d.DataBytes, d.Capacity)
	}
	if want := tree.Levels(tree.Blocks(d.Capacity, blockSize)); d.Levels != want {
		return fmt.Errorf("a tree of %d levels, %d bytes need %d", d.Levels, d.Capacity, want)
	}
	root, err := d.root()
	if err != nil {
		return err
	}
	if !root.IsHole() && !root.Kind.IsNode() {
		return fmt.Errorf("the root is a %v", root.Kind)
	}
	return nil
}

// root decodes the root record.
func (d *DiskManifest) root() (block.Record, error) {
	if len(d.Root) != block.Size {
		return block.Record{}, fmt.Errorf("the root record has %d bytes, not %d", len(d.Root), block.Size)
	}
	return block.Decode(d.Root)
}

// publicManifestName is the manifest as people see it in a generation's folder.
const publicManifestName = "generation.json"

// public returns the manifest for people: everything but the contents of files
// and the pointers into packs.
func (m *Manifest) public() ([]byte, error) {
	type disk struct {
		DiskManifest
		Root       *struct{} `json:"root,omitempty"` // hides the embedded field
		Levels     *struct{} `json:"levels,omitempty"`
		Descriptor *struct{} `json:"descriptor,omitempty"`
		Tracking   *struct{} `json:"tracking,omitempty"`
	}
	type file struct {
		Name string `json:"name"`
		Size int    `json:"size"`
	}
	type manifest Manifest
	p := struct {
		Generation string `json:"generation"`
		manifest
		Disks []disk `json:"disks"`
		Files []file `json:"files"`
	}{Generation: Ref{Time: m.Time}.Name(), manifest: manifest(*m)}
	p.Disks, p.Files = []disk{}, []file{}
	for _, d := range m.Disks {
		p.Disks = append(p.Disks, disk{DiskManifest: d})
	}
	for _, f := range m.Files {
		p.Files = append(p.Files, file{f.Name, len(f.Data)})
	}
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(p); err != nil {
		return nil, fmt.Errorf("%s: %w", publicManifestName, err)
	}
	return []byte(b.String()), nil
}
