package repo

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

// scene is a repository with a little of everything, from which each round of a sweep
// starts.
type scene struct {
	files map[string][]byte
	dirs  []string

	kept     map[string][]byte // generations by Ref.String that nobody touches
	goes     []Ref             // what is forgotten
	went     map[string][]byte // what was in it
	held     Ref
	fresh    []byte // what is backed up
	freshRef Ref
	slot     string // of the second passphrase
}

var (
	secondPass = []byte("second")
	thirdPass  = []byte("third")
)

func newScene(t *testing.T) *scene {
	t.Helper()
	ctx := context.Background()
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, mem)
	defer r.Close()
	s := &scene{kept: map[string][]byte{}, went: map[string][]byte{}}
	keep := func(ref Ref, content []byte) { s.kept[ref.String()] = content }

	// Dead packs that are condemned, sparse ones, dead ones that are not.
	without(t, r, mustBackup(t, r, VMID{"esx1", "a"}, 1, noise(2, 2)))
	mustPrune(t, r, PruneOptions{})
	keep(sparse(t, r))
	without(t, r, mustBackup(t, r, VMID{"esx1", "b"}, 2, noise(3, 2)))
	// A chain of three, of which the first two will be forgotten.
	vm := VMID{"esx1", "chain"}
	for i := range 3 {
		content := slices.Concat(noise(20, 3), noise(uint64(21+i), 2))
		ref := mustBackup(t, r, vm, 10+i, content)
		if i < 2 {
			s.goes = append(s.goes, ref)
			s.went[ref.String()] = content
		} else {
			s.held = ref
			keep(ref, content)
		}
	}
	if err := r.Hold(ctx, s.held); err != nil {
		t.Fatal(err)
	}
	slot, err := r.AddKey(ctx, Passphrase(secondPass), "second", cheap)
	if err != nil {
		t.Fatal(err)
	}
	s.slot = slot.ID
	s.fresh = slices.Concat(noise(2, 2), noise(40, 3)) // some of it is dead, or known
	s.freshRef = Ref{VM: VMID{"esx1", "fresh"}, Time: testClock().Add(time.Hour)}

	s.files = map[string][]byte{}
	for _, name := range mem.Files() {
		b, err := fsx.ReadFile(mem, name, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		s.files[name] = b
	}
	s.dirs = layout[:]
	return s
}

// mem makes the scene anew.
func (s *scene) mem(t *testing.T) *fsx.Mem {
	t.Helper()
	mem := fsx.NewMem()
	for name, b := range s.files {
		if err := mem.Plant(name, b); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range s.dirs {
		if err := fsx.MakeDir(mem, dir); err != nil {
			t.Fatal(err)
		}
	}
	return mem
}

// act is what fails somewhere.
type act struct {
	name string
	do   func(ctx context.Context, r *Repository, s *scene) error
	// opens are the passphrases that must open the repository whatever happened, and
	// shut that which must not when it went well.
	shut []byte
	// done are those that open it when it went well.
	done []byte
}

var acts = []act{
	{name: "backup", do: func(ctx context.Context, r *Repository, s *scene) error {
		_, err := backup(ctx, r, s.freshRef.VM, s.freshRef.Time, s.fresh, nil, whole(s.fresh))
		return err
	}},
	{name: "forget", do: func(ctx context.Context, r *Repository, s *scene) error {
		return r.Forget(ctx, s.goes, ForgetOptions{})
	}},
	{name: "prune", do: func(ctx context.Context, r *Repository, _ *scene) error {
		for range 2 {
			if _, err := r.Prune(ctx, PruneOptions{}); err != nil {
				return err
			}
		}
		return nil
	}},
	{name: "repair index", do: func(ctx context.Context, r *Repository, _ *scene) error {
		_, err := r.RepairIndex(ctx, RepairIndexOptions{runRecords: 1000})
		return err
	}},
	{name: "hold", do: func(ctx context.Context, r *Repository, s *scene) error { return r.Hold(ctx, s.goes[0]) }},
	{name: "release", do: func(ctx context.Context, r *Repository, s *scene) error { return r.Release(ctx, s.held) }},
	{name: "key add", done: thirdPass, do: func(ctx context.Context, r *Repository, _ *scene) error {
		_, err := r.AddKey(ctx, Passphrase(thirdPass), "third", cheap)
		return err
	}},
	{name: "key remove", shut: secondPass, do: func(ctx context.Context, r *Repository, s *scene) error {
		return r.RemoveKey(ctx, s.slot)
	}},
	{name: "key change", shut: secondPass, done: thirdPass, do: func(ctx context.Context, r *Repository, _ *scene) error {
		_, err := r.ChangeKey(ctx, Passphrase(secondPass), Passphrase(thirdPass), cheap)
		return err
	}},
	{name: "key rotate", do: func(ctx context.Context, r *Repository, _ *scene) error {
		_, _, err := r.RotateKeys(ctx)
		return err
	}},
}

// ending is how an act fails, and what comes after.
type ending struct {
	name   string
	plan   fsx.Plan
	every  int  // stride in ordinary tests
	others bool // other processes go on before the machine crashes
	crash  bool // the machine
}

var endings = []ending{
	{"crash", fsx.Plan{Ops: fsx.OpAny, Mode: fsx.CrashNow}, 37, false, true},
	{"kill", fsx.Plan{Ops: fsx.OpChanges, Mode: fsx.CrashNow}, 13, true, true},
	{"error", fsx.Plan{Ops: fsx.OpAny, Mode: fsx.FailOnce}, 41, true, true},
	{"error after", fsx.Plan{Ops: fsx.OpChanges, Mode: fsx.FailAfter}, 19, true, false},
	{"short write", fsx.Plan{Ops: fsx.OpWrite | fsx.OpSync | fsx.OpSyncDir, Mode: fsx.ShortWrite}, 11, false, true},
	{"no space", fsx.Plan{Ops: fsx.OpChanges, Mode: fsx.NoSpace}, 23, true, false},
}

// TestTortureEveryOperation lets every act fail in every way at operation k, for every
// k with HIKAE_TORTURE, and then proves that nothing is lost and nothing is left.
func TestTortureEveryOperation(t *testing.T) {
	s := newScene(t)
	for _, a := range acts {
		for _, e := range endings {
			t.Run(a.name+"/"+e.name, func(t *testing.T) {
				every := stride(t, e.every)
				tried := 0
				for k := 1; ; k += every {
					fired := s.round(t, a, e, k)
					if t.Failed() {
						t.Fatalf("at operation %d", k)
					}
					if !fired {
						t.Logf("about %d operations", k-1)
						break
					}
					tried++
				}
				if tried == 0 {
					t.Error("nothing ever failed: the test tests nothing")
				}
			})
		}
	}
}

// round is one act that fails at operation k.
func (s *scene) round(t *testing.T, a act, e ending, k int) (fired bool) {
	t.Helper()
	ctx := context.Background()
	mem := s.mem(t)
	faulty := fsx.NewFaulty(mem)
	r := mustOpen(t, faulty)
	e.plan.At = k
	faulty.Plan(e.plan)
	err := a.do(ctx, r, s)
	fired = faulty.Fired()
	if err != nil && !fired {
		t.Fatal(err)
	}
	if n := faulty.RetriedSyncs(); n > 0 {
		t.Fatalf("%d syncs were tried again after they failed", n)
	}
	if cerr := r.Close(); cerr != nil && !fired {
		t.Fatal(cerr)
	}
	kept := map[string][]byte{}
	for name, content := range s.kept {
		kept[name] = content
	}
	if e.others {
		s.othersGoOn(t, mem, kept)
	}
	if e.crash {
		seed := uint64(k)
		if e.others { // the worst crash: all that nobody made last is lost
			for seed = 0; rand.New(rand.NewPCG(seed, 5)).IntN(5) != 0; seed++ {
			}
		}
		mem.Crash(rand.New(rand.NewPCG(seed, 5)))
	}
	s.verify(t, mem, a, err == nil, kept)
	return fired
}

// othersGoOn is what other processes do while nobody knows yet what the dead one left:
// they find its packs and use them, and free what it let go.
func (s *scene) othersGoOn(t *testing.T, mem *fsx.Mem, kept map[string][]byte) {
	t.Helper()
	r := mustOpen(t, mem)
	defer r.Close()
	content := slices.Concat(s.fresh, noise(41, 1))
	ref, err := backup(context.Background(), r, VMID{"esx1", "others"}, testClock().Add(2*time.Hour), content, nil, whole(content))
	if err != nil {
		t.Fatalf("a backup by another process: %v", err)
	}
	kept[ref.String()] = content
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
}

func (s *scene) verify(t *testing.T, mem *fsx.Mem, a act, done bool, kept map[string][]byte) {
	t.Helper()
	ctx := context.Background()
	r := mustOpen(t, mem)
	defer r.Close()
	s.opens(t, mem, a, done)
	clean(t, r)
	s.reads(t, r, a, done, kept)
	for range 3 {
		mustPrune(t, r, PruneOptions{})
	}
	s.reads(t, r, a, done, kept)
	tidy(t, mem, r)
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, tmpDir+"/") && name != "tmp/init" && name != "tmp/upkeep" {
			t.Errorf("%s was left behind", name)
		}
	}
	// Life goes on.
	again := bytes.Clone(s.fresh)
	ref, err := backup(ctx, r, testVM, testClock().Add(3*time.Hour), again, nil, whole(again))
	if err != nil {
		t.Fatalf("the next backup: %v", err)
	}
	same(t, openDisk(t, r, ref), again)
}

// opens proves that the right passphrases open the repository.
func (s *scene) opens(t *testing.T, mem *fsx.Mem, a act, done bool) {
	t.Helper()
	open := func(pass []byte) bool {
		r, err := openFS(context.Background(), mem, "mem", Passphrase(pass), Options{})
		if err != nil {
			if !errors.Is(err, ErrWrongPassphrase) {
				t.Fatalf("%s: %v", pass, err)
			}
			return false
		}
		_ = r.Close()
		return true
	}
	second, third := open(secondPass), open(thirdPass)
	switch {
	case done && a.shut != nil && second:
		t.Error("a passphrase that was removed still opens it")
	case a.shut == nil && !second:
		t.Error("a passphrase that nobody touched does not open it")
	case done && a.done != nil && !third:
		t.Error("a passphrase that was added does not open it")
	case a.done == nil && third:
		t.Error("a passphrase that nobody added opens it")
	case a.shut != nil && a.done != nil && !second && !third:
		t.Error("neither the old passphrase nor the new one opens it")
	}
}

// reads proves that every generation is there whole or not at all, and that those
// nobody touched are there.
func (s *scene) reads(t *testing.T, r *Repository, a act, done bool, kept map[string][]byte) {
	t.Helper()
	ctx := context.Background()
	vms, err := r.VMs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, vm := range vms {
		refs, err := r.Refs(ctx, vm)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, ref := range refs {
			name := ref.String()
			found[name] = true
			switch {
			case kept[name] != nil:
				same(t, openDisk(t, r, ref), kept[name])
			case s.went[name] != nil:
				same(t, openDisk(t, r, ref), s.went[name])
			case name == s.freshRef.String():
				same(t, openDisk(t, r, ref), s.fresh)
			default:
				t.Errorf("%s was never made", name)
			}
		}
	}
	for name := range kept {
		if !found[name] {
			t.Errorf("%s is gone", name)
		}
	}
	for name := range s.went {
		switch {
		case a.name == "forget" && done && found[name]:
			t.Errorf("%s was forgotten and is there", name)
		case a.name != "forget" && !found[name]:
			t.Errorf("%s is gone", name)
		}
	}
	if a.name == "backup" && done && !found[s.freshRef.String()] {
		t.Error("what was committed is gone")
	}
	for _, ref := range []Ref{s.held, s.goes[0]} {
		held, err := r.Held(ctx, ref.VM)
		if err != nil {
			t.Fatal(err)
		}
		now, before, by := held[ref.Sequence], ref == s.held, map[bool]string{true: "release", false: "hold"}[ref == s.held]
		if now != before && a.name != by || now == before && a.name == by && done {
			t.Errorf("%v: held is %v", ref, now)
		}
	}
}
