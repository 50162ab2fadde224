package fs

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// patience ends the waiting for storage. A process that reads from the mount
// cannot even be killed while its request is unanswered, and storage on a
// network may stop answering for ever. So when a request takes too long, or
// when the reader was interrupted and it still takes a while, the kernel is
// told so in its place: it takes the first answer to a request and refuses the
// second. What handles the request knows nothing of it, goes on until the
// storage answers or fails, and finds that its answer is not wanted any more.
//
// That costs a request nothing but an entry in a list. Handing each to another
// goroutine that can be left behind costs 20 µs, half of what a small read
// takes in all.
type patience struct {
	base    context.Context
	timeout time.Duration                  // longest any request takes
	grace   time.Duration                  // how long an interrupted request may still finish
	period  time.Duration                  // between looks at the list
	tell    func(unique uint64, err error) // answers the kernel
	places  chan struct{}                  // bounds what storage can keep waiting

	mu    sync.Mutex
	list  []*request
	tick  int64 // counts looks
	timer *time.Timer
	armed bool
}

const (
	defaultTimeout = time.Minute
	// Go programs interrupt themselves all the time to schedule goroutines, and
	// an interrupted page fault kills a process that has a file mapped. So
	// requests that work normally are not cut short; a second is an age for
	// those and a short wait for someone who pressed Ctrl-C.
	defaultGrace = time.Second
	// Each request that waits may hold a thread, of which Go allows 10,000.
	maxWaiting = 512
)

// request is one that the kernel waits for.
type request struct {
	unique      uint64
	cancel      <-chan struct{} // closed when the reader is interrupted
	stop        context.CancelFunc
	index       int   // in the list
	born        int64 // ticks
	interrupted int64 // tick when that was noticed
	told        error // what the kernel was told already
}

func newPatience(base context.Context, timeout, grace time.Duration, tell func(uint64, error)) *patience {
	return &patience{
		base: base, timeout: timeout, grace: grace, tell: tell,
		period: max(min(timeout, grace)/4, time.Millisecond),
		places: make(chan struct{}, maxWaiting),
	}
}

// try runs f for the request that the kernel knows as unique. When the kernel
// was told something else meanwhile, that is the error.
func try[T any](p *patience, unique uint64, cancel <-chan struct{}, f func(context.Context) (T, error)) (v T, err error) {
	ctx, stop := context.WithCancel(p.base)
	defer stop()
	r := &request{unique: unique, cancel: cancel, stop: stop}
	p.enter(r)
	defer func() {
		if told := p.leave(r); told != nil {
			var zero T
			v, err = zero, told
		}
	}()
	select {
	case p.places <- struct{}{}:
	default:
		select {
		case p.places <- struct{}{}:
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
	defer func() { <-p.places }()
	return f(ctx)
}

func (p *patience) enter(r *request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.born, r.index = p.tick, len(p.list)
	p.list = append(p.list, r)
	if p.armed {
		return
	}
	p.armed = true
	if p.timer == nil {
		p.timer = time.AfterFunc(p.period, p.look)
	} else {
		p.timer.Reset(p.period)
	}
}

func (p *patience) leave(r *request) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := len(p.list) - 1
	p.list[r.index] = p.list[last]
	p.list[r.index].index = r.index
	p.list[last] = nil
	p.list = p.list[:last]
	return r.told
}

// look goes through the list once in a while, as long as there is anything in
// it.
func (p *patience) look() {
	var late []*request
	p.mu.Lock()
	p.tick++
	for _, r := range p.list {
		if r.told != nil {
			continue
		}
		if r.interrupted == 0 {
			select {
			case <-r.cancel:
				r.interrupted = p.tick
			default:
			}
		}
		switch {
		case time.Duration(p.tick-r.born)*p.period > p.timeout:
			r.told = errStuck
		case r.interrupted > 0 && time.Duration(p.tick-r.interrupted)*p.period >= p.grace:
			r.told = context.Canceled
		default:
			continue
		}
		late = append(late, r)
	}
	if p.armed = len(p.list) > 0; p.armed {
		p.timer.Reset(p.period)
	}
	p.mu.Unlock()
	for _, r := range late {
		r.stop()
		p.tell(r.unique, r.told)
	}
}

// shared lets concurrent callers share one answer to one question. A caller
// whose context ends goes without; the question itself goes on for others, for
// it must not fail because the first to ask lost patience. Questions that storage
// does not answer pile up only so far.
type shared struct {
	base   context.Context // ends with the mount
	group  singleflight.Group
	places chan struct{}
}

func newShared(base context.Context) *shared {
	return &shared{base: base, places: make(chan struct{}, maxWaiting)}
}

func once[T any](ctx context.Context, s *shared, key string, f func(context.Context) (T, error)) (T, error) {
	ch := s.group.DoChan(key, func() (v any, err error) {
		select {
		case s.places <- struct{}{}:
		default:
			return nil, errStuck
		}
		defer func() {
			<-s.places
			if r := recover(); r != nil { // a defect, but no reason to take everybody's mount away
				err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
			}
		}()
		return f(s.base)
	})
	select {
	case r := <-ch:
		v, _ := r.Val.(T)
		return v, r.Err
	case <-ctx.Done():
		var zero T
		return zero, ctx.Err()
	}
}
