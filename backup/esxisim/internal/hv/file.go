package hv

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// File is a file of the datastore, opened by a shell command. What it writes
// counts against the datastore's capacity.
type File struct {
	h   *Host
	rel string
	f   *os.File
	end bool // every write goes to the end
}

// OpenFile opens a file with flags of os.OpenFile, unless a running VM holds it
// against that.
func (h *Host) OpenFile(rel string, flag int) (*File, error) {
	write := flag&(os.O_WRONLY|os.O_RDWR) != 0
	if h.InUse(rel, write) {
		return nil, fail(ErrLocked, rel, "failed to lock %s: it is in use by a running VM", rel)
	}
	if flag&os.O_CREATE != 0 {
		if _, err := h.root.Stat(rel); err != nil && !h.space.fits(1) {
			return nil, fail(ErrNoSpace, rel, "there is not enough space on the file system for %s", rel)
		}
	}
	f, err := h.root.OpenFile(rel, flag&^os.O_APPEND, 0o600)
	if err != nil {
		return nil, fileError(rel, err)
	}
	if write && flag&os.O_TRUNC != 0 {
		if err := h.forget(rel, ""); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	file := &File{h: h, rel: rel, f: f, end: flag&os.O_APPEND != 0}
	if file.end {
		if _, err := f.Seek(0, io.SeekEnd); err != nil {
			return nil, errors.Join(fileError(rel, err), f.Close())
		}
	}
	return file, nil
}

func (f *File) Read(p []byte) (int, error) { return f.f.Read(p) }

// ReadAt reads at an offset.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// Stat describes the file.
func (f *File) Stat() (fs.FileInfo, error) { return f.f.Stat() }

// Close closes the file.
func (f *File) Close() error {
	f.h.space.refresh()
	return f.f.Close()
}

// Write writes where the last read or write ended.
func (f *File) Write(p []byte) (int, error) {
	whence := io.SeekCurrent
	if f.end {
		whence = io.SeekEnd
	}
	off, err := f.f.Seek(0, whence)
	if err != nil {
		return 0, err
	}
	n, err := f.WriteAt(p, off)
	if _, serr := f.f.Seek(off+int64(n), io.SeekStart); err == nil {
		err = serr
	}
	return n, err
}

// WriteAt writes at an offset. What has no room on the datastore is not
// written at all; blocks that the file has already need none.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if !f.h.space.take(int64(len(p))) && !f.has(off, int64(len(p))) {
		return 0, fail(ErrNoSpace, f.rel, "there is not enough space on the file system for %s", f.rel)
	}
	n, err := f.f.WriteAt(p, off)
	return n, fileError(f.rel, err)
}

// has tells whether blocks are the file's already: all of a thick disk's are.
func (f *File) has(off, n int64) bool {
	fi, err := f.f.Stat()
	if err != nil || off+n > fi.Size() {
		return false
	}
	if f.h.charge(f.rel, fi) >= fi.Size() && allocated(fi) < fi.Size() {
		return true
	}
	at, err := f.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return false
	}
	start, end, err := nextData(f.f, off)
	if _, serr := f.f.Seek(at, io.SeekStart); serr != nil {
		return false
	}
	return err == nil && start == off && end >= off+n
}

// Truncate makes the file shorter or longer; what it gains is a hole.
func (f *File) Truncate(size int64) error {
	f.h.space.refresh()
	return fileError(f.rel, f.f.Truncate(size))
}

// NextData finds the next area at or after off that has blocks; io.EOF when
// there is none.
func (f *File) NextData(off int64) (start, end int64, err error) { return nextData(f.f, off) }

func nextData(f *os.File, off int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, err
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	return start, end, err
}

// Used is what a file takes on the datastore, in bytes.
func (h *Host) Used(rel string, fi fs.FileInfo) int64 { return h.charge(rel, fi) }

// Rename is Move as rename(2) does it: an existing file is replaced, an
// existing directory only when it is empty.
func (h *Host) Rename(from, to string) error {
	if fi, err := h.root.Lstat(to); err == nil && fi.IsDir() {
		if err := h.Remove(to); err != nil {
			return err
		}
	}
	if to == from || strings.HasPrefix(to, from+"/") {
		return fail(ErrInvalid, to, "%s cannot be moved into itself", from)
	}
	if _, err := h.root.Stat(path.Dir(to)); err != nil {
		return fileError(path.Dir(to), err)
	}
	return h.Move(from, to, true)
}
