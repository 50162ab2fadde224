package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"

	"golang.org/x/sync/errgroup"

	"hikae/repo"
)

// How disks are read: in pieces of pieceSize, at most poolPieces of them in
// memory for a whole run whatever the number of disks, so that reading, sealing
// and writing overlap. The host's own limit of requests in flight is below that.
const (
	pieceSize  = 4 << 20
	poolPieces = 10
)

// source is a disk as it is read: a frozen one on a host, an image in a local
// file, or one in a repository.
type source interface {
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

// pool lends buffers of pieceSize bytes. The number of buffers bounds memory;
// they are made when first needed.
type pool struct {
	free chan []byte
	mu   sync.Mutex
	left int // buffers not made yet
}

func newPool(n int) *pool { return &pool{free: make(chan []byte, n), left: n} }

// get waits for a buffer until ctx ends.
func (p *pool) get(ctx context.Context) ([]byte, error) {
	select {
	case b := <-p.free:
		return b, nil
	default:
	}
	p.mu.Lock()
	if p.left > 0 {
		p.left--
		p.mu.Unlock()
		return make([]byte, pieceSize), nil
	}
	p.mu.Unlock()
	select {
	case b := <-p.free:
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *pool) put(b []byte) { p.free <- b[:pieceSize] }

// step is one thing to do with a range of a disk: read it, or, with zero set,
// take it for zeros.
type step struct {
	area
	zero bool
}

// steps cuts areas into reads of at most pieceSize bytes that end at multiples of
// pieceSize (so long areas are read in aligned pieces). What within has besides
// the areas is yielded too, as zeros; every area lies within one of within's,
// unless that is empty.
func steps(areas, within []area) iter.Seq[step] {
	return func(yield func(step) bool) {
		reads := func(a area) bool {
			for off := a.Offset; off < a.End(); {
				end := min((off/pieceSize+1)*pieceSize, a.End())
				if !yield(step{area{Offset: off, Length: end - off}, false}) {
					return false
				}
				off = end
			}
			return true
		}
		zeros := func(from, to int64) bool {
			return from >= to || yield(step{area{Offset: from, Length: to - from}, true})
		}
		rest := areas
		for _, w := range within {
			at := w.Offset
			for len(rest) > 0 && rest[0].Offset < w.End() {
				if !zeros(at, rest[0].Offset) || !reads(rest[0]) {
					return
				}
				at, rest = rest[0].End(), rest[1:]
			}
			if !zeros(at, w.End()) {
				return
			}
		}
		for _, a := range rest {
			if !reads(a) {
				return
			}
		}
	}
}

// taker receives a disk's content in ascending order. data belongs to it until
// it calls release, which it must do exactly once whatever it returns; for
// zeros data is nil.
type taker func(ctx context.Context, s step, data []byte, release func()) error

// stream carries out steps: reads run ahead in parallel, as far as the pool's
// buffers go, and take is called by one goroutine in the order of the steps. It
// returns when everything it started has ended, with the first error.
//
// Buffers come in the order of the steps and are given back without waiting for
// another buffer, so several streams can share a pool and none waits for ever.
func stream(ctx context.Context, src source, todo iter.Seq[step], bufs *pool, take taker) error {
	type piece struct {
		step
		buf   []byte
		err   error
		ready chan struct{}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var g errgroup.Group
	queue := make(chan *piece, poolPieces)
	g.Go(func() error {
		defer close(queue)
		for s := range todo {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			p := &piece{step: s}
			if !s.zero {
				buf, err := bufs.get(ctx)
				if err != nil {
					return err
				}
				p.buf, p.ready = buf[:s.Length], make(chan struct{})
				g.Go(func() error {
					defer close(p.ready)
					p.err = readFull(ctx, src, p.buf, p.Offset)
					return nil // told in order, by the consumer
				})
			}
			// The consumer empties the queue in every ending, so this does
			// not block for ever and no buffer is lost.
			queue <- p
		}
		return nil
	})
	g.Go(func() error {
		var failed error
		for p := range queue {
			release := func() {}
			if p.ready != nil {
				<-p.ready
				release = func() { bufs.put(p.buf) }
			}
			if failed == nil {
				// The cause first: a read that was cut off knows only that it was.
				failed = cmp.Or(context.Cause(ctx), p.err)
			}
			if failed != nil {
				cancel(failed)
				release()
				continue // until the producer, stopped by cancel, closes the queue
			}
			if failed = take(ctx, p.step, p.buf, release); failed != nil {
				cancel(failed)
			}
		}
		return failed
	})
	return g.Wait()
}

// readFull reads all of p or says what is missing.
func readFull(ctx context.Context, src source, p []byte, off int64) error {
	n, err := src.ReadAtContext(ctx, p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("the disk ended at byte %d, %d bytes short: %w", off+int64(n), len(p)-n, io.ErrUnexpectedEOF)
	}
	return err
}

// dataSteps yields the reads that bring a disk's data from off on, and, with
// zeros, its holes. An error ends it early and is left in err.
func dataSteps(ctx context.Context, d *repo.Disk, off int64, zeros bool, err *error) iter.Seq[step] {
	return func(yield func(step) bool) {
		for off < d.Size() {
			start, end, nextErr := d.NextData(ctx, off)
			if errors.Is(nextErr, io.EOF) {
				start, end = d.Size(), d.Size()
			} else if nextErr != nil {
				*err = nextErr
				return
			}
			if zeros && start > off && !yield(step{area{Offset: off, Length: start - off}, true}) {
				return
			}
			for s := range steps([]area{{Offset: start, Length: end - start}}, nil) {
				if !yield(s) {
					return
				}
			}
			off = end
		}
	}
}
