package repo

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"hikae/repo/internal/fsx"
)

// What the processes of a walk do. Each compares what it is told with what the model
// says it should be told.

// backup makes a generation in one go.
func (w *walk) backup(p *walkProc) {
	s := w.newSession(p)
	if s == nil {
		return
	}
	for slices.Contains(p.sessions, s) {
		w.proceed(p, s)
	}
}

// begin begins a session that will be worked on in later steps, while others do
// other things.
func (w *walk) begin(p *walkProc) {
	if len(p.sessions) < 2 {
		w.newSession(p)
	}
}

func (w *walk) advance(p *walkProc) {
	if len(p.sessions) > 0 {
		w.proceed(p, pick(w.rng, p.sessions))
	}
}

func (w *walk) abandon(p *walkProc) {
	if len(p.sessions) > 0 {
		w.drop(p, pick(w.rng, p.sessions))
	}
}

func (w *walk) drop(p *walkProc, s *walkSession) {
	w.close(s)
	p.sessions = slices.DeleteFunc(p.sessions, func(o *walkSession) bool { return o == s })
}

// newSession begins a backup with random changes, mostly on top of an older
// generation. It is nil when that was made to fail.
func (w *walk) newSession(p *walkProc) *walkSession {
	s := &walkSession{vm: pick(w.rng, w.vms)}
	var parent *Disk
	if list := w.of(s.vm); len(list) > 0 && w.chance(85) {
		s.parent = list[len(list)-1]
		if w.chance(15) {
			s.parent = pick(w.rng, list)
		}
		var err error
		if parent, err = w.openGen(p, s.parent); err != nil {
			w.mayFail(p, "open the parent", err)
			return nil
		}
		s.content = bytes.Clone(s.parent.content)
	} else {
		s.content = make([]byte, w.rng.IntN(walkBlocks)*testBlock+w.rng.IntN(2)*1000)
	}
	if parent != nil && w.chance(10) {
		s.content = append(s.content, make([]byte, w.rng.IntN(2*testBlock))...)
	}
	s.todo = w.change(s.content, parent == nil)
	var err error
	compression := pick(w.rng, []string{"zstd", "s2", "none"})
	if s.s, err = p.r.Begin(w.ctx, SessionOptions{Compression: compression}); err != nil {
		w.mayFail(p, "begin", err)
		return nil
	}
	if parent != nil {
		var lost []Extent
		if parent, lost, err = s.s.Lost(w.ctx, parent, false); err != nil {
			_ = s.s.Close()
			w.mayFail(p, "look for what is lost", err)
			return nil
		}
		for _, e := range lost {
			s.todo = withLost(s.todo, []extent{{e.Offset, e.Length}}, int64(len(s.content)))
		}
	}
	if s.w, err = s.s.Disk(w.ctx, int64(len(s.content)), parent); err != nil {
		_ = s.s.Close()
		w.mayFail(p, "begin a disk", err)
		return nil
	}
	s.tainted = len(w.hurt)+len(w.lost) > 0
	p.sessions = append(p.sessions, s)
	return s
}

// change changes content and returns the changed areas, or a superset of them.
func (w *walk) change(content []byte, all bool) (changed []extent) {
	blocks := (len(content) + testBlock - 1) / testBlock
	for b := w.rng.IntN(4); b < blocks; b += 1 + w.rng.IntN(6) {
		n := min(1+w.rng.IntN(4), blocks-b)
		area := content[b*testBlock : min((b+n)*testBlock, len(content))]
		switch w.rng.IntN(6) {
		case 0: // told to have changed, but has not
		case 1:
			clear(area)
		case 2:
			area[w.rng.IntN(len(area))]++
		default:
			copy(area, w.pool[w.rng.IntN(2*walkBlocks)*testBlock:])
		}
		changed = append(changed, extent{int64(b * testBlock), int64(len(area))})
		b += n
	}
	if all {
		return whole(content)
	}
	return changed
}

// proceed does the next part of a backup: some areas, the end of the disk, or the commit.
func (w *walk) proceed(p *walkProc, s *walkSession) {
	fail := func(what string, err error) {
		w.drop(p, s)
		// What failed in the background may be told later.
		if s.tainted && errors.Is(err, ErrDamaged) {
			return
		}
		if err != nil && !w.wentAway(err) {
			w.mayFail(p, what, err)
		}
	}
	switch {
	case len(s.todo) > 0:
		e := s.todo[0]
		s.todo = s.todo[1:]
		if e.n == 0 {
			return
		}
		if err := s.w.Write(w.ctx, e.off, bytes.Clone(s.content[e.off:e.off+e.n]), nil); err != nil {
			fail("write", err)
		}
	case !s.done:
		var err error
		if s.tree, err = s.w.Finish(w.ctx); err != nil {
			fail("finish", err)
			return
		}
		s.done = true
	default:
		w.tick(time.Minute)
		at := w.now.Truncate(time.Second)
		g := &walkGen{ref: Ref{VM: s.vm, Time: at}, content: s.content}
		ref, err := s.s.Commit(w.ctx, Manifest{VM: s.vm, Time: at, Mode: ModeFull, Disks: []DiskManifest{diskOf("d", s.tree)}})
		if err != nil {
			if p.faulty.Fired() {
				w.unsure[g.ref.String()] = g
			}
			fail("commit", err)
			return
		}
		w.did["commit"]++
		g.ref = ref
		w.gens[ref.String()] = g
		if s.unaware {
			w.lost[ref.String()] = true
		}
		if w.chance(70) {
			w.drop(p, s)
		} else { // the same once more, in the same session
			if s.w, err = s.s.Disk(w.ctx, int64(len(s.content)), nil); err != nil {
				fail("another disk", err)
				return
			}
			s.done, s.content = false, bytes.Clone(s.content)
			s.todo = w.change(s.content, true)
		}
	}
}

// wentAway tells whether a backup has to be run again because what it meant to reuse
// was condemned before anybody knew of it, or was damaged.
func (w *walk) wentAway(err error) bool {
	if !strings.Contains(err.Error(), "run the backup again") {
		return false
	}
	w.did["went away"]++
	return true
}

// mayFail ends the walk unless there is an excuse for the error.
func (w *walk) mayFail(p *walkProc, what string, err error) {
	w.t.Helper()
	w.logf("%d: %s: %v", p.n, what, err)
	if !w.excused(p, err) {
		w.fatalf("%s: %v", what, err)
	}
}

func (w *walk) openGen(p *walkProc, g *walkGen) (*Disk, error) { return w.openIn(p.r, g) }

func (w *walk) openIn(r *Repository, g *walkGen) (*Disk, error) {
	opened, err := r.Generation(w.ctx, g.ref)
	if err != nil {
		return nil, err
	}
	return opened.OpenDisk(0)
}

// inUse are the generations that living sessions build on.
func (w *walk) inUse() map[*walkGen]bool {
	used := map[*walkGen]bool{}
	for _, p := range w.procs {
		for _, s := range p.sessions {
			if s.parent != nil {
				used[s.parent] = true
			}
		}
	}
	return used
}

func (w *walk) forget(p *walkProc) {
	all := w.sorted()
	if len(all) == 0 {
		return
	}
	o := ForgetOptions{Force: w.chance(30)}
	used := w.inUse()
	chosen := map[string]*walkGen{}
	var refs []Ref
	refused := false
	for range 1 + w.rng.IntN(2)*w.rng.IntN(3) {
		g := pick(w.rng, all)
		if chosen[g.ref.String()] == g {
			continue
		}
		chosen[g.ref.String()] = g
		refs = append(refs, g.ref)
		list := w.of(g.ref.VM)
		refused = refused || g.held || used[g] || list[len(list)-1] == g && !o.Force
	}
	err := p.r.Forget(w.ctx, refs, o)
	switch {
	case err == nil && refused:
		w.fatalf("%v were forgotten, of which some had to stay", refs)
	case err == nil:
		for name := range chosen {
			delete(w.gens, name)
		}
		w.did["forgot"]++
	case refused && (errors.Is(err, ErrHeld) || errors.Is(err, ErrInUse) || errors.Is(err, ErrNewest)):
		w.did["refused"]++
	default:
		w.mayFail(p, "forget", err)
		maps.Copy(w.unsure, chosen)
	}
}

func (w *walk) hold(p *walkProc) {
	if len(w.gens) == 0 {
		return
	}
	g := pick(w.rng, w.sorted())
	do := p.r.Hold
	if g.held {
		do = p.r.Release
	}
	if err := do(w.ctx, g.ref); err != nil {
		w.mayFail(p, "hold or release", err)
		w.unsure[g.ref.String()] = g
		return
	}
	g.held = !g.held
}

func (w *walk) prune(p *walkProc) {
	o := PruneOptions{
		MaxRewrite: pick(w.rng, []int64{0, 0, 0, -1, 3 * testBlock}),
		Grace:      pick(w.rng, []time.Duration{0, 0, 0, time.Hour, DefaultGrace}),
		DryRun:     w.chance(10),
	}
	report, err := p.r.Prune(w.ctx, o)
	w.logf("%d: %+v %+v", p.n, o, report)
	if err != nil {
		w.mayFail(p, "prune", err)
		return
	}
	if report.BytesLive+report.BytesDead != report.BytesTotal || report.BytesLive < 0 || report.BytesDead < 0 {
		w.fatalf("a report that cannot be: %+v", report)
	}
	if len(w.hurt)+len(w.lost) == 0 && !w.excused(p, nil) && (report.BlocksMissing > 0 || report.PacksUnreadable > 0) {
		w.fatalf("nothing is damaged: %+v", report)
	}
	if !o.DryRun {
		w.did["deleted"] += int(report.PacksDeleted)
		w.did["rewritten"] += int(report.PacksRewritten)
		w.did["kept for sessions"] += int(report.PacksKeptForSessions)
		w.did["released"] += int(report.PacksReleased)
	}
}

func (w *walk) rotate(p *walkProc) {
	_, _, err := p.r.RotateKeys(w.ctx)
	switch {
	case err == nil && w.stale(p):
		w.fatalf("a process that does not know the newest keys rotated them")
	case err != nil:
		w.mayFail(p, "rotate", err)
	}
	r := w.open(w.mem)
	defer r.Close()
	w.epoch = r.KeyEpoch()
}

// key adds a passphrase or removes one that was added.
func (w *walk) key(p *walkProc) {
	slots, err := p.r.KeySlots(w.ctx)
	if err != nil {
		w.mayFail(p, "list the keys", err)
		return
	}
	if len(slots) < 3 {
		slot, err := p.r.AddKey(w.ctx, Passphrase([]byte("another one")), "another", cheap)
		if err != nil {
			w.mayFail(p, "add a key", err)
			return
		}
		r, err := openFS(w.ctx, w.mem, "mem", Passphrase([]byte("another one")), Options{})
		if err != nil {
			w.fatalf("key %s was added and does not open: %v", slot.ID, err)
		}
		_ = r.Close()
		return
	}
	for _, s := range slots {
		if s.Label == "another" {
			if err := p.r.RemoveKey(w.ctx, s.ID); err != nil {
				w.mayFail(p, "remove a key", err)
			}
			return
		}
	}
}

// damage hurts a pack: rot, a cut, or a loss. Until it is mended, everything may be an
// error that says so, and nothing may be wrong.
func (w *walk) damage(*walkProc) {
	all := allPacks(w.mem)
	if len(all) == 0 || len(w.hurt) > 1 {
		return
	}
	name := pick(w.rng, all)
	if w.hurt[name] != nil {
		return
	}
	good, err := fsx.ReadFile(w.mem, name, 1<<30)
	if err != nil {
		w.fatalf("%v", err)
	}
	bad := bytes.Clone(good)
	switch how := w.rng.IntN(3); how {
	case 0:
		for range 1 + w.rng.IntN(5) {
			bad[w.rng.IntN(len(bad))] ^= 1 << w.rng.IntN(8)
		}
	case 1:
		bad = bad[:w.rng.IntN(len(bad))]
	}
	w.hurt[name] = good
	w.taint()
	w.logf("all: %s is damaged to %d of %d", name, len(bad), len(good))
	if bytes.Equal(bad, good) {
		err = w.mem.Remove(name)
	} else {
		err = w.mem.Plant(name, bad)
	}
	if err != nil {
		w.fatalf("%v", err)
	}
}

func (w *walk) taint() {
	for _, p := range w.procs {
		for _, s := range p.sessions {
			s.tainted = true
		}
		for _, x := range p.readers {
			x.tainted = true
		}
	}
}

// mend brings back what was damaged, as from another copy of the repository.
func (w *walk) mend(*walkProc) {
	for _, name := range slices.Sorted(maps.Keys(w.hurt)) {
		if err := w.mem.Plant(name, w.hurt[name]); err != nil {
			w.fatalf("%v", err)
		}
	}
	if len(w.hurt) == 0 {
		return
	}
	clear(w.hurt)
	for _, p := range w.procs {
		w.cold(p) // files that are open are still the damaged ones
	}
}

func (w *walk) reopen(p *walkProc) {
	w.end(p)
	w.start(p)
}
