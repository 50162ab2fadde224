package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

// story is two generations of one VM and one of another, and what became of them.
type story struct {
	base, next, other []byte
	committed         map[string][]byte // by Ref.String: must be there
	begun             map[string][]byte // may be there
}

// retell is the same story with nothing told yet.
func (s *story) retell() *story {
	return &story{base: s.base, next: s.next, other: s.other, committed: map[string][]byte{}, begun: map[string][]byte{}}
}

func newStory() *story {
	s := &story{base: image(1, 14*testBlock+100), other: image(5, 3*testBlock)}
	s.next = bytes.Clone(s.base)
	copy(s.next[2*testBlock:], image(2, 2*testBlock))
	clear(s.next[9*testBlock : 10*testBlock])
	return s.retell()
}

// tell runs the story from the beginning until something fails.
func (s *story) tell(fsys fsx.FS) error {
	ctx := context.Background()
	if err := initFS(ctx, fsys, "mem", InitOptions{BlockSize: testBlock, Passphrase: passphrase, KDF: cheap, Clock: testClock}); err != nil {
		return err
	}
	r, err := openMem(fsys)
	if err != nil {
		return err
	}
	defer r.Close()
	var parent *Disk
	vm2 := VMID{"esx1", "db"}
	for i, step := range []struct {
		vm      VMID
		content []byte
		changed []extent
	}{
		{testVM, s.base, whole(s.base)},
		{testVM, s.next, []extent{{2 * testBlock, 2 * testBlock}, {9 * testBlock, testBlock}}},
		{vm2, s.other, whole(s.other)},
	} {
		if i == 2 {
			parent = nil
		}
		want := Ref{VM: step.vm, Time: testClock().Add(time.Duration(i) * time.Minute)}
		s.begun[want.String()] = step.content
		session, err := r.Begin(ctx, SessionOptions{})
		if err != nil {
			return err
		}
		ref, err := backupIn(ctx, session, step.vm, want.Time, step.content, parent, step.changed)
		if err == nil {
			s.committed[ref.String()] = step.content
		}
		if err := errors.Join(err, session.Close()); err != nil {
			return err
		}
		g, err := r.Generation(ctx, ref)
		if err != nil {
			return err
		}
		if parent, err = g.OpenDisk(0); err != nil {
			return err
		}
	}
	return nil
}

// verify proves that what was committed is there, that nothing is there by half,
// and that life goes on.
func (s *story) verify(t *testing.T, mem *fsx.Mem) {
	t.Helper()
	ctx := context.Background()
	if _, err := mem.Stat(configName); err != nil {
		if len(s.committed) > 0 {
			t.Fatalf("the config is gone: %v", err)
		}
		initMem(t, mem) // an interrupted init can be done again
	}
	r := mustOpen(t, mem)
	defer r.Close()
	clean(t, r)
	vms, err := r.VMs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, vm := range vms {
		refs, err := r.Refs(ctx, vm)
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range refs {
			content, ok := s.begun[ref.String()]
			if !ok {
				t.Fatalf("%v was never begun", ref)
			}
			found[ref.String()] = true
			same(t, openDisk(t, r, ref), content)
		}
	}
	for name := range s.committed {
		if !found[name] {
			t.Fatalf("%s was committed and is gone", name)
		}
	}
	again := slices.Concat(s.base[:5*testBlock], s.next)
	ref, err := backup(ctx, r, testVM, testClock().Add(time.Hour), again, nil, whole(again))
	if err != nil {
		t.Fatalf("the next backup: %v", err)
	}
	same(t, openDisk(t, r, ref), again)
	clean(t, r)
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "sessions/") || strings.HasPrefix(name, "tmp/") && !strings.HasPrefix(name, "tmp/key-") && !strings.HasPrefix(name, "tmp/init") {
			t.Errorf("%s was left behind", name)
		}
	}
}

// sweepStory tells the story again and again, failing at operation first, first +
// step, and so on.
func sweepStory(t *testing.T, plan fsx.Plan, at, step int, after func(t *testing.T, s *story, mem *fsx.Mem, err error, k int)) {
	first := newStory()
	for k := at; ; k += step {
		mem := fsx.NewMem()
		faulty := fsx.NewFaulty(mem)
		plan.At = k
		faulty.Plan(plan)
		s := first.retell()
		err := s.tell(faulty)
		if !faulty.Fired() {
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("about %d operations", k-1)
			if k < 30 {
				t.Fatal("that is too few to be true")
			}
			return
		}
		if n := faulty.RetriedSyncs(); n > 0 {
			t.Fatalf("operation %d: %d syncs were tried again after they failed", k, n)
		}
		after(t, s, mem, err, k)
		if t.Failed() {
			t.Fatalf("at operation %d (%v)", k, err)
		}
	}
}

func TestCrashAtEveryOperation(t *testing.T) {
	sweepStory(t, fsx.Plan{Ops: fsx.OpAny, Mode: fsx.CrashNow}, 1, 1, func(t *testing.T, s *story, mem *fsx.Mem, err error, k int) {
		mem.Crash(rand.New(rand.NewPCG(uint64(k), 77)))
		s.verify(t, mem)
	})
}

func TestNoSpaceAtEveryWrite(t *testing.T) {
	sweepStory(t, fsx.Plan{Ops: fsx.OpChanges, Mode: fsx.NoSpace}, 1, 1, func(t *testing.T, s *story, mem *fsx.Mem, err error, k int) {
		if err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("the error does not say that there is no room: %v", err)
			}
			if !strings.Contains(err.Error(), "MiB free") {
				t.Fatalf("the error does not say how much room there is: %v", err)
			}
			for _, name := range mem.Files() {
				if strings.HasPrefix(name, "tmp/") && !strings.HasPrefix(name, "tmp/init") {
					t.Fatalf("%s was left behind", name)
				}
			}
		}
		s.verify(t, mem)
	})
}

// Every operation fails in one of the ways.
func TestErrorAtEveryOperation(t *testing.T) {
	for i, mode := range []fsx.Mode{fsx.FailOnce, fsx.FailAfter, fsx.ShortWrite} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			sweepStory(t, fsx.Plan{Ops: fsx.OpChanges &^ fsx.OpRemove, Mode: mode}, 1+i, stride(t, 3), func(t *testing.T, s *story, mem *fsx.Mem, err error, k int) {
				s.verify(t, mem)
			})
		})
	}
}
