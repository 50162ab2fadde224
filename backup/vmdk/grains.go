package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
)

// directoryPage is how much of a grain directory is read at a time: a page of a host's directory covers 32 GiB (COWD) or
// 128 GiB (SEsparse), so opening a disk costs the same whatever its size, and a scan of an empty one few reads.
const directoryPage = 64 << 10

// grains is what COWD, SEsparse and hosted sparse extents have in common: a directory of tables of grains.
type grains struct {
	src       *source
	cache     *pageCache
	size      int64 // capacity in bytes
	grain     int64 // bytes a grain holds
	perTable  int64 // entries of a table
	entry     int64 // bytes of an entry, in directory and tables alike
	directory int64 // where the directory begins in the file
	tables    int64 // directory entries that matter: enough for size

	// tableAt turns a directory entry into the place of its table in the file; 0: there is none.
	tableAt func(e uint64) (int64, error)
	// grainAt turns a table entry into the kind and place of a grain.
	grainAt func(e uint64) (kind, int64, error)
}

func (g *grains) capacity() int64 { return g.size }

// span is how many bytes of the disk one table covers.
func (g *grains) span() int64 { return g.grain * g.perTable }

// check refuses a directory that is not all inside the file. Whatever else a header says, the work of walking through an
// extent is bounded by the file's length.
func (g *grains) check() error {
	if end := g.directory + g.tables*g.entry; g.src.Size >= 0 && end > g.src.Size {
		return fmt.Errorf("%s: %w: its grain directory ends at %d, the file at %d", g.src.name, ErrFormat, end, g.src.Size)
	}
	return nil
}

func (g *grains) entryOf(page []byte, i int64) uint64 {
	if g.entry == 4 {
		return uint64(binary.LittleEndian.Uint32(page[i*4:]))
	}
	return binary.LittleEndian.Uint64(page[i*8:])
}

// directoryRun returns the page of the directory that holds entry i, and the number of its first entry.
func (g *grains) directoryRun(ctx context.Context, i int64) ([]byte, int64, error) {
	perPage := directoryPage / g.entry
	first := i - i%perPage
	n := min(perPage, g.tables-first) * g.entry
	page, err := g.cache.get(ctx, g.src, g.directory+first*g.entry, n)
	return page, first, err
}

// table returns where table i is in the file; 0: there is none.
func (g *grains) table(ctx context.Context, i int64) (int64, error) {
	page, first, err := g.directoryRun(ctx, i)
	if err != nil {
		return 0, err
	}
	at, err := g.tableAt(g.entryOf(page, i-first))
	if err != nil {
		return 0, fmt.Errorf("%s: %w: directory entry %d: %w", g.src.name, ErrFormat, i, err)
	}
	return at, nil
}

func (g *grains) next(ctx context.Context, off, n int64) (segment, error) {
	end := off + n
	span := g.span()
	i := off / span
	at, err := g.table(ctx, i)
	if err != nil {
		return segment{}, err
	}
	if at == 0 {
		return g.absent(ctx, off, end, i)
	}
	page, err := g.cache.get(ctx, g.src, at, g.perTable*g.entry)
	if err != nil {
		return segment{}, err
	}
	end = min(end, (i+1)*span)
	// The first grain decides the kind; those behind it join while they are kept alike and, with data, right behind it.
	j := off % span / g.grain
	k, pos, err := g.grain1(page, i, j)
	if err != nil {
		return segment{}, err
	}
	inside := off % g.grain
	s := segment{kind: k, n: min(g.grain-inside, end-off), src: g.src, fileOff: pos + inside, off: off}
	for off+s.n < end {
		j++
		k2, pos2, err := g.grain1(page, i, j)
		if err != nil || k2 != k {
			break // an error shows when its own bytes are asked for
		}
		if k == data && pos2 != s.fileOff+s.n {
			break
		}
		s.n = min(s.n+g.grain, end-off)
	}
	return s, nil
}

// absentRun bounds how many absent tables one segment covers: many, so that an empty link is walked through quickly, and few, so that
// a walk that stops often in the parent does not look at the same ones again each time.
const absentRun = 64

// absent covers the absent tables from i on that the directory page at hand tells of.
func (g *grains) absent(ctx context.Context, off, end, i int64) (segment, error) {
	page, first, err := g.directoryRun(ctx, i)
	if err != nil {
		return segment{}, err
	}
	known := min(first+int64(len(page))/g.entry, i+absentRun)
	for i++; i < known && i*g.span() < end; i++ {
		if at, err := g.tableAt(g.entryOf(page, i-first)); err != nil || at != 0 {
			break
		}
	}
	return segment{kind: fromParent, n: min(end, i*g.span()) - off}, nil
}

func (g *grains) grain1(page []byte, i, j int64) (kind, int64, error) {
	k, pos, err := g.grainAt(g.entryOf(page, j))
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w: entry %d of table %d: %w", g.src.name, ErrFormat, j, i, err)
	}
	return k, pos, nil
}

func (g *grains) prefetch(ctx context.Context, off, n int64) {
	if n <= 0 {
		return
	}
	first, last := off/g.span(), (off+n-1)/g.span()
	if first == last {
		return // next reads it
	}
	// More tables than the cache holds would push each other out.
	last = min(last, first+int64(g.cache.limit)/2/(g.perTable*g.entry))
	var want []span
	var page []byte
	var start int64
	for i := first; i <= last; i++ {
		var err error
		if i >= start+int64(len(page))/g.entry {
			if page, start, err = g.directoryRun(ctx, i); err != nil {
				return // next tells it, with its place
			}
		}
		at, err := g.tableAt(g.entryOf(page, i-start))
		if err != nil {
			return
		}
		if at != 0 {
			want = append(want, span{at, g.perTable * g.entry})
		}
	}
	g.cache.prefetch(ctx, g.src, want)
}
