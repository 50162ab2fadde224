package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"hikae/backup/esxi"
	"hikae/backup/vmdk"
	"hikae/repo"
)

// disksAtOnce is how many disks of a VM are read together. More do not help: a
// host serves four requests at a time.
const disksAtOnce = 4

func diskByKey(disks []esxi.Disk, key int32) *esxi.Disk {
	i := slices.IndexFunc(disks, func(d esxi.Disk) bool { return d.Key == key })
	if i < 0 {
		return nil
	}
	return &disks[i]
}

// readDisks brings every disk into the session: plans, tests the host's word,
// reads.
func (r *run) readDisks(ctx context.Context) error {
	closeAll, err := r.openDisks(ctx)
	defer closeAll()
	if err != nil {
		return err
	}
	if err := r.each(ctx, func(ctx context.Context, p *diskPlan) error {
		if err := r.findLost(ctx, p, false); err != nil {
			return err
		}
		return r.plan(ctx, p, "")
	}); err != nil {
		return err
	}
	if err := r.auditAll(ctx); err != nil {
		return err
	}
	var toRead int64
	for _, p := range r.plans {
		toRead += total(p.areas)
	}
	r.meter.begin(PhaseRead, toRead, "")
	bufs := newPool(poolPieces)
	return r.each(ctx, func(ctx context.Context, p *diskPlan) error { return r.storeOrReplan(ctx, p, bufs, r.plan) })
}

// each works on the disks, a few at once.
func (r *run) each(ctx context.Context, work func(context.Context, *diskPlan) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(disksAtOnce)
	for _, p := range r.plans {
		g.Go(func() error {
			if err := work(ctx, p); err != nil {
				return fmt.Errorf("%s of %s: %w", p.disk.Label, r.VM, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// openDisks opens the frozen disks and what is known of them.
func (r *run) openDisks(ctx context.Context) (closeAll func(), err error) {
	var open []*esxi.DiskReader
	closeAll = func() {
		for _, d := range open {
			_ = d.Close() // only read
		}
	}
	if len(r.snap.Disks) != len(r.vm.Disks) {
		return closeAll, fmt.Errorf("the snapshot of %s has %d disks and the VM had %d when the run began; run the backup again",
			r.VM, len(r.snap.Disks), len(r.vm.Disks))
	}
	for i, was := range r.vm.Disks {
		d := diskByKey(r.snap.Disks, was.Key)
		if d == nil {
			return closeAll, fmt.Errorf("%s is not in the snapshot of %s; run the backup again", was.Label, r.VM)
		}
		reader, err := r.Host.OpenDisk(ctx, *d)
		if err != nil {
			return closeAll, err
		}
		open = append(open, reader)
		p := &diskPlan{disk: *d, name: r.files.disks[i], src: reader, block: int64(r.Repo.BlockSize())}
		if p.descriptor, err = r.describe(ctx, reader, d, p.name); err != nil {
			return closeAll, err
		}
		if n := r.parent.disk(*d); n >= 0 && !r.Full {
			p.before = &r.parent.manifest.Disks[n]
			p.parent, err = r.parent.gen.OpenDisk(n)
			if err != nil {
				p.before, p.parent = nil, nil
				r.warn("%s of the previous generation cannot be opened, nothing is taken from it: %s", d.Label, oneLine(err))
			}
		}
		r.plans = append(r.plans, p)
	}
	return closeAll, nil
}

// describe makes the descriptor that goes with the disk's flat content. The
// disk data base is in the base link's.
func (r *run) describe(ctx context.Context, reader *esxi.DiskReader, d *esxi.Disk, name string) (string, error) {
	text := reader.Descriptor()
	if len(d.Chain) > 1 {
		var err error
		if text, err = r.Host.ReadFile(ctx, d.Chain[0], 64<<10); err != nil {
			return "", err
		}
	}
	desc, err := vmdk.ParseDescriptor(text)
	if err != nil {
		return "", fmt.Errorf("descriptor %s: %w", d.Chain[0], err)
	}
	return string(desc.Standalone(name).Bytes()), nil
}

// plan decides which areas of a disk to read. doubt is why the host's word on
// changed and allocated areas is not taken, "" when it is.
func (r *run) plan(ctx context.Context, p *diskPlan, doubt string) error {
	if err := r.planAreas(ctx, p, doubt); err != nil {
		return err
	}
	p.tellHealed()
	return nil
}

func (r *run) planAreas(ctx context.Context, p *diskPlan, doubt string) error {
	capacity := p.disk.Capacity
	p.told, p.zeros, p.cover = false, false, nil
	switch {
	case r.Full:
		p.mode, p.reason = repo.ModeFull, "a full backup was asked for"
	case r.parent == nil:
		p.mode, p.reason = repo.ModeFull, "first generation of this VM"
	case p.parent == nil:
		p.mode, p.reason = repo.ModeFull, cmp.Or(p.forsaken, "the previous generation does not have this disk")
	case p.parent.Size() > capacity:
		p.mode, p.reason = repo.ModeFull, "the disk is smaller than in the previous generation"
		p.parent = nil
	default:
		p.mode, p.reason = repo.ModeScan, incomparable(p.before.ChangeID, p.disk.ChangeID)
	}
	p.tracking.quiet, p.tracking.wrong, p.tracking.proved = nil, "", 0
	if doubt != "" {
		p.because(doubt)
		p.readAll()
		return nil
	}
	if p.mode == repo.ModeScan && p.reason == "" {
		areas, why, err := r.oracle(ctx, p, p.before.ChangeID)
		if err != nil {
			return err
		}
		if why == "" {
			p.mode = repo.ModeIncremental
			if old := p.parent.Size(); old < capacity {
				// What lies behind the old end was never seen by a generation.
				// Only what is allocated there can hold data.
				p.reason = "the disk has grown since the previous generation"
				behind := []area{{Offset: old / p.block * p.block, Length: capacity - old/p.block*p.block}}
				allocated, why, err := r.oracle(ctx, p, "*")
				if err != nil {
					return err
				}
				if why == "" {
					end := area{Offset: behind[0].Offset, Length: min(p.block, behind[0].Length)}
					behind = union([]area{end}, intersect(allocated, behind))
				}
				areas = union(areas, behind)
			}
			p.take(areas)
			return p.heal(ctx, r.oracle)
		}
		p.reason = why
	}
	if p.disk.ChangeID == "" && r.epochOf(p) != "" {
		blind := "the host cannot be asked over SSH what changed"
		if p.mode == repo.ModeScan {
			p.reason = blind
		} else {
			p.because(blind)
		}
		if err := r.readTable(ctx, p); err != nil {
			return err
		}
	}
	if p.mode == repo.ModeScan && p.tracking.now != nil {
		if done, err := r.planByTable(ctx, p); err != nil {
			return err
		} else if done {
			return p.heal(ctx, r.oracle)
		}
	}
	areas, why, err := r.oracle(ctx, p, "*")
	if err != nil {
		return err
	}
	if r.epochOf(p) == "" && p.mode == repo.ModeFull {
		read := "everything"
		if why == "" {
			read = "all that is allocated"
		}
		p.because("change tracking is off, so " + read + " was read")
	}
	if why != "" {
		p.readAll()
		return nil
	}
	p.zeros = true
	p.take(areas)
	return nil
}

// oracle tells which areas of a disk changed since a change id, or, for "*",
// which are allocated; why is the reason when it cannot tell.
type oracle func(ctx context.Context, p *diskPlan, since string) (areas []area, why string, err error)

// askHost is the oracle of a run.
func (r *run) askHost(ctx context.Context, p *diskPlan, since string) (areas []area, why string, err error) {
	if since != "*" {
		return r.changed(ctx, p, since)
	}
	why = "change tracking is off"
	if p.disk.ChangeID != "" {
		if areas, why, err = r.changed(ctx, p, since); err != nil || why == "" {
			return areas, why, err
		}
	}
	// The file system of the datastore knows as well, without any tracking.
	areas, err = r.Host.AllocatedAreas(ctx, p.disk)
	if errors.Is(err, esxi.ErrNotProvable) {
		r.log.Debug("the host does not tell which areas are allocated", "disk", p.disk.Label, "error", err)
		return nil, why, nil
	}
	if err != nil {
		return nil, "", err
	}
	return tidy(areas, p.disk.Capacity), "", nil
}

// changed asks the host's change tracking.
func (r *run) changed(ctx context.Context, p *diskPlan, since string) (areas []area, why string, err error) {
	told, err := r.Host.ChangedAreas(ctx, r.snap, p.disk.Key, since)
	if errors.Is(err, esxi.ErrNotProvable) {
		// The next run may have to compare its change tracking file with this one.
		if err := r.readTable(ctx, p); err != nil {
			return nil, "", err
		}
		r.log.Warn("the host does not tell which areas changed", "disk", p.disk.Label, "since", since, "error", err)
		return nil, "the host cannot tell which areas changed: " + oneLine(err), nil
	}
	if err != nil {
		return nil, "", err
	}
	areas = make([]area, len(told))
	for i, t := range told {
		areas[i] = area(t)
	}
	return tidy(areas, p.disk.Capacity), "", nil
}
