package vdisk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"hikae/backup/vmdk"
)

// Each link has its own table: the blocks that were written while it ran, each with the number of the change id that was
// stamped when the link froze. Merging two links merges their tables.
//
// Numbers grow by one with each snapshot. A snapshot that is reverted to gives its new running link a new identity: numbers
// would come again otherwise, and change ids taken from what was thrown away would seem to belong to this disk.

// tracker is the running link's change tracking file, opened for writing.
type tracker struct {
	file  *os.File
	head  *vmdk.Tracking
	table []byte
}

func readTracking(path string) (*vmdk.Tracking, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	head := make([]byte, vmdk.TrackingHeaderSize)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t, err := vmdk.ParseTracking(head, st.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

func readTable(path string, head *vmdk.Tracking) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	table := make([]byte, 4*head.Blocks())
	if _, err := f.ReadAt(table, vmdk.TrackingHeaderSize); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return table, nil
}

func openTracker(path string, head *vmdk.Tracking) (*tracker, error) {
	table, err := readTable(path, head)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &tracker{file: f, head: head, table: table}, nil
}

// mark records a write: in the file at once, so that a kill loses nothing.
func (t *tracker) mark(off, n int64) error {
	first, last := off/t.head.Granularity, (off+n-1)/t.head.Granularity
	if !stamp(t.table, first, last, t.head.Number) {
		return nil
	}
	_, err := t.file.WriteAt(t.table[4*first:4*(last+1)], vmdk.TrackingHeaderSize+4*first)
	return err
}

// stamp gives blocks first to last a number, and says whether any had another.
func stamp(table []byte, first, last int64, number uint32) (changed bool) {
	for b := first; b <= last; b++ {
		if e := table[4*b : 4*b+4]; binary.LittleEndian.Uint32(e) != number {
			binary.LittleEndian.PutUint32(e, number)
			changed = true
		}
	}
	return changed
}

// TrackingOptions of EnableTracking.
type TrackingOptions struct {
	// WithSnapshots allows enabling while snapshots exist, with what real hosts since 6.5 make of it: no error, and a
	// change tracking that misses whatever the guest writes until the next snapshot, or until the disk is closed.
	WithSnapshots bool
}

// EnableTracking turns change tracking on, with a new identity; what is allocated counts as written under number 1. It does
// nothing when it is on. ErrSnapshots: the disk has snapshots, and the options do not allow that.
func (d *Disk) EnableTracking(o TrackingOptions) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil || d.tracked() {
		return err
	}
	if len(d.links) > 1 && !o.WithSnapshots {
		return fmt.Errorf("%s: change tracking cannot be enabled: %w", d.name, ErrSnapshots)
	}
	var uuid [16]byte
	if _, err := io.ReadFull(d.o.Rand, uuid[:]); err != nil {
		return err
	}
	if err := d.release(); err != nil {
		return err
	}
	for i, l := range d.links {
		head := d.newTracking(uuid, uint32(i+1), vmdk.TrackingGranularity(d.size, d.o.Hardware))
		table := make([]byte, 4*head.Blocks())
		if len(d.links) == 1 {
			areas, err := d.chain.Allocated(context.Background())
			if err != nil {
				return err
			}
			for _, a := range areas {
				stamp(table, a.Offset/head.Granularity, (a.End()-1)/head.Granularity, head.Number)
			}
		}
		if err := d.track(l, head, bytes.TrimRight(table, "\x00")); err != nil {
			return err
		}
	}
	d.blind = len(d.links) > 1
	return d.rebuild()
}

func (d *Disk) newTracking(uuid [16]byte, number uint32, granularity int64) *vmdk.Tracking {
	return &vmdk.Tracking{Capacity: d.size, Granularity: granularity, UUID: uuid, Number: number}
}

// track gives a link a change tracking file. Without a table nothing counts as written.
func (d *Disk) track(l *link, head *vmdk.Tracking, table []byte) error {
	name := strings.TrimSuffix(filepath.Base(l.path), ".vmdk") + "-ctk.vmdk"
	if err := replaceSized(filepath.Join(l.dir(), name), head.Size(), head.Header(), table); err != nil {
		return err
	}
	desc := l.desc.Clone()
	desc.Version, desc.ChangeTrackPath = 3, name
	if err := writeDescriptor(l.path, desc); err != nil {
		return err
	}
	l.desc, l.tracking = desc, head
	return nil
}

// DisableTracking turns change tracking off and deletes its files.
func (d *Disk) DisableTracking() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return err
	}
	if err := d.release(); err != nil {
		return err
	}
	for _, l := range d.links {
		if l.desc.ChangeTrackPath == "" {
			continue
		}
		file, desc := l.ctk(), l.desc.Clone()
		desc.Version, desc.ChangeTrackPath = 1, ""
		if err := writeDescriptor(l.path, desc); err != nil {
			return err
		}
		l.desc, l.tracking = desc, nil
		if err := removeFiles(file); err != nil {
			return err
		}
	}
	d.blind = false
	return d.rebuild()
}

func (d *Disk) tracked() bool { return d.links[len(d.links)-1].tracking != nil }

// Tracking tells whether change tracking is on.
func (d *Disk) Tracking() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.tracked()
}

// MissNextWrite makes change tracking silently miss the next guest write, for tests of those who must notice.
func (d *Disk) MissNextWrite() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.miss = true
}

// ChangeID is link i's change id: of all that was written up to the moment the link froze. "" when change tracking is off.
func (d *Disk) ChangeID(i int) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if t := d.links[i].tracking; t != nil {
		return t.ChangeID()
	}
	return ""
}

// Changed is the areas written after change id since, up to link i's state, in order and clipped to the disk: link i is a frozen
// link, or the running one of a VM that is off. ErrTracking: off at that link; ErrChangeID: since is of another disk, of
// before change tracking was enabled anew or a snapshot reverted to, or newer than link i.
func (d *Disk) Changed(i int, since string) ([]vmdk.Area, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.open(); err != nil {
		return nil, err
	}
	if i < 0 || i >= len(d.links) {
		return nil, fmt.Errorf("%s: link %d: %w", d.name, i, ErrNoSnapshot)
	}
	head := d.links[i].tracking
	if head == nil {
		return nil, fmt.Errorf("%s: %w", d.name, ErrTracking)
	}
	uuid, number, err := vmdk.ParseChangeID(since)
	if err != nil || uuid != head.UUID || number > head.Number {
		return nil, fmt.Errorf("%s: change id %q: %w", d.name, since, ErrChangeID)
	}
	var areas []vmdk.Area
	// Below a link of another identity was before since, whatever the numbers say.
	for ; i >= 0 && d.links[i].tracking != nil && d.links[i].tracking.UUID == uuid; i-- {
		l := d.links[i]
		table, err := readTable(l.ctk(), l.tracking)
		if err != nil {
			return nil, err
		}
		g := l.tracking.Granularity
		for b := int64(0); 4*b < int64(len(table)); b++ {
			if binary.LittleEndian.Uint32(table[4*b:]) <= number {
				continue
			}
			a := vmdk.Area{Offset: b * g, Length: min(g, d.size-b*g)}
			if n := len(areas); n > 0 && areas[n-1].End() == a.Offset {
				areas[n-1].Length += a.Length
			} else {
				areas = append(areas, a)
			}
		}
	}
	return vmdk.MergeAreas(areas), nil
}

// Allocated is the areas that may hold data in link i's state.
func (d *Disk) Allocated(ctx context.Context, i int) ([]vmdk.Area, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.open(); err != nil {
		return nil, err
	}
	if i < 0 || i >= len(d.links) {
		return nil, fmt.Errorf("%s: link %d: %w", d.name, i, ErrNoSnapshot)
	}
	return d.chain.At(i).Allocated(ctx)
}

// mergeTables writes the tracking file that link p has once it has taken in its child c.
func mergeTables(p, c *link) error {
	if p.tracking == nil || c.tracking == nil {
		return nil
	}
	child, err := readTable(c.ctk(), c.tracking)
	if err != nil {
		return err
	}
	// Where a revert lies between them, what is older than it belongs to no change id that is still good.
	if p.tracking.UUID == c.tracking.UUID {
		parent, err := readTable(p.ctk(), p.tracking)
		if err != nil {
			return err
		}
		if len(parent) != len(child) {
			return errors.New("change tracking files of two sizes in one chain")
		}
		for i := 0; i < len(child); i += 4 {
			le := binary.LittleEndian
			le.PutUint32(child[i:], max(le.Uint32(child[i:]), le.Uint32(parent[i:])))
		}
	}
	head := *c.tracking
	return replace(p.ctk(), head.Header(), child)
}
