package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
	"hikae/repo/internal/pack"
)

func openWith(fsys fsx.FS, s Secret) (*Repository, error) {
	return openFS(context.Background(), fsys, "mem", s, Options{Clock: testClock, Workers: 1})
}

// opens tells whether the secret opens the repository.
func opens(t fatalist, fsys fsx.FS, s Secret) bool {
	t.Helper()
	r, err := openWith(fsys, s)
	if err == nil {
		_ = r.Close()
	} else if !errors.Is(err, ErrWrongPassphrase) {
		t.Fatal(err)
	}
	return err == nil
}

func TestKeys(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	first, err := r.KeySlots(ctx)
	if err != nil || len(first) != 1 || first[0].Kind != KeyPassphrase || !first[0].Vouched || first[0].Epoch != 1 {
		t.Fatalf("%+v, %v", first, err)
	}
	if err := r.RemoveKey(ctx, first[0].ID); !errors.Is(err, ErrLastKey) {
		t.Fatalf("the last one was removed: %v", err)
	}
	if err := r.RemoveKey(ctx, "0123456789abcdef"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}

	content, fileSecret := NewKeyFile()
	code, codeSecret := NewRecoveryCode()
	if _, err := r.AddKey(ctx, Passphrase([]byte("second")), "of the night shift", cheap); err != nil {
		t.Fatal(err)
	}
	fileSlot, err := r.AddKey(ctx, fileSecret, "", cheap)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.AddKey(ctx, codeSecret, "safe", cheap); err != nil {
		t.Fatal(err)
	}
	fromFile, err := KeyFile(content)
	if err != nil {
		t.Fatal(err)
	}
	fromCode, err := RecoveryCode([]byte(strings.ToLower(code)))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []Secret{Passphrase(passphrase), Passphrase([]byte("second")), fromFile, fromCode} {
		if !opens(t, mem, s) {
			t.Errorf("a %s does not open", s.Kind())
		}
	}
	if opens(t, mem, Passphrase(content)) {
		t.Error("a key file's content opens as a passphrase")
	}

	// A change keeps the label, and only the old secret stops working.
	made, err := r.ChangeKey(ctx, Passphrase([]byte("second")), Passphrase([]byte("third")), cheap)
	if err != nil || made.Label != "of the night shift" {
		t.Fatalf("%+v, %v", made, err)
	}
	if opens(t, mem, Passphrase([]byte("second"))) || !opens(t, mem, Passphrase([]byte("third"))) {
		t.Error("the change did not happen")
	}
	if _, err := r.ChangeKey(ctx, Passphrase([]byte("second")), Passphrase([]byte("fourth")), cheap); !errors.Is(err, ErrWrongPassphrase) {
		t.Fatal(err)
	}
	if err := r.RemoveKey(ctx, fileSlot.ID); err != nil {
		t.Fatal(err)
	}
	if opens(t, mem, fromFile) {
		t.Error("a removed key file opens")
	}
	list, err := r.KeySlots(ctx)
	if err != nil || len(list) != 3 {
		t.Fatalf("%+v, %v", list, err)
	}

	// Damage is named, the others are listed.
	if err := mem.Plant("keys/0123456789abcdef", []byte("{}")); err != nil {
		t.Fatal(err)
	}
	list, err = r.KeySlots(ctx)
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "keys/0123456789abcdef") || len(list) != 3 {
		t.Fatalf("%+v, %v", list, err)
	}
}

// After a rotation new files are of the new epoch, old ones are read, and equal
// blocks are still known.
func TestRotateKeys(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(1, 9*testBlock)
	before, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	code, codeSecret := NewRecoveryCode()
	if _, err := r.AddKey(ctx, codeSecret, "", cheap); err != nil {
		t.Fatal(err)
	}
	epoch, kept, err := r.RotateKeys(ctx)
	if err != nil || epoch != 2 || len(kept) != 2 {
		t.Fatalf("epoch %d, %+v, %v", epoch, kept, err)
	}
	// What is open goes on, but may not touch the keys.
	same(t, openDisk(t, r, before), content)
	if _, err := r.AddKey(ctx, Passphrase([]byte("x")), "", cheap); !errors.Is(err, ErrKeysChanged) {
		t.Fatal(err)
	}

	s, err := RecoveryCode([]byte(code))
	if err != nil {
		t.Fatal(err)
	}
	n, err := openWith(mem, s)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if n.KeyEpoch() != 2 {
		t.Fatalf("epoch %d", n.KeyEpoch())
	}
	same(t, openDisk(t, n, before), content)
	known := packFiles(mem, "packs/")
	next := bytes.Clone(content)
	next = append(next, image(3, 2*testBlock)...)
	copy(next[len(content):], "not zero")
	session, err := n.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ref, err := backupIn(ctx, session, testVM, testClock().Add(time.Minute), next, nil, whole(next))
	if err := errors.Join(err, session.Close()); err != nil {
		t.Fatal(err)
	}
	if got := session.Stats(); got.BytesNew > 2*testBlock {
		t.Errorf("%d bytes were stored again after the rotation", got.BytesNew-2*testBlock)
	}
	same(t, openDisk(t, n, ref), next)
	clean(t, n)
	fresh := 0
	for _, name := range packFiles(mem, "packs/") {
		if slices.Contains(known, name) {
			continue
		}
		fresh++
		b, err := fsx.ReadFile(mem, name, 64<<20)
		if err != nil {
			t.Fatal(err)
		}
		h, err := pack.DecodeHeader(b[:pack.HeaderSize])
		if err != nil || h.Epoch != 2 {
			t.Errorf("%s is of epoch %d: %v", name, h.Epoch, err)
		}
	}
	if fresh == 0 {
		t.Error("nothing was written")
	}
	// The repository that was opened before cannot read what is new, and says why.
	if _, err := r.Generation(ctx, ref); !errors.Is(err, keys.ErrNoEpoch) {
		t.Errorf("a generation of a later epoch: %v", err)
	}
}

func packFiles(mem *fsx.Mem, prefix string) (found []string) {
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, prefix) {
			found = append(found, name)
		}
	}
	return found
}

// Wherever changes of keys are interrupted, what should open opens, and what is
// stored can be read.
func TestKeysCrashAtEveryOperation(t *testing.T) {
	ctx := context.Background()
	content := image(2, 3*testBlock)
	old, fresh, third := Passphrase(passphrase), Passphrase([]byte("fresh")), Passphrase([]byte("third"))
	for _, mode := range []fsx.Mode{fsx.CrashNow, fsx.FailOnce, fsx.FailAfter, fsx.NoSpace} {
		step := 1
		if mode != fsx.CrashNow {
			step = 2
		}
		for k := 1; ; k += step {
			mem := fsx.NewMem()
			initMem(t, mem)
			r := mustOpen(t, mem)
			ref, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
			if err != nil {
				t.Fatal(err)
			}
			_ = r.Close()
			faulty := fsx.NewFaulty(mem)
			done := 0
			err = func() error {
				r, err := openMem(faulty)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				var ops fsx.Op = fsx.OpAny
				if mode != fsx.CrashNow {
					ops = fsx.OpChanges
				}
				faulty.Plan(fsx.Plan{Ops: ops, At: k, Mode: mode})
				if _, err := r.AddKey(ctx, third, "third", cheap); err != nil {
					return err
				}
				done = 1
				if _, err := r.ChangeKey(ctx, old, fresh, cheap); err != nil {
					return err
				}
				done = 2
				_, _, err = r.RotateKeys(ctx)
				if err == nil {
					done = 3
				}
				return err
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
			if done >= 1 && !opens(t, mem, third) {
				t.Fatalf("mode %v, operation %d (%v): the added key does not open", mode, k, err)
			}
			if done >= 2 && (opens(t, mem, old) || !opens(t, mem, fresh)) {
				t.Fatalf("mode %v, operation %d (%v): the changed key is the old one", mode, k, err)
			}
			use := fresh
			if !opens(t, mem, fresh) {
				use = old
			}
			n, err := openWith(mem, use)
			if err != nil {
				t.Fatalf("mode %v, operation %d: neither old nor new opens: %v", mode, k, err)
			}
			if done >= 3 && n.KeyEpoch() != 2 {
				t.Fatalf("mode %v, operation %d: the rotation is undone", mode, k)
			}
			same(t, openDisk(t, n, ref), content)
			if _, err := n.AddKey(ctx, Passphrase([]byte("after")), "", cheap); err != nil {
				t.Fatalf("mode %v, operation %d: the next change: %v", mode, k, err)
			}
			clean(t, n)
			_ = n.Close()
			if left := packFiles(mem, "tmp/key-"); left != nil {
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
