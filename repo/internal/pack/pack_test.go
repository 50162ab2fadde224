package pack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testKeys derives keys well enough for tests.
type testKeys struct{}

func (testKeys) Epoch() uint32 { return 1 }

func (testKeys) Subkey(epoch uint32, label string, salt []byte) ([32]byte, error) {
	if epoch != 1 {
		return [32]byte{}, errors.New("no such epoch")
	}
	return sha256.Sum256(append([]byte(label), salt...)), nil
}

var repository = [16]byte{1, 2, 3}

// shelf collects what a writer published.
type shelf struct {
	mu    sync.Mutex
	packs []Published
}

func config(fsys fsx.FS, s *shelf) Config {
	return Config{
		FS: fsys, Keys: testKeys{}, Repository: repository, Type: Data, TmpPrefix: "tmp/s-",
		Limit: 20 << 10, ChunkSize: 8 << 10, Chunks: 3,
		Before: func(h block.Handle) error {
			if _, err := fsys.Stat(Data.Path(h)); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("pack %v has its name before it was announced: %w", h, err)
			}
			return nil
		},
		After: func(p Published) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.packs = append(s.packs, p)
		},
	}
}

func newFS(t testing.TB) *fsx.Mem {
	t.Helper()
	m := fsx.NewMem()
	if err := m.MkdirAll("tmp"); err != nil {
		t.Fatal(err)
	}
	return m
}

func payload(n int) []byte {
	b := bytes.Repeat([]byte{byte(n), byte(n >> 8), 7}, 1000)
	return b[:100+n*37%2000]
}

func TestParallel(t *testing.T) {
	mem, s := newFS(t), &shelf{}
	w := NewWriter(config(mem, s))
	const count = 400
	locs := make([]block.Location, count)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			var x Scratch
			for n := g; n < count; n += 4 {
				var err error
				p := payload(n)
				locs[n], err = w.Add(context.Background(), &x, block.ID{byte(n), byte(n >> 8), 1}, block.Zstd, 5000, p)
				clear(p) // it is ours again
				if err != nil {
					t.Error(err)
				}
				if n%97 == 0 {
					if err := w.Flush(context.Background()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal("closing twice:", err)
	}
	if _, err := w.Add(context.Background(), &Scratch{}, block.ID{1}, block.Raw, 1, []byte{1}); !errors.Is(err, ErrClosed) {
		t.Fatal("adding after close:", err)
	}
	records := 0
	for _, p := range s.packs {
		fi, err := mem.Stat(Data.Path(p.Handle))
		if err != nil || fi.Size() != p.Size {
			t.Fatal(fi, err)
		}
		records += len(p.Records)
	}
	if records != count || len(s.packs) < 10 {
		t.Fatalf("%d records in %d packs", records, len(s.packs))
	}
	for n, l := range locs {
		p, err := Open(mem, testKeys{}, repository, Data, l.Pack)
		if err != nil {
			t.Fatal(err)
		}
		sealed := make([]byte, l.Length)
		if err := p.ReadSealed(sealed, int64(l.Offset)); err != nil {
			t.Fatal(err)
		}
		got, err := p.Unseal(&Scratch{}, block.Record{ID: block.ID{byte(n), byte(n >> 8), 1}, Location: l}, 5000, sealed)
		if err != nil || !bytes.Equal(got, payload(n)) {
			t.Fatalf("record %d: %v", n, err)
		}
		p.Close()
	}
	for _, f := range mem.Files() {
		if f[:4] == "tmp/" {
			t.Errorf("%s was left", f)
		}
	}
}

func TestTooLarge(t *testing.T) {
	w := NewWriter(config(newFS(t), &shelf{}))
	defer w.Close()
	if _, err := w.Add(context.Background(), &Scratch{}, block.ID{1}, block.Raw, 1, make([]byte, 9<<10)); err == nil {
		t.Fatal("a record larger than a buffer passed")
	}
}

func TestAbortLeavesNothing(t *testing.T) {
	mem, s := newFS(t), &shelf{}
	w := NewWriter(config(mem, s))
	for n := range 20 {
		if _, err := w.Add(context.Background(), &Scratch{}, block.ID{byte(n)}, block.Raw, 2000, make([]byte, 2000)); err != nil {
			t.Fatal(err)
		}
	}
	w.Abort()
	for _, f := range mem.Files() {
		if f[:4] == "tmp/" {
			t.Errorf("%s was left", f)
		}
	}
	if _, err := w.Add(context.Background(), &Scratch{}, block.ID{1}, block.Raw, 1, []byte{1}); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

// Storage that fails must neither block writers nor leave a pack.
func TestStorageFails(t *testing.T) {
	for k := 1; k < 60; k++ {
		mem := newFS(t)
		faulty := fsx.NewFaulty(mem)
		faulty.Plan(fsx.Plan{Ops: fsx.OpChanges, At: k, Mode: fsx.NoSpace})
		s := &shelf{}
		w := NewWriter(config(faulty, s))
		var wg sync.WaitGroup
		var mu sync.Mutex
		var first error
		for g := range 3 {
			wg.Go(func() {
				var x Scratch
				for n := range 40 {
					_, err := w.Add(context.Background(), &x, block.ID{byte(n), byte(g)}, block.Raw, 2000, make([]byte, 2000))
					if err != nil {
						mu.Lock()
						first = err
						mu.Unlock()
						return
					}
				}
			})
		}
		wg.Wait()
		err := w.Close()
		if faulty.Fired() && !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("k %d: %v", k, err)
		}
		if first != nil && !errors.Is(first, syscall.ENOSPC) {
			t.Fatalf("k %d: %v", k, first)
		}
		for _, f := range mem.Files() {
			if f[:4] == "tmp/" {
				t.Fatalf("k %d: %s was left", k, f)
			}
		}
		for _, p := range s.packs {
			scrubs(t, mem, p.Handle)
		}
	}
}

func scrubs(t *testing.T, mem fsx.FS, h block.Handle) {
	t.Helper()
	p, err := Open(mem, testKeys{}, repository, Data, h)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var s Scrubber
	size, _ := p.Size()
	if n, err := s.Scrub(p, func(r block.Record, sealed []byte) error {
		_, err := p.Unseal(&Scratch{}, r, 2000, sealed)
		return err
	}); err != nil || n != size {
		t.Fatal(n, size, err)
	}
}

func TestContextEnds(t *testing.T) {
	mem := newFS(t)
	hold := make(chan struct{})
	c := config(mem, &shelf{})
	c.Before = func(block.Handle) error { <-hold; return nil }
	w := NewWriter(c)
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error)
	go func() {
		for {
			if _, err := w.Add(ctx, &Scratch{}, block.ID{1}, block.Raw, 7000, make([]byte, 7000)); err != nil {
				got <- err
				return
			}
		}
	}()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := w.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(hold)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// onePack is a small pack and its records.
func onePack(t testing.TB, repo [16]byte, typ Type) (*fsx.Mem, Published) {
	t.Helper()
	mem, s := newFS(t), &shelf{}
	c := config(mem, s)
	c.Before, c.Repository, c.Type = nil, repo, typ
	w := NewWriter(c)
	kind := block.Zstd
	if typ == Node {
		kind = block.NodeZstd
	}
	for n := range 3 {
		if _, err := w.Add(context.Background(), &Scratch{}, block.ID{byte(n + 1)}, kind, 500, bytes.Repeat([]byte("secret"), 10+n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return mem, s.packs[0]
}

// readAll opens everything in a pack; it returns the first fault.
func readAll(fsys fsx.FS, h block.Handle, records []block.Record) error {
	p, err := Open(fsys, testKeys{}, repository, Data, h)
	if err != nil {
		return err
	}
	defer p.Close()
	for _, r := range records {
		b := make([]byte, r.Length)
		if err := p.ReadSealed(b, int64(r.Offset)); err != nil {
			return err
		}
		if _, err := p.Unseal(&Scratch{}, r, 500, b); err != nil {
			if bytes.Contains(b, []byte("secret")) {
				return fmt.Errorf("plaintext came out with: %s", err.Error()) // which hides that it is damage
			}
			return err
		}
	}
	if _, err := p.Records(); err != nil {
		return err
	}
	var s Scrubber
	_, err = s.Scrub(p, nil)
	return err
}

func TestEveryByteCounts(t *testing.T) {
	mem, p := onePack(t, repository, Data)
	name := Data.Path(p.Handle)
	file, err := fsx.ReadFile(mem, name, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(file, []byte("secret")) {
		t.Fatal("plaintext in the file")
	}
	if err := readAll(mem, p.Handle, p.Records); err != nil {
		t.Fatal(err)
	}
	fails := func(what string, bad []byte) {
		t.Helper()
		if err := mem.Plant(name, bad); err != nil {
			t.Fatal(err)
		}
		err := readAll(mem, p.Handle, p.Records)
		if err == nil {
			t.Fatalf("%s: nobody noticed", what)
		}
		if !IsDamage(err) && !errors.Is(err, ErrVersion) && err.Error() != "no such epoch" {
			t.Fatalf("%s: %v", what, err)
		}
	}
	resum := func(b []byte) []byte {
		sum := sha256.Sum256(b[:len(b)-32])
		return append(b[:len(b)-32], sum[:]...)
	}
	for i := range file {
		for _, bit := range []byte{1, 0x80} {
			bad := bytes.Clone(file)
			bad[i] ^= bit
			fails(fmt.Sprintf("byte %d", i), bad)
			if i < len(file)-32 {
				fails(fmt.Sprintf("byte %d, sum put right", i), resum(bad))
			}
		}
		fails(fmt.Sprintf("cut at %d", i), file[:i])
	}
	fails("longer", append(bytes.Clone(file), 0))
	// Records of equal length that change places.
	mem2, q := onePack(t, repository, Data)
	other, err := fsx.ReadFile(mem2, Data.Path(q.Handle), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	r := q.Records[1]
	bad := bytes.Clone(file)
	copy(bad[r.Offset:r.Offset+r.Length], other[r.Offset:])
	fails("a record of another pack", resum(bad))
	fails("another pack under this name", other)
	mem3, q := onePack(t, [16]byte{9}, Data)
	if other, err = fsx.ReadFile(mem3, Data.Path(q.Handle), 1<<20); err != nil {
		t.Fatal(err)
	}
	fails("a pack of another repository", other)
	mem4, q := onePack(t, repository, Node)
	if other, err = fsx.ReadFile(mem4, Node.Path(q.Handle), 1<<20); err != nil {
		t.Fatal(err)
	}
	fails("a pack of nodes", other)
}

func TestWrongRecord(t *testing.T) {
	mem, pub := onePack(t, repository, Data)
	p, err := Open(mem, testKeys{}, repository, Data, pub.Handle)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	r := pub.Records[0]
	sealed := make([]byte, r.Length)
	if err := p.ReadSealed(sealed, int64(r.Offset)); err != nil {
		t.Fatal(err)
	}
	try := func(what string, r block.Record, raw int) {
		t.Helper()
		b := bytes.Clone(sealed)
		if got, err := p.Unseal(&Scratch{}, r, raw, b); err == nil || got != nil || !IsDamage(err) {
			t.Errorf("%s: %v", what, err)
		}
		if bytes.Contains(b, []byte("secret")) {
			t.Errorf("%s: plaintext came out", what)
		}
	}
	for what, change := range map[string]func(*block.Record){
		"id": func(r *block.Record) { r.ID[31] ^= 1 }, "offset": func(r *block.Record) { r.Offset++ },
		"kind": func(r *block.Record) { r.Kind = block.Raw }, "node": func(r *block.Record) { r.Kind = block.NodeZstd },
		"pack": func(r *block.Record) { r.Pack++ }, "length": func(r *block.Record) { r.Length-- },
		"hole": func(r *block.Record) { *r = block.Record{} },
	} {
		bad := r
		change(&bad)
		try(what, bad, 500)
	}
	try("raw length", r, 501)
}

func FuzzHeader(f *testing.F) {
	h := Header{Version: 1, Type: Data, Epoch: 3, Repository: repository, Salt: [32]byte{5}}
	f.Add(h.Append(nil))
	f.Add([]byte("hikaepk\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := DecodeHeader(b)
		if err == nil && !bytes.Equal(h.Append(nil), b[:HeaderSize]) {
			t.Fatalf("%x decoded to %+v", b, h)
		}
	})
}

func FuzzTrailer(f *testing.F) {
	b := appendTrailer(nil, 64, 48+16)
	f.Add(append(b, make([]byte, 32)...), int64(64+64+TrailerSize))
	f.Add([]byte{}, int64(0))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		tr, err := DecodeTrailer(b, size)
		if err != nil {
			return
		}
		if n := int64(tr.FooterLength); n > MaxRecords*block.Size+Overhead || int64(tr.FooterOffset)+n+TrailerSize != size {
			t.Fatalf("%+v in a file of %d", tr, size)
		}
	})
}

func FuzzFooter(f *testing.F) {
	_, p := onePack(f, repository, Data)
	var b []byte
	for _, r := range p.Records {
		b = r.Append(b)
	}
	last := p.Records[len(p.Records)-1]
	h := Header{Version: 1, Type: Data, Repository: repository}
	binary.LittleEndian.PutUint64(h.Salt[:], uint64(p.Handle))
	f.Add(b, last.Offset+last.Length)
	f.Add(b[:48], uint32(64))
	if _, err := decodeFooter(b, &h, last.Offset+last.Length); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte, end uint32) {
		b = b[:len(b)/block.Size*block.Size]
		list, err := decodeFooter(b, &h, end)
		if err != nil {
			return
		}
		next := uint32(HeaderSize)
		for _, r := range list {
			if r.Offset != next || r.Length == 0 || r.Offset+r.Length > end {
				t.Fatalf("%+v at %d, end %d", r, next, end)
			}
			next += r.Length
		}
	})
}

// FuzzPack changes a file in a place, cuts it and adds to it, puts the sum right and
// feeds it to everything that reads packs. (Its bytes are not the input: they are
// different in every process.)
func FuzzPack(f *testing.F) {
	mem, p := onePack(f, repository, Data)
	file, err := fsx.ReadFile(mem, Data.Path(p.Handle), 1<<20)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(0), []byte{}, uint16(len(file)), []byte{})
	f.Add(uint16(len(file)-48), []byte{0, 0, 1, 0, 7}, uint16(len(file)), []byte{})
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		f.Add(uint16(rng.IntN(len(file))), []byte{byte(1 + rng.IntN(255))}, uint16(len(file)-rng.IntN(2)), []byte{})
	}
	f.Fuzz(func(t *testing.T, at uint16, change []byte, keep uint16, more []byte) {
		x := append(bytes.Clone(file[:min(int(keep), len(file))]), more...)
		for i := range change {
			if int(at)+i < len(x) {
				x[int(at)+i] ^= change[i]
			}
		}
		if len(x) > 32 {
			sum := sha256.Sum256(x[:len(x)-32])
			copy(x[len(x)-32:], sum[:])
		}
		mem := fsx.NewMem()
		if err := mem.Plant(Data.Path(p.Handle), x); err != nil {
			t.Fatal(err)
		}
		if err := readAll(mem, p.Handle, p.Records); (err == nil) != bytes.Equal(x, file) {
			t.Fatalf("a changed pack read: %v", err)
		}
	})
}
