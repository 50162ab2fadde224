package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// dirFS is a directory of the operating system.
type dirFS struct {
	root string
}

// OS returns the storage in an existing directory. It follows symbolic links:
// where an operator has moved part of a repository is the operator's business.
func OS(root string) (FS, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	fi, err := os.Stat(root)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: root, Err: unix.ENOTDIR}
	}
	return &dirFS{root: root}, nil
}

func (d *dirFS) path(op, name string) (string, error) {
	if err := checkName(op, name); err != nil {
		return "", err
	}
	return filepath.Join(d.root, filepath.FromSlash(name)), nil
}

// checkName keeps names inside the root.
func checkName(op, name string) error {
	if !fs.ValidPath(name) {
		return &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	return nil
}

func (d *dirFS) open(name string, flag int) (File, error) {
	p, err := d.path("open", name)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(p, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f, name: name}, nil
}

func (d *dirFS) Open(name string) (File, error) { return d.open(name, os.O_RDONLY) }

func (d *dirFS) Create(name string) (File, error) {
	return d.open(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
}

func (d *dirFS) Append(name string) (File, error) {
	return d.open(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND)
}

// Publish tries three ways, each for storage that does not know the one before.
// link(2) comes first because it alone neither replaces a file nor depends on
// the age of the kernel or the server.
func (d *dirFS) Publish(old, final string) error {
	from, err := d.path("publish", old)
	if err != nil {
		return err
	}
	to, err := d.path("publish", final)
	if err != nil {
		return err
	}
	err = os.Link(from, to)
	switch {
	case err == nil:
		_ = os.Remove(from) // append-only storage keeps it, and that is fine
		return nil
	case errors.Is(err, fs.ErrExist):
		// A network server that executed our request and lost the answer says
		// "exists" to the repeated one.
		if sameFile(from, to) {
			_ = os.Remove(from)
			return nil
		}
		return err
	case !noSuchCall(err):
		return err
	}
	return publishByRename(from, to)
}

// publishByRename is for storage without hard links (FAT, many SMB servers).
func publishByRename(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == nil {
		return nil
	}
	if !noSuchCall(err) {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return renameCarefully(from, to)
}

// renameCarefully is for storage that knows neither. Nothing but the caller's own
// lock keeps another writer out between the two calls; final names are random or
// taken under such a lock.
func renameCarefully(from, to string) error {
	if _, err := os.Lstat(to); err == nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: fs.ErrExist}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Rename(from, to)
}

func sameFile(a, b string) bool {
	fa, err := os.Lstat(a)
	if err != nil {
		return false
	}
	fb, err := os.Lstat(b)
	return err == nil && os.SameFile(fa, fb)
}

// noSuchCall tells whether storage does not know a call, or not for such files.
// EPERM is what FAT and append-only files answer to link(2).
func noSuchCall(err error) bool {
	for _, e := range []unix.Errno{unix.EPERM, unix.ENOSYS, unix.ENOTSUP, unix.EINVAL, unix.EMLINK} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (d *dirFS) Replace(old, final string) error {
	from, err := d.path("replace", old)
	if err != nil {
		return err
	}
	to, err := d.path("replace", final)
	if err != nil {
		return err
	}
	if from != to && sameFile(from, to) {
		return os.Remove(from) // where both names lead to one file rename(2) does nothing
	}
	return os.Rename(from, to)
}

func (d *dirFS) Remove(name string) error {
	p, err := d.path("remove", name)
	if err != nil {
		return err
	}
	return os.Remove(p)
}

func (d *dirFS) MkdirAll(name string) error {
	p, err := d.path("mkdir", name)
	if err != nil {
		return err
	}
	return os.MkdirAll(p, 0o700)
}

func (d *dirFS) ReadDir(name string) ([]fs.DirEntry, error) {
	p, err := d.path("readdir", name)
	if err != nil {
		return nil, err
	}
	return os.ReadDir(p)
}

func (d *dirFS) Stat(name string) (fs.FileInfo, error) {
	p, err := d.path("stat", name)
	if err != nil {
		return nil, err
	}
	return os.Stat(p)
}

func (d *dirFS) SyncDir(name string) error {
	p, err := d.path("sync", name)
	if err != nil {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	err = f.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}

func (d *dirFS) Free() (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.root, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: d.root, Err: err}
	}
	unit := st.Frsize
	if unit <= 0 {
		unit = st.Bsize
	}
	return st.Bavail * uint64(unit), nil
}

// Lock uses flock(2): it belongs to the open file description made here, which
// nobody shares (O_CLOEXEC), so the kernel drops it when this process ends in
// whatever way. fcntl locks would be lost as soon as any other handle of the
// same file is closed.
func (d *dirFS) Lock(name string, exclusive, wait bool) (io.Closer, error) {
	p, err := d.path("lock", name)
	if err != nil {
		return nil, err
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	if !wait {
		how |= unix.LOCK_NB
	}
	for {
		f, err := openLock(p, exclusive)
		if err != nil {
			return nil, err
		}
		if err := flock(f, how); err != nil {
			_ = f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%s: %w", p, ErrLocked)
			}
			return nil, &fs.PathError{Op: "lock", Path: p, Err: err}
		}
		// Whoever held the lock before may have removed the file: then we hold
		// a lock on a file that nobody else will ever open.
		held, err := f.Stat()
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		if now, err := os.Stat(p); err == nil && os.SameFile(held, now) {
			return f, nil
		}
		_ = f.Close()
	}
}

// openLock opens for writing as well, because NFS turns an exclusive flock into
// a write lock, which needs that. A shared lock in a repository that we may only
// read is content with an existing file.
func openLock(p string, exclusive bool) (*os.File, error) {
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil || exclusive {
		return f, err
	}
	if !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EROFS) {
		return nil, err
	}
	if f, rerr := os.Open(p); rerr == nil {
		return f, nil
	}
	return nil, err
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// osFile is an os.File that remembers a failed Sync.
type osFile struct {
	*os.File
	name string

	mu      sync.Mutex
	syncErr error
}

func (f *osFile) Name() string { return f.name }

func (f *osFile) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.syncErr == nil {
		f.syncErr = f.File.Sync()
	}
	return f.syncErr
}
