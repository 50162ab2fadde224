package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"syscall"
)

// Op is a kind of operation that Faulty can make fail.
type Op uint16

// Operations. A file's operations count like those of the file system.
const (
	OpOpen Op = 1 << iota
	OpRead
	OpReadDir
	OpStat
	OpLock
	OpCreate // also Append
	OpWrite
	OpSync
	OpPublish
	OpRemove
	OpMkdir
	OpSyncDir
	OpReplace

	// OpChanges are the operations that change what is stored or make it last.
	OpChanges = OpCreate | OpWrite | OpSync | OpPublish | OpRemove | OpMkdir | OpSyncDir | OpReplace
	// OpAny is every operation.
	OpAny = 1<<iota - 1
)

// Mode is a way to fail.
type Mode uint8

const (
	// FailOnce makes one operation fail with EIO, without effect.
	FailOnce Mode = iota
	// FailAfter makes one operation take effect and report EIO all the same, as
	// when a server's answer is lost.
	FailAfter
	// ShortWrite makes one operation fail with EIO; a Write writes half before.
	ShortWrite
	// NoSpace makes operations that need room fail with ENOSPC from then on
	// until Heal; a Write writes half before.
	NoSpace
	// CrashNow makes every operation fail with ErrCrashed from then on, the
	// first one half done if it is a Write. Then Mem.Crash loses what it may.
	CrashNow
)

// Plan says which operation fails and how.
type Plan struct {
	Ops  Op                     // which kinds count
	Name func(name string) bool // which names count; nil: all
	At   int                    // the At-th of those fails, counted from 1
	Mode Mode
}

// Faulty passes everything on to another FS, counts, and fails as planned.
type Faulty struct {
	inner FS

	mu      sync.Mutex
	plan    Plan
	count   int
	state   Mode // NoSpace or CrashNow once that has begun
	begun   bool
	retried int
}

// NewFaulty wraps fsys. Without a plan nothing fails.
func NewFaulty(fsys FS) *Faulty { return &Faulty{inner: fsys} }

// Plan sets what will fail; it counts from here.
func (f *Faulty) Plan(p Plan) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.plan, f.count, f.begun = p, 0, false
}

// Heal ends a lasting failure and forgets the plan.
func (f *Faulty) Heal() { f.Plan(Plan{}) }

// Count is the number of operations since Plan was called that it selects.
func (f *Faulty) Count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count
}

// Fired tells whether the planned failure has happened.
func (f *Faulty) Fired() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.plan.At > 0 && f.count >= f.plan.At
}

// RetriedSyncs is how often a file was synced again after its Sync had failed,
// which the rules of writing forbid.
func (f *Faulty) RetriedSyncs() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.retried
}

var errInjected = fmt.Errorf("injected failure: %w", syscall.EIO)

// outcome is what an operation has to do.
type outcome struct {
	err  error
	half bool // Write: write half first
	run  bool // do it all, then report err
}

const needRoom = OpCreate | OpWrite | OpMkdir | OpPublish | OpReplace

func (f *Faulty) next(op Op, name string) outcome {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.begun {
		if f.state == CrashNow {
			return outcome{err: fmt.Errorf("%s: %w", name, ErrCrashed)}
		}
		if op&needRoom != 0 {
			return outcome{err: &fs.PathError{Op: "write", Path: name, Err: syscall.ENOSPC}}
		}
	}
	if f.plan.Ops&op == 0 || f.plan.Name != nil && !f.plan.Name(name) {
		return outcome{run: true}
	}
	f.count++
	if f.count != f.plan.At {
		return outcome{run: true}
	}
	failed := func(err error) error { return &fs.PathError{Op: "faulty", Path: name, Err: err} }
	switch f.plan.Mode {
	case FailAfter:
		return outcome{err: failed(errInjected), run: true}
	case ShortWrite:
		return outcome{err: failed(errInjected), half: true}
	case NoSpace:
		f.begun, f.state = true, NoSpace
		if op&needRoom == 0 {
			return outcome{run: true}
		}
		return outcome{err: failed(syscall.ENOSPC), half: true}
	case CrashNow:
		f.begun, f.state = true, CrashNow
		return outcome{err: failed(ErrCrashed), half: true}
	}
	return outcome{err: failed(errInjected)}
}

// do runs an operation that has no result but its error.
func (f *Faulty) do(op Op, name string, run func() error) error {
	o := f.next(op, name)
	if o.run {
		if err := run(); err != nil {
			return err
		}
	}
	return o.err
}

// get runs an operation that has a result, which is closed if it is to fail
// after all.
func get[T any](f *Faulty, op Op, name string, run func() (T, error)) (T, error) {
	var none T
	o := f.next(op, name)
	if !o.run {
		return none, o.err
	}
	v, err := run()
	if err == nil && o.err != nil {
		if c, ok := any(v).(io.Closer); ok {
			_ = c.Close()
		}
		return none, o.err
	}
	return v, err
}

func (f *Faulty) file(op Op, name string, open func(string) (File, error)) (File, error) {
	return get(f, op, name, func() (File, error) {
		in, err := open(name)
		if err != nil {
			return nil, err
		}
		return &faultyFile{File: in, f: f}, nil
	})
}

// Open implements FS.
func (f *Faulty) Open(name string) (File, error) { return f.file(OpOpen, name, f.inner.Open) }

// Create implements FS.
func (f *Faulty) Create(name string) (File, error) { return f.file(OpCreate, name, f.inner.Create) }

// Append implements FS.
func (f *Faulty) Append(name string) (File, error) { return f.file(OpCreate, name, f.inner.Append) }

// Publish implements FS.
func (f *Faulty) Publish(old, final string) error {
	return f.do(OpPublish, final, func() error { return f.inner.Publish(old, final) })
}

// Replace implements FS.
func (f *Faulty) Replace(old, final string) error {
	return f.do(OpReplace, final, func() error { return f.inner.Replace(old, final) })
}

// Remove implements FS.
func (f *Faulty) Remove(name string) error {
	return f.do(OpRemove, name, func() error { return f.inner.Remove(name) })
}

// MkdirAll implements FS.
func (f *Faulty) MkdirAll(name string) error {
	return f.do(OpMkdir, name, func() error { return f.inner.MkdirAll(name) })
}

// SyncDir implements FS.
func (f *Faulty) SyncDir(name string) error {
	return f.do(OpSyncDir, name, func() error { return f.inner.SyncDir(name) })
}

// ReadDir implements FS.
func (f *Faulty) ReadDir(name string) ([]fs.DirEntry, error) {
	return get(f, OpReadDir, name, func() ([]fs.DirEntry, error) { return f.inner.ReadDir(name) })
}

// Stat implements FS.
func (f *Faulty) Stat(name string) (fs.FileInfo, error) {
	return get(f, OpStat, name, func() (fs.FileInfo, error) { return f.inner.Stat(name) })
}

// Lock implements FS. The lock itself can always be given back.
func (f *Faulty) Lock(name string, exclusive, wait bool) (io.Closer, error) {
	return get(f, OpLock, name, func() (io.Closer, error) { return f.inner.Lock(name, exclusive, wait) })
}

// Free implements FS. While there is no space it says so.
func (f *Faulty) Free() (uint64, error) {
	f.mu.Lock()
	full := f.begun && f.state == NoSpace
	f.mu.Unlock()
	if full {
		return 0, nil
	}
	return f.inner.Free()
}

type faultyFile struct {
	File
	f *Faulty

	mu      sync.Mutex
	syncErr error
}

func (f *faultyFile) Read(p []byte) (n int, err error) {
	err = f.f.do(OpRead, f.Name(), func() error {
		n, err = f.File.Read(p)
		return err
	})
	return n, err
}

func (f *faultyFile) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.f.do(OpRead, f.Name(), func() error {
		n, err = f.File.ReadAt(p, off)
		return err
	})
	return n, err
}

func (f *faultyFile) Write(p []byte) (int, error) {
	o := f.f.next(OpWrite, f.Name())
	n, err := 0, error(nil)
	switch {
	case o.run:
		n, err = f.File.Write(p)
	case o.half && len(p) > 1:
		n, err = f.File.Write(p[:len(p)/2])
	}
	return n, errors.Join(o.err, err)
}

// Sync that fails here leaves the bytes unsynced below: they are lost in a crash.
func (f *faultyFile) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.syncErr != nil {
		f.f.mu.Lock()
		f.f.retried++
		f.f.mu.Unlock()
		return f.syncErr
	}
	f.syncErr = f.f.do(OpSync, f.Name(), f.File.Sync)
	return f.syncErr
}
