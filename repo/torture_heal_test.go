package repo

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// heal lets hikae repair packs look at what was damaged: it is saved, or put aside and
// marked, so that the next backups read it again. What is lost for good may be lost for
// the generations that the report names, and for no other.
func (w *walk) heal(p *walkProc) {
	if len(w.hurt) == 0 || w.stale(p) {
		return
	}
	report, err := p.r.RepairPacks(w.ctx, RepairOptions{})
	if err != nil {
		w.mayFail(p, "repair", err)
		return
	}
	for _, x := range report.Packs {
		w.logf("%d: pack %s is %s, %v", p.n, x.Pack, x.Outcome, x.Generations)
		w.did["pack "+x.Outcome]++
		if x.Outcome == OutcomeInUse {
			continue
		}
		for name := range w.hurt {
			if path.Base(name) == x.Pack {
				delete(w.hurt, name)
			}
		}
		if x.Outcome != OutcomeLost {
			continue
		}
		// Backups under way build on what nobody knew to be hurt.
		for _, q := range w.procs {
			for _, s := range q.sessions {
				s.unaware = true
			}
		}
		for _, g := range x.Generations {
			if w.gens[g] == nil {
				w.fatalf("repair says that %s is hurt, and there is no such generation", g)
			}
			w.lost[g] = true
		}
	}
	w.mend(nil) // what it left alone, because nothing in it is needed, or a backup is at it
	for _, q := range w.procs {
		w.cold(q)
	}
}

// withLost adds what is lost of a parent to what a backup has to write.
func withLost(todo, lost []extent, size int64) []extent {
	all := append(slices.Clone(todo), lost...)
	slices.SortFunc(all, func(a, b extent) int { return cmp.Compare(a.off, b.off) })
	var out []extent
	for _, e := range all {
		e.n = min((e.n+testBlock-1)/testBlock*testBlock, size-e.off) // the disk may have grown
		if n := len(out); n > 0 && e.off <= out[n-1].off+out[n-1].n {
			out[n-1].n = max(out[n-1].n, e.off+e.n-out[n-1].off)
		} else {
			out = append(out, e)
		}
	}
	return out
}

// lookForLost finds out which generations are still not what they were. A read of them is
// right, or says that something is damaged.
func (w *walk) lookForLost(r *Repository) {
	for name := range w.lost {
		g := w.gens[name]
		if g == nil { // it was forgotten
			delete(w.lost, name)
			continue
		}
		d, err := w.openIn(r, g)
		got := make([]byte, len(g.content))
		if err == nil {
			_, err = d.ReadAt(got, 0)
		}
		switch {
		case err == nil || errors.Is(err, io.EOF):
			if !bytes.Equal(got, g.content) {
				w.fatalf("%s was hurt and reads otherwise than it was written", name)
			}
			delete(w.lost, name)
			w.did["healed"]++
		case !errors.Is(err, ErrDamaged):
			w.fatalf("%s: %v", name, err)
		}
	}
}

// settleLost backs up once more what was hurt, which heals what it can, and forgets what
// that does not heal.
func (w *walk) settleLost(r *Repository) {
	w.lookForLost(r)
	for _, name := range slices.Sorted(maps.Keys(w.lost)) {
		g := w.gens[name]
		w.tick(1e9)
		ref, err := backup(w.ctx, r, g.ref.VM, w.now, g.content, nil, whole(g.content))
		if err != nil {
			w.fatalf("back up %s again: %v", name, err)
		}
		w.gens[ref.String()] = &walkGen{ref: ref, content: g.content}
	}
	w.lookForLost(r)
	for _, name := range slices.Sorted(maps.Keys(w.lost)) {
		g := w.gens[name]
		if g.held {
			if err := r.Release(w.ctx, g.ref); err != nil {
				w.fatalf("%v", err)
			}
		}
		without(w, r, g.ref)
		delete(w.gens, name)
		delete(w.lost, name)
		w.did["forgot what is lost"]++
	}
}

// nothingAside proves that repair has nothing left to do, and left nothing.
func (w *walk) nothingAside(r *Repository) {
	report, err := r.RepairPacks(w.ctx, RepairOptions{})
	if err != nil || len(report.Packs) > 0 || report.Left() {
		w.fatalf("repair: %+v, %v", report, err)
	}
	for _, name := range w.mem.Files() {
		if strings.HasPrefix(name, quarantineDir+"/") {
			w.fatalf("%s was left behind", name)
		}
	}
}
