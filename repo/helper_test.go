package repo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"

	"hikae/repo/internal/fsx"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testBlock = 64 << 10

// cheap is a KDF for tests: one pass over 8 KiB.
var cheap = KDF{Time: 1, MemoryKiB: 8, Threads: 1}

var passphrase = []byte("correct horse battery staple")

var testVM = VMID{Host: "esx1", Name: "web 01"}

// fatalist is what *testing.T and *rapid.T have in common.
type fatalist interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func testClock() time.Time { return time.Date(2026, 11, 22, 2, 0, 0, 0, time.UTC) }

func initMem(t fatalist, fsys fsx.FS) {
	t.Helper()
	err := initFS(context.Background(), fsys, "mem", InitOptions{BlockSize: testBlock, Passphrase: passphrase, KDF: cheap, Clock: testClock})
	if err != nil {
		t.Fatal(err)
	}
}

func openMem(fsys fsx.FS) (*Repository, error) {
	return openFS(context.Background(), fsys, "mem", Passphrase(passphrase), Options{Clock: testClock, Workers: 2, BlockCacheBytes: 2 << 20, NodeCacheBytes: 1 << 20})
}

func mustOpen(t fatalist, fsys fsx.FS) *Repository {
	t.Helper()
	r, err := openMem(fsys)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// newMem is a repository in memory, open.
func newMem(t testing.TB) (*fsx.Mem, *Repository) {
	t.Helper()
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, mem)
	t.Cleanup(func() { _ = r.Close() })
	return mem, r
}

// image is test content of so many bytes: noise, text and zeros, in stretches of
// blocks and with some blocks twice.
func image(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 9))
	b := make([]byte, size)
	for at := 0; at < size; {
		n := min(size-at, testBlock*(1+rng.IntN(3)))
		p := b[at : at+n]
		switch rng.IntN(4) {
		case 0: // a hole
		case 1:
			seed := [32]byte{byte(rng.Uint32()), byte(rng.Uint32()), byte(seed)}
			_, _ = rand.NewChaCha8(seed).Read(p)
		case 2:
			word := []byte{byte('a' + rng.IntN(26)), 'b', byte(rng.IntN(9)), 'c'}
			copy(p, bytes.Repeat(word, n/4+1))
		case 3:
			copy(p, b[:at])
		}
		at += n
	}
	return b
}

var poison = bytes.Repeat([]byte{0xee}, 6*testBlock)

// extent is a stretch of bytes.
type extent struct{ off, n int64 }

func whole(b []byte) []extent { return []extent{{0, int64(len(b))}} }

// write writes the extents of content, ascending, as changes against parent.
func write(ctx context.Context, s *Session, content []byte, parent *Disk, changed []extent) (DiskTree, error) {
	w, err := s.Disk(ctx, int64(len(content)), parent)
	if err != nil {
		return DiskTree{}, err
	}
	defer w.Abandon()
	released := make(chan struct{}, 1000)
	want := 0
	for _, e := range changed {
		const step = 6 * testBlock // whole blocks of the default size as well
		for off := e.off; off < e.off+e.n; off += step {
			p := bytes.Clone(content[off:min(off+step, e.off+e.n)])
			want++
			err := w.Write(ctx, off, p, func() {
				copy(p, poison) // nobody may look at it any more
				released <- struct{}{}
			})
			if err != nil {
				return DiskTree{}, err
			}
		}
	}
	t, err := w.Finish(ctx)
	if err != nil {
		return t, err
	}
	for range want {
		<-released
	}
	return t, nil
}

func diskOf(name string, t DiskTree) DiskManifest {
	return DiskManifest{
		Key: 2000, Name: name, Capacity: t.Capacity, DataBytes: t.DataBytes, Root: t.Root, Levels: t.Levels,
		Descriptor: "# Disk DescriptorFile\n", Mode: ModeFull,
	}
}

// backup makes a generation of one disk.
func backup(ctx context.Context, r *Repository, vm VMID, at time.Time, content []byte, parent *Disk, changed []extent) (Ref, error) {
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		return Ref{}, err
	}
	ref, err := backupIn(ctx, s, vm, at, content, parent, changed)
	return ref, errors.Join(err, s.Close())
}

func backupIn(ctx context.Context, s *Session, vm VMID, at time.Time, content []byte, parent *Disk, changed []extent) (Ref, error) {
	t, err := write(ctx, s, content, parent, changed)
	if err != nil {
		return Ref{}, err
	}
	return s.Commit(ctx, Manifest{VM: vm, Time: at, Mode: ModeFull, Consistency: ConsistencyOff, Disks: []DiskManifest{diskOf("web01", t)}})
}

func openDisk(t fatalist, r *Repository, ref Ref) *Disk {
	t.Helper()
	g, err := r.Generation(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := g.OpenDisk(0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// same proves that the disk reads as want, and that its holes are where they
// should be: exactly the blocks of zeros.
func same(t fatalist, d *Disk, want []byte) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("the disk has %d bytes, not %d", d.Size(), len(want))
	}
	got := make([]byte, len(want)+1)
	if n, err := d.ReadAt(got, 0); n != len(want) || !errors.Is(err, io.EOF) {
		t.Fatalf("read %d bytes of %d: %v", n, len(want), err)
	}
	if !bytes.Equal(got[:len(want)], want) {
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("byte %d (block %d) is %#x, not %#x", i, i/testBlock, got[i], want[i])
			}
		}
	}
	ctx := context.Background()
	data := int64(0)
	for off := int64(0); off < d.Size(); {
		start, end, err := d.NextData(ctx, off)
		if errors.Is(err, io.EOF) {
			start, end = d.Size(), d.Size()
		} else if err != nil {
			t.Fatal(err)
		}
		for b := off; b < start; b += testBlock {
			if !isZero(want[b:min(b+testBlock, d.Size())]) {
				t.Fatalf("block %d is a hole", b/testBlock)
			}
		}
		for b := start; b < end; b += testBlock {
			if isZero(want[b:min(b+testBlock, d.Size())]) {
				t.Fatalf("block %d of zeros is no hole", b/testBlock)
			}
		}
		data += end - start
		off = max(end, start)
	}
	if data != d.DataBytes() {
		t.Fatalf("%d bytes of data, the manifest says %d", data, d.DataBytes())
	}
}

// clean proves that a check of everything finds nothing.
func clean(t fatalist, r *Repository) *CheckReport {
	t.Helper()
	report, err := r.Check(context.Background(), CheckOptions{ReadData: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range report.Problems {
		t.Fatalf("check: %+v", p)
	}
	return report
}
