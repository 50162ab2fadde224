package vmdk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
)

// maxDepth bounds a chain: hosts allow 32 snapshots, 255 links over linked clones.
const maxDepth = 255

// LinkSource is one link as its reader found it: a descriptor, and the extent files in the descriptor's order (an empty File
// for a ZERO extent).
type LinkSource struct {
	Name       string // for errors: the descriptor's path
	Descriptor *Descriptor
	Files      []File
	// Running, when set, is read instead of Files: the link that is being written to.
	Running *Delta
}

// ChainOptions tunes a chain; the zero value is right for a host.
type ChainOptions struct {
	CacheBytes int // bound of the memory for tables; 0 is 8 MiB
	ReadGap    int // pieces of one file with at most so many bytes between them are fetched by one read; 0 is 32 KiB, -1 none
}

// Chain is a disk as the guest sees it through its links. It is safe for concurrent use, except beside writes to its running
// link.
type Chain struct {
	links   []*link
	size    int64
	gap     int64
	scratch sync.Pool // *[]byte of scratchSize
}

const (
	defaultGap = 32 << 10
	// scratchSize bounds a read that fetches several pieces at once.
	scratchSize = 4 << 20
	// window bounds the pieces that one read plans at a time. A larger ReadAt is taken in steps.
	window = 64 << 20
	// lookAhead is how far tables are fetched together when looking for data.
	lookAhead = 256 << 20
)

// OpenChain puts links together, base first, and reads their headers, but no tables yet. ErrChain: a link's parentCID is not its
// parent's CID, sizes differ, or the first link has a parent. ErrFormat and ErrUnsupported as everywhere.
func OpenChain(ctx context.Context, links []LinkSource, o ChainOptions) (*Chain, error) {
	if len(links) == 0 || len(links) > maxDepth {
		return nil, fmt.Errorf("%w: %d links", ErrChain, len(links))
	}
	c := &Chain{gap: int64(o.ReadGap)}
	switch {
	case o.ReadGap == 0:
		c.gap = defaultGap
	case o.ReadGap < 0:
		c.gap = 0
	}
	c.scratch.New = newScratch
	cache := newPageCache(o.CacheBytes)
	for i, ls := range links {
		d := ls.Descriptor
		if d == nil {
			return nil, fmt.Errorf("%s: %w: no descriptor", ls.Name, ErrChain)
		}
		if i == 0 && d.ParentCID != NoParent {
			return nil, fmt.Errorf("%s: %w: its parent %q is missing", ls.Name, ErrChain, d.ParentFileNameHint)
		}
		if i > 0 && d.ParentCID != links[i-1].Descriptor.CID {
			return nil, fmt.Errorf("%s: %w: it was made for a parent with content id %08x, but %s has %08x: the parent was changed since",
				ls.Name, ErrChain, d.ParentCID, links[i-1].Name, links[i-1].Descriptor.CID)
		}
		l, err := openLink(ctx, ls, cache)
		if err != nil {
			return nil, err
		}
		if c.size = l.capacity(); c.size != links[0].Descriptor.Capacity() {
			return nil, fmt.Errorf("%s: %w: it has %d bytes, the base %s %d", ls.Name, ErrChain, c.size, links[0].Name,
				links[0].Descriptor.Capacity())
		}
		c.links = append(c.links, l)
	}
	return c, nil
}

func newScratch() any { b := make([]byte, scratchSize); return &b }

func openLink(ctx context.Context, ls LinkSource, cache *pageCache) (*link, error) {
	l := &link{}
	if ls.Running != nil {
		l.add(ls.Running.ext)
		return l, nil
	}
	if len(ls.Files) != len(ls.Descriptor.Extents) {
		return nil, fmt.Errorf("%s: %w: %d extents but %d files", ls.Name, ErrChain, len(ls.Descriptor.Extents), len(ls.Files))
	}
	for i, e := range ls.Descriptor.Extents {
		x, err := openExtent(ctx, e, ls.Files[i], cache)
		if err != nil {
			return nil, err
		}
		// Hosted sparse files may round their size up to whole grains; a host's links say the same as their descriptor.
		if x, err = clip(x, e); err != nil {
			return nil, err
		}
		l.add(x)
	}
	return l, nil
}

func openExtent(ctx context.Context, e Extent, f File, cache *pageCache) (extent, error) {
	src := &source{File: f, name: e.File}
	if e.Access == "NOACCESS" {
		return nil, fmt.Errorf("%s: extent without access: %w", e.File, ErrUnsupported)
	}
	if f.R == nil && e.Type != ExtentZero {
		return nil, fmt.Errorf("%s: %w: the extent has no file", e.File, ErrChain)
	}
	switch strings.ToUpper(e.Type) {
	case ExtentVMFS, ExtentFlat:
		return newFlat(src, e.Offset*SectorSize, e.Sectors*SectorSize)
	case ExtentZero:
		return zeros{length: e.Sectors * SectorSize}, nil
	case ExtentVMFSSparse:
		return openCOWD(ctx, src, cache)
	case ExtentSESparse:
		return openSESparse(ctx, src, cache)
	case ExtentSparse:
		var magic [4]byte
		if err := src.readFull(ctx, magic[:], 0); err != nil {
			return nil, err
		}
		if string(magic[:]) == cowdMagic {
			return openCOWD(ctx, src, cache)
		}
		return openHosted(ctx, src, cache)
	case "VMFSRDM", "VMFSRAW", "VMFSTHIN":
		return nil, fmt.Errorf("%s: extent of type %s (a raw device): %w", e.File, e.Type, ErrUnsupported)
	}
	return nil, fmt.Errorf("%s: extent of type %s: %w", e.File, e.Type, ErrUnsupported)
}

// clipped is an extent of which the descriptor uses less than the file has.
type clipped struct {
	extent
	length int64
}

func (c clipped) capacity() int64 { return c.length }

func clip(x extent, e Extent) (extent, error) {
	want := e.Sectors * SectorSize
	switch have := x.capacity(); {
	case have == want:
		return x, nil
	case have > want && strings.EqualFold(e.Type, ExtentSparse):
		return clipped{x, want}, nil
	default:
		return nil, fmt.Errorf("%s: %w: the descriptor says %d bytes, the file's header %d", e.File, ErrFormat, want, have)
	}
}

// Capacity is the disk's size in bytes.
func (c *Chain) Capacity() int64 { return c.size }

// ReadAt implements io.ReaderAt.
func (c *Chain) ReadAt(p []byte, off int64) (int, error) {
	return c.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads like ReadAt, with a context for the reads below. After an error the content of p is undefined and n
// tells how much of it is right.
func (c *Chain) ReadAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, errNegative)
	}
	if off >= c.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > c.size-off
	if short {
		p = p[:c.size-off]
	}
	for n < len(p) {
		m := min(len(p)-n, window)
		if err := c.readWindow(ctx, p[n:n+m], off+int64(n)); err != nil {
			return n, err
		}
		n += m
	}
	if short {
		return n, io.EOF
	}
	return n, nil
}

var errNegative = errors.New("negative offset")

// piece is one run of bytes to be fetched from a file.
type piece struct {
	src     *source
	fileOff int64
	at, n   int // in the reader's buffer
}

func (c *Chain) readWindow(ctx context.Context, p []byte, off int64) error {
	pieces, err := c.plan(ctx, nil, len(c.links)-1, p, 0, len(p), off)
	if err != nil {
		return err
	}
	return c.fetch(ctx, p, pieces)
}

// plan says where the bytes p[at:at+n], which are the disk's at off, come from. It writes zeros and what is compressed itself.
func (c *Chain) plan(ctx context.Context, pieces []piece, level int, p []byte, at, n int, off int64) ([]piece, error) {
	l := c.links[level]
	l.prefetch(ctx, off, int64(n))
	for n > 0 {
		s, err := l.next(ctx, off, int64(n))
		if err != nil {
			return nil, err
		}
		m := int(s.n)
		switch {
		case s.kind == data:
			if k := len(pieces) - 1; k >= 0 && pieces[k].src == s.src && pieces[k].at+pieces[k].n == at &&
				pieces[k].fileOff+int64(pieces[k].n) == s.fileOff {
				pieces[k].n += m
			} else {
				pieces = append(pieces, piece{s.src, s.fileOff, at, m})
			}
		case s.kind == packed:
			err = s.ext.readPacked(ctx, p[at:at+m], s.off)
		case s.kind == fromParent && level > 0:
			pieces, err = c.plan(ctx, pieces, level-1, p, at, m, off)
		default:
			clear(p[at : at+m])
		}
		if err != nil {
			return nil, err
		}
		at, n, off = at+m, n-m, off+s.n
	}
	return pieces, nil
}

// fetch reads the pieces, those that are close together in one file with one read.
func (c *Chain) fetch(ctx context.Context, p []byte, pieces []piece) error {
	if len(pieces) > 1 {
		// Sorting by file keeps the order of first use, so that sources need no order of their own.
		rank := map[*source]int{}
		for _, x := range pieces {
			if _, ok := rank[x.src]; !ok {
				rank[x.src] = len(rank)
			}
		}
		slices.SortStableFunc(pieces, func(a, b piece) int {
			return cmp.Or(cmp.Compare(rank[a.src], rank[b.src]), cmp.Compare(a.fileOff, b.fileOff))
		})
	}
	for len(pieces) > 0 {
		first := pieces[0]
		end, n := first.fileOff+int64(first.n), 1
		for n < len(pieces) {
			next := pieces[n]
			if next.src != first.src || next.fileOff > end+c.gap || next.fileOff+int64(next.n)-first.fileOff > scratchSize {
				break
			}
			end = max(end, next.fileOff+int64(next.n))
			n++
		}
		if n == 1 {
			if err := first.src.readFull(ctx, p[first.at:first.at+first.n], first.fileOff); err != nil {
				return err
			}
		} else if err := c.gather(ctx, p, pieces[:n], end); err != nil {
			return err
		}
		pieces = pieces[n:]
	}
	return nil
}

func (c *Chain) gather(ctx context.Context, p []byte, pieces []piece, end int64) error {
	scratch := c.scratch.Get().(*[]byte)
	defer c.scratch.Put(scratch)
	start := pieces[0].fileOff
	buf := (*scratch)[:end-start]
	if err := pieces[0].src.readFull(ctx, buf, start); err != nil {
		return err
	}
	for _, x := range pieces {
		copy(p[x.at:x.at+x.n], buf[x.fileOff-start:])
	}
	return nil
}

// NextData finds the first area at or after off that may hold data: that some link holds, and no flat file tells to be
// a hole. The area is not empty; another may follow it at once. io.EOF: nothing but zeros follows.
func (c *Chain) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	if off < 0 {
		return 0, 0, fmt.Errorf("data at %d: %w", off, errNegative)
	}
	var ahead int64
	for start = off; start < c.size; {
		ahead = c.lookAhead(ctx, start, ahead)
		is, n, err := c.step(ctx, len(c.links)-1, start, c.size-start)
		if err != nil {
			return 0, 0, err
		}
		if !is {
			start += n
			continue
		}
		// Long enough to be worth a call, short enough that the caller sees progress.
		for end = start + n; end < c.size && end-start < 1<<30; end += n {
			ahead = c.lookAhead(ctx, end, ahead)
			if is, n, err = c.step(ctx, len(c.links)-1, end, c.size-end); err != nil {
				return 0, 0, err
			} else if !is {
				break
			}
		}
		return start, end, nil
	}
	return 0, 0, io.EOF
}

// lookAhead fetches the tables that a walk at pos will need next, once per window; it returns where the window ends.
func (c *Chain) lookAhead(ctx context.Context, pos, ahead int64) int64 {
	if pos < ahead {
		return ahead
	}
	n := min(lookAhead, c.size-pos)
	for _, l := range c.links {
		l.prefetch(ctx, pos, n)
	}
	return pos + n
}

// step says whether there may be data at off, and how far that answer holds.
func (c *Chain) step(ctx context.Context, level int, off, n int64) (bool, int64, error) {
	s, err := c.links[level].next(ctx, off, n)
	switch {
	case err != nil:
		return false, 0, err
	case s.kind == packed:
		return true, s.n, nil
	case s.kind == fromParent && level > 0:
		return c.step(ctx, level-1, off, s.n)
	case s.kind != data:
		return false, s.n, nil
	}
	f, ok := s.src.R.(dataFinder)
	if !ok {
		return true, s.n, nil
	}
	start, end, err := f.NextData(s.fileOff)
	switch {
	case errors.Is(err, io.EOF) || err == nil && start >= s.fileOff+s.n:
		return false, s.n, nil
	case err != nil:
		return false, 0, fmt.Errorf("%s: find data at %d: %w", s.src.name, s.fileOff, err)
	case start > s.fileOff:
		return false, start - s.fileOff, nil
	case end <= s.fileOff:
		return false, 0, fmt.Errorf("%s: find data at %d: it ends at %d", s.src.name, s.fileOff, end)
	}
	return true, min(s.n, end-s.fileOff), nil
}

// Held finds the first area at or after off that link i (0: the base) holds itself, whatever the links above and below
// have there; zero says that it holds it as zeros. io.EOF: it holds nothing further. A flat link holds everything.
func (c *Chain) Held(ctx context.Context, i int, off int64) (a Area, zeros bool, err error) {
	if off < 0 {
		return a, false, fmt.Errorf("data at %d: %w", off, errNegative)
	}
	l := c.links[i]
	for off < c.size {
		if off%lookAhead == 0 {
			l.prefetch(ctx, off, min(lookAhead, c.size-off))
		}
		s, err := l.next(ctx, off, min(c.size-off, lookAhead-off%lookAhead))
		if err != nil {
			return a, false, err
		}
		if s.kind != fromParent {
			return Area{off, s.n}, s.kind == zero, nil
		}
		off += s.n
	}
	return a, false, io.EOF
}

// At is the disk as it was when link i froze: the chain without the links above it. It shares their tables with c.
func (c *Chain) At(i int) *Chain {
	v := &Chain{links: c.links[:i+1], size: c.size, gap: c.gap}
	v.scratch.New = newScratch
	return v
}

// Allocated is every area that may hold data, in order, none touching the next. A flat link holds all of its disk unless its
// file tells its holes; on a host, ask the host for those.
func (c *Chain) Allocated(ctx context.Context) ([]Area, error) {
	return allocated(ctx, c.NextData)
}

func allocated(ctx context.Context, next func(context.Context, int64) (int64, int64, error)) ([]Area, error) {
	var areas []Area
	for off := int64(0); ; {
		start, end, err := next(ctx, off)
		if errors.Is(err, io.EOF) {
			return areas, nil
		} else if err != nil {
			return nil, err
		}
		if n := len(areas); n > 0 && areas[n-1].End() == start {
			areas[n-1].Length += end - start
		} else {
			areas = append(areas, Area{start, end - start})
		}
		off = end
	}
}
