package repo

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"hikae/repo/internal/fsx"
)

// newParityMem is a repository in memory whose writers make parity.
func newParityMem(t testing.TB, percent int) (*fsx.Mem, *Repository) {
	t.Helper()
	mem := fsx.NewMem()
	err := initFS(context.Background(), mem, "mem", InitOptions{BlockSize: testBlock, Passphrase: passphrase, KDF: cheap, Clock: testClock, Parity: percent})
	if err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, mem)
	t.Cleanup(func() { _ = r.Close() })
	return mem, r
}

func withSuffix(mem *fsx.Mem, suffix string) (list []string) {
	for _, name := range mem.Files() {
		if strings.HasSuffix(name, suffix) {
			list = append(list, name)
		}
	}
	return list
}

func read(t fatalist, fsys fsx.FS, name string) []byte {
	t.Helper()
	b, err := fsx.ReadFile(fsys, name, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func plant(t fatalist, mem *fsx.Mem, name string, b []byte) {
	t.Helper()
	if err := mem.Plant(name, b); err != nil {
		t.Fatal(err)
	}
}

// protected are the files that should have parity.
func protected(t fatalist, fsys fsx.FS) (list []string) {
	t.Helper()
	for _, name := range proofs(t, fsys) {
		if !strings.HasPrefix(name, "index/") {
			list = append(list, name)
		}
	}
	return list
}

// covered proves that each such file has a sidecar that fits it, and that there are no
// other sidecars.
func covered(t fatalist, mem *fsx.Mem) {
	t.Helper()
	files := protected(t, mem)
	// Forget makes none for its small files; AddParity does.
	files = slices.DeleteFunc(files, func(name string) bool {
		_, err := mem.Stat(name + paritySuffix)
		return strings.Contains(name, forgottenPrefix) && err != nil
	})
	for _, name := range files {
		_, info, err := readSidecar(mem, name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		f, _ := storedName(name)
		if err := f.belongs(mem, info); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if n := len(withSuffix(mem, paritySuffix)); n != len(files) {
		t.Fatalf("%d sidecars for %d files", n, len(files))
	}
}

func TestSessionsMakeParity(t *testing.T) {
	mem, r := newParityMem(t, 3)
	content := noise(1, 40)
	ref := mustBackup(t, r, testVM, 0, content)
	covered(t, mem)
	// Writers of many packs: more than may wait.
	for i := range 2 * sidecarsWaiting {
		s, err := r.Begin(context.Background(), SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := write(context.Background(), s, noise(uint64(100+i), 1), nil, []extent{{0, testBlock}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	covered(t, mem)
	same(t, openDisk(t, r, ref), content)
	clean(t, r)
	stats, err := r.Stats(context.Background(), StatsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var want, data int64
	for _, name := range withSuffix(mem, paritySuffix) {
		want += int64(len(read(t, mem, name)))
	}
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "packs/") && !strings.HasSuffix(name, paritySuffix) {
			data += int64(len(read(t, mem, name)))
		}
	}
	if stats.Physical.Parity != want || stats.Physical.Data != data || want == 0 {
		t.Errorf("%+v, want %d of parity and %d of data", stats.Physical, want, data)
	}
	// A repository without does not make any.
	plain, r2 := newMem(t)
	mustBackup(t, r2, testVM, 0, content)
	if n := len(withSuffix(plain, paritySuffix)); n > 0 {
		t.Errorf("%d sidecars", n)
	}
}

func TestParityOptions(t *testing.T) {
	for _, percent := range []int{-1, MaxParity + 1} {
		err := initFS(context.Background(), fsx.NewMem(), "mem", InitOptions{Passphrase: passphrase, KDF: cheap, Parity: percent})
		if err == nil {
			t.Errorf("%d %%", percent)
		}
		if _, err := addParityFS(context.Background(), fsx.NewMem(), [16]byte{}, ParityOptions{Percent: percent}); err == nil {
			t.Errorf("%d %%", percent)
		}
	}
	// Whatever the config says, it opens.
	for _, n := range []int{-5, 0, 7, 1000} {
		if got := (&config{Parity: n}).parity(); got < 0 || got > MaxParity || n == 7 && got != 7 {
			t.Errorf("%d became %d", n, got)
		}
	}
}

// A commit does not depend on parity: whatever happens to sidecars, it is there, and
// AddParity makes up for it.
func TestCommitWithoutParity(t *testing.T) {
	content := noise(2, 2)
	for i, mode := range []fsx.Mode{fsx.FailOnce, fsx.FailAfter, fsx.ShortWrite, fsx.CrashNow} {
		for k := 1 + i/2; ; k += 3 {
			mem, first := newParityMem(t, 5)
			_ = first.Close()
			faulty := fsx.NewFaulty(mem)
			r := mustOpen(t, faulty)
			var inParity bool
			faulty.Plan(fsx.Plan{
				Ops: fsx.OpAny, Mode: mode, At: k,
				Name: func(name string) bool { inParity = strings.Contains(name, paritySuffix); return inParity },
			})
			s, err := r.Begin(context.Background(), SessionOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ref, err := backupIn(context.Background(), s, testVM, testClock(), content, nil, whole(content))
			cerr := s.Close()
			if mode != fsx.CrashNow && (err != nil || cerr != nil) {
				t.Fatalf("mode %d, operation %d: %v, %v", mode, k, err, cerr)
			}
			fired := faulty.Fired()
			faulty.Heal()
			_ = r.Close()
			if mode == fsx.CrashNow {
				mem.Crash(rand.New(rand.NewPCG(uint64(k), 4)))
			}
			r = mustOpen(t, mem)
			if err == nil {
				same(t, openDisk(t, r, ref), content)
			}
			clean(t, r)
			// The next session and AddParity make whole what was left.
			mustBackup(t, r, VMID{"esx1", "next"}, 1, content)
			report, err := addParityFS(context.Background(), mem, r.config.id, ParityOptions{Percent: 5})
			if err != nil || len(report.Problems) != 0 {
				t.Fatalf("%+v, %v", report, err)
			}
			covered(t, mem)
			for _, name := range mem.Files() {
				if strings.HasPrefix(name, "tmp/") && strings.Contains(name, paritySuffix) {
					t.Fatalf("mode %d, operation %d: %s was left behind", mode, k, name)
				}
			}
			_ = r.Close()
			if !fired {
				break
			}
		}
	}
}

func TestAddParity(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	mustBackup(t, r, testVM, 0, noise(1, 30))
	mustBackup(t, r, testVM, 1, noise(2, 5))
	files := protected(t, mem)
	add := func(percent int) *ParityReport {
		t.Helper()
		report, err := addParityFS(ctx, mem, r.config.id, ParityOptions{Percent: percent})
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	n := int64(len(files))
	if got := add(3); got.FilesAdded != n || got.Files != n || got.BytesParity == 0 {
		t.Fatalf("%+v", got)
	}
	covered(t, mem)
	if got := add(3); got.FilesBefore != n || got.BytesParity != 0 {
		t.Fatalf("%+v", got)
	}
	// What is damaged, made for another file, or too little is made anew; one too many is not.
	side := files[0] + paritySuffix
	whole := read(t, mem, side)
	bad := bytes.Clone(whole)
	bad[len(bad)/2] ^= 1
	for _, b := range [][]byte{bad, whole[:100], {}, read(t, mem, files[1]+paritySuffix)} {
		plant(t, mem, side, b)
		if report := mustScrub(t, mem, ScrubOptions{}); len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Remedy, "--parity") || report.FilesNever != 0 {
			t.Fatalf("%+v", report)
		}
		if got := add(3); got.FilesMade != 1 || got.FilesBefore != n-1 || !bytes.Equal(read(t, mem, side), whole) {
			t.Fatalf("%+v", got)
		}
	}
	if got := add(50); got.FilesMade == 0 || got.FilesMade+got.FilesBefore != n {
		t.Fatalf("%+v", got)
	}
	if got := add(2); got.FilesBefore != n {
		t.Fatalf("%+v", got)
	}
	covered(t, mem)
	// Parity of damaged bytes would be worse than none.
	var name string
	for _, f := range files {
		if strings.HasPrefix(f, "packs/") {
			name = f
		}
	}
	good := read(t, mem, name)
	broken := bytes.Clone(good)
	broken[300] ^= 1
	plant(t, mem, name, broken)
	if err := mem.Remove(name + paritySuffix); err != nil {
		t.Fatal(err)
	}
	if got := add(3); got.FilesAdded != 0 || len(got.Problems) != 1 || got.Problems[0].Pack != path.Base(name) {
		t.Fatalf("%+v", got)
	}
	if _, err := mem.Stat(name + paritySuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("made parity of a damaged pack:", err)
	}
	clean(t, mustOpen(t, restored(t, mem, name, good)))
}

func restored(t fatalist, mem *fsx.Mem, name string, b []byte) *fsx.Mem {
	t.Helper()
	plant(t, mem, name, b)
	return mem
}

func TestAddParityFailsAnywhere(t *testing.T) {
	mem0, r := newMem(t)
	mustBackup(t, r, testVM, 0, noise(1, 1))
	files := map[string][]byte{}
	for _, n := range mem0.Files() {
		files[n] = read(t, mem0, n)
	}
	for i, mode := range []fsx.Mode{fsx.CrashNow, fsx.FailOnce, fsx.FailAfter, fsx.NoSpace} {
		for k := 1 + i/2; ; k += 1 + min(i, 2) {
			mem := fsx.NewMem()
			for n, b := range files {
				plant(t, mem, n, b)
			}
			faulty := fsx.NewFaulty(mem)
			faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: mode, At: k})
			_, err := addParityFS(context.Background(), faulty, r.config.id, ParityOptions{Percent: 3})
			fired := faulty.Fired()
			if !fired && err != nil {
				t.Fatal(err)
			}
			if mode == fsx.CrashNow {
				mem.Crash(rand.New(rand.NewPCG(uint64(k), 2)))
			}
			for n, b := range files {
				if !bytes.Equal(read(t, mem, n), b) {
					t.Fatalf("mode %d, operation %d: %s", mode, k, n)
				}
			}
			if _, err := addParityFS(context.Background(), mem, r.config.id, ParityOptions{Percent: 3}); err != nil {
				t.Fatal(err)
			}
			covered(t, mem)
			if !fired {
				break
			}
		}
	}
}

// A session that died before its packs had parity: the next one makes it.
func TestSessionsMakeUpForDeadOnes(t *testing.T) {
	mem, first := newParityMem(t, 5)
	_ = first.Close()
	faulty := fsx.NewFaulty(mem)
	r := mustOpen(t, faulty)
	s, err := r.Begin(context.Background(), SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	content := noise(2, 3)
	if _, err := write(context.Background(), s, content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: fsx.CrashNow, At: 1, Name: func(name string) bool { return strings.Contains(name, paritySuffix) }})
	_ = s.Close()
	_ = r.Close()
	mem.Crash(rand.New(rand.NewPCG(1, 4)))
	if n := len(withSuffix(mem, paritySuffix)); n > 0 || len(protected(t, mem)) == 0 {
		t.Fatalf("%d sidecars, %v", n, protected(t, mem))
	}
	r = mustOpen(t, mem)
	defer r.Close()
	if s, err = r.Begin(context.Background(), SessionOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	covered(t, mem)
}
