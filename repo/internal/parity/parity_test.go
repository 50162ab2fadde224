package parity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

// random is a file of n bytes, the last 32 the SHA-256 of those before.
func random(seed uint64, n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, n-sumSize)
	_, _ = r.Read(b)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func build(t interface {
	Helper()
	Fatal(...any)
}, file []byte, percent int,
) []byte {
	t.Helper()
	s, err := Build(bytes.NewReader(file), int64(len(file)), percent)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSizes(t *testing.T) {
	for _, n := range []int{32, 33, 100, cell - 1, cell, cell + 1, 2 * cell, 23*cell + 7, aim*cell - 1, aim * cell, aim*cell + 1, 3*aim*cell + 5} {
		for _, percent := range []int{1, 4, 50} {
			if n > 50*cell && percent != 4 {
				continue // the matrices of many shards are slow under the race detector
			}
			file := random(uint64(n), n)
			side := build(t, file, percent)
			info, err := Check(side)
			if err != nil || info.Size != int64(n) || !bytes.Equal(info.Sum[:], file[n-sumSize:]) || info.Parity != Shards(int64(n), percent) {
				t.Fatal(info, err)
			}
			if got, damage, err := Mend(file, side); err != nil || len(damage) != 0 || !bytes.Equal(got, file) {
				t.Fatalf("%d bytes, nothing damaged: %v %v", n, damage, err)
			}
			// What is promised: a burst as long as the parity, wherever it begins.
			cut := min(n, max(info.Parity*info.cells(n)*cell-cell, cell))
			for _, at := range []int{0, (n - cut) / 3, n - cut} {
				hurt := bytes.Clone(file)
				for i := range cut {
					hurt[at+i] ^= 0x5a
				}
				got, damage, err := Mend(hurt, side)
				if err != nil || !bytes.Equal(got, file) || len(damage) != 1 || damage[0].Offset > int64(at) || damage[0].Length < int64(cut) {
					t.Fatalf("%d bytes, a burst of %d at %d: %v, %v", n, cut, at, damage, err)
				}
				clear(hurt[at : at+cut])
				if got, _, err := Mend(hurt, side); err != nil || !bytes.Equal(got, file) {
					t.Fatalf("%d bytes, %d of zeros at %d: %v", n, cut, at, err)
				}
			}
			if got, _, err := Mend(file[:n-cut], side); err != nil || !bytes.Equal(got, file) {
				t.Fatalf("%d bytes, %d cut off: %v", n, cut, err)
			}
			if got, _, err := Mend(append(bytes.Clone(file), make([]byte, 70000)...), side); err != nil || !bytes.Equal(got, file) {
				t.Fatalf("%d bytes, and more behind them: %v", n, err)
			}
			if n <= 2*cell {
				if got, _, err := Mend(nil, side); err != nil || !bytes.Equal(got, file) {
					t.Fatalf("%d bytes, the sidecar alone: %v", n, err)
				}
			}
		}
	}
	big := random(1, 8<<20)
	if side := build(t, big, 3); len(side) > len(big)*33/1000 {
		t.Errorf("3 %% of parity takes %d bytes for %d", len(side), len(big))
	}
}

// cells is the number of cells of a shard.
func (i Info) cells(size int) int {
	total := (size + cell - 1) / cell
	return (total + i.Data - 1) / i.Data
}

// TestByTheBook computes parity as FORMAT.md says, without the library.
func TestByTheBook(t *testing.T) {
	mul := func(a, b byte) (p byte) {
		for ; b > 0; b >>= 1 {
			if b&1 != 0 {
				p ^= a
			}
			carry := a & 0x80
			if a <<= 1; carry != 0 {
				a ^= 0x1d
			}
		}
		return p
	}
	pow := func(a byte, n int) byte {
		p := byte(1)
		for range n {
			p = mul(p, a)
		}
		return p
	}
	inverse := func(a byte) byte { return pow(a, 254) }
	// The parity of data d at a place is V' · V⁻¹ · d: the polynomial of degree below
	// k that has the values d at 0 … k-1, at the places k … k+m-1.
	file := random(8, 7*cell+100)
	side := build(t, file, 30)
	info, err := Check(side)
	if err != nil {
		t.Fatal(err)
	}
	k, m := info.Data, info.Parity
	if k != 8 || m != 3 {
		t.Fatal(k, m)
	}
	padded := append(bytes.Clone(file), make([]byte, cell)...)
	head := fixedSize + (k+m)*crcSize + sumSize
	for _, at := range []int{0, 1, 99, 100, cell - 1} {
		for p := range m {
			x := byte(k + p)
			var want byte
			for j := range k { // Lagrange
				term := padded[j*cell+at]
				for i := range k {
					if i != j {
						term = mul(term, mul(x^byte(i), inverse(byte(j)^byte(i))))
					}
				}
				want ^= term
			}
			if got := side[head+p*cell+at]; got != want {
				t.Fatalf("parity shard %d, byte %d: %#x, not %#x", p, at, got, want)
			}
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	file := random(2, 10000)
	at := func(b []byte, size int64, percent int) error {
		_, err := Build(bytes.NewReader(b), size, percent)
		return err
	}
	bad := bytes.Clone(file)
	bad[77] ^= 1
	if err := at(bad, int64(len(bad)), 3); !errors.Is(err, ErrFile) {
		t.Error("a damaged file:", err)
	}
	if err := at(file, int64(len(file))+1, 3); !errors.Is(err, ErrFile) {
		t.Error("a file that ends early:", err)
	}
	for _, percent := range []int{-1, 0, MaxPercent + 1} {
		if err := at(file, int64(len(file)), percent); err == nil {
			t.Errorf("%d %%", percent)
		}
	}
	for _, size := range []int64{0, 31, MaxSize + 1} {
		if err := at(file, size, 3); err == nil || errors.Is(err, ErrFile) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	broken := iotest.ErrReader(io.ErrClosedPipe)
	if _, err := Build(readerAt{broken}, 1000, 3); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	l := layoutOf(MaxSize, MaxPercent)
	if n := l.size(); n > MaxSidecar {
		t.Errorf("a sidecar of %d bytes", n)
	}
}

type readerAt struct{ io.Reader }

func (r readerAt) ReadAt(b []byte, _ int64) (int, error) { return r.Read(b) }

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
		if !bytes.Equal(s, side) {
			if _, err := Check(s); !errors.Is(err, ErrSidecar) {
				t.Fatal("a damaged sidecar:", err)
			}
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
	side := build(f, file, 10)
	f.Add(file, side)
	f.Add([]byte{}, side[:fixedSize])
	f.Fuzz(func(t *testing.T, file, side []byte) {
		_, _ = Check(side)
		got, _, err := Mend(file, side)
		if err != nil && got != nil {
			t.Fatal("bytes beside an error")
		}
		if n := len(got) - sumSize; err == nil && sha256.Sum256(got[:n]) != [32]byte(got[n:]) {
			t.Fatal("a file that is not whole")
		}
	})
}

// The fuzzer cannot make a head whose SHA-256 fits; this does it for it.
func FuzzHead(f *testing.F) {
	side := build(f, random(7, 3*cell), 10)
	f.Add(side[:fixedSize+5*crcSize])
	f.Fuzz(func(t *testing.T, head []byte) {
		sum := sha256.Sum256(head)
		b := append(bytes.Clone(head), sum[:]...)
		l := parseHead(b)
		if l == nil {
			return
		}
		if len(l.crcs) != (l.Data+l.Parity)*l.cells*crcSize || l.size() > MaxSidecar+4<<20*256 {
			t.Fatalf("%+v", l)
		}
		if len(b) > 1<<16 || l.size() > 1<<22 {
			return
		}
		whole := append(b, make([]byte, l.size()-len(b))...)
		binary.LittleEndian.PutUint32(whole[len(whole)-tailSize:], uint32(len(b)))
		if _, _, err := Mend(nil, whole); err == nil {
			t.Fatal("mended out of nothing")
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	file := random(7, 32<<20)
	for _, percent := range []int{3, 10, 50} {
		b.Run(string(rune('0'+percent/10))+string(rune('0'+percent%10)), func(b *testing.B) {
			b.SetBytes(int64(len(file)))
			var builder Builder
			for b.Loop() {
				if _, err := builder.Build(bytes.NewReader(file), int64(len(file)), percent); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
