package fs

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The benchmarks compare the mount with the least a FUSE server can do: answer
// every read from the same memory. Server and reader share the process, so that
// profiles show both; the numbers of the two kinds compare with each other.

// memoryFS is one file, /f.
type memoryFS struct {
	fuse.RawFileSystem
	size uint64
	data []byte
}

func (m *memoryFS) attr(ino uint64) fuse.Attr {
	if ino == inoRoot {
		return fuse.Attr{Ino: ino, Mode: dirMode, Nlink: 1}
	}
	return fuse.Attr{Ino: ino, Mode: fileMode, Nlink: 1, Size: m.size, Blocks: m.size / 512, Blksize: blockSize}
}

func (m *memoryFS) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != "f" {
		return fuse.ENOENT
	}
	out.NodeId, out.Attr = 2, m.attr(2)
	out.SetAttrTimeout(forever)
	out.SetEntryTimeout(forever)
	return fuse.OK
}

func (m *memoryFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.Attr = m.attr(in.NodeId)
	out.SetTimeout(forever)
	return fuse.OK
}

func (m *memoryFS) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	return fuse.OK
}

func (m *memoryFS) Read(_ <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	return fuse.ReadResultData(m.data[:min(uint64(in.Size), m.size-in.Offset)]), fuse.OK
}

const benchSize = 1 << 40

// benchMemory mounts a memoryFS with the mount's own options.
func benchMemory(b *testing.B) string {
	needMount(b)
	dir := mountDir(b)
	o := Options{}
	if err := o.setDefaults(); err != nil {
		b.Fatal(err)
	}
	fd, err := attach(dir, "memory", &o)
	if err != nil {
		b.Fatal(err)
	}
	srv, err := fuse.NewServer(&memoryFS{fuse.NewDefaultRawFileSystem(), benchSize, make([]byte, maxRead)}, fmt.Sprintf("/dev/fd/%d", fd), fuseOptions(&o))
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() { srv.Serve(); close(done) }()
	b.Cleanup(func() {
		if err := unmount(dir); err != nil {
			b.Error(err)
			detach(dir)
		}
		<-done
	})
	if err := forgoPoll(dir); err != nil {
		b.Fatal(err)
	}
	readAhead(dir)
	return dir + "/f"
}

// benchMount mounts disks held in memory.
func benchMount(b *testing.B, spec fakeDiskSpec) string {
	needMount(b)
	dir := mountDir(b)
	spec.Name, spec.Size = "d", benchSize
	src := &fakeSource{gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{spec}}}}
	srv, err := mount(context.Background(), src, b.TempDir(), dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := srv.Unmount(); err != nil {
			b.Error(err)
			srv.Detach()
		}
	})
	return dir + "/h/v/latest/d-flat.vmdk"
}

// sequential reads in steps of n bytes and drops what it has read.
func sequential(b *testing.B, path string, readers, n int) {
	b.SetBytes(int64(readers * n))
	b.ResetTimer()
	var wg sync.WaitGroup
	for r := range readers {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		wg.Go(func() {
			p := make([]byte, n)
			start := int64(r) * (benchSize / int64(readers))
			for i := range int64(b.N) {
				off := start + i*int64(n)
				if _, err := f.ReadAt(p, off); err != nil {
					b.Error(err)
					return
				}
				if i%256 == 255 {
					unix.Fadvise(int(f.Fd()), off-255*int64(n), 256*int64(n), unix.FADV_DONTNEED)
				}
			}
		})
	}
	wg.Wait()
}

func random(b *testing.B, path string, readers int) {
	b.ResetTimer()
	var wg sync.WaitGroup
	for r := range readers {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(r), 1))
			p := make([]byte, 4096)
			for range b.N / readers {
				if _, err := f.ReadAt(p, rng.Int64N(benchSize/4096)*4096); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
}

func BenchmarkSequential(b *testing.B) {
	for _, readers := range []int{1, 4} {
		b.Run(fmt.Sprintf("memory/%d", readers), func(b *testing.B) { sequential(b, benchMemory(b), readers, 1<<20) })
		b.Run(fmt.Sprintf("mount/%d", readers), func(b *testing.B) { sequential(b, benchMount(b, fakeDiskSpec{Flat: true}), readers, 1<<20) })
		b.Run(fmt.Sprintf("holes/%d", readers), func(b *testing.B) { sequential(b, benchMount(b, fakeDiskSpec{}), readers, 1<<20) })
	}
}

func BenchmarkRandom4K(b *testing.B) {
	for _, readers := range []int{1, 4} {
		b.Run(fmt.Sprintf("memory/%d", readers), func(b *testing.B) { random(b, benchMemory(b), readers) })
		b.Run(fmt.Sprintf("mount/%d", readers), func(b *testing.B) { random(b, benchMount(b, fakeDiskSpec{Flat: true}), readers) })
	}
}
