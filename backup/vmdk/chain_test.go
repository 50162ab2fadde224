package vmdk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

func TestChainRefusals(t *testing.T) {
	const size = 1 << 20
	f := (&memFile{data: make([]byte, size)}).file()
	delta := &memFile{}
	_, err := CreateDelta(context.Background(), delta, TypeSESparse, size)
	must(t, err)
	base := func() LinkSource {
		return LinkSource{Name: "base", Descriptor: describe(TypeVMFS, size, 1, NoParent), Files: []File{f}}
	}
	link := func(change func(*LinkSource)) LinkSource {
		l := LinkSource{Name: "link", Descriptor: describe(TypeSESparse, size, 2, 1), Files: []File{delta.file()}}
		change(&l)
		return l
	}
	same := func(*LinkSource) {}
	for name, c := range map[string]struct {
		links []LinkSource
		want  error
	}{
		"good":            {[]LinkSource{base(), link(same)}, nil},
		"nothing":         {nil, ErrChain},
		"parent missing":  {[]LinkSource{link(same)}, ErrChain},
		"parent changed":  {[]LinkSource{base(), link(func(l *LinkSource) { l.Descriptor.ParentCID = 9 })}, ErrChain},
		"order":           {[]LinkSource{link(same), base()}, ErrChain},
		"file missing":    {[]LinkSource{base(), link(func(l *LinkSource) { l.Files = nil })}, ErrChain},
		"no reader":       {[]LinkSource{base(), link(func(l *LinkSource) { l.Files[0].R = nil })}, ErrChain},
		"no descriptor":   {[]LinkSource{{Name: "x"}}, ErrChain},
		"another size":    {[]LinkSource{base(), link(func(l *LinkSource) { l.Descriptor.Extents[0].Sectors-- })}, ErrFormat},
		"raw device":      {[]LinkSource{base(), link(func(l *LinkSource) { l.Descriptor.Extents[0].Type = "VMFSRDM" })}, ErrUnsupported},
		"unknown extent":  {[]LinkSource{base(), link(func(l *LinkSource) { l.Descriptor.Extents[0].Type = "NEW" })}, ErrUnsupported},
		"no access":       {[]LinkSource{base(), link(func(l *LinkSource) { l.Descriptor.Extents[0].Access = "NOACCESS" })}, ErrUnsupported},
		"flat file short": {[]LinkSource{{Name: "b", Descriptor: describe(TypeVMFS, size+512, 1, NoParent), Files: []File{f}}}, ErrFormat},
	} {
		if _, err := OpenChain(context.Background(), c.links, ChainOptions{}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	small := base()
	small.Descriptor = describe(TypeVMFS, size/2, 1, NoParent)
	if _, err := OpenChain(context.Background(), []LinkSource{small, link(same)}, ChainOptions{}); !errors.Is(err, ErrChain) {
		t.Errorf("a grown disk: %v", err)
	}
}

// TestExtents: several extents, offsets, zeros.
func TestExtents(t *testing.T) {
	a, b := &memFile{data: make([]byte, 4096)}, &memFile{data: make([]byte, 3000*512)}
	rng := rand.New(rand.NewPCG(4, 4))
	fill(rng, a.data)
	fill(rng, b.data)
	d := &Descriptor{Version: 1, ParentCID: NoParent, CreateType: "twoGbMaxExtentFlat", Extents: []Extent{
		{"RW", 7, ExtentFlat, "a", 1}, {"RW", 100, ExtentZero, "", 0}, {"RDONLY", 2000, ExtentFlat, "b", 1000}, {"RW", 1, ExtentVMFS, "a", 0},
	}}
	c, err := OpenChain(context.Background(), []LinkSource{{Descriptor: d, Files: []File{a.file(), {}, b.file(), a.file()}}}, ChainOptions{})
	must(t, err)
	want := bytes.Join([][]byte{a.data[512:], make([]byte, 100*512), b.data[1000*512:], a.data[:512]}, nil)
	same(t, "extents", readAll(t, c), want)
	if areas := outsideIsZero(t, c, want); len(areas) != 2 {
		t.Fatalf("areas %v", areas)
	}
}

// TestFewReads is what a host is spared: opening reads headers only, consecutive grains come with one read, neighbouring tables
// too, and a second read finds all tables in memory.
func TestFewReads(t *testing.T) {
	ctx := context.Background()
	const size = 256 << 20
	base := &memFile{data: make([]byte, size)}
	for _, createType := range deltaTypes {
		f := &memFile{}
		d, err := CreateDelta(ctx, f, createType, size)
		must(t, err)
		block := bytes.Repeat([]byte{5}, 1<<20)
		for off := int64(0); off < 32<<20; off += int64(len(block)) {
			must(t, d.WriteAt(ctx, block, off, nil))
		}
		// Single blocks, from the end to the beginning, at every second 64 KiB.
		for off := int64(100<<20 - 128<<10); off >= 98<<20; off -= 128 << 10 {
			must(t, d.WriteAt(ctx, block[:64<<10], off, nil))
		}
		var c *Chain
		open := func(gap int) []Area {
			return f.counted(func() {
				var err error
				c, err = OpenChain(ctx, []LinkSource{
					{Name: "b", Descriptor: describe(TypeVMFS, size, 1, NoParent), Files: []File{base.file()}},
					{Name: "l", Descriptor: describe(createType, size, 2, 1), Files: []File{f.file()}},
				}, ChainOptions{ReadGap: gap})
				must(t, err)
			})
		}
		if reads := open(0); len(reads) > 2 || reads[0].Length > 512 {
			t.Errorf("%s: opening read %v", createType, reads)
		}
		p := make([]byte, 32<<20)
		read := func(p []byte, off int64) (link, parent []Area) {
			parent = base.counted(func() {
				link = f.counted(func() {
					_, err := c.ReadAt(p, off)
					must(t, err)
				})
			})
			return link, parent
		}
		// 32 MiB of consecutive grains: a page of the directory, the tables, the data. COWD has a table of 16 KiB before
		// every 2 MiB of grains, so its data is 16 runs.
		limit := map[string]int{TypeSESparse: 3, TypeVMFSSparse: 1 + 16 + 16}[createType]
		link, parent := read(p, 0)
		if len(link) > limit || len(parent) > 0 {
			t.Errorf("%s: 32 MiB took %d reads, and %d of the parent: %v", createType, len(link), len(parent), link)
		}
		same(t, createType, p, bytes.Repeat([]byte{5}, len(p)))
		limit -= map[string]int{TypeSESparse: 2, TypeVMFSSparse: 17}[createType]
		if link, _ := read(p, 0); len(link) > limit {
			t.Errorf("%s: again took %d reads: %v", createType, len(link), link)
		}
		// Where the link has nothing the parent is read with one read.
		if link, parent := read(p, 200<<20); len(link) > 0 || len(parent) != 1 {
			t.Errorf("%s: nothing there took %d reads, %d of the parent", createType, len(link), len(parent))
		}
		// The scattered blocks lie backwards but together in the file: one read fetches them, and with a gap allowed one their neighbours.
		link, parent = read(p[:2<<20], 98<<20)
		if len(link) > 2 || len(parent) != 16 {
			t.Errorf("%s: scattered blocks took %d reads, %d of the parent", createType, len(link), len(parent))
		}
		open(64 << 10)
		if link, parent = read(p[:2<<20], 98<<20); len(parent) != 1 || len(link) > 3 {
			t.Errorf("%s: with a gap of 64 KiB %d reads, %d of the parent", createType, len(link), len(parent))
		}
		for i := range p[:2<<20] {
			if want := byte(5) * byte(1-i>>16&1); p[i] != want {
				t.Fatalf("%s: scattered blocks: %d at %d, want %d", createType, p[i], i, want)
			}
		}
		// Looking for what the link holds reads no grains.
		open(0)
		var held int64
		reads := f.counted(func() {
			for off := int64(0); ; {
				a, _, err := c.Held(ctx, 1, off)
				if errors.Is(err, io.EOF) {
					return
				}
				must(t, err)
				held += a.Length
				off = a.End()
			}
		})
		if held != 33<<20 || len(reads) > 40 {
			t.Errorf("%s: holds %d bytes, told by %d reads", createType, held, len(reads))
		}
	}
}

// ctxFile is a file whose reads take a context.
type ctxFile struct {
	*memFile
	seen []context.Context
}

func (c *ctxFile) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	c.seen = append(c.seen, ctx)
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return c.ReadAt(p, off)
}

// TestContext: the caller's context reaches every read, and one caller's cancelled context spoils nothing for the next.
func TestContext(t *testing.T) {
	f := &memFile{}
	d, err := CreateDelta(context.Background(), f, TypeSESparse, 40<<20)
	must(t, err)
	must(t, d.WriteAt(context.Background(), bytes.Repeat([]byte{1}, 20<<20), 0, nil))
	x := &ctxFile{memFile: f}
	c, err := OpenChain(context.Background(), []LinkSource{{
		Descriptor: describe(TypeSESparse, 40<<20, 1, NoParent), Files: []File{{R: x, Size: int64(len(f.data))}},
	}}, ChainOptions{})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p := make([]byte, 20<<20)
	x.seen = nil
	if _, err := c.ReadAtContext(ctx, p, 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if len(x.seen) == 0 || x.seen[0] != ctx {
		t.Fatal("the context did not arrive")
	}
	if n, err := c.ReadAtContext(context.Background(), p, 0); n != len(p) || err != nil {
		t.Fatalf("after that: %d bytes, %v", n, err)
	}
	if _, err := c.ReadAt(p[:1], -1); err == nil {
		t.Fatal("read at -1")
	}
}

// TestDamagedTables: what points outside is an error, where it is, and only there.
func TestDamagedTables(t *testing.T) {
	ctx := context.Background()
	for _, createType := range deltaTypes {
		f := &memFile{}
		d, err := CreateDelta(ctx, f, createType, 40<<20)
		must(t, err)
		must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, 64<<10), 0, nil))
		must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, 64<<10), 32<<20, nil))
		at, err := d.g.table(ctx, 0)
		must(t, err)
		copy(f.data[at+8:], bytes.Repeat([]byte{0xf3}, 8))
		c, err := OpenChain(ctx, []LinkSource{{Descriptor: describe(createType, 40<<20, 1, NoParent), Files: []File{f.file()}}}, ChainOptions{})
		must(t, err)
		p := make([]byte, 64<<10)
		if _, err := c.ReadAt(p, 0); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: damaged entry: %v", createType, err)
		}
		if _, err := c.ReadAt(p, 32<<20); err != nil || p[0] != 2 {
			t.Errorf("%s: elsewhere: %v", createType, err)
		}
	}
}
