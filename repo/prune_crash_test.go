package repo

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"hikae/repo/internal/fsx"
)

// pruneStory is a repository with everything to do for a prune: dead packs, sparse
// ones, some condemned before. Its prune fails at operation k.
func pruneStory(t *testing.T, plan fsx.Plan, crash bool) (fired bool) {
	t.Helper()
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, mem)
	base := noise(1, 6)
	contents := map[Ref][]byte{}
	contents[mustBackup(t, r, testVM, 0, base)] = base
	goes := mustBackup(t, r, VMID{"esx1", "a"}, 1, noise(2, 5))
	without(t, r, goes)
	mustPrune(t, r, PruneOptions{})
	ref, content := sparse(t, r)
	contents[ref] = content
	without(t, r, mustBackup(t, r, VMID{"esx1", "b"}, 2, noise(3, 5)))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}

	faulty := fsx.NewFaulty(mem)
	r, err := openMem(faulty)
	if err != nil {
		t.Fatal(err)
	}
	faulty.Plan(plan)
	var pruned error
	for range 2 {
		if _, err := r.Prune(context.Background(), PruneOptions{}); err != nil {
			pruned = err
			break
		}
	}
	fired = faulty.Fired()
	if !fired && pruned != nil {
		t.Fatal(pruned)
	}
	if n := faulty.RetriedSyncs(); n > 0 {
		t.Fatalf("%d syncs were tried again after they failed", n)
	}
	if err := r.Close(); err != nil && !fired {
		t.Fatal(err)
	}
	if crash && fired {
		mem.Crash(rand.New(rand.NewPCG(uint64(plan.At), 5)))
	}

	r = mustOpen(t, mem)
	defer r.Close()
	clean(t, r)
	for range 3 {
		mustPrune(t, r, PruneOptions{})
	}
	for ref, content := range contents {
		same(t, openDisk(t, r, ref), content)
	}
	tidy(t, mem, r)
	return fired
}

func TestPruneFailsAnywhere(t *testing.T) {
	for _, c := range []struct {
		mode     fsx.Mode
		ops      fsx.Op
		at, step int
	}{
		{fsx.CrashNow, fsx.OpAny, 1, 13},
		{fsx.CrashNow, fsx.OpChanges, 1, 3},
		{fsx.FailOnce, fsx.OpAny, 3, 11},
		{fsx.FailAfter, fsx.OpChanges, 2, 5},
		{fsx.NoSpace, fsx.OpChanges, 1, 5},
	} {
		t.Run(fmt.Sprint(c.mode, c.ops), func(t *testing.T) {
			for k := c.at; ; k += stride(t, c.step) {
				fired := pruneStory(t, fsx.Plan{Ops: c.ops, Mode: c.mode, At: k}, c.mode == fsx.CrashNow)
				if t.Failed() {
					t.Fatalf("at operation %d", k)
				}
				if !fired {
					t.Logf("about %d operations", k-1)
					return
				}
			}
		})
	}
}

// A pack of a few small records is mostly its own frame, and is no better written anew.
func TestPruneComesToAnEnd(t *testing.T) {
	mem, r := newMem(t)
	content := bytes.Repeat([]byte("ab"), testBlock)
	ref := mustBackup(t, r, testVM, 0, content)
	for range 2 {
		report := mustPrune(t, r, PruneOptions{})
		if report.PacksRewritten != 0 || report.PacksCondemned != 0 {
			t.Fatalf("all of it is needed: %+v", report)
		}
	}
	same(t, openDisk(t, r, ref), content)
	tidy(t, mem, r)
}

// Two processes back up and forget, each its own VM of shared content, while a third
// prunes without any grace.
func TestPruneBesideBackups(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	pool := noise(4, 24)
	var writers errgroup.Group
	kept := make([]map[Ref][]byte, 2)
	for w := range 2 {
		writers.Go(func() error {
			other, err := openMem(mem)
			if err != nil {
				return err
			}
			defer other.Close()
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			vm := VMID{"esx1", fmt.Sprint("vm", w)}
			mine := map[Ref][]byte{}
			kept[w] = mine
			var refs []Ref
			content := bytes.Clone(pool[:12*testBlock])
			for i := range 25 {
				var changed []extent
				var parent *Disk
				for b := rng.IntN(3); b < 12; b += 1 + rng.IntN(5) {
					from := rng.IntN(24)
					copy(content[b*testBlock:(b+1)*testBlock], pool[from*testBlock:])
					changed = append(changed, extent{int64(b) * testBlock, testBlock})
				}
				if len(refs) == 0 {
					changed = whole(content)
				} else {
					g, err := other.Generation(ctx, refs[len(refs)-1])
					if err != nil {
						return err
					}
					if parent, err = g.OpenDisk(0); err != nil {
						return err
					}
				}
				ref, err := backup(ctx, other, vm, testClock().Add(time.Duration(i)*time.Minute), content, parent, changed)
				if err != nil {
					return fmt.Errorf("backup %d of %v: %w", i, vm, err)
				}
				refs = append(refs, ref)
				mine[ref] = bytes.Clone(content)
				for len(refs) > 1+rng.IntN(4) {
					if err := other.Forget(ctx, refs[:1], ForgetOptions{}); err != nil {
						return err
					}
					delete(mine, refs[0])
					refs = refs[1:]
				}
			}
			return nil
		})
	}
	done := make(chan error, 1)
	go func() { done <- writers.Wait() }()
	runs := 0
	var err error
	for running := true; running; runs++ {
		select {
		case err = <-done:
			running = false
		default:
		}
		if _, perr := r.Prune(ctx, PruneOptions{}); perr != nil {
			t.Errorf("run %d: %v", runs, perr)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		mustPrune(t, r, PruneOptions{})
	}
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	for _, mine := range kept {
		for ref, content := range mine {
			same(t, openDisk(t, fresh, ref), content)
		}
	}
	tidy(t, mem, fresh)
	t.Logf("%d runs", runs)
}

// A process that could not write its records into the index does not bring them back
// when others have deleted their packs.
func TestIndexForgetsWhatWentMeanwhile(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	faulty := fsx.NewFaulty(mem)
	other := mustOpen(t, faulty)
	defer other.Close()
	keep := mustBackup(t, r, testVM, 0, noise(1, 2))
	faulty.Plan(fsx.Plan{
		Ops: fsx.OpCreate, At: 1, Mode: fsx.NoSpace,
		Name: func(name string) bool { return strings.Contains(name, "index-") },
	})
	if _, err := backup(ctx, other, testVM, testClock().Add(time.Hour), noise(2, 2), nil, whole(noise(2, 2))); err == nil {
		t.Fatal("the index could be written: the test tests nothing")
	}
	faulty.Heal()
	mustPrune(t, r, PruneOptions{})
	if report := mustPrune(t, r, PruneOptions{}); report.PacksDeleted == 0 {
		t.Fatalf("%+v", report)
	}
	mustBackup(t, other, testVM, 120, noise(3, 2))
	same(t, openDisk(t, r, keep), noise(1, 2))
	tidy(t, mem, r)
}

// When nothing is left, superseded segments do not come back because a session that is
// open kept them.
func TestPruneOfEverythingBesideASession(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	other := mustOpen(t, mem)
	defer other.Close()
	begin := func() *Session {
		t.Helper()
		s, err := other.Begin(ctx, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	end := func(s *Session) {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	gone := func() {
		t.Helper()
		if report := mustPrune(t, r, PruneOptions{}); report.PacksDeleted != 2 {
			t.Fatalf("%+v", report)
		}
	}
	a, b := mustBackup(t, r, testVM, 0, noise(1, 1)), mustBackup(t, r, testVM, 1, noise(2, 1))
	without(t, r, a)
	mustPrune(t, r, PruneOptions{})
	one := begin() // too late to keep packs
	gone()
	without(t, r, b)
	mustPrune(t, r, PruneOptions{})
	two := begin()
	end(one)
	gone()
	end(two)
	mustPrune(t, r, PruneOptions{})
	tidy(t, mem, r)
}
