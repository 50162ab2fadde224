package fsx

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"syscall"
	"time"
)

type memFile struct {
	m     *Mem
	n     *memNode
	name  string
	life  int
	write bool

	at     int
	closed bool
}

// use checks that the handle lives; m.mu is held.
func (f *memFile) use(op string, write bool) error {
	err := error(nil)
	switch {
	case f.closed:
		err = fs.ErrClosed
	case f.life != f.m.life:
		err = ErrCrashed
	case f.n.dir:
		err = syscall.EISDIR
	case write && !f.write, op == "read" && f.write:
		err = syscall.EBADF
	default:
		return nil
	}
	return &fs.PathError{Op: op, Path: f.name, Err: err}
}

func (f *memFile) Name() string { return f.name }

func (f *memFile) Read(p []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("read", false); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if f.at >= len(f.n.data) {
		return 0, io.EOF
	}
	n := copy(p, f.n.data[f.at:])
	f.at += n
	return n, nil
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("read", false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: f.name, Err: errors.New("negative offset")}
	}
	if off >= int64(len(f.n.data)) {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := copy(p, f.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Write always adds at the end: nothing in a repository is ever overwritten.
func (f *memFile) Write(p []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("write", true); err != nil {
		return 0, err
	}
	n := len(p)
	if room := f.m.capacity - f.m.used; int64(n) > room {
		n = int(max(0, room))
	}
	f.n.data = append(f.n.data, p[:n]...)
	if f.n.links > 0 {
		f.m.used += int64(n)
	}
	if n < len(p) {
		return n, &fs.PathError{Op: "write", Path: f.name, Err: syscall.ENOSPC}
	}
	return n, nil
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("sync", false); err != nil {
		return err
	}
	f.n.synced = len(f.n.data)
	return nil
}

func (f *memFile) Stat() (fs.FileInfo, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed || f.life != f.m.life {
		return nil, f.use("stat", false)
	}
	return f.n.info(path.Base(f.name)), nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return f.use("close", false)
	}
	f.closed = true
	return nil
}

func (n *memNode) info(base string) fs.FileInfo {
	return memInfo{name: base, size: int64(len(n.data)), dir: n.dir}
}

// memInfo says nothing of times: nothing in a repository may depend on them.
type memInfo struct {
	name string
	size int64
	dir  bool
}

func (i memInfo) Name() string { return i.name }
func (i memInfo) Size() int64  { return i.size }
func (i memInfo) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o700
	}
	return 0o600
}
func (i memInfo) ModTime() time.Time { return time.Time{} }
func (i memInfo) IsDir() bool        { return i.dir }
func (i memInfo) Sys() any           { return nil }
