package repo

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

// stepClock goes on by a step each time it is asked.
func stepClock(step time.Duration) func() time.Time {
	now := testClock()
	return func() time.Time {
		now = now.Add(step)
		return now
	}
}

func dateFiles(mem *fsx.Mem) (n int) {
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, verifiedDir+"/") {
			n++
		}
	}
	return n
}

// note keeps the dates of files as a run does that verifies them at a time.
func note(t fatalist, fsys fsx.FS, at time.Time, live func(dateKey, int64) bool, paths ...string) {
	t.Helper()
	k := newDateKeeper(fsys, [16]byte{7}, func() time.Time { return at })
	for _, p := range paths {
		k.proved(context.Background(), p)
	}
	if err := k.end(context.Background(), live); err != nil {
		t.Fatal(err)
	}
}

func datesOf(t fatalist, fsys fsx.FS, now time.Time) dates {
	t.Helper()
	d, _, err := readDates(context.Background(), fsys, [16]byte{7}, now)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDatesMerge(t *testing.T) {
	mem := fsx.NewMem()
	day := func(n int) time.Time { return testClock().AddDate(0, 0, n) }
	for i := range 40 {
		note(t, mem, day(i), nil, "a", fmt.Sprint("b", i))
		if n := dateFiles(mem); n > mergeDatesAt+1 { // and the lock, while there is one
			t.Fatalf("%d files after %d runs", n, i+1)
		}
	}
	d := datesOf(t, mem, day(40))
	if len(d) != 41 || d[dateKeyOf("a")] != day(39).Unix() || d[dateKeyOf("b7")] != day(7).Unix() {
		t.Fatal(len(d), d[dateKeyOf("a")], d[dateKeyOf("b7")])
	}
	// What is gone is dropped when files are merged.
	for i := range mergeDatesAt {
		note(t, mem, day(50+i), func(k dateKey, _ int64) bool { return k == dateKeyOf("a") }, "a")
	}
	if d := datesOf(t, mem, day(60)); len(d) != 1 || d[dateKeyOf("a")] < day(50).Unix() {
		t.Fatal(d)
	}
	// A wrong clock must not keep a file from being verified for ever.
	note(t, mem, day(400), nil, "a")
	if d := datesOf(t, mem, day(100)); d[dateKeyOf("a")] > day(58).Unix() {
		t.Fatal(d)
	}
}

func TestDatesDamaged(t *testing.T) {
	mem := fsx.NewMem()
	note(t, mem, testClock(), nil, "a", "b", "c")
	name := verifiedDir + "/" + names(t, mem, verifiedDir)[0]
	good, err := fsx.ReadFile(mem, name, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 4
		for _, b := range [][]byte{bad, good[:i]} {
			if err := mem.Plant(name, b); err != nil {
				t.Fatal(err)
			}
			if d := datesOf(t, mem, testClock()); len(d) != 0 {
				t.Fatalf("byte %d: %v", i, d)
			}
		}
	}
	// Another repository's dates, and unknown names, count for nothing; a newer
	// version's are left alone.
	for name, b := range map[string][]byte{
		verifiedDir + "/0123456789abcdef": encodeDates([16]byte{8}, dates{dateKeyOf("a"): 1}),
		verifiedDir + "/something":        []byte("else"),
	} {
		if err := mem.Plant(name, b); err != nil {
			t.Fatal(err)
		}
	}
	if d := datesOf(t, mem, testClock()); len(d) != 0 {
		t.Fatal(d)
	}
}

// keepsAll is storage in which nothing can be removed or replaced.
type keepsAll struct{ fsx.FS }

func (keepsAll) Remove(name string) error {
	return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrPermission}
}

func (keepsAll) Replace(_, name string) error {
	return &fs.PathError{Op: "replace", Path: name, Err: fs.ErrPermission}
}

func TestDatesAppendOnly(t *testing.T) {
	mem := fsx.NewMem()
	for i := range 3 * mergeDatesAt {
		note(t, keepsAll{mem}, testClock().Add(time.Duration(i)*time.Hour), nil, "a", fmt.Sprint(i))
	}
	// A file for each run, and the empty one that shows that nothing can be removed.
	if n := dateFiles(mem); n != 3*mergeDatesAt+1 {
		t.Errorf("%d files", n)
	}
	if d := datesOf(t, mem, testClock().AddDate(0, 0, 9)); len(d) != 3*mergeDatesAt+1 {
		t.Errorf("%d dates", len(d))
	}
}

// Whatever fails or crashes, at any operation of a run that writes and merges: no date
// of the runs before is lost, and the next run goes on.
func TestDatesFailAnywhere(t *testing.T) {
	for _, mode := range []fsx.Mode{fsx.CrashNow, fsx.FailOnce, fsx.FailAfter, fsx.NoSpace} {
		for k := 1; ; k++ {
			mem := fsx.NewMem()
			var before []string
			for i := range mergeDatesAt - 1 {
				before = append(before, fmt.Sprint("old", i))
				note(t, mem, testClock(), nil, before[i])
			}
			faulty := fsx.NewFaulty(mem)
			faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: mode, At: k})
			clock := stepClock(keepEvery / 2)
			keeper := newDateKeeper(faulty, [16]byte{7}, clock)
			for i := range 4 {
				keeper.proved(context.Background(), fmt.Sprint("new", i))
			}
			err := keeper.end(context.Background(), nil)
			fired := faulty.Fired()
			if !fired && err != nil {
				t.Fatal(err)
			}
			if mode == fsx.CrashNow {
				mem.Crash(rand.New(rand.NewPCG(uint64(k), 8)))
			}
			if err == nil {
				before = append(before, "new0", "new1", "new2", "new3")
			}
			for range 2 {
				d := datesOf(t, mem, testClock().AddDate(1, 0, 0))
				for _, name := range before {
					if d[dateKeyOf(name)] == 0 {
						t.Fatalf("mode %d, operation %d (%v): the date of %s is gone", mode, k, err, name)
					}
				}
				note(t, mem, testClock(), nil, "another")
			}
			for _, name := range mem.Files() {
				if strings.HasPrefix(name, upkeepName+"-") {
					t.Fatalf("mode %d, operation %d: %s was left behind", mode, k, name)
				}
			}
			if !fired {
				t.Logf("mode %d: %d operations", mode, k-1)
				break
			}
		}
	}
}

// Runs at the same time lose nothing to each other.
func TestDatesConcurrently(t *testing.T) {
	mem := fsx.NewMem()
	done := make(chan error)
	for w := range 4 {
		go func() {
			for i := range 30 {
				k := newDateKeeper(mem, [16]byte{7}, testClock)
				k.proved(context.Background(), fmt.Sprint(w, "-", i))
				if err := k.end(context.Background(), nil); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if d := datesOf(t, mem, testClock()); len(d) != 120 {
		t.Errorf("%d of 120 dates", len(d))
	}
}

func names(t fatalist, fsys fsx.FS, dir string) (list []string) {
	t.Helper()
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func FuzzDates(f *testing.F) {
	id := [16]byte{7}
	good := encodeDates(id, dates{dateKeyOf("a"): 5, dateKeyOf("b"): 6})
	f.Add(good[:len(good)-32])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		// The fuzzer cannot make the SHA-256; this does it for it.
		for _, b := range [][]byte{body, withSum(body)} {
			var keys []dateKey
			err := decodeDates(id, b, func(k dateKey, _ int64) { keys = append(keys, k) })
			if err != nil && len(keys) > 0 {
				t.Fatal("dates beside an error")
			}
			if err == nil && len(b) != verifiedHead+len(keys)*dateEntry+32 {
				t.Fatalf("%d dates in %d bytes", len(keys), len(b))
			}
		}
	})
}

// withSum appends the SHA-256 that files of a repository end with.
func withSum(b []byte) []byte {
	sum := sumOf(b)
	return slices.Concat(b, sum[:])
}
