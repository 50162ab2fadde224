package vmdk

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// TestMain asks rapid for fewer rounds than its hundred, which a disk's bytes make slow; -rapid.checks still decides.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("40"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: differs first at %d: %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

func needQemu(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		if os.Getenv("CI") == "" {
			t.Skip("qemu-img, the referee for VMDK files, is not installed: apt install qemu-utils")
		}
		t.Fatal("qemu-img, the referee for VMDK files, is not installed: apt install qemu-utils")
	}
	return path
}

func run(t testing.TB, command string, args ...string) {
	t.Helper()
	if out, err := exec.Command(command, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", command, args, err, out)
	}
}

// convert is an image's content in qemu-img's eyes.
func convert(t testing.TB, qemu, path string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	run(t, qemu, "convert", "-f", "vmdk", "-O", "raw", path, raw)
	p, err := os.ReadFile(raw)
	must(t, err)
	return p
}

// memFile is a file in memory that counts its reads.
type memFile struct {
	mu    sync.Mutex
	data  []byte
	reads []Area
}

func (m *memFile) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads = append(m.reads, Area{off, int64(len(p))})
	if off >= int64(len(m.data)) {
		return 0, io.EOF
	}
	n := copy(p, m.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memFile) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := off + int64(len(p)); n > int64(len(m.data)) {
		m.data = append(m.data, make([]byte, n-int64(len(m.data)))...)
	}
	return copy(m.data[off:], p), nil
}

func (m *memFile) file() File { return File{R: m, Size: int64(len(m.data))} }

// counted runs f and returns the reads it made.
func (m *memFile) counted(f func()) []Area {
	m.mu.Lock()
	m.reads = nil
	m.mu.Unlock()
	f()
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reads
}

// fill writes bytes that are never zero and that repeat at no power of two.
func fill(rng *rand.Rand, p []byte) {
	var block [4093]byte
	for i := range block {
		block[i] = byte(rng.Uint32()) | 1
	}
	for len(p) > 0 {
		p = p[copy(p, block[:]):]
	}
}

// describe makes a descriptor for a link of one extent.
func describe(createType string, capacity int64, cid, parent uint32) *Descriptor {
	extent := map[string]string{
		TypeVMFSSparse: ExtentVMFSSparse, TypeSESparse: ExtentSESparse, "monolithicSparse": ExtentSparse, TypeVMFS: ExtentVMFS,
	}[createType]
	return &Descriptor{
		Version: 1, CID: cid, ParentCID: parent, CreateType: createType,
		Extents: []Extent{{Access: "RW", Sectors: capacity / SectorSize, Type: extent, File: createType}},
	}
}

// readAll reads a disk in odd steps, and again around its end.
func readAll(t testing.TB, c *Chain) []byte {
	t.Helper()
	p := make([]byte, c.Capacity())
	const step = 300_007
	for off := 0; off < len(p); off += step {
		if n, err := c.ReadAt(p[off:min(off+step, len(p))], int64(off)); err != nil || n != min(step, len(p)-off) {
			t.Fatalf("read at %d: %d bytes, %v", off, n, err)
		}
	}
	if n, err := c.ReadAt(make([]byte, 2), c.Capacity()-1); n != 1 || !errors.Is(err, io.EOF) {
		t.Fatalf("across the end: %d bytes, %v", n, err)
	}
	if n, err := c.ReadAt(make([]byte, 2), c.Capacity()); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("behind the end: %d bytes, %v", n, err)
	}
	return p
}

// outsideIsZero checks that nothing but zeros is outside what NextData tells.
func outsideIsZero(t testing.TB, c *Chain, content []byte) []Area {
	t.Helper()
	areas, err := c.Allocated(context.Background())
	must(t, err)
	rest := bytes.Clone(content)
	end := int64(-1)
	for _, a := range areas {
		if a.Offset <= end || a.Length <= 0 || a.End() > c.Capacity() {
			t.Fatalf("areas %v", areas)
		}
		end = a.End()
		clear(rest[a.Offset:a.End()])
	}
	if len(bytes.Trim(rest, "\x00")) != 0 {
		t.Fatalf("data outside %v", areas)
	}
	return areas
}
