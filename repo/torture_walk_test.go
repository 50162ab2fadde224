package repo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

// walk is a random walk of several processes over one repository, and the model of
// what must be in it: contents as plain bytes.
type walk struct {
	t     *testing.T
	ctx   context.Context
	rng   *rand.Rand
	mem   *fsx.Mem
	now   time.Time
	pool  []byte // where changes come from, so that blocks are shared and come again
	procs []*walkProc
	epoch uint32
	extra map[string]bool // passphrases besides the first; false: maybe

	vms     []VMID
	gens    map[string]*walkGen // by Ref.String: committed and not forgotten
	unsure  map[string]*walkGen // a fault hit when they were committed, or forgotten
	hurt    map[string][]byte   // packs that were damaged, and what was in them
	lost    map[string]bool     // generations that miss something since a repair
	packs   map[string][sha256.Size]byte
	salts   map[[32]byte]string // of packs' headers: whose
	history []string
	did     map[string]int
}

type walkGen struct {
	ref     Ref
	content []byte
	held    bool
}

// walkProc is a process: a Repository of its own, on storage that fails for it alone.
type walkProc struct {
	n        int
	faulty   *fsx.Faulty
	r        *Repository
	epoch    uint32
	sessions []*walkSession
	readers  []*walkReader
}

// walkSession is a backup under way.
type walkSession struct {
	s       *Session
	vm      VMID
	parent  *walkGen
	w       *DiskWriter
	content []byte
	todo    []extent
	tree    DiskTree
	done    bool // the disk is finished
	tainted bool // it was under way while something was damaged
	unaware bool // it began before something was found to be lost
}

// walkReader is somebody who reads a generation, whatever becomes of it.
type walkReader struct {
	gen  *walkGen
	disk *Disk
	pin  io.Closer
	// already are the packs that were condemned when the pin was taken: it does not
	// keep them.
	already map[string]bool
	tainted bool // something was damaged meanwhile, and repair saves only what is needed
}

const walkBlocks = 20

func newWalk(t *testing.T, seed uint64) *walk {
	w := &walk{
		t: t, ctx: context.Background(), rng: rand.New(rand.NewPCG(seed, 1)), mem: fsx.NewMem(), now: testClock(), epoch: 1,
		pool: noise(seed, 3*walkBlocks), extra: map[string]bool{},
		vms:  []VMID{{"esx1", "a"}, {"esx1", "b"}, {"esx2", "a"}},
		gens: map[string]*walkGen{}, unsure: map[string]*walkGen{}, hurt: map[string][]byte{}, lost: map[string]bool{},
		packs: map[string][sha256.Size]byte{}, salts: map[[32]byte]string{}, did: map[string]int{},
	}
	initMem(t, w.mem)
	for n := range 3 {
		w.procs = append(w.procs, &walkProc{n: n})
		w.start(w.procs[n])
	}
	return w
}

// start opens the repository for a process.
func (w *walk) start(p *walkProc) {
	p.faulty = fsx.NewFaulty(w.mem)
	p.r = w.open(p.faulty)
	p.epoch = p.r.KeyEpoch()
}

func (w *walk) open(fsys fsx.FS) *Repository {
	w.t.Helper()
	r, err := openFS(w.ctx, fsys, "mem", Passphrase(passphrase), Options{
		Clock: func() time.Time { return w.now }, Workers: 2, BlockCacheBytes: 1 << 20, NodeCacheBytes: 512 << 10,
	})
	if err != nil {
		w.fatalf("open: %v", err)
	}
	return r
}

// end ends a process, in good order or, when its storage has crashed for it, not.
func (w *walk) end(p *walkProc) {
	for _, s := range p.sessions {
		w.close(s)
	}
	for _, x := range p.readers {
		if x.pin != nil {
			_ = x.pin.Close()
		}
	}
	p.sessions, p.readers = nil, nil
	_ = p.r.Close()
}

func (w *walk) close(s *walkSession) {
	if s.w != nil {
		s.w.Abandon()
	}
	_ = s.s.Close()
}

func (w *walk) logf(format string, args ...any) {
	w.history = append(w.history, w.now.Format("15:04:05 ")+fmt.Sprintf(format, args...))
}

func (w *walk) fatalf(format string, args ...any) {
	w.t.Helper()
	for _, line := range w.history {
		w.t.Log(line)
	}
	w.t.Fatalf(format, args...)
}

// Helper, Fatal and Fatalf make it a fatalist that tells how it came to that.
func (w *walk) Helper()                      { w.t.Helper() }
func (w *walk) Fatal(args ...any)            { w.t.Helper(); w.fatalf("%s", fmt.Sprint(args...)) }
func (w *walk) Fatalf(f string, args ...any) { w.t.Helper(); w.fatalf(f, args...) }
func pick[T any](rng *rand.Rand, list []T) T { return list[rng.IntN(len(list))] }
func (w *walk) chance(percent int) bool      { return w.rng.IntN(100) < percent }
func (w *walk) tick(d time.Duration) {
	w.now = w.now.Add(time.Second + time.Duration(w.rng.Int64N(int64(d))))
}
func (w *walk) stale(p *walkProc) bool { return p.epoch < w.epoch }
func (w *walk) sorted() []*walkGen     { return sortedGens(w.gens) }
func (w *walk) of(vm VMID) (list []*walkGen) {
	for _, g := range w.sorted() {
		if g.ref.VM == vm {
			list = append(list, g)
		}
	}
	return list
}

func sortedGens(m map[string]*walkGen) []*walkGen {
	list := slices.Collect(maps.Values(m))
	slices.SortFunc(list, func(a, b *walkGen) int { return int(a.ref.Sequence) - int(b.ref.Sequence) })
	return list
}

// excused tells whether an error needs no explanation: something was made to fail,
// or somebody else rotated the keys.
func (w *walk) excused(p *walkProc, err error) bool {
	return p.faulty.Fired() || w.stale(p) || w.damaged(err)
}

// damaged tells whether an error is about the packs that were damaged.
func (w *walk) damaged(err error) bool {
	return len(w.hurt)+len(w.lost) > 0 && errors.Is(err, ErrDamaged)
}

// step does one thing.
func (w *walk) step() {
	w.tick(2 * time.Hour)
	act := w.chooseAct()
	p := pick(w.rng, w.procs)
	if act.who != nil { // somebody who can
		if able := slices.DeleteFunc(slices.Clone(w.procs), func(p *walkProc) bool { return !act.who(p) }); len(able) > 0 {
			p = pick(w.rng, able)
		}
	}
	if w.stale(p) && len(p.sessions) == 0 && w.chance(50) {
		w.logf("%d: opens again", p.n)
		w.end(p)
		w.start(p)
	}
	fault := "none"
	if w.chance(12) {
		plan := fsx.Plan{
			Mode: pick(w.rng, []fsx.Mode{fsx.FailOnce, fsx.FailAfter, fsx.ShortWrite, fsx.NoSpace, fsx.CrashNow, fsx.CrashNow}),
			Ops:  pick(w.rng, []fsx.Op{fsx.OpChanges, fsx.OpChanges &^ fsx.OpRemove, fsx.OpAny}),
			At:   1 + w.rng.IntN(pick(w.rng, []int{5, 20, 80})),
		}
		fault = fmt.Sprintf("mode %d ops %x at %d", plan.Mode, plan.Ops, plan.At)
		p.faulty.Plan(plan)
		w.act(p, act, fault)
		fired := p.faulty.Fired()
		if fired {
			w.did["fault"]++
		}
		if fired && plan.Mode == fsx.CrashNow {
			w.die(p)
		} else {
			p.faulty.Heal()
			if fired {
				// Who met an error in the middle may have part of a session left.
				for _, s := range p.sessions {
					w.close(s)
				}
				p.sessions = nil
			}
		}
	} else {
		w.act(p, act, fault)
	}
	w.settle()
}

// die ends a process whose storage is gone for it, and sometimes the whole machine.
func (w *walk) die(p *walkProc) {
	if w.chance(60) {
		w.logf("%d: is killed", p.n)
		w.end(p)
		w.start(p)
		w.did["kill"]++
		return
	}
	w.crash()
}

func (w *walk) crash() {
	w.logf("all: the machine crashes")
	for _, q := range w.procs {
		q.faulty.Plan(fsx.Plan{Ops: fsx.OpAny, Mode: fsx.CrashNow, At: 1})
	}
	w.mem.Crash(rand.New(rand.NewPCG(w.rng.Uint64(), 2)))
	for _, q := range w.procs {
		w.end(q)
	}
	for _, q := range w.procs {
		w.start(q)
	}
	w.epoch = w.procs[0].epoch // one that nobody was told of may be lost
	w.did["crash"]++
}

type walkAct struct {
	share int
	name  string
	do    func(*walk, *walkProc)
	who   func(*walkProc) bool // can do it; nil: anybody
}

func hasSession(p *walkProc) bool { return len(p.sessions) > 0 }
func hasReader(p *walkProc) bool  { return len(p.readers) > 0 }

var walkActs = []walkAct{
	{10, "backup", (*walk).backup, nil},
	{8, "begin", (*walk).begin, nil},
	{24, "go on", (*walk).advance, hasSession},
	{2, "abandon", (*walk).abandon, hasSession},
	{14, "forget", (*walk).forget, nil},
	{3, "hold", (*walk).hold, nil},
	{20, "prune", (*walk).prune, nil},
	{10, "open", (*walk).look, nil},
	{16, "read", (*walk).read, hasReader},
	{3, "close", (*walk).unlook, hasReader},
	{2, "rotate", (*walk).rotate, nil},
	{3, "key", (*walk).key, nil},
	{3, "damage", (*walk).damage, nil},
	{6, "mend", (*walk).mend, nil},
	{3, "heal", (*walk).heal, nil},
	{2, "reopen", (*walk).reopen, nil},
	{1, "crash", func(w *walk, _ *walkProc) { w.crash() }, nil},
}

func (w *walk) chooseAct() *walkAct {
	total := 0
	for _, a := range walkActs {
		total += a.share
	}
	n := w.rng.IntN(total)
	for i := range walkActs {
		if n -= walkActs[i].share; n < 0 {
			return &walkActs[i]
		}
	}
	panic("the shares add up to less than their sum")
}

func (w *walk) act(p *walkProc, a *walkAct, fault string) {
	w.logf("%d: %s, fault: %s", p.n, a.name, fault)
	w.did[a.name]++
	a.do(w, p)
}

// TestTortureWalk lets several processes back up, forget, prune, hold, read, change
// keys, fail, be killed and crash, in a random order, and compares what is there
// with a simple model.
func TestTortureWalk(t *testing.T) {
	did := map[string]int{}
	seeds(t, 6, func(t *testing.T, seed uint64) {
		w := newWalk(t, seed)
		defer func() {
			for _, p := range w.procs {
				w.end(p)
			}
		}()
		for n := range 250 {
			w.step()
			if n%20 == 19 {
				w.verify()
			}
		}
		w.finish()
		for name, n := range w.did {
			did[name] += n
		}
	})
	t.Logf("%v", did)
	must := []string{"commit", "forgot", "refused", "deleted", "read right", "fault", "verify"}
	if tortureTime(t) >= 2*time.Minute {
		must = append(must, "rewritten", "released", "kept for sessions", "kill", "crash", "rotate",
			"read pinned after it was forgotten", "read after it was deleted")
	}
	for _, name := range must {
		if did[name] == 0 {
			t.Errorf("nobody ever did this: %s", name)
		}
	}
}
