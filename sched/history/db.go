package history

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// Sentinel errors, for errors.Is.
var (
	// ErrInUse says that another process has the history.
	ErrInUse = errors.New("in use by another process")
	// ErrDamaged says that the file is not a history, or not a whole one.
	ErrDamaged = errors.New("history damaged")
	// ErrVersion says that a newer program wrote the history.
	ErrVersion = errors.New("history is newer than this program")
	// ErrNotFound says that there is no such run.
	ErrNotFound = errors.New("not found")
)

// Defaults of Options.
const (
	DefaultKeep    = 10000
	DefaultKeepFor = 2 * 365 * 24 * time.Hour
)

// schema is the version of the file that this package writes. A change that an
// older program would misread raises it, and migrations gets a step.
const schema = 1

// migrations[v] brings a file of version v to v+1.
var migrations = map[uint32]func(*bbolt.Tx) error{}

// Options of Open. The zero value is good.
type Options struct {
	Keep    int           // runs; 0 is DefaultKeep
	KeepFor time.Duration // 0 is DefaultKeepFor
	// NoSync leaves it to the system when changes reach the disk. A power cut may
	// then damage the file: for tests.
	NoSync bool
	// SetAside gives a damaged file another name and begins a new one, which
	// DB.Replaced tells. Without it a damaged file is ErrDamaged.
	SetAside bool
	// Committed, if not nil, is called after every transaction that changed
	// something, before Update returns.
	Committed func()
}

// DB is an open history. It may be used by many goroutines.
type DB struct {
	db       *bbolt.DB
	file     *os.File // of db
	path     string
	o        Options
	replaced string
	broken   atomic.Pointer[error] // why nothing more is tried
}

// Names of buckets.
var (
	metaBucket  = []byte("meta")
	runsBucket  = []byte("runs")  // run → Run
	tasksBucket = []byte("tasks") // run, task → Task
	openBucket  = []byte("open")  // run → nothing: queued, running, or interrupted and not seen to
	byJobBucket = []byte("by_job")
	byVMBucket  = []byte("by_vm")
	jobsBucket  = []byte("jobs")
	vmsBucket   = []byte("vms")
	notesBucket = []byte("notes")

	versionKey = []byte("version")
	allBuckets = [][]byte{metaBucket, runsBucket, tasksBucket, openBucket, byJobBucket, byVMBucket, jobsBucket, vmsBucket, notesBucket}
)

// lockWait is how long Open waits for a process that is just ending.
const lockWait = 300 * time.Millisecond

// Open opens the history at path, or makes one. A file that another process
// has open is ErrInUse.
func Open(path string, o Options) (*DB, error) {
	if o.Keep <= 0 {
		o.Keep = DefaultKeep
	}
	if o.KeepFor <= 0 {
		o.KeepFor = DefaultKeepFor
	}
	suspect := false
	if o.SetAside {
		_, err := os.Lstat(path + suspectSuffix)
		suspect = err == nil
	}
	d, err := open(path, o)
	switch {
	case err == nil && suspect:
		if err := d.Close(); err != nil {
			return nil, err
		}
	case err == nil || !o.SetAside || !errors.Is(err, ErrDamaged):
		return d, err
	}
	aside, rerr := setAside(path)
	if rerr != nil {
		return nil, errors.Join(err, rerr)
	}
	d, err = open(path, o)
	if err != nil {
		return nil, err
	}
	d.replaced = aside
	return d, nil
}

func open(path string, o Options) (_ *DB, err error) {
	info, statErr := os.Stat(path)
	var refused *fs.PathError
	d := &DB{path: path, o: o}
	err = d.guard(func() error {
		d.db, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout: lockWait, FreelistType: bbolt.FreelistMapType, NoSync: o.NoSync, NoGrowSync: o.NoSync,
			OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
				d.file, err = os.OpenFile(name, flag, perm)
				return d.file, err
			},
		})
		return err
	})
	if err != nil && d.file != nil {
		_ = d.abandon() // the first error tells
	}
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("the history %s is in use: another hikae daemon runs with this state directory; stop it first: %w", path, ErrInUse)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch), errors.Is(err, berrors.ErrInvalidMapping):
		return nil, d.damaged(err)
	case err != nil && statErr == nil && info.Size() < int64(4*os.Getpagesize()) && !errors.As(err, &refused):
		return nil, d.damaged(err) // not even a new one is so short
	case err != nil:
		return nil, fmt.Errorf("open the history %s: %w", path, err)
	}
	if err := errors.Join(d.prepare(), d.look()); err != nil {
		_ = d.Close() // the first error tells
		return nil, err
	}
	if errors.Is(statErr, fs.ErrNotExist) && !o.NoSync {
		if err := syncDir(filepath.Dir(path)); err != nil {
			_ = d.Close() // the first error tells
			return nil, fmt.Errorf("open the history %s: %w", path, err)
		}
	}
	return d, nil
}

// prepare makes the buckets of a new file and brings an old one up to date.
func (d *DB) prepare() error {
	return d.guard(func() error {
		return d.db.Update(func(tx *bbolt.Tx) error {
			for _, name := range allBuckets {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			meta := tx.Bucket(metaBucket)
			text := meta.Get(versionKey)
			if text == nil {
				return meta.Put(versionKey, binary.BigEndian.AppendUint32(nil, schema))
			}
			if len(text) != 4 {
				return d.damaged(errors.New("its version is not one"))
			}
			version := binary.BigEndian.Uint32(text)
			if version > schema {
				return fmt.Errorf("the history %s has version %d and this hikae reads %d; upgrade it: %w", d.path, version, schema, ErrVersion)
			}
			if version == schema {
				return nil
			}
			for ; version < schema; version++ {
				step := migrations[version]
				if step == nil {
					return d.damaged(fmt.Errorf("there is no version %d", version))
				}
				if err := step(tx); err != nil {
					return err
				}
			}
			return meta.Put(versionKey, binary.BigEndian.AppendUint32(nil, schema))
		})
	})
}

// look reads all that a start needs, so that damage there shows at once.
func (d *DB) look() error {
	if _, err := d.Open(); err != nil {
		return err
	}
	if _, err := d.Jobs(); err != nil {
		return err
	}
	if _, err := d.VMs(); err != nil {
		return err
	}
	_, err := d.LastID()
	return err
}

// Close gives the file back.
func (d *DB) Close() error {
	if d.broken.Load() != nil {
		return d.abandon() // bbolt may wait for a lock that a panic left taken
	}
	return d.db.Close()
}

// abandon closes the file behind bbolt's back. Its lock lasts as long as its
// pages are mapped, unless it is undone.
func (d *DB) abandon() error {
	if err := unix.Flock(int(d.file.Fd()), unix.LOCK_UN); err != nil {
		if errors.Is(err, unix.EBADF) {
			return nil // bbolt has closed it
		}
		return err
	}
	return d.file.Close()
}

// Path is the file's name.
func (d *DB) Path() string { return d.path }

// Replaced is the name that a damaged file was given by Open; empty when there
// was none.
func (d *DB) Replaced() string { return d.replaced }

func (d *DB) damaged(err error) error {
	return fmt.Errorf("the history %s is damaged (%w); repositories do not depend on it: move it away and start again: %w", d.path, err, ErrDamaged)
}

// guard turns what bbolt does with damaged pages, which it trusts, into an
// error: it panics, or touches memory behind the end of a file that was cut.
// After that nothing more is tried, for locks may be left taken, and the next
// Open with SetAside begins anew.
func (d *DB) guard(do func() error) (err error) {
	if why := d.broken.Load(); why != nil {
		return *why
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = d.damaged(fmt.Errorf("%v", p))
			d.broken.Store(&err)
			// Without the mark the next start tries this file again, no more.
			_ = os.WriteFile(d.path+suspectSuffix, nil, 0o600)
		}
	}()
	return do()
}

// suspectSuffix makes the name of a file that says that damage was found where
// opening does not look.
const suspectSuffix = ".damaged"

func setAside(path string) (string, error) {
	for n := 1; ; n++ {
		aside := fmt.Sprintf("%s.damaged-%d", path, n)
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			if err := os.Rename(path, aside); err != nil {
				return "", fmt.Errorf("put the damaged history aside: %w", err)
			}
			os.Remove(path + suspectSuffix)
			return aside, nil
		} else if err != nil {
			return "", fmt.Errorf("put the damaged history aside: %w", err)
		}
	}
}

// syncDir makes names in a directory last; file systems that cannot are taken
// at their word.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return nil
}

func runKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func taskKey(run uint64, n int) []byte {
	return binary.BigEndian.AppendUint32(runKey(run), uint32(n))
}

// prefix is the beginning of the keys of an index under a name.
func prefix(name string) []byte { return append([]byte(name), 0) }

func vmName(host, vm string) string { return host + "/" + vm }

func (d *DB) decode(text []byte, what string, into any) error {
	if err := json.Unmarshal(text, into); err != nil {
		return d.damaged(fmt.Errorf("%s: %w", what, err))
	}
	return nil
}
