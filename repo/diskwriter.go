package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// Limits of the pipeline: how many blocks a worker takes at once, and how many such
// portions of one disk may be between Write and the tree.
const (
	taskBlocks = 4
	maxTasks   = 64
)

// DiskTree is a finished disk: what a DiskManifest needs to know of it.
type DiskTree struct {
	Root      []byte // the root's record, 48 bytes
	Levels    int
	Capacity  int64 // bytes
	DataBytes int64 // bytes that are not holes
	Stats     WriteStats
}

// DiskWriter takes the content of one disk, in ascending order, as changes against
// a parent. Its methods must not be called by several goroutines at once, except
// Abandon. After an error other than one about the arguments it is good for
// Abandon only.
type DiskWriter struct {
	s        *Session
	capacity int64
	parent   tree.Tree
	load     tree.Loader // of the parent's nodes
	relearn  relearn
	builder  *tree.Builder
	count    counters

	ctx    context.Context // ends with the writer's first failure
	cancel context.CancelCauseFunc

	mu     sync.Mutex
	next   int64 // where the next change may begin
	closed bool  // no more changes

	ended atomic.Bool // finished or abandoned

	order   chan *task // in the order of the disk
	applied chan struct{}
	free    sync.Pool // of *task
}

// task is a stretch of a disk: blocks to store, or a hole.
type task struct {
	w       *DiskWriter
	first   int64  // block
	p       []byte // at most taskBlocks blocks, the last one perhaps cut by the end of the disk
	hole    int64  // blocks; then p is nil
	out     [taskBlocks]outcome
	err     error
	loan    *loan
	stored  chan struct{} // has room for one: a worker is done with the task
	results int
}

// outcome is what is to become of a block's entry.
type outcome struct {
	keep    bool // the parent's entry stays
	rec     block.Record
	landing *landing // somebody else is storing the block; rec will be there
}

// loan is a buffer that its owner waits for.
type loan struct {
	users   atomic.Int32
	release func()
}

func (l *loan) done() {
	if l.users.Add(-1) == 0 && l.release != nil {
		l.release()
	}
}

// Disk begins a disk of the given capacity in bytes. What will neither be written
// nor zeroed keeps the parent's content; without a parent it is a hole. The disk
// may have grown since the parent, not shrunk. Several disks may be written at
// once. What is lost of the parent (see Lost) must be written or zeroed.
func (s *Session) Disk(ctx context.Context, capacity int64, parent *Disk) (*DiskWriter, error) {
	bs := s.r.config.BlockSize
	if capacity < 0 || capacity > tree.MaxCapacity {
		return nil, fmt.Errorf("a disk of %d bytes is out of range", capacity)
	}
	w := &DiskWriter{s: s, capacity: capacity, load: loader{s.r}, order: make(chan *task, maxTasks), applied: make(chan struct{})}
	blocks := tree.Blocks(capacity, bs)
	w.parent = tree.Tree{Levels: tree.Levels(0)}
	var data int64
	var build tree.Loader = loader{s.r}
	if parent != nil {
		if parent.r.ID() != s.r.ID() {
			return nil, errors.New("the parent is in another repository")
		}
		if parent.size > capacity {
			return nil, fmt.Errorf("a disk of %d bytes cannot have a parent of %d: disks grow only", capacity, parent.size)
		}
		if err := s.buildOn(ctx, parent.from); err != nil {
			return nil, storageError(s.r.fs, err)
		}
		w.parent = parent.tree
		data = tree.Blocks(parent.data, bs)
		if parent.lost == nil || parent.lost.s != s {
			var err error
			if parent, _, err = s.Lost(ctx, parent, false); err != nil {
				return nil, s.explain(err)
			}
		}
		if l := parent.lost; l != nil && l.s == s && len(l.areas) > 0 {
			w.relearn.areas, w.load, build, data = l.areas, parent.loader(), lostLoader{loader{s.r}, l.nodes}, l.data
		}
	}
	var err error
	if w.builder, err = tree.NewBuilder(ctx, build, s.storeNode, blocks, w.parent, data); err != nil {
		return nil, s.explain(err)
	}
	w.ctx, w.cancel = context.WithCancelCause(s.ctx)
	w.free.New = func() any { return &task{w: w, stored: make(chan struct{}, 1)} }
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		w.cancel(ErrClosed)
		return nil, ErrClosed
	}
	s.writers[w] = true
	go w.apply()
	return w, nil
}

// buildOn notes in the session's log that a generation must stay. Who removes
// generations looks at the logs, under the lock: so one that is there now, under the
// lock, stays, and with it all that it reaches.
func (s *Session) buildOn(ctx context.Context, manifest string) error {
	lock, err := s.r.lockGenerations(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := s.file.parent(manifest); err != nil {
		return err
	}
	_, err = s.r.fs.Stat(manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the parent was forgotten meanwhile: %s: %w", manifest, ErrNotFound)
	}
	return err
}

// explain prefers the reason of a failed session to what followed from it.
func (s *Session) explain(err error) error {
	if cause := s.failure(); cause != nil && !errors.Is(cause, ErrClosed) {
		return cause
	}
	return storageError(s.r.fs, err)
}

// failure is why the writer cannot go on.
func (w *DiskWriter) failure() error {
	if w.ctx.Err() == nil {
		return nil
	}
	return w.s.explain(context.Cause(w.ctx))
}

// begin checks a stretch and takes it. It holds w.mu until the task is queued.
func (w *DiskWriter) begin(off, n int64) error {
	if w.closed {
		return fmt.Errorf("write to a disk that was finished: %w", ErrClosed)
	}
	if err := aligned(off, n, int64(w.s.r.config.BlockSize), w.capacity); err != nil {
		return err
	}
	if off < w.next {
		return fmt.Errorf("offset %d comes after %d: changes must ascend", off, w.next)
	}
	if err := w.failure(); err != nil {
		return err
	}
	w.next = off + n
	w.relearn.cover(off, n)
	return nil
}

// Write stores p at off, which lies at a block boundary at or after the end of what
// was written or zeroed before; the length is a multiple of the block size except at
// the end of the disk. p belongs to the writer until release is called, from any
// goroutine; it is called exactly once, also when Write fails. Write waits while
// storage is slower than the caller.
func (w *DiskWriter) Write(ctx context.Context, off int64, p []byte, release func()) error {
	l := &loan{release: release}
	l.users.Store(1)
	defer l.done()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.begin(off, int64(len(p))); err != nil {
		return err
	}
	w.count.written.Add(int64(len(p)))
	w.s.count.written.Add(int64(len(p)))
	bs := w.s.r.config.BlockSize
	for first := off / int64(bs); len(p) > 0; first += taskBlocks {
		t := w.free.Get().(*task)
		n := min(len(p), taskBlocks*bs)
		t.first, t.p, t.hole, t.loan, t.err = first, p[:n], 0, l, nil
		p = p[n:]
		l.users.Add(1)
		if err := w.enqueue(ctx, t); err != nil {
			l.done()
			return err
		}
		select {
		case w.s.tasks <- t:
			continue
		case <-ctx.Done():
			t.err = ctx.Err()
		case <-w.ctx.Done():
			t.err = context.Cause(w.ctx)
		}
		// It is in the order, so somebody has to end it.
		err := t.err
		w.cancel(err)
		l.done()
		t.stored <- struct{}{}
		return w.s.explain(err)
	}
	return nil
}

// enqueue gives a task its place in the order.
func (w *DiskWriter) enqueue(ctx context.Context, t *task) error {
	select {
	case w.order <- t:
		return nil
	case <-ctx.Done():
		w.cancel(ctx.Err()) // what is missing now cannot come later
		return ctx.Err()
	case <-w.ctx.Done():
		return w.failure()
	}
}

// Zero makes n bytes at off a hole; the rules for off and n are those of Write.
func (w *DiskWriter) Zero(ctx context.Context, off, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.begin(off, n); err != nil {
		return err
	}
	bs := int64(w.s.r.config.BlockSize)
	t := w.free.Get().(*task)
	t.first, t.p, t.hole, t.loan, t.err = off/bs, nil, tree.Blocks(n, int(bs)), nil, nil
	if t.hole == 0 {
		return nil
	}
	return w.enqueue(ctx, t)
}

// apply puts the outcomes into the tree, in order, until order is closed. After a
// failure it goes on emptying the queue.
func (w *DiskWriter) apply() {
	defer close(w.applied)
	for t := range w.order {
		if t.p != nil {
			<-t.stored
			if t.err != nil {
				w.cancel(t.err)
			}
		}
		if w.ctx.Err() == nil {
			if err := w.put(t); err != nil {
				w.cancel(err)
			}
		}
		t.p, t.loan = nil, nil
		clear(t.out[:])
		w.free.Put(t)
	}
}

func (w *DiskWriter) put(t *task) error {
	if t.p == nil {
		return w.builder.Hole(w.ctx, t.first, t.hole)
	}
	for i := range t.out[:t.results] {
		o := &t.out[i]
		if o.keep {
			continue
		}
		if o.landing != nil {
			var err error
			if o.rec, err = o.landing.wait(w.ctx); err != nil {
				return err
			}
		}
		if err := w.builder.Set(w.ctx, t.first+int64(i), o.rec); err != nil {
			return err
		}
	}
	return nil
}

// stop ends the writer's goroutine; with an error what is queued counts for nothing.
func (w *DiskWriter) stop(err error) {
	if err != nil {
		w.cancel(err) // wakes whoever is in Write
	}
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		close(w.order)
	}
	w.mu.Unlock()
	<-w.applied
}

// Finish waits until everything is in the tree and returns it. The disk is durable
// once a generation with it is committed.
func (w *DiskWriter) Finish(ctx context.Context) (DiskTree, error) {
	if w.ended.Swap(true) {
		return DiskTree{}, fmt.Errorf("finish a disk twice: %w", ErrClosed)
	}
	defer w.leave()
	quit := context.AfterFunc(ctx, func() { w.cancel(context.Cause(ctx)) })
	defer quit()
	w.stop(nil)
	if err := w.failure(); err != nil {
		return DiskTree{}, err
	}
	if err := w.relearn.end(); err != nil {
		return DiskTree{}, err
	}
	t, data, last, err := w.builder.Finish(w.ctx)
	if err != nil {
		return DiskTree{}, w.s.explain(err)
	}
	bs := int64(w.s.r.config.BlockSize)
	d := DiskTree{
		Root: t.Root.Append(nil), Levels: t.Levels, Capacity: w.capacity, DataBytes: data * bs, Stats: w.count.stats(),
	}
	if last {
		d.DataBytes -= t.Blocks*bs - w.capacity
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.roots[finished{t.Root, w.capacity}] = d
	return d, nil
}

// Abandon gives the disk up. Blocks that were stored stay, so writing them again
// costs little. It may be called at any time, also after Finish.
func (w *DiskWriter) Abandon() {
	if w.ended.Swap(true) {
		return
	}
	w.stop(ErrClosed)
	w.leave()
}

// leave takes the writer out of the session.
func (w *DiskWriter) leave() {
	w.cancel(ErrClosed)
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	delete(w.s.writers, w)
}

// work is a worker: it takes tasks of all disks until there are no more.
func (s *Session) work(t *tools) {
	for k := range s.tasks {
		if k.w.ctx.Err() == nil {
			k.err = s.store(t, k)
		} else {
			k.err = context.Cause(k.w.ctx)
		}
		k.loan.done()
		k.stored <- struct{}{}
	}
}

// store finds out what is to become of a task's blocks.
func (s *Session) store(t *tools, k *task) error {
	bs := s.r.config.BlockSize
	var parents [taskBlocks]block.Record
	n := (len(k.p) + bs - 1) / bs
	k.results = n
	if here := min(int64(n), k.w.parent.Blocks-k.first); here > 0 && !k.w.parent.Root.IsHole() {
		if err := k.w.parent.Records(k.w.ctx, k.w.load, k.first, parents[:here]); err != nil {
			return err
		}
	}
	for i := range n {
		p := k.p[i*bs : min(len(k.p), (i+1)*bs)]
		var err error
		lost := k.w.relearn.at((k.first + int64(i)) * int64(bs))
		if k.out[i], err = s.storeBlock(k.w, t, p, parents[i], lost); err != nil {
			return err
		}
	}
	return nil
}

// storeBlock stores a block that differs from the parent's. A hole that is lost is
// nobody's word that there were zeros: the entry above it may have to go.
func (s *Session) storeBlock(w *DiskWriter, t *tools, p []byte, parent block.Record, lost bool) (outcome, error) {
	size := int64(len(p))
	if isZero(p) {
		w.count.zero.Add(size)
		s.count.zero.Add(size)
		return outcome{keep: parent.IsHole() && !lost}, nil
	}
	if bs := s.r.config.BlockSize; len(p) < bs {
		// The end of the disk lies within a block: the rest of it is zeros, so
		// that the block stays what it is when the disk grows.
		if t.padded == nil {
			t.padded = make([]byte, bs)
		}
		clear(t.padded[copy(t.padded, p):])
		p = t.padded
	}
	id := t.block(p)
	if id == parent.ID && parent.Kind.IsBlock() && s.reuse.pack(pack.Data, parent.Pack) {
		w.count.unchanged.Add(size)
		s.count.unchanged.Add(size)
		return outcome{keep: true}, nil
	}
	l, mine := s.flight.claim(id)
	if !mine {
		w.count.known.Add(size)
		s.count.known.Add(size)
		return outcome{landing: l}, nil
	}
	rec, found, err := s.known(s.ctx, id, pack.Data)
	switch {
	case err != nil:
	case found:
		w.count.known.Add(size)
		s.count.known.Add(size)
	default:
		payload, kind := t.compress.Block(p)
		rec.ID = id
		if rec.Location, err = s.data.Add(s.ctx, &t.scratch, id, kind, len(p), payload); err != nil {
			break
		}
		w.count.fresh.Add(size)
		s.count.fresh.Add(size)
		w.count.sealed.Add(int64(rec.Length))
		s.count.sealed.Add(int64(rec.Length))
	}
	l.land(rec, err)
	if found || err != nil {
		s.flight.forget(id)
	}
	if err != nil {
		s.fail(err) // others may wait for this very block
		return outcome{}, err
	}
	return outcome{rec: rec}, nil
}
