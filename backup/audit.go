package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"

	"golang.org/x/sync/errgroup"

	"hikae/repo"
)

// Change tracking is a host's word, and hosts have been wrong. Every run that
// relies on it reads a few blocks that are said to be unchanged (or to hold only
// zeros) and compares them by id with the previous generation. One that differs
// ends the trust: the run reads everything, and says so.

// auditAll samples every disk whose plan relies on the host's word, and makes
// all plans again without it when one sample was a lie.
func (r *run) auditAll(ctx context.Context) error {
	var told int64
	for _, p := range r.plans {
		if p.told {
			told++
		}
	}
	if told == 0 || r.auditBlocks < 0 {
		return nil
	}
	r.meter.begin(PhaseAudit, told*int64(r.auditBlocks)*int64(r.Repo.BlockSize()), "")
	var mu sync.Mutex
	var lie string
	err := r.each(ctx, func(ctx context.Context, p *diskPlan) error {
		if !p.told {
			return nil
		}
		found, err := r.audit(ctx, p)
		if p.parent != nil && errors.Is(err, repo.ErrDamaged) {
			return r.aroundDamage(ctx, p, r.plan, err)
		}
		if found != "" {
			mu.Lock()
			lie = p.disk.Label + ": " + found
			mu.Unlock()
		}
		return err
	})
	if err != nil || lie == "" {
		return err
	}
	r.warn("%s; change tracking of this VM cannot be trusted, so everything was read; reset it (disable and enable change tracking)", lie)
	return r.each(ctx, func(ctx context.Context, p *diskPlan) error { return r.plan(ctx, p, lie) })
}

// audit samples one disk and returns what was found wrong, "" when nothing was.
func (k *worker) audit(ctx context.Context, p *diskPlan) (lie string, err error) {
	sample, err := choose(ctx, p, k.auditBlocks)
	if err != nil {
		return "", err
	}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, a := range sample {
		g.Go(func() error {
			buf := make([]byte, a.Length)
			if err := readFull(ctx, p.src, buf, a.Offset); err != nil {
				return err
			}
			p.audited.Add(a.Length)
			k.meter.add(p.disk.Label, a.Length)
			ok, err := p.asPlanned(ctx, a, buf)
			if err == nil && !ok {
				mu.Lock()
				lie = fmt.Sprintf("the block at byte %d was said to be unchanged and is not", a.Offset)
				if p.zeros {
					lie = fmt.Sprintf("the block at byte %d was said not to be allocated and holds data", a.Offset)
				}
				mu.Unlock()
			}
			return err
		})
	}
	return lie, g.Wait()
}

// asPlanned tells whether a block outside of the planned areas is what the plan
// takes it for.
func (p *diskPlan) asPlanned(ctx context.Context, a area, data []byte) (bool, error) {
	if p.zeros || p.parent == nil || a.Offset >= p.parent.Size() {
		return allZero(data), nil
	}
	return p.parent.Matches(ctx, a.Offset, data)
}

// choose picks n blocks, each once, outside of the planned areas: all of them
// when there are no more. Half are anywhere, half where the previous generation
// has data, for most of a disk is empty and emptiness rarely lies.
func choose(ctx context.Context, p *diskPlan, n int) ([]area, error) {
	known := p.areas
	if p.cover != nil {
		known = p.cover
	}
	rest := leftOut(known, p.block, p.disk.Capacity)
	var out []area
	if rest.n <= int64(n) {
		for k := range rest.n {
			out = append(out, rest.at(k))
		}
		return out, nil
	}
	seen := map[int64]bool{}
	add := func(a area) {
		if !seen[a.Offset] {
			seen[a.Offset] = true
			out = append(out, a)
		}
	}
	if p.parent != nil && !p.zeros {
		zeros := make([]byte, p.block)
		for try := 0; len(out) < n/2 && try < 2*n; try++ {
			a, err := dataBlock(ctx, p, rest, zeros)
			if err != nil {
				return nil, err
			}
			if a.Length > 0 {
				add(a)
			}
		}
	}
	// More blocks are left than are wanted, so this ends; and soon, unless
	// nearly all of them are wanted.
	for len(out) < n {
		add(rest.at(rand.Int64N(rest.n)))
	}
	return out, nil
}

// dataBlock is a random left-out block at which the parent has data; an empty
// area when none was found. Guessing comes first: on a well filled disk it hits
// soon, and NextData, which is sure, would walk the tree along the whole run.
func dataBlock(ctx context.Context, p *diskPlan, rest *blockSet, zeros []byte) (area, error) {
	var a area
	for range 16 {
		a = rest.at(rand.Int64N(rest.n))
		if a.End() > p.parent.Size() {
			continue
		}
		// A block that matches zeros is a hole: the tree stores no zeros.
		if hole, err := p.parent.Matches(ctx, a.Offset, zeros[:a.Length]); err != nil || !hole {
			return a, err
		}
	}
	start, end, err := p.parent.NextData(ctx, a.Offset)
	if errors.Is(err, io.EOF) { // nothing behind it: look from the beginning
		start, end, err = p.parent.NextData(ctx, 0)
	}
	if errors.Is(err, io.EOF) {
		return area{}, nil
	}
	if err != nil {
		return area{}, err
	}
	// Somewhere in the run of data, not always at its first block.
	if blocks := min(end-start, maxSkew) / p.block; blocks > 1 {
		start += rand.Int64N(blocks) * p.block
	}
	if b, ok := rest.next(start); ok && b.Offset < end {
		return b, nil
	}
	return area{}, nil
}

// maxSkew is how far into a run of data a sample may lie.
const maxSkew = 64 << 20

func allZero(p []byte) bool {
	for len(p) >= 64 {
		if [64]byte(p[:64]) != ([64]byte{}) {
			return false
		}
		p = p[64:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
