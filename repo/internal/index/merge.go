package index

import (
	"bytes"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

const (
	mergeFactor = 8
	mergeMost   = 256     // parts of one merge: bounds its memory to 16 MiB
	tierBase    = 1 << 12 // segments below that all count as small
	lockName    = "lock"
)

// tier is the order of magnitude of a segment: 8 of one tier make one of the next.
func tier(entries int64) int {
	t := 0
	for n := int64(tierBase); entries >= n; n *= mergeFactor {
		t++
	}
	return t
}

// plan picks segments to merge, or none. The oldest of the smallest tier that is
// full come first, so that the order of sequences stays meaningful.
func plan(live []*segment) []*segment {
	tiers := map[int][]*segment{}
	for _, s := range slices.Backward(live) {
		if !s.broken.Load() {
			t := tier(s.entries)
			tiers[t] = append(tiers[t], s)
		}
	}
	for t := range tier(maxEntries) + 1 {
		if len(tiers[t]) < mergeFactor {
			continue
		}
		var parts []*segment
		sum := int64(0)
		for _, s := range tiers[t] {
			if sum+s.entries <= maxEntries && len(parts) < mergeMost {
				parts = append(parts, s)
				sum += s.entries
			}
		}
		if len(parts) > 1 {
			return parts
		}
	}
	return nil
}

// Merge joins segments of like size while there are eight of them, and deletes
// nothing. It does nothing while another process is merging, or when others have
// rotated the keys. Damage met on the
// way is reported as in Lookup; the segment concerned is left alone.
func (x *Index) Merge(ctx context.Context) error {
	x.mu.RLock()
	todo := plan(x.live) != nil
	x.mu.RUnlock()
	if !todo {
		return nil
	}
	lock, err := x.fsys.Lock(path.Join(x.dir, lockName), true, false)
	if errors.Is(err, fsx.ErrLocked) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lock the index for merging: %w", err)
	}
	defer lock.Close()
	// Others may have merged the same before we had the lock.
	if err := x.Reload(ctx); err != nil {
		return err
	}
	if x.behind() {
		return nil
	}
	for {
		x.mu.RLock()
		parts := plan(x.live)
		x.mu.RUnlock()
		if parts == nil {
			return nil
		}
		if err := x.merge(ctx, parts); err != nil {
			s := culprit(parts, err)
			if s == nil {
				return err
			}
			x.report(s, err)
		}
	}
}

// behind tells whether there are segments of a key epoch that we do not have. What
// such a one supersedes looks alive to us, and merged into a new segment it would be
// alive for all: records of deleted packs would be back for good.
func (x *Index) behind() bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, err := range x.damage {
		if errors.Is(err, keys.ErrNoEpoch) {
			return true
		}
	}
	return false
}

// culprit is the part whose damage stopped a merge.
func culprit(parts []*segment, err error) *segment {
	if !errors.Is(err, ErrDamaged) {
		return nil
	}
	for _, s := range parts {
		if s.broken.Load() {
			return s
		}
	}
	return nil
}

func (x *Index) merge(ctx context.Context, parts []*segment) error {
	src, err := x.mergeOf(parts)
	if err != nil {
		return err
	}
	return x.mergeFrom(ctx, parts, src)
}

// mergeFrom writes what src brings of the parts as a segment that supersedes them.
func (x *Index) mergeFrom(ctx context.Context, parts []*segment, src source) error {
	x.mu.RLock()
	there := make(map[name]bool, len(x.names))
	for _, n := range x.names {
		there[n] = true
	}
	x.mu.RUnlock()
	var sequence uint64
	var dead []name
	for _, s := range parts {
		sequence = max(sequence, s.sequence)
		dead = append(dead, s.name)
		for _, n := range s.superseded {
			if there[n] {
				dead = append(dead, n)
			}
		}
	}
	slices.SortFunc(dead, func(a, b name) int { return bytes.Compare(a[:], b[:]) })
	dead = slices.Compact(dead)
	if len(dead) > maxSuperseded {
		return fmt.Errorf("merging would supersede %d segments, at most %d can be named; delete superseded ones (prune)", len(dead), maxSuperseded)
	}
	s, err := x.write(ctx, src, sequence, dead)
	if err != nil {
		return err
	}
	x.changing.Lock()
	defer x.changing.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.live = slices.DeleteFunc(slices.Clone(x.live), func(l *segment) bool { return slices.Contains(parts, l) })
	for _, p := range parts {
		x.superseded = append(x.superseded, p.file)
	}
	slices.Sort(x.superseded)
	x.superseded = slices.Compact(x.superseded)
	x.install(s)
	return nil
}

// merged is a source that joins segments. Equal records come out next to each
// other; whoever takes them drops the copies.
type merged struct {
	heads []head
}

type head struct {
	rec []byte
	src *scan
	age int // place among the parts, the newest first
}

func (m *merged) Len() int      { return len(m.heads) }
func (m *merged) Swap(i, j int) { m.heads[i], m.heads[j] = m.heads[j], m.heads[i] }
func (m *merged) Push(any)      { panic("index: a merge only shrinks") }
func (m *merged) Pop() any      { m.heads = m.heads[:len(m.heads)-1]; return nil }
func (m *merged) Less(i, j int) bool {
	a, b := &m.heads[i], &m.heads[j]
	if c := bytes.Compare(a.rec[:32], b.rec[:32]); c != 0 {
		return c < 0
	}
	return a.age < b.age
}

func (x *Index) mergeOf(parts []*segment) (*mergeSource, error) {
	parts = slices.Clone(parts)
	sortLive(parts)
	m := &mergeSource{}
	for i, s := range parts {
		src := &scan{s: s, files: &x.files}
		rec, err := src.next()
		if err != nil {
			return nil, err
		}
		m.heads = append(m.heads, head{rec: rec, src: src, age: i})
	}
	heap.Init(&m.merged)
	return m, nil
}

// mergeSource keeps a copy of what it hands out, because moving on may read over
// it.
type mergeSource struct {
	merged
	buf [block.Size]byte
}

func (m *mergeSource) next() ([]byte, error) {
	if len(m.heads) == 0 {
		return nil, io.EOF
	}
	h := &m.heads[0]
	copy(m.buf[:], h.rec)
	rec, err := h.src.next()
	switch {
	case errors.Is(err, io.EOF):
		heap.Pop(&m.merged)
	case err != nil:
		return nil, err
	default:
		h.rec = rec
		heap.Fix(&m.merged, 0)
	}
	return m.buf[:], nil
}

// seen tells whether rec is among the records in list.
func seen(list, rec []byte) bool {
	for ; len(list) > 0; list = list[block.Size:] {
		if bytes.Equal(list[:block.Size], rec) {
			return true
		}
	}
	return false
}
