package repo

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"
)

var errNotYet = errors.New("not built yet")

// KDF sets the cost of turning a passphrase into a key; the zero value is the default.
type KDF struct {
	Time      uint32 // passes
	MemoryKiB uint32
	Threads   uint8
}

// InitOptions are the properties of a new repository.
type InitOptions struct {
	BlockSize  int    // 64, 128 (default) or 256 KiB, in bytes
	Passphrase []byte // opens the first key slot
	KDF        KDF
	Clock      func() time.Time // default time.Now
}

// Secret opens a key slot.
type Secret struct{ b []byte }

// Passphrase is the secret of a passphrase slot.
func Passphrase(p []byte) Secret { return Secret{p} }

// Options of Open; the zero value is useful.
type Options struct {
	Clock           func() time.Time
	Logger          *slog.Logger
	BlockCacheBytes int64  // default 32 MiB
	NodeCacheBytes  int64  // default 24 MiB
	Workers         int    // 0: GOMAXPROCS
	Version         string // of the program, for manifests
}

// Init makes a repository in dir, which must be absent or empty.
func Init(ctx context.Context, dir string, o InitOptions) error { return errNotYet }

// Repository is an open repository; safe for concurrent use.
type Repository struct{}

// Open opens the repository in dir.
func Open(ctx context.Context, dir string, secret Secret, o Options) (*Repository, error) {
	return nil, errNotYet
}

// Close ends it.
func (r *Repository) Close() error { return errNotYet }

// BlockSize in bytes.
func (r *Repository) BlockSize() int { return 0 }

// ID is 32 hexadecimal digits.
func (r *Repository) ID() string { return "" }

// Dir is the directory as given to Open.
func (r *Repository) Dir() string { return "" }

// VMs lists the VMs, sorted.
func (r *Repository) VMs(ctx context.Context) ([]VMID, error) { return nil, errNotYet }

// Refs lists a VM's generations, ascending by time, then sequence.
func (r *Repository) Refs(ctx context.Context, vm VMID) ([]Ref, error) { return nil, errNotYet }

// Resolve finds latest | time as shown | unique prefix | sequence number.
func (r *Repository) Resolve(ctx context.Context, vm VMID, selector string) (Ref, error) {
	return Ref{}, errNotYet
}

// Generation opens one.
func (r *Repository) Generation(ctx context.Context, ref Ref) (*Generation, error) {
	return nil, errNotYet
}

// Generation is one opened generation.
type Generation struct{}

// Ref names it.
func (g *Generation) Ref() Ref { return Ref{} }

// Manifest must not be changed.
func (g *Generation) Manifest() *Manifest { return nil }

// OpenDisk opens Manifest().Disks[i].
func (g *Generation) OpenDisk(i int) (*Disk, error) { return nil, errNotYet }

// Files is the folder view, sorted by name.
func (g *Generation) Files(ctx context.Context) ([]File, error) { return nil, errNotYet }

// File is one file of a generation's folder: either Data or Disk.
type File struct {
	Name        string
	Size        int64
	ModTime     time.Time
	Data        []byte
	Disk        *Disk
	StoredBytes int64 // bytes that are not holes
}

// Disk is one disk of a generation.
type Disk struct{}

var _ io.ReaderAt = (*Disk)(nil)

func (d *Disk) ReadAt(p []byte, off int64) (int, error) { return 0, errNotYet }

func (d *Disk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return 0, errNotYet
}

func (d *Disk) Size() int64 { return 0 }

func (d *Disk) DataBytes() int64 { return 0 }

func (d *Disk) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	return 0, 0, errNotYet
}

func (d *Disk) Matches(ctx context.Context, off int64, p []byte) (bool, error) {
	return false, errNotYet
}

func (d *Disk) Prefetch(off, n int64) {}

// SessionOptions of Begin.
type SessionOptions struct {
	Compression string
}

// Begin starts a session.
func (r *Repository) Begin(ctx context.Context, o SessionOptions) (*Session, error) {
	return nil, errNotYet
}

// Session writes generations.
type Session struct{}

// SessionStats counts what a session did, in bytes.
type SessionStats struct {
	WriteStats
	BytesStored int64 // published files: packs, index segments
}

// WriteStats counts what happened to written bytes.
type WriteStats struct {
	BytesWritten   int64 `json:"bytes_written"`   // given to Write
	BytesZero      int64 `json:"bytes_zero"`      // of these: zeros, and not stored
	BytesUnchanged int64 `json:"bytes_unchanged"` // of these: as in the parent
	BytesKnown     int64 `json:"bytes_known"`     // of these: stored before, elsewhere
	BytesNew       int64 `json:"bytes_new"`       // of these: stored now, before compression
	BytesSealed    int64 `json:"bytes_sealed"`    // what BytesNew became in packs
}

// DiskTree is a finished disk, ready for a DiskManifest.
type DiskTree struct {
	Root      []byte
	Levels    int
	Capacity  int64
	DataBytes int64
	Stats     WriteStats
}

func (s *Session) Disk(ctx context.Context, capacity int64, parent *Disk) (*DiskWriter, error) {
	return nil, errNotYet
}

func (s *Session) Commit(ctx context.Context, m Manifest) (Ref, error) { return Ref{}, errNotYet }

func (s *Session) Close() error { return errNotYet }

func (s *Session) Stats() SessionStats { return SessionStats{} }

// DiskWriter writes one disk.
type DiskWriter struct{}

func (w *DiskWriter) Write(ctx context.Context, off int64, p []byte, release func()) error {
	return errNotYet
}

func (w *DiskWriter) Zero(ctx context.Context, off, n int64) error { return errNotYet }

func (w *DiskWriter) Finish(ctx context.Context) (DiskTree, error) { return DiskTree{}, errNotYet }

func (w *DiskWriter) Abandon() {}

// CheckOptions of Check.
type CheckOptions struct {
	ReadData bool
	Progress func(done, total int64) // bytes of packs
}

// Problem is one finding of Check.
type Problem struct {
	What        string   `json:"what"`
	Pack        string   `json:"pack,omitempty"`
	Offset      int64    `json:"offset,omitempty"`
	Generations []string `json:"generations,omitempty"`
	Remedy      string   `json:"remedy,omitempty"`
}

// CheckReport is what Check found.
type CheckReport struct {
	Generations int       `json:"generations"`
	Disks       int       `json:"disks"`
	Nodes       int64     `json:"nodes"`
	Packs       int64     `json:"packs"`
	PackBytes   int64     `json:"pack_bytes"`
	Records     int64     `json:"records"`
	BytesRead   int64     `json:"bytes_read"`
	Problems    []Problem `json:"problems"`
}

// Check proves the repository.
func (r *Repository) Check(ctx context.Context, o CheckOptions) (*CheckReport, error) {
	return nil, errNotYet
}
