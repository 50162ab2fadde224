package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sync/semaphore"
)

// handle is an open regular file. Reads of one handle share nothing but the
// stream detector.
type handle struct {
	c       *content
	streams streams
}

// handles maps the numbers the kernel uses to open files. Lookups take no lock.
type handles struct {
	last sync.Mutex
	n    uint64
	of   sync.Map // uint64 → *handle or *dirHandle
}

func (h *handles) add(x any) uint64 {
	h.last.Lock()
	h.n++
	n := h.n
	h.last.Unlock()
	h.of.Store(n, x)
	return n
}

func (h *handles) remove(n uint64) { h.of.Delete(n) }

func (t *tree) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return fuse.EROFS
	}
	c, errno := attempt(t, cancel, "opening failed", func(ctx context.Context) (*content, error) {
		n, err := t.node(ctx, in.NodeId)
		if err == nil && n.content == nil {
			err = syscall.EISDIR
		}
		return n.content, err
	})
	if errno != 0 {
		return fuse.Status(errno)
	}
	out.Fh = t.handles.add(&handle{c: c})
	// Contents never change, so what the kernel has stays good when the file is
	// opened again. There is nothing to flush at close.
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	return fuse.OK
}

func (t *tree) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { t.handles.remove(in.Fh) }

func (t *tree) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Read answers in full or with an error. A short answer would tell the kernel
// that the file ends there.
func (t *tree) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	x, _ := t.handles.of.Load(in.Fh)
	h, ok := x.(*handle)
	if !ok {
		return nil, fuse.EBADF
	}
	c, off := h.c, int64(in.Offset)
	if off < 0 {
		return nil, fuse.EINVAL
	}
	n := min(int64(len(buf)), c.size-off)
	if n <= 0 {
		return fuse.ReadResultData(nil), fuse.OK
	}
	if c.disk == nil {
		return fuse.ReadResultData(c.data[off : off+n]), fuse.OK
	}
	if from, to := h.streams.note(c.base+off, n, c.base+c.size, &t.pace); to > from {
		c.disk.Prefetch(from, to-from)
	}
	if k, ok := c.disk.areas.at(c.base + off); ok && k.hole && k.end >= c.base+off+n {
		return zeros(n), fuse.OK
	}
	r, err := try(&t.patience, cancel, func(ctx context.Context) (*pooled, error) {
		return t.readDisk(ctx, c, off, n)
	}, (*pooled).Done)
	if err != nil {
		t.complaints.about(err, "reading failed", "generation", c.gen.ref.String(), "file", c.name, "disk", c.disk.name, "offset", c.base+off, "length", n)
		return nil, fuse.Status(toErrno(err))
	}
	return r, fuse.OK
}

func (t *tree) readDisk(ctx context.Context, c *content, off, n int64) (*pooled, error) {
	p, err := t.buffers.get(ctx, int(n))
	if err != nil {
		return nil, err
	}
	if m, err := c.disk.ReadAtContext(ctx, p.b, c.base+off); m != len(p.b) {
		p.Done()
		if err == nil { // inside a disk there is no end
			err = io.ErrUnexpectedEOF
		}
		if toErrno(err) == syscall.ENOENT { // nor can a part of it not exist
			err = fmt.Errorf("%w: %d of %d bytes read: %w", errMissing, m, n, err)
		}
		return nil, err
	}
	return p, nil
}

// zeroes is sent for holes, over and over, so that it stays in the CPU's cache.
var zeroes [64 << 10]byte

func zeros(n int64) fuse.ReadResult {
	v := make([][]byte, 0, n/int64(len(zeroes))+1)
	for ; n > 0; n -= int64(len(zeroes)) {
		v = append(v, zeroes[:min(n, int64(len(zeroes)))])
	}
	return fuse.ReadResultVector(v)
}

// buffers lends the memory that disks are read into. All of it together is
// bounded, whatever number of processes read; what a stuck read holds counts.
type buffers struct {
	room *semaphore.Weighted
	pool [maxReadBits - minReadBits + 1]sync.Pool // by power of two
}

const (
	minReadBits = 12
	maxReadBits = 20
	maxRead     = 1 << maxReadBits // bytes; the largest request
	readRoom    = 32 << 20
)

// pooled is a lent buffer and, as a fuse.ReadResult, an answer. go-fuse calls
// Done when the bytes have left; it does so after sending only for results that
// have Slices.
type pooled struct {
	b    []byte
	from *buffers
}

func sizeClass(n int) int { return max(0, bits.Len(uint(n-1))-minReadBits) }

func (f *buffers) get(ctx context.Context, n int) (*pooled, error) {
	k := sizeClass(n)
	if k >= len(f.pool) {
		return nil, fmt.Errorf("read of %d bytes: %w", n, syscall.EINVAL)
	}
	if err := f.room.Acquire(ctx, 1<<(k+minReadBits)); err != nil {
		return nil, err
	}
	if p, ok := f.pool[k].Get().(*pooled); ok {
		p.b = p.b[:n]
		return p, nil
	}
	return &pooled{b: make([]byte, n, 1<<(k+minReadBits)), from: f}, nil
}

func (p *pooled) Done() {
	if p == nil {
		return
	}
	p.from.room.Release(int64(cap(p.b)))
	p.from.pool[sizeClass(cap(p.b))].Put(p)
}

func (p *pooled) Size() int                          { return len(p.b) }
func (p *pooled) Bytes([]byte) ([]byte, fuse.Status) { return p.b, fuse.OK }
func (p *pooled) Slices() ([][]byte, fuse.Status)    { return [][]byte{p.b}, fuse.OK }

// Lseek answers SEEK_DATA and SEEK_HOLE; the kernel knows the others itself.
func (t *tree) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	x, _ := t.handles.of.Load(in.Fh)
	h, ok := x.(*handle)
	if !ok {
		return fuse.EBADF
	}
	at, whence := int64(in.Offset), in.Whence
	if whence != seekData && whence != seekHole {
		return fuse.EINVAL
	}
	off, errno := attempt(t, cancel, "seeking failed", func(ctx context.Context) (int64, error) {
		ctx, stop := context.WithTimeout(ctx, mapTime)
		defer stop()
		off, err := h.c.seek(ctx, at, whence)
		if errors.Is(err, context.DeadlineExceeded) {
			off, err = at, nil
			if whence == seekHole {
				off = h.c.size
			}
		}
		return off, err
	})
	out.Offset = uint64(off)
	return fuse.Status(errno)
}
