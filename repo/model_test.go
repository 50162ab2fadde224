package repo

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hikae/repo/internal/fsx"
)

// generation of the model: what was committed and how it must read.
type modelGeneration struct {
	ref     Ref
	content []byte
}

// TestModel writes random generations, each as random changes against a random
// earlier one, and compares all of them with plain byte slices.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ctx := context.Background()
		mem := fsx.NewMem()
		initMem(t, mem)
		r := mustOpen(t, mem)
		defer func() { _ = r.Close() }()
		var all []modelGeneration
		for g := range rapid.IntRange(1, 4).Draw(t, "generations") {
			var parent *Disk
			var before []byte
			if len(all) > 0 && rapid.IntRange(0, 4).Draw(t, "orphan") > 0 {
				p := rapid.SampledFrom(all).Draw(t, "parent")
				parent, before = openDisk(t, r, p.ref), p.content
			}
			grow := rapid.SampledFrom([]int{0, 0, 1, 777, testBlock, 300 * testBlock}).Draw(t, "grow")
			content := append(bytes.Clone(before), make([]byte, grow)...)
			if parent == nil {
				content = make([]byte, rapid.IntRange(0, 20*testBlock).Draw(t, "capacity"))
			}
			changed := mutate(t, content)
			s, err := r.Begin(ctx, SessionOptions{Compression: rapid.SampledFrom([]string{"zstd", "s2", "none"}).Draw(t, "compression")})
			if err != nil {
				t.Fatal(err)
			}
			tree, err := writeModel(ctx, t, s, content, parent, changed)
			if err != nil {
				t.Fatal(err)
			}
			// A full read against the same parent comes to the same tree, and
			// stores nothing.
			stored := s.Stats().BytesNew
			again, err := write(ctx, s, content, parent, whole(content))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(again.Root, tree.Root) || again.DataBytes != tree.DataBytes {
				t.Fatalf("changed areas gave %x, a full read %x", tree.Root, again.Root)
			}
			if n := s.Stats().BytesNew; n != stored {
				t.Fatalf("a full read of the same stored %d bytes more", n-stored)
			}
			ref, err := s.Commit(ctx, Manifest{VM: testVM, Time: testClock().Add(time.Duration(g) * time.Second), Disks: []DiskManifest{diskOf("d", tree)}})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			all = append(all, modelGeneration{ref, content})
			if rapid.Bool().Draw(t, "reopen") {
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				r = mustOpen(t, mem)
			}
		}
		for _, g := range all {
			d := openDisk(t, r, g.ref)
			same(t, d, g.content)
			for range 5 {
				if len(g.content) == 0 {
					break
				}
				off := rapid.IntRange(0, len(g.content)-1).Draw(t, "offset")
				n := rapid.IntRange(0, len(g.content)-off).Draw(t, "length")
				if rapid.Bool().Draw(t, "prefetch") {
					d.Prefetch(int64(off), int64(n))
				}
				p := make([]byte, n)
				if k, err := d.ReadAt(p, int64(off)); k != n || err != nil || !bytes.Equal(p, g.content[off:off+n]) {
					t.Fatalf("%d bytes at %d: %d, %v", n, off, k, err)
				}
				first := off / testBlock * testBlock
				end := min(len(g.content), first+3*testBlock)
				q := bytes.Clone(g.content[first:end])
				if ok, err := d.Matches(ctx, int64(first), q); !ok || err != nil {
					t.Fatalf("%d bytes at %d do not match: %v", len(q), first, err)
				}
				q[(off-first)%len(q)] ^= 1
				if ok, err := d.Matches(ctx, int64(first), q); ok || err != nil {
					t.Fatalf("changed bytes at %d match: %v", first, err)
				}
			}
		}
		clean(t, r)
	})
}

// mutate changes stretches of content and returns them, and perhaps some that did
// not change, rounded to blocks, ascending and apart.
func mutate(t *rapid.T, content []byte) []extent {
	var changed []extent
	blocks := (len(content) + testBlock - 1) / testBlock
	for b := 0; b < blocks; b++ {
		b += rapid.SampledFrom([]int{0, 0, 1, 2, 5, 280}).Draw(t, "skip")
		n := min(rapid.IntRange(1, 4).Draw(t, "blocks"), blocks-b)
		if n <= 0 {
			break
		}
		p := content[b*testBlock : min((b+n)*testBlock, len(content))]
		switch rapid.IntRange(0, 4).Draw(t, "change") {
		case 0: // told to have changed, but has not
		case 1:
			clear(p)
		case 2:
			p[rapid.IntRange(0, len(p)-1).Draw(t, "at")]++
		default:
			copy(p, image(rapid.Uint64Range(1, 5).Draw(t, "seed"), len(p)))
		}
		changed = append(changed, extent{int64(b * testBlock), int64(len(p))})
		b += n
	}
	return changed
}

// writeModel writes the changed areas, those of zeros perhaps by Zero, in pieces of
// random size. New content without a parent is all written.
func writeModel(ctx context.Context, t *rapid.T, s *Session, content []byte, parent *Disk, changed []extent) (DiskTree, error) {
	w, err := s.Disk(ctx, int64(len(content)), parent)
	if err != nil {
		return DiskTree{}, err
	}
	defer w.Abandon()
	for _, e := range changed {
		p := content[e.off : e.off+e.n]
		if isZero(p) && rapid.Bool().Draw(t, "zero") {
			if err := w.Zero(ctx, e.off, e.n); err != nil {
				return DiskTree{}, fmt.Errorf("zero: %w", err)
			}
			continue
		}
		for off := int64(0); off < e.n; {
			n := min(e.n-off, int64(rapid.IntRange(1, 9).Draw(t, "piece"))*testBlock)
			if err := w.Write(ctx, e.off+off, bytes.Clone(p[off:off+n]), nil); err != nil {
				return DiskTree{}, err
			}
			off += n
		}
	}
	return w.Finish(ctx)
}
