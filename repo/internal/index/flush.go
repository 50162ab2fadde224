package index

import (
	"bytes"
	"context"
	"io"
	"maps"
	"slices"

	"hikae/repo/internal/block"
)

// batch is records in memory.
type batch struct {
	newest map[block.ID]block.Location
	older  map[block.ID][]block.Location // newest first; few ids have any
	n      int
}

func newBatch() *batch { return &batch{newest: map[block.ID]block.Location{}} }

func (b *batch) add(id block.ID, l block.Location) {
	had, ok := b.newest[id]
	if !ok {
		b.newest[id] = l
		b.n++
		return
	}
	if had == l || slices.Contains(b.older[id], l) {
		return
	}
	if b.older == nil {
		b.older = map[block.ID][]block.Location{}
	}
	b.newest[id] = l
	b.older[id] = slices.Insert(b.older[id], 0, had)
	b.n++
}

func (b *batch) find(id block.ID, out []block.Location) []block.Location {
	l, ok := b.newest[id]
	if !ok {
		return out
	}
	return append(append(out, l), b.older[id]...)
}

// each calls fn for every record; those of one id come oldest first.
func (b *batch) each(fn func(block.ID, block.Location)) {
	for id, l := range b.newest {
		for _, o := range slices.Backward(b.older[id]) {
			fn(id, o)
		}
		fn(id, l)
	}
}

// sorted returns the records in the order of a segment.
func (b *batch) sorted() []block.Record {
	list := make([]block.Record, 0, b.n)
	for id, l := range b.newest {
		list = append(list, block.Record{ID: id, Location: l})
		for _, o := range b.older[id] {
			list = append(list, block.Record{ID: id, Location: o})
		}
	}
	slices.SortStableFunc(list, func(a, b block.Record) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	return list
}

// Add makes a record findable, before any other place of its id. It lasts once
// it is flushed. A hole is ignored.
func (x *Index) Add(r block.Record) {
	if r.IsHole() {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pending.add(r.ID, r.Location)
}

// Pending is the number of records that were added and do not last yet; each
// takes about 150 bytes of memory.
func (x *Index) Pending() int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	n := x.pending.n
	if x.flushed != nil {
		n += x.flushed.n
	}
	return n
}

// Late tells whether the last Flush failed: what is pending may be older than it seems.
func (x *Index) Late() bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.late
}

// PendingPacks lists the packs of the records that were added and do not last yet.
func (x *Index) PendingPacks() []block.Handle {
	x.mu.RLock()
	defer x.mu.RUnlock()
	packs := make(map[block.Handle]struct{})
	for _, b := range []*batch{x.pending, x.flushed} {
		if b != nil {
			b.each(func(_ block.ID, l block.Location) { packs[l.Pack] = struct{}{} })
		}
	}
	return slices.Sorted(maps.Keys(packs))
}

// Drop forgets records that were added and are not flushed, if their pack is one
// that never came to be, or is gone.
func (x *Index) Drop(lost func(block.Handle) bool) {
	x.flushing.Lock() // else what a failing Flush puts back would escape
	defer x.flushing.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	kept := newBatch()
	x.pending.each(func(id block.ID, l block.Location) {
		if !lost(l.Pack) {
			kept.add(id, l)
		}
	})
	x.pending = kept
}

// Flush writes what was added as one segment. published tells whether the pack of
// a record lasts; the others wait for a later Flush. nil: all do. When there was
// something to write the segment is returned; on an error everything is pending
// again, and the segment may be there all the same.
func (x *Index) Flush(ctx context.Context, published func(block.Handle) bool) (SegmentInfo, error) {
	x.flushing.Lock()
	defer x.flushing.Unlock()
	x.mu.Lock()
	out, rest := x.pending, newBatch()
	if published != nil {
		out = newBatch()
		x.pending.each(func(id block.ID, l block.Location) {
			if published(l.Pack) {
				out.add(id, l)
			} else {
				rest.add(id, l)
			}
		})
	}
	x.pending = rest
	if out.n > 0 {
		x.flushed = out
	}
	sequence := x.nextSequence()
	x.mu.Unlock()
	if out.n == 0 {
		return SegmentInfo{}, nil
	}

	s, err := x.write(ctx, &records{list: out.sorted()}, sequence, nil)
	if err != nil {
		x.mu.Lock()
		// Older than what was added meanwhile.
		newer := x.pending
		x.pending, x.flushed = out, nil
		newer.each(x.pending.add)
		x.late = true
		x.mu.Unlock()
		return SegmentInfo{}, err
	}
	x.changing.Lock()
	defer x.changing.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.flushed, x.late = nil, false
	x.install(s)
	return s.info(), nil
}

// install takes a segment just written into use; both locks are held.
func (x *Index) install(s *segment) {
	if slices.Contains(x.names, s.name) {
		return // a Reload was faster
	}
	live := append(slices.Clone(x.live), s)
	sortLive(live)
	x.live = live
	x.names = append(slices.Clone(x.names), s.name)
}

// nextSequence is one more than the highest known; mu is held.
func (x *Index) nextSequence() uint64 {
	if len(x.live) == 0 {
		return 1
	}
	return x.live[0].sequence + 1
}

// records is a source out of memory.
type records struct {
	list []block.Record
	buf  []byte
}

func (r *records) next() ([]byte, error) {
	if len(r.list) == 0 {
		return nil, io.EOF
	}
	r.buf = r.list[0].Append(r.buf[:0])
	r.list = r.list[1:]
	return r.buf, nil
}
