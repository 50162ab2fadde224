package backup

import (
	"cmp"
	"slices"

	"hikae/backup/vmdk"
)

// area is a range of a disk in bytes. Lists of areas are sorted, do not
// overlap or touch, and stay within the disk; tidy makes such a list. They may
// have millions of elements, so everything here is linear in their number and
// works in place where it can; nothing depends on the disk's size.
type area = vmdk.Area

// tidy sorts areas, cuts them to a disk of this capacity and joins those that
// touch. It reuses the list's memory.
func tidy(list []area, capacity int64) []area {
	kept := list[:0]
	for _, a := range list {
		off := max(a.Offset, 0)
		// Offset+Length may overflow in a list that came from outside.
		length := min(a.Length, capacity)
		if a.Offset < 0 {
			length = min(a.Length+a.Offset, capacity)
		}
		length = min(length, capacity-off)
		if length > 0 {
			kept = append(kept, area{Offset: off, Length: length})
		}
	}
	if !slices.IsSortedFunc(kept, func(a, b area) int { return cmp.Compare(a.Offset, b.Offset) }) {
		slices.SortFunc(kept, func(a, b area) int { return cmp.Compare(a.Offset, b.Offset) })
	}
	return join(kept)
}

// join merges neighbours of a list that is sorted by offset.
func join(list []area) []area {
	out := list[:0]
	for _, a := range list {
		if n := len(out); n > 0 && a.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].End(), a.End()) - out[n-1].Offset
			continue
		}
		out = append(out, a)
	}
	return out
}

// roundOut widens every area to whole blocks; the disk's last block ends where
// the disk ends. It reuses the list's memory.
func roundOut(list []area, block, capacity int64) []area {
	for i, a := range list {
		start := a.Offset / block * block
		end := min((a.End()+block-1)/block*block, capacity)
		list[i] = area{Offset: start, Length: end - start}
	}
	return join(list)
}

// total is the sum of the lengths.
func total(list []area) int64 {
	var n int64
	for _, a := range list {
		n += a.Length
	}
	return n
}

// invert returns what a list leaves out of a disk.
func invert(list []area, capacity int64) []area {
	out := make([]area, 0, len(list)+1)
	var at int64
	for _, a := range list {
		if a.Offset > at {
			out = append(out, area{Offset: at, Length: a.Offset - at})
		}
		at = a.End()
	}
	if at < capacity {
		out = append(out, area{Offset: at, Length: capacity - at})
	}
	return out
}

// union returns what is in either list.
func union(a, b []area) []area {
	if len(b) == 0 {
		return a
	}
	if len(a) == 0 {
		return b
	}
	out := make([]area, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0].Offset <= b[0].Offset {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return join(append(append(out, a...), b...))
}

// intersect returns what is in both lists.
func intersect(a, b []area) []area {
	var out []area
	for len(a) > 0 && len(b) > 0 {
		start, end := max(a[0].Offset, b[0].Offset), min(a[0].End(), b[0].End())
		if start < end {
			out = append(out, area{Offset: start, Length: end - start})
		}
		if a[0].End() <= b[0].End() {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}

// How far reading may go beyond what changed, to save requests: gaps of at most
// maxGap bytes are read along, as long as all of them together stay under one
// part in gapShare of what changed. The promise to operators is 1.1; the rest
// is left for requests that have to be repeated.
const (
	maxGap   = 1 << 20
	gapShare = 12
)

// coalesce joins areas of whole blocks across small gaps, smallest gaps first,
// within the budget above. A request costs a host about as much as a few
// hundred kilobytes, so fewer, longer reads are faster even though they carry
// more. It reuses the list's memory.
func coalesce(list []area, block int64) []area {
	if len(list) < 2 {
		return list
	}
	budget := total(list) / gapShare
	var count [maxGap/minBlock + 1]int64 // gaps by length in blocks
	gap := func(i int) int64 {
		n := list[i].Offset - list[i-1].End()
		if n > maxGap {
			return 0
		}
		return (n + block - 1) / block
	}
	for i := 1; i < len(list); i++ {
		count[gap(i)]++
	}
	widest := int64(0) // every gap up to this many blocks is joined
	for n := int64(1); n < int64(len(count)); n++ {
		cost := n * block * count[n]
		if cost > budget {
			break
		}
		budget -= cost
		widest = n
	}
	out := list[:1]
	end := list[0].End()
	for i := 1; i < len(list); i++ {
		a := list[i]
		n := (a.Offset - end + block - 1) / block
		join := a.Offset-end <= maxGap && n <= widest
		if !join && n == widest+1 && n*block <= min(budget, maxGap) {
			budget -= n * block
			join = true
		}
		end = a.End()
		if join {
			out[len(out)-1].Length = end - out[len(out)-1].Offset
		} else {
			out = append(out, a)
		}
	}
	return out
}

// minBlock is the smallest block size a repository may have, in bytes.
const minBlock = 64 << 10

// blockSet answers questions about the blocks that a list of whole-block areas
// leaves out, without ever listing them.
type blockSet struct {
	areas    []area  // whole blocks
	before   []int64 // before[i]: left-out blocks in front of areas[i]
	block    int64
	capacity int64
	n        int64 // left-out blocks
}

// leftOut prepares the set for areas that roundOut made.
func leftOut(areas []area, block, capacity int64) *blockSet {
	s := &blockSet{areas: areas, before: make([]int64, len(areas)), block: block, capacity: capacity}
	var end int64 // in blocks
	for i, a := range areas {
		s.n += a.Offset/block - end
		s.before[i] = s.n
		end = (a.End() + block - 1) / block
	}
	s.n += (capacity+block-1)/block - end
	return s
}

// at returns the k-th left-out block, 0 ≤ k < n, as an area.
func (s *blockSet) at(k int64) area {
	// The areas in front of the wanted block are those with before ≤ k.
	i, _ := slices.BinarySearchFunc(s.before, k, func(before, k int64) int {
		if before <= k {
			return -1
		}
		return 1
	})
	blk := k
	if i > 0 {
		blk = (s.areas[i-1].End()+s.block-1)/s.block + k - s.before[i-1]
	}
	off := blk * s.block
	return area{Offset: off, Length: min(s.block, s.capacity-off)}
}

// next returns the first left-out block at or behind off.
func (s *blockSet) next(off int64) (area, bool) {
	off = off / s.block * s.block
	i, found := slices.BinarySearchFunc(s.areas, off, func(a area, off int64) int { return cmp.Compare(a.Offset, off) })
	if !found {
		i-- // the area that may cover off starts before it
	}
	if i >= 0 && i < len(s.areas) && off < s.areas[i].End() {
		off = (s.areas[i].End() + s.block - 1) / s.block * s.block
	}
	if off >= s.capacity {
		return area{}, false
	}
	return area{Offset: off, Length: min(s.block, s.capacity-off)}, true
}
