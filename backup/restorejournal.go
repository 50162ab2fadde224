package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"hikae/backup/esxi"
)

// A restore's folder is its own as long as two witnesses say so: an entry in the
// journal of this machine (<state>/journal/<host>-<run id>.restore, locked as
// those of snapshots are), and a mark in the folder itself: an empty folder whose
// name has the same run id, because making one happens as a whole or not at all.
// The entry is on disk before the folder is made, the mark is the first thing in
// it. Taking the mark away is what ends a restore: from then on nothing of it is
// ever undone. So a folder with the mark is removed with all in it, an empty one
// is removed because that is how it was made, and any other is no longer, or
// never was, the restore's, whatever it is called.

// restoreEntry is what a restore's journal file says.
type restoreEntry struct {
	Run        string    `json:"run"`
	Host       string    `json:"host"`
	VM         string    `json:"vm"`
	Generation string    `json:"generation"`
	Folder     string    `json:"folder"` // "[datastore1] web01"
	Config     string    `json:"config"` // name of the .vmx in it
	Files      []string  `json:"files"`  // names of the large files in it
	Created    time.Time `json:"created"`
	PID        int       `json:"pid"`

	path string
	file *os.File // holds the lock; nil without a journal
}

var restoreName = regexp.MustCompile(`^(.+)-([0-9a-f]{16})\.restore(\.tmp)?$`)

func (e *restoreEntry) mark() string   { return e.Folder + "/hikae-restore-unfinished-" + e.Run }
func (e *restoreEntry) config() string { return e.Folder + "/" + e.Config }

// write puts the entry into the journal; without a state directory it is kept
// in memory only.
func (e *restoreEntry) write(state string) error {
	if state == "" {
		return nil
	}
	e.path = filepath.Join(journalDir(state), url.PathEscape(e.Host)+"-"+e.Run+".restore")
	f, err := putEntry(state, e.path, e)
	if err != nil {
		return fmt.Errorf("the journal in %s cannot be written, so nothing is restored: %w", state, err)
	}
	e.file = f
	return nil
}

// done takes the entry out of the journal.
func (e *restoreEntry) done() error {
	if e.file == nil {
		return nil
	}
	defer e.leave()
	if err := os.Remove(e.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// leave keeps the entry for the next run to find.
func (e *restoreEntry) leave() {
	if e.file != nil {
		e.file.Close()
		e.file = nil
	}
}

// deadRestores returns this host's entries whose processes are no more, locked.
func deadRestores(state, host string) (dead []*restoreEntry, err error) {
	names, err := os.ReadDir(journalDir(state))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the journal cannot be read: %w", err)
	}
	var failed []error
	for _, n := range names {
		m := restoreName.FindStringSubmatch(n.Name())
		if m == nil || m[1] != url.PathEscape(host) {
			continue
		}
		f, text, err := claimFile(filepath.Join(journalDir(state), n.Name()))
		if f == nil {
			failed = append(failed, err)
			continue
		}
		e := &restoreEntry{path: f.Name(), file: f}
		switch err := json.Unmarshal(text, e); {
		case m[3] != "": // never came to be: nothing was made
			failed = append(failed, e.done())
		case err != nil || e.Run != m[2] || e.Folder == "" || e.Config == "":
			// It is whole before anything is made, so this is damage from outside.
			e.leave()
			failed = append(failed, fmt.Errorf("the journal entry %s of a restore cannot be read; look for a folder hikae-restore-unfinished-%s on the host's datastores, "+
				"remove the folder it is in by hand, then the entry", e.path, m[2]))
		default:
			e.Host = host
			dead = append(dead, e)
		}
	}
	return dead, errors.Join(failed...)
}

// CleanedRestore is a restore that was cut off and whose traces were removed.
type CleanedRestore struct {
	VM         string    `json:"vm"`
	Generation string    `json:"generation"`
	Folder     string    `json:"folder"`
	Created    time.Time `json:"created"`
}

// CleanupRestores removes what restores of this machine that were killed left on
// a host: the folder each had made, and its VM, if it was registered already. A
// restore that finished, one that is at work, and folders that have become
// somebody else's are left alone. What could not be removed stays in the
// journal, and the error says so. Cleanup does this too.
func CleanupRestores(ctx context.Context, host *esxi.Host, hostName, state string, log *slog.Logger) ([]CleanedRestore, error) {
	log = orDiscard(log)
	dead, err := deadRestores(state, hostName)
	var cleaned []CleanedRestore
	failed := []error{err}
	for _, e := range dead {
		removed, err := e.remove(ctx, host)
		if errors.Is(err, errTaken) {
			log.Warn("what a restore that was cut off had begun is left as it is", "host", hostName, "folder", e.Folder, "reason", err)
			err = nil
		}
		if removed {
			log.Warn("removed what a restore that was cut off had made", "host", hostName, "vm", e.VM, "folder", e.Folder)
			cleaned = append(cleaned, CleanedRestore{VM: e.VM, Generation: e.Generation, Folder: e.Folder, Created: e.Created})
		}
		if err == nil {
			err = e.done()
		}
		if err != nil {
			e.leave()
			failed = append(failed, fmt.Errorf("the folder %q that an earlier restore of %s left behind could not be removed: %w", e.Folder, e.VM, err))
		}
	}
	return cleaned, errors.Join(failed...)
}

// errTaken: what a restore left behind is not to be removed any more.
var errTaken = errors.New("not the restore's any more")

// remove takes away what the restore made; removed tells whether there was
// something. errTaken when it must stay.
func (e *restoreEntry) remove(ctx context.Context, host *esxi.Host) (removed bool, err error) {
	there, err := host.Exists(ctx, e.Folder)
	if err != nil || !there {
		return false, err
	}
	marked, err := host.Exists(ctx, e.mark())
	if err != nil {
		return false, err
	}
	if !marked {
		// Nothing is put into the folder before the mark, so it is empty or not
		// ours.
		err := host.DeleteEmpty(ctx, e.Folder)
		if errors.Is(err, esxi.ErrNotEmpty) {
			err = fmt.Errorf("%s has something in it and not this restore's mark: %w", e.Folder, errTaken)
		}
		return err == nil, err
	}
	if err := e.unregister(ctx, host); err != nil {
		return false, err
	}
	// The large files first and the folder with the mark last, so that this can
	// be cut off as well.
	for _, name := range append([]string{e.Config}, e.Files...) {
		if err := host.Delete(ctx, e.Folder+"/"+name); err != nil {
			return false, err
		}
	}
	if err := host.Delete(ctx, e.Folder); err != nil {
		return false, err
	}
	return true, nil
}

// unregister makes the host forget the restore's VM. One that somebody has
// started has become theirs, and so has a folder with other VMs in it.
func (e *restoreEntry) unregister(ctx context.Context, host *esxi.Host) error {
	vms, err := host.VMs(ctx)
	if err != nil {
		return err
	}
	in := func(vm esxi.VM) bool { return strings.HasPrefix(vm.ConfigPath, e.Folder+"/") }
	for _, vm := range vms {
		switch {
		case !in(vm):
		case vm.ConfigPath != e.config():
			return fmt.Errorf("%s has a VM called %s in it, which is not the restore's: %w", e.Folder, vm.Name, errTaken)
		case vm.Power != "" && vm.Power != "poweredOff" && vm.Invalid == "":
			return fmt.Errorf("the VM %s was started meanwhile (it stays; %q in its folder can be deleted): %w",
				vm.Name, e.mark(), errTaken)
		}
	}
	if i := slices.IndexFunc(vms, in); i >= 0 {
		return host.UnregisterVM(ctx, &vms[i])
	}
	return nil
}
