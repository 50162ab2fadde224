package backup

import (
	"context"
	"errors"

	"hikae/repo"
)

// What the repository lost, the VM may still have. A run finds out which areas of the
// previous generation are lost, and reads them from the host as if they had changed. As
// blocks are known by their content, older generations that have the same there are whole
// again as well.

// findLost finds out what is lost of the previous generation of a disk. It costs nothing
// unless hikae repair packs found packs damaged or missing; with search it looks in any
// case. When nothing at all is left, nothing is taken from that generation.
func (k *worker) findLost(ctx context.Context, p *diskPlan, search bool) error {
	if p.parent == nil || p.parent.Size() > p.disk.Capacity {
		return nil
	}
	rest, lost, err := k.session.Lost(ctx, p.parent, search)
	if err != nil {
		return err
	}
	p.parent, p.lost = rest, nil
	for _, e := range lost {
		p.lost = append(p.lost, area(e))
	}
	if len(lost) > 0 && total(p.lost) == p.parent.Size() {
		p.without("all of it is lost")
		return nil
	}
	p.lost = roundOut(p.lost, p.block, p.disk.Capacity)
	return nil
}

// without makes a plan take nothing from the previous generation.
func (p *diskPlan) without(why string) {
	p.parent, p.before, p.lost = nil, nil, nil
	p.forsaken = "the previous generation is damaged: " + why
}

// heal adds to a plan of changed areas what the previous generation lost. What is not
// allocated, if the host can tell, is zeros.
func (p *diskPlan) heal(ctx context.Context, o oracle) error {
	if len(p.lost) == 0 {
		return nil
	}
	read := p.lost
	allocated, why, err := o(ctx, p, "*")
	if err != nil {
		return err
	}
	if why == "" {
		read = intersect(roundOut(allocated, p.block, p.disk.Capacity), p.lost)
	}
	p.areas = union(p.areas, read)
	p.cover = union(p.areas, p.lost)
	return nil
}

// healed is how many bytes that the previous generation lost this one has again.
func (p *diskPlan) healed() int64 {
	if p.parent == nil {
		return 0
	}
	return total(p.lost)
}

// tellHealed adds to the reason that lost areas were read again.
func (p *diskPlan) tellHealed() {
	if n := p.healed(); n > 0 {
		p.because(size(n) + " that were lost in damaged packs were read again")
	}
}

// aroundDamage plans again for a disk whose previous generation turned out to be
// damaged: around what is lost of it, or, when that does not help, without it.
func (k *worker) aroundDamage(ctx context.Context, p *diskPlan, plan replan, cause error) error {
	if !p.searched {
		p.searched = true
		k.log.Warn("the previous generation is damaged, looking for what is left of it", "disk", p.disk.Label, "error", cause)
		if err := k.findLost(ctx, p, true); err != nil && !errors.Is(err, repo.ErrDamaged) {
			return err
		}
		if len(p.lost) == 0 {
			p.without(oneLine(cause))
		}
	} else {
		k.log.Warn("the previous generation is damaged, reading the disk without it", "disk", p.disk.Label, "error", cause)
		p.without(oneLine(cause))
	}
	if err := plan(ctx, p, ""); err != nil {
		return err
	}
	if !p.told {
		return nil
	}
	lie, err := k.audit(ctx, p)
	if p.parent != nil && errors.Is(err, repo.ErrDamaged) {
		return k.aroundDamage(ctx, p, plan, err)
	}
	if lie != "" {
		return plan(ctx, p, lie)
	}
	return err
}
