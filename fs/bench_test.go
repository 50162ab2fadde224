package fs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hikae/fs/ceiling"
	"hikae/repo"
)

// The benchmarks compare the mount with the least a FUSE server can do: answer
// every read from the same memory. Server and reader share the process, so that
// profiles show both; the numbers of the two kinds compare with each other.

const benchSize = 1 << 40

// cpu reports the processor time of reader and server together, which a busy
// machine disturbs less than it does the clock.
func cpu(b *testing.B) func() {
	used := func() time.Duration {
		var u unix.Rusage
		unix.Getrusage(unix.RUSAGE_SELF, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := used()
	return func() { b.ReportMetric(float64(used()-start)/float64(b.N), "cpu-ns/op") }
}

// benchMemory serves a file of memory.
func benchMemory(b *testing.B) string {
	needMount(b)
	dir := mountDir(b)
	s, err := ceiling.Mount(dir, ceiling.Options{Size: benchSize})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			b.Error(err)
		}
	})
	if err := forgoPoll(dir); err != nil {
		b.Fatal(err)
	}
	return filepath.Join(dir, ceiling.Name)
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
	defer cpu(b)()
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
	defer cpu(b)()
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

// benchRepository is a repository with one disk, of 512 MiB that compress like
// a system disk, or the image that HIKAE_BENCH_IMAGE names.
func benchRepository(b *testing.B) (*repo.Repository, *repo.Disk) {
	b.Helper()
	ctx := context.Background()
	dir := b.TempDir()
	if err := repo.Init(ctx, dir, repo.InitOptions{Passphrase: repoPass, KDF: repo.KDF{Time: 1, MemoryKiB: 8, Threads: 1}}); err != nil {
		b.Fatal(err)
	}
	r, err := repo.Open(ctx, dir, repo.Passphrase(repoPass), repo.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	s, err := r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var src io.ReaderAt = textual{}
	size := int64(512 << 20)
	if path := os.Getenv("HIKAE_BENCH_IMAGE"); path != "" {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			b.Fatal(err)
		}
		src, size = f, fi.Size()
	}
	w, err := s.Disk(ctx, size, nil)
	if err != nil {
		b.Fatal(err)
	}
	for off := int64(0); off < size; off += 4 << 20 {
		p := make([]byte, min(4<<20, size-off))
		if _, err := src.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
			b.Fatal(err)
		}
		if err := w.Write(ctx, off, p, nil); err != nil {
			b.Fatal(err)
		}
	}
	d, err := w.Finish(ctx)
	if err != nil {
		b.Fatal(err)
	}
	ref, err := s.Commit(ctx, repo.Manifest{
		VM: repo.VMID{Host: "h", Name: "v"}, Time: testTime(1), Mode: repo.ModeImport, Consistency: repo.ConsistencyUnknown,
		Disks: []repo.DiskManifest{{Name: "d", Capacity: d.Capacity, DataBytes: d.DataBytes, Root: d.Root, Levels: d.Levels}},
	})
	if err != nil {
		b.Fatal(err)
	}
	g, err := r.Generation(ctx, ref)
	if err != nil {
		b.Fatal(err)
	}
	disk, err := g.OpenDisk(0)
	if err != nil {
		b.Fatal(err)
	}
	return r, disk
}

// textual is data that compresses about two to one.
type textual struct{}

func (textual) ReadAt(p []byte, off int64) (int, error) {
	rng := rand.New(rand.NewPCG(uint64(off), 3))
	for i := 0; i+8 <= len(p); i += 8 {
		x := rng.Uint64()
		if x&1 == 0 {
			x &= 0x0f0f0f0f
		}
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	return len(p), nil
}

// BenchmarkRepository reads a stored disk once through, cold: through the mount,
// and, as the upper bound, by as many readers as there are CPUs without one.
func BenchmarkRepository(b *testing.B) {
	r, disk := benchRepository(b)
	cold := func(b *testing.B) {
		b.StopTimer()
		unix.Sync()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			b.Logf("caches stay warm: %v", err)
		}
		b.StartTimer()
	}
	ctx := context.Background()
	b.Run("direct", func(b *testing.B) {
		b.SetBytes(disk.Size())
		defer cpu(b)()
		for b.Loop() {
			cold(b)
			var next atomic.Int64
			var wg sync.WaitGroup
			for range runtime.GOMAXPROCS(0) {
				wg.Go(func() {
					p := make([]byte, 1<<20)
					for {
						off := next.Add(1<<20) - 1<<20
						if off >= disk.Size() {
							return
						}
						if _, err := disk.ReadAtContext(ctx, p[:min(1<<20, disk.Size()-off)], off); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		}
	})
	path := func(b *testing.B) string {
		needMount(b)
		dir := mountDir(b)
		srv, err := Mount(ctx, r, dir, Options{})
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
	for _, readers := range []int{1, 4} {
		b.Run(fmt.Sprintf("mount/%d", readers), func(b *testing.B) {
			flat := path(b)
			b.SetBytes(disk.Size())
			share := disk.Size() / int64(readers)
			defer cpu(b)()
			for b.Loop() {
				cold(b)
				var wg sync.WaitGroup
				for i := range readers {
					f, err := os.Open(flat)
					if err != nil {
						b.Fatal(err)
					}
					wg.Go(func() {
						defer f.Close()
						p := make([]byte, 1<<20)
						if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.NewSectionReader(f, int64(i)*share, share)}, p); err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
			}
		})
	}
	b.Run("mount/warm", func(b *testing.B) {
		f, err := os.Open(path(b))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		b.SetBytes(disk.Size())
		p := make([]byte, 1<<20)
		for b.Loop() {
			for off := int64(0); off < disk.Size(); off += 1 << 20 {
				if _, err := f.ReadAt(p[:min(1<<20, disk.Size()-off)], off); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	for _, readers := range []int{1, 4} {
		b.Run(fmt.Sprintf("random4k/%d", readers), func(b *testing.B) {
			flat := path(b)
			cold(b)
			defer cpu(b)()
			var wg sync.WaitGroup
			for i := range readers {
				f, err := os.Open(flat)
				if err != nil {
					b.Fatal(err)
				}
				unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
				wg.Go(func() {
					defer f.Close()
					rng := rand.New(rand.NewPCG(uint64(i), 1))
					p := make([]byte, 4096)
					for range b.N / readers {
						if _, err := f.ReadAt(p, rng.Int64N(disk.Size()/4096)*4096); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
		})
	}
}

// BenchmarkFirst mounts a repository of 1,000 generations, of ten VMs, lists one VM's
// and reads the first byte of its newest disk.
func BenchmarkFirst(b *testing.B) {
	needMount(b)
	r := newRepo(b)
	ctx := context.Background()
	image := noise(1, 1<<20)
	for i := range 1000 {
		image[0] = byte(i)
		commitAs(b, r, fmt.Sprintf("vm%d", i%10), testTime(1).Add(time.Duration(i)*time.Hour), image)
	}
	dir := mountDir(b)
	unix.Sync()
	for b.Loop() {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			b.Logf("caches stay warm: %v", err)
		}
		begin := time.Now()
		srv, err := Mount(ctx, r, dir, Options{})
		if err != nil {
			b.Fatal(err)
		}
		up := time.Since(begin)
		names, err := os.ReadDir(filepath.Join(dir, "esx1/vm3"))
		if err != nil || len(names) != 101 {
			b.Fatalf("%d names: %v", len(names), err)
		}
		listed := time.Since(begin)
		f, err := os.Open(filepath.Join(dir, "esx1/vm3/latest/web01-flat.vmdk"))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
			b.Fatal(err)
		}
		f.Close()
		b.ReportMetric(up.Seconds()*1e3, "ms-to-mount")
		b.ReportMetric(listed.Seconds()*1e3, "ms-to-ls")
		b.ReportMetric(time.Since(begin).Seconds()*1e3, "ms-to-byte")
		if err := srv.Unmount(); err != nil {
			b.Fatal(err)
		}
	}
}
