package pack

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"sync"
	"sync/atomic"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// ErrClosed says that a writer was used after Close or Abort.
var ErrClosed = errors.New("pack writer closed")

// Config tells a Writer what to write and where.
type Config struct {
	FS         fsx.FS
	Keys       Keys
	Repository [16]byte
	Type       Type
	TmpPrefix  string // unfinished packs are called TmpPrefix + handle
	Limit      int64  // bytes of a pack beyond which no record starts
	ChunkSize  int    // bytes of one buffer; the largest record must fit with the header
	Chunks     int    // how many buffers at most
	// Before is told of a pack when it is whole and synced and about to get its
	// final name; an error stops the writer. After is told once the name lasts.
	// Both are called from one goroutine, in the order of the packs.
	Before func(block.Handle) error
	After  func(Published)
}

// Published is a pack that lasts.
type Published struct {
	Handle  block.Handle
	Records []block.Record
	Size    int64 // bytes of the file
}

// Writer fills one pack after the other. Add may be called by many goroutines.
//
// Records are sealed by the callers of Add, in parallel, into the buffer where
// they will lie. Buffers go to a goroutine that hashes and writes them in order;
// whole packs go to another one that syncs and names them, while the next pack
// is being filled.
type Writer struct {
	c    Config
	free chan []byte
	work chan *chunk
	done sync.WaitGroup

	// The goroutines that drain must never wait for mu, which a caller may hold
	// while it waits for them; so the error has its own way.
	err    atomic.Pointer[error]
	failed chan struct{} // closed with the first error

	mu     sync.Mutex
	closed bool
	made   int // buffers so far
	cur    *filling
}

// filling is the pack that records are added to.
type filling struct {
	header  Header
	seal    *sealer
	offset  int64
	records []block.Record
	chunk   *chunk // nil between two buffers
}

// chunk is a stretch of a pack on its way to storage.
type chunk struct {
	pack    *filling
	buf     []byte         // nil for an end or a barrier without bytes
	pending sync.WaitGroup // records still being sealed into buf
	last    bool           // the pack ends here
	barrier chan struct{}  // closed when everything before it is published
}

// NewWriter makes a writer and starts its goroutines; Close or Abort ends them.
func NewWriter(c Config) *Writer {
	w := &Writer{
		c:      c,
		free:   make(chan []byte, c.Chunks),
		work:   make(chan *chunk, c.Chunks+2),
		failed: make(chan struct{}),
	}
	packs := make(chan *whole, 1)
	w.done.Add(2)
	go w.write(packs)
	go w.publish(packs)
	return w
}

// Scratch is working memory for Add; every goroutine has its own.
type Scratch struct{ x scratch }

// Add seals a payload as the record id and says where it will lie. The payload
// may be used again when Add returns. raw is the length of the plaintext before
// compression. The record is safe only once After was told of its pack.
func (w *Writer) Add(ctx context.Context, x *Scratch, id block.ID, kind block.Kind, raw int, payload []byte) (block.Location, error) {
	n := len(payload) + Overhead
	if n > w.c.ChunkSize-HeaderSize || n > block.MaxLength {
		return block.Location{}, fmt.Errorf("a record of %d bytes is too large", n)
	}
	w.mu.Lock()
	c, err := w.room(ctx, n)
	if err != nil {
		w.mu.Unlock()
		return block.Location{}, err
	}
	p := c.pack
	loc := block.Location{Pack: p.header.Handle(), Offset: uint32(p.offset), Length: uint32(n), Kind: kind}
	p.records = append(p.records, block.Record{ID: id, Location: loc})
	p.offset += int64(n)
	dst := c.buf[len(c.buf) : len(c.buf)+n]
	c.buf = c.buf[:len(c.buf)+n]
	c.pending.Add(1)
	w.mu.Unlock()

	p.seal.seal(&x.x, dst, payload, uint64(loc.Offset), byte(kind), uint32(raw), &id)
	c.pending.Done()
	return loc, nil
}

// room returns the chunk in which the next n bytes of the current pack go. It
// may wait for storage, holding the lock: others could do nothing else either.
func (w *Writer) room(ctx context.Context, n int) (*chunk, error) {
	if err := w.usable(); err != nil {
		return nil, err
	}
	if p := w.cur; p != nil && (p.offset+int64(n) > w.c.Limit || len(p.records) == MaxRecords) {
		w.end()
	}
	if w.cur == nil {
		p, err := w.begin()
		if err != nil {
			return nil, err
		}
		w.cur = p
	}
	p := w.cur
	if p.chunk != nil && cap(p.chunk.buf)-len(p.chunk.buf) < n {
		w.work <- p.chunk
		p.chunk = nil
	}
	if p.chunk == nil {
		buf, err := w.buffer(ctx)
		if err != nil {
			return nil, err
		}
		p.chunk = &chunk{pack: p, buf: buf}
		if p.offset == 0 {
			p.chunk.buf = p.header.Append(buf)
			p.offset = HeaderSize
		}
	}
	return p.chunk, nil
}

func (w *Writer) usable() error {
	if err := w.err.Load(); err != nil {
		return *err
	}
	if w.closed {
		return ErrClosed
	}
	return nil
}

// buffer waits for a free buffer.
func (w *Writer) buffer(ctx context.Context) ([]byte, error) {
	select {
	case b := <-w.free:
		return b, nil
	default:
	}
	if w.made < w.c.Chunks {
		w.made++
		return make([]byte, 0, w.c.ChunkSize), nil
	}
	select {
	case b := <-w.free:
		return b, nil
	case <-w.failed:
		return nil, *w.err.Load()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// begin makes a new pack. Its salt is random, so its handle and its key are
// its own.
func (w *Writer) begin() (*filling, error) {
	p := &filling{header: Header{
		Version: Version, Type: w.c.Type, Epoch: w.c.Keys.Epoch(), Repository: w.c.Repository,
	}}
	for p.header.Handle() == 0 {
		_, _ = rand.Read(p.header.Salt[:]) // never fails: the program ends if the system has no randomness
	}
	var err error
	p.seal, err = newSealer(w.c.Keys, &p.header)
	return p, err
}

// end sends the current pack's last chunk on its way.
func (w *Writer) end() {
	c := w.cur.chunk
	if c == nil {
		c = &chunk{pack: w.cur}
	}
	c.last = true
	w.cur = nil
	w.work <- c
}

// Flush ends the current pack and waits until all packs so far are published.
func (w *Writer) Flush(ctx context.Context) error {
	w.mu.Lock()
	if err := w.usable(); err != nil {
		w.mu.Unlock()
		return err
	}
	if w.cur != nil {
		w.end()
	}
	c := &chunk{barrier: make(chan struct{})}
	w.work <- c
	w.mu.Unlock()
	select {
	case <-c.barrier:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := w.err.Load(); err != nil {
		return *err
	}
	return nil
}

// Close flushes and ends the writer. It reports the writer's first error.
func (w *Writer) Close() error {
	err := w.Flush(context.Background())
	if errors.Is(err, ErrClosed) {
		return nil
	}
	w.stop()
	return err
}

// Abort ends the writer and drops what is not published yet.
func (w *Writer) Abort() {
	w.fail(ErrClosed)
	w.stop()
}

func (w *Writer) stop() {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		if w.cur != nil {
			w.end() // so that its file is removed
		}
		close(w.work)
	}
	w.mu.Unlock()
	w.done.Wait()
}

// fail keeps the first error; from then on nothing is written any more.
func (w *Writer) fail(err error) {
	if w.err.CompareAndSwap(nil, &err) {
		close(w.failed)
	}
}

func (w *Writer) hasFailed() bool {
	select {
	case <-w.failed:
		return true
	default:
		return false
	}
}

// whole is a pack whose bytes are written, but neither synced nor named; or a
// barrier.
type whole struct {
	Published
	file    fsx.File
	barrier chan struct{}
}

// write hashes and writes chunks in order.
func (w *Writer) write(packs chan<- *whole) {
	defer w.done.Done()
	defer close(packs)
	var out output
	for c := range w.work {
		c.pending.Wait()
		if c.barrier != nil {
			packs <- &whole{barrier: c.barrier}
			continue
		}
		if w.hasFailed() {
			out.drop(w.c.FS)
		} else if err := out.chunk(w, c); err != nil {
			w.fail(fmt.Errorf("write pack %v: %w", c.pack.header.Handle(), err))
			out.drop(w.c.FS)
		} else if c.last {
			packs <- &whole{
				file:      out.file,
				Published: Published{Handle: c.pack.header.Handle(), Records: c.pack.records, Size: out.size},
			}
			out.file = nil
		}
		if c.buf != nil {
			w.free <- c.buf[:0]
		}
	}
	out.drop(w.c.FS)
}

// output is the file being written.
type output struct {
	file   fsx.File
	sum    hash.Hash
	size   int64
	footer []byte
	x      scratch
}

func (o *output) put(b []byte) error {
	o.sum.Write(b)
	n, err := o.file.Write(b)
	o.size += int64(n)
	return err
}

func (o *output) chunk(w *Writer, c *chunk) error {
	if o.file == nil {
		f, err := w.c.FS.Create(w.c.TmpPrefix + c.pack.header.Handle().String())
		if err != nil {
			return err
		}
		o.file, o.size = f, 0
		if o.sum == nil {
			o.sum = sha256.New()
		}
		o.sum.Reset()
	}
	if c.buf != nil {
		if err := o.put(c.buf); err != nil {
			return err
		}
	}
	if !c.last {
		return nil
	}
	p := c.pack
	plain := len(p.records) * block.Size
	// Plaintext and sealed footer lie one behind the other: they must not overlap.
	o.footer = o.footer[:0]
	for i := range p.records {
		o.footer = p.records[i].Append(o.footer)
	}
	sealed := plain + Overhead
	if need := plain + sealed + TrailerSize; cap(o.footer) < need {
		o.footer = append(make([]byte, 0, need), o.footer...)
	}
	b := o.footer[plain : plain+sealed]
	p.seal.seal(&o.x, b, o.footer[:plain], uint64(p.offset), footerKind, uint32(plain), &block.ID{})
	b = appendTrailer(b, uint32(p.offset), uint32(sealed))
	if err := o.put(b); err != nil {
		return err
	}
	n, err := o.file.Write(o.sum.Sum(b[:0]))
	o.size += int64(n)
	return err
}

// drop gives the file up; what is left of it, if storage does not let us
// remove it, is rubbish under a name that says so.
func (o *output) drop(fsys fsx.FS) {
	if o.file != nil {
		_ = o.file.Close()
		_ = fsys.Remove(o.file.Name())
		o.file = nil
	}
}

// publish syncs and names packs in order.
func (w *Writer) publish(packs <-chan *whole) {
	defer w.done.Done()
	made := make(map[string]bool) // directories known to last
	for p := range packs {
		if p.barrier != nil {
			close(p.barrier)
			continue
		}
		tmp := p.file.Name()
		if w.hasFailed() {
			_ = p.file.Close()
			_ = w.c.FS.Remove(tmp)
			continue
		}
		if err := w.name(p, made); err != nil {
			_ = w.c.FS.Remove(tmp)
			w.fail(fmt.Errorf("publish pack %v: %w", p.Handle, err))
		}
	}
}

func (w *Writer) name(p *whole, made map[string]bool) error {
	err := p.file.Sync()
	err = errors.Join(err, p.file.Close())
	if err != nil {
		return err
	}
	dir := w.c.Type.Subdir(p.Handle)
	if !made[dir] {
		if err := fsx.MakeDir(w.c.FS, dir); err != nil {
			return err
		}
		made[dir] = true
	}
	if w.c.Before != nil {
		if err := w.c.Before(p.Handle); err != nil {
			return err
		}
	}
	if err := w.c.FS.Publish(p.file.Name(), w.c.Type.Path(p.Handle)); err != nil {
		return err
	}
	if err := w.c.FS.SyncDir(dir); err != nil {
		return err
	}
	if w.c.After != nil {
		w.c.After(p.Published)
	}
	return nil
}
