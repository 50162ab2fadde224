package work

import (
	"context"
	"errors"
	"fmt"
	"time"

	"hikae/repo"
	"hikae/repo/retention"
	"hikae/sched"
)

// Retain forgets the generations of a VM that none of the policies keeps. Those
// that are held, damaged, or that a running backup builds on stay.
func (w *Work) Retain(ctx context.Context, o sched.RetainOptions) (int, error) {
	it, err := w.repos.get(ctx, o.Repository)
	if err != nil {
		return 0, err
	}
	n, err := retain(ctx, it.value, o, w.o.Clock())
	w.repos.put(it, spoilt(err))
	return n, err
}

func retain(ctx context.Context, r *repo.Repository, o sched.RetainOptions, now time.Time) (int, error) {
	if len(o.Policies) == 0 {
		return 0, errors.New("nothing says what is to be kept")
	}
	refs, err := r.Refs(ctx, o.VM)
	if err != nil {
		return 0, err
	}
	held, err := r.Held(ctx, o.VM)
	if err != nil {
		return 0, err
	}
	used, err := r.InUse(ctx, refs)
	if err != nil {
		return 0, err
	}
	items := make([]retention.Item, 0, len(refs))
	for _, ref := range refs {
		item := retention.Item{Time: ref.Time, Sequence: ref.Sequence, Held: held[ref.Sequence]}
		g, err := r.Generation(ctx, ref)
		switch {
		case errors.Is(err, repo.ErrDamaged):
			item.Incomplete = true
		case err != nil:
			return 0, err
		default:
			item.Imported = g.Manifest().Mode == repo.ModeImport
		}
		items = append(items, item)
	}
	keep := map[uint64]bool{}
	for _, p := range o.Policies {
		decided, err := p.Apply(items, now, o.Location)
		if err != nil {
			return 0, fmt.Errorf("%v: %w", o.VM, err)
		}
		for _, d := range decided {
			keep[d.Sequence] = keep[d.Sequence] || d.Keep
		}
	}
	var gone []repo.Ref
	for _, ref := range refs {
		if !keep[ref.Sequence] && !used[ref.Sequence] {
			gone = append(gone, ref)
		}
	}
	if len(gone) == 0 {
		return 0, nil
	}
	if err := r.Forget(ctx, gone, repo.ForgetOptions{}); err != nil {
		return 0, err
	}
	return len(gone), nil
}
