package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
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
	c, errno := attempt(t, in.Unique, cancel, "opening failed", func(ctx context.Context) (*content, error) {
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

// maxRead is the largest request for reading, in bytes.
const maxRead = 1 << 20

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
	var l loan
	_, err := try(t.patience, in.Unique, cancel, func(ctx context.Context) (_ struct{}, err error) {
		l, err = c.lend(ctx, off, n)
		return struct{}{}, err
	})
	if err != nil {
		if l != nil { // too late
			l.Return()
		}
		t.complaints.about(err, "reading failed", "generation", c.gen.ref.String(), "file", c.name, "disk", c.disk.name, "offset", c.base+off, "length", n)
		return nil, fuse.Status(toErrno(err))
	}
	return &lent{l, int(n)}, fuse.OK
}

// lend borrows a part of a file that is a window of a disk.
func (c *content) lend(ctx context.Context, off, n int64) (loan, error) {
	l, err := c.disk.Lend(ctx, c.base+off, n)
	got := int64(0)
	if err == nil {
		for _, p := range l.Parts() {
			got += int64(len(p))
		}
		if got == n {
			return l, nil
		}
		l.Return()
		err = io.ErrUnexpectedEOF // inside a disk there is no end
	} else if toErrno(err) != syscall.ENOENT {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %d of %d bytes read: %w", errMissing, got, n, err) // nor can a part of it not exist
}

// lent is the answer to a read: what the repository has in memory goes to the
// kernel from where it lies.
type lent struct {
	loan
	n int
}

// Slices makes go-fuse write the parts as they are.
func (l *lent) Slices() ([][]byte, fuse.Status) { return l.Parts(), fuse.OK }

func (l *lent) Size() int { return l.n }

func (l *lent) Bytes(buf []byte) ([]byte, fuse.Status) {
	buf = buf[:0]
	for _, p := range l.Parts() {
		buf = append(buf, p...)
	}
	return buf, fuse.OK
}

// Done is called once, when the kernel has the bytes or does not want them.
func (l *lent) Done() { l.Return() }

// zeroes is sent for holes, over and over, so that it stays in the CPU's cache.
var zeroes [64 << 10]byte

func zeros(n int64) fuse.ReadResult {
	v := make([][]byte, 0, n/int64(len(zeroes))+1)
	for ; n > 0; n -= int64(len(zeroes)) {
		v = append(v, zeroes[:min(n, int64(len(zeroes)))])
	}
	return fuse.ReadResultVector(v)
}

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
	off, errno := attempt(t, in.Unique, cancel, "seeking failed", func(ctx context.Context) (int64, error) {
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
