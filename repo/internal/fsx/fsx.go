// Package fsx is the storage under a repository: a directory on a local disk or
// a network share, and two stand-ins that make storage fail on purpose.
//
// Names are slash separated, relative to the root and clean (fs.ValidPath);
// nothing outside the root can be named. What a caller may rely on:
//
//   - bytes of a file last once File.Sync has returned nil, and not before;
//   - a name (made by Create, Append, Publish, Replace, MkdirAll, Lock; gone by Remove)
//     lasts once SyncDir of its directory has returned nil, and not before;
//   - Publish gives a file its final name whole or not at all, and never
//     replaces a file; Replace does, so that the name leads to the old file or
//     to the new one, whenever one looks and whatever crashes;
//   - a Sync that failed stays failed: the kernel may have dropped the bytes and
//     would call a second attempt a success, so the file has to be given up;
//   - a lock dies with the process that holds it.
//
// Mem keeps exactly these promises and breaks everything beyond them at random
// when told to crash. Faulty makes the k-th operation of any FS fail. Tests of
// the repository run on both.
package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
)

var (
	// ErrLocked says that somebody else holds a lock that excludes ours.
	ErrLocked = errors.New("locked by another process")
	// ErrCrashed says that the storage, or the process using it, was made to
	// crash by a test; nothing happens on old handles any more.
	ErrCrashed = errors.New("the storage has crashed")
	// ErrTooLarge says that a file is larger than its format allows.
	ErrTooLarge = errors.New("file too large")
)

// FS is the storage under a repository: slash-separated names relative to its
// root. All methods may be used by many goroutines at once.
type FS interface {
	// Open opens a file for reading.
	Open(name string) (File, error)
	// Create makes a new file, mode 0600, for writing; fs.ErrExist when the
	// name is taken.
	Create(name string) (File, error)
	// Append opens a file for writing at its end and makes it when it is not
	// there, mode 0600.
	Append(name string) (File, error)
	// Publish gives the file old, which must be synced, its final name. It
	// fails with fs.ErrExist when another file has that name. Where old cannot
	// be removed (append-only storage) the file keeps both names, and that is
	// a success.
	Publish(old, final string) error
	// Replace gives the file old, which must be synced, the name final, in place
	// of the file that has it, if there is one. Who has that one open goes on
	// reading it.
	Replace(old, final string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// MkdirAll makes a directory and its parents, mode 0700.
	MkdirAll(name string) error
	// ReadDir lists a directory, sorted by name.
	ReadDir(name string) ([]fs.DirEntry, error)
	// Stat describes a file or directory.
	Stat(name string) (fs.FileInfo, error)
	// SyncDir makes the names in a directory last. File systems that know no
	// such thing (some network mounts) count as having done it.
	SyncDir(name string) error
	// Lock takes a kernel lock on a file, which it makes when it is not there.
	// With wait it blocks until the lock is free, else it fails with ErrLocked.
	// Locks exclude each other within a process as well as between processes.
	// Close gives the lock back. The file should carry no data: on SMB mounts a
	// lock keeps others from reading and writing what it covers.
	Lock(name string, exclusive, wait bool) (io.Closer, error)
	// Free tells how many bytes may still be written.
	Free() (uint64, error)
}

// File is an open file of an FS. ReadAt may be used by many goroutines at once,
// the rest by one at a time.
type File interface {
	io.Reader
	io.ReaderAt
	io.Writer
	io.Closer
	// Sync makes the bytes written so far last. Once it has failed it fails for
	// ever.
	Sync() error
	Stat() (fs.FileInfo, error)
	// Name is the name the file was opened by.
	Name() string
}

// WriteFile writes data to tmp, syncs it and publishes it as name: afterwards
// the file is there whole and lasts. On any error tmp is removed, if storage
// lets us; whether name exists is then open only when the last step, syncing
// its directory, failed.
func WriteFile(fsys FS, tmp, name string, data []byte) error {
	return WriteFunc(fsys, tmp, name, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// WriteFunc is WriteFile for content that fill writes piece by piece. The writer
// is not buffered.
func WriteFunc(fsys FS, tmp, name string, fill func(io.Writer) error) error {
	return writeFunc(fsys, tmp, name, fsys.Publish, fill)
}

func writeFunc(fsys FS, tmp, name string, publish func(old, final string) error, fill func(io.Writer) error) (err error) {
	f, err := fsys.Create(tmp)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// After Publish the name tmp may be gone already; both are fine.
			_ = fsys.Remove(tmp)
		}
	}()
	if err := fill(f); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := publish(tmp, name); err != nil {
		return err
	}
	return fsys.SyncDir(path.Dir(name))
}

// ReplaceFile is WriteFile for a name that a file may have already. A crash leaves
// the old file there, or the new one.
func ReplaceFile(fsys FS, tmp, name string, data []byte) error {
	return writeFunc(fsys, tmp, name, fsys.Replace, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// ReadFile reads a whole file of at most limit bytes; a larger one is refused
// with ErrTooLarge before it is read.
func ReadFile(fsys FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, at most %d expected", name, ErrTooLarge, fi.Size(), limit)
	}
	b := make([]byte, fi.Size())
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, fi.Size()), b); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// MakeDir makes a directory and its parents so that they last: it syncs every
// directory on the way, whether or not this call made something in it, because
// a process that died in between may have made it without syncing.
func MakeDir(fsys FS, name string) error {
	if err := fsys.MkdirAll(name); err != nil {
		return err
	}
	for name != "." {
		name = path.Dir(name)
		if err := fsys.SyncDir(name); err != nil {
			return err
		}
	}
	return nil
}
