package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sort"
	"strings"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// What is lost is found by names: quarantine/ has a mark for each pack that is gone or
// damaged. While there are marks, a session walks the tree of each parent, so that what
// the parent has in such packs, and no other pack has, is read from the host again.
const (
	quarantineDir = "quarantine"
	damagedSuffix = ".damaged"
)

// markName is the name of a pack's mark in quarantine/.
func markName(k packKey) string { return k.typ.Dir() + "-" + k.handle.String() }

// parseQuarantine reads a name in quarantine/: whose it is, and whether it is the mark.
// Otherwise it is the damaged file, put aside.
func parseQuarantine(name string) (k packKey, mark, ok bool) {
	for _, t := range []pack.Type{pack.Data, pack.Node} {
		rest, mine := strings.CutPrefix(name, t.Dir()+"-")
		digits, rest, aside := strings.Cut(rest, damagedSuffix)
		h, err := block.ParseHandle(digits)
		if mine && err == nil && (!aside || rest == "" || rest[0] == '-') {
			return packKey{t, h}, !aside, true
		}
	}
	return packKey{}, false, false
}

// quarantined is what quarantine/ has of a pack.
type quarantined struct {
	marked bool
	files  []string // damaged files that were put aside, by their names in quarantine/
}

func (r *Repository) readQuarantine() (map[packKey]*quarantined, error) {
	list, err := r.fs.ReadDir(quarantineDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // copies of a repository may lack its empty directories
	}
	if err != nil {
		return nil, err
	}
	var all map[packKey]*quarantined
	for _, e := range list {
		k, mark, ok := parseQuarantine(e.Name())
		if !ok {
			continue
		}
		if all == nil {
			all = make(map[packKey]*quarantined)
		}
		q := all[k]
		if q == nil {
			q = &quarantined{}
			all[k] = q
		}
		if mark {
			q.marked = true
		} else {
			q.files = append(q.files, e.Name())
		}
	}
	return all, nil
}

// Extent is a stretch of a disk, in bytes.
type Extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// lostParts is what a session found lost of a disk.
type lostParts struct {
	s     *Session
	areas []Extent
	nodes map[block.Record]bool // tree nodes that cannot be read
	data  int64                 // blocks that are no holes, below the nodes that can
}

// Lost finds out which areas of a disk, the future parent of one that this session
// makes, are lost: they lie in packs that are gone or damaged, and no other pack is known
// to have the same. It looks only while hikae repair packs has left marks of such packs,
// and costs nothing else. With search it looks in any case; it then reads the whole tree,
// and packs with nodes that do not read count as damaged.
//
// The areas ascend, do not touch, and are whole blocks except at the end of the disk.
// They have to be written, or zeroed, when the disk is made with rest for its parent;
// rest is the disk with its lost nodes taken for holes, good for Matches and NextData
// outside of the areas.
func (s *Session) Lost(ctx context.Context, d *Disk, search bool) (rest *Disk, lost []Extent, err error) {
	if !search && !s.reuse.anyLost() {
		return d, nil, nil
	}
	v := &lostWalk{lostParts: lostParts{s: s, nodes: make(map[block.Record]bool)}}
	if err := v.walk(ctx, d.tree.Root, d.tree.Levels, 0); err != nil {
		return nil, nil, fmt.Errorf("look for what is lost of the previous generation: %w", err)
	}
	bs := int64(s.r.config.BlockSize)
	for i := range v.areas {
		a := &v.areas[i]
		a.Offset *= bs
		a.Length = min(a.Length*bs, d.size-a.Offset)
	}
	c := *d
	c.lost = &v.lostParts
	return &c, v.areas, nil
}

// lostWalk visits a tree; its areas count in blocks.
type lostWalk struct{ lostParts }

func (v *lostWalk) walk(ctx context.Context, rec block.Record, level int, base int64) error {
	if rec.IsHole() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	gone, err := v.s.isLost(ctx, rec)
	if err != nil {
		return err
	}
	if level == 0 {
		if gone {
			v.note(base, 1)
		}
		v.data++ // its entry is there, whatever became of the block
		return nil
	}
	if gone {
		v.nodes[rec] = true
		v.note(base, tree.Span(level+1))
		return nil
	}
	node, err := v.s.r.readNode(ctx, rec)
	if err == nil {
		err = checkEntries(node, level)
	}
	switch {
	case errors.Is(err, ErrDamaged) || errors.Is(err, tree.ErrNode):
		// Stored again it must not be taken for known.
		v.s.reuse.distrust(packKey{pack.Node, rec.Pack})
		v.nodes[rec] = true
		v.note(base, tree.Span(level+1))
		return nil
	case err != nil:
		return err
	}
	for i := range tree.Fan {
		e, err := tree.Entry(node, level, i)
		if err != nil {
			return err
		}
		if err := v.walk(ctx, e, level-1, base+int64(i)*tree.Span(level)); err != nil {
			return err
		}
	}
	return nil
}

func checkEntries(node []byte, level int) error {
	for i := range tree.Fan {
		if _, err := tree.Entry(node, level, i); err != nil {
			return err
		}
	}
	return nil
}

func (v *lostWalk) note(base, blocks int64) {
	if n := len(v.areas); n > 0 && v.areas[n-1].Offset+v.areas[n-1].Length == base {
		v.areas[n-1].Length += blocks
		return
	}
	v.areas = append(v.areas, Extent{base, blocks})
}

// isLost tells whether no pack is known that is there and has the record.
func (s *Session) isLost(ctx context.Context, rec block.Record) (bool, error) {
	there, err := s.reuse.there(packKey{pack.TypeOf(rec.Kind), rec.Pack})
	if there || err != nil {
		return false, err
	}
	var failed error
	found, err := s.index.Lookup(ctx, rec.ID, func(l block.Location) bool {
		if l.Kind == block.Hole || l.Kind.IsNode() != rec.Kind.IsNode() || failed != nil {
			return false
		}
		there, err := s.reuse.there(packKey{pack.TypeOf(l.Kind), l.Pack})
		failed = err
		return there
	})
	return !found, errors.Join(err, failed)
}

// loader brings the tree's nodes; the lost ones, if they were looked for, as holes.
func (d *Disk) loader() tree.Loader {
	if d.lost == nil || len(d.lost.nodes) == 0 {
		return loader{d.r}
	}
	return holesLoader{loader{d.r}, d.lost.nodes}
}

// holesLoader takes lost nodes for nodes of holes.
type holesLoader struct {
	loader
	lost map[block.Record]bool
}

var nodeOfHoles = make([]byte, tree.NodeSize) // never written to

func (l holesLoader) Node(ctx context.Context, rec block.Record) ([]byte, error) {
	if l.lost[rec] {
		return nodeOfHoles, nil
	}
	return l.loader.Node(ctx, rec)
}

// lostLoader tells a builder which nodes are lost.
type lostLoader struct {
	loader
	lost map[block.Record]bool
}

func (l lostLoader) Node(ctx context.Context, rec block.Record) ([]byte, error) {
	if l.lost[rec] {
		return nil, tree.ErrLost
	}
	return l.loader.Node(ctx, rec)
}

// relearn is a DiskWriter's account of the lost areas of its parent: all of them must be
// written or zeroed, for what they held is not there.
type relearn struct {
	areas  []Extent
	next   int   // the first area that is not behind us
	from   int64 // how far that one is done
	missed *Extent
}

// at tells whether a byte lies in a lost area.
func (l *relearn) at(off int64) bool {
	i := sort.Search(len(l.areas), func(i int) bool { return l.areas[i].Offset > off })
	return i > 0 && off < l.areas[i-1].Offset+l.areas[i-1].Length
}

// cover takes note of a stretch that is written or zeroed; they ascend.
func (l *relearn) cover(off, n int64) {
	for ; l.next < len(l.areas); l.next++ {
		a := l.areas[l.next]
		start, end := max(a.Offset, l.from), a.Offset+a.Length
		if off+n <= start {
			return
		}
		if off > start && l.missed == nil {
			l.missed = &Extent{start, min(off, end) - start}
		}
		if off+n < end {
			l.from = off + n
			return
		}
	}
}

// end is what has not been covered; nil when all was.
func (l *relearn) end() error {
	l.cover(1<<62, 1)
	if l.missed == nil {
		return nil
	}
	return &DamageError{
		What: fmt.Sprintf("bytes %d to %d of the previous generation", l.missed.Offset, l.missed.Offset+l.missed.Length),
		Err:  errors.New("they are lost and were not written again; read the disk whole (hikae backup --full)"),
	}
}
