package backup

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestJournal(t *testing.T) {
	state := t.TempDir()
	const host = "rack/1 esx: 01-0123456789abcdef"
	if dead, err := deadEntries(state, host); err != nil || dead != nil {
		t.Fatalf("an empty journal: %v %v", dead, err)
	}
	write := func(host, run string) *entry {
		e, err := writeEntry(state, entry{Run: run, Host: host, VM: "web01", VMID: "7", Snapshot: snapshotPrefix + run, Created: time.Unix(1e9, 0)})
		must(t, err)
		return e
	}
	alive := write(host, "aaaaaaaaaaaaaaaa")
	killed := write(host, "bbbbbbbbbbbbbbbb")
	other := write("esx2", "cccccccccccccccc")
	torn := write(host, "dddddddddddddddd")
	done := write(host, "eeeeeeeeeeeeeeee")
	must(t, os.Truncate(torn.path, 7))
	killed.leave() // as when the process dies: the lock goes, the file stays
	torn.leave()
	other.leave()
	must(t, done.done())
	unborn := journalPath(state, host, "ffffffffffffffff") + ".tmp"
	must(t, os.WriteFile(unborn, nil, 0o600))
	must(t, os.WriteFile(filepath.Join(journalDir(state), "notes.json"), nil, 0o600))

	dead, err := deadEntries(state, host)
	must(t, err)
	if len(dead) != 2 {
		t.Fatalf("%d dead entries: %+v", len(dead), dead)
	}
	if d := dead[0]; d.Snapshot != "hikae-bbbbbbbbbbbbbbbb" || d.VM != "web01" || d.VMID != "7" || d.Created.Unix() != 1e9 {
		t.Errorf("%+v", d)
	}
	if d := dead[1]; d.Snapshot != "hikae-dddddddddddddddd" || d.VM != "" {
		t.Errorf("torn: %+v", d)
	}
	// Another cleaner at the same time finds nothing.
	if again, err := deadEntries(state, host); err != nil || len(again) != 0 {
		t.Errorf("claimed twice: %v %v", again, err)
	}
	for _, d := range dead {
		must(t, d.done())
	}
	if _, err := os.Stat(unborn); !os.IsNotExist(err) {
		t.Errorf("an entry that never came to be is still there: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(journalDir(state), "*.json")); len(left) != 3 {
		t.Errorf("left: %v", left) // alive, other, notes
	}
	must(t, alive.done())
	if info, err := os.Stat(journalDir(state)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the journal's folder is %v", info.Mode())
	}
}

func TestJournalThatCannotBeWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if _, err := writeEntry(file, entry{Run: newRunID(), Host: "h"}); err == nil || !strings.Contains(err.Error(), "no snapshot is made") {
		t.Errorf("%v", err)
	}
	if _, err := lockVM(file, "h", "v"); err == nil || errors.Is(err, ErrRunning) {
		t.Errorf("%v", err)
	}
}
