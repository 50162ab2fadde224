package repo

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

// noisy is content without holes and without equal blocks.
func noisy(seed byte, blocks int) []byte {
	b := make([]byte, blocks*testBlock)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b) // never fails
	return b
}

func verified1(t *testing.T, v *DiskVerifier, d *Disk, line string) DiskProof {
	t.Helper()
	p, err := v.Verify(t.Context(), d, line, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestVerifyDisk(t *testing.T) {
	ctx := t.Context()
	mem, r := newMem(t)
	content := append(noisy(1, 600), make([]byte, 100*testBlock)...) // three leaves, a hole at the end
	copy(content[20*testBlock:], content[10*testBlock:11*testBlock]) // one block twice
	content = append(content, "the last block is not whole"...)
	first, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	d := openDisk(t, r, first)
	v := r.NewDiskVerifier()
	var done, total int64
	p, err := v.Verify(ctx, d, "disk", func(d, t int64) {
		if d < done {
			panic("progress went back")
		}
		done, total = d, t
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.Blocks != 601 || p.BlocksRead != 601 || p.BytesHashed != 600*testBlock || p.Nodes != 4 || p.BytesData != d.DataBytes() || p.BytesBad != 0 ||
		len(p.Damage) > 0 || p.BytesStored < 599*testBlock {
		t.Errorf("%+v", p)
	}
	if done != d.DataBytes() || total != d.DataBytes() {
		t.Errorf("progress ended at %d of %d", done, total)
	}
	if p := verified1(t, v, d, "disk"); p.Blocks != 601 || p.BlocksRead != 0 || p.Nodes != 0 || p.BytesData != d.DataBytes() {
		t.Errorf("again: %+v", p)
	}

	// The next generation costs what it differs by: the other blocks of the leaf were
	// proved in their places.
	content = bytes.Clone(content)
	copy(content[300*testBlock:], "changed")
	second, err := backup(ctx, r, testVM, testClock().Add(time.Hour), content, d, []extent{{300 * testBlock, testBlock}})
	if err != nil {
		t.Fatal(err)
	}
	if p := verified1(t, v, openDisk(t, r, second), "disk"); p.Blocks != 601 || p.BlocksRead != 1 || p.Nodes != 2 {
		t.Errorf("second: %+v", p)
	}
	// Without the line the leaf is read whole, without the verifier everything.
	v2 := r.NewDiskVerifier()
	verified1(t, v2, d, "")
	if p := verified1(t, v2, openDisk(t, r, second), ""); p.BlocksRead != 256 || p.Nodes != 2 {
		t.Errorf("second without a line: %+v", p)
	}

	// The storage is read, not what is in memory.
	same(t, d, append(bytes.Clone(content[:300*testBlock]), append(noisy(1, 301)[300*testBlock:], content[301*testBlock:]...)...))
	for _, name := range packFiles(mem, "packs/") {
		if err := mem.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	r.packs.Clear()
	p = verified1(t, r.NewDiskVerifier(), d, "")
	if p.BytesBad != d.DataBytes() || len(p.Damage) < 2 {
		t.Errorf("without packs: %d bytes bad, %+v", p.BytesBad, p.Damage)
	}
	if b := p.Damage[0]; b.Offset != 0 || !strings.Contains(b.What, "the pack is missing") || b.Pack == "" {
		t.Errorf("%+v", b)
	}

	// An empty disk, and one of zeros.
	for _, content := range [][]byte{nil, make([]byte, 5*testBlock)} {
		at := testClock().Add(time.Duration(2+len(content)) * time.Hour)
		ref, err := backup(ctx, r, testVM, at, content, nil, whole(content))
		if err != nil {
			t.Fatal(err)
		}
		if p := verified1(t, v, openDisk(t, r, ref), "x"); p.Blocks != 0 || p.Nodes != 0 || p.BytesData != 0 {
			t.Errorf("%+v", p)
		}
	}
}

// rot changes a byte of the sealed bytes of blocks of the disk.
func rot(t *testing.T, mem *fsx.Mem, d *Disk, blocks ...int64) {
	t.Helper()
	for _, n := range blocks {
		rec, err := d.tree.Lookup(t.Context(), loader{d.r}, n)
		if err != nil {
			t.Fatal(err)
		}
		rotRecord(t, mem, rec)
	}
	d.r.packs.Clear()
}

func rotRecord(t *testing.T, mem *fsx.Mem, rec block.Record) {
	t.Helper()
	name := pack.TypeOf(rec.Kind).Path(rec.Pack)
	b, err := fsx.ReadFile(mem, name, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	b[rec.Offset+5] ^= 1
	if err := errors.Join(mem.Remove(name), mem.Plant(name, b)); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyDiskNamesDamage(t *testing.T) {
	ctx := t.Context()
	mem, r := newMem(t)
	content := append(noisy(2, 700), make([]byte, 100)...)
	content[len(content)-1] = 1
	ref, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	d := openDisk(t, r, ref)
	rot(t, mem, d, 5, 6, 7, 299, 700)
	v := r.NewDiskVerifier()
	p := verified1(t, v, d, "disk")
	want := []DiskDamage{{Offset: 5 * testBlock, Length: 3 * testBlock}, {Offset: 299 * testBlock, Length: testBlock}, {Offset: 700 * testBlock, Length: 100}}
	if len(p.Damage) != len(want) || p.BytesBad != 4*testBlock+100 || p.Blocks != 701 || p.MoreDamage {
		t.Fatalf("%+v", p)
	}
	for i, b := range p.Damage {
		if b.Offset != want[i].Offset || b.Length != want[i].Length || len(b.Pack) != 16 || b.PackOffset == 0 || !strings.Contains(b.What, b.Pack) {
			t.Errorf("%+v, want %+v", b, want[i])
		}
		// The same bytes cannot be read, and those beside them can.
		if _, err := d.ReadAt(make([]byte, b.Length), b.Offset); !errors.Is(err, ErrDamaged) {
			t.Errorf("reading %+v: %v", b, err)
		}
	}
	// The damage is found again, and only what was good is not read again: all
	// three leaves have bad blocks.
	if p := verified1(t, v, d, "disk"); p.BytesBad != 4*testBlock+100 || p.BlocksRead != 701 {
		t.Errorf("again: %+v", p)
	}

	// What lies elsewhere as well is no damage.
	copied := noisy(2, 8)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for n := range 8 {
		p := copied[n*testBlock:][:testBlock]
		id := newHasher(r.ring).block(p)
		loc, err := s.data.Add(ctx, new(pack.Scratch), id, block.Raw, len(p), bytes.Clone(p))
		if err != nil {
			t.Fatal(err)
		}
		s.index.Add(block.Record{ID: id, Location: loc})
	}
	if err := errors.Join(s.data.Flush(ctx), s.flushIndex(ctx)); err != nil {
		t.Fatal(err)
	}
	if p := verified1(t, v, d, "disk"); p.BytesBad != testBlock+100 || len(p.Damage) != 2 {
		t.Errorf("with copies of three: %+v", p)
	}

	// A leaf is lost: all that it covers.
	root, err := r.readNode(ctx, d.tree.Root)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := block.Decode(root[block.Size:])
	if err != nil {
		t.Fatal(err)
	}
	rotRecord(t, mem, leaf)
	r.packs.Clear()
	p = verified1(t, v, d, "disk")
	if len(p.Damage) != 2 || p.Damage[0].Offset != 256*testBlock || p.Damage[0].Length != 256*testBlock || p.Damage[1].Offset != 700*testBlock {
		t.Errorf("without a leaf: %+v", p)
	}
	if p.BytesBad != 256*testBlock+100 {
		t.Errorf("%d bytes bad", p.BytesBad)
	}
}

// A seal proves that the writer sealed these bytes under this id, not that it was
// the right one. That is seen, too.
func TestVerifyDiskHashes(t *testing.T) {
	ctx := t.Context()
	_, r := newMem(t)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p := noisy(3, 1)
	id := newHasher(r.ring).block(p)
	id[0]++
	loc, err := s.data.Add(ctx, new(pack.Scratch), id, block.Raw, len(p), bytes.Clone(p))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.data.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	rec := block.Record{ID: id, Location: loc}
	w := &diskWalk{v: r.NewDiskVerifier(), d: &Disk{r: r, size: testBlock}, bs: testBlock}
	w.d.tree.Blocks = 1
	w.window = []placed{{rec, 0}}
	if err := w.flush(ctx); err != nil {
		t.Fatal(err)
	}
	if len(w.bad) != 1 || !strings.Contains(w.bad[0].what, "its content has another id") {
		t.Errorf("%+v", w.bad)
	}

	// The same for a node.
	other, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	make := other.nodeTools.New
	other.nodeTools.New = func() any {
		t := make().(*tools)
		t.blocks, t.nodes = t.nodes, t.blocks
		return t
	}
	ref, err := backupIn(ctx, other, testVM, testClock(), p, nil, whole(p))
	if err != nil {
		t.Fatal(err)
	}
	proof := verified1(t, r.NewDiskVerifier(), openDisk(t, r, ref), "")
	if len(proof.Damage) != 1 || !strings.Contains(proof.Damage[0].What, "its content has another id") {
		t.Errorf("%+v", proof)
	}
}

func TestVerifyDiskEnds(t *testing.T) {
	mem := fsx.NewMem()
	initMem(t, mem)
	faulty := fsx.NewFaulty(mem)
	r := mustOpen(t, faulty)
	defer r.Close()
	content := noisy(4, 300)
	ref, err := backup(t.Context(), r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	d := openDisk(t, r, ref)
	ctx, cancel := context.WithCancel(t.Context())
	_, err = r.NewDiskVerifier().Verify(ctx, d, "", func(int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// Storage that fails is no damage.
	faulty.Plan(fsx.Plan{Ops: fsx.OpRead, Name: func(n string) bool { return strings.HasPrefix(n, "packs/") }, At: 1, Mode: fsx.CrashNow})
	_, err = r.NewDiskVerifier().Verify(t.Context(), d, "", nil)
	if !errors.Is(err, fsx.ErrCrashed) || errors.Is(err, ErrDamaged) {
		t.Errorf("failing storage: %v", err)
	}
	faulty.Heal()
}

// stuck removes nothing, like append-only storage.
type stuck struct{ fsx.FS }

func (stuck) Remove(string) error { return fs.ErrPermission }

func TestVerification(t *testing.T) {
	ctx := t.Context()
	mem, r := newMem(t)
	refs, _ := nights(t, r, testVM, 3)
	g, err := r.Generation(ctx, refs[1])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Verification(ctx, refs[1]); !errors.Is(err, ErrNotFound) {
		t.Errorf("never verified: %v", err)
	}
	at := testClock().Add(100 * time.Hour)
	for i := range 2 {
		now := at.Add(time.Duration(i)*time.Hour + 7*time.Millisecond)
		if err := g.Remember(ctx, Verification{Time: now, Blocks: 5, Bytes: 5 * testBlock}); err != nil {
			t.Fatal(err)
		}
		v, err := r.Verification(ctx, refs[1])
		if err != nil || !v.Time.Equal(now.Truncate(time.Second)) || v.Blocks != 5 || v.Bytes != 5*testBlock || len(v.Manifest) != 64 {
			t.Fatalf("%+v, %v", v, err)
		}
	}
	at = at.Add(time.Hour)
	list, err := r.Verifications(ctx, testVM)
	if err != nil || len(list) != 1 || !list[refs[1].Sequence].Equal(at) {
		t.Errorf("%v, %v", list, err)
	}
	files := packFiles(mem, r.vmDir(testVM)+"/"+verificationPrefix)
	if len(files) != 1 {
		t.Fatalf("%q", files)
	}
	if list, err := r.Verifications(ctx, VMID{"no", "body"}); err != nil || len(list) > 0 {
		t.Errorf("%v, %v", list, err)
	}
	if err := g.Remember(ctx, Verification{Time: at}); err != nil {
		t.Errorf("twice within a second: %v", err)
	}
	// Whoever lists generations, checks or prunes passes it over.
	clean(t, r)

	// Under another number, another time, or changed anywhere, it does not open.
	good, err := fsx.ReadFile(mem, files[0], 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	dir := r.vmDir(testVM) + "/"
	for _, name := range []string{verificationName(refs[0].Sequence, at), verificationName(refs[2].Sequence, at.Add(time.Hour))} {
		if err := mem.Plant(dir+name, bytes.Clone(good)); err != nil {
			t.Fatal(err)
		}
	}
	for _, ref := range []Ref{refs[0], refs[2]} {
		if _, err := r.Verification(ctx, ref); !errors.Is(err, ErrDamaged) {
			t.Errorf("%v: %v", ref, err)
		}
	}
	if err := mem.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x40
		if err := mem.Plant(files[0], b); err != nil {
			t.Fatal(err)
		}
		if v, err := r.Verification(ctx, refs[1]); err == nil {
			t.Fatalf("byte %d: %+v", i, v)
		}
		if err := mem.Remove(files[0]); err != nil {
			t.Fatal(err)
		}
	}
	// A newer one that does not open hides no older one that does.
	if err := errors.Join(mem.Plant(files[0], good), mem.Plant(dir+verificationName(refs[1].Sequence, at.Add(time.Minute)), nil)); err != nil {
		t.Fatal(err)
	}
	if v, err := r.Verification(ctx, refs[1]); err != nil || !v.Time.Equal(at) {
		t.Errorf("%+v, %v", v, err)
	}

	// It goes with the generation, and so does what was left of others.
	if err := r.Forget(ctx, refs[1:2], ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(ctx, refs[:1], ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	if files := packFiles(mem, dir+verificationPrefix); len(files) != 1 || !strings.Contains(files[0], "0000000003-") {
		t.Errorf("%q are left", files)
	}
	if err := g.Remember(ctx, Verification{Time: at}); !errors.Is(err, ErrNotFound) {
		t.Errorf("of a generation that is gone: %v", err)
	}
}

func TestVerificationOnStorageThatRefuses(t *testing.T) {
	ctx := t.Context()
	mem, r := newMem(t)
	refs, _ := nights(t, r, testVM, 2)
	ro := mustOpen(t, readOnly{mem})
	defer ro.Close()
	g, err := ro.Generation(ctx, refs[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Remember(ctx, Verification{Time: testClock()}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	appended := mustOpen(t, stuck{mem})
	defer appended.Close()
	if g, err = appended.Generation(ctx, refs[0]); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		at := testClock().Add(time.Duration(i) * time.Minute)
		if err := g.Remember(ctx, Verification{Time: at}); err != nil {
			t.Fatal(err)
		}
		if v, err := appended.Verification(ctx, refs[0]); err != nil || !v.Time.Equal(at) {
			t.Errorf("%+v, %v", v, err)
		}
	}
	if files := packFiles(mem, r.vmDir(testVM)+"/"+verificationPrefix); len(files) != 3 {
		t.Errorf("%q", files)
	}
}

// Wherever remembering or forgetting is interrupted, what is said to be verified was.
func TestVerificationCrashAtEveryOperation(t *testing.T) {
	ctx := t.Context()
	for k := 1; ; k++ {
		mem := fsx.NewMem()
		initMem(t, mem)
		faulty := fsx.NewFaulty(mem)
		r := mustOpen(t, faulty)
		refs, _ := nights(t, r, testVM, 2)
		g, err := r.Generation(ctx, refs[0])
		if err != nil {
			t.Fatal(err)
		}
		faulty.Plan(fsx.Plan{Ops: fsx.OpChanges, At: k, Mode: fsx.CrashNow})
		err = g.Remember(ctx, Verification{Time: testClock()})
		err = errors.Join(err, g.Remember(ctx, Verification{Time: testClock().Add(time.Hour)}))
		fired := faulty.Fired()
		_ = r.Close()
		mem.Crash(rand.New(rand.NewPCG(uint64(k), 1)))
		r = mustOpen(t, mem)
		v, verr := r.Verification(ctx, refs[0])
		if !fired && (err != nil || verr != nil || !v.Time.Equal(testClock().Add(time.Hour))) {
			t.Fatalf("%v, %v, %v", v, verr, err)
		}
		if verr != nil && !errors.Is(verr, ErrNotFound) {
			t.Fatalf("crash at %d: %v", k, verr)
		}
		if p := structure(t, r); len(p) > 0 {
			t.Fatalf("crash at %d: %+v", k, p)
		}
		_ = r.Close()
		if !fired {
			if k < 5 {
				t.Fatalf("only %d operations", k)
			}
			return
		}
	}
}
