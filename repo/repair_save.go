package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// verifier proves records, one after the other.
type verifier struct {
	r       *Repository
	scratch pack.Scratch
	plain   []byte
	hash    *hasher
}

func (r *Repository) newVerifier() *verifier {
	return &verifier{r: r, plain: make([]byte, max(r.config.BlockSize, tree.NodeSize)), hash: newHasher(r.ring)}
}

// payload opens sealed bytes, in place, and proves that they are what the id says. It
// returns them as they were before they were sealed, still compressed.
func (v *verifier) payload(p *pack.Pack, rec block.Record, sealed []byte) ([]byte, error) {
	if err := v.r.plausible(rec); err != nil {
		return nil, err
	}
	dst := v.plain[:v.r.rawSize(rec.Kind)]
	payload, err := p.Unseal(&v.scratch, rec, len(dst), sealed)
	if err != nil {
		return nil, fmt.Errorf("%v at %d: %w", rec.Kind, rec.Offset, err)
	}
	if err := v.r.codec.Decompress(dst, rec.Kind, payload); err != nil {
		return nil, fmt.Errorf("%v at %d: %w", rec.Kind, rec.Offset, err)
	}
	id := v.hash.block
	if rec.Kind.IsNode() {
		id = v.hash.node
	}
	if id(dst) != rec.ID {
		return nil, fmt.Errorf("%w: the content of the %v at %d has another id", pack.ErrFormat, rec.Kind, rec.Offset)
	}
	return payload, nil
}

// atOnce is how many packs without a footer are saved together: the records that are
// known of them are held in memory, at most 3 MiB a pack.
const atOnce = 32

// saveAll mends packs, or stores anew what is left of them. Nothing is taken away
// before all of it lasts.
func (x *repairer) saveAll(ctx context.Context, list []*hurtPack) error {
	var todo []*hurtPack
	for _, h := range list {
		if h.Outcome == OutcomeInUse {
			continue
		}
		if !x.o.DryRun {
			ok, err := x.r.mend(ctx, h.key)
			if err != nil && !errors.Is(err, ErrDamaged) {
				return err
			}
			if ok {
				h.Outcome = OutcomeMended
				continue
			}
		}
		todo = append(todo, h)
	}
	var done int64
	for part := range slices.Chunk(todo, atOnce) {
		if err := x.savePart(ctx, part, func() {
			done++
			x.progress("save", done, int64(len(todo)))
		}); err != nil {
			return err
		}
	}
	if s := x.session; s != nil && len(todo) > 0 {
		if err := errors.Join(s.data.Flush(ctx), s.node.Flush(ctx)); err != nil {
			return s.explain(err)
		}
		if err := s.flushIndex(ctx); err != nil {
			return err
		}
		if err := s.failure(); err != nil {
			return err
		}
	}
	for _, h := range todo {
		if err := x.settle(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

// savePart saves some packs. Of those whose footer is gone the index and the trees know
// what was in them.
func (x *repairer) savePart(ctx context.Context, part []*hurtPack, told func()) error {
	known := make(map[packKey]map[block.Record]bool)
	footers := make(map[packKey][]block.Record)
	for _, h := range part {
		p, err := x.openRaw(h.key)
		if err == nil {
			err = twice(func() error {
				footers[h.key], err = p.Records()
				return err
			})
			_ = p.Close()
		}
		switch {
		case err == nil:
		case hurts(err):
			known[h.key] = make(map[block.Record]bool)
		default:
			return fmt.Errorf("read pack %v: %w", h.key.handle, err)
		}
	}
	if len(known) > 0 {
		if err := x.gather(ctx, known); err != nil {
			return err
		}
	}
	v := x.r.newVerifier()
	for _, h := range part {
		records := footers[h.key]
		for rec := range known[h.key] {
			records = append(records, rec)
		}
		slices.SortFunc(records, func(a, b block.Record) int {
			return cmp.Or(cmp.Compare(a.Offset, b.Offset), bytes.Compare(a.ID[:], b.ID[:]))
		})
		h.all = known[h.key] != nil // a node that cannot be read may know of more
		if err := x.save(ctx, v, h, records); err != nil {
			return fmt.Errorf("save what is left of pack %v: %w", h.key.handle, err)
		}
		told()
	}
	return nil
}

// gather finds what is known to have been in packs.
func (x *repairer) gather(ctx context.Context, known map[packKey]map[block.Record]bool) error {
	note := func(rec block.Record) {
		if m := known[packKey{pack.TypeOf(rec.Kind), rec.Pack}]; m != nil && len(m) < pack.MaxRecords {
			m[rec] = true
		}
	}
	index, err := x.r.idx(ctx)
	if err != nil {
		return err
	}
	if err := index.Scan(ctx, func(rec block.Record) error { note(rec); return nil }); err != nil {
		return err
	}
	seen := make(map[block.ID]bool)
	for _, g := range x.c.gens {
		for i := range g.manifest.Disks {
			d, err := g.OpenDisk(i)
			if err != nil {
				return err
			}
			if err := x.visit(ctx, seen, d.tree.Root, d.tree.Levels, note); err != nil {
				return err
			}
		}
	}
	return nil
}

// visit calls fn for every record of a tree, as far as its nodes can be read.
func (x *repairer) visit(ctx context.Context, seen map[block.ID]bool, rec block.Record, level int, fn func(block.Record)) error {
	if rec.IsHole() {
		return nil
	}
	fn(rec)
	if level == 0 || seen[rec.ID] {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(seen) >= maxSeen {
		clear(seen)
	}
	seen[rec.ID] = true
	node, err := x.r.readNode(ctx, rec)
	if errors.Is(err, ErrDamaged) {
		return nil
	}
	if err != nil {
		return err
	}
	for i := range tree.Fan {
		e, err := tree.Entry(node, level, i)
		if err != nil {
			return nil
		}
		if err := x.visit(ctx, seen, e, level-1, fn); err != nil {
			return err
		}
	}
	return nil
}

// save stores what still opens of a pack in new ones, unless another pack has it.
func (x *repairer) save(ctx context.Context, v *verifier, h *hurtPack, records []block.Record) error {
	p, err := x.openDamaged(h.key, records)
	if err != nil && !hurts(err) {
		return err
	}
	if p != nil {
		defer func() { _ = p.Close() }()
		if list, err := p.Records(); h.all && err == nil {
			records, h.all = list, false // its header was all that was wrong
		}
	}
	h.Records = len(records)
	var sealed reader
	for _, rec := range records {
		if err := ctx.Err(); err != nil {
			return err
		}
		elsewhere, err := x.elsewhere(ctx, v, &sealed, rec)
		if err != nil {
			return err
		}
		if elsewhere {
			h.RecordsElsewhere++
			continue
		}
		payload, err := x.readRecord(v, &sealed, p, rec)
		if hurts(err) {
			h.lost[rec.Offset] = rec
			continue
		}
		if err != nil {
			return err
		}
		fresh, err := x.keep(ctx, rec, payload)
		if err != nil {
			return err
		}
		if !fresh {
			h.RecordsElsewhere++
			continue
		}
		h.RecordsSaved++
		h.BytesSaved += int64(rec.Length)
	}
	return nil
}

// settle counts what is lost now that everything else is saved: another damaged pack may
// have had it.
func (x *repairer) settle(ctx context.Context, h *hurtPack) error {
	v := x.r.newVerifier()
	var buf reader
	for offset, rec := range h.lost {
		if err := ctx.Err(); err != nil {
			return err
		}
		found, err := x.elsewhere(ctx, v, &buf, rec)
		if err != nil {
			return err
		}
		if found || x.kept[rec.ID] {
			delete(h.lost, offset)
			h.RecordsElsewhere++
		}
	}
	h.RecordsLost = len(h.lost)
	h.Outcome = OutcomeSaved
	if h.RecordsLost > 0 || h.all && h.Records == 0 {
		h.Outcome = OutcomeLost
	}
	return nil
}

func (x *repairer) readRecord(v *verifier, buf *reader, p *pack.Pack, rec block.Record) ([]byte, error) {
	if p == nil {
		return nil, fmt.Errorf("%w: there is no pack", pack.ErrFormat)
	}
	if err := x.r.plausible(rec); err != nil {
		return nil, err
	}
	sealed := buf.room(int(rec.Length))
	if err := twice(func() error { return p.ReadSealed(sealed, int64(rec.Offset)) }); err != nil {
		return nil, err
	}
	return v.payload(p, rec, sealed)
}

// elsewhere tells whether a pack that stays has the record, and proves it.
func (x *repairer) elsewhere(ctx context.Context, v *verifier, buf *reader, rec block.Record) (bool, error) {
	index, err := x.r.idx(ctx)
	if err != nil {
		return false, err
	}
	var failed error
	found, err := index.Lookup(ctx, rec.ID, func(l block.Location) bool {
		k := packKey{pack.TypeOf(l.Kind), l.Pack}
		h, q := x.damaged[k], x.marks[k]
		if failed != nil || l.Kind == block.Hole || k.typ != pack.TypeOf(rec.Kind) ||
			h != nil && h.Outcome != OutcomeMended || q != nil && q.marked {
			return false
		}
		p, err := x.openRaw(k)
		if err == nil {
			defer func() { _ = p.Close() }()
			_, err = x.readRecord(v, buf, p, block.Record{ID: rec.ID, Location: l})
		}
		if err != nil && !hurts(err) {
			failed = err
		}
		return err == nil
	})
	return found, errors.Join(err, failed)
}

// keep stores a record anew; fresh is false when this run has done so already.
func (x *repairer) keep(ctx context.Context, rec block.Record, payload []byte) (fresh bool, err error) {
	s := x.session
	if s == nil {
		fresh := !x.kept[rec.ID]
		x.kept[rec.ID] = true
		return fresh, nil
	}
	l, mine := s.flight.claim(rec.ID)
	if !mine {
		_, err := l.wait(ctx)
		return false, err
	}
	to := s.data
	if rec.Kind.IsNode() {
		to = s.node
	}
	var scratch pack.Scratch
	loc, err := to.Add(s.ctx, &scratch, rec.ID, rec.Kind, x.r.rawSize(rec.Kind), payload)
	l.land(block.Record{ID: rec.ID, Location: loc}, err)
	if err != nil {
		s.fail(err)
		return false, s.explain(err)
	}
	return true, nil
}
