package repo

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"path"
	"strings"
	"syscall"
	"testing"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/parity"
)

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

// Append-only storage: what could be mended is told, nothing large is left behind, and
// parity that is missing can be made.
func TestMendAppendOnly(t *testing.T) {
	ctx := context.Background()
	mem, r := newParityMem(t, 5)
	mustBackup(t, r, testVM, 0, noise(1, 5))
	for _, name := range protected(t, mem) {
		file := read(t, mem, name)
		bad := bytes.Clone(file)
		bad[50] ^= 1
		plant(t, mem, name, bad)
		report, err := mendFS(ctx, keepsAll{mem}, r.config.id, MendOptions{})
		if err != nil || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].What, "does not let a file be replaced") {
			t.Fatalf("%+v, %v", report, err)
		}
		f, _ := storedName(name)
		if _, _, err := f.mend(ctx, &upkeep{fs: keepsAll{mem}}, r.config.id); !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
		plant(t, mem, name, file)
		if err := mem.Remove(name + paritySuffix); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, upkeepName+"-") && len(read(t, mem, name)) > 0 {
			t.Errorf("%s was left behind", name)
		}
	}
	if _, err := addParityFS(ctx, keepsAll{mem}, r.config.id, ParityOptions{Percent: 5}); err != nil {
		t.Fatal(err)
	}
	covered(t, mem)
	name := protected(t, mem)[0]
	plant(t, mem, name+paritySuffix, []byte("damaged"))
	report, err := addParityFS(ctx, keepsAll{mem}, r.config.id, ParityOptions{Percent: 5})
	if err != nil || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].What, name) {
		t.Fatalf("%+v, %v", report, err)
	}
}
