package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// DiskDamage is a stretch of a disk that cannot be read.
type DiskDamage struct {
	Offset     int64  `json:"offset"` // on the disk, bytes
	Length     int64  `json:"length"`
	Pack       string `json:"pack,omitempty"`        // where the first of it should be
	PackOffset int64  `json:"pack_offset,omitempty"` // and at which byte
	What       string `json:"what"`
}

// DiskProof is what DiskVerifier found of one disk.
type DiskProof struct {
	Blocks      int64        `json:"blocks"`       // that are not holes
	BytesData   int64        `json:"bytes_data"`   // of the disk, holes left out
	BlocksRead  int64        `json:"blocks_read"`  // the others were proved before, by the same DiskVerifier
	BytesHashed int64        `json:"bytes_hashed"` // of blocks that were read
	BytesStored int64        `json:"bytes_stored"` // sealed bytes read for them
	Nodes       int64        `json:"nodes"`        // of the tree that were read
	BytesBad    int64        `json:"bytes_bad"`    // of the disk, which cannot be read
	Damage      []DiskDamage `json:"damage,omitempty"`
	MoreDamage  bool         `json:"more_damage,omitempty"` // the list was cut
}

const (
	// verifyWindow is how many blocks are sorted by place before they are read: with
	// 128 KiB blocks the packs of 4 GiB of a disk are read from front to end.
	verifyWindow = 32 << 10
	// maxProved bounds the nodes remembered as proved: leaves of 8 TiB of data.
	maxProved = 256 << 10
	// maxDamage bounds a list of damage; maxBadBlocks what it is made of.
	maxDamage    = 256
	maxBadBlocks = 64 << 10
)

// DiskVerifier reads disks whole: it opens every node and block that a disk leads to
// and computes its id again. What it has proved once, of this disk or another, it
// does not read a second time, so generations of one VM cost what they differ by. It
// is for one goroutine, and reads by as many as the repository has workers, past the
// caches. Memory is bounded, whatever the size of the disks.
type DiskVerifier struct {
	r      *Repository
	proved map[block.Record]int64 // nodes below which all is good, and how many blocks those are
	whole  map[string]*Disk       // the last disk of a line that was good
	nodes  *hasher
}

// NewDiskVerifier makes one.
func (r *Repository) NewDiskVerifier() *DiskVerifier {
	return &DiskVerifier{r: r, proved: map[block.Record]int64{}, whole: map[string]*Disk{}, nodes: newHasher(r.ring)}
}

// Verify proves a disk. line, if not "", names the disk over its generations, so that
// blocks that stand where the one before had them are known to be good. progress, if
// not nil, is told of bytes of data proved, of DataBytes; it is called from one
// goroutine at a time.
//
// Damage is in the proof; the error is about storage that cannot be read at all, or
// ctx.
func (v *DiskVerifier) Verify(ctx context.Context, d *Disk, line string, progress func(done, total int64)) (DiskProof, error) {
	w := &diskWalk{v: v, d: d, bs: int64(v.r.config.BlockSize), progress: progress}
	var before block.Record
	if was := v.whole[line]; was != nil && line != "" && was.tree.Levels == d.tree.Levels {
		before = was.tree.Root
	}
	if len(v.proved) > maxProved/2 {
		clear(v.proved)
	}
	_, err := w.node(ctx, d.tree.Root, before, d.tree.Levels, 0)
	if err == nil {
		err = w.flush(ctx)
	}
	if err != nil {
		return w.proof, fmt.Errorf("verify a disk: %w", err)
	}
	w.finish()
	if w.proof.BytesBad == 0 && line != "" {
		v.whole[line] = d
	}
	return w.proof, nil
}

// diskWalk is the work on one disk.
type diskWalk struct {
	v        *DiskVerifier
	d        *Disk
	bs       int64
	progress func(done, total int64)
	window   []placed
	walked   []walkedNode

	mu    sync.Mutex
	proof DiskProof
	bad   []badStretch
	more  bool // of bad
}

// placed is a block and its number on the disk.
type placed struct {
	rec block.Record
	n   int64
}

// walkedNode is a node whose blocks may all turn out to be good.
type walkedNode struct {
	rec        block.Record
	from, span int64 // blocks of the disk
	blocks     int64 // that are no holes
}

type badStretch struct {
	from, n int64 // blocks
	pack    block.Handle
	offset  uint32
	what    string
}

// node walks a node that covers blocks from first on, and returns how many blocks
// are below. before is what the disk before had in its place.
func (w *diskWalk) node(ctx context.Context, rec, before block.Record, level int, first int64) (int64, error) {
	if rec.IsHole() {
		return 0, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if n, ok := w.v.proved[rec]; ok {
		w.count(n, true)
		return n, nil
	}
	node, err := w.v.r.readNode(ctx, rec)
	if err == nil && w.v.nodes.node(node) != rec.ID {
		err = w.v.r.readError(rec, fmt.Errorf("%w: its content has another id", pack.ErrFormat))
	}
	if err == nil {
		err = w.entriesFit(node, level, rec)
	}
	if err != nil {
		return 0, w.note(rec, first, tree.Span(level)*tree.Fan, err)
	}
	w.proof.Nodes++
	var old []byte
	if before.Kind.IsNode() {
		// What it was is only used to save work, so it may fail to read.
		if old, err = w.v.r.loadNode(ctx, before); err != nil {
			old = nil
		}
	}
	var blocks int64
	for i := range tree.Fan {
		e, _ := tree.Entry(node, level, i)
		var was block.Record
		if old != nil {
			was, _ = tree.Entry(old, level, i)
		}
		n, err := w.entry(ctx, e, was, level-1, first+int64(i)*tree.Span(level))
		if err != nil {
			return 0, err
		}
		blocks += n
	}
	if len(w.walked) < maxProved {
		w.walked = append(w.walked, walkedNode{rec, first, tree.Span(level) * tree.Fan, blocks})
	}
	return blocks, nil
}

// entriesFit proves that all entries of a node are what they can be there.
func (w *diskWalk) entriesFit(node []byte, level int, rec block.Record) error {
	for i := range tree.Fan {
		if _, err := tree.Entry(node, level, i); err != nil {
			return w.v.r.readError(rec, fmt.Errorf("%w: %w", pack.ErrFormat, err))
		}
	}
	return nil
}

func (w *diskWalk) entry(ctx context.Context, e, was block.Record, level int, first int64) (int64, error) {
	switch {
	case e.IsHole():
		return 0, nil
	case level > 0:
		return w.node(ctx, e, was, level, first)
	case first >= w.d.tree.Blocks:
		return 0, w.note(e, first, 1, fmt.Errorf("%w: a block beyond the end of the disk", ErrDamaged))
	case e == was:
		w.count(1, true)
		return 1, nil
	}
	w.window = append(w.window, placed{e, first})
	if len(w.window) == verifyWindow {
		return 1, w.flush(ctx)
	}
	return 1, nil
}

// note keeps damage; other errors come back.
func (w *diskWalk) note(rec block.Record, from, n int64, err error) error {
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	from = min(from, w.d.tree.Blocks)
	n = min(n, w.d.tree.Blocks-from)
	w.proof.BytesBad += max(min((from+n)*w.bs, w.d.size)-from*w.bs, 1)
	if len(w.bad) == maxBadBlocks {
		w.more = true
		return nil
	}
	w.bad = append(w.bad, badStretch{from, n, rec.Pack, rec.Offset, err.Error()})
	return nil
}

// count adds blocks that are done with.
func (w *diskWalk) count(blocks int64, before bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.proof.Blocks += blocks
	if !before {
		w.proof.BlocksRead += blocks
	}
	if w.progress != nil {
		w.progress(min(w.proof.Blocks*w.bs, w.d.data), w.d.data)
	}
}

// flush proves the blocks of the window, in the order in which they lie in packs.
func (w *diskWalk) flush(ctx context.Context) error {
	slices.SortFunc(w.window, func(a, b placed) int {
		return cmp.Or(cmp.Compare(a.rec.Pack, b.rec.Pack), cmp.Compare(a.rec.Offset, b.rec.Offset), cmp.Compare(a.n, b.n))
	})
	g, ctx := errgroup.WithContext(ctx)
	work := make(chan []placed)
	for range w.v.r.opt.Workers {
		g.Go(func() error {
			k := &blockProver{w: w, hash: newHasher(w.v.r.ring), plain: make([]byte, w.bs)}
			for part := range work {
				if err := k.run(ctx, part); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(work)
		for rest := w.window; len(rest) > 0; {
			n := runLength(rest)
			select {
			case work <- rest[:n]:
			case <-ctx.Done():
				return ctx.Err()
			}
			rest = rest[n:]
		}
		return nil
	})
	err := g.Wait()
	w.window = w.window[:0]
	return err
}

// runLength is how many of the first blocks lie behind each other in one pack and
// are read at once. The same block may be there several times.
func runLength(list []placed) int {
	size := int64(list[0].rec.Length)
	for i := 1; i < len(list); i++ {
		a, b := list[i-1].rec, list[i].rec
		switch {
		case a == b:
		case a.Pack == b.Pack && uint64(a.Offset)+uint64(a.Length) == uint64(b.Offset) && size+int64(b.Length) <= maxRun:
			size += int64(b.Length)
		default:
			return i
		}
	}
	return len(list)
}

// blockProver is one goroutine's means.
type blockProver struct {
	w     *diskWalk
	hash  *hasher
	plain []byte
}

// run proves neighbours, read at once.
func (k *blockProver) run(ctx context.Context, part []placed) error {
	r := k.w.v.r
	ok := make([]bool, len(part))
	size := k.together(ctx, part, ok)
	if err := ctx.Err(); err != nil {
		return err
	}
	var failed error // of the block before
	var blocks int64 // different ones
	for i, p := range part {
		if again := i > 0 && part[i-1].rec == p.rec; !again {
			blocks++
			failed = nil
			if !ok[i] {
				failed = k.alone(ctx, p.rec)
				size += int64(p.rec.Length)
			}
		}
		if failed != nil {
			if err := k.w.note(p.rec, p.n, 1, failed); err != nil {
				return err
			}
		}
	}
	k.w.count(int64(len(part)), false)
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	k.w.proof.BytesStored += size
	k.w.proof.BytesHashed += blocks * int64(r.config.BlockSize)
	return nil
}

// together proves what it can with one read and says which, and how much it read.
func (k *blockProver) together(ctx context.Context, part []placed, ok []bool) int64 {
	r := k.w.v.r
	for _, p := range part {
		if r.plausible(p.rec) != nil {
			return 0
		}
	}
	first, last := part[0].rec, part[len(part)-1].rec
	e, err := r.openPack(ctx, pack.Data, first.Pack)
	if err != nil {
		return 0
	}
	defer e.Release()
	x := r.readers.Get().(*reader)
	defer r.readers.Put(x)
	sealed := x.room(int(last.Offset + last.Length - first.Offset))
	if e.Value().ReadSealed(sealed, int64(first.Offset)) != nil {
		return 0
	}
	for i, p := range part {
		if i > 0 && part[i-1].rec == p.rec {
			continue // opening it has changed the bytes
		}
		at, n := p.rec.Offset-first.Offset, p.rec.Length
		ok[i] = p.rec.Kind.IsBlock() && r.unseal(e.Value(), x, p.rec, sealed[at:at+n:at+n], k.plain) == nil && k.hash.block(k.plain) == p.rec.ID
	}
	return int64(len(sealed))
}

// alone proves a block wherever it may be found.
func (k *blockProver) alone(ctx context.Context, rec block.Record) error {
	r := k.w.v.r
	if err := r.fetch(ctx, rec, k.plain); err != nil {
		return err
	}
	if k.hash.block(k.plain) != rec.ID {
		return r.readError(rec, fmt.Errorf("%w: its content has another id", pack.ErrFormat))
	}
	return nil
}

// finish sums up, and remembers the nodes below which all is good.
func (w *diskWalk) finish() {
	p := &w.proof
	p.BytesData = p.Blocks * w.bs
	if over := w.d.tree.Blocks*w.bs - w.d.size; over > 0 && p.Blocks > 0 && w.lastIsData() {
		p.BytesData -= over
	}
	slices.SortFunc(w.bad, func(a, b badStretch) int { return cmp.Compare(a.from, b.from) })
	if !w.more {
		for _, n := range w.walked {
			i, _ := slices.BinarySearchFunc(w.bad, n.from, func(b badStretch, from int64) int { return cmp.Compare(b.from+max(b.n, 1)-1, from) })
			if hurt := i < len(w.bad) && w.bad[i].from < n.from+n.span; !hurt && len(w.v.proved) < maxProved {
				w.v.proved[n.rec] = n.blocks
			}
		}
	}
	p.MoreDamage = w.more
	for i, b := range w.bad {
		d := DiskDamage{Offset: b.from * w.bs, What: b.what, PackOffset: int64(b.offset)}
		d.Length = max(min((b.from+b.n)*w.bs, w.d.size)-d.Offset, 0)
		if b.pack != 0 {
			d.Pack = b.pack.String()
		}
		if n := len(p.Damage); i > 0 && p.Damage[n-1].Pack == d.Pack && p.Damage[n-1].Offset+p.Damage[n-1].Length == d.Offset {
			p.Damage[n-1].Length += d.Length
			continue
		}
		if len(p.Damage) == maxDamage {
			p.MoreDamage = true
			break
		}
		p.Damage = append(p.Damage, d)
	}
}

// lastIsData tells whether the last block, which reaches past the end, is no hole.
func (w *diskWalk) lastIsData() bool {
	rec, err := w.d.tree.Lookup(context.Background(), loader{w.v.r}, w.d.tree.Blocks-1)
	return err == nil && !rec.IsHole()
}
