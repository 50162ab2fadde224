package fs

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"golang.org/x/sync/singleflight"
)

// patience runs what may have to wait for storage. A process that reads from
// the mount cannot even be killed while its request is unanswered, and storage
// on a network may stop answering for ever. So every such request runs on its
// own goroutine and is left behind when it takes too long, or when the reader
// was interrupted and it still takes a while. What it was to fill in must
// therefore belong to it alone, never to the request.
//
// Goroutines left behind end when the storage answers or gives up. Until then
// they count: when all places are taken, further requests fail without
// starting one.
type patience struct {
	base    context.Context // ends with the mount
	timeout time.Duration   // longest any request takes
	grace   time.Duration   // how long an interrupted request may still finish
	places  chan struct{}
}

const (
	defaultTimeout = time.Minute
	// Go programs interrupt themselves all the time to schedule goroutines, and
	// an interrupted page fault kills a process that has a file mapped. So
	// requests that work normally are not cut short; a second is an age for
	// those and a short wait for someone who pressed Ctrl-C.
	defaultGrace = time.Second
	maxWaiting   = 512
)

type outcome[T any] struct {
	v   T
	err error
}

// try runs f. When f is left behind, what it returns later goes to drop.
func try[T any](p *patience, cancel <-chan struct{}, f func(context.Context) (T, error), drop func(T)) (T, error) {
	var zero T
	timer := time.NewTimer(p.timeout)
	defer timer.Stop()
	select {
	case p.places <- struct{}{}:
	default:
		select {
		case p.places <- struct{}{}:
		case <-cancel:
			return zero, context.Canceled
		case <-timer.C:
			return zero, errStuck
		}
	}
	ctx, stop := context.WithCancel(p.base)
	defer stop()
	done := make(chan outcome[T], 1)
	go func() {
		var o outcome[T]
		defer func() {
			if r := recover(); r != nil { // a defect, but no reason to take everybody's mount away
				o.err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
			}
			<-p.places
			done <- o
		}()
		o.v, o.err = f(ctx)
	}()
	select {
	case o := <-done:
		return o.v, o.err
	case <-timer.C:
		return zero, leave(done, drop, errStuck)
	case <-cancel:
	}
	timer.Reset(p.grace)
	select {
	case o := <-done:
		return o.v, o.err
	case <-timer.C:
		return zero, leave(done, drop, context.Canceled)
	}
}

func leave[T any](done <-chan outcome[T], drop func(T), err error) error {
	if drop != nil {
		go func() {
			if o := <-done; o.err == nil {
				drop(o.v)
			}
		}()
	}
	return err
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
			if r := recover(); r != nil {
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
