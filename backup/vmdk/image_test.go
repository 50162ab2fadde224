package vmdk

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pattern is a disk with data, zeros that are written, and holes: sizes in KiB.
func pattern(size int64) []byte {
	rng := rand.New(rand.NewPCG(8, 8))
	p := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(1+rng.Int64N(300<<10), size-off)
		switch rng.IntN(3) {
		case 0:
			fill(rng, p[off:off+n])
		case 1:
			copy(p[off:off+n], bytes.Repeat([]byte("compressible "), int(n)/13+1))
		}
		off += n
	}
	return p
}

func readImage(t *testing.T, i *Image) []byte {
	t.Helper()
	p := readAll(t, i.chain)
	outsideIsZero(t, i.chain, p)
	return p
}

// TestQemuImages reads what qemu-img writes, in all its subformats, with sizes that end inside a grain.
func TestQemuImages(t *testing.T) {
	qemu := needQemu(t)
	for _, size := range []int64{5<<20 + 3*512, 512, 33 << 20} {
		content := pattern(size)
		dir := t.TempDir()
		raw := filepath.Join(dir, "in.raw")
		must(t, os.WriteFile(raw, content, 0o600))
		for _, format := range []string{
			"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized",
		} {
			for _, zeroed := range []string{"off", "on"} {
				if zeroed == "on" && (strings.HasSuffix(format, "Flat") || size > 10<<20) || size > 10<<20 && strings.HasPrefix(format, "two") {
					continue
				}
				options := "subformat=" + format
				if zeroed == "on" {
					options += ",zeroed_grain=on"
				}
				name := filepath.Join(dir, format+zeroed+".vmdk")
				run(t, qemu, "convert", "-f", "raw", "-O", "vmdk", "-o", options, raw, name)
				i, err := OpenImage(name)
				if err != nil {
					t.Fatalf("%s: %v", format, err)
				}
				if i.Kind() != format || i.Capacity() != size {
					t.Errorf("%s of %d bytes opened as %s of %d", format, size, i.Kind(), i.Capacity())
				}
				same(t, fmt.Sprintf("%s, zeroed grains %s, %d bytes", format, zeroed, size), readImage(t, i), content)
				must(t, i.Close())
			}
		}
	}
}

// TestQemuSnapshots reads a hosted chain as qemu-img makes it: images over images, all kept sparse.
func TestQemuSnapshots(t *testing.T) {
	qemu := needQemu(t)
	const size = 5 << 20
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	content := pattern(size)
	must(t, os.WriteFile(at("in.raw"), content, 0o600))
	run(t, qemu, "convert", "-O", "vmdk", "-o", "subformat=monolithicSparse", at("in.raw"), at("a.vmdk"))
	run(t, qemu, "create", "-f", "vmdk", "-b", at("a.vmdk"), "-F", "vmdk", at("b.vmdk"))
	content2 := bytes.Clone(content)
	fill(rand.New(rand.NewPCG(2, 2)), content2[1<<20:2<<20])
	must(t, os.WriteFile(at("in2.raw"), content2, 0o600))
	run(t, qemu, "convert", "-O", "vmdk", "-B", at("b.vmdk"), "-F", "vmdk", at("in2.raw"), at("c.vmdk"))
	for name, want := range map[string][]byte{"a.vmdk": content, "b.vmdk": content, "c.vmdk": content2} {
		i, err := OpenImage(at(name))
		must(t, err)
		same(t, name, readImage(t, i), want)
		must(t, i.Close())
	}
	// The parent changes behind its child's back.
	p, err := os.ReadFile(at("a.vmdk"))
	must(t, err)
	must(t, os.WriteFile(at("a.vmdk"), bytes.Replace(p, []byte("\nCID="), []byte("\nCID=1"), 1), 0o600))
	if _, err := OpenImage(at("c.vmdk")); !errors.Is(err, ErrChain) && !errors.Is(err, ErrFormat) {
		t.Errorf("a changed parent: %v", err)
	}
	must(t, os.Remove(at("a.vmdk")))
	if _, err := OpenImage(at("c.vmdk")); !errors.Is(err, ErrChain) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing parent: %v", err)
	}
}

// streamOptimized writes a file as OVF tools do: in one pass, tables and directory behind the grains, their places in a footer.
func streamOptimized(t testing.TB, content []byte, marker bool) []byte {
	const grain = 16
	sectors := uint64(len(content)) / SectorSize
	flags := uint32(hostedFlagLines | hostedFlagPacked)
	if marker {
		flags |= hostedFlagMarker
	}
	h := hostedLayout{
		Version: 3, Flags: flags, Capacity: sectors, Grain: grain, DescAt: 1, DescSectors: 20, PerTable: 512,
		DirectoryAt: hostedGDAtEnd, Overhead: 24, Lines: [4]byte{'\n', ' ', '\r', '\n'}, Compression: 1,
	}
	header := func() []byte {
		p, err := binary.Append([]byte(hostedMagic), binary.LittleEndian, &h)
		must(t, err)
		return append(p, make([]byte, SectorSize-len(p))...)
	}
	out := header()
	pad := func() uint64 {
		out = append(out, make([]byte, -len(out)&(SectorSize-1))...)
		return uint64(len(out)) / SectorSize
	}
	d := describe("monolithicSparse", int64(len(content)), 1, NoParent)
	d.CreateType = "streamOptimized"
	out = append(out, d.Bytes()...)
	out = append(out, make([]byte, int(h.Overhead)*SectorSize-len(out))...)
	special := func(value uint64, kind uint32) {
		pad()
		m := binary.LittleEndian.AppendUint64(nil, value)
		m = binary.LittleEndian.AppendUint32(m, 0)
		out = append(out, binary.LittleEndian.AppendUint32(m, kind)...)
		pad()
	}
	var directory []uint32
	for first := uint64(0); first < sectors; first += grain * uint64(h.PerTable) {
		table := make([]uint32, h.PerTable)
		any := false
		for g := range table {
			lba := first + uint64(g)*grain
			if lba >= sectors {
				break
			}
			data := content[lba*SectorSize : min((lba+grain)*SectorSize, uint64(len(content)))]
			if len(bytes.Trim(data, "\x00")) == 0 {
				continue
			}
			any = true
			table[g] = uint32(pad())
			var z bytes.Buffer
			w := zlib.NewWriter(&z)
			// The last grain is written whole, as VMware does.
			_, err := w.Write(append(bytes.Clone(data), make([]byte, grain*SectorSize-len(data))...))
			must(t, errors.Join(err, w.Close()))
			if marker {
				out = binary.LittleEndian.AppendUint64(out, lba)
				out = binary.LittleEndian.AppendUint32(out, uint32(z.Len()))
			}
			out = append(out, z.Bytes()...)
		}
		if !any {
			directory = append(directory, 0)
			continue
		}
		special(uint64(h.PerTable)*4/SectorSize, 1)
		directory = append(directory, uint32(pad()))
		out, _ = binary.Append(out, binary.LittleEndian, table)
	}
	special(1, 2)
	h.DirectoryAt = pad()
	out, _ = binary.Append(out, binary.LittleEndian, directory)
	special(1, hostedFooterMark)
	out = append(out, header()...)
	special(0, 0)
	return out
}

// TestFooter: streamOptimized files with the directory in a footer, against qemu-img and against damage.
func TestFooter(t *testing.T) {
	content := pattern(11<<20 + 512)
	clear(content[3<<20 : 9<<20]) // a table that is not there
	dir := t.TempDir()
	write := func(name string, p []byte) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, p, 0o600))
		return path
	}
	file := streamOptimized(t, content, true)
	path := write("ova.vmdk", file)
	i, err := OpenImage(path)
	must(t, err)
	if i.Kind() != "streamOptimized" {
		t.Errorf("kind %s", i.Kind())
	}
	same(t, "with markers", readImage(t, i), content)
	// At any place and length, in no order.
	rng := rand.New(rand.NewPCG(6, 6))
	for range 100 {
		off := rng.Int64N(int64(len(content)))
		p := make([]byte, min(rng.Int64N(400<<10), int64(len(content))-off))
		if _, err := i.ReadAt(p, off); err != nil || !bytes.Equal(p, content[off:off+int64(len(p))]) {
			t.Fatalf("%d bytes at %d: %v", len(p), off, err)
		}
	}
	must(t, i.Close())
	i, err = OpenImage(write("plain.vmdk", streamOptimized(t, content, false)))
	must(t, err)
	same(t, "without markers", readImage(t, i), content)
	must(t, i.Close())

	for name, p := range map[string][]byte{
		"cut": file[:len(file)-5000], "cut at a sector": file[:len(file)-512], "header only": file[:512], "as text": bytes.Replace(file, []byte("\n \r\n"), []byte("\n \n\n"), 2),
	} {
		if _, err := OpenImage(write("bad.vmdk", p)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A flipped bit in a grain's stream does not pass.
	bad := bytes.Clone(file)
	bad[24*SectorSize+12+200] ^= 4
	i, err = OpenImage(write("bad.vmdk", bad))
	must(t, err)
	defer i.Close()
	start, _, err := i.NextData(context.Background(), 0)
	must(t, err)
	if _, err := i.ReadAt(make([]byte, 4096), start); !errors.Is(err, ErrFormat) {
		t.Errorf("a flipped bit: %v", err)
	}
	if _, err := i.ReadAt(make([]byte, 4096), 10<<20); err != nil {
		t.Errorf("elsewhere: %v", err)
	}
	same(t, "qemu-img", convert(t, needQemu(t), path), content)
}

// TestRawImages: raw and flat files by themselves, of odd length, with holes.
func TestRawImages(t *testing.T) {
	dir := t.TempDir()
	content := bytes.Repeat([]byte("raw "), 1000)
	for _, name := range []string{"disk.raw", "web-flat.vmdk"} {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		must(t, err)
		const far = 900 << 30
		_, err = f.WriteAt(content, 1<<20)
		must(t, err)
		_, err = f.WriteAt(content[:4000-77], far)
		must(t, err)
		must(t, f.Close())
		i, err := OpenImage(path)
		must(t, err)
		want := "raw"
		if strings.HasSuffix(name, "-flat.vmdk") {
			want = "flat"
		}
		if i.Kind() != want || i.Capacity() != far+4096 {
			t.Errorf("%s: %s of %d bytes", name, i.Kind(), i.Capacity())
		}
		areas, err := i.Allocated(context.Background())
		must(t, err)
		var total int64
		for _, a := range areas {
			total += a.Length
			if a.Offset == far && a.Length != 4096 {
				t.Errorf("the end is %+v: the last sector is whole", a)
			}
		}
		if len(areas) != 2 || total < 8000 || total > 1<<20 {
			t.Errorf("%s: data at %v", name, areas)
		}
		p := make([]byte, 5000)
		if n, err := i.ReadAt(p, far); n != 4096 || !errors.Is(err, io.EOF) || !bytes.Equal(p[:4000-77], content[:4000-77]) ||
			len(bytes.Trim(p[4000-77:4096], "\x00")) != 0 {
			t.Errorf("%s: the end: %d bytes, %v", name, n, err)
		}
		must(t, i.Close())
	}
}

// TestForeignImages: what would be taken for a raw disk by a program that does not look.
func TestForeignImages(t *testing.T) {
	dir := t.TempDir()
	pad := make([]byte, 4096)
	vdi := make([]byte, 4096)
	copy(vdi, "<<< Oracle VM VirtualBox Disk Image >>>\n")
	copy(vdi[64:], "\x7f\x10\xda\xbe")
	cowd, se := &memFile{}, &memFile{}
	for f, createType := range map[*memFile]string{cowd: TypeVMFSSparse, se: TypeSESparse} {
		_, err := CreateDelta(context.Background(), f, createType, 1<<20)
		must(t, err)
	}
	for name, c := range map[string]struct {
		data []byte
		says string
	}{
		"a.qcow2": {append([]byte("QFI\xfb\x00\x00\x00\x03"), pad...), "qemu-img convert"},
		"a.vhd":   {append([]byte("conectix"), pad...), "qemu-img convert"},
		"fix.vhd": {append(append(bytes.Clone(pad), "conectix"...), make([]byte, 504)...), "qemu-img convert"},
		"a.vhdx":  {append([]byte("vhdxfile"), pad...), "qemu-img convert"},
		"a.vdi":   {vdi, "qemu-img convert"},
		"a.qed":   {append([]byte("QED\x00"), pad...), "qemu-img convert"},
		"a.hdd":   {append([]byte("WithoutFreeSpace"), pad...), "qemu-img convert"},
		"a.gz":    {append([]byte("\x1f\x8b\x08"), pad...), "unpack"},
		"a.xz":    {append([]byte("\xfd7zXZ\x00"), pad...), "unpack"},
		"a.zst":   {append([]byte("\x28\xb5\x2f\xfd"), pad...), "unpack"},
		"a.bz2":   {append([]byte("BZh91AY&SY"), pad...), "unpack"},
		"ctk":     {append([]byte("\xa2\x72\x19\xf6"), pad...), "change tracking"},
		"cowd":    {cowd.data, "descriptor"},
		"se":      {se.data[:4096], "descriptor"},
	} {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, c.data, 0o600))
		if _, err := OpenImage(path); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600))
	for name, want := range map[string]string{"empty": "empty", "missing": "no such file", ".": "not a file"} {
		if _, err := OpenImage(filepath.Join(dir, name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := OpenImage("/dev/null"); err == nil {
		t.Error("/dev/null was opened")
	}
	// A link that is its own parent.
	loop := describe(TypeVMFS, 4096, 1, 1)
	loop.ParentFileNameHint, loop.Extents[0].File = "loop.vmdk", "empty"
	must(t, os.WriteFile(filepath.Join(dir, "loop.vmdk"), loop.Bytes(), 0o600))
	if _, err := OpenImage(filepath.Join(dir, "loop.vmdk")); !errors.Is(err, ErrChain) {
		t.Errorf("a loop: %v", err)
	}
}

// TestHostChainAsImage: a chain of a host on local files.
func TestHostChainAsImage(t *testing.T) {
	dir := t.TempDir()
	const size = 3<<20 + 512
	content := pattern(size)
	base := describe(TypeVMFS, size, 7, NoParent)
	base.Extents[0].File = "d-flat.vmdk"
	must(t, os.WriteFile(filepath.Join(dir, "d.vmdk"), base.Bytes(), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "d-flat.vmdk"), content, 0o600))
	f := &memFile{}
	d, err := CreateDelta(context.Background(), f, TypeVMFSSparse, size)
	must(t, err)
	must(t, d.WriteAt(context.Background(), []byte("changed"), 700_000, bytes.NewReader(content)))
	copy(content[700_000:], "changed")
	link := describe(TypeVMFSSparse, size, 8, 7)
	link.ParentFileNameHint, link.Extents[0].File = "d.vmdk", "d-000001-delta.vmdk"
	must(t, os.WriteFile(filepath.Join(dir, "d-000001.vmdk"), link.Bytes(), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "d-000001-delta.vmdk"), f.data, 0o600))
	i, err := OpenImage(filepath.Join(dir, "d-000001.vmdk"))
	must(t, err)
	defer i.Close()
	same(t, "chain", readImage(t, i), content)
	if i.Kind() != TypeVMFSSparse || i.Descriptor().CID != 8 {
		t.Errorf("%s, %+v", i.Kind(), i.Descriptor())
	}
}

func FuzzHosted(f *testing.F) {
	content := make([]byte, 100<<10)
	copy(content, "some data")
	for _, marker := range []bool{true, false} {
		p := streamOptimized(f, content, marker)
		f.Add(p)
		// Without the padding behind the descriptor, for the fuzzer's sake: broken, but near.
		f.Add(append(bytes.Clone(p[:512]), p[len(p)-4096:]...))
	}
	sparse := hostedLayout{Version: 1, Flags: 3, Capacity: 256, Grain: 128, PerTable: 512, DirectoryAt: 1, Overhead: 7, Lines: [4]byte{'\n', ' ', '\r', '\n'}}
	p, err := binary.Append([]byte(hostedMagic), binary.LittleEndian, &sparse)
	must(f, err)
	p = append(p, make([]byte, 512-len(p))...)
	p = append(append(p, 2, 0, 0, 0), make([]byte, 508)...)
	p = append(append(p, 6, 0, 0, 0, 1), make([]byte, 2000)...)
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		fuzzExtent(t, (&memFile{data: p}).file(), "hosted")
		_, _ = embeddedDescriptor(context.Background(), &source{File: (&memFile{data: p}).file(), name: "fuzz"})
	})
}

// TestLocalFile: a file with holes is read right at every edge between data and holes, also when they come and go.
func TestLocalFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sparse")
	out, err := os.Create(path)
	must(t, err)
	defer out.Close()
	const size = 8 << 20
	model := make([]byte, size)
	must(t, out.Truncate(size))
	in, err := os.Open(path)
	must(t, err)
	f, err := NewLocalFile(in)
	must(t, err)
	defer f.Close()
	rng := rand.New(rand.NewPCG(7, 7))
	for range 40 {
		off := rng.IntN(size)
		n := min(rng.IntN(100<<10), size-off)
		fill(rng, model[off:off+n])
		_, err := out.WriteAt(model[off:off+n], int64(off))
		must(t, err)
		for range 5 {
			off := rng.IntN(size)
			p := bytes.Repeat([]byte{0xff}, rng.IntN(1<<20))
			want := model[off:min(off+len(p), size)]
			n, err := f.ReadAt(p, int64(off))
			if n != len(want) || (n < len(p)) != errors.Is(err, io.EOF) || !bytes.Equal(p[:n], want) {
				t.Fatalf("%d bytes at %d: %d, %v", len(p), off, n, err)
			}
		}
	}
}
