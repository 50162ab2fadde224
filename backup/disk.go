package backup

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"

	"hikae/backup/esxi"
	"hikae/repo"
)

// diskPlan is what a run knows of one disk and does with it.
type diskPlan struct {
	disk       esxi.Disk // as frozen
	name       string    // base of its file names
	descriptor string
	src        source
	parent     *repo.Disk // the same disk in the previous generation; nil: nothing is taken from there
	before     *repo.DiskManifest
	block      int64

	mode, reason string
	// areas is what to read: whole blocks, sorted. What lies outside is as in
	// the parent, or holds only zeros: with zeros set everything, else what lies
	// within cover (nil: nothing).
	areas []area
	cover []area
	zeros bool
	told  bool // this is somebody's word, so what is not read has to be sampled

	tracking tracking

	lost     []area // what the previous generation has no more: whole blocks, sorted
	searched bool   // lost is all that can be found by reading the tree
	forsaken string // why nothing is taken from the previous generation, though it has the disk

	changed int64 // bytes of areas before reads were joined
	read    atomic.Int64
	audited atomic.Int64
	tree    repo.DiskTree
}

// because adds to the reason.
func (p *diskPlan) because(why string) {
	if p.reason != "" {
		why = p.reason + "; " + why
	}
	p.reason = why
}

// take makes a list of areas the plan.
func (p *diskPlan) take(areas []area) {
	areas = roundOut(areas, p.block, p.disk.Capacity)
	p.changed = total(areas)
	p.areas = coalesce(areas, p.block)
	p.told = true
}

// readAll plans to read the whole disk.
func (p *diskPlan) readAll() {
	p.told, p.zeros, p.cover = false, false, nil
	p.areas, p.changed = nil, p.disk.Capacity
	if p.disk.Capacity > 0 {
		p.areas = []area{{Offset: 0, Length: p.disk.Capacity}}
	}
}

// worker brings disks into a session; a run and an import have one.
type worker struct {
	session     *repo.Session
	log         *slog.Logger
	meter       *meter
	auditBlocks int // how many blocks a disk are sampled
}

// replan plans a disk anew. doubt is why nobody's word on what changed is taken,
// "" when it is.
type replan func(ctx context.Context, p *diskPlan, doubt string) error

// storeOrReplan reads what was planned into the session. A damaged previous
// generation must not keep the next one from being made, for that is what the
// operator needs most then: the disk is read again around the damage.
func (k *worker) storeOrReplan(ctx context.Context, p *diskPlan, bufs *pool, plan replan) error {
	err := k.store(ctx, p, bufs)
	for p.parent != nil && errors.Is(err, repo.ErrDamaged) {
		if err := k.aroundDamage(ctx, p, plan, err); err != nil {
			return err
		}
		k.meter.grow(total(p.areas))
		err = k.store(ctx, p, bufs)
	}
	return err
}

// store reads what was planned into the session.
func (k *worker) store(ctx context.Context, p *diskPlan, bufs *pool) error {
	w, err := k.session.Disk(ctx, p.disk.Capacity, p.parent)
	if err != nil {
		return err
	}
	finished := false
	defer func() {
		if !finished {
			w.Abandon()
		}
	}()
	var within []area
	switch {
	case p.parent == nil: // an empty tree needs no zeros
	case p.zeros:
		within = []area{{Offset: 0, Length: p.disk.Capacity}}
	default:
		within = p.cover
	}
	err = stream(ctx, p.src, steps(p.areas, within), bufs, func(ctx context.Context, s step, data []byte, release func()) error {
		if err := p.watch(ctx, s, data); err != nil {
			release()
			return err
		}
		if s.zero {
			return w.Zero(ctx, s.Offset, s.Length)
		}
		p.read.Add(s.Length)
		if err := w.Write(ctx, s.Offset, data, release); err != nil {
			return err
		}
		k.meter.add(p.disk.Label, s.Length)
		return nil
	})
	if err != nil {
		return err
	}
	p.tree, err = w.Finish(ctx)
	finished = err == nil
	return err
}

func (p *diskPlan) stats() repo.Stats {
	return repo.Stats{
		BytesCapacity: p.disk.Capacity, BytesChanged: p.changed, BytesRead: p.read.Load(),
		BytesAudited: p.audited.Load(), BytesStored: p.tree.Stats.BytesSealed,
	}
}

// manifest is the disk as the generation has it.
func (p *diskPlan) manifest() repo.DiskManifest {
	return repo.DiskManifest{
		Key: p.disk.Key, Label: p.disk.Label, Name: p.name, Capacity: p.disk.Capacity,
		DataBytes: p.tree.DataBytes, Root: p.tree.Root, Levels: p.tree.Levels,
		ChangeID: p.disk.ChangeID, UUID: p.disk.UUID, BackingPath: p.disk.Chain[0], Adapter: p.disk.Adapter,
		Descriptor: p.descriptor, Mode: p.mode, Reason: p.reason, Tracking: p.keepTable(), Stats: p.stats(),
	}
}

func (p *diskPlan) result() DiskResult {
	return DiskResult{
		Label: p.disk.Label, Name: p.name, Mode: p.mode, Reason: p.reason, BytesCapacity: p.disk.Capacity,
		BytesChanged: p.changed, BytesRead: p.read.Load(), BytesHealed: p.healed(), BytesAudited: p.audited.Load(),
		BytesNew: p.tree.Stats.BytesNew,
	}
}
