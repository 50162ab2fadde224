package keys

import (
	"bytes"
	"crypto/hpke"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"strings"
	"testing"

	"hikae/repo/internal/fsx"
)

func newRand(seed int) *mrand.Rand { return mrand.New(mrand.NewPCG(uint64(seed), 2)) }

func encode(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.MarshalIndent(v, "", "  ")
	must(t, err)
	return append(b, '\n')
}

func ids(list []SlotInfo) string {
	var s []string
	for _, i := range list {
		s = append(s, i.Label)
	}
	return strings.Join(s, " ")
}

func all(SlotInfo) bool { return true }

func TestRotate(t *testing.T) {
	m, r1, _ := fresh(t)
	_, file := NewKeyFile()
	_, err := AddSlot(m, r1, file, "daemon", noon, Params{})
	must(t, err)
	r2, wrapped, err := Rotate(m, r1, nil, noon)
	must(t, err)
	if len(wrapped) != 2 || r2.Epoch() != 2 || r1.Epoch() != 1 {
		t.Fatal(wrapped, r2.Epoch(), r1.Epoch())
	}
	k1, err := r1.Subkey(1, "x", nil)
	must(t, err)
	k2, err := r2.Subkey(2, "x", nil)
	must(t, err)
	if k1 == k2 || r1.IDKey() != r2.IDKey() {
		t.Error("a rotation changes the masters and nothing else")
	}
	_, err = AddSlot(m, r2, Passphrase([]byte("late")), "late", noon, cheap)
	must(t, err)
	r3, wrapped, err := Rotate(m, r2, nil, noon)
	must(t, err)
	if len(wrapped) != 3 {
		t.Fatal(wrapped)
	}
	for _, s := range []Secret{Passphrase([]byte("horse")), file, Passphrase([]byte("late"))} {
		got, _, err := Unlock(m, repo1, s)
		must(t, err)
		sameRing(t, r3, got)
	}

	// A ring that missed a rotation may not decide anything.
	_, err = AddSlot(m, r2, Passphrase([]byte("x")), "", noon, cheap)
	mustBe(t, err, ErrStale)
	_, _, err = Rotate(m, r1, nil, noon)
	mustBe(t, err, ErrStale)
	mustBe(t, RemoveSlot(m, r1, "0000000000000000"), ErrStale)
}

func TestRotateLeavesOut(t *testing.T) {
	m, r1, _ := fresh(t)
	_, err := AddSlot(m, r1, Passphrase([]byte("gone")), "gone", noon, cheap)
	must(t, err)
	_, _, err = Rotate(m, r1, func(SlotInfo) bool { return false }, noon)
	mustBe(t, err, ErrLastSlot)
	r2, wrapped, err := Rotate(m, r1, func(s SlotInfo) bool { return s.Label != "gone" }, noon)
	must(t, err)
	if ids(wrapped) != "mine" {
		t.Error(wrapped)
	}
	_, _, err = Unlock(m, repo1, Passphrase([]byte("gone")))
	mustBe(t, err, ErrLeftOut)
	good, err := Vouched(m, r2)
	must(t, err)
	if ids(good) != "mine" {
		t.Error(good)
	}
	// Not even the next rotation takes it in again.
	_, wrapped, err = Rotate(m, r2, all, noon)
	must(t, err)
	if ids(wrapped) != "mine" {
		t.Error(wrapped)
	}
}

// TestPlantedSlot: a slot put there by one without the keys gets no master.
func TestPlantedSlot(t *testing.T) {
	m, r, s := fresh(t)
	evil, err := Create(rand.Reader, repo1)
	must(t, err)
	if _, err := AddSlot(m, evil, Passphrase([]byte("evil")), "evil", noon, cheap); err != nil {
		t.Fatal(err)
	}
	// And one whose public key alone was exchanged.
	kem, err := suite.kem.GenerateKey()
	must(t, err)
	f, err := parseSlot(s.File, readSlot(t, m, s.File))
	must(t, err)
	f.ID = random(8)
	f.name = fmt.Sprintf("keys/%x", []byte(f.ID))
	f.Public = kem.PublicKey().Bytes()
	f.Label = "exchanged"
	plant(t, m, f)

	good, err := Vouched(m, r)
	must(t, err)
	if ids(good) != "mine" {
		t.Error(good)
	}
	_, wrapped, err := Rotate(m, r, nil, noon)
	must(t, err)
	if ids(wrapped) != "mine" {
		t.Error(wrapped)
	}
	mustBe(t, RemoveSlot(m, mustUnlock(t, m), s.ID), ErrLastSlot)
}

func mustUnlock(t *testing.T, m fsx.FS) *Ring {
	t.Helper()
	r, _, err := Unlock(m, repo1, Passphrase([]byte("horse")))
	must(t, err)
	return r
}

// TestPlantedEpoch: anyone can wrap a key to a public key; nobody may believe it.
func TestPlantedEpoch(t *testing.T) {
	m, r, s := fresh(t)
	f, err := parseSlot(s.File, readSlot(t, m, s.File))
	must(t, err)
	public, err := suite.kem.NewPublicKey(f.Public)
	must(t, err)
	master := bytes.Repeat([]byte{0x66}, 32)
	w, err := hpke.Seal(public, suite.kdf, suite.aead, wrapInfo(repo1[:], 2, f), master)
	must(t, err)
	digest := f.digest()
	e := &epochFile{
		Format: 1, Repository: repo1[:], Epoch: 2, Created: formatTime(noon),
		Slots: []epochSlot{{ID: f.ID, Slot: digest[:], Wrapped: w}},
	}
	evil := &Ring{repository: repo1, masters: [][32]byte{{}, [32]byte(master)}}
	must(t, evil.signEpoch(e))
	must(t, m.Plant(epochName(2), encode(t, e)))
	_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
	mustBe(t, err, ErrDamagedSlot)
	if !strings.Contains(err.Error(), epochName(2)) {
		t.Error(err)
	}
	_, err = AddSlot(m, r, Passphrase([]byte("x")), "", noon, cheap)
	mustBe(t, err, ErrStale) // better than to write a slot beside it
}

func TestEpochDamage(t *testing.T) {
	m, r, _ := fresh(t)
	r2, _, err := Rotate(m, r, nil, noon)
	must(t, err)
	r3, _, err := Rotate(m, r2, nil, noon)
	must(t, err)
	name := epochName(2)
	whole := readSlot(t, m, name)
	third := readSlot(t, m, epochName(3))
	try := func(what string, b []byte) {
		t.Helper()
		must(t, m.Plant(name, b))
		got, _, err := Unlock(m, repo1, Passphrase([]byte("horse")))
		if err == nil {
			sameRing(t, r3, got)
			if j, k := strings.Join(strings.Fields(string(b)), ""), strings.Join(strings.Fields(string(whole)), ""); !strings.EqualFold(j, k) {
				t.Errorf("%s: opened with a changed file", what)
			}
			return
		}
		if !errors.Is(err, ErrDamagedSlot) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range whole {
		for _, flip := range []byte{1, 0x20, 0x80} {
			b := bytes.Clone(whole)
			b[i] ^= flip
			try(fmt.Sprintf("byte %d ^ %#x", i, flip), b)
		}
		try(fmt.Sprintf("cut to %d", i), whole[:i])
	}
	try("swapped", third)
	// With a checksum that fits again.
	for what, change := range map[string]func(e *epochFile){
		"created":  func(e *epochFile) { e.Created = "2020-01-01T00:00:00Z" },
		"link":     func(e *epochFile) { e.Link[0]++ },
		"mac":      func(e *epochFile) { e.MAC[0]++ },
		"wrapped":  func(e *epochFile) { e.Slots[0].Wrapped[40]++ },
		"slot":     func(e *epochFile) { e.Slots[0].Slot[0]++ },
		"dropped":  func(e *epochFile) { e.Slots = nil },
		"another":  func(e *epochFile) { e.Repository[0]++ },
		"a longer": func(e *epochFile) { e.Slots[0].Wrapped = append(e.Slots[0].Wrapped, 0) },
	} {
		e, err := parseEpoch(2, bytes.Clone(whole))
		must(t, err)
		change(e)
		sum := e.checksum()
		e.Checksum = sum[:]
		try(what, encode(t, e))
		if _, _, err := Unlock(m, repo1, Passphrase([]byte("horse"))); err == nil {
			t.Errorf("%s: opened", what)
		}
	}
	must(t, m.Remove(name))
	_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
	mustBe(t, err, ErrDamagedSlot)
	if !strings.Contains(err.Error(), name) {
		t.Error(err)
	}
	// The remedy in the message works: what is older can be read.
	must(t, m.Remove(epochName(3)))
	if got := mustUnlock(t, m); got.Epoch() != 1 {
		t.Error(got.Epoch())
	}
	must(t, m.Plant("keys/epoch-99999999", third))
	_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
	mustBe(t, err, ErrDamagedSlot)
}

func TestRemoveSlot(t *testing.T) {
	m, r, s := fresh(t)
	mustBe(t, RemoveSlot(m, r, s.ID), ErrLastSlot)
	late, err := AddSlot(m, r, Passphrase([]byte("late")), "late", noon, cheap)
	must(t, err)
	for _, id := range []string{"", "x", "0000000000000000", "../config", "lock"} {
		mustBe(t, RemoveSlot(m, r, id), ErrNoSlot)
	}
	must(t, RemoveSlot(m, r, s.ID))
	_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
	mustBe(t, err, ErrWrongPassphrase)
	mustBe(t, RemoveSlot(m, r, late.ID), ErrLastSlot)
	got, _, err := Unlock(m, repo1, Passphrase([]byte("late")))
	must(t, err)
	sameRing(t, r, got)
}

// TestRotateAtEveryCrash: afterwards the ring opens, with the new epoch if Rotate
// said so.
func TestRotateAtEveryCrash(t *testing.T) {
	for k := 1; ; k++ {
		m, r, _ := fresh(t)
		f := fsx.NewFaulty(m)
		f.Plan(fsx.Plan{Ops: fsx.OpAny, At: k, Mode: fsx.CrashNow})
		_, _, err := Rotate(f, r, nil, noon)
		m.Crash(newRand(k))
		got := mustUnlock(t, m)
		if err == nil && got.Epoch() != 2 {
			t.Fatalf("crash at %d: the new epoch is lost", k)
		}
		if got.Epoch() == 1 {
			sameRing(t, r, got)
		}
		if !f.Fired() {
			if k < 10 {
				t.Fatalf("only %d operations", k)
			}
			return
		}
	}
}

// TestFrozen opens key files that were written by the first version of this
// format; every later version must. HIKAE_FREEZE=1 writes them.
func TestFrozen(t *testing.T) {
	const dir = "testdata/v1"
	if os.Getenv("HIKAE_FREEZE") != "" {
		freeze(t, dir)
	}
	fsys, err := fsx.OS(dir)
	must(t, err)
	file, err := KeyFile(bytes.Repeat([]byte("5a"), 32))
	must(t, err)
	recovery, err := RecoveryCode([]byte(frozenCode))
	must(t, err)
	var first *Ring
	for _, s := range []Secret{Passphrase([]byte("frozen passphrase, ångström")), file, recovery} {
		r, _, err := Unlock(fsys, [16]byte([]byte("frozen repositor")), s)
		must(t, err)
		if first == nil {
			first = r
		}
		sameRing(t, first, r)
	}
	if first.Epoch() != 2 || first.seed != [32]byte(bytes.Repeat([]byte{0x11}, 32)) || first.masters[0] != [32]byte(bytes.Repeat([]byte{0x22}, 32)) {
		t.Error("other keys than were frozen")
	}
	k, err := first.Subkey(2, "x", nil)
	must(t, err)
	if got := fmt.Sprintf("%x", k[:8]); got != frozenKey {
		t.Errorf("subkey of epoch 2 is %s", got)
	}
}

func freeze(t *testing.T, dir string) {
	must(t, os.RemoveAll(dir))
	must(t, os.MkdirAll(dir+"/keys", 0o755))
	must(t, os.MkdirAll(dir+"/tmp", 0o755))
	fsys, err := fsx.OS(dir)
	must(t, err)
	r, err := Create(bytes.NewReader(append(bytes.Repeat([]byte{0x11}, 32), bytes.Repeat([]byte{0x22}, 32)...)), [16]byte([]byte("frozen repositor")))
	must(t, err)
	_, err = AddSlot(fsys, r, Passphrase([]byte("frozen passphrase, ångström")), "a passphrase", noon, Params{Time: 2, MemoryKiB: 256, Threads: 2})
	must(t, err)
	file, err := KeyFile(bytes.Repeat([]byte("5a"), 32))
	must(t, err)
	_, err = AddSlot(fsys, r, file, "a key file", noon, Params{})
	must(t, err)
	r, _, err = Rotate(fsys, r, nil, noon)
	must(t, err)
	code, recovery := NewRecoveryCode()
	_, err = AddSlot(fsys, r, recovery, "a recovery code", noon, Params{})
	must(t, err)
	must(t, os.Remove(dir+"/keys/lock"))
	must(t, os.Remove(dir+"/tmp"))
	k, err := r.Subkey(2, "x", nil)
	must(t, err)
	t.Logf("frozen: code %s, subkey %x", code, k[:8])
}

const (
	frozenCode = "6GZN3-P4Q2B-QBRM4-RT5R5-X5J0Z-7SGPT-8NQ5R-A9MGC"
	frozenKey  = "88b998ecb7a7a2a1"
)

func FuzzEpoch(f *testing.F) {
	m, r, _ := fresh(f)
	_, _, err := Rotate(m, r, nil, noon)
	must(f, err)
	f.Add(readSlot(f, m, epochName(2)))
	f.Add([]byte(`{"format":1,"epoch":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseEpoch(2, b)
		if err != nil {
			mustBe(t, err, ErrDamagedSlot)
			return
		}
		again, err := parseEpoch(2, encode(t, e))
		must(t, err)
		if !bytes.Equal(e.statement(), again.statement()) {
			t.Error("changed by encoding")
		}
	})
}
