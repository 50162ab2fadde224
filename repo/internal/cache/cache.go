// Package cache keeps things that were costly to load, as long as there is
// room, and loads each only once however many ask for it at the same time.
//
// A value is lent out: Get returns an entry, Release gives it back. A value that
// has left the cache is freed when the last borrower has given it back, so
// buffers can be used again and files be closed safely. Entries are spread over
// shards with a lock each; nothing is held while loading.
package cache

import (
	"context"
	"errors"
	"sync"
)

// Cache is safe for concurrent use.
type Cache[K comparable, V any] struct {
	shards []shard[K, V]
	hash   func(K) uint32
	free   func(V)
}

type shard[K comparable, V any] struct {
	mu      sync.Mutex
	entries map[K]*Entry[K, V]
	lru     Entry[K, V] // ring: lru.next is the youngest
	used    int64
	limit   int64
	free    func(V)
}

// Entry is a value on loan.
type Entry[K comparable, V any] struct {
	shard      *shard[K, V]
	key        K
	value      V
	err        error
	loaded     chan struct{} // closed when value or err is there
	size       int64
	users      int
	cached     bool
	prev, next *Entry[K, V]
}

// New makes a cache. limit is the sum of the sizes kept beyond what is on loan;
// it is split evenly over the shards. hash must spread keys evenly. free, if not
// nil, is called once for every value loaded, after its last use.
func New[K comparable, V any](limit int64, shards int, hash func(K) uint32, free func(V)) *Cache[K, V] {
	c := &Cache[K, V]{shards: make([]shard[K, V], max(shards, 1)), hash: hash, free: free}
	for i := range c.shards {
		s := &c.shards[i]
		s.entries = make(map[K]*Entry[K, V])
		s.lru.prev, s.lru.next = &s.lru, &s.lru
		s.limit = limit / int64(len(c.shards))
		s.free = free
	}
	return c
}

func (c *Cache[K, V]) shard(k K) *shard[K, V] {
	return &c.shards[c.hash(k)%uint32(len(c.shards))]
}

// Get returns the value of k, loading it if need be. load returns the value and
// its size. If another caller is loading it already, Get waits for that one; if
// that one gave up because its own ctx ended, Get tries again.
func (c *Cache[K, V]) Get(ctx context.Context, k K, load func(context.Context) (V, int64, error)) (*Entry[K, V], error) {
	s := c.shard(k)
	for {
		s.mu.Lock()
		e := s.entries[k]
		if e == nil {
			e = &Entry[K, V]{shard: s, key: k, loaded: make(chan struct{}), users: 1, cached: true}
			s.entries[k] = e
			s.mu.Unlock()
			return e.load(ctx, load)
		}
		e.users++
		if e.next != nil {
			e.unlink()
			s.push(e)
		}
		s.mu.Unlock()
		err := e.Wait(ctx)
		if err == nil {
			return e, nil
		}
		if !isContext(err) && !errors.Is(err, errGone) {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

func isContext(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// Lookup returns the value of k if it is there or on its way, else nil.
func (c *Cache[K, V]) Lookup(ctx context.Context, k K) (*Entry[K, V], error) {
	s := c.shard(k)
	s.mu.Lock()
	_, ok := s.entries[k]
	s.mu.Unlock()
	if !ok {
		return nil, nil
	}
	e, err := c.Get(ctx, k, func(context.Context) (v V, n int64, err error) { return v, 0, errGone })
	if errors.Is(err, errGone) {
		return nil, nil
	}
	return e, err
}

var errGone = errors.New("evicted meanwhile")

// load runs on the goroutine that asked first.
func (e *Entry[K, V]) load(ctx context.Context, load func(context.Context) (V, int64, error)) (*Entry[K, V], error) {
	finished := false
	defer func() {
		if !finished { // load panicked: let nobody wait for ever
			e.finish(errors.New("loading panicked"))
		}
	}()
	v, size, err := load(ctx)
	finished = true
	if err != nil {
		e.finish(err)
		return nil, err
	}
	e.fill(v, size)
	return e, nil
}

// Reserve says that the caller will load k, unless it is there or on its way
// already: then it returns nil. Until Fill or Fail, one of which must follow,
// others who ask for k wait.
func (c *Cache[K, V]) Reserve(k K) *Entry[K, V] {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[k] != nil {
		return nil
	}
	e := &Entry[K, V]{shard: s, key: k, loaded: make(chan struct{}), users: 1, cached: true}
	s.entries[k] = e
	return e
}

// Claim is Reserve for who needs the value as well. Unless mine is true the entry is
// on loan and its value may still be on its way: Wait must follow. If mine is true,
// Keep or Fail must follow. renew says that the value is likely to be asked for again
// soon: it becomes the youngest.
func (c *Cache[K, V]) Claim(k K, renew bool) (e *Entry[K, V], mine bool) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[k]; e != nil {
		e.users++
		if renew && e.next != nil {
			e.unlink()
			s.push(e)
		}
		return e, false
	}
	e = &Entry[K, V]{shard: s, key: k, loaded: make(chan struct{}), users: 1, cached: true}
	s.entries[k] = e
	return e, true
}

// Wait returns when the value of a claimed entry is there. After an error the loan
// has ended; Get tells whether the value can be had at all.
func (e *Entry[K, V]) Wait(ctx context.Context) error {
	select {
	case <-e.loaded:
	case <-ctx.Done():
		e.Release()
		return ctx.Err()
	}
	if err := e.err; err != nil {
		e.Release()
		return err
	}
	return nil
}

// Keep ends a reservation with a value, which stays on loan.
func (e *Entry[K, V]) Keep(v V, size int64) { e.fill(v, size) }

// Fill ends a reservation with a value, which it gives up: e must not be used any
// more.
func (e *Entry[K, V]) Fill(v V, size int64) {
	e.fill(v, size)
	e.Release()
}

// Fail ends a reservation without a value; those who wait load it themselves.
func (e *Entry[K, V]) Fail() { e.finish(errGone) }

func (e *Entry[K, V]) fill(v V, size int64) {
	s := e.shard
	e.value, e.size = v, size
	close(e.loaded)
	s.mu.Lock()
	var gone []*Entry[K, V]
	if e.cached { // not dropped meanwhile
		s.push(e)
		s.used += size
		gone = s.evict()
	}
	s.mu.Unlock()
	s.release(gone)
}

// finish ends a failed load.
func (e *Entry[K, V]) finish(err error) {
	s := e.shard
	s.mu.Lock()
	e.err = err
	if e.cached {
		e.cached = false
		delete(s.entries, e.key)
	}
	s.mu.Unlock()
	close(e.loaded)
}

// evict makes room; it returns the entries nobody uses any more.
func (s *shard[K, V]) evict() (gone []*Entry[K, V]) {
	for s.used > s.limit && s.lru.prev != &s.lru {
		e := s.lru.prev
		s.drop(e)
		if e.users == 0 {
			gone = append(gone, e)
		}
	}
	return gone
}

func (s *shard[K, V]) drop(e *Entry[K, V]) {
	e.unlink()
	s.used -= e.size
	e.cached = false
	delete(s.entries, e.key)
}

func (s *shard[K, V]) release(gone []*Entry[K, V]) {
	if s.free == nil {
		return
	}
	for _, e := range gone {
		s.free(e.value)
	}
}

func (s *shard[K, V]) push(e *Entry[K, V]) {
	e.prev, e.next = &s.lru, s.lru.next
	e.prev.next, e.next.prev = e, e
}

func (e *Entry[K, V]) unlink() {
	e.prev.next, e.next.prev = e.next, e.prev
	e.prev, e.next = nil, nil
}

// Value is good until Release.
func (e *Entry[K, V]) Value() V { return e.value }

// Release gives the value back.
func (e *Entry[K, V]) Release() {
	s := e.shard
	s.mu.Lock()
	e.users--
	free := e.users == 0 && !e.cached && e.err == nil
	s.mu.Unlock()
	if free && s.free != nil {
		s.free(e.value)
	}
}

// Drop takes k out of the cache, for instance because its file has gone.
func (c *Cache[K, V]) Drop(k K) {
	s := c.shard(k)
	s.mu.Lock()
	e := s.entries[k]
	var gone []*Entry[K, V]
	if e != nil && e.next != nil {
		s.drop(e)
		if e.users == 0 {
			gone = append(gone, e)
		}
	}
	s.mu.Unlock()
	s.release(gone)
}

// Clear takes everything out that is loaded.
func (c *Cache[K, V]) Clear() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		limit := s.limit
		s.limit = -1
		gone := s.evict()
		s.limit = limit
		s.mu.Unlock()
		s.release(gone)
	}
}
