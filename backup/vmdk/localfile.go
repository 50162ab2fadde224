package vmdk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// LocalFile is an os.File that tells its holes: pass it as File.R for a local extent.
type LocalFile struct {
	*os.File
	size int64
}

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

// NextData finds the first data at or after off; io.EOF: only a hole follows. Where the file system cannot tell, all is data.
func (f *LocalFile) NextData(off int64) (start, end int64, err error) {
	if off >= f.size {
		return 0, 0, io.EOF
	}
	start, err = f.seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, io.EOF
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP):
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
