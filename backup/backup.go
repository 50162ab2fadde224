// Package backup takes a VM from a host into a repository and back: Run makes a
// generation, Restore makes a VM out of one, Import makes generations from
// local disk images, Copy writes a generation's files into a folder.
//
// It knows plans, not protocols: which disks, which of their areas, in which
// order, and what must be undone when something fails. Bytes come from and go to
// hosts by backup/esxi, generations by repo.
//
// # Promises
//
//   - Every generation is complete. What a run did not read it takes from the
//     previous generation, and only where the host's change tracking, sampled
//     anew in every run, says that nothing changed. Each fallback to a slower,
//     surer way is named in the generation: its mode, and the reason.
//   - A snapshot is written into a journal before it is asked for and removed in
//     every ending. What a killed process leaves behind, the next run for the
//     same host removes: exactly the snapshots in its journal, found by names
//     that nobody else gives.
//   - Nothing is touched before everything that can be checked was checked.
//     Restore removes what it made when it fails, and only that.
//   - Memory does not depend on the size of disks: buffers are counted, lists of
//     changed areas cost 16 bytes an area.
//   - Time and bytes read of an incremental run depend on what changed, not on
//     the size of the disks.
package backup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"hikae/backup/esxi"
	"hikae/repo"
)

// Sentinel errors, for errors.Is. Errors of esxi and repo come through as they
// are.
var (
	// ErrNoRoom: a datastore or a local folder has too little room. The
	// repository being full is syscall.ENOSPC instead.
	ErrNoRoom = errors.New("not enough room")
	// ErrRunning: another run has this VM in hand.
	ErrRunning = errors.New("already running")
	// ErrUnsupported: the VM has a disk that cannot be backed up.
	ErrUnsupported = errors.New("cannot be backed up")
	// ErrSnapshotLeft: a snapshot of ours could not be removed; it stays in the
	// journal and the next run for its host removes it.
	ErrSnapshotLeft = errors.New("a snapshot is left on the host")
	// ErrRefused: a restore or copy cannot begin; the text lists why.
	ErrRefused = errors.New("refused")
	// ErrVerify: what was written does not read back as it is in the
	// generation.
	ErrVerify = errors.New("verification failed")
)

// Phases of the work, in the order in which they come.
const (
	PhaseCheck    = "check"    // inventory, room
	PhaseCleanup  = "cleanup"  // removing what a dead run left
	PhaseSnapshot = "snapshot" // making the snapshot
	PhaseAudit    = "audit"    // sampling what is said to be unchanged
	PhaseRead     = "read"     // reading disks (also: reading images, copying)
	PhaseUpload   = "upload"   // writing disks to a host
	PhaseCommit   = "commit"   // the generation becomes one
	PhaseRemove   = "remove"   // removing the snapshot
	PhaseVerify   = "verify"   // reading back
	PhaseRegister = "register" // registering a restored VM
	PhasePowerOn  = "power-on"
)

// Event tells how far a run is. Total is an estimate that may grow, 0 when there
// is nothing to count.
type Event struct {
	Phase   string `json:"phase"`
	Disk    string `json:"disk,omitempty"`    // whose bytes moved; "" for the VM as a whole
	Done    int64  `json:"done,omitempty"`    // bytes in this phase, all disks together
	Total   int64  `json:"total,omitempty"`   // bytes in this phase, all disks together
	Message string `json:"message,omitempty"` // for people, when there is something to say
}

// Options of Run. Repo, Host, HostName, VM and State are required.
type Options struct {
	Repo     *repo.Repository
	Host     *esxi.Host
	HostName string // the operator's name for the host: the first half of the VM's name in the repository
	VM       string // as the host names it
	State    string // directory for the journal and locks, made when absent; the same in every run on this machine
	// Full reads all allocated areas and takes nothing from the previous
	// generation.
	Full bool
	// Quiesce asks the guest to settle first. A guest that cannot is backed up
	// without, which the result says.
	Quiesce     bool
	Compression string // as repo.SessionOptions
	// AuditBlocks is how many blocks a disk are read again although they are said
	// to be unchanged; 0 is 16, negative is none.
	AuditBlocks int
	// Progress is called often, from one goroutine at a time; it must not block.
	Progress func(Event)
	Logger   *slog.Logger
	Clock    func() time.Time // nil is time.Now
}

// Result is what a run or an import came to. Sizes are in bytes.
type Result struct {
	Host        string `json:"host"`
	VM          string `json:"vm"`
	Generation  string `json:"generation"` // empty when there is none
	Sequence    uint64 `json:"sequence"`
	Mode        string `json:"mode"` // full, incremental, scan, import
	Reason      string `json:"reason"`
	Consistency string `json:"consistency"`
	// BytesCapacity is the size of the disks.
	BytesCapacity int64 `json:"bytes_capacity"`
	// BytesChanged is what the changed (or allocated) areas come to, rounded out
	// to whole blocks.
	BytesChanged int64 `json:"bytes_changed"`
	// BytesRead is what was asked of the host (or of image files) for data.
	BytesRead int64 `json:"bytes_read"`
	// BytesHealed is how much of the previous generation was lost in damaged packs
	// and is in this one again, read with the rest (holes excepted).
	BytesHealed int64 `json:"bytes_healed"`
	// BytesAudited is what was read to sample the truth of change tracking.
	BytesAudited int64 `json:"bytes_audited"`
	// BytesStored is what the repository grew by, compressed and sealed.
	BytesStored int64        `json:"bytes_stored"`
	Seconds     float64      `json:"seconds"`
	Disks       []DiskResult `json:"disks"`
	Warnings    []string     `json:"warnings,omitempty"`

	// Ref is the generation; its zero value says that there is none.
	Ref repo.Ref `json:"-"`
}

// DiskResult is one disk's part of a Result.
type DiskResult struct {
	Label         string `json:"label"`
	Name          string `json:"name"` // base of the file names in the generation
	Mode          string `json:"mode"`
	Reason        string `json:"reason,omitempty"`
	BytesCapacity int64  `json:"bytes_capacity"`
	BytesChanged  int64  `json:"bytes_changed"`
	BytesRead     int64  `json:"bytes_read"`
	BytesHealed   int64  `json:"bytes_healed"`
	BytesAudited  int64  `json:"bytes_audited"`
	BytesNew      int64  `json:"bytes_new"` // blocks the repository did not have, before compression
}

// clock, logger: what every entry point fills in.
func orNow(clock func() time.Time) func() time.Time {
	if clock == nil {
		return time.Now //nolint:forbidigo // the one place where the real clock comes in
	}
	return clock
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

// meter counts bytes of one phase and reports them, one event at a time.
type meter struct {
	mu       sync.Mutex
	progress func(Event)
	phase    string
	done     int64
	total    int64
}

func newMeter(progress func(Event)) *meter { return &meter{progress: progress} }

// begin starts a phase of so many bytes.
func (m *meter) begin(phase string, total int64, message string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.phase, m.done, m.total = phase, 0, total
	m.tell(Event{Message: message})
}

// add counts bytes done on one disk; a phase that was estimated too small grows.
func (m *meter) add(disk string, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done += n
	m.total = max(m.total, m.done)
	m.tell(Event{Disk: disk})
}

// grow adds to what is to be done.
func (m *meter) grow(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total += n
}

func (m *meter) tell(e Event) {
	if m.progress != nil {
		e.Phase, e.Done, e.Total = m.phase, m.done, m.total
		m.progress(e)
	}
}

// newRunID is 16 hexadecimal digits that no other run has.
func newRunID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// lastGrace is how long undoing may take when the caller has given up.
const lastGrace = 30 * time.Second

// undoContext is for cleaning up: it outlives ctx, by lastGrace when ctx ends
// first, and never lasts longer than limit.
func undoContext(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	var late *time.Timer
	var mu sync.Mutex
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		late = time.AfterFunc(lastGrace, cancel)
	})
	return undo, func() {
		stop()
		mu.Lock()
		defer mu.Unlock()
		if late != nil {
			late.Stop()
		}
		cancel()
	}
}

// size writes bytes for people.
func size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d bytes", n)
	}
	f := float64(n)
	for _, suffix := range []string{"KiB", "MiB", "GiB"} {
		f /= unit
		if f < unit {
			return fmt.Sprintf("%.1f %s", f, suffix)
		}
	}
	return fmt.Sprintf("%.1f TiB", f/unit)
}

// plural joins a count and a noun.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// oneLine keeps an error's text fit for a reason or a message.
func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}
