package parity

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

func random(seed uint64, n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func build(t interface {
	Helper()
	Fatal(...any)
}, file []byte, percent int,
) []byte {
	t.Helper()
	s, err := Build(file, 42, percent)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSizes(t *testing.T) {
	for _, n := range []int{1, 100, cell - 1, cell, cell + 1, aim*cell - 1, aim * cell, aim*cell + 1, 3*aim*cell + 5, 5 << 20} {
		file := random(uint64(n), n)
		side := build(t, file, 4)
		if name, size, err := Name(side); name != 42 || size != int64(n) || err != nil {
			t.Fatal(name, size, err)
		}
		if d, err := Damage(file, side); err != nil || len(d) != 0 {
			t.Fatalf("%d bytes, nothing damaged: %v %v", n, d, err)
		}
		// The whole file when it is that small, else a burst of 3 %.
		cut := min(n, max(cell, n*3/100))
		hurt := bytes.Clone(file)
		for i := range cut {
			hurt[n/3+i-min(n/3, max(0, n/3+cut-n))] ^= 0x5a
		}
		got, damage, err := Mend(hurt, side)
		if err != nil || !bytes.Equal(got, file) || len(damage) == 0 {
			t.Fatalf("%d bytes, a burst of %d: %v, %v", n, cut, damage, err)
		}
		got, _, err = Mend(file[:n-cut], side)
		if err != nil || !bytes.Equal(got, file) {
			t.Fatalf("%d bytes, %d cut off: %v", n, cut, err)
		}
	}
	big := random(1, 8<<20)
	if side := build(t, big, 4); len(side) > len(big)*46/1000 {
		t.Errorf("4 %% of parity takes %d bytes for %d", len(side), len(big))
	}
}

func TestBeyond(t *testing.T) {
	file := random(3, 4<<20)
	side := build(t, file, 2)
	hurt := bytes.Clone(file)
	clear(hurt[1<<20 : 2<<20])
	if got, damage, err := Mend(hurt, side); !errors.Is(err, ErrBeyond) || got != nil || len(damage) != 1 {
		t.Fatal(damage, err)
	}
	other := build(t, random(4, 4<<20), 2)
	if got, _, err := Mend(file, other); !errors.Is(err, ErrBeyond) || got != nil {
		t.Fatal("another file's parity:", err)
	}
}

// TestDamaged damages file and sidecar at will: what comes out is the file, or
// an error.
func TestDamaged(t *testing.T) {
	file := random(5, 30*cell+77)
	side := build(t, file, 5)
	rapid.Check(t, func(t *rapid.T) {
		f, s := bytes.Clone(file), bytes.Clone(side)
		for range rapid.IntRange(0, 12).Draw(t, "hits in the file") {
			f[rapid.IntRange(0, len(f)-1).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "by"))
		}
		for range rapid.IntRange(0, 2).Draw(t, "hits in the sidecar") {
			s[rapid.IntRange(0, len(s)-1).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "by"))
		}
		got, _, err := Mend(f, s)
		if err != nil {
			if got != nil {
				t.Fatal("bytes beside an error")
			}
			if !errors.Is(err, ErrBeyond) && !errors.Is(err, ErrSidecar) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(got, file) {
			t.Fatal("mended to something else")
		}
	})
	// One flip in either head alone never hurts.
	for at := 0; at < len(side); at += 1 + len(side)/41 {
		s := bytes.Clone(side)
		s[at] ^= 1
		f := bytes.Clone(file)
		f[7] ^= 1
		if got, _, err := Mend(f, s); err != nil || !bytes.Equal(got, file) {
			t.Fatalf("sidecar flipped at %d: %v", at, err)
		}
	}
}

func FuzzMend(f *testing.F) {
	file := random(6, 5*cell)
	side, err := Build(file, 1, 10)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file, side)
	f.Add([]byte{}, side[:fixedSize])
	f.Fuzz(func(t *testing.T, file, side []byte) {
		if got, _, err := Mend(file, side); err != nil && got != nil {
			t.Fatal("bytes beside an error")
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	file := random(7, 32<<20)
	b.SetBytes(int64(len(file)))
	for b.Loop() {
		if _, err := Build(file, 1, 4); err != nil {
			b.Fatal(err)
		}
	}
}
