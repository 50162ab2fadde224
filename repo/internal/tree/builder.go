package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"hikae/repo/internal/block"
)

// Store seals a node and says where it lies. It does not keep the bytes.
type Store func(ctx context.Context, node []byte) (block.Record, error)

// Builder makes a disk's tree from its parent's. Changes come in strictly
// ascending order; what is not changed keeps the parent's entry. One goroutine
// at a time.
type Builder struct {
	load   Loader
	store  Store
	levels int
	blocks int64
	next   int64 // changes below this are over
	data   int64 // blocks that are not holes
	frames []frame
	// wrapped holds the new nodes above the root of a parent with fewer levels:
	// they are stored, but perhaps not readable yet.
	wrapped map[block.ID][]byte
}

// frame is the open node of one level.
type frame struct {
	open  bool
	base  int64        // first block it covers
	old   block.Record // what it was made from
	orig  []byte       // its bytes then; nil for a hole
	node  []byte
	dirty bool
}

// NewBuilder makes a builder for a disk of so many blocks. parentData is how many
// of the parent's blocks are not holes. A disk may have grown, not shrunk.
func NewBuilder(ctx context.Context, l Loader, s Store, blocks int64, parent Tree, parentData int64) (*Builder, error) {
	if blocks < parent.Blocks {
		return nil, fmt.Errorf("a disk of %d blocks cannot shrink to %d", parent.Blocks, blocks)
	}
	b := &Builder{load: l, store: s, levels: Levels(blocks), blocks: blocks, data: parentData}
	b.frames = make([]frame, b.levels+1)
	root := parent.Root
	if !root.IsHole() {
		for level := parent.Levels; level < b.levels; level++ {
			node := make([]byte, NodeSize)
			root.Append(node[:0])
			r, err := s(ctx, node)
			if err != nil {
				return nil, err
			}
			if b.wrapped == nil {
				b.wrapped = make(map[block.ID][]byte)
			}
			b.wrapped[r.ID] = node
			root = r
		}
	}
	return b, b.enter(ctx, b.levels, 0, root)
}

// Node loads a node, the ones just wrapped around the parent included.
func (b *Builder) Node(ctx context.Context, r block.Record) ([]byte, error) {
	if node, ok := b.wrapped[r.ID]; ok {
		return node, nil
	}
	return b.load.Node(ctx, r)
}

// enter opens a node as the one of its level.
func (b *Builder) enter(ctx context.Context, level int, base int64, r block.Record) error {
	f := &b.frames[level]
	f.base, f.old, f.orig, f.dirty = base, r, nil, false
	if f.node == nil {
		f.node = make([]byte, NodeSize)
	}
	if r.IsHole() {
		clear(f.node)
	} else {
		node, err := b.Node(ctx, r)
		switch {
		case errors.Is(err, ErrLost):
			clear(f.node)
			f.dirty = true // the entry above must not go on pointing to it
		case err != nil:
			return err
		default:
			f.orig = node
			copy(f.node, node)
		}
	}
	f.open = true
	return nil
}

// leave closes the node of a level and all below it, and notes the outcome in
// the node above.
func (b *Builder) leave(ctx context.Context, level int) error {
	if level == 0 || !b.frames[level].open {
		return nil
	}
	if err := b.leave(ctx, level-1); err != nil {
		return err
	}
	f := &b.frames[level]
	f.open = false
	if !f.dirty || bytes.Equal(f.node, f.orig) {
		return nil
	}
	r := block.Record{}
	if !allHoles(f.node) {
		var err error
		if r, err = b.store(ctx, f.node); err != nil {
			return err
		}
	}
	if level == b.levels {
		f.old = r
		return nil
	}
	up := &b.frames[level+1]
	up.set(int((f.base-up.base)/Span(level+1)), r)
	return nil
}

func allHoles(node []byte) bool {
	// A record of a kind starts with an id that is never all zeros in practice,
	// but the kind is what counts.
	for i := block.Size - 1; i < len(node); i += block.Size {
		if block.Kind(node[i]) != block.Hole {
			return false
		}
	}
	return true
}

func (f *frame) set(i int, r block.Record) {
	r.Append(f.node[i*block.Size : i*block.Size])
	f.dirty = true
}

// path opens the node of the given level that covers block n.
func (b *Builder) path(ctx context.Context, n int64, level int) (*frame, error) {
	for l := b.levels; l > level; l-- {
		up, span := &b.frames[l], Span(l)
		i := (n - up.base) / span
		base := up.base + i*span
		down := &b.frames[l-1]
		if down.open && down.base == base {
			continue
		}
		if err := b.leave(ctx, l-1); err != nil {
			return nil, err
		}
		r, err := Entry(up.node, l, int(i))
		if err != nil {
			return nil, err
		}
		if err := b.enter(ctx, l-1, base, r); err != nil {
			return nil, err
		}
	}
	return &b.frames[level], nil
}

func (b *Builder) advance(first, count int64) error {
	if first < b.next || count < 0 || first+count > b.blocks {
		return fmt.Errorf("blocks %d to %d of a disk of %d, after block %d", first, first+count, b.blocks, b.next)
	}
	b.next = first + count
	return nil
}

// Set makes block n the one that r leads to; r may be a hole.
func (b *Builder) Set(ctx context.Context, n int64, r block.Record) error {
	if r.IsHole() {
		return b.Hole(ctx, n, 1)
	}
	if err := b.advance(n, 1); err != nil {
		return err
	}
	f, err := b.path(ctx, n, 1)
	if err != nil {
		return err
	}
	i := int(n - f.base)
	old, err := Entry(f.node, 1, i)
	if err != nil {
		return err
	}
	if old.IsHole() {
		b.data++
	}
	if old != r {
		f.set(i, r)
	}
	return nil
}

// Hole makes count blocks from first on a hole. It touches no node that lies
// wholly inside, except to count what was there.
func (b *Builder) Hole(ctx context.Context, first, count int64) error {
	if err := b.advance(first, count); err != nil {
		return err
	}
	for end := first + count; first < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		// The widest entry that starts here and lies inside; beyond the end of
		// the disk everything is a hole anyway.
		level := 1
		for level < b.levels && first%Span(level+1) == 0 && (first+Span(level+1) <= end || end == b.blocks) {
			level++
		}
		f, err := b.path(ctx, first, level)
		if err != nil {
			return err
		}
		i := int((first - f.base) / Span(level))
		old, err := Entry(f.node, level, i)
		if err != nil {
			return err
		}
		if !old.IsHole() {
			n, err := Count(ctx, b, old, level)
			if err != nil {
				return err
			}
			b.data -= n
			f.set(i, block.Record{})
		}
		first += Span(level)
	}
	return nil
}

// Finish stores what is open and returns the tree, how many of its blocks are not
// holes, and whether the last one is such. The builder is used up.
func (b *Builder) Finish(ctx context.Context) (t Tree, data int64, last bool, err error) {
	if b.blocks > 0 {
		f, err := b.path(ctx, b.blocks-1, 1)
		if err != nil {
			return Tree{}, 0, false, err
		}
		r, err := Entry(f.node, 1, int(b.blocks-1-f.base))
		if err != nil {
			return Tree{}, 0, false, err
		}
		last = !r.IsHole()
	}
	if err := b.leave(ctx, b.levels); err != nil {
		return Tree{}, 0, false, err
	}
	root := b.frames[b.levels].old
	return Tree{Root: root, Levels: b.levels, Blocks: b.blocks}, b.data, last, nil
}
