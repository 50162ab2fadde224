package index

import (
	"slices"
	"strings"
	"testing"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

// TestMergeTiers: after many flushes few segments are left, nothing is lost,
// nothing deleted, and one that opens the index need not open what is superseded.
func TestMergeTiers(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	const runs, each = 100, 150
	for i := range runs {
		addRange(x, i*each, (i+1)*each)
		flush(t, x)
		must(t, x.Merge(t.Context()))
		if n := len(x.Segments()); n > 3*mergeFactor {
			t.Fatalf("%d segments after %d runs", n, i)
		}
	}
	expect(t, x, 0, runs*each)
	files := 0
	for _, f := range m.Files() {
		if strings.HasPrefix(f, "index/") && f != "index/lock" {
			files++
		}
	}
	if files != len(x.Segments())+len(x.Superseded()) || files < runs {
		t.Errorf("%d files, %d in use, %d superseded", files, len(x.Segments()), len(x.Superseded()))
	}
	f := fsx.NewFaulty(m)
	f.Plan(fsx.Plan{Ops: fsx.OpOpen})
	again := open(t, f, ring)
	if n := f.Count(); n > len(x.Segments()) {
		t.Errorf("%d files opened for %d segments", n, len(x.Segments()))
	}
	if !slices.Equal(again.Segments(), x.Segments()) || !slices.Equal(again.Superseded(), x.Superseded()) {
		t.Error("the same directory, another index")
	}
	expect(t, again, 0, runs*each)
	for _, s := range again.Segments() {
		must(t, again.Verify(t.Context(), s.File))
	}
	if err := again.Verify(t.Context(), again.Superseded()[0]); err == nil {
		t.Error("verified what is not in use")
	}
}

func TestMergeYields(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	for i := range mergeFactor {
		addRange(x, i*10, i*10+10)
		flush(t, x)
	}
	l, err := m.Lock("index/lock", true, false)
	must(t, err)
	must(t, x.Merge(t.Context()))
	if len(x.Segments()) != mergeFactor {
		t.Error("merged while another did")
	}
	must(t, l.Close())
	must(t, x.Merge(t.Context()))
	if len(x.Segments()) != 1 {
		t.Error("not merged")
	}
}

// TestPlan: what is picked grows by tiers and stays under the largest segment.
func TestPlan(t *testing.T) {
	seg := func(n int64, seq uint64) *segment {
		return &segment{footer: footer{geometry: geometry{n}, sequence: seq}}
	}
	var live []*segment
	for i := range 10 {
		live = append(live, seg(maxEntries/3, uint64(i)))
	}
	if p := plan(live); len(p) != 3 {
		t.Errorf("%d thirds merged", len(p))
	}
	for _, s := range live {
		s.entries = maxEntries/2 + 1
	}
	if p := plan(live); p != nil {
		t.Errorf("%d merged beyond the largest size", len(p))
	}
	live[0].entries = 5
	live[1].broken.Store(true)
	for i := range 7 {
		live = append(live, seg(int64(i+1), uint64(i)))
	}
	if p := plan(live); len(p) != 8 {
		t.Errorf("%d small ones merged", len(p))
	}
}

// TestCompact: records of packs that are gone are found no more, all others are; and
// when none is left there is no segment.
func TestCompact(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	for i := range 3 {
		addRange(x, i*500, i*500+500)
		flush(t, x)
	}
	even := func(h block.Handle) bool { return h%4 == 1 }
	var all, odd int
	must(t, x.Each(t.Context(), func(r block.Record) error {
		all++
		if !even(r.Pack) {
			odd++
		}
		return nil
	}))
	if odd == 0 || odd == all {
		t.Fatalf("%d of %d records are in odd places", odd, all)
	}
	superseded, emptied, err := x.Compact(t.Context(), even)
	must(t, err)
	if len(superseded) != 3 || len(emptied) != 0 || len(x.Segments()) != 1 {
		t.Fatalf("%v are superseded, %v emptied, %v in use", superseded, emptied, x.Segments())
	}
	x.Forget(superseded)
	for _, name := range superseded {
		must(t, m.Remove(name))
	}
	again := open(t, m, ring)
	left := 0
	must(t, again.Each(t.Context(), func(r block.Record) error {
		if left++; even(r.Pack) {
			t.Errorf("a record of pack %v is left", r.Pack)
		}
		return nil
	}))
	if left != odd {
		t.Errorf("%d records are left of %d", left, odd)
	}
	must(t, again.Verify(t.Context(), again.Segments()[0].File))
	_, emptied, err = again.Compact(t.Context(), func(block.Handle) bool { return true })
	must(t, err)
	if len(emptied) != 1 || len(again.Segments()) != 0 {
		t.Fatalf("%v emptied, %v in use", emptied, again.Segments())
	}
}

// Whoever does not have the newest keys does not see what their segments supersede,
// and so must not merge it.
func TestMergeOfAnOldEpoch(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x := open(t, m, ring)
	for i := range mergeFactor {
		addRange(x, i*10, i*10+10)
		flush(t, x)
	}
	must(t, fsx.MakeDir(m, "keys"))
	_, secret := keys.NewKeyFile()
	_, err := keys.AddSlot(m, ring, secret, "", now, keys.Params{})
	must(t, err)
	next, _, err := keys.Rotate(m, ring, nil, now)
	must(t, err)
	y := open(t, m, next)
	must(t, y.Merge(t.Context()))
	must(t, x.Reload(t.Context()))
	must(t, x.Merge(t.Context()))
	must(t, y.Reload(t.Context()))
	if len(y.Segments()) != 1 || len(x.Segments()) != mergeFactor {
		t.Errorf("%d segments are alive with the new keys, %d with the old ones", len(y.Segments()), len(x.Segments()))
	}
}
