package index

import (
	"container/list"
	"context"
	"sync"

	"hikae/repo/internal/fsx"
)

// cache holds opened pages up to a fixed number, the least recently used giving
// way. Filter pages have their own share: pages of records, which are rarely
// wanted twice, would push them out. Buffers are used again, so that a long run
// of misses makes no garbage.
type cache struct {
	mu              sync.Mutex
	pages           map[pageKey]*page
	filters, record shelf
	free            [][]byte
}

type shelf struct {
	max  int
	used list.List // of *page, most recently used first
}

type pageKey struct {
	segment name
	off     int64
}

type page struct {
	key   pageKey
	shelf *shelf
	place *list.Element
	refs  int  // users; the buffer is theirs while there are any
	gone  bool // no longer in the cache

	ready chan struct{} // closed when bytes or err is set
	buf   []byte
	bytes []byte
	err   error
}

func newCache(size int64) *cache {
	n := max(16, int(size/pageSize))
	return &cache{
		pages:   map[pageKey]*page{},
		filters: shelf{max: n - n/8},
		record:  shelf{max: n / 8},
	}
}

// get returns a page, which release must give back. load fills it and is called
// once however many ask at the same time, without a lock. A page whose load
// failed is forgotten, so that a passing fault passes.
func (c *cache) get(ctx context.Context, key pageKey, s *shelf, load func(buf []byte) ([]byte, error)) (*page, error) {
	c.mu.Lock()
	if p := c.pages[key]; p != nil {
		p.refs++
		p.shelf.used.MoveToFront(p.place)
		c.mu.Unlock()
		select {
		case <-p.ready:
		case <-ctx.Done():
			c.release(p)
			return nil, ctx.Err()
		}
		if p.err != nil {
			c.release(p)
			return nil, p.err
		}
		return p, nil
	}
	p := &page{key: key, shelf: s, refs: 1, ready: make(chan struct{})}
	c.makeRoom(s)
	p.place = s.used.PushFront(p)
	c.pages[key] = p
	if n := len(c.free); n > 0 {
		p.buf, c.free = c.free[n-1], c.free[:n-1]
	}
	c.mu.Unlock()

	if p.buf == nil {
		p.buf = make([]byte, pageSize)
	}
	p.bytes, p.err = load(p.buf)
	close(p.ready)
	if p.err == nil {
		return p, nil
	}
	c.mu.Lock()
	c.forget(p)
	c.mu.Unlock()
	c.release(p)
	return nil, p.err
}

// makeRoom lets go of the least recently used pages that nobody is using.
func (c *cache) makeRoom(s *shelf) {
	for e := s.used.Back(); e != nil && s.used.Len() >= s.max; {
		p := e.Value.(*page)
		e = e.Prev()
		if p.refs == 0 {
			c.forget(p)
		}
	}
}

func (c *cache) forget(p *page) {
	if p.gone {
		return
	}
	p.gone = true
	p.shelf.used.Remove(p.place)
	delete(c.pages, p.key)
	c.recycle(p)
}

func (c *cache) recycle(p *page) {
	if p.gone && p.refs == 0 && len(c.free) < 8 {
		c.free = append(c.free, p.buf)
	}
}

func (c *cache) release(p *page) {
	c.mu.Lock()
	p.refs--
	c.recycle(p)
	c.mu.Unlock()
}

// files keeps a bounded number of segments' files open, so that many segments do
// not use up the process's file descriptors.
type files struct {
	fsys fsx.FS
	max  int

	mu     sync.Mutex
	tick   int64
	open   map[string]*openFile
	closed bool
}

type openFile struct {
	fsx.File
	refs int
	used int64
	gone bool // no longer among the open ones
}

// get opens a file, or finds it open; put must give it back.
func (f *files) get(name string) (*openFile, error) {
	if o := f.find(name, nil); o != nil {
		return o, nil
	}
	file, err := f.fsys.Open(name) // without the lock: a share may take its time
	if err != nil {
		return nil, err
	}
	return f.find(name, file), nil
}

// find looks for an open file and takes fresh, if there is one, when there is not.
func (f *files) find(name string, fresh fsx.File) *openFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tick++
	if o := f.open[name]; o != nil {
		if fresh != nil {
			_ = fresh.Close()
		}
		o.refs++
		o.used = f.tick
		return o
	}
	if fresh == nil {
		return nil
	}
	for len(f.open) >= f.max {
		oldest := ""
		for n, o := range f.open {
			if o.refs == 0 && (oldest == "" || o.used < f.open[oldest].used) {
				oldest = n
			}
		}
		if oldest == "" {
			break
		}
		_ = f.open[oldest].Close()
		delete(f.open, oldest)
	}
	o := &openFile{File: fresh, refs: 1, used: f.tick}
	f.open[name] = o
	return o
}

func (f *files) put(o *openFile) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if o.refs--; o.refs == 0 && (f.closed || o.gone) {
		_ = o.Close()
	}
}

// drop closes a file, one in use when it is put back.
func (f *files) drop(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.open[name]
	if o == nil {
		return
	}
	delete(f.open, name)
	if o.gone = true; o.refs == 0 {
		_ = o.Close()
	}
}

// closeAll closes every file, those in use when they are put back.
func (f *files) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for n, o := range f.open {
		if o.refs == 0 {
			_ = o.Close()
		}
		delete(f.open, n)
	}
}
