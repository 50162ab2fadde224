package vmdk

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
)

// File is one extent file, however it is reached.
//
// When R also has
//
//	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
//
// reads go there. When it has
//
//	NextData(off int64) (start, end int64, err error)
//
// that tells which parts of a flat file are no holes (the first at or after off; io.EOF when only holes follow).
type File struct {
	R    io.ReaderAt
	Size int64 // in bytes; -1 when not known
}

type contextReader interface {
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

type dataFinder interface {
	NextData(off int64) (start, end int64, err error)
}

// source is a File with a name for errors.
type source struct {
	File
	name string
}

// readFull fills p or fails: a file that ends inside a table or a grain is damaged.
func (s *source) readFull(ctx context.Context, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if s.Size >= 0 && (off < 0 || off > s.Size || int64(len(p)) > s.Size-off) {
		return fmt.Errorf("%s: %w: it refers to %d bytes at %d, but has %d", s.name, ErrFormat, len(p), off, s.Size)
	}
	var n int
	var err error
	if r, ok := s.R.(contextReader); ok {
		n, err = r.ReadAtContext(ctx, p, off)
	} else if err = ctx.Err(); err == nil {
		n, err = s.R.ReadAt(p, off)
	}
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%s: read %d bytes at %d: %w", s.name, len(p), off, err)
}

const (
	defaultCache = 8 << 20
	// maxPage bounds one page of the cache, so that a header cannot ask for an unbounded allocation.
	maxPage = 16 << 20
	// tableGap and tableRun say which tables one read fetches together.
	tableGap = 16 << 10
	tableRun = 2 << 20
)

// span is a page's place in a file.
type span struct{ off, n int64 }

// pageKey has the length and the use in it: a damaged file may well have two tables in one place.
type pageKey struct {
	src      *source
	off, n   int64
	inflated bool
}

type page struct {
	key   pageKey
	data  []byte
	err   error
	ready chan struct{}
	elem  *list.Element
}

// pageCache keeps tables (and inflated grains) in memory up to a bound, least recently used out first. Each page is
// loaded once however many readers want it.
type pageCache struct {
	mu    sync.Mutex
	pages map[pageKey]*page
	lru   *list.List // front: newest
	bytes int
	limit int
}

func newPageCache(limit int) *pageCache {
	if limit <= 0 {
		limit = defaultCache
	}
	return &pageCache{pages: map[pageKey]*page{}, lru: list.New(), limit: limit}
}

// get returns n bytes of the file at off. They belong to the cache.
func (c *pageCache) get(ctx context.Context, src *source, off, n int64) ([]byte, error) {
	return c.load(ctx, pageKey{src: src, off: off, n: n}, func(buf []byte) error { return src.readFull(ctx, buf, off) })
}

// load returns a page of key.n bytes, filled by fill when it is not there yet.
func (c *pageCache) load(ctx context.Context, key pageKey, fill func([]byte) error) ([]byte, error) {
	src, off, n := key.src, key.off, key.n
	if n <= 0 || n > maxPage || off < 0 {
		return nil, fmt.Errorf("%s: %w: table of %d bytes at %d", src.name, ErrFormat, n, off)
	}
	for {
		p, mine := c.claim(key)
		if mine {
			buf := make([]byte, n)
			c.settle(p, buf, fill(buf))
			return p.data, p.err
		}
		select {
		case <-p.ready:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if p.err == nil {
			return p.data, nil
		}
		// Another reader's cancelled context is no reason for this one to fail.
		if !errors.Is(p.err, context.Canceled) && !errors.Is(p.err, context.DeadlineExceeded) {
			return nil, p.err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// prefetch loads the pages that are missing, neighbours in the file with one read. Failures are left to get.
func (c *pageCache) prefetch(ctx context.Context, src *source, spans []span) {
	missing := spans[:0]
	var claimed []*page
	c.mu.Lock()
	for _, s := range spans {
		if s.n <= 0 || s.n > maxPage || s.off < 0 || (src.Size >= 0 && (s.off > src.Size || s.n > src.Size-s.off)) {
			continue
		}
		if key := (pageKey{src: src, off: s.off, n: s.n}); c.pages[key] == nil {
			p := &page{key: key, ready: make(chan struct{})}
			c.pages[key] = p
			missing, claimed = append(missing, s), append(claimed, p)
		}
	}
	c.mu.Unlock()
	order := make([]int, len(missing))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(missing[a].off, missing[b].off) })
	for len(order) > 0 {
		first := missing[order[0]]
		end, n := first.off+first.n, 1
		for n < len(order) {
			next := missing[order[n]]
			if next.off > end+tableGap || next.off+next.n-first.off > tableRun {
				break
			}
			end = max(end, next.off+next.n)
			n++
		}
		buf := make([]byte, end-first.off)
		err := src.readFull(ctx, buf, first.off)
		for _, i := range order[:n] {
			s := missing[i]
			// A copy, so that one page kept does not keep its neighbours.
			data := slices.Clone(buf[s.off-first.off : s.off-first.off+s.n])
			c.settle(claimed[i], data, err)
		}
		order = order[n:]
	}
}

// claim returns the page, and whether the caller is the one to load it.
func (c *pageCache) claim(key pageKey) (*page, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pages[key]; p != nil {
		if p.elem != nil {
			c.lru.MoveToFront(p.elem)
		}
		return p, false
	}
	p := &page{key: key, ready: make(chan struct{})}
	c.pages[key] = p
	return p, true
}

func (c *pageCache) settle(p *page, data []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		p.err = err
		delete(c.pages, p.key)
	} else {
		p.data = data
		p.elem = c.lru.PushFront(p)
		c.bytes += len(data)
		// The newest page stays even when it is larger than the bound.
		for c.bytes > c.limit && c.lru.Len() > 1 {
			old := c.lru.Remove(c.lru.Back()).(*page)
			delete(c.pages, old.key)
			c.bytes -= len(old.data)
		}
	}
	close(p.ready)
}
