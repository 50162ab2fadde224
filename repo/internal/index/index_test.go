package index

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newRing(t testing.TB) *keys.Ring {
	t.Helper()
	r, err := keys.Create(rand.Reader, [16]byte{7})
	must(t, err)
	return r
}

func newMem(t testing.TB) *fsx.Mem {
	t.Helper()
	m := fsx.NewMem()
	must(t, fsx.MakeDir(m, "tmp"))
	must(t, fsx.MakeDir(m, "index"))
	return m
}

func open(t testing.TB, fsys fsx.FS, ring *keys.Ring) *Index {
	t.Helper()
	x, err := Open(t.Context(), fsys, "index", ring, Options{})
	must(t, err)
	t.Cleanup(func() { x.Close() })
	return x
}

// mix is splitmix64: ids as evenly spread as a keyed hash makes them.
func mix(i uint64) uint64 {
	i += 0x9e3779b97f4a7c15
	i = (i ^ i>>30) * 0xbf58476d1ce4e5b9
	i = (i ^ i>>27) * 0x94d049bb133111eb
	return i ^ i>>31
}

func idOf(i int) (id block.ID) {
	for w := range 4 {
		binary.LittleEndian.PutUint64(id[8*w:], mix(uint64(i)*4+uint64(w)))
	}
	return id
}

func rec(i int) block.Record {
	return block.Record{ID: idOf(i), Location: block.Location{
		Pack: block.Handle(mix(uint64(i)<<20) | 1), Offset: uint32(i), Length: uint32(i%1000 + 1), Kind: block.Zstd,
	}}
}

func addRange(x *Index, from, to int) {
	for i := from; i < to; i++ {
		x.Add(rec(i))
	}
}

func flush(t testing.TB, x *Index) SegmentInfo {
	t.Helper()
	s, err := x.Flush(t.Context(), nil)
	must(t, err)
	return s
}

// places looks an id up without accepting anything.
func places(t testing.TB, x *Index, id block.ID) []block.Location {
	t.Helper()
	var all []block.Location
	found, err := x.Lookup(t.Context(), id, func(l block.Location) bool {
		all = append(all, l)
		return false
	})
	if err != nil || found {
		t.Fatal(found, err)
	}
	return all
}

// expect checks that the records of a range are found, each in its place, and
// that ids behind it are not.
func expect(t testing.TB, x *Index, from, to int) {
	t.Helper()
	// Of many a sample, with a step that is no multiple of a page.
	for i := from; i < to; i += 1 + (to-from)/1500 {
		if got := places(t, x, idOf(i)); len(got) != 1 || got[0] != rec(i).Location {
			t.Fatalf("record %d: found %v", i, got)
		}
	}
	for i := to; i < to+50; i++ {
		if got := places(t, x, idOf(i)); len(got) != 0 {
			t.Fatalf("record %d was never added: found %v", i, got)
		}
	}
}

func TestEmpty(t *testing.T) {
	m := fsx.NewMem()
	x := open(t, m, newRing(t))
	expect(t, x, 0, 0)
	if s := flush(t, x); s != (SegmentInfo{}) {
		t.Error(s)
	}
	must(t, x.Merge(t.Context()))
	must(t, x.Each(t.Context(), func(block.Record) error { return errors.New("a record") }))
	if len(m.Files()) != 0 {
		t.Error(m.Files())
	}
	x.Add(block.Record{})
	if x.Pending() != 0 {
		t.Error("a hole is pending")
	}
}

// TestSizes goes over the edges of pages and groups, where offsets are computed.
func TestSizes(t *testing.T) {
	ring := newRing(t)
	want := map[int]int64{1: 312, 341: 17016}
	for _, n := range []int{1, 2, 51, 52, 340, 341, 342, 682, 683, groupEntries - 1, groupEntries, groupEntries + 1, 2*groupEntries + 500} {
		m := newMem(t)
		x := open(t, m, ring)
		addRange(x, 0, n)
		if x.Pending() != n {
			t.Fatal(x.Pending())
		}
		s := flush(t, x)
		if s.Entries != int64(n) || x.Pending() != 0 {
			t.Fatal(s, x.Pending())
		}
		if fi, err := m.Stat(s.File); err != nil || fi.Size() != s.Bytes {
			t.Error(fi, err, s.Bytes)
		}
		if w := want[n]; w != 0 && w != s.Bytes {
			t.Errorf("%d entries take %d bytes, the documentation says %d", n, s.Bytes, w)
		}
		expect(t, x, 0, n)
		must(t, x.Verify(t.Context(), s.File))
		again := open(t, m, ring)
		expect(t, again, 0, n)
		if got := again.Segments(); len(got) != 1 || got[0] != s {
			t.Error(got, s)
		}
		i := 0
		last := block.ID{}
		must(t, again.Each(t.Context(), func(r block.Record) error {
			if i++; bytes.Compare(last[:], r.ID[:]) >= 0 {
				t.Error("out of order")
			}
			last = r.ID
			return nil
		}))
		if i != n {
			t.Errorf("each saw %d of %d", i, n)
		}
	}
}

// TestSeveralPlaces: newest first, whatever layer they are in, until one is
// accepted.
func TestSeveralPlaces(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	id := idOf(1)
	at := func(n int) block.Record {
		return block.Record{ID: id, Location: block.Location{Pack: block.Handle(n), Length: 1, Kind: block.Raw}}
	}
	x.Add(at(1))
	x.Add(at(2))
	x.Add(at(1)) // again: nothing new
	flush(t, x)
	x.Add(at(3))
	flush(t, x)
	x.Add(at(4))
	x.Add(at(5))
	check := func(x *Index, want ...block.Handle) {
		t.Helper()
		var got []block.Handle
		for _, l := range places(t, x, id) {
			got = append(got, l.Pack)
		}
		if !slices.Equal(got, want) {
			t.Errorf("found in packs %v, want %v", got, want)
		}
	}
	check(x, 5, 4, 3, 2, 1)
	flush(t, x)
	check(x, 5, 4, 3, 2, 1)
	check(open(t, m, ring), 5, 4, 3, 2, 1)
	asked := 0
	found, err := x.Lookup(t.Context(), id, func(l block.Location) bool { asked++; return l.Pack == 3 })
	if !found || err != nil || asked != 3 {
		t.Error(found, err, asked)
	}
	if found, err := x.Lookup(t.Context(), id, nil); !found || err != nil {
		t.Error(found, err)
	}
	for range 5 {
		addRange(x, 10, 11)
		flush(t, x)
	}
	must(t, x.Merge(t.Context()))
	if len(x.Segments()) != 1 {
		t.Fatal(x.Segments())
	}
	check(x, 5, 4, 3, 2, 1)
	expect(t, x, 10, 11) // five copies, one record
	var each []block.Handle
	must(t, x.Each(t.Context(), func(r block.Record) error {
		if r.ID == id {
			each = append(each, r.Pack)
		}
		return nil
	}))
	if !slices.Equal(each, []block.Handle{5, 4, 3, 2, 1}) {
		t.Error(each)
	}
}

// TestSamePrefix: many places of few ids whose fences are equal, over many pages.
func TestSamePrefix(t *testing.T) {
	x := open(t, newMem(t), newRing(t))
	const n = 900
	ids := []block.ID{idOf(1), idOf(1), idOf(1)}
	ids[0][20], ids[2][20] = ids[0][20]-1, ids[2][20]+1
	for _, id := range ids {
		for p := 1; p <= n; p++ {
			x.Add(block.Record{ID: id, Location: block.Location{Pack: block.Handle(p), Length: 1, Kind: block.Raw}})
		}
	}
	s := flush(t, x)
	must(t, x.Verify(t.Context(), s.File))
	for _, id := range ids {
		if got := places(t, x, id); len(got) != n {
			t.Errorf("%d places of %d", len(got), n)
		}
	}
}

func TestFlushWhatIsPublished(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	addRange(x, 0, 100)
	even := func(h block.Handle) bool { return h%4 == 1 }
	s, err := x.Flush(t.Context(), even)
	must(t, err)
	if int(s.Entries)+x.Pending() != 100 || s.Entries == 0 || x.Pending() == 0 {
		t.Fatal(s.Entries, x.Pending())
	}
	expect(t, x, 0, 100)
	n := 0
	must(t, open(t, m, ring).Each(t.Context(), func(r block.Record) error {
		if n++; !even(r.Pack) {
			t.Error("a record whose pack is not published")
		}
		return nil
	}))
	x.Drop(func(h block.Handle) bool { return !even(h) })
	if x.Pending() != 0 {
		t.Error(x.Pending())
	}
	if s, err := x.Flush(t.Context(), nil); err != nil || s != (SegmentInfo{}) {
		t.Error(s, err)
	}
}

func TestReload(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	a, b := open(t, m, ring), open(t, m, ring)
	addRange(a, 0, 100)
	flush(t, a)
	expect(t, b, 0, 0)
	must(t, b.Reload(t.Context()))
	expect(t, b, 0, 100)
	for i := range 7 {
		addRange(b, 100+100*i, 200+100*i)
		flush(t, b)
	}
	must(t, b.Merge(t.Context()))
	if len(b.Segments()) != 1 || len(b.Superseded()) != 8 {
		t.Fatal(b.Segments(), b.Superseded())
	}
	must(t, a.Reload(t.Context()))
	expect(t, a, 0, 800)
	if len(a.Segments()) != 1 || !slices.Equal(a.Superseded(), b.Superseded()) {
		t.Fatal(a.Segments(), a.Superseded())
	}
	// Somebody deletes what is superseded.
	for _, f := range a.Superseded() {
		must(t, m.Remove(f))
	}
	must(t, a.Reload(t.Context()))
	expect(t, a, 0, 800)
	if len(a.Superseded()) != 0 {
		t.Error(a.Superseded())
	}
}

func TestOpenCancelled(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	for i := range mergeFactor {
		addRange(x, i*1000, (i+1)*1000)
		flush(t, x)
	}
	addRange(x, 9000, 9010)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, e1 := Open(ctx, m, "index", newRing(t), Options{})
	_, e2 := x.Flush(ctx, nil)
	_, e3 := x.Lookup(ctx, idOf(1), nil)
	for i, err := range []error{
		e1, e2, e3, x.Merge(ctx), x.Each(ctx, func(block.Record) error { return nil }),
		x.Verify(ctx, x.Segments()[0].File),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if d := x.Damaged(); len(d) != 0 {
		t.Error(d)
	}
	if x.Pending() != 10 || len(x.Segments()) != mergeFactor {
		t.Error(x.Pending(), len(x.Segments()))
	}
}

// TestEpochs: segments of an earlier epoch stay readable, those of a later one
// than the ring has are reported.
func TestEpochs(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	must(t, fsx.MakeDir(m, "keys"))
	_, secret := keys.NewKeyFile()
	_, err := keys.AddSlot(m, ring, secret, "", now, keys.Params{})
	must(t, err)
	x := open(t, m, ring)
	addRange(x, 0, 100)
	flush(t, x)
	ring2, _, err := keys.Rotate(m, ring, nil, now)
	must(t, err)
	y := open(t, m, ring2)
	expect(t, y, 0, 100)
	addRange(y, 100, 200)
	if s := flush(t, y); s.Epoch != 2 {
		t.Error(s)
	}
	expect(t, open(t, m, ring2), 0, 200)
	must(t, x.Reload(t.Context()))
	expect(t, x, 0, 100)
	if d := x.Damaged(); len(d) != 1 || !errors.Is(d[0], keys.ErrNoEpoch) {
		t.Error(d)
	}
}

func TestLogsDamageOnce(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	w := open(t, m, ring)
	addRange(w, 0, 1000)
	s := flush(t, w)
	b := readSegment(t, m, s.File)
	b[headerSize+5] ^= 1
	must(t, m.Plant(s.File, b))
	var log bytes.Buffer
	x, err := Open(t.Context(), m, "index", ring, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	must(t, err)
	defer x.Close()
	for i := range 1000 {
		places(t, x, idOf(i))
	}
	must(t, x.Reload(t.Context()))
	for i := range 1000 {
		places(t, x, idOf(i))
	}
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), s.File) {
		t.Errorf("%d lines: %s", n, log.String())
	}
	if d := x.Damaged(); len(d) != 1 || !errors.Is(d[0], ErrDamaged) || !strings.Contains(d[0].Error(), s.File) {
		t.Error(d)
	}
}

func readSegment(t testing.TB, m *fsx.Mem, file string) []byte {
	t.Helper()
	b, err := fsx.ReadFile(m, file, 1<<30)
	must(t, err)
	return b
}

// TestFails lets every operation of a flush and of a merge fail, in every way:
// what was added stays findable and can be flushed again.
func TestFails(t *testing.T) {
	ring := newRing(t)
	for _, mode := range []fsx.Mode{fsx.FailOnce, fsx.FailAfter, fsx.ShortWrite, fsx.NoSpace} {
		for k := 1; ; k++ {
			m := newMem(t)
			f := fsx.NewFaulty(m)
			x := open(t, f, ring)
			for i := range mergeFactor - 1 {
				addRange(x, i*10, i*10+10)
				flush(t, x)
			}
			addRange(x, 70, 80)
			f.Plan(fsx.Plan{Ops: fsx.OpAny, At: k, Mode: mode})
			_, ferr := x.Flush(t.Context(), nil)
			if ferr != nil && x.Pending() != 10 || ferr == nil && x.Pending() != 0 {
				t.Fatalf("mode %d, operation %d: %d pending after %v", mode, k, x.Pending(), ferr)
			}
			merr := x.Merge(t.Context())
			if mode == fsx.NoSpace && ferr != nil && !errors.Is(ferr, syscall.ENOSPC) {
				t.Errorf("no space: %v", ferr)
			}
			fired := f.Fired()
			f.Heal()
			if fired && mode != fsx.FailAfter {
				for _, file := range m.Files() {
					if strings.HasPrefix(file, "tmp/") {
						t.Errorf("mode %d, operation %d: left %s", mode, k, file)
					}
				}
			}
			flush(t, x)
			must(t, x.Merge(t.Context()))
			must(t, x.Reload(t.Context()))
			expect(t, x, 0, 80)
			expect(t, open(t, m, ring), 0, 80)
			if f.RetriedSyncs() != 0 {
				t.Error("a failed sync was tried again")
			}
			if !fired {
				if ferr != nil || merr != nil || k < 15 {
					t.Fatal(k, ferr, merr)
				}
				break
			}
		}
	}
}

// sameFiles tells what a directory holds, for comparing before and after.
func contents(t testing.TB, m *fsx.Mem) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, f := range m.Files() {
		if path.Dir(f) == "index" {
			all[f] = string(readSegment(t, m, f))
		}
	}
	return all
}

func TestNothingIsOverwritten(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	before := map[string]string{}
	for i := range 30 {
		addRange(x, i*10, i*10+10)
		flush(t, x)
		must(t, x.Merge(t.Context()))
		after := contents(t, m)
		for f, c := range before {
			if after[f] != c {
				t.Fatalf("%s changed or went away", f)
			}
		}
		before = after
	}
}

func Example_formatting() {
	n, _ := parseName("0123456789abcdef")
	fmt.Println(n)
	_, ok := parseName("0123456789ABCDEF")
	fmt.Println(ok)
	// Output:
	// 0123456789abcdef
	// false
}
