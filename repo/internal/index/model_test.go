package index

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

func sum256(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

// TestModel runs random histories of two processes with one index on storage that
// crashes, against a map: what was flushed is found, in all its places; what is
// found was once added.
func TestModel(t *testing.T) {
	ring := newRing(t)
	rapid.Check(t, func(t *rapid.T) {
		ctx := context.Background()
		m := fsx.NewMem()
		for _, d := range []string{"tmp", "index"} {
			if err := fsx.MakeDir(m, d); err != nil {
				t.Fatal(err)
			}
		}
		var procs [2]*Index
		var faulty [2]*fsx.Faulty
		start := func(i int) {
			faulty[i] = fsx.NewFaulty(m)
			x, err := Open(ctx, faulty[i], "index", ring, Options{CacheBytes: 1})
			if err != nil {
				t.Fatal(err)
			}
			procs[i] = x
		}
		start(0)
		start(1)
		lasting := map[block.Record]bool{}
		pending := [2]map[block.Record]bool{{}, {}}
		ever := map[block.Record]bool{}
		next := 0
		draw := rapid.IntRange(0, 1)
		record := rapid.Custom(func(t *rapid.T) block.Record {
			// Few ids, so that some have several places.
			return block.Record{
				ID:       idOf(rapid.IntRange(0, 2000).Draw(t, "id")),
				Location: block.Location{Pack: block.Handle(rapid.IntRange(1, 3).Draw(t, "pack")), Length: 1, Kind: block.Raw},
			}
		})
		has := func(x *Index, r block.Record) bool {
			ok, err := x.Lookup(ctx, r.ID, func(l block.Location) bool { return l == r.Location })
			if err != nil {
				t.Fatal(err)
			}
			return ok
		}
		crash := func(t *rapid.T) {
			m.Crash(rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)))
			for i := range procs {
				_ = procs[i].Close()
				start(i)
				pending[i] = map[block.Record]bool{}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				i := draw.Draw(t, "process")
				n := rapid.SampledFrom([]int{1, 10, 400}).Draw(t, "n")
				for range n {
					r := record.Draw(t, "record")
					if n == 400 { // in bulk: drawing each would be slow
						next++
						r = block.Record{ID: idOf(5000 + next), Location: r.Location}
					}
					procs[i].Add(r)
					pending[i][r], ever[r] = true, true
				}
			},
			"flush": func(t *rapid.T) {
				i := draw.Draw(t, "process")
				if _, err := procs[i].Flush(ctx, nil); err != nil {
					t.Fatal(err)
				}
				for r := range pending[i] {
					lasting[r] = true
				}
				pending[i] = map[block.Record]bool{}
			},
			"merge": func(t *rapid.T) {
				if err := procs[draw.Draw(t, "process")].Merge(ctx); err != nil {
					t.Fatal(err)
				}
			},
			"reload": func(t *rapid.T) {
				if err := procs[draw.Draw(t, "process")].Reload(ctx); err != nil {
					t.Fatal(err)
				}
			},
			"delete what is superseded": func(t *rapid.T) {
				x := procs[draw.Draw(t, "process")]
				for _, f := range x.Superseded() {
					_ = m.Remove(f) // the other may have done so
				}
				if err := x.Reload(ctx); err != nil {
					t.Fatal(err)
				}
			},
			"crash": crash,
			"crash in the middle": func(t *rapid.T) {
				i := draw.Draw(t, "process")
				faulty[i].Plan(fsx.Plan{Ops: fsx.OpAny, At: rapid.IntRange(1, 60).Draw(t, "at"), Mode: fsx.CrashNow})
				if _, err := procs[i].Flush(ctx, nil); err == nil {
					for r := range pending[i] {
						lasting[r] = true
					}
				}
				_ = procs[i].Merge(ctx)
				crash(t)
			},
			"": func(t *rapid.T) {
				for i, x := range procs {
					for r := range pending[i] {
						if !has(x, r) {
							t.Fatalf("process %d lost %v, not flushed yet", i, r)
						}
						break // any one
					}
				}
				x := procs[0]
				if err := x.Reload(ctx); err != nil {
					t.Fatal(err)
				}
				found := map[block.Record]bool{}
				if err := x.Each(ctx, func(r block.Record) error {
					if !ever[r] || found[r] {
						return fmt.Errorf("%v was never added, or comes twice", r)
					}
					found[r] = true
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				n := 0
				for r := range lasting {
					if !found[r] {
						t.Fatalf("%v was flushed and is gone", r)
					}
					if n++; n < 20 && !has(x, r) {
						t.Fatalf("%v is there and not found", r)
					}
				}
				if d := x.Damaged(); len(d) != 0 {
					t.Fatal(d)
				}
			},
		})
	})
}

// series is a source of n records, evenly spread and in order, that costs nothing.
type series struct {
	n, i uint64
	buf  []byte
}

func (s *series) record(i uint64) block.Record {
	r := block.Record{Location: block.Location{Pack: block.Handle(i/200 + 1), Offset: uint32(i), Length: 1000, Kind: block.Zstd}}
	binary.BigEndian.PutUint64(r.ID[:], i*(^uint64(0)/s.n)+mix(i)%(1<<20))
	for w := 1; w < 4; w++ {
		binary.LittleEndian.PutUint64(r.ID[8*w:], mix(i*4+uint64(w)))
	}
	return r
}

func (s *series) next() ([]byte, error) {
	if s.i == s.n {
		return nil, io.EOF
	}
	s.buf = s.record(s.i).Append(s.buf[:0])
	s.i++
	return s.buf, nil
}

// missing makes ids that no series has, spread as evenly.
func missing(i uint64) (id block.ID) {
	for w := range 4 {
		binary.LittleEndian.PutUint64(id[8*w:], mix(1<<60+i*4+uint64(w)))
	}
	return id
}

func entries(def uint64) uint64 {
	if n, err := strconv.ParseUint(os.Getenv("HIKAE_INDEX_ENTRIES"), 10, 64); err == nil && n > 0 {
		return n
	}
	return def
}

// build writes an index of n entries in one segment to a directory.
func build(t testing.TB, n uint64) (fsx.FS, *keys.Ring) {
	t.Helper()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "tmp"), 0o700))
	fsys, err := fsx.OS(dir)
	must(t, err)
	ring := newRing(t)
	x := open(t, fsys, ring)
	_, err = x.write(t.Context(), &series{n: n}, 1, nil)
	must(t, err)
	return fsys, ring
}

// TestMillion: as many entries as 128 GiB of blocks make. Memory is counted, not
// guessed: what an open index holds outside its cache is its fences.
func TestMillion(t *testing.T) {
	n := entries(1_000_000)
	fsys, ring := build(t, n)
	before := heapInUse()
	x := open(t, fsys, ring)
	held := int64(heapInUse()) - int64(before)
	if limit := int64(n)/pageEntries*8*2 + 1<<20; held > limit {
		t.Errorf("an open index of %d entries holds %d bytes", n, held)
	}
	s := &series{n: n}
	for i := uint64(0); i < n; i += n/5000 + 1 {
		r := s.record(i)
		got := places(t, x, r.ID)
		if len(got) != 1 || got[0] != r.Location {
			t.Fatalf("record %d: %v", i, got)
		}
	}
	for i := range uint64(20000) {
		if got := places(t, x, missing(i)); len(got) != 0 {
			t.Fatal(got)
		}
	}
	held = int64(heapInUse()) - int64(before)
	if limit := int64(n)/pageEntries*8*2 + x.opt.CacheBytes + 4<<20; held > limit {
		t.Errorf("with a warm cache it holds %d bytes", held)
	}
	t.Logf("%d entries: %d bytes held with a warm cache of %d pages", n, held, len(x.cache.pages))
	runtime.KeepAlive(x)
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

// TestMergeMemory: merging takes a few pages for each part, not the parts.
func TestMergeMemory(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "tmp"), 0o700))
	fsys, err := fsx.OS(dir)
	must(t, err)
	x := open(t, fsys, newRing(t))
	const part = 40000
	for i := range uint64(mergeFactor) {
		_, err := x.write(t.Context(), &series{n: part, i: i}, i+1, nil) // overlapping, mostly equal
		must(t, err)
	}
	must(t, x.Reload(t.Context()))
	var a, b runtime.MemStats
	runtime.ReadMemStats(&a)
	must(t, x.Merge(t.Context()))
	runtime.ReadMemStats(&b)
	got := x.Segments()
	if len(got) != 1 || got[0].Entries != part {
		t.Fatal(got)
	}
	// All that was ever allocated, garbage included; the parts are 15 MB.
	if n := b.TotalAlloc - a.TotalAlloc; n > 6<<20 {
		t.Errorf("merging 15 MB allocated %d bytes", n)
	}
	must(t, x.Verify(t.Context(), got[0].File))
}

// The benchmarks run on a million entries; HIKAE_INDEX_ENTRIES=32000000 makes it
// 4 TiB of blocks (1.6 GB in TMPDIR).

func BenchmarkOpen(b *testing.B) {
	fsys, ring := build(b, entries(1_000_000))
	b.ReportAllocs()
	for b.Loop() {
		x, err := Open(b.Context(), fsys, "index", ring, Options{})
		must(b, err)
		must(b, x.Close())
	}
}

func BenchmarkLookupMiss(b *testing.B) {
	fsys, ring := build(b, entries(1_000_000))
	x := open(b, fsys, ring)
	// Filters come in once; what follows is the price of the many.
	for i := range uint64(200_000) {
		_, _ = x.Lookup(b.Context(), missing(1<<40+i), nil)
	}
	b.ReportAllocs()
	i := uint64(0)
	for b.Loop() {
		i++
		if found, _ := x.Lookup(b.Context(), missing(i), nil); found {
			b.Fatal("found")
		}
	}
	b.ReportMetric(float64(heapInUse())/(1<<20), "heap-MiB")
}

func BenchmarkLookupHit(b *testing.B) {
	n := entries(1_000_000)
	fsys, ring := build(b, n)
	x := open(b, fsys, ring)
	s := &series{n: n}
	b.ReportAllocs()
	i := uint64(0)
	for b.Loop() {
		i++
		if found, _ := x.Lookup(b.Context(), s.record(mix(i)%n).ID, nil); !found {
			b.Fatal("not found")
		}
	}
	b.ReportMetric(float64(heapInUse())/(1<<20), "heap-MiB")
}

func BenchmarkWrite(b *testing.B) {
	n := entries(1_000_000)
	for b.Loop() {
		build(b, n)
	}
	b.SetBytes(int64(n) * block.Size)
}
