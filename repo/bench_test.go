package repo

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
)

// realData is bytes as disks hold them: the files of the Go installation.
func realData(b *testing.B, size int) []byte {
	b.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Skip("no go command to ask for its files: ", err)
	}
	out := make([]byte, 0, size)
	err = filepath.WalkDir(strings.TrimSpace(string(root)), func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		room := out[len(out):min(cap(out), len(out)+8<<20)]
		n, err := io.ReadFull(f, room)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		out = out[:len(out)+n]
		out = out[:min((len(out)+4095)/4096*4096, cap(out))] // as file systems lay files out
		if len(out) == cap(out) {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return out[:len(out)/DefaultBlockSize*DefaultBlockSize]
}

const benchSize = 384 << 20

// cpu reports the processor time since the call that returned it, a measure that
// a busy machine disturbs less than the clock.
func cpu(b *testing.B, bytes int) func() {
	now := func() int64 {
		var u syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return u.Utime.Nano() + u.Stime.Nano()
	}
	start := now()
	return func() { b.ReportMetric(float64(now()-start)/float64(b.N)/float64(bytes), "cpu-ns/byte") }
}

// BenchmarkPipeline is what a writer cannot beat: hash, compress and seal each
// block, on all cores, and throw the result away.
func BenchmarkPipeline(b *testing.B) {
	data := realData(b, benchSize)
	b.SetBytes(int64(len(data)))
	defer cpu(b, len(data))()
	for b.Loop() {
		var wg sync.WaitGroup
		work := make(chan []byte)
		for range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				enc, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
					zstd.WithEncoderCRC(false), zstd.WithWindowSize(DefaultBlockSize), zstd.WithLowerEncoderMem(true))
				h, _ := blake3.NewKeyed(make([]byte, 32))
				c, _ := aes.NewCipher(make([]byte, 32))
				gcm, _ := cipher.NewGCM(c)
				var packed, sealed []byte
				var id, nonce [32]byte
				for p := range work {
					h.Reset()
					h.Write(p)
					h.Sum(id[:0])
					packed = enc.EncodeAll(p, packed[:0])
					sealed = gcm.Seal(sealed[:0], nonce[:12], packed, id[:])
				}
			})
		}
		for p := data; len(p) > 0; p = p[DefaultBlockSize:] {
			work <- p[:DefaultBlockSize]
		}
		close(work)
		wg.Wait()
	}
}

func benchRepo(b *testing.B) *Repository {
	b.Helper()
	dir := b.TempDir()
	if err := Init(context.Background(), dir, InitOptions{Passphrase: passphrase, KDF: cheap}); err != nil {
		b.Fatal(err)
	}
	r, err := Open(context.Background(), dir, Passphrase(passphrase), Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	return r
}

func benchWrite(b *testing.B, r *Repository, data []byte, compression string, at time.Time, parent *Disk) (Ref, SessionStats) {
	b.Helper()
	ctx := context.Background()
	s, err := r.Begin(ctx, SessionOptions{Compression: compression})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	w, err := s.Disk(ctx, int64(len(data)), parent)
	if err != nil {
		b.Fatal(err)
	}
	const step = 4 << 20
	for off := 0; off < len(data); off += step {
		if err := w.Write(ctx, int64(off), data[off:min(off+step, len(data))], nil); err != nil {
			b.Fatal(err)
		}
	}
	t, err := w.Finish(ctx)
	if err != nil {
		b.Fatal(err)
	}
	ref, err := s.Commit(ctx, Manifest{VM: testVM, Time: at, Mode: ModeFull, Disks: []DiskManifest{diskOf("d", t)}})
	if err != nil {
		b.Fatal(err)
	}
	return ref, s.Stats()
}

func BenchmarkFull(b *testing.B) {
	data := realData(b, benchSize)
	for _, c := range []string{"zstd", "s2", "none"} {
		b.Run(c, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			defer cpu(b, len(data))()
			for b.Loop() {
				b.StopTimer()
				r := benchRepo(b)
				b.StartTimer()
				_, st := benchWrite(b, r, data, c, testClock(), nil)
				b.ReportMetric(float64(st.BytesStored)/float64(len(data)), "stored/byte")
			}
		})
	}
}

func BenchmarkUnchangedScan(b *testing.B) {
	data := realData(b, benchSize)
	r := benchRepo(b)
	ref, _ := benchWrite(b, r, data, "", testClock(), nil)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	defer cpu(b, len(data))()
	at := testClock()
	for b.Loop() {
		g, err := r.Generation(context.Background(), ref)
		if err != nil {
			b.Fatal(err)
		}
		parent, _ := g.OpenDisk(0)
		at = at.Add(time.Second)
		var st SessionStats
		ref, st = benchWrite(b, r, data, "", at, parent)
		b.ReportMetric(float64(st.BytesStored), "stored")
	}
}

func BenchmarkRead(b *testing.B) {
	data := realData(b, benchSize)
	for _, c := range []string{"zstd", "s2"} {
		r := benchRepo(b)
		ref, _ := benchWrite(b, r, data, c, testClock(), nil)
		g, err := r.Generation(context.Background(), ref)
		if err != nil {
			b.Fatal(err)
		}
		d, _ := g.OpenDisk(0)
		b.Run(c+"/sequential-4MiB", func(b *testing.B) {
			p := make([]byte, 4<<20)
			b.SetBytes(int64(len(data)))
			defer cpu(b, len(data))()
			b.ReportAllocs()
			for b.Loop() {
				for off := int64(0); off < int64(len(data)); off += int64(len(p)) {
					if _, err := d.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
						b.Fatal(err)
					}
				}
			}
		})
		b.Run(c+"/sequential-128KiB-prefetch", func(b *testing.B) {
			p := make([]byte, 128<<10)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				for off := int64(0); off < int64(len(data)); off += int64(len(p)) {
					if off%(2<<20) == 0 {
						d.Prefetch(off+2<<20, 2<<20)
					}
					if _, err := d.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
						b.Fatal(err)
					}
				}
			}
		})
		b.Run(c+"/random-4KiB", func(b *testing.B) {
			b.ReportAllocs()
			rng := rand.New(rand.NewPCG(1, 1))
			p := make([]byte, 4096)
			for b.Loop() {
				if _, err := d.ReadAt(p, rng.Int64N(int64(len(data))-4096)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
