package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

var deltaTypes = []string{TypeVMFSSparse, TypeSESparse}

// TestDeltaAgainstModel writes, zeroes and reopens a link over a random parent, in both formats.
func TestDeltaAgainstModel(t *testing.T) {
	ctx := context.Background()
	ones := bytes.Repeat([]byte{1}, 3<<20)
	rapid.Check(t, func(rt *rapid.T) {
		createType := rapid.SampledFrom(deltaTypes).Draw(rt, "type")
		capacity := rapid.SampledFrom([]int64{512, 4096 * 2, 4096*5 + 512, 2<<20 + 1024, 16<<20 + 512*3}).Draw(rt, "capacity")
		model := make([]byte, capacity)
		fill(rand.New(rand.NewPCG(1, 2)), model[:min(capacity, 3<<20)])
		base := &memFile{data: bytes.Clone(model)}
		f := &memFile{}
		d, err := CreateDelta(ctx, f, createType, capacity)
		if err != nil {
			rt.Fatal(err)
		}
		chain := func(running *Delta) *Chain {
			c, err := OpenChain(ctx, []LinkSource{
				{Name: "base", Descriptor: describe(TypeVMFS, capacity, 1, NoParent), Files: []File{base.file()}},
				{Name: "link", Descriptor: describe(createType, capacity, 2, 1), Files: []File{f.file()}, Running: running},
			}, ChainOptions{})
			if err != nil {
				rt.Fatal(err)
			}
			return c
		}
		held := make([]byte, capacity) // 1 where the link must hold the byte
		for i := range rapid.IntRange(1, 12).Draw(rt, "writes") {
			off := rapid.Int64Range(0, capacity-1).Draw(rt, "off")
			n := rapid.Int64Range(1, min(capacity-off, 3<<20)).Draw(rt, "n")
			if rapid.Bool().Draw(rt, "aligned") {
				off -= off % 4096
				n = min((n+4095)/4096*4096, capacity-off)
			}
			copy(held[off:off+n], ones[:n])
			if rapid.IntRange(0, 3).Draw(rt, "zero") == 0 {
				clear(model[off : off+n])
				err = d.Zero(ctx, off, n, base)
			} else {
				p := model[off : off+n]
				fill(rand.New(rand.NewPCG(uint64(i), 9)), p)
				err = d.WriteAt(ctx, p, off, base)
			}
			if err != nil {
				rt.Fatal(err)
			}
			if rapid.IntRange(0, 4).Draw(rt, "reopen") == 0 {
				if d, err = OpenDelta(ctx, f, int64(len(f.data)), createType); err != nil {
					rt.Fatal(err)
				}
			}
		}
		for _, c := range []*Chain{chain(d), chain(nil)} {
			if got := readAll(t, c); !bytes.Equal(got, model) {
				rt.Fatal("the chain reads differently from what was written")
			}
			if got := readAll(t, c.At(0)); !bytes.Equal(got, base.data) {
				rt.Fatal("the parent does not read as it was")
			}
			// What the link tells it holds covers what was written.
			for off := int64(0); ; {
				a, _, err := c.Held(ctx, 1, off)
				if errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					rt.Fatal(err)
				}
				clear(held[a.Offset:a.End()])
				off = a.End()
			}
			if bytes.IndexByte(held, 1) >= 0 {
				rt.Fatal("the link holds less than was written to it")
			}
		}
	})
}

// TestDeltaHeaders: fields at the places that the formats' other readers look at.
func TestDeltaHeaders(t *testing.T) {
	ctx := context.Background()
	f := &memFile{}
	_, err := CreateDelta(ctx, f, TypeVMFSSparse, 2<<30+512)
	must(t, err)
	le := binary.LittleEndian
	var cowd []uint32
	for i := 0; i < 32; i += 4 {
		cowd = append(cowd, le.Uint32(f.data[i:]))
	}
	// 1025 tables take 4100 bytes: nine sectors behind the four of the header.
	for i, want := range []uint32{0x44574f43, 1, 3, 4<<20 + 1, 1, 4, 1025, 13} {
		if cowd[i] != want {
			t.Errorf("COWD header at %d: %d, want %d", 4*i, cowd[i], want)
		}
	}
	f = &memFile{}
	_, err = CreateDelta(ctx, f, TypeSESparse, 40<<20+512)
	must(t, err)
	for off, want := range map[int]uint64{
		0: 0xcafebabe, 8: 0x200000001, 16: 80<<10 + 1, 24: 8, 32: 64, 40: 0, 80: 1, 88: 1, 128: 4096, 136: 1, 144: 6144, 152: 3 * 64,
		512: 0xcafecafe, 520: 0, 536: 0,
	} {
		if got := le.Uint64(f.data[off:]); got != want {
			t.Errorf("SEsparse header at %d: %#x, want %#x", off, got, want)
		}
	}
	if _, err := CreateDelta(ctx, &memFile{}, TypeVMFSSparse, 2<<40); !errors.Is(err, ErrUnsupported) {
		t.Errorf("COWD of 2 TiB: %v", err)
	}
	if _, err := CreateDelta(ctx, &memFile{}, TypeSESparse, 65<<40); !errors.Is(err, ErrUnsupported) {
		t.Errorf("SEsparse of 65 TiB: %v", err)
	}
	if _, err := CreateDelta(ctx, &memFile{}, TypeSESparse, 1000); err == nil {
		t.Error("a link of 1000 bytes was made")
	}
}

// TestSESparseGrainNumbers: the two halves of a grain's number, far beyond what a test could write.
func TestSESparseGrainNumbers(t *testing.T) {
	w := &seWriter{layout: seLayout{GrainsAt: 2048}}
	ctx := context.Background()
	f := &memFile{}
	d, err := CreateDelta(ctx, f, TypeSESparse, 1<<20)
	must(t, err)
	grains := d.ext.(*sesparse).grains
	start := int64(d.ext.(*sesparse).layout.GrainsAt) * SectorSize
	for _, n := range []int64{0, 1, 0xfff, 0x1000, 0x12345678, 1 << 33} {
		e := w.grainEntry(2048*SectorSize + n*4096)
		k, at, err := grains.grainAt(e)
		if err != nil || k != data || at != start+n*4096 {
			t.Errorf("grain %#x: entry %#x is kind %d at %d: %v", n, e, k, at, err)
		}
	}
	if e := w.grainEntry(2048*SectorSize + 0x1234567*4096); e != 0x3567000000001234 {
		t.Errorf("entry %#x", e)
	}
	for _, e := range []uint64{1 << 60, 2 << 60, 1<<60 | 5} {
		if k, _, err := grains.grainAt(e); err != nil || k != zero {
			t.Errorf("entry %#x: kind %d, %v", e, k, err)
		}
	}
	for _, e := range []uint64{5, 4 << 60, 15 << 60} {
		if _, _, err := grains.grainAt(e); err == nil {
			t.Errorf("entry %#x was accepted", e)
		}
	}
}

// TestRefused: links in a state that only the host may resolve.
func TestRefused(t *testing.T) {
	ctx := context.Background()
	f := &memFile{}
	_, err := CreateDelta(ctx, f, TypeSESparse, 1<<20)
	must(t, err)
	open := func(createType string, data []byte) error {
		m := &memFile{data: data}
		_, err := OpenChain(ctx, []LinkSource{{Name: "x", Descriptor: describe(createType, 1<<20, 1, NoParent), Files: []File{m.file()}}},
			ChainOptions{})
		return err
	}
	must(t, open(TypeSESparse, f.data))
	change := func(off int, v byte) []byte { p := bytes.Clone(f.data); p[off] = v; return p }
	for name, c := range map[string]struct {
		data []byte
		want error
	}{
		"journal":     {change(512+24, 1), ErrUnsupported},
		"version":     {change(8, 2), ErrUnsupported},
		"grain size":  {change(24, 16), ErrUnsupported},
		"padding":     {change(300, 1), ErrUnsupported},
		"magic":       {change(0, 1), ErrFormat},
		"volatile":    {change(512, 1), ErrFormat},
		"capacity":    {change(17, 9), ErrFormat},
		"cut":         {f.data[:700], ErrFormat},
		"cut shorter": {f.data[:100], ErrFormat},
	} {
		if err := open(TypeSESparse, c.data); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cowd := &memFile{}
	_, err = CreateDelta(ctx, cowd, TypeVMFSSparse, 1<<20)
	must(t, err)
	for off, want := range map[int]error{0: ErrFormat, 4: ErrUnsupported, 13: ErrFormat, 16: nil} {
		p := bytes.Clone(cowd.data)
		p[off]++
		if err := open(TypeVMFSSparse, p); !errors.Is(err, want) {
			t.Errorf("COWD with byte %d changed: %v", off, err)
		}
	}
	if err := open(TypeVMFSSparse, f.data); !errors.Is(err, ErrFormat) {
		t.Errorf("SEsparse as COWD: %v", err)
	}
}

// seed makes a small link with data and zeros in it.
func seed(t testing.TB, createType string) []byte {
	ctx := context.Background()
	f := &memFile{}
	d, err := CreateDelta(ctx, f, createType, 20<<10)
	must(t, err)
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{7}, 5000), 3000, nil))
	must(t, d.Zero(ctx, 8192, 4096, nil))
	return f.data
}

// sparseTail keeps the head of a file and lets the rest read as zeros, so that the fuzzer changes what matters.
type sparseTail struct {
	head []byte
	at   int64 // where tail begins
	tail []byte
}

func (s sparseTail) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	end := s.at + int64(len(s.tail))
	n := min(int64(len(p)), max(end-off, 0))
	clear(p[:n])
	if off < int64(len(s.head)) {
		copy(p[:n], s.head[off:])
	}
	if off+n > s.at {
		copy(p[max(s.at-off, 0):n], s.tail[max(off-s.at, 0):])
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// fuzzExtent opens bytes as an extent of a type and reads what it gives, within bounds.
func fuzzExtent(t *testing.T, f File, createType string) {
	ctx := context.Background()
	cache := newPageCache(1 << 20)
	src := &source{File: f, name: "fuzz"}
	var x extent
	var err error
	switch createType {
	case TypeVMFSSparse:
		x, err = openCOWD(ctx, src, cache)
	case TypeSESparse:
		x, err = openSESparse(ctx, src, cache)
	default:
		x, err = openHosted(ctx, src, cache)
	}
	if x == nil || err != nil {
		return
	}
	c := &Chain{links: []*link{{}}, size: x.capacity(), gap: defaultGap}
	c.links[0].add(x)
	c.scratch.New = newScratch
	p := make([]byte, 100<<10)
	for _, off := range []int64{0, c.size / 2, c.size - 70_000, c.size - 1} {
		if n, err := c.ReadAt(p, max(off, 0)); err == nil && n != len(p) {
			t.Fatalf("%d bytes without an error", n)
		}
	}
	var off int64
	for range 50 {
		start, end, err := c.NextData(ctx, off)
		if err != nil {
			break
		}
		if start < off || end <= start || end > c.size {
			t.Fatalf("data at [%d,%d) after %d of %d", start, end, off, c.size)
		}
		off = end
	}
	if cache.bytes > 1<<20+maxPage {
		t.Fatalf("%d bytes of tables are kept", cache.bytes)
	}
}

func FuzzCOWD(f *testing.F) {
	f.Add(seed(f, TypeVMFSSparse))
	f.Add([]byte(cowdMagic))
	f.Fuzz(func(t *testing.T, p []byte) {
		fuzzExtent(t, (&memFile{data: p}).file(), TypeVMFSSparse)
		fuzzExtent(t, File{R: &memFile{data: p}, Size: -1}, TypeVMFSSparse)
	})
}

func FuzzSESparse(f *testing.F) {
	p := seed(f, TypeSESparse)
	// Header, directory, table and grains are far apart: the fuzzer gets them side by side.
	f.Add(p[:1024], p[4096*512:])
	f.Add([]byte{0xbe, 0xba, 0xfe, 0xca}, []byte{})
	f.Fuzz(func(t *testing.T, head, tail []byte) {
		s := sparseTail{head, 4096 * 512, tail}
		fuzzExtent(t, File{R: s, Size: s.at + int64(len(tail))}, TypeSESparse)
		fuzzExtent(t, File{R: s, Size: -1}, TypeSESparse)
	})
}

// TestConcurrentReads: a chain serves many readers with a cache smaller than its tables.
func TestConcurrentReads(t *testing.T) {
	ctx := context.Background()
	const capacity = 20 << 20
	model := make([]byte, capacity)
	fill(rand.New(rand.NewPCG(5, 5)), model)
	f := &memFile{}
	d, err := CreateDelta(ctx, f, TypeVMFSSparse, capacity)
	must(t, err)
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(capacity >> 16) {
		must(t, d.WriteAt(ctx, model[i<<16:(i+1)<<16], int64(i)<<16, nil))
	}
	c, err := OpenChain(ctx, []LinkSource{{Name: "x", Descriptor: describe(TypeVMFSSparse, capacity, 1, NoParent), Files: []File{f.file()}}},
		ChainOptions{CacheBytes: 40 << 10})
	must(t, err)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			p := make([]byte, 700<<10)
			for range 30 {
				off := rng.IntN(capacity - len(p))
				if _, err := c.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, model[off:off+len(p)]) {
					t.Errorf("read at %d: %v", off, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestZeroEntryOfCOWD: the format has an entry for zeros, which hide what the parent has.
func TestZeroEntryOfCOWD(t *testing.T) {
	ctx := context.Background()
	const size = 1 << 20
	base, f := &memFile{data: bytes.Repeat([]byte{7}, size)}, &memFile{}
	d, err := CreateDelta(ctx, f, TypeVMFSSparse, size)
	must(t, err)
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, 512), 512, base))
	at, err := d.g.table(ctx, 0)
	must(t, err)
	binary.LittleEndian.PutUint32(f.data[at+8:], 1)
	c, err := OpenChain(ctx, []LinkSource{
		{Name: "base", Descriptor: describe(TypeVMFS, size, 1, NoParent), Files: []File{base.file()}},
		{Name: "link", Descriptor: describe(TypeVMFSSparse, size, 2, 1), Files: []File{f.file()}},
	}, ChainOptions{})
	must(t, err)
	p := make([]byte, 2048)
	_, err = c.ReadAt(p, 0)
	must(t, err)
	want := bytes.Join([][]byte{
		bytes.Repeat([]byte{7}, 512), bytes.Repeat([]byte{1}, 512), make([]byte, 512), bytes.Repeat([]byte{7}, 512),
	}, nil)
	same(t, "chain", p, want)
	if a, isZero, err := c.Held(ctx, 1, 1024); err != nil || !isZero || a != (Area{1024, 512}) {
		t.Errorf("held: %+v, zeros %v, %v", a, isZero, err)
	}
}
