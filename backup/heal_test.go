package backup

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hikae/backup/esxisim"
	"hikae/repo"
)

// packsIn lists the packs in a directory of the repository, packs or meta, by age.
func (w *world) packsIn(dir string) []string {
	w.t.Helper()
	var all []string
	age := map[string]int64{}
	must(w.t, filepath.WalkDir(filepath.Join(w.dir, dir), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		age[path] = info.ModTime().UnixNano()
		all = append(all, path)
		return err
	}))
	slices.SortFunc(all, func(a, b string) int { return int(age[a] - age[b]) })
	return all
}

// rot flips bytes of a file all over, but for its head.
func rot(t *testing.T, path string, every int) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	for i := 64; i < len(b); i += every {
		b[i] ^= 4
	}
	must(t, os.Chmod(path, 0o600))
	must(t, os.WriteFile(path, b, 0o600))
}

func (w *world) repair() *repo.RepairReport {
	w.t.Helper()
	w.open() // files that are open are those of before
	report, err := w.repo.RepairPacks(w.t.Context(), repo.RepairOptions{})
	must(w.t, err)
	return report
}

// whole reads a generation to its end.
func (w *world) whole(res Result, raw string) {
	w.t.Helper()
	d, err := w.generation(res.Ref).OpenDisk(0)
	must(w.t, err)
	f, err := os.Open(raw)
	must(w.t, err)
	defer f.Close()
	equal(w.t, res.Ref.String(), repoDisk{d}, fileDisk{f})
}

// What rotted in the repository and is still on the host comes back with the next
// incremental backup, also to the generations before, and costs no more than it is.
func TestHealing(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(w *world)
		least int64 // of bytes healed
		most  int64
		old   bool // the old generation is whole again too
	}{
		{"some blocks", func(w *world) { rot(w.t, w.packsIn("packs")[0], mib) }, mib / 2, 3 * mib, true},
		{"a pack of blocks", func(w *world) { must(w.t, os.Remove(w.packsIn("packs")[0])) }, 5 * mib, 5 * mib, true},
		{"a leaf", func(w *world) { rotAt(w.t, w.packsIn("meta")[0], 70) }, 32 * mib, 32 * mib, true},
		{"both", func(w *world) {
			must(w.t, os.Remove(w.packsIn("packs")[0]))
			rotAt(w.t, w.packsIn("meta")[0], 70)
		}, 32 * mib, 36 * mib, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, esxisim.Options{})
			raw := image(t, 96*mib, 1, area0(0, mib), area0(20*mib, 2*mib), area0(40*mib, mib), area0(80*mib, mib))
			w.addVM("web01", tracked, raw)
			first := w.backup()
			w.write(0, 41*mib, 4096, 5)
			second := w.backup()
			c.spoil(w)
			report := w.repair()
			if !report.Left() {
				t.Fatalf("nothing is lost: %+v", report)
			}
			w.write(0, 42*mib, 4096, 6)
			res := w.backup()
			if res.Mode != repo.ModeIncremental || res.BytesHealed < c.least || res.BytesHealed > c.most || !strings.Contains(res.Reason, "lost in damaged packs") {
				t.Errorf("%+v", res)
			}
			if res.BytesRead > 8*mib || res.BytesChanged > mib {
				t.Errorf("%d bytes read, %d changed: holes are not read", res.BytesRead, res.BytesChanged)
			}
			w.sameAsGuest(res.Ref)
			if c.old {
				w.whole(first, raw)
				w.checkRepo()
			}
			_ = second
			// The mark goes with the next repair; then nobody looks any more.
			if report := w.repair(); c.old && (report.Left() || len(report.Cleared) == 0) {
				t.Errorf("%+v", report)
			}
			w.write(0, 43*mib, 4096, 7)
			if res := w.backup(); res.Mode != repo.ModeIncremental || res.BytesHealed != 0 || res.BytesRead > mib {
				t.Errorf("%+v", res)
			}
			w.noSnapshots()
		})
	}
}

// rotAt flips one byte of a file.
func rotAt(t *testing.T, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	b[at] ^= 4
	must(t, os.Chmod(path, 0o600))
	must(t, os.WriteFile(path, b, 0o600))
}

// Every other way of reading heals as well: without change tracking, when everything
// is asked for, and when the disk has grown.
func TestHealingInEveryMode(t *testing.T) {
	for name, c := range map[string]struct {
		vm     esxisim.VMOptions
		change func(*Options)
		mode   string
		told   bool
	}{
		"scan": {vm: esxisim.VMOptions{}, mode: repo.ModeScan, told: true},
		"full": {vm: tracked, change: func(o *Options) { o.Full = true }, mode: repo.ModeFull},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, esxisim.Options{})
			raw := image(t, 24*mib, 1, area0(0, mib), area0(20*mib, 2*mib))
			w.addVM("web01", c.vm, raw)
			first := w.backup()
			must(t, os.Remove(w.packsIn("packs")[0]))
			if report := w.repair(); !report.Left() {
				t.Fatalf("%+v", report)
			}
			var changes []func(*Options)
			if c.change != nil {
				changes = append(changes, c.change)
			}
			res := w.backup(changes...)
			if res.Mode != c.mode || (res.BytesHealed == 3*mib) != c.told {
				t.Errorf("%+v", res)
			}
			w.sameAsGuest(res.Ref)
			w.whole(first, raw)
			w.checkRepo()
		})
	}
}

// A previous generation with a rotten node of which nobody knows yet: the run goes
// around it, rather than read everything.
func TestAroundDamage(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 96*mib, 1, area0(0, mib), area0(40*mib, mib), area0(80*mib, mib)))
	w.backup()
	rotAt(t, w.packsIn("meta")[0], 70)
	w.open()
	w.write(0, 4*mib, 4096, 5)
	w.write(0, 41*mib, 4096, 6)
	w.write(0, 81*mib, 4096, 6)
	res := w.backup()
	if res.Mode != repo.ModeIncremental || res.BytesHealed != 32*mib {
		t.Errorf("%+v", res)
	}
	w.sameAsGuest(res.Ref)
	if len(w.repair().Packs) != 1 {
		t.Error("the repair does not find the rot")
	}
	w.sameAsGuest(res.Ref)
}

func TestImportHeals(t *testing.T) {
	for _, listed := range []bool{false, true} {
		w := newRepo(t)
		raw := image(t, 40*mib, 1, area0(0, mib), area0(20*mib, mib), area0(36*mib, mib))
		first := w.importDisks(nil, raw)
		must(t, os.Remove(w.packsIn("packs")[0]))
		if report := w.repair(); !report.Left() {
			t.Fatalf("%+v", report)
		}
		later, list := changeImage(t, raw, 9, area0(21*mib, mib))
		res := w.importDisks(func(o *ImportOptions) {
			if listed {
				o.Changed = []string{list}
			}
		}, later)
		if res.BytesHealed != 3*mib || !strings.Contains(res.Reason, "lost in damaged packs") || listed && res.BytesRead > 6*mib {
			t.Errorf("listed %v: %+v", listed, res)
		}
		w.sameAsFile(res.Ref, 0, later)
		w.sameAsFile(first.Ref, 0, raw)
		w.checkRepo()
	}
}
