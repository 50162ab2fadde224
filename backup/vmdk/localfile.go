package vmdk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// LocalFile is an os.File that tells its holes, and does not read them: pass it as File.R for a local extent. It is safe for
// concurrent use.
type LocalFile struct {
	*os.File
	size int64
	// known is the run of data that was found last. Data that becomes a hole later is still read right, so it never expires.
	known atomic.Pointer[Area]
}

// smallRead is the length in bytes below which looking for holes costs more than reading them.
const smallRead = 64 << 10

// NewLocalFile takes over a file, or a block device. The length is asked for once: the file must not change its length while this
// is in use.
func NewLocalFile(f *os.File) (*LocalFile, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("%s: length: %w", f.Name(), err)
	}
	return &LocalFile{File: f, size: size}, nil
}

// Size is the file's length in bytes.
func (f *LocalFile) Size() int64 { return f.size }

// ReadAt implements io.ReaderAt. The kernel would fill its page cache with the zeros of a hole, at a tenth of the speed of memory.
func (f *LocalFile) ReadAt(p []byte, off int64) (n int, err error) {
	if len(p) < smallRead || off < 0 || off+int64(len(p)) > f.size {
		return f.File.ReadAt(p, off)
	}
	for n < len(p) {
		at, rest := off+int64(n), p[n:]
		start, end, err := f.NextData(at)
		if errors.Is(err, io.EOF) {
			start, end = f.size, f.size
		} else if err != nil {
			return n, err
		}
		if hole := min(start-at, int64(len(rest))); hole > 0 {
			clear(rest[:hole])
			n += int(hole)
			continue
		}
		m, err := f.File.ReadAt(rest[:min(end-at, int64(len(rest)))], at)
		if n += m; err != nil {
			return n, err
		}
	}
	return n, nil
}

// NextData finds the first data at or after off; io.EOF: only a hole follows. Where the file system cannot tell, all is data.
func (f *LocalFile) NextData(off int64) (start, end int64, err error) {
	if off >= f.size {
		return 0, 0, io.EOF
	}
	if a := f.known.Load(); a != nil && off >= a.Offset && off < a.End() {
		return off, a.End(), nil
	}
	start, err = f.seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, io.EOF
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP):
		f.known.Store(&Area{0, f.size})
		return off, f.size, nil
	case err != nil:
		return 0, 0, fmt.Errorf("%s: find data at %d: %w", f.Name(), off, err)
	}
	if start >= f.size {
		return 0, 0, io.EOF
	}
	// Without a hole behind it the data ends with the file; an error here costs only a search that could have been shorter.
	if end, err = f.seek(start, unix.SEEK_HOLE); err != nil || end <= start || end > f.size {
		end = f.size
	}
	f.known.Store(&Area{start, end - start})
	return start, end, nil
}

// seek leaves the file's own position anywhere: everything here reads and writes at given places.
func (f *LocalFile) seek(off int64, whence int) (int64, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var at int64
	var seekErr error
	if err := raw.Control(func(fd uintptr) { at, seekErr = unix.Seek(int(fd), off, whence) }); err != nil {
		return 0, err
	}
	return at, seekErr
}
