package tree

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"hikae/repo/internal/block"
)

// store keeps nodes in memory and counts.
type store struct {
	nodes         map[block.ID][]byte
	stored, loads int
}

func (s *store) Store(_ context.Context, node []byte) (block.Record, error) {
	if err := Check(node); err != nil {
		return block.Record{}, err
	}
	if allHoles(node) {
		return block.Record{}, errors.New("a node of holes was stored")
	}
	id := block.ID(sha256.Sum256(node))
	s.nodes[id] = append([]byte(nil), node...)
	s.stored++
	return block.Record{ID: id, Location: block.Location{Pack: 1, Offset: 64, Length: 100, Kind: block.NodeZstd}}, nil
}

func (s *store) Node(_ context.Context, r block.Record) ([]byte, error) {
	s.loads++
	n, ok := s.nodes[r.ID]
	if !ok {
		return nil, fmt.Errorf("node %v was never stored", r.ID)
	}
	return n, nil
}

func newStore() *store { return &store{nodes: map[block.ID][]byte{}} }

func leafRecord(v uint64) block.Record {
	return block.Record{
		ID:       block.ID{1, byte(v), byte(v >> 8), byte(v >> 16)},
		Location: block.Location{Pack: 9, Offset: uint32(v), Length: 200, Kind: block.Zstd},
	}
}

func TestGeometry(t *testing.T) {
	for _, c := range []struct {
		n      int64
		levels int
	}{{0, 1}, {1, 1}, {256, 1}, {257, 2}, {65536, 2}, {65537, 3}, {1 << 24, 3}, {1<<24 + 1, 4}, {Blocks(MaxCapacity, 64<<10), 6}} {
		if got := Levels(c.n); got != c.levels {
			t.Errorf("%d blocks: %d levels, want %d", c.n, got, c.levels)
		}
	}
	if Blocks(0, 10) != 0 || Blocks(1, 10) != 1 || Blocks(10, 10) != 1 || Blocks(11, 10) != 2 {
		t.Error("Blocks")
	}
}

// disk is the model: what is not in the map is a hole.
type disk struct {
	blocks int64
	data   map[int64]block.Record
	tree   Tree
}

func (d *disk) verify(t *rapid.T, s *store) {
	ctx := context.Background()
	var spots []int64
	for n := range d.data {
		spots = append(spots, n-1, n, n+1)
	}
	for range 20 {
		spots = append(spots, rapid.Int64Range(0, d.blocks-1).Draw(t, "spot"))
	}
	for _, n := range spots {
		if n < 0 || n >= d.blocks {
			continue
		}
		r, err := d.tree.Lookup(ctx, s, n)
		if err != nil {
			t.Fatal(err)
		}
		if r != d.data[n] {
			t.Fatalf("block %d is %v, want %v", n, r, d.data[n])
		}
	}
	// Walking from data to hole to data meets every block exactly once.
	seen := int64(0)
	for at := int64(0); ; {
		start, err := d.tree.NextData(ctx, s, at)
		if err != nil {
			t.Fatal(err)
		}
		if start == d.blocks {
			break
		}
		end, err := d.tree.NextHole(ctx, s, start)
		if err != nil {
			t.Fatal(err)
		}
		if end <= start {
			t.Fatalf("data from %d to %d", start, end)
		}
		if end-start > int64(len(d.data)) {
			t.Fatalf("data from %d to %d, but only %d blocks", start, end, len(d.data))
		}
		out := make([]block.Record, end-start)
		if err := d.tree.Records(ctx, s, start, out); err != nil {
			t.Fatal(err)
		}
		for i, r := range out {
			if r.IsHole() || r != d.data[start+int64(i)] {
				t.Fatalf("block %d is %v", start+int64(i), r)
			}
		}
		seen += end - start
		at = end
	}
	if seen != int64(len(d.data)) {
		t.Fatalf("met %d blocks, %d are data", seen, len(d.data))
	}
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ctx := context.Background()
		s := newStore()
		size := rapid.SampledFrom([]int64{1, 5, 255, 256, 257, 1000, 65536, 65537, 70000, 1 << 24, 1<<24 + 5, 1 << 33})
		d := &disk{blocks: size.Draw(t, "blocks"), data: map[int64]block.Record{}}
		d.tree = Tree{Levels: Levels(d.blocks), Blocks: d.blocks}
		for range rapid.IntRange(1, 5).Draw(t, "generations") {
			next := &disk{blocks: d.blocks, data: map[int64]block.Record{}}
			if rapid.Bool().Draw(t, "grow") {
				next.blocks = max(d.blocks, size.Draw(t, "to"))
			}
			for n, r := range d.data {
				next.data[n] = r
			}
			b, err := NewBuilder(ctx, s, s.Store, next.blocks, d.tree, int64(len(d.data)))
			if err != nil {
				t.Fatal(err)
			}
			at := int64(0)
			for range rapid.IntRange(0, 40).Draw(t, "changes") {
				if at >= next.blocks {
					break
				}
				at += min(rapid.SampledFrom([]int64{0, 0, 1, 3, 200, 256, 5000, 65536}).Draw(t, "gap"), next.blocks-1-at)
				if rapid.IntRange(0, 3).Draw(t, "what") == 0 {
					n := min(rapid.SampledFrom([]int64{1, 2, 255, 256, 257, 512, 70000, 1 << 25, 1 << 40}).Draw(t, "hole"), next.blocks-at)
					if err := b.Hole(ctx, at, n); err != nil {
						t.Fatal(err)
					}
					for k := range next.data {
						if k >= at && k < at+n {
							delete(next.data, k)
						}
					}
					at += n
					continue
				}
				r := leafRecord(rapid.Uint64Range(1, 3).Draw(t, "record"))
				if err := b.Set(ctx, at, r); err != nil {
					t.Fatal(err)
				}
				next.data[at] = r
				at++
			}
			tree, data, last, err := b.Finish(ctx)
			if err != nil {
				t.Fatal(err)
			}
			_, wantLast := next.data[next.blocks-1]
			if data != int64(len(next.data)) || last != wantLast {
				t.Fatalf("%d blocks of data, last %v; want %d, %v", data, last, len(next.data), wantLast)
			}
			if len(next.data) == 0 != tree.Root.IsHole() {
				t.Fatalf("root %v over %d blocks of data", tree.Root, len(next.data))
			}
			next.tree = tree
			d.verify(t, s) // the parent is as it was
			next.verify(t, s)
			d = next
		}
		// The same content in one go gives the same tree: no history shows.
		b, err := NewBuilder(ctx, s, s.Store, d.blocks, Tree{Levels: d.tree.Levels, Blocks: d.blocks}, 0)
		if err != nil {
			t.Fatal(err)
		}
		for at := int64(0); ; at++ {
			if at, err = d.tree.NextData(ctx, s, at); err != nil {
				t.Fatal(err)
			}
			if at == d.blocks {
				break
			}
			if err := b.Set(ctx, at, d.data[at]); err != nil {
				t.Fatal(err)
			}
		}
		again, _, _, err := b.Finish(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if again != d.tree {
			t.Fatal("the same content gave another tree")
		}
	})
}

func TestUntouchedCostsNothing(t *testing.T) {
	ctx := context.Background()
	s := newStore()
	const blocks = 100000
	b, _ := NewBuilder(ctx, s, s.Store, blocks, Tree{Levels: Levels(blocks), Blocks: blocks}, 0)
	for n := range int64(blocks) {
		if err := b.Set(ctx, n, leafRecord(uint64(n))); err != nil {
			t.Fatal(err)
		}
	}
	first, data, _, err := b.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s.stored, s.loads = 0, 0
	b, _ = NewBuilder(ctx, s, s.Store, blocks, first, data)
	for n := range int64(blocks) {
		if err := b.Set(ctx, n, leafRecord(uint64(n))); err != nil {
			t.Fatal(err)
		}
	}
	second, _, _, err := b.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if second != first || s.stored != 0 {
		t.Fatalf("writing the same stored %d nodes", s.stored)
	}
	s.stored, s.loads = 0, 0
	b, _ = NewBuilder(ctx, s, s.Store, blocks, first, data)
	if err := b.Set(ctx, 50000, leafRecord(7)); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err = b.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	if s.stored != 3 || s.loads > 6 {
		t.Fatalf("one block stored %d nodes and loaded %d", s.stored, s.loads)
	}
}

func TestRefuses(t *testing.T) {
	ctx := context.Background()
	s := newStore()
	b, err := NewBuilder(ctx, s, s.Store, 10, Tree{Levels: 1, Blocks: 10}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Set(ctx, 5, leafRecord(1)); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{-1, 0, 5, 10} {
		if b.Set(ctx, n, leafRecord(1)) == nil {
			t.Errorf("block %d passed after 5 on a disk of 10", n)
		}
	}
	if b.Hole(ctx, 8, 3) == nil {
		t.Error("a hole beyond the end passed")
	}
	if _, err := NewBuilder(ctx, s, s.Store, 9, Tree{Levels: 1, Blocks: 10}, 0); err == nil {
		t.Error("a disk shrank")
	}
	// A leaf in the place of an inner node, and the other way round.
	leaf := make([]byte, NodeSize)
	leafRecord(3).Append(leaf[:0])
	r, err := s.Store(ctx, leaf)
	if err != nil {
		t.Fatal(err)
	}
	wrong := Tree{Root: r, Levels: 2, Blocks: 1000}
	if _, err := wrong.Lookup(ctx, s, 0); !errors.Is(err, ErrNode) {
		t.Errorf("leaf as inner node: %v", err)
	}
	inner := make([]byte, NodeSize)
	r.Append(inner[:0])
	if r, err = s.Store(ctx, inner); err != nil {
		t.Fatal(err)
	}
	wrong = Tree{Root: r, Levels: 1, Blocks: 100}
	if _, err := wrong.NextData(ctx, s, 0); !errors.Is(err, ErrNode) {
		t.Errorf("inner node as leaf: %v", err)
	}
}

func FuzzCheck(f *testing.F) {
	node := make([]byte, NodeSize)
	f.Add(node)
	good := append([]byte(nil), node...)
	leafRecord(1).Append(good[:0])
	f.Add(good)
	bad := append([]byte(nil), node...)
	bad[47] = 0x33
	f.Add(bad)
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if Check(b) != nil {
			return
		}
		for i := range Fan {
			if _, err := block.Decode(b[i*block.Size:]); err != nil {
				t.Fatalf("entry %d of a node that passed: %v", i, err)
			}
		}
	})
}
