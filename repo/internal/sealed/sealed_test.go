package sealed

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"
)

// testKeys derives keys well enough for tests.
type testKeys uint32

func (k testKeys) Epoch() uint32 { return uint32(k) }

func (k testKeys) Subkey(epoch uint32, label string, salt []byte) ([32]byte, error) {
	if epoch == 0 || epoch > uint32(k) {
		return [32]byte{}, errors.New("no such epoch")
	}
	b := binary.LittleEndian.AppendUint32([]byte(label), epoch)
	return sha256.Sum256(append(b, salt...)), nil
}

func box(t testing.TB, repository byte) *Box {
	b, err := New(testKeys(2), [16]byte{repository})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func TestRoundTrip(t *testing.T) {
	b := box(t, 1)
	for _, plain := range [][]byte{nil, {}, []byte("x"), bytes.Repeat([]byte("abc"), 100000)} {
		file, err := b.Seal(Manifest, "generations/a/b", plain)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(file, []byte("abc")) {
			t.Fatal("plaintext in the file")
		}
		got, err := b.Open(Manifest, "generations/a/b", file)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes: %v", len(plain), err)
		}
	}
}

func TestEveryByteCounts(t *testing.T) {
	b, other := box(t, 1), box(t, 2)
	const name = "generations/a/0000000001-2026-11-22T02-00-00Z"
	file, err := b.Seal(Manifest, name, []byte(`{"secret":"plaintext"}`))
	if err != nil {
		t.Fatal(err)
	}
	opens := func(what string, b *Box, t2 Type, name string, file []byte) {
		t.Helper()
		got, err := b.Open(t2, name, append([]byte(nil), file...))
		if err == nil || got != nil {
			t.Errorf("%s: opened", what)
		}
	}
	for i := range file {
		for _, bit := range []byte{1, 0x80} {
			bad := append([]byte(nil), file...)
			bad[i] ^= bit
			opens("flipped", b, Manifest, name, bad)
			// An attacker would put the sum right.
			sum := sha256.Sum256(bad[:len(bad)-32])
			copy(bad[len(bad)-32:], sum[:])
			if i < len(file)-32 {
				opens("flipped, sum put right", b, Manifest, name, bad)
			}
		}
		opens("cut", b, Manifest, name, file[:i])
	}
	opens("longer", b, Manifest, name, append(append([]byte(nil), file...), 0))
	opens("other type", b, Identity, name, file)
	opens("other name", b, Manifest, name+"x", file)
	opens("other repository", other, Manifest, name, file)
	file[8] = 9
	if _, err := b.Open(Manifest, name, file); !errors.Is(err, ErrVersion) {
		t.Errorf("version 9: %v", err)
	}
}

// FuzzOpen changes a file in a place, cuts it and adds to it. (Its bytes are not the
// input: they are different in every process.)
func FuzzOpen(f *testing.F) {
	b := box(f, 1)
	file, err := b.Seal(Manifest, "n", []byte("plain"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(0), []byte{}, uint16(len(file)), []byte{})
	f.Add(uint16(10), []byte{1}, uint16(len(file)), []byte{})
	f.Add(uint16(70), []byte{0, 255}, uint16(80), []byte("more"))
	f.Fuzz(func(t *testing.T, at uint16, change []byte, keep uint16, more []byte) {
		x := append(bytes.Clone(file[:min(int(keep), len(file))]), more...)
		for i := range change {
			if int(at)+i < len(x) {
				x[int(at)+i] ^= change[i]
			}
		}
		if len(x) > 32 && at%2 == 0 {
			sum := sha256.Sum256(x[:len(x)-32])
			copy(x[len(x)-32:], sum[:])
		}
		good := bytes.Equal(x, file)
		got, err := b.Open(Manifest, "n", x)
		if (err == nil) != good || good && string(got) != "plain" {
			t.Fatalf("%q, %v", got, err)
		}
	})
}
