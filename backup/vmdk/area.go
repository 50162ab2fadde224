package vmdk

import (
	"cmp"
	"slices"
)

// Area is a range of a disk in bytes. Offset and Length are never negative.
type Area struct {
	Offset, Length int64
}

// End is the first byte behind the area.
func (a Area) End() int64 { return a.Offset + a.Length }

// MergeAreas sorts areas and joins those that touch or overlap; empty ones disappear. It works in place.
func MergeAreas(areas []Area) []Area {
	slices.SortFunc(areas, func(a, b Area) int { return cmp.Compare(a.Offset, b.Offset) })
	out := areas[:0]
	for _, a := range areas {
		if a.Length <= 0 {
			continue
		}
		if n := len(out); n > 0 && a.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].End(), a.End()) - out[n-1].Offset
			continue
		}
		out = append(out, a)
	}
	return out
}
