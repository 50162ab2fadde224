package esxisim

import (
	"log/slog"
	"time"
)

// Options of a simulated host. Dir is required.
type Options struct {
	// Dir is the directory that plays the VMFS volume of datastore1. It is made
	// when it does not exist. VMs found in it are registered again.
	Dir string
	// Listen is the address to serve HTTPS on; "" is "127.0.0.1:0".
	Listen string
	// User and Password are the one account; "" is "root" and, for the
	// password, a random one that Password returns.
	User, Password string
	// Free is the licence without the right to change anything by SOAP.
	Free bool
	// Edition is the release of ESXi to play: "6.5", "6.7", "7.0" or "8.0"; ""
	// is the newest.
	Edition string
	// VMFS is the volume's version, 5 or 6; 0 is 6. It decides the format of
	// snapshot links as it does on ESXi.
	VMFS int
	// SSH serves a shell over SSH too; nil serves none.
	SSH *SSHOptions
	// MaxInFlight is how many /folder transfers may run at once; one more is
	// answered 503. 0 is 8.
	MaxInFlight int
	// SessionTimeout is how long a session may be idle; 0 is 30 minutes. Only
	// SOAP calls keep it alive, reads of /folder do not.
	SessionTimeout time.Duration
	// DatastoreBytes is the datastore's capacity; 0 is 1 TiB.
	DatastoreBytes int64
	// Logger receives what an operator of the real host would read in its log;
	// nil discards it.
	Logger *slog.Logger
	// Clock tells the time; nil is time.Now.
	Clock func() time.Time
}

// VMOptions of an imported VM.
type VMOptions struct {
	ChangeTracking bool // enabled before the guest writes anything
	Thin           bool // else thick, lazily zeroed
	PowerOn        bool
	// Hardware is the virtual hardware version; 0 is the edition's newest.
	Hardware int
}

// Way counts what crossed the host's edge by one way: whole requests, and
// bytes of their bodies as the host sent and received them (no headers, no TLS).
type Way struct {
	Requests int64 `json:"requests"`
	BytesOut int64 `json:"bytes_out"`
	BytesIn  int64 `json:"bytes_in"`
}

// Of SSH the requests are commands and shells, and the bytes are those of the
// wire, encryption and framing included.

// Stats are counted since the start or the last ResetStats.
type Stats struct {
	Folder Way `json:"folder"`
	SOAP   Way `json:"soap"`
	SSH    Way `json:"ssh"`
}

// The kinds of Fault.
const (
	FaultDrop   = "drop"   // cuts the connection of a /folder transfer after some bytes
	FaultCall   = "call"   // a SOAP call fails, is delayed, or its answer is lost
	FaultSpace  = "space"  // the datastore has only so many bytes left, from now on
	FaultExpire = "expire" // every session ends, now
	FaultBusy   = "busy"   // /folder transfers are answered 503
	FaultLie    = "lie"    // change tracking silently misses the next guest write

	FaultSSHRefuse  = "ssh-refuse"  // a new SSH connection is closed at once
	FaultSSHDrop    = "ssh-drop"    // cuts the connection of an SSH session after some bytes
	FaultSSHCommand = "ssh-command" // a command fails, is delayed, or its answer is lost
	FaultSSHHang    = "ssh-hang"    // a command never answers
)

// Fault is something that goes wrong on demand. Which fields count depends on
// Kind; the others are ignored.
type Fault struct {
	Kind string `json:"kind"`
	// Count is how often it happens: 0 is once, below 0 is until ClearFaults.
	// (drop, call, busy, ssh-*)
	Count int `json:"count,omitempty"`
	// Skip lets so many occasions pass first. (drop, call, busy, ssh-*)
	Skip int `json:"skip,omitempty"`
	// After is how many bytes pass before the cut: of the body, or of a session's
	// data both ways. (drop, ssh-drop)
	After int64 `json:"after,omitempty"`
	// Verb restricts it to GET or PUT; "" is both. (drop, busy)
	Verb string `json:"verb,omitempty"`
	// Path restricts it to files whose path contains this. (drop, busy)
	Path string `json:"path,omitempty"`
	// Status is what is answered instead of 503 (busy), or the exit status of a
	// command that is not carried out (ssh-command).
	Status int `json:"status,omitempty"`
	// Method is a SOAP method by its name on the wire, as CreateSnapshot_Task;
	// "*" is every one. (call)
	Method string `json:"method,omitempty"`
	// Fault is a fault type of the vSphere API, as TaskInProgress; "" lets the
	// call succeed (after Delay, or with Lost). A shell command prints the fault
	// as vim-cmd does. (call, ssh-command)
	Fault string `json:"fault,omitempty"`
	// Message is the fault's text for people; without a fault, what a command
	// prints on standard error instead of being carried out. (call, ssh-command)
	Message string `json:"message,omitempty"`
	// InTask makes the call succeed and its task fail. (call)
	InTask bool `json:"in_task,omitempty"`
	// Delay passes before the call is carried out; with InTask the task takes
	// it. (call, ssh-command)
	Delay time.Duration `json:"delay,omitempty"`
	// Lost carries the call out and cuts the connection instead of answering.
	// (call, ssh-command)
	Lost bool `json:"lost,omitempty"`
	// Command restricts it to commands whose line contains this: of a session as
	// the client sent it (ssh-drop), of each program with its arguments joined
	// by blanks (ssh-command, ssh-hang).
	Command string `json:"command,omitempty"`
	// Free is how many bytes are left. (space)
	Free int64 `json:"free,omitempty"`
	// VM and Disk say whose tracking lies; VM "" is every disk of every VM. (lie)
	VM   string `json:"vm,omitempty"`
	Disk int    `json:"disk,omitempty"`
}
