package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

// zoo is a small repository as a map of files, and what its generations hold.
type zoo struct {
	files    map[string][]byte
	contents map[string][]byte // by Ref.String
	refs     []Ref
}

// secretText is in the content of every disk of the zoo, uncompressed.
const secretText = "the plaintext that nobody may see"

func newZoo(t testing.TB) *zoo {
	t.Helper()
	ctx := context.Background()
	mem, r := newMem(t)
	z := &zoo{files: map[string][]byte{}, contents: map[string][]byte{}}
	content := make([]byte, 6*testBlock+77)
	for _, b := range []int{0, 1, 3, 6} { // the others are holes
		copy(content[b*testBlock:], fmt.Sprint("block ", b))
	}
	copy(content[testBlock:], secretText)
	var parent *Disk
	for i := range 2 {
		if i == 1 {
			content = bytes.Clone(content)
			copy(content[3*testBlock:], image(22, testBlock))
			copy(content[3*testBlock:], "changed")
		}
		s, err := r.Begin(ctx, SessionOptions{Compression: "none"})
		if err != nil {
			t.Fatal(err)
		}
		ref, err := backupIn(ctx, s, testVM, testClock().Add(time.Duration(i)*time.Hour), content, parent, whole(content))
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		parent = openDisk(t, r, ref)
		z.refs = append(z.refs, ref)
		z.contents[ref.String()] = content
	}
	for _, name := range mem.Files() {
		b, err := fsx.ReadFile(mem, name, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		z.files[name] = b
	}
	return z
}

// plant makes a repository of the zoo's files, one of them changed; nil removes it.
func (z *zoo) plant(t testing.TB, name string, b []byte) *fsx.Mem {
	t.Helper()
	mem := fsx.NewMem()
	for _, d := range layout {
		if err := mem.MkdirAll(d); err != nil {
			t.Fatal(err)
		}
	}
	for n, c := range z.files {
		if n == name {
			c = b
		}
		if c != nil {
			if err := mem.Plant(n, c); err != nil {
				t.Fatal(err)
			}
		}
	}
	return mem
}

// use reads everything. Wrong bytes fail the test; it returns all errors.
func (z *zoo) use(t testing.TB, mem *fsx.Mem, what string) error {
	ctx := context.Background()
	r, err := openMem(mem)
	if err != nil {
		return err
	}
	defer r.Close()
	var faults []error
	_, err = r.VMs(ctx)
	faults = append(faults, err)
	for _, ref := range z.refs {
		g, err := r.Generation(ctx, ref)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		d, err := g.OpenDisk(0)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		want := z.contents[ref.String()]
		if d.Size() != int64(len(want)) {
			t.Fatalf("%s: the disk has %d bytes", what, d.Size())
		}
		for off := 0; off < len(want); off += testBlock {
			p := bytes.Repeat([]byte{0x5a}, min(testBlock, len(want)-off))
			_, err := d.ReadAt(p, int64(off))
			if err == nil && !bytes.Equal(p, want[off:off+len(p)]) {
				t.Fatalf("%s: wrong bytes came out", what)
			}
			if err != nil && bytes.Contains(p, []byte(secretText)) {
				t.Fatalf("%s: plaintext came out with %v", what, err)
			}
			faults = append(faults, err)
		}
	}
	return errors.Join(faults...)
}

// Every class of byte of every file is flipped; every file is cut, lengthened,
// taken away and exchanged for another. Nothing may panic, no wrong byte come out,
// and check must tell.
func TestEveryFileDamaged(t *testing.T) {
	ctx := context.Background()
	z := newZoo(t)
	if err := z.use(t, z.plant(t, "", nil), "nothing"); err != nil {
		t.Fatal(err)
	}
	try := func(name, what string, b []byte) {
		t.Helper()
		mem := z.plant(t, name, b)
		what = name + ": " + what
		err := z.use(t, mem, what)
		kind, _, _ := strings.Cut(name, "/")
		if err != nil {
			switch {
			case errors.Is(err, ErrDamaged) || errors.Is(err, ErrVersion) || errors.Is(err, ErrWrongPassphrase):
			case b == nil && (errors.Is(err, ErrNotRepository) || errors.Is(err, ErrNotFound)):
			case kind == configName && errors.Is(err, ErrNotRepository):
			case strings.Contains(err.Error(), "no such epoch"):
			default:
				t.Errorf("%s: not an error that says what is wrong: %v", what, err)
			}
			var d *DamageError
			if (kind == "packs" || kind == "meta") && errors.As(err, &d) && (d.Pack == 0 || d.Length == 0 || d.What == "") {
				t.Errorf("%s: the error names no place: %+v", what, d)
			}
		}
		r, err := openMem(mem)
		if err != nil {
			return
		}
		defer r.Close()
		report, err := r.Check(ctx, CheckOptions{ReadData: true})
		if err != nil {
			if !strings.Contains(err.Error(), "epoch") && !errors.Is(err, ErrVersion) {
				t.Errorf("%s: check: %v", what, err)
			}
			return
		}
		quiet := len(report.Problems) == 0
		switch {
		case (kind == configName || kind == "keys") && len(b) == len(z.files[name])-1: // a line feed less
		case kind == "generations" && strings.HasSuffix(name, "lock"), strings.HasSuffix(name, ".lock"), kind == "keys" && b == nil, kind == "tmp":
		case kind == "index" && b == nil: // nothing but deduplication is lost
		case kind == "generations" && b == nil && strings.Contains(name, z.refs[1].Name()): // the newest leaves no trace
		case kind == "keys" && strings.HasSuffix(name, "lock"):
		default:
			if quiet {
				t.Errorf("%s: check found nothing", what)
			}
		}
		for _, p := range report.Problems {
			if p.What == "" || p.Remedy == "" {
				t.Errorf("%s: %+v", what, p)
			}
			if (kind == "packs" || kind == "meta") && (p.Pack != filepath.Base(name) || len(p.Generations) == 0) && b == nil {
				t.Errorf("%s: a problem that does not say whom it hurts: %+v", what, p)
			}
		}
	}
	for name, file := range z.files {
		// Some bytes in the middle of long stretches will do for all of them.
		step := 1 + len(file)/40
		if testing.Short() {
			step = 1 + len(file)/10
		}
		for i := 0; i < len(file); {
			bad := bytes.Clone(file)
			bad[i] ^= 0x10
			try(name, fmt.Sprint("byte ", i), bad)
			if i < 64 || i >= len(file)-80 {
				i += 3
			} else {
				i += step
			}
		}
		for _, n := range []int{0, 1, len(file) / 2, len(file) - 1} {
			if n >= 0 && n < len(file) {
				try(name, fmt.Sprint("cut to ", n), file[:n:n])
			}
		}
		if len(file) > 0 {
			try(name, "longer", append(bytes.Clone(file), 'x'))
			try(name, "gone", nil)
		}
		for other, b := range z.files {
			if other != name && filepath.Dir(filepath.Dir(other)) == filepath.Dir(filepath.Dir(name)) && !bytes.Equal(b, file) && len(file) > 0 {
				try(name, "exchanged for "+other, b)
			}
		}
	}
}

// Two records of the same length change places within their pack: each would open
// under the other's name if nothing bound it to its place.
func TestSwappedRecords(t *testing.T) {
	z := newZoo(t)
	for name, file := range z.files {
		if !strings.HasPrefix(name, "packs/") {
			continue
		}
		sealed := testBlock + pack.Overhead
		if len(file) < 64+2*sealed {
			continue
		}
		bad := bytes.Clone(file)
		copy(bad[64:64+sealed], file[64+sealed:])
		copy(bad[64+sealed:64+2*sealed], file[64:])
		err := z.use(t, z.plant(t, name, bad), "swapped")
		var d *DamageError
		if !errors.As(err, &d) || d.Pack.String() != filepath.Base(name) || !errors.Is(err, pack.ErrSeal) {
			t.Errorf("swapped records: %v", err)
		}
	}
}

// The report says which pack hurts which stretch of which generation.
func TestReportNamesAreas(t *testing.T) {
	z := newZoo(t)
	for name, file := range z.files {
		if !strings.HasPrefix(name, "packs/") || len(file) < 2*testBlock {
			continue
		}
		bad := bytes.Clone(file)
		bad[64+5] ^= 1 // the first record of the first generation
		r := mustOpen(t, z.plant(t, name, bad))
		defer r.Close()
		for _, deep := range []bool{false, true} {
			report, err := r.Check(context.Background(), CheckOptions{ReadData: deep})
			if err != nil {
				t.Fatal(err)
			}
			if !deep {
				if len(report.Problems) != 0 {
					t.Errorf("structure: %+v", report.Problems)
				}
				continue
			}
			if len(report.Problems) != 1 {
				t.Fatalf("%+v", report.Problems)
			}
			p := report.Problems[0]
			if p.Pack != filepath.Base(name) || p.Offset != 64 || p.Records != 1 || len(p.Generations) == 0 || len(p.Areas) == 0 {
				t.Errorf("%+v", p)
			}
			for _, a := range p.Areas {
				if a.Length < 1 || a.Offset%testBlock != 0 || a.Disk != "web01" {
					t.Errorf("%+v", a)
				}
			}
		}
		return
	}
	t.Fatal("no pack of data")
}

func TestChainBreaks(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(1, testBlock*2)
	for i := range 4 {
		if _, err := backup(ctx, r, testVM, testClock().Add(time.Duration(i)*time.Hour), content, nil, whole(content)); err != nil {
			t.Fatal(err)
		}
	}
	refs, err := r.Refs(ctx, testVM)
	if err != nil {
		t.Fatal(err)
	}
	if err := mem.Remove(r.manifestPath(refs[1])); err != nil {
		t.Fatal(err)
	}
	report, err := r.Check(ctx, CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Problems) != 1 || !strings.Contains(report.Problems[0].What, refs[2].String()) || !strings.Contains(report.Problems[0].What, "gone") {
		t.Fatalf("%+v", report.Problems)
	}
	// Moved to another time or another VM it does not open.
	b, err := fsx.ReadFile(mem, r.manifestPath(refs[2]), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []Ref{
		{VM: testVM, Sequence: refs[2].Sequence, Time: refs[2].Time.Add(time.Second)},
		{VM: testVM, Sequence: 99, Time: refs[2].Time},
		{VM: VMID{"esx1", "other"}, Sequence: refs[2].Sequence, Time: refs[2].Time},
	} {
		if err := mem.Plant(r.manifestPath(ref), b); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Generation(ctx, ref); !errors.Is(err, ErrDamaged) {
			t.Errorf("%v: %v", ref, err)
		}
	}
}

func TestFloor(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	if err := mem.Plant("generations/floor-0000000041", nil); err != nil {
		t.Fatal(err)
	}
	content := image(1, testBlock)
	ref, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil || ref.Sequence != 42 {
		t.Fatal(ref.Sequence, err)
	}
}

func FuzzConfig(f *testing.F) {
	z := newZoo(f)
	f.Add(z.files[configName])
	f.Add([]byte("{}\n"))
	f.Add([]byte(`{"format":2}` + "\nab\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeConfig(b)
		if err == nil && (len(c.mac) != 32 || !validBlockSize(c.BlockSize) || c.Format != FormatVersion) {
			t.Fatalf("%q decoded to %+v", b, c)
		}
	})
}

// Frozen repositories of every format version must always read. HIKAE_FREEZE=1
// makes the one of this version anew, which is allowed before its first release
// only.
func TestFrozen(t *testing.T) {
	const dir = "testdata/v1"
	content, later := frozenDisks()
	if os.Getenv("HIKAE_FREEZE") != "" {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		freeze(t, dir, content, later)
	}
	// Reading must need no right to write, and must not change a thing.
	r, err := Open(context.Background(), dir, Passphrase(passphrase), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	refs, err := r.Refs(context.Background(), testVM)
	if err != nil || len(refs) != 2 {
		t.Fatal(refs, err)
	}
	same(t, openDisk(t, r, refs[0]), content)
	same(t, openDisk(t, r, refs[1]), later)
	g, err := r.Generation(context.Background(), refs[1])
	if err != nil {
		t.Fatal(err)
	}
	files, err := g.Files(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name)
	}
	if got := strings.Join(names, " "); got != "generation.json web01-flat.vmdk web01.vmdk web01.vmx" {
		t.Error(got)
	}
	clean(t, r)
}

// frozenDisks is what the frozen repositories hold. It must never change: block 0 is
// noise, 1 text, 3 both, 6 the end of the disk, which lies within it. The disk then
// grows by a level of the tree and gets a last block that is whole.
func frozenDisks() (content, later []byte) {
	content = make([]byte, 6*testBlock+77)
	noise := rand.NewChaCha8([32]byte([]byte("hikae, a repository of version 1")))
	_, _ = noise.Read(content[:testBlock])
	copy(content[testBlock:2*testBlock], bytes.Repeat([]byte("the copy you keep. "), testBlock/19))
	copy(content[3*testBlock:], content[testBlock-9000:testBlock+9000])
	copy(content[6*testBlock:], "the end")
	later = append(bytes.Clone(content), make([]byte, 294*testBlock-77)...)
	copy(later[3*testBlock:], "changed")
	copy(later[299*testBlock:], "grown")
	return content, later
}

func freeze(t *testing.T, dir string, content, later []byte) {
	ctx := context.Background()
	if err := Init(ctx, dir, InitOptions{BlockSize: testBlock, Passphrase: passphrase, KDF: cheap, Clock: testClock}); err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, dir, Passphrase(passphrase), Options{Clock: testClock, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var parent *Disk
	for i, c := range [][]byte{content, later} {
		s, err := r.Begin(ctx, SessionOptions{Compression: []string{"zstd", "s2"}[i]})
		if err != nil {
			t.Fatal(err)
		}
		tree, err := write(ctx, s, c, parent, whole(c))
		if err != nil {
			t.Fatal(err)
		}
		ref, err := s.Commit(ctx, Manifest{
			VM: testVM, Time: testClock().Add(time.Duration(i) * time.Hour), Mode: ModeFull, Consistency: ConsistencyOff,
			Disks: []DiskManifest{diskOf("web01", tree)}, Files: []ManifestFile{{"web01.vmx", []byte("displayName = \"web 01\"\n")}},
		})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		parent = openDisk(t, r, ref)
	}
}
