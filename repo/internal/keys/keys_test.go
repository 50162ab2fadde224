package keys

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hikae/repo/internal/fsx"
)

var (
	cheap = Params{Time: 1, MemoryKiB: 8, Threads: 1}
	repo1 = [16]byte{1, 2, 3}
	noon  = time.Date(2026, 11, 22, 12, 0, 0, 5, time.FixedZone("", 3600))
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustBe(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

// fresh makes a repository with one slot.
func fresh(t testing.TB) (*fsx.Mem, *Ring, SlotInfo) {
	t.Helper()
	m := fsx.NewMem()
	must(t, fsx.MakeDir(m, "keys"))
	must(t, fsx.MakeDir(m, "tmp"))
	r, err := Create(rand.Reader, repo1)
	must(t, err)
	s, err := AddSlot(m, r, Passphrase([]byte("horse")), "mine", noon, cheap)
	must(t, err)
	return m, r, s
}

func sameRing(t testing.TB, a, b *Ring) {
	t.Helper()
	if a.Epoch() != b.Epoch() || a.IDKey() != b.IDKey() || a.Repository() != b.Repository() {
		t.Fatal("the rings differ")
	}
	for e := uint32(1); e <= a.Epoch(); e++ {
		ka, err := a.Subkey(e, "x", nil)
		must(t, err)
		kb, err := b.Subkey(e, "x", nil)
		must(t, err)
		if ka != kb {
			t.Fatalf("epoch %d differs", e)
		}
	}
}

func TestUnlock(t *testing.T) {
	m, r, s := fresh(t)
	content, file := NewKeyFile()
	code, recovery := NewRecoveryCode()
	_, err := AddSlot(m, r, file, "daemon", noon, Params{})
	must(t, err)
	_, err = AddSlot(m, r, recovery, "in the safe", noon, Params{})
	must(t, err)
	_, err = AddSlot(m, r, Passphrase([]byte("battery")), "hers", noon, cheap)
	must(t, err)

	file2, err := KeyFile(content)
	must(t, err)
	recovery2, err := RecoveryCode([]byte(strings.ToLower(strings.ReplaceAll(code, "-", " "))))
	must(t, err)
	for label, secret := range map[string]Secret{
		"mine": Passphrase([]byte("horse")), "hers": Passphrase([]byte("battery")),
		"daemon": file2, "in the safe": recovery2,
	} {
		got, info, err := Unlock(m, repo1, secret)
		must(t, err)
		sameRing(t, r, got)
		if info.Label != label || info.Kind != secret.Kind() {
			t.Errorf("%s opened by %+v", label, info)
		}
	}

	want := SlotInfo{
		ID: s.ID, File: "keys/" + s.ID, Kind: KindPassphrase, Label: "mine",
		Created: time.Date(2026, 11, 22, 11, 0, 0, 0, time.UTC), Epoch: 1, Params: cheap,
	}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
	list, err := Slots(m)
	must(t, err)
	if len(list) != 4 {
		t.Errorf("%d slots", len(list))
	}
}

func TestWrongSecrets(t *testing.T) {
	m, _, s := fresh(t)
	_, _, err := Unlock(m, repo1, Passphrase([]byte("horse ")))
	mustBe(t, err, ErrWrongPassphrase)
	if errors.Is(err, ErrDamagedSlot) || !strings.Contains(err.Error(), s.File) {
		t.Error(err)
	}
	_, file := NewKeyFile()
	_, _, err = Unlock(m, repo1, file)
	mustBe(t, err, ErrWrongPassphrase)
	for _, none := range []Secret{{}, Passphrase(nil), Passphrase([]byte{})} {
		_, _, err = Unlock(m, repo1, none)
		mustBe(t, err, ErrSecret)
	}
	_, _, err = Unlock(m, [16]byte{9}, Passphrase([]byte("horse")))
	mustBe(t, err, ErrDamagedSlot)
	_, _, err = Unlock(fsx.NewMem(), repo1, Passphrase([]byte("horse")))
	if err == nil || errors.Is(err, ErrWrongPassphrase) {
		t.Error("no keys directory:", err)
	}
	empty := fsx.NewMem()
	must(t, empty.MkdirAll("keys"))
	_, _, err = Unlock(empty, repo1, Passphrase([]byte("horse")))
	mustBe(t, err, ErrWrongPassphrase)
}

func TestAddSlotRefuses(t *testing.T) {
	m, r, _ := fresh(t)
	for _, p := range []Params{
		{Time: 0, MemoryKiB: 8, Threads: 1},
		{Time: 101, MemoryKiB: 8, Threads: 1},
		{Time: 1, MemoryKiB: 7, Threads: 1},
		{Time: 1, MemoryKiB: 1<<20 + 1, Threads: 1},
		{Time: 1, MemoryKiB: 8, Threads: 0},
		{Time: 1, MemoryKiB: 1 << 20, Threads: 65},
		{Time: 1, MemoryKiB: 15, Threads: 2},
	} {
		_, err := AddSlot(m, r, Passphrase([]byte("x")), "", noon, p)
		mustBe(t, err, ErrParams)
	}
	_, err := AddSlot(m, r, Passphrase(nil), "", noon, cheap)
	mustBe(t, err, ErrSecret)
	for _, l := range []string{"two\nlines", "\xff", strings.Repeat("x", 257)} {
		if _, err := AddSlot(m, r, Passphrase([]byte("x")), l, noon, cheap); err == nil {
			t.Errorf("label %q passed", l)
		}
	}
	if n := len(m.Files()); n != 2 { // the slot and the lock
		t.Errorf("files: %v", m.Files())
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	_, r, _ := fresh(t)
	secret := Passphrase([]byte("horse"))
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "secret", secret, "ring", r)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "secret", secret, "ring", r)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
		fmt.Fprintf(&log, verb+verb+verb, secret, r, &secret)
	}
	out := log.String()
	seed := hex.EncodeToString(r.seed[:])
	for _, leak := range []string{"horse", "686f727365", "104 111", "[0x68", seed[:8], fmt.Sprint(r.seed[0], r.seed[1], r.seed[2])} {
		if strings.Contains(out, leak) {
			t.Errorf("%q in %s", leak, out)
		}
	}
}

func TestWipe(t *testing.T) {
	m, r, _ := fresh(t)
	seed, master := r.seed[:], r.masters[0][:]
	r.Wipe()
	if !bytes.Equal(seed, make([]byte, 32)) || !bytes.Equal(master, make([]byte, 32)) {
		t.Error("keys remain")
	}
	_, err := r.Subkey(1, "x", nil)
	mustBe(t, err, ErrNoEpoch)
	s := Passphrase([]byte("horse"))
	s.Wipe()
	_, _, err = Unlock(m, repo1, s)
	mustBe(t, err, ErrWrongPassphrase)
}

// TestDerivation freezes what every repository in the world depends on. The
// values were computed from doc.go alone with Python's hmac.
func TestDerivation(t *testing.T) {
	r := &Ring{repository: repo1, masters: make([][32]byte, 2)}
	for i := range 32 {
		r.seed[i], r.masters[0][i], r.masters[1][i] = byte(i), byte(0x40+i), byte(0x80+i)
	}
	key := func(epoch uint32, label string, salt []byte) string {
		k, err := r.Subkey(epoch, label, salt)
		must(t, err)
		return hex.EncodeToString(k[:])
	}
	id := r.IDKey()
	other := r.IDSubkey("node")
	for what, v := range map[string][2]string{
		"pack":  {key(1, "pack", bytes.Repeat([]byte{7}, 32)), "70f8caddff4a3d0a531821742f021841467657d6c15c8b8c0b4be8527da2feaf"},
		"later": {key(2, "pack", bytes.Repeat([]byte{7}, 32)), "510980736b067c107d098a76e9b209f3de526f7187a9cb71e63ca96c171722c9"},
		"bare":  {key(1, "slot", nil), "451435337079ac7aec534166551bf20ceb7851bb2acab0a2268e9bbc5dd37d4c"},
		"id":    {hex.EncodeToString(id[:]), "e9f7ef817ebe42c776a0fccda3404296b56888f51a107eb9e97da722fe61c8db"},
		"node":  {hex.EncodeToString(other[:]), "387cacb1adbed6031c9b3cf8dbba6b871bde60af7ba79f772232b08e1ebceb34"},
	} {
		if v[0] != v[1] {
			t.Errorf("%s: %s", what, v[0])
		}
	}
	_, err := r.Subkey(0, "x", nil)
	mustBe(t, err, ErrNoEpoch)
	_, err = r.Subkey(3, "x", nil)
	mustBe(t, err, ErrNoEpoch)
}

func TestKeyFileText(t *testing.T) {
	good := strings.Repeat("0f", 32)
	for _, c := range []string{good, good + "\n", "  " + strings.ToUpper(good) + "\r\n"} {
		if _, err := KeyFile([]byte(c)); err != nil {
			t.Errorf("%q: %v", c, err)
		}
	}
	for _, c := range []string{"", good[:62], good + "00", good[:63] + "g", "not a key file"} {
		_, err := KeyFile([]byte(c))
		mustBe(t, err, ErrSecret)
		if strings.Contains(err.Error(), "0f0f") {
			t.Error("the error shows the key")
		}
	}
}

func TestRecoveryCode(t *testing.T) {
	code, secret := NewRecoveryCode()
	if len(code) != 47 || strings.Count(code, "-") != 7 {
		t.Fatalf("code %q", code)
	}
	for _, typed := range []string{
		code, strings.ToLower(code), strings.ReplaceAll(code, "-", ""), " " + code + "\n",
		strings.ReplaceAll(strings.ReplaceAll(code, "0", "o"), "1", "l"), strings.ReplaceAll(code, "1", "I"),
	} {
		got, err := RecoveryCode([]byte(typed))
		must(t, err)
		if !bytes.Equal(got.key, secret.key) || got.kind != KindRecovery {
			t.Errorf("%q is another secret", typed)
		}
	}
	for _, bad := range []string{"", code[:46], code + "0", strings.Repeat(code, 3), "U" + code[1:], "é" + code[1:]} {
		_, err := RecoveryCode([]byte(bad))
		mustBe(t, err, ErrSecret)
	}
	// Every single wrong character is noticed, and every two neighbours swapped.
	plain := strings.ReplaceAll(code, "-", "")
	missed := 0
	for i := range plain {
		wrong := []byte(plain)
		wrong[i] = recoveryDigits[(strings.IndexByte(recoveryDigits, wrong[i])+1)%32]
		if _, err := RecoveryCode(wrong); err == nil {
			missed++
		}
		if i > 0 && plain[i] != plain[i-1] {
			wrong := []byte(plain)
			wrong[i], wrong[i-1] = wrong[i-1], wrong[i]
			if _, err := RecoveryCode(wrong); err == nil {
				missed++
			}
		}
	}
	if missed > 0 { // 80 chances of 2^-24
		t.Errorf("%d slips not noticed", missed)
	}
}

func TestAddSlotAtEveryCrash(t *testing.T) {
	for k := 1; ; k++ {
		m, r, _ := fresh(t)
		f := fsx.NewFaulty(m)
		f.Plan(fsx.Plan{Ops: fsx.OpChanges, At: k, Mode: fsx.CrashNow})
		_, err := AddSlot(f, r, Passphrase([]byte("new")), "", noon, cheap)
		m.Crash(newRand(k))
		got, _, uerr := Unlock(m, repo1, Passphrase([]byte("horse")))
		must(t, uerr)
		sameRing(t, r, got)
		_, _, uerr = Unlock(m, repo1, Passphrase([]byte("new")))
		if err == nil {
			must(t, uerr)
		} else if uerr != nil {
			mustBe(t, uerr, ErrWrongPassphrase)
			if errors.Is(uerr, ErrDamagedSlot) {
				t.Error(uerr)
			}
		}
		if !f.Fired() {
			if k < 5 {
				t.Fatalf("only %d operations", k)
			}
			return
		}
	}
}

func readSlot(t testing.TB, m *fsx.Mem, file string) []byte {
	t.Helper()
	b, err := fsx.ReadFile(m, file, slotLimit)
	must(t, err)
	return b
}

// TestSlotDamage flips, cuts and swaps: whatever is done to a slot's file, it
// either does not open or opens the very same ring, and damage names the file.
func TestSlotDamage(t *testing.T) {
	m, r, s := fresh(t)
	whole := readSlot(t, m, s.File)
	try := func(what string, b []byte) {
		t.Helper()
		must(t, m.Plant(s.File, b))
		got, _, err := Unlock(m, repo1, Passphrase([]byte("horse")))
		if err == nil {
			// White space in JSON may change; nothing else may.
			sameRing(t, r, got)
			if j, k := strings.Join(strings.Fields(string(b)), ""), strings.Join(strings.Fields(string(whole)), ""); !strings.EqualFold(j, k) {
				t.Errorf("%s: opened a changed file", what)
			}
			return
		}
		if !errors.Is(err, ErrDamagedSlot) || !strings.Contains(err.Error(), s.File) {
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
	try("doubled", append(bytes.Clone(whole), whole...))
	try("too large", append(bytes.Clone(whole), bytes.Repeat([]byte(" "), slotLimit)...))

	// Another repository's slot, made with the same passphrase.
	m2 := fsx.NewMem()
	must(t, m2.MkdirAll("keys"))
	must(t, m2.MkdirAll("tmp"))
	r2, err := Create(rand.Reader, [16]byte{2})
	must(t, err)
	s2, err := AddSlot(m2, r2, Passphrase([]byte("horse")), "", noon, cheap)
	must(t, err)
	foreign := readSlot(t, m2, s2.File)
	try("another repository's", foreign)
	must(t, m.Plant(s2.File, foreign))
	must(t, m.Remove(s.File))
	_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
	mustBe(t, err, ErrDamagedSlot)

	// Damage beside a good slot does not matter.
	must(t, m.Plant(s.File, whole))
	must(t, m.Plant("keys/0000000000000000", []byte("{")))
	must(t, m.Plant("keys/.nfs0001", []byte("junk")))
	got, _, err := Unlock(m, repo1, Passphrase([]byte("horse")))
	must(t, err)
	sameRing(t, r, got)
	_, _, err = Unlock(m, repo1, Passphrase([]byte("wrong")))
	mustBe(t, err, ErrWrongPassphrase)
	mustBe(t, err, ErrDamagedSlot)
	list, err := Slots(m)
	mustBe(t, err, ErrDamagedSlot)
	if len(list) != 2 || !strings.Contains(err.Error(), "keys/0000000000000000") {
		t.Error(list, err)
	}
}

// TestSlotForged changes fields and makes the checksum fit again, as one who can
// write to the storage would: then the seal must notice.
func TestSlotForged(t *testing.T) {
	m, _, s := fresh(t)
	whole := readSlot(t, m, s.File)
	_, other := NewKeyFile()
	r2, err := Create(rand.Reader, repo1)
	must(t, err)
	s2, err := AddSlot(m, r2, other, "", noon, Params{})
	must(t, err)
	donor, err := parseSlot(s2.File, readSlot(t, m, s2.File))
	must(t, err)
	must(t, m.Remove(s2.File))
	for what, change := range map[string]func(f *slotFile){
		"label":   func(f *slotFile) { f.Label = "yours" },
		"created": func(f *slotFile) { f.Created = "2020-01-01T00:00:00Z" },
		"time":    func(f *slotFile) { f.KDF.Time = 2 },
		"memory":  func(f *slotFile) { f.KDF.MemoryKiB = 16 },
		"salt":    func(f *slotFile) { f.KDF.Salt[0]++ },
		"public":  func(f *slotFile) { f.Public = donor.Public },
		"mac":     func(f *slotFile) { f.MAC[31]++ },
		"body":    func(f *slotFile) { f.Body = donor.Body },
		"tag":     func(f *slotFile) { f.Body[len(f.Body)-1]++ },
	} {
		f, err := parseSlot(s.File, bytes.Clone(whole))
		must(t, err)
		change(f)
		plant(t, m, f)
		_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
		mustBe(t, err, ErrWrongPassphrase)
		if !strings.Contains(err.Error(), s.File) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, change := range map[string]func(f *slotFile){
		"costs":     func(f *slotFile) { f.KDF.Time = 101 },
		"memory":    func(f *slotFile) { f.KDF.MemoryKiB = 1<<20 + 1 },
		"threads":   func(f *slotFile) { f.KDF.Threads = 200 },
		"kind":      func(f *slotFile) { f.Kind = "guess" },
		"kdf":       func(f *slotFile) { f.KDF.Name = "md5" },
		"epochs":    func(f *slotFile) { f.Epoch = 1 << 31 },
		"short":     func(f *slotFile) { f.Body = f.Body[1:] },
		"no salt":   func(f *slotFile) { f.KDF.Salt = nil },
		"format":    func(f *slotFile) { f.Format = 2 },
		"name":      func(f *slotFile) { f.ID = hexBytes("12345678") },
		"local":     func(f *slotFile) { f.Created = "2026-11-22T12:00:00+01:00" },
		"labels":    func(f *slotFile) { f.Label = "\x1b[2J" },
		"published": func(f *slotFile) { f.Public = f.Public[:31] },
	} {
		f, err := parseSlot(s.File, bytes.Clone(whole))
		must(t, err)
		f.name = s.File
		change(f)
		plant(t, m, f)
		_, _, err = Unlock(m, repo1, Passphrase([]byte("horse")))
		if !errors.Is(err, ErrDamagedSlot) || !strings.Contains(err.Error(), s.File) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// plant writes a slot's file with a checksum that fits.
func plant(t testing.TB, m *fsx.Mem, f *slotFile) {
	t.Helper()
	sum := f.checksum()
	f.Checksum = sum[:]
	must(t, m.Plant(f.name, encode(t, f)))
}

func FuzzSlot(f *testing.F) {
	m, _, s := fresh(f)
	whole := readSlot(f, m, s.File)
	f.Add(whole)
	f.Add([]byte(`{"format":1}`))
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseSlot(s.File, b)
		if err != nil {
			mustBe(t, err, ErrDamagedSlot)
			return
		}
		if path.Base(s.File) != hex.EncodeToString(got.ID) {
			t.Error("accepted under a wrong name")
		}
		again, err := parseSlot(s.File, encode(t, got))
		must(t, err)
		if d := cmp.Diff(got.bound(), again.bound()); d != "" {
			t.Error(d)
		}
	})
}

func TestDefaultCosts(t *testing.T) {
	m, r, _ := fresh(t)
	s, err := AddSlot(m, r, Passphrase([]byte("costly")), "", noon, Params{})
	must(t, err)
	if s.Params != (Params{Time: 3, MemoryKiB: 65536, Threads: 4}) {
		t.Errorf("%+v", s.Params)
	}
	got, info, err := Unlock(m, repo1, Passphrase([]byte("costly")))
	must(t, err)
	sameRing(t, r, got)
	if info.ID != s.ID {
		t.Error(info)
	}
}
