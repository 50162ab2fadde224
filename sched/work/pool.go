package work

import (
	"context"
	"sync"
	"time"
)

// pool keeps what is expensive to open, hosts and repositories, open as long as
// somebody uses it and for a while after.
type pool[T any] struct {
	open   func(ctx context.Context, name string) (T, error)
	shut   func(name string, v T)
	linger time.Duration

	mu    sync.Mutex
	slots map[string]*slot[T]
	idle  sync.WaitGroup // closings under way
	done  bool
}

// slot is where the thing of one name is opened, by one user at a time.
type slot[T any] struct {
	opening chan struct{} // one place: who has it may open
	item    *item[T]      // nil when none is open
}

// item is one open thing.
type item[T any] struct {
	value T
	name  string
	users int
	stale bool // nobody else may have it
	timer *time.Timer
}

func newPool[T any](linger time.Duration, open func(context.Context, string) (T, error), shut func(string, T)) *pool[T] {
	return &pool[T]{open: open, shut: shut, linger: linger, slots: map[string]*slot[T]{}}
}

// get opens what has a name, or shares what is open. Users that come while it
// is being opened wait; when that fails, each tries by itself.
func (p *pool[T]) get(ctx context.Context, name string) (*item[T], error) {
	p.mu.Lock()
	s := p.slots[name]
	if s == nil {
		s = &slot[T]{opening: make(chan struct{}, 1)}
		p.slots[name] = s
	}
	p.mu.Unlock()
	select {
	case s.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.opening }()
	p.mu.Lock()
	if it := s.item; it != nil {
		it.users++
		if it.timer != nil {
			it.timer.Stop()
			it.timer = nil
		}
		p.mu.Unlock()
		return it, nil
	}
	p.mu.Unlock()
	v, err := p.open(ctx, name)
	if err != nil {
		return nil, err
	}
	it := &item[T]{value: v, name: name, users: 1}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done {
		it.stale = true
	} else {
		s.item = it
	}
	return it, nil
}

// put gives an item back. One that is spoilt is not given to others.
func (p *pool[T]) put(it *item[T], spoilt bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	it.users--
	if spoilt {
		p.drop(it)
	}
	switch {
	case it.users > 0:
	case it.stale:
		p.close(it)
	default:
		it.timer = time.AfterFunc(p.linger, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if it.users == 0 && !it.stale {
				p.drop(it)
				p.close(it)
			}
		})
	}
}

// drop keeps an item from others. p.mu is held.
func (p *pool[T]) drop(it *item[T]) {
	it.stale = true
	if s := p.slots[it.name]; s.item == it {
		s.item = nil
	}
}

// close closes what nobody uses. p.mu is held.
func (p *pool[T]) close(it *item[T]) {
	p.idle.Go(func() { p.shut(it.name, it.value) })
}

// reset closes all that nobody uses, and the others when they are given back.
func (p *pool[T]) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.slots {
		it := s.item
		if it == nil {
			continue
		}
		p.drop(it)
		if it.timer != nil {
			it.timer.Stop()
		}
		if it.users == 0 {
			p.close(it)
		}
	}
}

// end resets for good and waits until all is closed. Nothing may be in use.
func (p *pool[T]) end() {
	p.mu.Lock()
	p.done = true
	p.mu.Unlock()
	p.reset()
	p.idle.Wait()
}
