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
	"syscall"
	"testing"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/parity"
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

func mustMend(t fatalist, fsys fsx.FS, packs ...string) *MendReport {
	t.Helper()
	report, err := mendFS(context.Background(), fsys, idOf(t, fsys), MendOptions{Packs: packs})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// hurts are ways to damage a file that parity of so many shards reaches. The middle
// stands for what lies between two cells.
func reachable(file []byte, info parity.Info) map[string][]byte {
	const cell = 4096
	cells := (len(file) + cell - 1) / cell
	shard := (cells + info.Data - 1) / info.Data
	reach := max(cell, info.Parity*shard*cell-cell)
	n := min(reach, len(file))
	at := (len(file) - n) / 2
	flip := bytes.Clone(file)
	for i := range n {
		flip[at+i] ^= 0x55
	}
	zero := bytes.Clone(file)
	clear(zero[at : at+n])
	one := bytes.Clone(file)
	one[len(file)/3] ^= 1
	start, end := bytes.Clone(file), bytes.Clone(file)
	clear(start[:min(n, 64)])
	clear(end[len(end)-min(n, 48):])
	return map[string][]byte{
		"flipped": flip, "zeros": zero, "a bit": one, "the header": start, "the trailer": end,
		"cut":    file[:len(file)-n],
		"longer": append(bytes.Clone(file), make([]byte, 100000)...),
	}
}

func TestMend(t *testing.T) {
	for _, percent := range []int{1, 30} {
		mem, r := newParityMem(t, percent)
		content := noise(3, 6)
		ref := mustBackup(t, r, testVM, 0, content)
		for _, name := range protected(t, mem) {
			file := read(t, mem, name)
			_, info, err := readSidecar(mem, name)
			if err != nil {
				t.Fatal(err)
			}
			hurt := reachable(file, info)
			if len(file) <= 2*4096 {
				hurt["empty"] = []byte{}
			}
			for what, b := range hurt {
				plant(t, mem, name, b)
				found := mustScrub(t, mem, ScrubOptions{})
				if len(found.Problems) != 1 || !strings.Contains(found.Problems[0].Remedy, "mends it from its parity file") {
					t.Fatalf("%s, %s: %+v", name, what, found.Problems)
				}
				report := mustMend(t, mem)
				if len(report.Mended) != 1 || report.Mended[0].Path != name || len(report.Problems) != 0 {
					t.Fatalf("%s, %s, %d %%: %+v", name, what, percent, report)
				}
				if !bytes.Equal(read(t, mem, name), file) {
					t.Fatalf("%s, %s: not as it was", name, what)
				}
			}
			// Beyond it: an error, and the file is left as it is.
			if len(file) > 4*info.Parity*4096 {
				bad := bytes.Clone(file)
				clear(bad[len(bad)/5 : len(bad)*4/5])
				plant(t, mem, name, bad)
				report := mustMend(t, mem)
				if len(report.Mended) != 0 || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].What, "beyond what its parity can mend") {
					t.Fatalf("%s: %+v", name, report)
				}
				if !bytes.Equal(read(t, mem, name), bad) {
					t.Fatalf("%s: changed all the same", name)
				}
				f, _ := storedName(name)
				if whole, err := r.mend(context.Background(), f.pack); f.kind == storedPack && (whole || !errors.Is(err, ErrDamaged) || !errors.Is(err, parity.ErrBeyond)) {
					t.Fatalf("%v, %v", whole, err)
				}
				plant(t, mem, name, file)
			}
		}
		if report := mustMend(t, mem); len(report.Mended)+len(report.Problems) != 0 {
			t.Fatalf("nothing is damaged: %+v", report)
		}
		same(t, openDisk(t, r, ref), content)
		clean(t, r)
	}
}

// mend, as readers and repairs call it, while the pack is open.
func TestMendOpenPack(t *testing.T) {
	ctx := context.Background()
	mem, r := newParityMem(t, 10)
	content := noise(5, 20)
	ref := mustBackup(t, r, testVM, 0, content)
	var name string
	for _, n := range protected(t, mem) {
		if strings.HasPrefix(n, "packs/") {
			name = n
		}
	}
	f, _ := storedName(name)
	if whole, err := r.mend(ctx, f.pack); !whole || err != nil {
		t.Fatal("a whole pack:", whole, err)
	}
	file := read(t, mem, name)
	bad := bytes.Clone(file)
	for i := range bad[:5000] {
		bad[100+i] ^= 1
	}
	plant(t, mem, name, bad)
	r.packs.Clear()
	buf := make([]byte, len(content))
	if _, err := openDisk(t, r, ref).ReadAt(buf, 0); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	if whole, err := r.mend(ctx, f.pack); !whole || err != nil {
		t.Fatal(whole, err)
	}
	same(t, openDisk(t, r, ref), content)

	// By name and without keys; what has no name or no parity is told.
	plant(t, mem, name, bad)
	if report := mustMend(t, mem, f.pack.handle.String()); len(report.Mended) != 1 || report.Mended[0].Pack != f.pack.handle.String() {
		t.Fatalf("%+v", report)
	}
	for _, no := range []string{"x", block.Handle(5).String()} {
		if _, err := mendFS(ctx, mem, r.config.id, MendOptions{Packs: []string{no}}); err == nil {
			t.Error(no)
		}
	}
	side := read(t, mem, name+paritySuffix)
	if err := mem.Remove(name + paritySuffix); err != nil {
		t.Fatal(err)
	}
	plant(t, mem, name, bad)
	if whole, err := r.mend(ctx, f.pack); whole || err != nil {
		t.Fatal("without parity:", whole, err)
	}
	if report := mustMend(t, mem); len(report.Problems) != 1 {
		t.Fatalf("%+v", report)
	}
	// A sidecar that is damaged as well mends as far as it can be read.
	for _, at := range []int{0, 70, len(side) / 2, len(side) - 60, len(side) - 1} {
		hurt := bytes.Clone(side)
		hurt[at] ^= 8
		plant(t, mem, name, bad)
		plant(t, mem, name+paritySuffix, hurt)
		if whole, err := r.mend(ctx, f.pack); !whole || err != nil || !bytes.Equal(read(t, mem, name), file) {
			t.Fatalf("sidecar damaged at %d: %v, %v", at, whole, err)
		}
	}
	// Another pack's sidecar is no danger.
	for _, other := range withSuffix(mem, paritySuffix) {
		if other != name+paritySuffix {
			plant(t, mem, name, bad)
			plant(t, mem, name+paritySuffix, read(t, mem, other))
			if whole, err := r.mend(ctx, f.pack); whole || !errors.Is(err, ErrDamaged) || !bytes.Equal(read(t, mem, name), bad) {
				t.Fatalf("%v, %v", whole, err)
			}
		}
	}
}

// What a disk cannot read any more is mended as well.
type badSectors struct {
	fsx.FS
	name   string
	at, to int64
}

type badFile struct {
	fsx.File
	s badSectors
}

func (s badSectors) Open(name string) (fsx.File, error) {
	f, err := s.FS.Open(name)
	if err == nil && name == s.name {
		f = badFile{f, s}
	}
	return f, err
}

func (f badFile) ReadAt(b []byte, off int64) (int, error) {
	if end := off + int64(len(b)); off >= f.s.to || end <= f.s.at {
		return f.File.ReadAt(b, off)
	}
	n := max(0, f.s.at-off)
	if n > 0 {
		if m, err := f.File.ReadAt(b[:n], off); err != nil {
			return m, err
		}
	}
	return int(n), &fs.PathError{Op: "read", Path: f.s.name, Err: syscall.EIO}
}

func TestMendUnreadable(t *testing.T) {
	mem, r := newParityMem(t, 5)
	mustBackup(t, r, testVM, 0, noise(6, 40))
	for _, name := range protected(t, mem) {
		file := read(t, mem, name)
		size := int64(len(file))
		bad := badSectors{mem, name, min(size/2/4096*4096, size-1), min(size/2/4096*4096+8192, size)}
		if found := mustScrub(t, bad, ScrubOptions{}); len(found.Problems) != 1 {
			t.Fatalf("%s: %+v", name, found.Problems)
		}
		f, _ := storedName(name)
		whole, damage, err := f.mend(context.Background(), &upkeep{fs: bad}, r.config.id)
		if !whole || err != nil || len(damage) != 1 || damage[0].Offset > bad.at || damage[0].Length > 8192 {
			t.Fatalf("%s: %v, %v, %v", name, whole, damage, err)
		}
		if !bytes.Equal(read(t, mem, name), file) {
			t.Fatal("not as it was")
		}
	}
}

// A crash or an error at any operation of mending: the pack is what it was, damaged, or
// whole, and then it is mended.
func TestMendFailsAnywhere(t *testing.T) {
	mem0, r := newParityMem(t, 5)
	content := noise(7, 1)
	mustBackup(t, r, testVM, 0, content)
	files := map[string][]byte{}
	var name string
	for _, n := range mem0.Files() {
		files[n] = read(t, mem0, n)
		if strings.HasPrefix(n, "packs/") && !strings.HasSuffix(n, paritySuffix) {
			name = n
		}
	}
	bad := bytes.Clone(files[name])
	clear(bad[5000:9000])
	for i, mode := range []fsx.Mode{fsx.CrashNow, fsx.FailOnce, fsx.FailAfter, fsx.ShortWrite, fsx.NoSpace} {
		for k := 1 + i/2; ; k += 1 + min(i, 2) {
			mem := fsx.NewMem()
			for n, b := range files {
				plant(t, mem, n, b)
			}
			plant(t, mem, name, bad)
			faulty := fsx.NewFaulty(mem)
			faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: mode, At: k})
			report, err := mendFS(context.Background(), faulty, r.config.id, MendOptions{Packs: []string{path.Base(name)}})
			fired := faulty.Fired()
			if mode == fsx.CrashNow {
				mem.Crash(rand.New(rand.NewPCG(uint64(k), 2)))
			}
			got := read(t, mem, name)
			done := err == nil && len(report.Mended) == 1
			if !bytes.Equal(got, files[name]) && (done || !bytes.Equal(got, bad)) {
				t.Fatalf("mode %d, operation %d: %d bytes after %v", mode, k, len(got), err)
			}
			again := mustMend(t, mem)
			if len(again.Problems) != 0 || !bytes.Equal(read(t, mem, name), files[name]) {
				t.Fatalf("mode %d, operation %d: %+v", mode, k, again)
			}
			// What a crash left is removed by whoever writes next.
			note(t, mem, testClock(), nil, "x")
			for _, n := range mem.Files() {
				if strings.HasPrefix(n, upkeepName+"-") {
					t.Fatalf("mode %d, operation %d: %s was left behind", mode, k, n)
				}
			}
			if !fired {
				t.Logf("mode %d: %d operations", mode, k-1)
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

// noDead proves that all packs that are there are needed.
func noDead(t fatalist, mem *fsx.Mem, r *Repository) {
	t.Helper()
	want := clean(t, r).Packs
	for _, name := range protected(t, mem) {
		if f, _ := storedName(name); f.kind == storedPack {
			want--
		}
	}
	if want != 0 {
		t.Fatalf("%d packs more than needed", -want)
	}
}

// Prune takes the parity of what it deletes along, and orphans of dead sessions.
func TestPruneDeletesParity(t *testing.T) {
	mem, r := newParityMem(t, 4)
	keep := noise(1, 5)
	stays := mustBackup(t, r, testVM, 0, keep)
	goes := mustBackup(t, r, VMID{"esx1", "a"}, 1, noise(2, 5))
	without(t, r, goes)
	plant(t, mem, "packs/01/0102030405060708"+paritySuffix, []byte("an orphan"))
	plant(t, mem, "packs/01/stranger"+paritySuffix, []byte("not ours"))
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
	if err := mem.Remove("packs/01/stranger" + paritySuffix); err != nil {
		t.Fatal("a file with an unknown name is gone:", err)
	}
	covered(t, mem)
	same(t, openDisk(t, r, stays), keep)
	noDead(t, mem, r)

	// Rewritten packs have parity as well.
	ref, content := sparse(t, r)
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
	covered(t, mem)
	same(t, openDisk(t, r, ref), content)

	// While somebody misses a block nothing that could bring it back is deleted.
	var lost string
	for _, name := range protected(t, mem) {
		if strings.HasPrefix(name, "packs/") {
			lost = name
		}
	}
	b := read(t, mem, lost)
	if err := mem.Remove(lost); err != nil {
		t.Fatal(err)
	}
	r.packs.Clear()
	mustPrune(t, r, PruneOptions{})
	if _, err := mem.Stat(lost + paritySuffix); err != nil {
		t.Fatal(err)
	}
	plant(t, mem, lost, b)
}

func TestPruneWithParityCrashes(t *testing.T) {
	for k := 1; ; k += 9 {
		mem, r := newParityMem(t, 4)
		keep := noise(1, 5)
		stays := mustBackup(t, r, testVM, 0, keep)
		without(t, r, mustBackup(t, r, VMID{"esx1", "a"}, 1, noise(2, 5)))
		mustPrune(t, r, PruneOptions{})
		_ = r.Close()
		faulty := fsx.NewFaulty(mem)
		r = mustOpen(t, faulty)
		faulty.Plan(fsx.Plan{Ops: fsx.OpChanges, Mode: fsx.CrashNow, At: k})
		_, err := r.Prune(context.Background(), PruneOptions{})
		fired := faulty.Fired()
		_ = r.Close()
		if !fired && err != nil {
			t.Fatal(err)
		}
		mem.Crash(rand.New(rand.NewPCG(uint64(k), 2)))
		r = mustOpen(t, mem)
		for range 3 {
			mustPrune(t, r, PruneOptions{})
		}
		covered(t, mem)
		same(t, openDisk(t, r, stays), keep)
		noDead(t, mem, r)
		_ = r.Close()
		if !fired {
			return
		}
	}
}

// Old readers know nothing of parity and verified dates: a repository with them reads
// as one without.
func TestParityIsPassedOver(t *testing.T) {
	mem, r := newParityMem(t, 3)
	content := noise(4, 9)
	ref := mustBackup(t, r, testVM, 0, content)
	mustScrub(t, mem, ScrubOptions{})
	for _, name := range mem.Files() {
		if strings.HasSuffix(name, paritySuffix) || strings.HasPrefix(name, verifiedDir+"/") {
			plant(t, mem, name, []byte("rubbish"))
		}
	}
	same(t, openDisk(t, r, ref), content)
	clean(t, r)
	refs, err := r.Refs(context.Background(), testVM)
	if err != nil || !slices.Equal(refs, []Ref{ref}) {
		t.Fatal(refs, err)
	}
	if err := r.Forget(context.Background(), []Ref{ref}, ForgetOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
	for _, name := range mem.Files() {
		if strings.HasSuffix(name, paritySuffix) && !strings.Contains(name, identityName) && !strings.Contains(name, forgottenPrefix) {
			t.Errorf("%s was left behind", name)
		}
	}
}
