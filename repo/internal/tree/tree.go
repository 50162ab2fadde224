// Package tree maps block numbers of a disk to records. A tree is radix 256:
// the path to a block is the bytes of its number, most significant first. Trees
// share nodes, so a disk that changed little costs only the nodes on the way to
// what changed.
//
// Invariants: leaves are level one and lead to blocks, nodes above lead to nodes
// one level below; a hole anywhere stands for zeros over all it covers, and a
// node that would hold nothing but holes is a hole itself, so that two trees
// with the same content have the same holes, whatever was written in between.
//
// Promises: a builder keeps one path in memory; a reader keeps nothing. Nodes
// that do not decode are errors, never panics.
package tree

import (
	"context"
	"errors"
	"fmt"

	"hikae/repo/internal/block"
)

// ErrNode says that a node's bytes are not a node at its place.
var ErrNode = errors.New("malformed tree node")

// ErrLost is what a Loader answers for a node that is known to be lost. A Builder and
// Count take it for a node of holes.
var ErrLost = errors.New("the node is lost")

// Loader brings nodes. The bytes have NodeSize, passed Check, and are not
// changed by anyone.
type Loader interface {
	Node(ctx context.Context, r block.Record) ([]byte, error)
}

// Check proves that the bytes are a node: its size, and that each entry decodes.
func Check(node []byte) error {
	if len(node) != NodeSize {
		return fmt.Errorf("%w: %d bytes", ErrNode, len(node))
	}
	for i := range Fan {
		if _, err := block.Decode(node[i*block.Size:]); err != nil {
			return fmt.Errorf("%w: entry %d: %w", ErrNode, i, err)
		}
	}
	return nil
}

// Entry decodes entry i of a node on the given level.
func Entry(node []byte, level, i int) (block.Record, error) {
	r, err := block.Decode(node[i*block.Size:])
	if err != nil {
		return r, fmt.Errorf("%w: entry %d: %w", ErrNode, i, err)
	}
	if !fits(r, level) {
		return r, fmt.Errorf("%w: entry %d on level %d is a %v", ErrNode, i, level, r.Kind)
	}
	return r, nil
}

// fits tells whether r can be an entry of a node on the level.
func fits(r block.Record, level int) bool {
	if level == 1 {
		return !r.Kind.IsNode()
	}
	return !r.Kind.IsBlock()
}

// Tree is the root of one disk's map.
type Tree struct {
	Root   block.Record
	Levels int
	Blocks int64 // blocks of the disk; all beyond are holes
}

// Lookup returns the record of block n.
func (t Tree) Lookup(ctx context.Context, l Loader, n int64) (block.Record, error) {
	var out [1]block.Record
	err := t.Records(ctx, l, n, out[:])
	return out[0], err
}

// Records fills out with the records of consecutive blocks, first being the
// number of out[0].
func (t Tree) Records(ctx context.Context, l Loader, first int64, out []block.Record) error {
	if first < 0 || first+int64(len(out)) > t.Blocks {
		return fmt.Errorf("blocks %d to %d of a disk of %d", first, first+int64(len(out)), t.Blocks)
	}
	for len(out) > 0 {
		n, err := t.leaf(ctx, l, first, out)
		if err != nil {
			return err
		}
		first, out = first+int64(n), out[n:]
	}
	return nil
}

// leaf fills as much of out as one leaf, or one hole, covers.
func (t Tree) leaf(ctx context.Context, l Loader, first int64, out []block.Record) (int, error) {
	r := t.Root
	for level := t.Levels; level >= 1; level-- {
		if r.IsHole() {
			span := Span(level) * Fan
			n := int(min(int64(len(out)), span-first%span))
			clear(out[:n])
			return n, nil
		}
		node, err := l.Node(ctx, r)
		if err != nil {
			return 0, err
		}
		i := int(first / Span(level) % Fan)
		if level > 1 {
			if r, err = Entry(node, level, i); err != nil {
				return 0, err
			}
			continue
		}
		n := min(len(out), Fan-i)
		for j := range n {
			if out[j], err = Entry(node, 1, i+j); err != nil {
				return 0, err
			}
		}
		return n, nil
	}
	return 0, fmt.Errorf("%w: a tree of %d levels", ErrNode, t.Levels)
}

// NextData returns the first block from n on that is not a hole, or t.Blocks.
func (t Tree) NextData(ctx context.Context, l Loader, n int64) (int64, error) {
	return t.next(ctx, l, n, false)
}

// NextHole returns the first block from n on that is a hole, or t.Blocks.
func (t Tree) NextHole(ctx context.Context, l Loader, n int64) (int64, error) {
	return t.next(ctx, l, n, true)
}

func (t Tree) next(ctx context.Context, l Loader, n int64, hole bool) (int64, error) {
	if n >= t.Blocks {
		return t.Blocks, nil
	}
	got, err := search(ctx, l, t.Root, t.Levels, 0, n, hole)
	if err != nil {
		return 0, err
	}
	if got < 0 || got > t.Blocks {
		got = t.Blocks
	}
	return got, nil
}

// search looks below r, which covers blocks from base on, for the first hole, or
// the first block that is none, from n on; -1 means there is none.
func search(ctx context.Context, l Loader, r block.Record, level int, base, n int64, hole bool) (int64, error) {
	if r.IsHole() || level == 0 {
		if r.IsHole() == hole {
			return max(base, n), nil
		}
		return -1, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	node, err := l.Node(ctx, r)
	if err != nil {
		return 0, err
	}
	span := Span(level)
	for i := max(n-base, 0) / span; i < Fan; i++ {
		e, err := Entry(node, level, int(i))
		if err != nil {
			return 0, err
		}
		got, err := search(ctx, l, e, level-1, base+i*span, n, hole)
		if got >= 0 || err != nil {
			return got, err
		}
	}
	return -1, nil
}

// Count returns how many blocks below r, an entry of a node on the given level,
// are not holes.
func Count(ctx context.Context, l Loader, r block.Record, level int) (int64, error) {
	if r.IsHole() {
		return 0, nil
	}
	if level == 1 {
		return 1, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	node, err := l.Node(ctx, r)
	if errors.Is(err, ErrLost) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var sum int64
	for i := range Fan {
		e, err := Entry(node, level-1, i)
		if err != nil {
			return 0, err
		}
		n, err := Count(ctx, l, e, level-1)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
