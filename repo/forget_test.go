package repo

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hikae/repo/internal/fsx"
)

// nights makes n generations of a VM, a night apart, each a little different.
func nights(t fatalist, r *Repository, vm VMID, n int) ([]Ref, [][]byte) {
	t.Helper()
	var refs []Ref
	var contents [][]byte
	var parent *Disk
	content := image(uint64(len(vm.Name)), 5*testBlock)
	for i := range n {
		changed := whole(content)
		if i > 0 {
			content = slices.Clone(content)
			copy(content[testBlock:], fmt.Sprintf("%v night %d", vm, i))
			changed = []extent{{testBlock, testBlock}}
		}
		ref, err := backup(context.Background(), r, vm, testClock().AddDate(0, 0, i), content, parent, changed)
		if err != nil {
			t.Fatal(err)
		}
		refs, contents, parent = append(refs, ref), append(contents, content), openDisk(t, r, ref)
	}
	return refs, contents
}

// structure is a check without reading data; it returns what was found.
func structure(t fatalist, r *Repository) []Problem {
	t.Helper()
	report, err := r.Check(context.Background(), CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return report.Problems
}

func TestForget(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := nights(t, r, testVM, 8)
	others, _ := nights(t, r, VMID{"esx1", "db"}, 2)

	// From the middle, the beginning, two in a row, one beside a gap.
	for _, round := range [][]int{{3}, {0}, {4, 5}, {2}} {
		var gone []Ref
		for _, i := range round {
			gone = append(gone, refs[i])
		}
		if err := r.Forget(ctx, gone, ForgetOptions{}); err != nil {
			t.Fatal(err)
		}
		if p := structure(t, r); len(p) > 0 {
			t.Fatalf("after %v: %+v", round, p)
		}
	}
	left, err := r.Refs(ctx, testVM)
	if err != nil || !slices.Equal(left, []Ref{refs[1], refs[6], refs[7]}) {
		t.Fatalf("%v, %v", left, err)
	}
	for _, i := range []int{1, 6, 7} {
		same(t, openDisk(t, r, refs[i]), contents[i])
	}
	// Life goes on, and the chain with it.
	if _, err := backup(ctx, r, testVM, testClock().AddDate(0, 1, 0), contents[0], nil, whole(contents[0])); err != nil {
		t.Fatal(err)
	}
	clean(t, r)
	if files := packFiles(mem, r.vmDir(testVM)+"/"+forgottenPrefix); len(files) != 1 {
		t.Errorf("%d forgotten files: %v", len(files), files)
	}

	// One that was taken away by somebody without the keys is still seen.
	if err := mem.Remove(r.manifestPath(refs[6])); err != nil {
		t.Fatal(err)
	}
	if p := structure(t, r); len(p) != 1 || !strings.Contains(p[0].What, "does not follow") {
		t.Fatalf("a manifest is gone: %+v", p)
	}
	if err := r.Forget(ctx, []Ref{refs[1]}, ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	if p := structure(t, r); len(p) == 0 {
		t.Fatal("forgetting another one has hidden it")
	}

	// The highest number is not given twice.
	if err := r.Forget(ctx, others, ForgetOptions{}); !errors.Is(err, ErrNewest) {
		t.Fatal(err)
	}
	if refs, err := r.Refs(ctx, others[0].VM); err != nil || len(refs) != 2 {
		t.Fatalf("one was forgotten though the other may not be: %v, %v", refs, err)
	}
	if err := r.Forget(ctx, others, ForgetOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Refs(ctx, others[0].VM); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if err := r.Forget(ctx, others[:1], ForgetOptions{}); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

func TestForgetKeepsNumbers(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	last := uint64(0)
	for i := range 3 {
		refs, _ := nights(t, r, testVM, 1+i)
		for _, ref := range refs {
			if ref.Sequence <= last {
				t.Fatalf("number %d after %d", ref.Sequence, last)
			}
			last = ref.Sequence
		}
		if err := r.Forget(ctx, refs, ForgetOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	if floors := packFiles(mem, generationsDir+"/"+floorPrefix); len(floors) != 1 {
		t.Errorf("%v", floors)
	}
	clean(t, r)
}

func TestHold(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	refs, _ := nights(t, r, testVM, 3)
	for range 2 {
		if err := r.Hold(ctx, refs[1]); err != nil {
			t.Fatal(err)
		}
	}
	if held, err := r.Held(ctx, testVM); err != nil || len(held) != 1 || !held[refs[1].Sequence] {
		t.Fatalf("%v, %v", held, err)
	}
	if err := r.Forget(ctx, refs[:2], ForgetOptions{Force: true}); !errors.Is(err, ErrHeld) {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Release(ctx, refs[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Forget(ctx, refs[:2], ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Hold(ctx, refs[0]); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if held, err := r.Held(ctx, VMID{"esx1", "none"}); err != nil || len(held) != 0 {
		t.Fatalf("%v, %v", held, err)
	}
	clean(t, r)
}

// What a running backup builds on stays until it ends, also when it is killed.
func TestForgetInUse(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := nights(t, r, testVM, 3)
	writer := mustOpen(t, mem)
	defer writer.Close()
	s, err := writer.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(ctx, int64(len(contents[1])), openDisk(t, writer, refs[1]))
	if err != nil {
		t.Fatal(err)
	}
	if used, err := r.InUse(ctx, refs); err != nil || len(used) != 1 || !used[refs[1].Sequence] {
		t.Fatalf("%v, %v", used, err)
	}
	if err := r.Forget(ctx, refs[:2], ForgetOptions{}); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if err := r.Forget(ctx, refs[:1], ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	w.Abandon()
	// The log of one that was killed says nothing.
	if err := mem.Plant("sessions/00000000000000aa", []byte(sessionMagic+"\nparent "+r.manifestPath(refs[1])+"\n")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(ctx, refs[1:2], ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	clean(t, r)
}

// A damaged generation can be forgotten, and then nobody complains any more; the
// newest good one is then the one before.
func TestForgetDamaged(t *testing.T) {
	ctx := context.Background()
	for victim := range 4 {
		mem, r := newMem(t)
		refs, _ := nights(t, r, testVM, 4)
		if err := r.Forget(ctx, refs[1:2], ForgetOptions{}); err != nil {
			t.Fatal(err)
		}
		if victim == 1 {
			continue
		}
		name := r.manifestPath(refs[victim])
		b, err := fsx.ReadFile(mem, name, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		b[100] ^= 1
		if err := errors.Join(mem.Remove(name), mem.Plant(name, b)); err != nil {
			t.Fatal(err)
		}
		if len(structure(t, r)) == 0 {
			t.Fatal("the damage is not seen")
		}
		if victim == 3 {
			if err := r.Forget(ctx, refs[2:3], ForgetOptions{}); !errors.Is(err, ErrNewest) {
				t.Fatal(err)
			}
		} else if err := r.Forget(ctx, refs[3:], ForgetOptions{}); !errors.Is(err, ErrNewest) {
			t.Fatal(err)
		}
		if err := r.Forget(ctx, refs[victim:victim+1], ForgetOptions{}); err != nil {
			t.Fatal(err)
		}
		if p := structure(t, r); len(p) > 0 {
			t.Fatalf("generation %d was damaged and is forgotten: %+v", victim, p)
		}
	}
}

// A forgotten file that was damaged, or put there for another VM, is told.
func TestForgottenFileDamaged(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, _ := nights(t, r, testVM, 3)
	others, _ := nights(t, r, VMID{"esx1", "db"}, 3)
	for _, ref := range []Ref{refs[1], others[1]} {
		if err := r.Forget(ctx, []Ref{ref}, ForgetOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	name := forgottenName(r.vmDir(testVM), 1)
	b, err := fsx.ReadFile(mem, forgottenName(r.vmDir(others[0].VM), 1), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(mem.Remove(name), mem.Plant(name, b)); err != nil {
		t.Fatal(err)
	}
	if p := structure(t, r); len(p) != 2 || !strings.Contains(p[0].What, name) || !strings.Contains(p[1].What, "does not follow") {
		t.Fatalf("%+v", p)
	}
}

// Any order of backups and forgetting leaves a chain that holds.
func TestForgetAtRandom(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		mem := fsx.NewMem()
		initMem(t, mem)
		r := mustOpen(t, mem)
		defer r.Close()
		content := image(3, testBlock)
		copy(content, "not zero")
		var refs []Ref
		for i := range rapid.IntRange(1, 8).Draw(t, "steps") {
			if len(refs) == 0 || rapid.Bool().Draw(t, "backup") {
				ref, err := backup(ctx, r, testVM, testClock().Add(time.Duration(i)*time.Hour), content, nil, whole(content))
				if err != nil {
					t.Fatal(err)
				}
				refs = append(refs, ref)
				continue
			}
			var gone, left []Ref
			for _, ref := range refs {
				if rapid.Bool().Draw(t, "gone") {
					gone = append(gone, ref)
				} else {
					left = append(left, ref)
				}
			}
			if err := r.Forget(ctx, gone, ForgetOptions{Force: true}); err != nil {
				t.Fatal(err)
			}
			refs = left
			if p := structure(t, r); len(p) > 0 {
				t.Fatalf("%+v", p)
			}
			if len(gone) == 0 {
				continue
			}
			if over, err := r.readBridges(testVM); err != nil || len(over) > 2*(len(gone)+len(left)) {
				t.Fatalf("%d bridges for %d generations: %v", len(over), len(left), err)
			}
		}
	})
}

// Wherever it is interrupted: what was to stay is there, what went is whole or
// gone, nobody complains, and it can be done again.
func TestForgetCrashAtEveryOperation(t *testing.T) {
	ctx := context.Background()
	for _, mode := range []fsx.Mode{fsx.CrashNow, fsx.FailOnce, fsx.FailAfter, fsx.NoSpace} {
		step := 1
		if mode != fsx.CrashNow {
			step = 2
		}
		for k := 1; ; k += step {
			mem := fsx.NewMem()
			initMem(t, mem)
			r := mustOpen(t, mem)
			refs, contents := nights(t, r, testVM, 6)
			if err := r.Forget(ctx, []Ref{refs[1]}, ForgetOptions{}); err != nil {
				t.Fatal(err)
			}
			_ = r.Close()
			faulty := fsx.NewFaulty(mem)
			ops := fsx.Op(fsx.OpAny)
			if mode != fsx.CrashNow {
				ops = fsx.OpChanges
			}
			gone := []Ref{refs[2], refs[3], refs[5]}
			err := func() error {
				r, err := openMem(faulty)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				faulty.Plan(fsx.Plan{Ops: ops, At: k, Mode: mode})
				return errors.Join(r.Hold(ctx, refs[4]), r.Forget(ctx, gone, ForgetOptions{Force: true}))
			}()
			fired := faulty.Fired()
			if !fired && err != nil {
				t.Fatal(err)
			}
			if n := faulty.RetriedSyncs(); n > 0 {
				t.Fatalf("mode %v, operation %d: syncs were tried again", mode, k)
			}
			if mode == fsx.CrashNow {
				mem.Crash(rand.New(rand.NewPCG(uint64(k), 5)))
			}
			n := mustOpen(t, mem)
			left, lerr := n.Refs(ctx, testVM)
			if lerr != nil {
				t.Fatal(lerr)
			}
			for i, ref := range refs {
				there := slices.Contains(left, ref)
				goes := slices.Contains(gone, ref)
				if !goes && i != 1 && !there || err == nil && goes && there {
					t.Fatalf("mode %v, operation %d (%v): generation %d: there is %v", mode, k, err, i, there)
				}
				if there {
					same(t, openDisk(t, n, ref), contents[i])
				}
			}
			if p := structure(t, n); len(p) > 0 {
				t.Fatalf("mode %v, operation %d (%v): %+v", mode, k, err, p)
			}
			ref, berr := backup(ctx, n, testVM, testClock().AddDate(1, 0, 0), contents[0], nil, whole(contents[0]))
			if berr != nil || ref.Sequence <= refs[5].Sequence {
				t.Fatalf("mode %v, operation %d: %v has number %d: %v", mode, k, ref, ref.Sequence, berr)
			}
			gone = slices.DeleteFunc(gone, func(ref Ref) bool { return !slices.Contains(left, ref) })
			if err := n.Forget(ctx, gone, ForgetOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := n.Release(ctx, refs[4]); err != nil {
				t.Fatal(err)
			}
			clean(t, n)
			_ = n.Close()
			if left := packFiles(mem, "tmp/forget"); left != nil {
				t.Fatalf("mode %v, operation %d: left behind %v", mode, k, left)
			}
			if !fired {
				if k < 12 {
					t.Fatalf("mode %v: %d operations are too few to be true", mode, k-1)
				}
				break
			}
		}
	}
}
