package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"hikae/repo/internal/block"
	"hikae/repo/internal/codec"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/index"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// Sizes of packs and of the buffers they are made in, in bytes. What a session
// needs beside them is small: its memory does not depend on what is written.
const (
	dataPackLimit = 32 << 20
	nodePackLimit = 16 << 20
	dataChunk     = 1 << 20
	nodeChunk     = 256 << 10
	chunks        = 6
)

// flushAt is how many records the index may hold in memory before a session
// writes them out, halfway through.
const flushAt = 256 << 10

// SessionOptions are the properties of a session.
type SessionOptions struct {
	// Compression of blocks: "zstd" (fastest; also ""), "zstd-default",
	// "zstd-better", "s2" or "none".
	Compression string
}

// WriteStats counts what became of the bytes given to Write.
type WriteStats struct {
	BytesWritten   int64 `json:"bytes_written"`   // given to Write
	BytesZero      int64 `json:"bytes_zero"`      // of these: zeros, which are never stored
	BytesUnchanged int64 `json:"bytes_unchanged"` // of these: what the parent has there
	BytesKnown     int64 `json:"bytes_known"`     // of these: stored before, elsewhere
	BytesNew       int64 `json:"bytes_new"`       // of these: stored now, before compression
	BytesSealed    int64 `json:"bytes_sealed"`    // what BytesNew became, compressed and sealed
}

// SessionStats counts what a session did so far.
type SessionStats struct {
	WriteStats
	BytesStored int64 `json:"bytes_stored"` // sizes of all files published: packs, index segments, manifests
	Packs       int64 `json:"packs"`
	Nodes       int64 `json:"nodes"` // tree nodes stored
}

// counters are WriteStats that many goroutines add to.
type counters struct{ written, zero, unchanged, known, fresh, sealed atomic.Int64 }

func (c *counters) stats() WriteStats {
	return WriteStats{
		BytesWritten: c.written.Load(), BytesZero: c.zero.Load(), BytesUnchanged: c.unchanged.Load(),
		BytesKnown: c.known.Load(), BytesNew: c.fresh.Load(), BytesSealed: c.sealed.Load(),
	}
}

// Session writes generations. Several disks may be written at once. What a session
// stored is found by later ones even if it never commits.
type Session struct {
	r           *Repository
	id          string
	compression string
	index       *index.Index
	file        *sessionFile
	data, node  *pack.Writer
	parity      *sidecars
	flight      flight
	reuse       reuse
	tasks       chan *task
	workers     sync.WaitGroup
	nodeTools   sync.Pool // of *tools

	ctx    context.Context // ends with the session or its first failure
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	closed  bool
	writers map[*DiskWriter]bool
	roots   map[finished]DiskTree // what may be committed

	count        counters
	stored       atomic.Int64
	packs, nodes atomic.Int64

	ending sync.Mutex // Commit and Close, one at a time
}

// finished names a disk that this session made.
type finished struct {
	root     block.Record
	capacity int64
}

// tools is one goroutine's working memory for storing.
type tools struct {
	*hasher
	compress *codec.Compressor
	scratch  pack.Scratch
	padded   []byte
}

// Begin starts a session. It first takes care of what dead sessions left: their
// finished packs enter the index, their unfinished files are removed. Storage
// that takes no writes is ErrReadOnly.
func (r *Repository) Begin(ctx context.Context, o SessionOptions) (_ *Session, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("begin a session: %w", storageError(r.fs, err))
		}
	}()
	if _, err := codec.New(o.Compression, tree.NodeSize); err != nil {
		return nil, err
	}
	x, err := r.idx(ctx)
	if err != nil {
		return nil, err
	}
	if err := x.Reload(ctx); err != nil {
		return nil, err
	}
	s := &Session{
		r: r, compression: o.Compression, index: x,
		tasks:   make(chan *task, r.opt.Workers),
		writers: make(map[*DiskWriter]bool),
		roots:   make(map[finished]DiskTree),
	}
	s.ctx, s.cancel = context.WithCancelCause(r.life)
	s.reuse.init(r)
	defer func() {
		if err != nil {
			s.cancel(err)
			if s.file != nil {
				s.parity.close()
				s.file.end()
			}
		}
	}()
	for _, dir := range []string{sessionsDir, tmpDir} {
		// Copies of a repository may lack its empty directories.
		if _, err := r.fs.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			if err := fsx.MakeDir(r.fs, dir); err != nil {
				return nil, err
			}
		}
	}
	s.file, err = r.newSessionFile()
	if err != nil {
		return nil, err
	}
	s.id = s.file.id
	s.parity = r.newSidecars(s.id)
	// Who condemns packs from now on sees that there is a session.
	if err := errors.Join(s.reuse.loadCondemned(), s.reuse.loadLost()); err != nil {
		return nil, err
	}
	if err := r.recover(ctx, s); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		// Nothing is lost but deduplication; the next session tries again.
		r.log.Warn("what an interrupted session left could not be taken over", "error", err)
	}
	s.nodeTools.New = func() any {
		// The compression of blocks is the user's choice, that of nodes never is.
		c, err := codec.New("zstd", tree.NodeSize)
		if err != nil {
			panic("repo: " + err.Error()) // the name is a constant
		}
		return &tools{hasher: newHasher(r.ring), compress: c}
	}
	writer := func(t pack.Type, limit int64, chunk int) *pack.Writer {
		return pack.NewWriter(pack.Config{
			FS: r.fs, Keys: r.ring, Repository: r.config.id, Type: t, TmpPrefix: tmpName(s.id, ""),
			Limit: limit, ChunkSize: chunk, Chunks: chunks,
			Before: func(h block.Handle) error { return s.file.pack(t, h) },
			After: func(p pack.Published) {
				s.published(p)
				s.parity.add(t.Path(p.Handle))
			},
		})
	}
	s.data = writer(pack.Data, dataPackLimit, dataChunk)
	s.node = writer(pack.Node, nodePackLimit, nodeChunk)
	for range r.opt.Workers {
		c, err := codec.New(o.Compression, r.config.BlockSize)
		if err != nil {
			panic("repo: " + err.Error()) // tried above
		}
		t := &tools{hasher: newHasher(r.ring), compress: c}
		s.workers.Go(func() { s.work(t) })
	}
	return s, nil
}

// published takes a pack's records from the session's memory to the index. In
// between they are in both, so that nobody misses them.
func (s *Session) published(p pack.Published) {
	s.stored.Add(p.Size)
	s.packs.Add(1)
	s.r.addMu.Lock()
	for _, rec := range p.Records {
		s.index.Add(rec)
	}
	s.r.addMu.Unlock()
	for _, rec := range p.Records {
		s.flight.forget(rec.ID)
	}
	if s.index.Pending() >= flushAt {
		if err := s.flushIndex(s.ctx); err != nil {
			s.fail(err)
		}
	}
}

// flushIndex writes the records of published packs as a segment. Records of other
// sessions of this process are among them: their packs are published too.
func (s *Session) flushIndex(ctx context.Context) error {
	r := s.r
	r.segMu.Lock()
	defer r.segMu.Unlock()
	r.segOwner = s.id
	r.addMu.Lock()
	defer r.addMu.Unlock()
	if s.index.Late() {
		if err := s.dropGone(); err != nil {
			return err
		}
	}
	info, err := s.index.Flush(ctx, nil)
	if err != nil {
		return fmt.Errorf("write an index segment: %w", err)
	}
	s.stored.Add(info.Bytes)
	return nil
}

// dropGone forgets records of packs that others have deleted since a segment with these
// records could not be written. Prune takes records out of segments only.
func (s *Session) dropGone() error {
	gone := make(map[block.Handle]bool)
	for _, h := range s.index.PendingPacks() {
		gone[h] = true
		for _, t := range []pack.Type{pack.Data, pack.Node} {
			_, err := s.r.fs.Stat(t.Path(h))
			if err == nil {
				gone[h] = false
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	s.index.Drop(func(h block.Handle) bool { return gone[h] })
	return nil
}

// fail ends the session's work: what was not published never will be.
func (s *Session) fail(err error) { s.cancel(err) }

// failure is what ended the session's work, if anything has.
func (s *Session) failure() error {
	if s.ctx.Err() == nil {
		return nil
	}
	err := context.Cause(s.ctx)
	if errors.Is(err, context.Canceled) {
		return ErrClosed // the repository was closed
	}
	return storageError(s.r.fs, err)
}

// Stats counts what the session did so far.
func (s *Session) Stats() SessionStats {
	return SessionStats{
		WriteStats: s.count.stats(), BytesStored: s.stored.Load(), Packs: s.packs.Load(), Nodes: s.nodes.Load(),
	}
}

// Close ends the session. Without a Commit before, what was written is published
// all the same, so that a later run finds it; disks not finished are abandoned.
// Close may be called more than once.
func (s *Session) Close() error {
	s.ending.Lock()
	defer s.ending.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	open := s.writers
	s.writers = nil
	s.mu.Unlock()

	for w := range open {
		w.stop(ErrClosed)
	}
	close(s.tasks)
	s.workers.Wait()
	failed := s.failure()
	var err error
	if failed == nil {
		err = errors.Join(s.data.Close(), s.node.Close())
	} else {
		s.data.Abort()
		s.node.Abort()
	}
	// Packs are published or not whatever happened to the rest.
	if ferr := s.flushIndex(context.Background()); failed == nil {
		err = errors.Join(err, ferr)
	}
	s.cancel(ErrClosed)
	s.parity.close()
	s.file.end()
	if err != nil {
		return fmt.Errorf("close the session: %w", storageError(s.r.fs, err))
	}
	return nil
}

// storeNode stores a tree node, unless it is stored already.
func (s *Session) storeNode(ctx context.Context, node []byte) (block.Record, error) {
	t := s.nodeTools.Get().(*tools)
	defer s.nodeTools.Put(t)
	id := t.node(node)
	p, mine := s.flight.claim(id)
	if !mine {
		return p.wait(ctx)
	}
	// Under the session's context: others may wait for this node, whatever
	// becomes of the disk it was made for.
	rec, found, err := s.known(s.ctx, id, pack.Node)
	if err == nil && !found {
		payload, kind := t.compress.Node(node)
		var loc block.Location
		loc, err = s.node.Add(s.ctx, &t.scratch, id, kind, len(node), payload)
		rec = block.Record{ID: id, Location: loc}
		s.nodes.Add(1)
	}
	p.land(rec, err)
	if found || err != nil {
		s.flight.forget(id)
	}
	if err != nil {
		s.fail(err)
	}
	return rec, err
}

// known looks for a usable copy of id in published packs.
func (s *Session) known(ctx context.Context, id block.ID, t pack.Type) (rec block.Record, found bool, err error) {
	rec.ID = id
	found, err = s.index.Lookup(ctx, id, func(l block.Location) bool {
		if l.Kind == block.Hole || pack.TypeOf(l.Kind) != t || !s.reuse.indexed(t, l.Pack) {
			return false
		}
		rec.Location = l
		return true
	})
	return rec, found, err
}
