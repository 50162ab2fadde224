package repo

import (
	"crypto/sha256"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

// settle finds out what became of generations that nobody can be sure of. A stale
// process cannot see what was written under the new keys, so a fresh one looks.
func (w *walk) settle() {
	if len(w.unsure) == 0 {
		return
	}
	r := w.open(w.mem)
	defer r.Close()
	for name, g := range w.unsure {
		// What is seen now may not last yet. Let it, or a later crash changes it again.
		if err := w.mem.SyncDir(r.vmDir(g.ref.VM)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			w.fatalf("%v", err)
		}
		refs, err := r.Refs(w.ctx, g.ref.VM)
		if err != nil && !errors.Is(err, ErrNotFound) {
			w.fatalf("%v: %v", g.ref.VM, err)
		}
		delete(w.gens, name)
		i := slices.IndexFunc(refs, func(ref Ref) bool { return ref.Time.Equal(g.ref.Time) })
		if i < 0 {
			continue
		}
		g.ref = refs[i]
		held, err := r.Held(w.ctx, g.ref.VM)
		if err != nil {
			w.fatalf("%v", err)
		}
		g.held = held[g.ref.Sequence]
		w.gens[g.ref.String()] = g
	}
	clear(w.unsure)
}

// verify proves all that must always hold, as somebody who has just opened the
// repository sees it.
func (w *walk) verify() {
	w.t.Helper()
	r := w.open(w.mem)
	defer r.Close()
	report, err := r.Check(w.ctx, CheckOptions{ReadData: true})
	if err != nil && !w.damaged(err) {
		w.fatalf("check: %v", err)
	}
	if err == nil && len(w.hurt) == 0 {
		for _, p := range report.Problems {
			others := slices.DeleteFunc(slices.Clone(p.Generations), func(g string) bool { return w.lost[g] })
			if len(w.lost) == 0 || len(others) > 0 {
				w.fatalf("check: %+v", p)
			}
		}
		w.lookForLost(r)
	}
	there := 0
	for _, vm := range w.vms {
		refs, err := r.Refs(w.ctx, vm)
		if err != nil && !errors.Is(err, ErrNotFound) {
			w.fatalf("%v: %v", vm, err)
		}
		held, err := r.Held(w.ctx, vm)
		if err != nil {
			w.fatalf("%v", err)
		}
		for _, ref := range refs {
			g := w.gens[ref.String()]
			if g == nil {
				w.fatalf("%v is there and should not be", ref)
			}
			if held[ref.Sequence] != g.held {
				w.fatalf("%v: held is %v", ref, held[ref.Sequence])
			}
			there++
			if len(w.hurt) == 0 && !w.lost[ref.String()] {
				same(w, openDisk(w, r, ref), g.content)
			}
		}
	}
	if there != len(w.gens) {
		w.fatalf("%d generations are there, not %d", there, len(w.gens))
	}
	w.verifyPacks()
	w.did["verify"]++
}

// verifyPacks proves that no pack changes after it is named, and that no two packs
// share a key: nonces are used once then, for within a pack no two records share a
// place.
func (w *walk) verifyPacks() {
	w.t.Helper()
	for _, name := range allPacks(w.mem) {
		if _, ok := w.hurt[name]; ok {
			continue
		}
		b, err := fsx.ReadFile(w.mem, name, 1<<30)
		if err != nil {
			w.fatalf("%v", err)
		}
		sum := sha256.Sum256(b)
		if old, ok := w.packs[name]; ok && old != sum {
			w.fatalf("%s has changed", name)
		}
		w.packs[name] = sum
		h, err := pack.DecodeHeader(b)
		if err != nil {
			w.fatalf("%s: %v", name, err)
		}
		if other, ok := w.salts[h.Salt]; ok && other != name {
			w.fatalf("%s and %s share a key", name, other)
		}
		w.salts[h.Salt] = name
	}
}

// finish brings everything to rest and proves that nothing is left but what is needed.
func (w *walk) finish() {
	w.t.Helper()
	w.mend(nil)
	for _, p := range w.procs {
		w.end(p)
	}
	w.verify()
	r := w.open(w.mem)
	defer r.Close()
	w.settleLost(r)
	for range 3 {
		w.tick(time.Hour)
		w.logf("prune: %+v", mustPrune(w, r, PruneOptions{}))
	}
	for _, g := range w.sorted() {
		same(w, openDisk(w, r, g.ref), g.content)
	}
	w.nothingAside(r)
	tidy(w.t, w.mem, r)
	if w.t.Failed() {
		w.fatalf("in the end")
	}
	w.verify()
}

// condemnedNow lists what is condemned.
func (w *walk) condemnedNow() map[string]bool {
	all := map[string]bool{}
	for _, name := range w.mem.Files() {
		if h, ok := strings.CutPrefix(name, condemnedDir+"/"); ok {
			if _, err := block.ParseHandle(h); err == nil {
				all[h] = true
			}
		}
	}
	return all
}
