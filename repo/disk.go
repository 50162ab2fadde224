package repo

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sync/errgroup"

	"hikae/repo/internal/block"
	"hikae/repo/internal/cache"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

type (
	packEntry  = cache.Entry[packKey, *pack.Pack]
	blockEntry = cache.Entry[block.ID, *[]byte]
)

// Limits of reading, in bytes: what a read is cut into, and how much of a pack is
// read at once.
const (
	readWindow = 8 << 20
	maxRun     = 1 << 20
)

// Disk is one disk of a generation. It never changes, so it may be used by many
// goroutines; they do not wait for each other.
type Disk struct {
	r    *Repository
	from string // the manifest it came from
	size int64
	data int64
	tree tree.Tree
	lost *lostParts // nil: nobody has looked
}

var _ io.ReaderAt = (*Disk)(nil)

// Size is the disk's capacity in bytes.
func (d *Disk) Size() int64 { return d.size }

// DataBytes is how many bytes of the disk are not holes.
func (d *Disk) DataBytes() int64 { return d.data }

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt with a context. Bytes that cannot be proved are an error
// that matches ErrDamaged; what p holds then is undefined. Holes read as zeros.
func (d *Disk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: negative offset", off)
	}
	if off >= d.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	short := int64(len(p)) > d.size-off
	if short {
		p = p[:d.size-off]
	}
	n := 0
	for n < len(p) {
		q := p[n:min(len(p), n+readWindow)]
		if err := d.window(ctx, q, off+int64(n)); err != nil {
			return n, err
		}
		n += len(q)
	}
	if short {
		return n, io.EOF
	}
	return n, nil
}

// window reads a stretch that lies on the disk.
func (d *Disk) window(ctx context.Context, p []byte, off int64) error {
	bs := int64(d.r.config.BlockSize)
	first := off / bs
	var room [readWindow/(64<<10) + 1]block.Record
	records := room[:(off+int64(len(p))-1)/bs-first+1]
	if err := d.tree.Records(ctx, loader{d.r}, first, records); err != nil {
		return err
	}
	var whole []target
	for i, rec := range records {
		begin := max((first+int64(i))*bs, off)
		end := min((first+int64(i)+1)*bs, off+int64(len(p)))
		dst := p[begin-off : end-off]
		if rec.IsHole() {
			clear(dst)
			continue
		}
		var e *blockEntry
		var err error
		if int64(len(dst)) == bs {
			// A whole block goes straight where it belongs, unless it is in
			// memory or on its way there.
			if e, err = d.r.blocks.Lookup(ctx, rec.ID); err == nil && e == nil {
				whole = append(whole, target{rec: rec, dst: dst})
				continue
			}
		} else {
			e, err = d.r.loadBlock(ctx, rec)
		}
		if err != nil {
			return err
		}
		copy(dst, (*e.Value())[begin%bs:])
		e.Release()
	}
	switch len(whole) {
	case 0:
		return nil
	case 1:
		return d.r.fetch(ctx, whole[0].rec, whole[0].dst)
	}
	return d.r.fetchAll(ctx, whole)
}

// target is a record and the block it fills.
type target struct {
	rec  block.Record
	dst  []byte
	room bool // dst has codec.Slack bytes more, which may be overwritten
}

// runs sorts targets by place and joins neighbours, so that storage sees few and
// large reads, up to most bytes each.
func runs(all []target, most int) [][]target {
	slices.SortFunc(all, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.rec.Pack, b.rec.Pack), cmp.Compare(a.rec.Offset, b.rec.Offset))
	})
	var out [][]target
	start, size := 0, 0
	for i, t := range all {
		if i > start {
			last := all[i-1].rec
			if t.rec.Pack != last.Pack || t.rec.Offset != last.Offset+last.Length || size+int(t.rec.Length) > most {
				out = append(out, all[start:i])
				start, size = i, 0
			}
		}
		size += int(t.rec.Length)
	}
	return append(out, all[start:])
}

// fetchAll fills all targets, in parallel.
func (r *Repository) fetchAll(ctx context.Context, all []target) error {
	// Small enough that every worker gets some.
	share := 0
	for _, t := range all {
		share += int(t.rec.Length)
	}
	parts := runs(all, min(maxRun, share/r.opt.Workers+1))
	if len(parts) == 1 || r.opt.Workers == 1 {
		for _, part := range parts {
			if err := r.fetchRun(ctx, part); err != nil {
				return err
			}
		}
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(r.opt.Workers)
	for _, part := range parts {
		g.Go(func() error { return r.fetchRun(ctx, part) })
	}
	return g.Wait()
}

// fetchRun reads neighbours at once. What fails is tried again alone, which knows
// how to look elsewhere and what to say.
func (r *Repository) fetchRun(ctx context.Context, part []target) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(part) == 1 {
		return r.fetchTarget(ctx, part[0])
	}
	ok := make([]bool, len(part))
	r.tryRun(ctx, part, func(i int) { ok[i] = true })
	for i, t := range part {
		if !ok[i] {
			if err := r.fetchTarget(ctx, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// tryRun fills what it can from one read and says of each when it is there.
func (r *Repository) tryRun(ctx context.Context, part []target, there func(i int)) {
	length := 0
	for _, t := range part {
		if r.plausible(t.rec) != nil {
			return
		}
		length += int(t.rec.Length)
	}
	x := r.readers.Get().(*reader)
	defer r.readers.Put(x)
	sealed := x.room(length)
	e, err := r.fromPack(ctx, part[0].rec, sealed)
	if err != nil {
		return
	}
	defer e.Release()
	for i, t := range part {
		n := int(t.rec.Length)
		if r.unsealTarget(e.Value(), x, t, sealed[:n:n]) == nil {
			there(i)
		}
		sealed = sealed[n:]
	}
}

// NextData finds the first stretch of data at or after off: start is off or the
// block boundary where data begins, end is where the next hole begins, both
// within the disk. When only holes follow the error is io.EOF. It reads tree
// nodes only.
func (d *Disk) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	if off < 0 {
		return 0, 0, fmt.Errorf("next data at %d: negative offset", off)
	}
	if off >= d.size {
		return 0, 0, io.EOF
	}
	bs := int64(d.r.config.BlockSize)
	first, err := d.tree.NextData(ctx, d.loader(), off/bs)
	if err != nil {
		return 0, 0, err
	}
	if first == d.tree.Blocks {
		return 0, 0, io.EOF
	}
	last, err := d.tree.NextHole(ctx, d.loader(), first)
	if err != nil {
		return 0, 0, err
	}
	return max(off, first*bs), min(last*bs, d.size), nil
}

// Matches tells whether p is what the disk holds at off, by comparing hashes with
// the tree: it reads no data. off must be at a block boundary, and p must end at
// one or at the end of the disk.
func (d *Disk) Matches(ctx context.Context, off int64, p []byte) (bool, error) {
	bs := int64(d.r.config.BlockSize)
	if err := aligned(off, int64(len(p)), bs, d.size); err != nil {
		return false, err
	}
	if len(p) == 0 {
		return true, nil
	}
	records := make([]block.Record, tree.Blocks(int64(len(p)), int(bs)))
	if err := d.tree.Records(ctx, d.loader(), off/bs, records); err != nil {
		return false, err
	}
	h := d.r.hashers.Get().(*hasher)
	defer d.r.hashers.Put(h)
	for i, rec := range records {
		q := p[int64(i)*bs : min(int64(len(p)), int64(i+1)*bs)]
		if zero := isZero(q); zero || rec.IsHole() {
			if zero != rec.IsHole() {
				return false, nil
			}
			continue
		}
		if int64(len(q)) < bs {
			q = append(bytes.Clone(q), make([]byte, bs-int64(len(q)))...)
		}
		if h.block(q) != rec.ID {
			return false, nil
		}
	}
	return true, nil
}

// aligned checks a stretch that must consist of whole blocks, except at the end of
// the disk.
func aligned(off, n, bs, size int64) error {
	switch {
	case off < 0 || n < 0 || off > size || n > size-off:
		return fmt.Errorf("bytes %d to %d are not on a disk of %d", off, off+n, size)
	case off%bs != 0 || n%bs != 0 && off+n != size:
		return fmt.Errorf("bytes %d to %d are not whole blocks of %d", off, off+n, bs)
	}
	return nil
}
