package index

import (
	"slices"
	"strings"
	"testing"

	"hikae/repo/internal/fsx"
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
