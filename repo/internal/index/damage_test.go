package index

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

var now = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)

// hurt plants b as the segment and checks: opening and looking up work without an
// error, what is found is right, and the damage is told, by name, at the latest by
// Verify.
func hurt(t *testing.T, m *fsx.Mem, ring *keys.Ring, file string, b []byte, records int, what string) {
	t.Helper()
	must(t, m.Plant(file, b))
	x, err := Open(t.Context(), m, "index", ring, Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	defer x.Close()
	for i := 0; i < records; i += max(1, records/40) {
		got := places(t, x, idOf(i))
		if len(got) > 1 || len(got) == 1 && got[0] != rec(i).Location {
			t.Fatalf("%s: record %d found at %v", what, i, got)
		}
	}
	err = x.Verify(t.Context(), file)
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), file) {
		t.Fatalf("%s: verify says %v", what, err)
	}
	d := x.Damaged()
	if len(d) != 1 || !errors.Is(d[0], ErrDamaged) || !strings.Contains(d[0].Error(), file) {
		t.Fatalf("%s: damaged are %v", what, d)
	}
	if err := x.Each(t.Context(), func(block.Record) error { return nil }); !errors.Is(err, ErrDamaged) {
		t.Fatalf("%s: each says %v", what, err)
	}
}

func TestDamage(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	const n = 400 // two pages
	addRange(x, 0, n)
	s := flush(t, x)
	whole := readSegment(t, m, s.File)
	end := int(x.live[0].end())

	// Every byte of what is small, a sample of the pages.
	for i := range whole {
		if i > headerSize+64 && i < end-64 && i%997 != 0 {
			continue
		}
		b := bytes.Clone(whole)
		b[i] ^= 1 << (i % 8)
		hurt(t, m, ring, s.File, b, n, fmt.Sprintf("bit flipped in byte %d", i))
	}
	for i := 0; i < len(whole); i += 61 {
		hurt(t, m, ring, s.File, whole[:i], n, fmt.Sprintf("cut to %d", i))
	}
	for _, cut := range []int{1, 31, 32, trailerSize, trailerSize + 1} {
		hurt(t, m, ring, s.File, whole[:len(whole)-cut], n, fmt.Sprintf("last %d bytes cut", cut))
	}
	hurt(t, m, ring, s.File, append(bytes.Clone(whole), 0), n, "a byte added")
	hurt(t, m, ring, s.File, append(bytes.Clone(whole), whole...), n, "doubled")
	hurt(t, m, ring, s.File, make([]byte, len(whole)), n, "zeros")

	// Put back, everything is well again.
	must(t, m.Plant(s.File, whole))
	y := open(t, m, ring)
	expect(t, y, 0, n)
	must(t, y.Verify(t.Context(), s.File))
}

// TestSwapped moves authentic parts to where they do not belong.
func TestSwapped(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	const n = 2 * groupEntries
	addRange(x, 0, n)
	s := flush(t, x)
	whole := readSegment(t, m, s.File)
	g := x.live[0].geometry
	swap := func(aOff, bOff int64, size int) []byte {
		b := bytes.Clone(whole)
		copy(b[aOff:], whole[bOff:][:size])
		copy(b[bOff:], whole[aOff:][:size])
		return b
	}
	p0, size := g.page(0)
	p1, _ := g.page(1)
	f0, fsize := g.filter(0)
	f1, _ := g.filter(1)
	hurt(t, m, ring, s.File, swap(p0, p1, size), n, "two pages swapped")
	hurt(t, m, ring, s.File, swap(f0, f1, fsize), n, "two filters swapped")
	// The sum made to fit again, as one who means it would.
	for what, b := range map[string][]byte{"pages": swap(p0, p1, size), "filters": swap(f0, f1, fsize)} {
		hurt(t, m, ring, s.File, resum(b), n, what+" swapped, sum made to fit")
	}

	// The same place of another segment with the same key epoch.
	m2 := newMem(t)
	y := open(t, m2, ring)
	addRange(y, n, 2*n)
	s2 := flush(t, y)
	other := readSegment(t, m2, s2.File)
	b := bytes.Clone(whole)
	copy(b[p1:], other[p1:][:size])
	hurt(t, m, ring, s.File, resum(b), n, "a page of another segment")
	b = bytes.Clone(whole)
	copy(b[g.end():], other[g.end():])
	hurt(t, m, ring, s.File, resum(b), n, "the footer of another segment")

	// Whole segments in wrong places.
	hurt(t, m, ring, s.File, other, n, "another segment under this name")
	must(t, m.Plant(s.File, whole))
	foreign, err := keys.Create(rand.Reader, [16]byte{8})
	must(t, err)
	m3 := newMem(t)
	z := open(t, m3, foreign)
	addRange(z, 0, 10)
	s3 := flush(t, z)
	hurt(t, m, ring, s3.File, readSegment(t, m3, s3.File), 0, "another repository's segment")
	must(t, m.Remove(s3.File))
	newer := bytes.Clone(whole)
	newer[8] = 2
	hurt(t, m, ring, s.File, resum(newer), n, "a newer version")
}

// resum makes the trailer's checksum fit.
func resum(b []byte) []byte {
	copy(b[len(b)-32:], sum256(b[:len(b)-32]))
	return b
}

// TestDamageElsewhere: one bad segment takes nothing from the others, not in
// lookups and not in merges, and its parts still serve.
func TestDamageElsewhere(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	var files []string
	for i := range mergeFactor {
		addRange(x, i*10, i*10+10)
		files = append(files, flush(t, x).File)
	}
	must(t, m.Plant("index/ffffffffffffffff", []byte("planted")))
	must(t, m.Plant("index/.nfs000001", []byte("left behind")))
	must(t, m.MkdirAll("index/eeeeeeeeeeeeeeee"))
	y := open(t, m, ring)
	expect(t, y, 0, 80)
	if len(y.Damaged()) != 2 {
		t.Error(y.Damaged())
	}
	must(t, y.Merge(t.Context()))
	merged := y.Segments()
	if len(merged) != 1 {
		t.Fatal(merged)
	}
	expect(t, y, 0, 80)
	// The merged one dies: those that it superseded are there still.
	b := readSegment(t, m, merged[0].File)
	b[len(b)-trailerSize-3] ^= 4
	must(t, m.Plant(merged[0].File, b))
	expect(t, open(t, m, ring), 0, 80)

	// A page that cannot be read stops no merge of the others.
	must(t, m.Remove(merged[0].File))
	b = readSegment(t, m, files[2])
	b[headerSize] ^= 1
	must(t, m.Plant(files[2], b))
	z := open(t, m, ring)
	addRange(z, 80, 90)
	flush(t, z)
	addRange(z, 90, 100)
	flush(t, z)
	must(t, z.Merge(t.Context()))
	if got := z.Segments(); len(got) != 2 {
		t.Errorf("%d segments: %v", len(got), got)
	}
	expect(t, z, 30, 100)
	if got := places(t, z, idOf(25)); len(got) != 0 {
		t.Error("found in a damaged page:", got)
	}
	found := false
	for _, d := range z.Damaged() {
		found = found || strings.Contains(d.Error(), files[2])
	}
	if !found {
		t.Error(z.Damaged())
	}
}

// TestForgedFooter: one who had the keys and made nonsense still causes no panic
// and no large allocation.
func TestForgedFooter(t *testing.T) {
	good := footer{geometry: geometry{400}, sequence: 9, superseded: []name{{1}, {2}}, fences: []uint64{1, 5}}
	b := good.encode()
	if f, err := decodeFooter(b, good.end()); err != nil || f.entries != 400 || f.sequence != 9 {
		t.Fatal(f, err)
	}
	for what, change := range map[string]func(b []byte) []byte{
		"no entries":      func(b []byte) []byte { clear(b[:8]); return b },
		"too many":        func(b []byte) []byte { b[7] = 0xff; return b },
		"another count":   func(b []byte) []byte { b[0]++; return b },
		"more names":      func(b []byte) []byte { b[16]++; return b },
		"very many names": func(b []byte) []byte { b[19] = 0xff; return b },
		"fewer fences":    func(b []byte) []byte { b[20]--; return b },
		"names unsorted":  func(b []byte) []byte { b[24] = 9; return b },
		"names twice":     func(b []byte) []byte { b[32] = 1; return b },
		"fences unsorted": func(b []byte) []byte { b[40] = 9; return b },
		"short":           func(b []byte) []byte { return b[:len(b)-1] },
		"long":            func(b []byte) []byte { return append(b, 0) },
		"nearly nothing":  func(b []byte) []byte { return b[:23] },
		"nothing":         func([]byte) []byte { return nil },
	} {
		if f, err := decodeFooter(change(bytes.Clone(b)), good.end()); err == nil {
			t.Errorf("%s: %+v", what, f)
		}
	}
	if _, err := decodeFooter(b, good.end()+1); err == nil {
		t.Error("footer in another place")
	}
}

func TestTrailerBounds(t *testing.T) {
	whole := trailer{off: 1 << 20, size: 1000}.encode()
	whole = append(whole, make([]byte, 32)...)
	size := int64(1<<20 + 1000 + trailerSize)
	if _, err := decodeTrailer(whole, size); err != nil {
		t.Fatal(err)
	}
	for _, at := range []struct{ off, size uint64 }{
		{0, 1000},
		{63, 1000},
		{1 << 63, 1000},
		{1<<64 - 1, 1000},
		{1 << 20, 39},
		{1 << 20, 0},
		{1 << 20, 1<<32 - 1},
		{1<<20 + 1, 1000},
		{64, 1<<20 + 1000 - 64},
	} {
		b := bytes.Clone(whole)
		binary.LittleEndian.PutUint64(b, at.off)
		binary.LittleEndian.PutUint32(b[8:], uint32(at.size))
		if tr, err := decodeTrailer(b, size); err == nil {
			t.Errorf("%+v: %+v", at, tr)
		}
	}
}

func FuzzSegment(f *testing.F) {
	m, ring := newMem(f), newRing(f)
	x := open(f, m, ring)
	addRange(x, 0, 400)
	s := flush(f, x)
	whole := readSegment(f, m, s.File)
	f.Add(whole)
	f.Add(whole[:headerSize])
	f.Add(whole[len(whole)-trailerSize:])
	f.Add([]byte(nil))
	n, _ := parseName(path.Base(s.File))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := fsx.NewMem()
		must(t, m.Plant(s.File, b))
		got, err := openSegment(m, "index", n, ring)
		if err != nil {
			return
		}
		files := &files{fsys: m, max: 4, open: map[string]*openFile{}}
		defer files.closeAll()
		err = got.verify(t.Context(), files)
		if err == nil && !bytes.Equal(b, whole) {
			t.Error("a changed segment verifies")
		}
	})
}

func FuzzFooter(f *testing.F) {
	good := footer{geometry: geometry{400}, sequence: 9, superseded: []name{{1}, {2}}, fences: []uint64{1, 5}}
	f.Add(good.encode(), good.end())
	f.Add([]byte(nil), int64(0))
	f.Fuzz(func(t *testing.T, b []byte, end int64) {
		got, err := decodeFooter(b, end)
		if err == nil && !bytes.Equal(got.encode(), b) {
			t.Error("changed by encoding")
		}
	})
}

func FuzzTrailer(f *testing.F) {
	f.Add(append(trailer{off: 1 << 20, size: 1000}.encode(), make([]byte, 32)...), int64(1<<20+1000+trailerSize))
	f.Fuzz(func(t *testing.T, b []byte, file int64) {
		got, err := decodeTrailer(b, file)
		if err == nil && (got.off < headerSize || got.off+int64(got.size)+trailerSize != file || got.size > 10<<20) {
			t.Errorf("%+v of %d bytes", got, file)
		}
	})
}

// FuzzPage looks an id up in whatever a page may hold.
func FuzzPage(f *testing.F) {
	var page []byte
	for i := range 3 {
		page = rec(i).Append(page)
	}
	f.Add(page, page[:32])
	f.Add(page, page[48:80])
	f.Fuzz(func(t *testing.T, page, id []byte) {
		if len(id) < 32 || len(page) > pageSize {
			return
		}
		want := block.ID(id[:32])
		got, err := findInPage(page, &want, nil)
		if err == nil && len(got) > 0 && !bytes.Contains(page, id[:32]) {
			t.Errorf("found %v", got)
		}
	})
}

// TestFrozen reads a segment that was written by the first version of this
// format; every later version must. HIKAE_FREEZE=1 writes it.
func TestFrozen(t *testing.T) {
	const dir, n = "testdata/v1", 400
	ring, err := keys.Create(bytes.NewReader(bytes.Repeat([]byte{0x33}, 64)), [16]byte([]byte("frozen repositor")))
	must(t, err)
	if os.Getenv("HIKAE_FREEZE") != "" {
		must(t, os.RemoveAll(dir))
		must(t, os.MkdirAll(dir+"/tmp", 0o755))
		fsys, err := fsx.OS(dir)
		must(t, err)
		x := open(t, fsys, ring)
		addRange(x, 0, n)
		flush(t, x)
		must(t, os.Remove(dir+"/tmp"))
	}
	fsys, err := fsx.OS(dir)
	must(t, err)
	x := open(t, fsys, ring)
	expect(t, x, 0, n)
	for _, s := range x.Segments() {
		must(t, x.Verify(t.Context(), s.File))
	}
}
