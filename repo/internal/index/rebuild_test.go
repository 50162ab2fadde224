package index

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// handing brings the records of a range, those of an odd number twice.
func handing(from, to int) func(context.Context, func(block.Record) error) error {
	return func(_ context.Context, add func(block.Record) error) error {
		for i := from; i < to; i++ {
			for range 1 + i%2 {
				if err := add(rec(i)); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

func sound(t *testing.T, x *Index) {
	t.Helper()
	if d := x.Damaged(); len(d) > 0 {
		t.Errorf("damaged: %v", d)
	}
	for _, s := range x.Segments() {
		must(t, x.Verify(t.Context(), s.File))
	}
}

// All of the index is made anew, in memory and in runs, over segments that are damaged
// in any way; what others publish meanwhile stays in use.
func TestRebuild(t *testing.T) {
	const n = 1000
	for _, run := range []int{0, 400, 7} {
		t.Run(fmt.Sprint(run), func(t *testing.T) {
			m, ring := newMem(t), newRing(t)
			x := open(t, m, ring)
			for i := range 4 {
				addRange(x, i*300, i*300+300)
				if i == 2 {
					addRange(x, 5000, 9000) // larger than what comes after it
				}
				file := flush(t, x).File
				b := readSegment(t, m, file)
				switch i {
				case 1:
					b[100] ^= 1 // a page
				case 2:
					b[len(b)-60] ^= 1 // the footer
				case 3:
					b = b[:70]
				default:
					continue
				}
				must(t, m.Remove(file))
				must(t, m.Plant(file, b))
			}
			before := m.Files()
			x = open(t, m, ring)
			if len(x.Damaged()) != 2 {
				t.Fatalf("damaged: %v", x.Damaged())
			}
			other := open(t, m, ring)
			var done, total int64
			info, err := x.Rebuild(t.Context(), RebuildOptions{RunRecords: run, Progress: func(d, n int64) { done, total = d, n }},
				func(ctx context.Context, add func(block.Record) error) error {
					if err := handing(0, n)(ctx, add); err != nil {
						return err
					}
					addRange(other, n, n+50)
					flush(t, other)
					return nil
				})
			must(t, err)
			if info.Records != n || info.Segments != 1 || len(info.Replaced) != 4 {
				t.Errorf("%+v", info)
			}
			if done != total || run != 0 && total < n {
				t.Errorf("progress ended at %d of %d", done, total)
			}
			for _, x := range []*Index{x, open(t, m, ring)} {
				expect(t, x, 0, n+50)
				if found, err := x.Lookup(t.Context(), idOf(6000), nil); found || err != nil {
					t.Errorf("what is not in any pack is found: %v", err)
				}
				if len(x.Segments()) != 2 {
					t.Errorf("%+v", x.Segments())
				}
				sound(t, x)
				for _, f := range info.Replaced {
					if !slices.Contains(x.Superseded(), f) {
						t.Errorf("%s is not superseded", f)
					}
				}
			}
			for _, f := range before {
				if !slices.Contains(m.Files(), f) {
					t.Errorf("%s is gone", f)
				}
			}
		})
	}
}

func TestRebuildOfNothing(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	addRange(x, 0, 10)
	flush(t, x)
	info, err := x.Rebuild(t.Context(), RebuildOptions{}, handing(0, 0))
	must(t, err)
	if info.Segments != 0 || len(info.Replaced) != 1 {
		t.Errorf("%+v", info)
	}
	// Nor is an index whose directory was removed a difficulty.
	m = fsx.NewMem()
	must(t, fsx.MakeDir(m, "tmp"))
	x = open(t, m, ring)
	if _, err := x.Rebuild(t.Context(), RebuildOptions{}, handing(0, 10)); err != nil {
		t.Fatal(err)
	}
	expect(t, x, 0, 10)
}

// A rebuild that fails at any operation leaves an index that is sound, and knows at
// least what it knew.
func TestRebuildFails(t *testing.T) {
	ring := newRing(t)
	for _, mode := range []fsx.Mode{fsx.FailOnce, fsx.FailAfter, fsx.NoSpace, fsx.CrashNow} {
		for k := 1; ; k += 2 {
			m := newMem(t)
			x := open(t, m, ring)
			addRange(x, 0, 60)
			flush(t, x)
			faulty := fsx.NewFaulty(m)
			x = open(t, faulty, ring)
			faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: mode, At: k})
			_, err := x.Rebuild(t.Context(), RebuildOptions{RunRecords: 25}, handing(0, 100))
			fired := faulty.Fired()
			if err == nil && !fired {
				break
			}
			if !fired {
				t.Fatal(err)
			}
			if mode == fsx.CrashNow {
				m.Crash(rand.New(rand.NewPCG(uint64(k), 3)))
			}
			x = open(t, m, ring)
			for i := range 60 {
				if len(places(t, x, idOf(i))) == 0 {
					t.Errorf("record %d is gone", i)
				}
			}
			sound(t, x)
			_, err = x.Rebuild(t.Context(), RebuildOptions{RunRecords: 25}, handing(0, 100))
			must(t, err)
			expect(t, x, 0, 100)
			sound(t, x)
			if t.Failed() {
				t.Fatalf("mode %v, operation %d", mode, k)
			}
		}
	}
}

func TestScanPassesOverDamage(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	addRange(x, 0, 3*pageEntries)
	file := flush(t, x).File
	b := readSegment(t, m, file)
	b[headerSize+pageSize+9] ^= 1
	must(t, m.Remove(file))
	must(t, m.Plant(file, b))
	x = open(t, m, ring)
	seen := map[block.Record]bool{}
	must(t, x.Scan(t.Context(), func(r block.Record) error {
		seen[r] = true
		return nil
	}))
	if len(seen) != 2*pageEntries || len(x.Damaged()) != 1 {
		t.Errorf("%d records, damage %v", len(seen), x.Damaged())
	}
	stop := errors.New("enough")
	if err := x.Scan(t.Context(), func(block.Record) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
}
