package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"hikae/repo"
)

// readOnce reads a disk through the mount. One that nobody forgets meanwhile reads as
// it was written; any other one does so as well, or not at all.
func (w *processes) readOnce(rng *rand.Rand) {
	w.mu.Lock()
	if len(w.order) == 0 {
		w.mu.Unlock()
		return
	}
	name := w.order[rng.IntN(min(len(w.order), 4))] // old ones: they may be forgotten at any moment
	want := w.committed[name]
	w.mu.Unlock()
	vm, generation, _ := strings.Cut(name, "@")
	found, err := filepath.Glob(filepath.Join(w.path("mnt"), vm, generation, "*-flat.vmdk"))
	var got [32]byte
	switch {
	case err == nil && len(found) == 1:
		got, err = sumFile(found[0])
	case err == nil:
		err = fs.ErrNotExist
	}
	w.mu.Lock()
	_, still := w.committed[name]
	w.mu.Unlock()
	switch {
	case err == nil && got != want:
		w.t.Errorf("%s reads otherwise than it was written", name)
	case err == nil:
		w.did("read")
	case still && errors.Is(err, fs.ErrNotExist):
		w.did("not shown yet") // names are believed for a second
	case still:
		w.t.Errorf("%s cannot be read: %v", name, err)
	default:
		w.did("not read, for it was forgotten")
	}
}

func sumFile(name string) (sum [32]byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	return [32]byte(h.Sum(nil)), nil
}

// verify proves that everything is as it was reported, and that nothing is left.
func (w *processes) verify() {
	t := w.t
	t.Helper()
	must := func(args ...string) string {
		t.Helper()
		o := w.run(0, args...)
		if !o.ok() {
			t.Fatalf("%v: exit code %d: %s%s", args, o.code, o.stdout, o.stderr)
		}
		return o.stdout
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for !w.finally(w.backupOnce, rng) || !w.finally(w.importOnce, rng) { // takes over what the killed ones left
		if t.Failed() {
			return
		}
	}
	must("check", "--read-data")
	for range 3 {
		must("prune", "--grace", "0s")
	}
	var report repo.PruneReport
	if err := json.Unmarshal([]byte(must("prune", "--grace", "0s", "--json")), &report); err != nil {
		t.Fatal(err)
	}
	if report.PacksCondemned+report.PacksDeleted+report.PacksKeptForSessions+report.PacksKeptForGrace > 0 {
		t.Errorf("prune does not come to an end: %+v", report)
	}
	must("check", "--read-data")
	for _, dir := range []string{"sessions", "tmp"} {
		list, err := os.ReadDir(filepath.Join(w.path("repository"), dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			if e.Name() != "init" && e.Name() != "upkeep" { // locks
				t.Errorf("%s/%s was left behind", dir, e.Name())
			}
		}
	}
	there := map[string]bool{}
	for line := range strings.Lines(must("generations", "--json")) {
		var g struct{ Host, VM, Generation string }
		if err := json.Unmarshal([]byte(line), &g); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		name := g.Host + "/" + g.VM + "@" + g.Generation
		there[name] = true
		dest := w.path("copy")
		must("copy", name, dest)
		found, err := filepath.Glob(filepath.Join(dest, "*-flat.vmdk"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %v, %v", name, found, err)
		}
		got, err := sumFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		if want, ok := w.committed[name]; ok && got != want {
			t.Errorf("%s is not what was backed up", name)
		} else if !slices.Contains(w.tried[g.Host+"/"+g.VM], got) {
			t.Errorf("%s is nothing that was ever backed up", name)
		}
		if err := os.RemoveAll(dest); err != nil {
			t.Fatal(err)
		}
	}
	for name := range w.committed {
		if !there[name] {
			t.Errorf("%s was committed and is gone", name)
		}
	}
	t.Logf("%d generations are there, %d were reported and not forgotten", len(there), len(w.committed))
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), " "+w.path("mnt")+" ") {
		t.Error("the mount was left behind")
	}
}

// finally does something until it is not killed.
func (w *processes) finally(do func(*rand.Rand) bool, rng *rand.Rand) bool {
	for range 50 {
		if do(rng) || w.t.Failed() {
			return true
		}
	}
	w.t.Error("it never comes to its end")
	return false
}
