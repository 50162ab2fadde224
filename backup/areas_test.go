package backup

import (
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const kib = 1 << 10

// marks is the model the area functions are held against: one flag a unit.
func marks(list []area, unit, capacity int64) []bool {
	m := make([]bool, (capacity+unit-1)/unit)
	for _, a := range list {
		for off := a.Offset; off < a.End(); off += unit {
			m[off/unit] = true
		}
	}
	return m
}

func tidyList(t *rapid.T, label string, unit, capacity int64) []area {
	raw := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) area {
		off := rapid.Int64Range(-2, capacity/unit+2).Draw(t, "off")
		return area{Offset: off * unit, Length: rapid.Int64Range(-1, 6).Draw(t, "len") * unit}
	}), 0, 20).Draw(t, label)
	return tidy(raw, capacity)
}

func isTidy(list []area, capacity int64) bool {
	for i, a := range list {
		if a.Length <= 0 || a.Offset < 0 || a.End() > capacity || (i > 0 && list[i-1].End() >= a.Offset) {
			return false
		}
	}
	return true
}

func TestSetsOfAreasAgreeWithFlags(t *testing.T) {
	const unit, capacity = 1, 60
	rapid.Check(t, func(t *rapid.T) {
		a, b := tidyList(t, "a", unit, capacity), tidyList(t, "b", unit, capacity)
		ma, mb := marks(a, unit, capacity), marks(b, unit, capacity)
		var or, and, not []bool
		for i := range ma {
			or, and, not = append(or, ma[i] || mb[i]), append(and, ma[i] && mb[i]), append(not, !ma[i])
		}
		for name, c := range map[string]struct {
			got  []area
			want []bool
		}{
			"union":     {union(slices.Clone(a), slices.Clone(b)), or},
			"intersect": {intersect(a, b), and},
			"invert":    {invert(a, capacity), not},
		} {
			if !isTidy(c.got, capacity) || !slices.Equal(marks(c.got, unit, capacity), c.want) {
				t.Fatalf("%s of %v and %v: %v", name, a, b, c.got)
			}
		}
	})
}

func TestTidyTakesAnything(t *testing.T) {
	list := []area{{Offset: math.MaxInt64 - 1, Length: math.MaxInt64}, {Offset: -5, Length: 10}, {Offset: 7, Length: math.MaxInt64}, {Offset: 6, Length: 1}, {Offset: 3, Length: -9}}
	if d := cmp.Diff([]area{{Offset: 0, Length: 5}, {Offset: 6, Length: 94}}, tidy(list, 100)); d != "" {
		t.Error(d)
	}
	if got := tidy([]area{{Offset: -5, Length: math.MaxInt64}}, 100); len(got) != 1 || got[0] != (area{Offset: 0, Length: 100}) {
		t.Error(got)
	}
}

func TestRoundOut(t *testing.T) {
	list := []area{{Offset: 1, Length: 1}, {Offset: 130, Length: 10}, {Offset: 199, Length: 2}, {Offset: 650, Length: 1}}
	want := []area{{Offset: 0, Length: 300}, {Offset: 600, Length: 60}}
	if d := cmp.Diff(want, roundOut(list, 100, 660)); d != "" {
		t.Error(d)
	}
}

func TestCoalesceKeepsItsBudget(t *testing.T) {
	const block, capacity = 64 * kib, 400 * 64 * kib
	rapid.Check(t, func(t *rapid.T) {
		list := roundOut(tidyList(t, "list", block, capacity), block, capacity)
		before := slices.Clone(list)
		got := coalesce(list, block)
		if !isTidy(got, capacity) {
			t.Fatalf("%v became %v", before, got)
		}
		if more := total(got) - total(before); more > total(before)/10 || more < 0 {
			t.Fatalf("%d more to read than the %d that changed", more, total(before))
		}
		if d := intersect(before, got); !slices.Equal(d, before) && len(before) > 0 {
			t.Fatalf("%v lost from %v", got, before)
		}
	})
}

func TestCoalesceJoinsSmallGapsFirst(t *testing.T) {
	const b = 64 * kib
	// 40 blocks changed: the budget is 3 blocks. Gaps of 2, 1 and 1 blocks.
	list := []area{{Offset: 0, Length: 10 * b}, {Offset: 12 * b, Length: 10 * b}, {Offset: 23 * b, Length: 10 * b}, {Offset: 34 * b, Length: 10 * b}}
	want := []area{{Offset: 0, Length: 10 * b}, {Offset: 12 * b, Length: 32 * b}}
	if d := cmp.Diff(want, coalesce(list, b)); d != "" {
		t.Error(d)
	}
	far := []area{{Offset: 0, Length: 1000 * b}, {Offset: 1017 * b, Length: 1000 * b}}
	if got := coalesce(slices.Clone(far), b); !slices.Equal(got, far) {
		t.Errorf("a gap of more than %d bytes was joined: %v", maxGap, got)
	}
}

func TestBlockSet(t *testing.T) {
	const block = 100
	rapid.Check(t, func(t *rapid.T) {
		capacity := rapid.Int64Range(1, 3000).Draw(t, "capacity")
		list := roundOut(tidyList(t, "list", 10, capacity), block, capacity)
		m := marks(list, block, capacity)
		s := leftOut(list, block, capacity)
		var want []area
		for i, marked := range m {
			if !marked {
				off := int64(i) * block
				want = append(want, area{Offset: off, Length: min(block, capacity-off)})
			}
		}
		if s.n != int64(len(want)) {
			t.Fatalf("%d left out, want %d", s.n, len(want))
		}
		for k, w := range want {
			if got := s.at(int64(k)); got != w {
				t.Fatalf("block %d left out by %v: %v, want %v", k, list, got, w)
			}
		}
		for off := int64(0); off < capacity; off += 37 {
			i := slices.IndexFunc(want, func(a area) bool { return a.End() > off })
			got, ok := s.next(off)
			if ok != (i >= 0) || (ok && got != want[i]) {
				t.Fatalf("next left out by %v from %d: %v %v", list, off, got, ok)
			}
		}
	})
}

// A list of millions of areas has to be handled in the time of a few passes.
func BenchmarkPlanMillions(b *testing.B) {
	const n, block = 4 << 20, 128 * kib
	for range b.N {
		list := make([]area, n)
		for i := range list {
			list[i] = area{Offset: int64(i) * 3 * block, Length: 64 * kib}
		}
		capacity := int64(n) * 3 * block
		list = coalesce(roundOut(tidy(list, capacity), block, capacity), block)
		leftOut(list, block, capacity).at(n)
	}
}
