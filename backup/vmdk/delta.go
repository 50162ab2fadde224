package vmdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// ReadWriterAt is a link's file while it is written.
type ReadWriterAt interface {
	io.ReaderAt
	io.WriterAt
}

// Delta is a snapshot's link that can be written, in either format. The simulated host keeps its running links in it; no real
// host lets anyone else write one.
//
// Data is written before the table entry that names it, a table before its directory entry, so that a process killed at any
// point leaves a link that holds every write that returned. Writes need exclusive access, reads beside them included.
type Delta struct {
	ext extent
	g   *grains
	f   ReadWriterAt
	fmt deltaFormat
}

// deltaFormat is what differs between the two formats when a link grows.
type deltaFormat interface {
	// addTable makes room for a table of zeros and returns its place and directory entry.
	addTable() (at int64, entry uint64, err error)
	// addGrains makes room for k grains in a row and returns the place of the first.
	addGrains(k int64) (at int64, err error)
	// grainEntry is the table entry for a grain at a place.
	grainEntry(at int64) uint64
	// zeroEntry is the table entry for a grain of zeros; false when the format has none that all readers know.
	zeroEntry() (uint64, bool)
}

// CreateDelta writes an empty link into an empty file. createType is TypeVMFSSparse (capacity below 2 TiB) or TypeSESparse (below
// 64 TiB); the capacity, in bytes, is a multiple of SectorSize.
func CreateDelta(ctx context.Context, f ReadWriterAt, createType string, capacity int64) (*Delta, error) {
	if capacity <= 0 || capacity%SectorSize != 0 {
		return nil, fmt.Errorf("link of %d bytes: not a positive number of sectors", capacity)
	}
	var err error
	switch createType {
	case TypeVMFSSparse:
		err = initCOWD(f, capacity/SectorSize)
	case TypeSESparse:
		err = initSESparse(f, capacity/SectorSize)
	default:
		err = fmt.Errorf("link of type %q: %w", createType, ErrUnsupported)
	}
	if err != nil {
		return nil, err
	}
	return OpenDelta(ctx, f, -1, createType)
}

// OpenDelta opens a link to be written. size is the file's length in bytes, -1 for one just created.
func OpenDelta(ctx context.Context, f ReadWriterAt, size int64, createType string) (*Delta, error) {
	src, cache := &source{File: File{R: f, Size: -1}, name: createType}, newPageCache(0)
	switch createType {
	case TypeVMFSSparse:
		c, err := openCOWD(ctx, src, cache)
		if err != nil {
			return nil, err
		}
		// The header's free sector may be behind when the writer was killed; the file's length never is.
		w := &cowdWriter{f: f, grain: c.grain / SectorSize, free: max(c.free, (size+SectorSize-1)/SectorSize)}
		return &Delta{ext: c, g: &c.grains, f: f, fmt: w}, nil
	case TypeSESparse:
		s, err := openSESparse(ctx, src, cache)
		if err != nil {
			return nil, err
		}
		w := &seWriter{f: f, layout: s.layout, table: s.freeTable}
		if at := int64(s.layout.GrainsAt) * SectorSize; size > at {
			w.grain = (size - at + s.grain - 1) / s.grain
		}
		return &Delta{ext: s, g: &s.grains, f: f, fmt: w}, nil
	}
	return nil, fmt.Errorf("link of type %q: %w", createType, ErrUnsupported)
}

// Capacity is the disk's size in bytes.
func (d *Delta) Capacity() int64 { return d.g.size }

// WriteAt writes p at off, inside the capacity. What p leaves of a grain comes from the parent (nil: zeros).
func (d *Delta) WriteAt(ctx context.Context, p []byte, off int64, parent io.ReaderAt) error {
	return d.write(ctx, p, int64(len(p)), off, parent)
}

// Zero makes n bytes at off zero, with entries instead of bytes where the format can: as the host does when the guest unmaps.
func (d *Delta) Zero(ctx context.Context, off, n int64, parent io.ReaderAt) error {
	return d.write(ctx, nil, n, off, parent)
}

// write is WriteAt; with p nil it writes zeros.
func (d *Delta) write(ctx context.Context, p []byte, n, off int64, parent io.ReaderAt) error {
	if off < 0 || n > d.g.size-off {
		return fmt.Errorf("write of %d bytes at %d: the disk has %d", n, off, d.g.size)
	}
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		i := off / d.g.span()
		at, err := d.tableFor(ctx, i)
		if err != nil {
			return err
		}
		page, err := d.g.cache.get(ctx, d.g.src, at, d.g.perTable*d.g.entry)
		if err != nil {
			return err
		}
		m, err := d.writeRun(p, min(n, (i+1)*d.g.span()-off), off, at, page, i, parent)
		if err != nil {
			return err
		}
		if p != nil {
			p = p[m:]
		}
		n, off = n-m, off+m
	}
	return nil
}

// writeRun writes the first grains of [off, off+n), all inside table i, as many as can be treated alike.
func (d *Delta) writeRun(p []byte, n, off, at int64, page []byte, i int64, parent io.ReaderAt) (int64, error) {
	g := d.g
	j, inside := off%g.span()/g.grain, off%g.grain
	k, pos, err := g.grain1(page, i, j)
	if err != nil {
		return 0, err
	}
	whole := inside == 0 && n >= min(g.grain, g.size-off)
	if e, ok := d.fmt.zeroEntry(); p == nil && ok && whole {
		count := max(n/g.grain, 1)
		return min(n, count*g.grain), d.setEntries(at, page, j, count, func(int64) uint64 { return e })
	}
	if p == nil {
		n = min(n, 1<<20)
		p = make([]byte, n)
	}
	if k == data {
		m := min(n, g.grain-inside)
		for m < n {
			j++
			if k2, pos2, err := g.grain1(page, i, j); err != nil || k2 != data || pos2 != pos+inside+m {
				break
			}
			m = min(m+g.grain, n)
		}
		_, err := d.f.WriteAt(p[:m], pos+inside)
		return m, err
	}
	if inside != 0 || n < g.grain {
		// Part of a grain that this link does not have yet: the rest is copied up.
		m := min(n, g.grain-inside)
		buf := make([]byte, g.grain)
		if k == fromParent && parent != nil {
			if _, err := parent.ReadAt(buf[:min(g.grain, g.size-(off-inside))], off-inside); err != nil && !errors.Is(err, io.EOF) {
				return 0, fmt.Errorf("copy up the grain at %d: %w", off-inside, err)
			}
		}
		copy(buf[inside:], p[:m])
		return m, d.newGrains(buf, 1, at, page, j)
	}
	count := int64(1)
	for (count+1)*g.grain <= n {
		if k2, _, err := g.grain1(page, i, j+count); err != nil || k2 == data {
			break
		}
		count++
	}
	return count * g.grain, d.newGrains(p[:count*g.grain], count, at, page, j)
}

// newGrains writes count grains and then their table entries, which begin with entry j.
func (d *Delta) newGrains(p []byte, count, at int64, page []byte, j int64) error {
	pos, err := d.fmt.addGrains(count)
	if err != nil {
		return err
	}
	if _, err := d.f.WriteAt(p, pos); err != nil {
		return err
	}
	return d.setEntries(at, page, j, count, func(i int64) uint64 { return d.fmt.grainEntry(pos + i*d.g.grain) })
}

// setEntries changes the entries in the file and then in the cached page, so that a failed write is not taken for done.
func (d *Delta) setEntries(at int64, page []byte, j, count int64, entry func(i int64) uint64) error {
	raw := make([]byte, count*d.g.entry)
	for i := range count {
		if d.g.entry == 4 {
			binary.LittleEndian.PutUint32(raw[i*4:], uint32(entry(i)))
		} else {
			binary.LittleEndian.PutUint64(raw[i*8:], entry(i))
		}
	}
	if _, err := d.f.WriteAt(raw, at+j*d.g.entry); err != nil {
		return err
	}
	copy(page[j*d.g.entry:], raw)
	return nil
}

// tableFor returns the place of table i, which it makes when there is none.
func (d *Delta) tableFor(ctx context.Context, i int64) (int64, error) {
	at, err := d.g.table(ctx, i)
	if err != nil || at != 0 {
		return at, err
	}
	at, entry, err := d.fmt.addTable()
	if err != nil {
		return 0, err
	}
	page, first, err := d.g.directoryRun(ctx, i)
	if err != nil {
		return 0, err
	}
	return at, d.setEntries(d.g.directory+first*d.g.entry, page, i-first, 1, func(int64) uint64 { return entry })
}

// cowdWriter hands out sectors at the end of the file.
type cowdWriter struct {
	f     ReadWriterAt
	grain int64 // in sectors
	free  int64
}

func initCOWD(f ReadWriterAt, sectors int64) error {
	if sectors > math.MaxUint32 {
		return fmt.Errorf("a VMFSsparse link of %d sectors: %w", sectors, ErrUnsupported)
	}
	tables := (sectors + cowdPerTable - 1) / cowdPerTable
	free := cowdDirectory + (tables*4+SectorSize-1)/SectorSize
	h := make([]byte, cowdHeader)
	copy(h, cowdMagic)
	for i, v := range []int64{1, 3, sectors, 1, cowdDirectory, tables, free} {
		binary.LittleEndian.PutUint32(h[4+4*i:], uint32(v))
	}
	if _, err := f.WriteAt(h, 0); err != nil {
		return err
	}
	_, err := f.WriteAt(make([]byte, SectorSize), (free-1)*SectorSize)
	return err
}

func (w *cowdWriter) take(sectors int64) (int64, error) {
	at := w.free
	if at+sectors > math.MaxUint32 {
		return 0, fmt.Errorf("a VMFSsparse link cannot grow beyond 2 TiB: %w", ErrUnsupported)
	}
	w.free += sectors
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], uint32(w.free))
	_, err := w.f.WriteAt(b[:], 28)
	return at * SectorSize, err
}

func (w *cowdWriter) addTable() (int64, uint64, error) {
	at, err := w.take(cowdPerTable * 4 / SectorSize)
	if err == nil {
		_, err = w.f.WriteAt(make([]byte, cowdPerTable*4), at)
	}
	return at, uint64(at / SectorSize), err
}

func (w *cowdWriter) addGrains(k int64) (int64, error) { return w.take(k * w.grain) }

func (w *cowdWriter) grainEntry(at int64) uint64 { return uint64(at / SectorSize) }

// zeroEntry: the specification has one, but QEMU takes it for sector 1.
func (w *cowdWriter) zeroEntry() (uint64, bool) { return 0, false }

// seWriter takes tables from the space set apart for them, grains from the end of the file. The free bitmap and the back map
// have their places but stay zero: what is in them on a host is not known, and no reader needs it.
type seWriter struct {
	f      ReadWriterAt
	layout seLayout
	table  int64 // next free
	grain  int64
}

func initSESparse(f ReadWriterAt, sectors int64) error {
	if sectors > maxSESparse {
		return fmt.Errorf("an SEsparse link of %d sectors: %w", sectors, ErrUnsupported)
	}
	const align = 2048 // the parts begin at whole MiB
	l := seLayout{
		Magic: seMagic, Version: seVersion, Capacity: uint64(sectors), GrainSize: seGrain, TableSize: seTable,
		VolatileAt: 1, VolatileSize: 1, JournalHeaderAt: 2, JournalHeaderSize: 2, JournalAt: align, JournalSize: align,
	}
	grains := (uint64(sectors) + seGrain - 1) / seGrain
	tables := (grains + sePerTable - 1) / sePerTable
	free := l.JournalAt + l.JournalSize
	place := func(bytes uint64) (at, size uint64) {
		at, size = free, (bytes+SectorSize-1)/SectorSize
		free = (at + size + align - 1) / align * align
		return at, size
	}
	l.DirectoryAt, l.DirectorySize = place(tables * 8)
	l.TablesAt, l.TablesSize = place(tables * seTable * SectorSize)
	l.BitmapAt, l.BitmapSize = place((grains + 7) / 8)
	l.BackAt, l.BackSize = place(grains * 8)
	l.GrainsAt, l.GrainsSize = place(grains * seGrain * SectorSize)
	h := make([]byte, seHeader)
	if _, err := binary.Encode(h, binary.LittleEndian, &l); err != nil {
		return err
	}
	if _, err := f.WriteAt(h, 0); err != nil {
		return err
	}
	w := &seWriter{f: f, layout: l}
	if err := w.writeVolatile(); err != nil {
		return err
	}
	// Tables and directory are inside the file from the start, as holes.
	_, err := f.WriteAt(make([]byte, SectorSize), int64(l.GrainsAt-1)*SectorSize)
	return err
}

func (w *seWriter) writeVolatile() error {
	h := make([]byte, seHeader)
	if _, err := binary.Encode(h, binary.LittleEndian, &seVolatile{Magic: seVolatileMagic, FreeTable: uint64(w.table)}); err != nil {
		return err
	}
	_, err := w.f.WriteAt(h, int64(w.layout.VolatileAt)*SectorSize)
	return err
}

func (w *seWriter) addTable() (int64, uint64, error) {
	n := w.table
	if (n+1)*seTable > int64(w.layout.TablesSize) {
		return 0, 0, fmt.Errorf("%w: SEsparse link without room for table %d", ErrFormat, n)
	}
	w.table++
	// The count first: killed in between, a table is lost, and none is used twice.
	err := w.writeVolatile()
	return int64(w.layout.TablesAt)*SectorSize + n*seTable*SectorSize, seTypeTable<<60 | uint64(n), err
}

func (w *seWriter) addGrains(k int64) (int64, error) {
	at := int64(w.layout.GrainsAt)*SectorSize + w.grain*seGrain*SectorSize
	w.grain += k
	return at, nil
}

func (w *seWriter) grainEntry(at int64) uint64 {
	n := uint64(at/SectorSize-int64(w.layout.GrainsAt)) / seGrain
	return seTypeGrain<<60 | n&0xfff<<48 | n>>12
}

func (w *seWriter) zeroEntry() (uint64, bool) { return seTypeZero << 60, true }
