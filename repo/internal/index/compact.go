package index

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// Compact writes what is live anew as one segment, without the records whose pack
// is gone, and returns the files that nobody needs any more: superseded ones, and, if no
// record is left, so that there is no new segment, the emptied ones. It deletes
// nothing. Records added and not flushed are not looked at. It waits
// while another process is merging. Damage met on the way is reported as in Lookup;
// the segment concerned is left alone. gone is called from one goroutine.
func (x *Index) Compact(ctx context.Context, gone func(block.Handle) bool) (superseded, emptied []string, err error) {
	lock, err := x.lockForMerging(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	if err := x.Reload(ctx); err != nil {
		return nil, nil, err
	}
	for {
		var parts []*segment
		sum := int64(0)
		x.mu.RLock()
		for _, s := range slices.Backward(x.live) {
			if !s.broken.Load() && sum+s.entries <= maxEntries && len(parts) < mergeMost {
				parts = append(parts, s)
				sum += s.entries
			}
		}
		x.mu.RUnlock()
		emptied, err := x.compact(ctx, parts, gone)
		if err == nil {
			return x.Superseded(), emptied, nil
		}
		s := culprit(parts, err)
		if s == nil {
			return nil, nil, err
		}
		x.report(s, err)
	}
}

func (x *Index) lockForMerging(ctx context.Context) (io.Closer, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, time.Second) {
		lock, err := x.fsys.Lock(path.Join(x.dir, lockName), true, false)
		if err == nil {
			return lock, nil
		}
		if !errors.Is(err, fsx.ErrLocked) {
			return nil, fmt.Errorf("lock the index for merging: %w", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (x *Index) compact(ctx context.Context, parts []*segment, gone func(block.Handle) bool) (emptied []string, err error) {
	if len(parts) == 0 {
		return nil, nil
	}
	src, err := x.mergeOf(parts)
	if err != nil {
		return nil, err
	}
	left := &survivors{src: src, gone: gone}
	if err := left.peek(ctx); errors.Is(err, io.EOF) {
		x.changing.Lock()
		defer x.changing.Unlock()
		x.mu.Lock()
		defer x.mu.Unlock()
		x.live = slices.DeleteFunc(slices.Clone(x.live), func(l *segment) bool { return slices.Contains(parts, l) })
		for _, s := range parts {
			emptied = append(emptied, s.file)
		}
		return emptied, nil
	} else if err != nil {
		return nil, err
	}
	return nil, x.mergeFrom(ctx, parts, left)
}

// survivors passes on the records whose pack is there.
type survivors struct {
	src  source
	gone func(block.Handle) bool
	head []byte // looked at before its time
}

// peek finds the first record, so that one knows whether there is any.
func (s *survivors) peek(ctx context.Context) error {
	for n := 0; ; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		b, ok, err := s.step()
		if err != nil {
			return err
		}
		if ok {
			s.head = bytes.Clone(b)
			return nil
		}
	}
}

func (s *survivors) step() ([]byte, bool, error) {
	b, err := s.src.next()
	if err != nil {
		return nil, false, err
	}
	r, err := decodeRecord(b)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return b, !s.gone(r.Pack), nil
}

func (s *survivors) next() ([]byte, error) {
	if b := s.head; b != nil {
		s.head = nil
		return b, nil
	}
	for {
		b, ok, err := s.step()
		if ok || err != nil {
			return b, err
		}
	}
}

// Forget closes files that are about to be deleted, so that their room is free.
func (x *Index) Forget(names []string) {
	for _, n := range names {
		x.files.drop(n)
	}
}
