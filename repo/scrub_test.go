package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

func sumOf(b []byte) [32]byte { return sha256.Sum256(b) }

func idOf(t fatalist, fsys fsx.FS) [16]byte {
	t.Helper()
	c, err := readConfig(fsys, "mem")
	if err != nil {
		t.Fatal(err)
	}
	return c.id
}

func mustScrub(t fatalist, fsys fsx.FS, o ScrubOptions) *ScrubReport {
	t.Helper()
	if o.Clock == nil {
		o.Clock = testClock
	}
	report, err := scrubFS(context.Background(), fsys, idOf(t, fsys), o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// proofs are the paths of files that scrubs verify.
func proofs(t fatalist, fsys fsx.FS) (list []string) {
	t.Helper()
	err := walkStored(context.Background(), fsys, func(f storedFile) error {
		list = append(list, f.path)
		return nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestScrub(t *testing.T) {
	z := newZoo(t)
	mem := z.plant(t, "", nil)
	all := int64(len(proofs(t, mem)))
	report := mustScrub(t, mem, ScrubOptions{})
	if report.Files != all || report.FilesVerified != all || report.FilesNever != 0 || report.Packs != 4 || report.PacksVerified != 4 ||
		len(report.Problems) != 0 || !report.Remembered || !report.Oldest.Equal(testClock()) || report.BytesRead != report.Bytes {
		t.Fatalf("%+v", report)
	}
	r := mustOpen(t, mem)
	defer r.Close()
	v, err := r.Verified(context.Background())
	if err != nil || v != (Verified{Packs: 4, Files: all, Oldest: testClock()}) {
		t.Fatalf("%+v, %v", v, err)
	}
	s, err := r.Stats(context.Background(), StatsOptions{})
	if err != nil || s.Verified != v {
		t.Fatalf("%+v, %v", s.Verified, err)
	}
}

// Every byte of every file that a scrub verifies is flipped, and each file is cut and
// lengthened: it is found without keys, and named.
func TestScrubFindsAnyDamage(t *testing.T) {
	z := newZoo(t)
	for _, name := range proofs(t, z.plant(t, "", nil)) {
		file := z.files[name]
		find := func(what string, b []byte) {
			t.Helper()
			mem := z.plant(t, name, b)
			report := mustScrub(t, mem, ScrubOptions{})
			if len(report.Problems) != 1 {
				t.Fatalf("%s, %s: %+v", name, what, report.Problems)
			}
			p := report.Problems[0]
			if !strings.Contains(p.What, path.Base(name)) || p.Remedy == "" || strings.HasPrefix(name, "packs/") != (p.Pack != "" && !strings.HasPrefix(name, "meta/")) {
				t.Fatalf("%s, %s: %+v", name, what, p)
			}
			// It is found again, for its date is not remembered.
			if again := mustScrub(t, mem, ScrubOptions{Budget: ScrubBudget{Bytes: 1}}); len(again.Problems) != 1 || again.FilesNever != 1 {
				t.Fatalf("%s, %s, again: %+v", name, what, again)
			}
		}
		at := []int{0, 8, 10, 11, 16, 33, 63, 64, len(file) - 56, len(file) - 48, len(file) - 33, len(file) - 32, len(file) - 1}
		for i := 65; i < len(file); i += 1 + len(file)/8 {
			at = append(at, i)
		}
		for _, i := range at {
			bad := bytes.Clone(file)
			bad[i] ^= 2
			find(fmt.Sprint("byte ", i), bad)
		}
		for _, n := range []int{0, 1, 64, 95, len(file) / 2, len(file) - 1} {
			find(fmt.Sprint("cut to ", n), file[:min(n, len(file)-1)])
		}
		find("longer", append(bytes.Clone(file), 0))
		// Whole, but not this file.
		for other, b := range z.files {
			if other != name && path.Dir(path.Dir(other)) == path.Dir(path.Dir(name)) && !bytes.Equal(b, file) && strings.Count(other, "/") == 2 && strings.HasPrefix(name, "packs") {
				find("exchanged for "+other, b)
			}
		}
		header := bytes.Clone(file[:len(file)-32])
		for _, i := range []int{8, 10, 11, 20} { // version, type, zero, repository
			bad := bytes.Clone(header)
			bad[i] += 0x40
			find(fmt.Sprint("byte ", i, " of the header, with a sum that fits"), withSum(bad))
		}
	}
}

func TestScrubOrderAndBudget(t *testing.T) {
	z := newZoo(t)
	mem := z.plant(t, "", nil)
	all := proofs(t, mem)
	var total int64
	for _, name := range all {
		total += int64(len(z.files[name]))
	}
	// Budgets of one file: each run verifies another one, and then the first again.
	now := testClock()
	var order []string
	for i := range 2 * len(all) {
		now = now.Add(time.Hour)
		before := datesOfRepo(t, mem, now)
		report := mustScrub(t, mem, ScrubOptions{Budget: ScrubBudget{Bytes: 1}, Clock: func() time.Time { return now }})
		if report.FilesVerified != 1 || report.FilesNever != int64(max(0, len(all)-1-i)) {
			t.Fatalf("run %d: %+v", i, report)
		}
		after := datesOfRepo(t, mem, now)
		for _, name := range all {
			if after[dateKeyOf(name)] != before[dateKeyOf(name)] {
				order = append(order, name)
			}
		}
	}
	if len(order) != 2*len(all) || !slices.Equal(order[:len(all)], order[len(all):]) {
		t.Fatalf("%d files in this order: %v", len(all), order)
	}
	// A tenth, and a quarter of an hour by a clock that goes on ten minutes at each look.
	report := mustScrub(t, mem, ScrubOptions{Budget: ScrubBudget{Percent: 10}})
	if report.BytesRead < total/10 || report.FilesVerified == int64(len(all)) {
		t.Fatalf("%+v of %d", report, total)
	}
	report = mustScrub(t, mem, ScrubOptions{Budget: ScrubBudget{Time: 15 * time.Minute}, Clock: stepClock(10 * time.Minute)})
	if report.FilesVerified != 1 {
		t.Fatalf("%+v", report)
	}
	for _, b := range []ScrubBudget{{Percent: -1}, {Percent: 101}, {Bytes: -1}, {Time: -1}} {
		if _, err := scrubFS(context.Background(), mem, idOf(t, mem), ScrubOptions{Budget: b}); err == nil {
			t.Errorf("%+v", b)
		}
	}
}

func datesOfRepo(t fatalist, fsys fsx.FS, now time.Time) dates {
	t.Helper()
	d, _, err := readDates(context.Background(), fsys, idOf(t, fsys), now)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Ctrl-C after any file: what was proved is remembered.
func TestScrubInterrupted(t *testing.T) {
	z := newZoo(t)
	for stop := 1; stop <= 3; stop++ {
		mem := z.plant(t, "", nil)
		ctx, cancel := context.WithCancel(context.Background())
		n := 0
		report, err := scrubFS(ctx, mem, idOf(t, mem), ScrubOptions{Clock: testClock, Progress: func(int64, int64) {
			if n++; n == stop {
				cancel()
			}
		}})
		cancel()
		if !errors.Is(err, context.Canceled) || report.FilesVerified != int64(stop) || !report.Remembered {
			t.Fatalf("%+v, %v", report, err)
		}
		if d := datesOfRepo(t, mem, testClock()); len(d) != stop {
			t.Fatalf("%d dates, not %d", len(d), stop)
		}
	}
}

// A crash at any operation loses no more than what was proved in the last minute, and
// never anything else.
func TestScrubCrashes(t *testing.T) {
	z := newZoo(t)
	all := len(proofs(t, z.plant(t, "", nil)))
	most := 0
	for k := 1; ; k += 3 {
		mem := z.plant(t, "", nil)
		faulty := fsx.NewFaulty(mem)
		faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: fsx.CrashNow, At: k})
		_, err := scrubFS(context.Background(), faulty, idOf(t, mem), ScrubOptions{Clock: stepClock(keepEvery / 3)})
		mem.Crash(rand.New(rand.NewPCG(uint64(k), 6)))
		for name, b := range z.files {
			got, err := fsx.ReadFile(mem, name, 1<<30)
			if err != nil || !bytes.Equal(got, b) {
				t.Fatalf("operation %d: %s: %v", k, name, err)
			}
		}
		if n := len(datesOfRepo(t, mem, testClock().AddDate(0, 0, 1))); n > 0 && n < all {
			most = max(most, n)
		}
		report := mustScrub(t, mem, ScrubOptions{})
		if len(report.Problems) != 0 || report.FilesNever != 0 {
			t.Fatalf("operation %d: %+v", k, report)
		}
		if !faulty.Fired() {
			if err != nil {
				t.Fatal(err)
			}
			if most == 0 {
				t.Fatal("no run that crashed left any date")
			}
			return
		}
	}
}

// Storage that takes no writes can be scrubbed, but remembers nothing.
func TestScrubReadOnly(t *testing.T) {
	z := newZoo(t)
	mem := z.plant(t, "", nil)
	faulty := fsx.NewFaulty(mem)
	faulty.Plan(fsx.Plan{Ops: fsx.OpChanges | fsx.OpLock, Mode: fsx.NoSpace, At: 1})
	report := mustScrub(t, faulty, ScrubOptions{})
	if report.Remembered || report.FilesVerified != report.Files || len(report.Problems) != 0 || report.FilesNever != 0 {
		t.Fatalf("%+v", report)
	}
	if d := datesOfRepo(t, mem, testClock()); len(d) != 0 {
		t.Fatal(d)
	}
}

// sick is storage with files that cannot be read, or go away when they are looked at.
type sick struct {
	fsx.FS
	mem   *fsx.Mem
	fails func(name string) error
}

func (s sick) Open(name string) (fsx.File, error) {
	if err := s.fails(name); err != nil {
		return nil, err
	}
	return s.FS.Open(name)
}

func TestScrubSickStorage(t *testing.T) {
	z := newZoo(t)
	mem := z.plant(t, "", nil)
	id := idOf(t, mem)
	scrub := func(fails func(name string) error) (*ScrubReport, error) {
		return scrubFS(context.Background(), sick{mem, mem, fails}, id, ScrubOptions{Clock: testClock})
	}
	pack := slices.Collect(maps.Keys(z.files))
	slices.Sort(pack)
	pack = slices.DeleteFunc(pack, func(n string) bool { return !strings.HasPrefix(n, "packs/") })

	// A read that fails once is not damage, one that fails twice is.
	for _, times := range []int{1, 2} {
		n := 0
		report, err := scrub(func(name string) error {
			if name == pack[0] && n < times {
				n++
				return syscall.EIO
			}
			return nil
		})
		if err != nil || len(report.Problems) != times-1 {
			t.Fatalf("%d times: %+v, %v", times, report, err)
		}
	}
	// Storage that is gone is no heap of problems.
	if _, err := scrub(func(name string) error {
		if strings.HasPrefix(name, verifiedDir) {
			return nil
		}
		return syscall.ESTALE
	}); !errors.Is(err, syscall.ESTALE) {
		t.Fatal(err)
	}
	// What prune deletes meanwhile is no problem.
	report, err := scrub(func(name string) error {
		if name == pack[0] {
			_ = mem.Remove(name)
		}
		return nil
	})
	if err != nil || len(report.Problems) != 0 || report.Vanished != 1 || report.Packs != 3 {
		t.Fatalf("%+v, %v", report, err)
	}
}

func TestScrubStorageGone(t *testing.T) {
	mem, r := newMem(t)
	for i := range maxUnreadable {
		mustBackup(t, r, testVM, i, noise(uint64(i), 1))
	}
	_, err := scrubFS(context.Background(), sick{mem, mem, func(name string) error {
		if strings.HasPrefix(name, "packs") || strings.HasPrefix(name, "meta") {
			return syscall.EIO
		}
		return nil
	}}, r.config.id, ScrubOptions{Clock: testClock})
	if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "in a row") {
		t.Fatal(err)
	}
}

func TestScrubDamagedSlot(t *testing.T) {
	z := newZoo(t)
	for name, b := range z.files {
		if strings.HasPrefix(name, "keys/") && len(b) > 0 {
			bad := bytes.Replace(b, []byte(`"label": "`), []byte(`"label": "x`), 1)
			report := mustScrub(t, z.plant(t, name, bad), ScrubOptions{})
			if len(report.Problems) != 1 || !strings.Contains(report.Problems[0].What, name) {
				t.Fatalf("%+v", report.Problems)
			}
			return
		}
	}
	t.Fatal("no slot")
}

// A check that reads all data remembers as well, if it is asked to.
func TestCheckRemembers(t *testing.T) {
	ctx := context.Background()
	z := newZoo(t)
	mem := z.plant(t, "", nil)
	r := mustOpen(t, mem)
	defer r.Close()
	for i, o := range []CheckOptions{{}, {Remember: true}, {ReadData: true}, {ReadData: true, Remember: true}} {
		if _, err := r.Check(ctx, o); err != nil {
			t.Fatal(err)
		}
		v, err := r.Verified(ctx)
		if err != nil {
			t.Fatal(err)
		}
		// The identity is no proof of anything, and only a scrub looks at all of it.
		if last := i == 3; last != (v.PacksNever == 0) || last != (v.FilesNever == 1) || !last && dateFiles(mem) > 0 {
			t.Fatalf("%+v: %+v", o, v)
		}
	}
	// Damaged packs are not among them.
	for name, b := range z.files {
		if !strings.HasPrefix(name, "packs/") {
			continue
		}
		bad := bytes.Clone(b)
		bad[100] ^= 1
		r := mustOpen(t, z.plant(t, name, bad))
		report, err := r.Check(ctx, CheckOptions{ReadData: true, Remember: true})
		if err != nil || len(report.Problems) == 0 {
			t.Fatalf("%+v, %v", report, err)
		}
		v, err := r.Verified(ctx)
		if err != nil || v.PacksNever != 1 {
			t.Fatalf("%+v, %v", v, err)
		}
		_ = r.Close()
	}
}

// crowd is a directory tree of n packs that nobody wrote, as 4 TiB have.
type crowd struct {
	*fsx.Mem
	n int
}

func (c crowd) ReadDir(name string) ([]fs.DirEntry, error) {
	switch {
	case name == "packs":
		var dirs []fs.DirEntry
		for i := range 256 {
			dirs = append(dirs, fs.FileInfoToDirEntry(entry{fmt.Sprintf("%02x", i), 0, true}))
		}
		return dirs, nil
	case strings.HasPrefix(name, "packs/"):
		var files []fs.DirEntry
		for i := range c.n / 256 {
			files = append(files, fs.FileInfoToDirEntry(entry{fmt.Sprintf("%s%014x", path.Base(name), i+1), 32 << 20, false}))
		}
		return files, nil
	}
	return c.Mem.ReadDir(name)
}

type entry struct {
	name string
	size int64
	dir  bool
}

func (e entry) Name() string { return e.name }
func (e entry) Size() int64  { return e.size }
func (e entry) IsDir() bool  { return e.dir }
func (e entry) Mode() fs.FileMode {
	if e.dir {
		return fs.ModeDir
	}
	return 0
}
func (e entry) ModTime() time.Time { return time.Time{} }
func (e entry) Sys() any           { return nil }

// At 4 TiB a scrub's memory is tens of MiB. All but the last pack was verified.
func TestScrubMemory(t *testing.T) {
	const packs = 131072
	mem := fsx.NewMem()
	all := dates{}
	id := [16]byte{9}
	c := crowd{mem, packs}
	var last string
	err := walkStored(context.Background(), c, func(f storedFile) error {
		last = f.path
		all[dateKeyOf(last)] = testClock().Unix()
		return nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	delete(all, dateKeyOf(last))
	plant(t, mem, verifiedDir+"/0123456789abcdef", encodeDates(id, all))
	if err := mem.MkdirAll("keys"); err != nil {
		t.Fatal(err)
	}
	var before, during runtime.MemStats
	all = nil
	runtime.GC()
	runtime.ReadMemStats(&before)
	report, err := scrubFS(context.Background(), c, id, ScrubOptions{
		Clock: testClock, Budget: ScrubBudget{Bytes: 1},
		Progress: func(int64, int64) {
			runtime.GC()
			runtime.ReadMemStats(&during)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	used := int64(during.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("%d MiB", used>>20)
	if report.Packs != packs-1 || report.PacksNever != 0 || report.Vanished != 1 || used > 64<<20 {
		t.Fatalf("%d bytes, %+v", used, report)
	}
}

// Dates of packs that are gone do not gather.
func TestScrubForgetsWhatIsGone(t *testing.T) {
	mem := newZoo(t).plant(t, "", nil)
	mustScrub(t, mem, ScrubOptions{})
	all := proofs(t, mem)
	if err := mem.Remove(all[0]); err != nil {
		t.Fatal(err)
	}
	for i := range mergeDatesAt {
		mustScrub(t, mem, ScrubOptions{Clock: func() time.Time { return testClock().AddDate(0, 0, i+1) }})
	}
	d := datesOfRepo(t, mem, testClock().AddDate(1, 0, 0))
	if len(d) != len(all)-1 || d[dateKeyOf(all[0])] != 0 {
		t.Fatalf("%d dates of %d files", len(d), len(all)-1)
	}
}
