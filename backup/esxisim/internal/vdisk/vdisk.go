// Package vdisk keeps the disk of a simulated VM in true VMDK files.
package vdisk

import (
	"context"
	"errors"
	"io"

	"hikae/backup/vmdk"
)

var errNotYet = errors.New("not written yet")

var (
	// ErrChangeID means a change id of another disk or tracking, or one newer than the point asked about.
	ErrChangeID = errors.New("change id does not belong to this disk's change tracking")
	// ErrTracking means change tracking is off.
	ErrTracking = errors.New("change tracking is off")
	// ErrSnapshots means a call that needs a disk without snapshots.
	ErrSnapshots = errors.New("the disk has snapshots")
	// ErrNoSnapshot means a snapshot number that does not exist.
	ErrNoSnapshot = errors.New("no such snapshot")
)

// Format is how a snapshot's running link is written.
type Format int

// FormatAuto chooses as ESXi does: SEsparse on VMFS 6 and from 2 TiB on, else COWD.
const (
	FormatAuto Format = iota
	FormatFlat
	FormatCOWD
	FormatSESparse
)

// Options of a disk. The zero value: thick (lazily zeroed), lsilogic, random identity, VMFS 6.
type Options struct {
	Thin    bool
	Eager   bool   // eagerly zeroed thick: the whole file is written
	Adapter string // "" is lsilogic
	UUID    string // "60 00 C2 9…" form; "" is random
	VMFS    int    // 5 or 6; 0 is 6
	Rand    io.Reader
}

// Link is one link's files, as full paths.
type Link struct {
	Descriptor, Extent, Tracking string // Tracking is "" when off
	Format                       Format
	ChangeID                     string // "" when tracking is off
}

// TrackingOptions of EnableTracking.
type TrackingOptions struct {
	// WithSnapshots allows enabling while snapshots exist, and then silently misses what the guest writes to the link that runs now (the real hosts' bug).
	WithSnapshots bool
}

// Disk is one disk. Safe for concurrent use.
type Disk struct{}

// Create makes NAME.vmdk + NAME-flat.vmdk in dir.
func Create(dir, name string, capacity int64, o Options) (*Disk, error) { return nil, errNotYet }

// ImportRaw makes a disk with a raw image's content, holes kept. The capacity is the image's size rounded up to whole sectors.
func ImportRaw(ctx context.Context, dir, name, raw string, o Options) (*Disk, error) {
	return nil, errNotYet
}

// Open opens a disk by the descriptor of its running link.
func Open(descriptor string, o Options) (*Disk, error) { return nil, errNotYet }

// Close closes the files.
func (d *Disk) Close() error { return errNotYet }

// Sync forces everything to the storage.
func (d *Disk) Sync() error { return errNotYet }

// Capacity in bytes.
func (d *Disk) Capacity() int64 { return 0 }

// ReadAt reads what the guest sees now.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) { return 0, errNotYet }

// WriteAt writes as the guest, to the running link.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) { return 0, errNotYet }

// NextData finds the guest's first data at or after off; io.EOF: only holes follow.
func (d *Disk) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	return 0, 0, errNotYet
}

// Become makes guest writes until the disk equals r (in 64 KiB steps, only what differs); returns the bytes written.
// If r has NextData(ctx, off), as *vmdk.Image has, its holes are not read.
func (d *Disk) Become(ctx context.Context, r io.ReaderAt, size int64) (int64, error) {
	return 0, errNotYet
}

// Links are the links, base first; the last one is the running link.
func (d *Disk) Links() []Link { return nil }

// Descriptor is a copy of link i's descriptor.
func (d *Disk) Descriptor(i int) *vmdk.Descriptor { return nil }

// Snapshot freezes the running link and starts a new one. The frozen link's index is len(Links())-2 afterwards.
func (d *Disk) Snapshot(f Format) error { return errNotYet }

// RemoveSnapshot removes the snapshot whose state is link i: merges link i+1 into link i. switched (may be nil) is called when the new chain is
// complete and valid, before the old files are deleted, so that the caller can rewrite what names them (the .vmx).
func (d *Disk) RemoveSnapshot(ctx context.Context, i int, switched func(links []Link) error) error {
	return errNotYet
}

// RevertTo throws away everything above link i and starts a new running link over it. switched as in RemoveSnapshot.
func (d *Disk) RevertTo(i int, switched func(links []Link) error) error { return errNotYet }

// EnableTracking starts change tracking with a new identity. ErrSnapshots when snapshots exist and the options do not allow it.
func (d *Disk) EnableTracking(o TrackingOptions) error { return errNotYet }

// DisableTracking removes change tracking.
func (d *Disk) DisableTracking() error { return errNotYet }

// Tracking says whether change tracking is on.
func (d *Disk) Tracking() bool { return false }

// MissNextWrite makes change tracking silently miss the next guest write.
func (d *Disk) MissNextWrite() {}

// ChangeID is link i's change id, "52 f3 … /2"; "" when tracking is off.
func (d *Disk) ChangeID(i int) string { return "" }

// Changed is the areas written after change id since, up to link i's state (i: a frozen link, or the running link of a VM that is off).
func (d *Disk) Changed(i int, since string) ([]vmdk.Area, error) { return nil, errNotYet }

// Allocated is the areas that may hold data in link i's state.
func (d *Disk) Allocated(ctx context.Context, i int) ([]vmdk.Area, error) { return nil, errNotYet }
