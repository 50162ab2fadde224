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
	"slices"
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
	at    int64 // where the table begins
}

// readTracking reads a change tracking file's header. strange: the file has a layout that nobody else knows.
func readTracking(path string) (t *vmdk.Tracking, strange bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	head := make([]byte, vmdk.TrackingHeaderSize)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, false, fmt.Errorf("%s: %w", path, err)
	}
	size := st.Size()
	if strange = bytes.HasPrefix(head, strangeHeader()[:12]); strange {
		size -= int64(len(head))
		if _, err := f.ReadAt(head, int64(len(head))); err != nil {
			return nil, false, fmt.Errorf("%s: %w", path, err)
		}
	}
	if t, err = vmdk.ParseTracking(head, size); err != nil {
		return nil, false, fmt.Errorf("%s: %w", path, err)
	}
	return t, strange, nil
}

// strangeHeader is what stands before the header in a layout of this package's own, for tests of those who must notice that
// they do not know it. It is what a next version would look like from outside: the magic is right, the version is not.
func strangeHeader() []byte {
	h := make([]byte, vmdk.TrackingHeaderSize)
	binary.LittleEndian.PutUint32(h, 0xf61972a2)
	binary.LittleEndian.PutUint32(h[4:], 2)
	binary.LittleEndian.PutUint32(h[12:], 2*vmdk.TrackingHeaderSize)
	return h
}

// tableAt is where a link's table begins.
func (l *link) tableAt() int64 {
	if l.strange {
		return 2 * vmdk.TrackingHeaderSize
	}
	return vmdk.TrackingHeaderSize
}

// writeTracking replaces a link's change tracking file.
func writeTracking(path string, head *vmdk.Tracking, table []byte, strange bool) error {
	if strange {
		return replaceSized(path, head.Size()+vmdk.TrackingHeaderSize, strangeHeader(), head.Header(), table)
	}
	return replaceSized(path, head.Size(), head.Header(), table)
}

// readTable reads a link's table, and tells which parts of it, in bytes, are not holes: those of a big disk are long, and mostly
// say that nothing was written.
func (l *link) readTable() (table []byte, parts []vmdk.Area, err error) {
	path := l.ctk()
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	local, err := vmdk.NewLocalFile(f)
	if err != nil {
		return nil, nil, err
	}
	at := l.tableAt()
	table = make([]byte, 4*l.tracking.Blocks())
	for off, end := at, at+int64(len(table)); off < end; {
		start, stop, err := local.NextData(off)
		if errors.Is(err, io.EOF) || err == nil && start >= end {
			break
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		// Entries are never cut: holes begin and end at whole blocks of the file system.
		start, stop = max(start, at), min((stop+3)/4*4, end)
		if _, err := f.ReadAt(table[start-at:stop-at], start); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		parts = append(parts, vmdk.Area{Offset: start - at, Length: stop - start})
		off = stop
	}
	return table, parts, nil
}

func (l *link) openTracker() (*tracker, error) {
	table, _, err := l.readTable()
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(l.ctk(), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &tracker{file: f, head: l.tracking, table: table, at: l.tableAt()}, nil
}

// mark records a write: in the file at once, so that a kill loses nothing.
func (t *tracker) mark(off, n int64) error {
	first, last := off/t.head.Granularity, (off+n-1)/t.head.Granularity
	if !stamp(t.table, first, last, t.head.Number) {
		return nil
	}
	_, err := t.file.WriteAt(t.table[4*first:4*(last+1)], t.at+4*first)
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
		if err := d.track(l, head, table); err != nil {
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
	if err := writeTracking(filepath.Join(l.dir(), name), head, table, d.strange()); err != nil {
		return err
	}
	desc := l.desc.Clone()
	desc.Version, desc.ChangeTrackPath = 3, name
	if err := writeDescriptor(l.path, desc); err != nil {
		return err
	}
	l.desc, l.tracking, l.strange = desc, head, d.strange()
	return nil
}

// strange tells whether the disk's change tracking files have the layout nobody knows.
func (d *Disk) strange() bool {
	return slices.ContainsFunc(d.links, func(l *link) bool { return l.tracking != nil && l.strange })
}

// UseStrangeTracking rewrites the change tracking files in a layout that nobody else knows. What they say stays. Tracking must
// be on.
func (d *Disk) UseStrangeTracking() error {
	return d.rewriteTracking(func(_ int, l *link) (*vmdk.Tracking, []byte, error) {
		table, _, err := l.readTable()
		return l.tracking, table, err
	}, true)
}

// ResetTracking gives change tracking a new identity under which everything counts as written: what a host makes of files it
// could not close. It does nothing when tracking is off.
func (d *Disk) ResetTracking() error {
	if !d.Tracking() {
		return nil
	}
	var uuid [16]byte
	if _, err := io.ReadFull(d.o.Rand, uuid[:]); err != nil {
		return err
	}
	return d.rewriteTracking(func(i int, l *link) (*vmdk.Tracking, []byte, error) {
		head := d.newTracking(uuid, uint32(i+1), l.tracking.Granularity)
		table := make([]byte, 4*head.Blocks())
		stamp(table, 0, head.Blocks()-1, head.Number)
		return head, table, nil
	}, false)
}

func (d *Disk) rewriteTracking(content func(i int, l *link) (*vmdk.Tracking, []byte, error), strange bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return err
	}
	if err := d.release(); err != nil {
		return err
	}
	strange = strange || d.strange()
	for i, l := range d.links {
		if l.tracking == nil {
			continue
		}
		head, table, err := content(i, l)
		if err == nil {
			err = writeTracking(l.ctk(), head, table, strange)
		}
		if err != nil {
			return errors.Join(err, d.rebuild())
		}
		l.tracking, l.strange = head, strange
	}
	return d.rebuild()
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
		table, parts, err := l.readTable()
		if err != nil {
			return nil, err
		}
		g := l.tracking.Granularity
		for _, part := range parts {
			for b := part.Offset / 4; 4*b < part.End(); b++ {
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
	child, _, err := c.readTable()
	if err != nil {
		return err
	}
	// Where a revert lies between them, what is older than it belongs to no change id that is still good.
	if p.tracking.UUID == c.tracking.UUID {
		parent, parts, err := p.readTable()
		if err != nil {
			return err
		}
		if len(parent) != len(child) {
			return errors.New("change tracking files of two sizes in one chain")
		}
		for _, part := range parts {
			for i := part.Offset; i < part.End(); i += 4 {
				le := binary.LittleEndian
				le.PutUint32(child[i:], max(le.Uint32(child[i:]), le.Uint32(parent[i:])))
			}
		}
	}
	head := *c.tracking
	return writeTracking(p.ctk(), &head, child, p.strange || c.strange)
}
