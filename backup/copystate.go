package backup

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"hikae/repo"
)

// copyStateName is the file beside an unfinished copy that says how far it is.
const copyStateName = ".hikae-copy.json"

// copyState is that file. A file of the copy is named in it before its part
// comes to be; the folder is locked while a run is at work.
type copyState struct {
	Generation string                   `json:"generation"`
	Identity   string                   `json:"identity"` // of the generation's content
	Files      map[string]*copyProgress `json:"files"`

	dir  string
	lock *os.File
}

// copyProgress is how far one file is.
type copyProgress struct {
	Size int64 `json:"size"`
	Done int64 `json:"done"` // bytes from the start that are written and synced
}

// identity says which content a generation has: two with one name in different
// repositories are not the same.
func identity(m *repo.Manifest) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d\n%s\n", m.VM, m.Sequence, m.Time)
	for _, d := range m.Disks {
		fmt.Fprintf(h, "%s %d %x\n", d.Name, d.Capacity, d.Root)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// openCopyState begins a copy in dir or goes on with one.
func openCopyState(dir, generation, id string) (*copyState, error) {
	s := &copyState{Generation: generation, Identity: id, Files: map[string]*copyProgress{}, dir: dir}
	// The folder itself is locked: it is there before and after every file.
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := lock(d); errors.Is(err, unix.EWOULDBLOCK) {
		d.Close()
		return nil, fmt.Errorf("another copy writes to %s; wait for it to end: %w", dir, ErrRunning)
	} // file systems without locks: two copies at once are the operator's to avoid
	s.lock = d
	text, err := os.ReadFile(filepath.Join(dir, copyStateName))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	var was copyState
	if err == nil {
		err = json.Unmarshal(text, &was)
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("%s in %s cannot be read; remove it and the .part files to start again: %w", copyStateName, dir, err)
	}
	if was.Identity != id {
		s.close()
		return nil, fmt.Errorf("%s holds an unfinished copy of %s; finish that one, or remove it (the .part files and %s): %w",
			dir, was.Generation, copyStateName, ErrRefused)
	}
	for name, p := range was.Files {
		if p != nil {
			s.Files[name] = p
		}
	}
	return s, nil
}

// save writes the state, whole or not at all.
func (s *copyState) save() error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	name := filepath.Join(s.dir, copyStateName)
	tmp := name + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil {
		err = f.Sync()
	}
	f.Close()
	if err == nil {
		err = os.Rename(tmp, name)
	}
	if err == nil {
		err = syncDir(s.dir)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

// finish takes the state away: the copy is whole.
func (s *copyState) finish() error {
	err := os.Remove(filepath.Join(s.dir, copyStateName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(s.dir)
}

func (s *copyState) close() { s.lock.Close() }
