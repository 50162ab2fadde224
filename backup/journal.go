package backup

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The journal is a folder with one small file per run that has, or is about to
// have, a snapshot on a host: <state>/journal/<host>-<run id>.json. The file is
// on disk before the snapshot is asked for and goes when the snapshot is gone.
// The run keeps it locked (flock); the kernel drops the lock when the process
// dies, however it dies, so an unlocked entry is one to clean up after. The name
// alone says host and snapshot: what stands inside is for people. Restores have
// entries of their own kind in the same folder (see restoreEntry).

// snapshotPrefix and a run's id make the name of its snapshot.
const snapshotPrefix = "hikae-"

// entry is what a journal file says.
type entry struct {
	Run      string    `json:"run"`
	Host     string    `json:"host"`
	VM       string    `json:"vm"`
	VMID     string    `json:"vm_id"`
	Snapshot string    `json:"snapshot"`
	Created  time.Time `json:"created"`
	PID      int       `json:"pid"`

	path string
	file *os.File // holds the lock
}

var entryName = regexp.MustCompile(`^(.+)-([0-9a-f]{16})\.json(\.tmp)?$`)

func journalDir(state string) string { return filepath.Join(state, "journal") }

// journalPath escapes the host's name, which the operator chose freely.
func journalPath(state, host, run string) string {
	return filepath.Join(journalDir(state), url.PathEscape(host)+"-"+run+".json")
}

// writeEntry puts a run into the journal, to stay there through a crash.
func writeEntry(state string, e entry) (*entry, error) {
	e.path = journalPath(state, e.Host, e.Run)
	var err error
	if e.file, err = putEntry(state, e.path, e); err != nil {
		return nil, fmt.Errorf("the journal in %s cannot be written, so no snapshot is made: %w", state, err)
	}
	return &e, nil
}

// putEntry writes an entry's file, which stays locked as long as it is open.
func putEntry(state, path string, e any) (f *os.File, err error) {
	if err := os.MkdirAll(journalDir(state), 0o700); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return nil, err
	}
	// Under another name until it is locked and whole, so that no cleaner takes
	// it for a dead one in between.
	tmp := path + ".tmp"
	if f, err = os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, err
	}
	err = lock(f)
	if err == nil {
		_, err = f.Write(append(text, '\n'))
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = syncDir(journalDir(state))
	}
	if err != nil {
		os.Remove(tmp)
		os.Remove(path)
		f.Close()
		return nil, err
	}
	return f, nil
}

// done takes the entry out of the journal: nothing is left to clean up.
func (e *entry) done() error {
	if e.file == nil { // nobody wanted a journal
		return nil
	}
	err := os.Remove(e.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	e.file.Close()
	return err
}

// leave keeps the entry for the next run to find.
func (e *entry) leave() {
	if e.file != nil {
		e.file.Close()
	}
}

// deadEntries returns this host's entries whose runs are no more, locked, so
// that no other process cleans up after them at the same time.
func deadEntries(state, host string) ([]*entry, error) {
	dir := journalDir(state)
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the journal cannot be read: %w", err)
	}
	var dead []*entry
	for _, n := range names {
		m := entryName.FindStringSubmatch(n.Name())
		if m == nil || m[1] != url.PathEscape(host) {
			continue
		}
		e, err := claim(filepath.Join(dir, n.Name()))
		if err != nil {
			return dead, err
		}
		switch {
		case e == nil: // its run is alive, or it is gone
		case m[3] != "": // never came to be: no snapshot was asked for
			_ = e.done()
		default:
			e.Host, e.Run, e.Snapshot = host, m[2], snapshotPrefix+m[2]
			dead = append(dead, e)
		}
	}
	return dead, nil
}

// claim locks an entry whose run is dead; nil when it is alive or gone.
func claim(path string) (*entry, error) {
	f, text, err := claimFile(path)
	if f == nil {
		return nil, err
	}
	e := &entry{}
	// What a power cut left of the text does not matter: the name says enough.
	if json.Unmarshal(text, e) != nil {
		e = &entry{}
	}
	e.path, e.file = path, f
	return e, nil
}

// claimFile is claim for an entry of any kind.
func claimFile(path string) (f *os.File, text []byte, err error) {
	f, err = os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("the journal cannot be read: %w", err)
	}
	if err := lock(f); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil, nil
		}
		return nil, nil, fmt.Errorf("the journal entry %s cannot be locked: %w", path, err)
	}
	// Its run, or another cleaner, may have taken it away before the lock.
	opened, err := f.Stat()
	named, nerr := os.Stat(path)
	if err != nil || nerr != nil || !os.SameFile(opened, named) {
		f.Close()
		return nil, nil, nil
	}
	text = make([]byte, min(opened.Size(), 64<<10))
	n, _ := f.ReadAt(text, 0)
	return f, text[:n], nil
}

// lockVM makes sure that only one process of this machine has a VM in hand: a
// second run's snapshot would be merged into links that the first one reads.
func lockVM(state, host, vm string) (unlock func(), err error) {
	if err := os.MkdirAll(journalDir(state), 0o700); err != nil {
		return nil, fmt.Errorf("the state directory cannot be made: %w", err)
	}
	sum := sha256.Sum256([]byte(host + "\x00" + vm))
	f, err := os.OpenFile(filepath.Join(journalDir(state), "vm-"+hex.EncodeToString(sum[:8])+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the lock of %s/%s cannot be opened: %w", host, vm, err)
	}
	if err := lock(f); err != nil {
		var who [32]byte
		n, _ := f.ReadAt(who[:], 0)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s/%s is being worked on by another hikae (process %s); wait for it to end: %w",
				host, vm, strings.TrimSpace(string(who[:n])), ErrRunning)
		}
		return nil, fmt.Errorf("the lock of %s/%s cannot be taken: %w", host, vm, err)
	}
	// The number only helps people; the lock is the kernel's.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return func() { f.Close() }, nil
}

// lock takes the whole file for this open file description, without waiting.
func lock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EINTR { // bare, from the system call
			return err
		}
	}
}

// syncDir makes names in a directory last; file systems that cannot are taken
// at their word.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return nil
}
