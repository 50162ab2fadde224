package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/index"
	"hikae/repo/internal/pack"
)

// Several disks in a session, several sessions in a process, several processes on
// a directory, and readers meanwhile.
func TestManyAtOnce(t *testing.T) {
	ctx := context.Background()
	mem := fsx.NewMem()
	initMem(t, mem)
	repos := []*Repository{mustOpen(t, mem), mustOpen(t, mem)}
	shared := image(42, 20*testBlock) // what everybody has
	var mu sync.Mutex
	committed := map[Ref][][]byte{}
	var stop atomic.Bool
	var readers, writers sync.WaitGroup
	for g := range 2 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(g)))
			for !stop.Load() {
				mu.Lock()
				var ref Ref
				var disks [][]byte
				for ref, disks = range committed {
					break
				}
				mu.Unlock()
				if disks == nil {
					time.Sleep(time.Millisecond)
					continue
				}
				gen, err := repos[g].Generation(ctx, ref)
				if err != nil {
					t.Error(err)
					return
				}
				for i, want := range disks {
					d, err := gen.OpenDisk(i)
					if err != nil {
						t.Error(err)
						return
					}
					off := rng.IntN(len(want))
					p := make([]byte, rng.IntN(len(want)-off))
					d.Prefetch(int64(off), int64(len(p)))
					if _, err := d.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, want[off:off+len(p)]) {
						t.Errorf("%v disk %d at %d: %v", ref, i, off, err)
						return
					}
				}
			}
		})
	}
	for g := range 4 {
		writers.Go(func() {
			vm := VMID{"esx", fmt.Sprint("vm", g)}
			var parents []*Disk
			for round := range 3 {
				s, err := repos[g%2].Begin(ctx, SessionOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				disks := make([][]byte, 3)
				trees := make([]DiskTree, 3)
				var wg sync.WaitGroup
				for i := range disks {
					disks[i] = append(bytes.Clone(shared), image(uint64(g*100+i*10+round), 8*testBlock+5)...)
					var parent *Disk
					if parents != nil {
						parent = parents[i]
					}
					wg.Go(func() {
						var err error
						if trees[i], err = write(ctx, s, disks[i], parent, whole(disks[i])); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				m := Manifest{VM: vm, Time: testClock().Add(time.Duration(round) * time.Second)}
				for i, tree := range trees {
					m.Disks = append(m.Disks, diskOf(fmt.Sprint("d", i), tree))
				}
				ref, err := s.Commit(ctx, m)
				if err := errors.Join(err, s.Close()); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				committed[ref] = disks
				mu.Unlock()
				gen, err := repos[g%2].Generation(ctx, ref)
				if err != nil {
					t.Error(err)
					return
				}
				parents = nil
				for i := range disks {
					d, err := gen.OpenDisk(i)
					if err != nil {
						t.Error(err)
						return
					}
					parents = append(parents, d)
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	readers.Wait()
	if t.Failed() {
		t.FailNow()
	}
	seen := map[uint64]bool{}
	for ref, disks := range committed {
		if seen[ref.Sequence] || ref.Sequence == 0 || ref.Sequence > 12 {
			t.Errorf("sequence %d given twice or out of range", ref.Sequence)
		}
		seen[ref.Sequence] = true
		gen, err := repos[0].Generation(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		for i := range disks {
			d, err := gen.OpenDisk(i)
			if err != nil {
				t.Fatal(err)
			}
			same(t, d, disks[i])
		}
	}
	report := clean(t, repos[1])
	if report.Generations != 12 || report.VMs != 4 || report.Disks != 36 {
		t.Errorf("%+v", report)
	}
	for _, r := range repos {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnchangedStoresNothing(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	content := image(1, 600*testBlock)
	first, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	for i, parent := range []*Disk{openDisk(t, r, first), nil} {
		s, err := r.Begin(ctx, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := backupIn(ctx, s, testVM, testClock().Add(time.Duration(i+1)*time.Hour), content, parent, whole(content)); err != nil {
			t.Fatal(err)
		}
		st := s.Stats()
		if st.BytesNew != 0 || st.Nodes != 0 || st.Packs != 0 || st.BytesStored > 2048 {
			t.Errorf("with parent %v: %+v", parent != nil, st)
		}
		if parent != nil && st.BytesUnchanged+st.BytesZero != int64(len(content)) {
			t.Errorf("%+v", st)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Equal blocks that are written at the same time are stored once.
func TestStoredOnce(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	one := image(3, 50*testBlock)
	content := bytes.Repeat(one, 4)
	s, err := r.Begin(ctx, SessionOptions{Compression: "none"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := backupIn(ctx, s, testVM, testClock(), content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	distinct := map[string]bool{}
	for b := 0; b < len(one); b += testBlock {
		if p := one[b : b+testBlock]; !isZero(p) {
			distinct[string(p)] = true
		}
	}
	if got := s.Stats().BytesNew; got != int64(len(distinct)*testBlock) {
		t.Errorf("%d blocks stored, %d are distinct", got/testBlock, len(distinct))
	}
}

// A disk of any size costs what changed, also when it grows by a level of the tree.
func TestSparseAndGrowing(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	var parent *Disk
	piece := image(11, 3*testBlock)
	copy(piece, "not a hole")
	copy(piece[testBlock:], "nor is this")
	copy(piece[2*testBlock:], "nor that")
	for i, capacity := range []int64{10 * testBlock, 300 * testBlock, 70000 * testBlock, 1 << 43, 1<<43 + 512, 1 << 62} {
		s, err := r.Begin(ctx, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Disk(ctx, capacity, parent)
		if err != nil {
			t.Fatal(err)
		}
		at := int64(i) * testBlock
		if err := w.Write(ctx, at, bytes.Clone(piece), nil); err != nil {
			t.Fatal(err)
		}
		if err := w.Zero(ctx, at+3*testBlock, capacity-at-3*testBlock); err != nil {
			t.Fatal(err)
		}
		tree, err := w.Finish(ctx)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := s.Commit(ctx, Manifest{VM: testVM, Time: testClock().Add(time.Duration(i) * time.Second), Disks: []DiskManifest{diskOf("d", tree)}})
		if err != nil {
			t.Fatal(err)
		}
		if st := s.Stats(); st.Nodes > 14 || st.BytesStored > 400<<10 {
			t.Errorf("%d bytes of disk: %+v", capacity, st)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		parent = openDisk(t, r, ref)
		if parent.DataBytes() != int64(i+3)*testBlock {
			t.Errorf("%d bytes of disk: %d bytes of data", capacity, parent.DataBytes())
		}
		start, end, err := parent.NextData(ctx, 0)
		if err != nil || start != 0 || end != int64(i+3)*testBlock {
			t.Errorf("data from %d to %d, %v", start, end, err)
		}
		if _, _, err := parent.NextData(ctx, end); !errors.Is(err, io.EOF) {
			t.Errorf("after the data: %v", err)
		}
		p := make([]byte, 100)
		if n, err := parent.ReadAt(p, capacity-50); n != 50 || !errors.Is(err, io.EOF) || !isZero(p) {
			t.Errorf("the end: %d, %v", n, err)
		}
	}
	clean(t, r)
}

// dies ends a session as a killed process would: its lock is gone, nothing else
// happens.
func dies(s *Session) {
	s.fail(errors.New("killed"))
	for w := range s.writers {
		w.stop(errors.New("killed"))
	}
	close(s.tasks)
	s.workers.Wait()
	s.data.Abort()
	s.node.Abort()
	s.file.lock.Close()
	s.closed = true
}

func TestTakesOverTheDead(t *testing.T) {
	ctx := context.Background()
	mem := fsx.NewMem()
	initMem(t, mem)
	content := image(8, 40*testBlock)
	r := mustOpen(t, mem)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(ctx, s, content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	if err := s.data.Flush(ctx); err != nil { // published, but no segment knows
		t.Fatal(err)
	}
	stored := s.Stats().BytesNew
	dies(s)
	_ = r.Close()
	if err := mem.Plant(tmpName(s.id, "rest"), []byte("unfinished")); err != nil {
		t.Fatal(err)
	}

	r = mustOpen(t, mem)
	defer r.Close()
	s, err = r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := backupIn(ctx, s, testVM, testClock(), content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.BytesNew != 0 || stored == 0 {
		t.Errorf("stored again: %+v", st)
	}
	for _, f := range mem.Files() {
		if strings.HasPrefix(f, "tmp/") || strings.HasPrefix(f, "sessions/") && !strings.Contains(f, s.id) {
			t.Errorf("%s was left", f)
		}
	}
	clean(t, r)
}

// Without Commit nothing is a generation, but the work is found again.
func TestCloseKeepsWork(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(8, 40*testBlock)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(ctx, int64(len(content)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(ctx, 0, bytes.Clone(content[:30*testBlock]), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := write(ctx, s, content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // with a disk open, and twice
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Finish(ctx); !errors.Is(err, ErrClosed) {
		t.Errorf("finish after close: %v", err)
	}
	if _, err := s.Commit(ctx, Manifest{VM: testVM}); !errors.Is(err, ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
	if _, err := s.Disk(ctx, 1, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("disk after close: %v", err)
	}
	if vms, err := r.VMs(ctx); err != nil || len(vms) != 0 {
		t.Errorf("%v %v", vms, err)
	}
	o := mustOpen(t, mem)
	defer o.Close()
	if s, err = o.Begin(ctx, SessionOptions{}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := write(ctx, s, content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.BytesNew != 0 {
		t.Errorf("stored again: %+v", st)
	}
}

// A pack that is condemned, or gone, is as good as unknown: its blocks are stored
// again, even where the parent still points to them.
func TestCondemnedIsNotReused(t *testing.T) {
	ctx := context.Background()
	for _, how := range []string{"condemned", "gone"} {
		t.Run(how, func(t *testing.T) {
			mem, r := newMem(t)
			content := image(8, 40*testBlock)
			first, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range mem.Files() {
				if name, ok := strings.CutPrefix(f, "packs/"); ok {
					if how == "gone" {
						err = mem.Remove(f)
					} else {
						err = mem.Plant("condemned/"+name[3:], nil)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			_ = r.Close()
			r = mustOpen(t, mem)
			defer r.Close()
			second, err := backup(ctx, r, testVM, testClock().Add(time.Hour), content, openDisk(t, r, first), whole(content))
			if err != nil {
				t.Fatal(err)
			}
			if how == "condemned" {
				for _, f := range mem.Files() {
					if name, ok := strings.CutPrefix(f, "condemned/"); ok {
						if err := mem.Remove("packs/" + name[:2] + "/" + name); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			_ = r.Close()
			r = mustOpen(t, mem)
			defer r.Close()
			same(t, openDisk(t, r, second), content)
			same(t, openDisk(t, r, first), content) // healed, through the index
			clean(t, r)
		})
	}
}

// A pack that is condemned after it was found good stops the commit.
func TestCondemnedMeanwhile(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(8, 40*testBlock)
	if _, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tree, err := write(ctx, s, content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range mem.Files() {
		if name, ok := strings.CutPrefix(f, "packs/"); ok {
			if err := mem.Plant("condemned/"+name[3:], nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	_, err = s.Commit(ctx, Manifest{VM: testVM, Time: testClock().Add(time.Hour), Disks: []DiskManifest{diskOf("d", tree)}})
	if err == nil || !strings.Contains(err.Error(), "condemned") {
		t.Fatal(err)
	}
	if refs, err := r.Refs(ctx, testVM); err != nil || len(refs) != 1 {
		t.Fatal(refs, err)
	}
}

func TestWriterRefuses(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	if _, err := r.Begin(ctx, SessionOptions{Compression: "lz4"}); err == nil || !strings.Contains(err.Error(), "zstd") {
		t.Errorf("lz4: %v", err)
	}
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const capacity = 10*testBlock + 5
	w, err := s.Disk(ctx, capacity, nil)
	if err != nil {
		t.Fatal(err)
	}
	released := 0
	try := func(what string, off int64, n int) {
		t.Helper()
		before := released
		if err := w.Write(ctx, off, make([]byte, n), func() { released++ }); err == nil {
			t.Errorf("%s passed", what)
		}
		if released != before+1 {
			t.Errorf("%s: released %d times", what, released-before)
		}
	}
	if err := w.Write(ctx, 2*testBlock, bytes.Repeat([]byte{7}, testBlock), nil); err != nil {
		t.Fatal(err)
	}
	try("an offset that is no boundary", 5*testBlock+1, testBlock)
	try("half a block", 5*testBlock, testBlock/2)
	try("going back", 2*testBlock, testBlock)
	try("beyond the end", 10*testBlock, testBlock)
	try("a negative offset", -testBlock, testBlock)
	if err := w.Zero(ctx, 0, testBlock); err == nil {
		t.Error("a hole before what was written passed")
	}
	if err := w.Write(ctx, 10*testBlock, []byte("tail!"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(ctx, Manifest{VM: testVM}); err == nil {
		t.Error("a commit with an unfinished disk passed")
	}
	tree, err := w.Finish(ctx)
	if err != nil || tree.DataBytes != testBlock+5 {
		t.Fatal(tree, err)
	}
	if _, err := w.Finish(ctx); !errors.Is(err, ErrClosed) {
		t.Error("finished twice")
	}
	w.Abandon()
	for what, change := range map[string]func(*Manifest){
		"another root": func(m *Manifest) {
			m.Disks[0].Root = block.Record{ID: block.ID{1}, Location: block.Location{Pack: 1, Length: 99, Kind: block.NodeRaw}}.Append(nil)
		},
		"another size":      func(m *Manifest) { m.Disks[0].Capacity-- },
		"more data":         func(m *Manifest) { m.Disks[0].DataBytes++ },
		"no root":           func(m *Manifest) { m.Disks[0].Root = nil },
		"a slash":           func(m *Manifest) { m.Disks[0].Name = "../d" },
		"equal names":       func(m *Manifest) { m.Files = []ManifestFile{{Name: "d.vmdk"}} },
		"a reserved name":   func(m *Manifest) { m.Files = []ManifestFile{{Name: "generation.json"}} },
		"no VM":             func(m *Manifest) { m.VM = VMID{} },
		"a VM with a slash": func(m *Manifest) { m.VM.Name = "a/b" },
	} {
		m := Manifest{VM: testVM, Disks: []DiskManifest{diskOf("d", tree)}}
		change(&m)
		if _, err := s.Commit(ctx, m); err == nil {
			t.Errorf("%s passed", what)
		}
	}
	// None of this spoiled the session.
	if _, err := s.Commit(ctx, Manifest{VM: testVM, Disks: []DiskManifest{diskOf("d", tree)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(ctx, Manifest{VM: testVM, Disks: []DiskManifest{diskOf("d", tree)}}); !errors.Is(err, ErrExists) {
		t.Errorf("twice in a second: %v", err)
	}
}

// A context that ends stops a writer that waits, and every buffer comes back.
func TestContextEnds(t *testing.T) {
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, mem)
	defer r.Close()
	s, err := r.Begin(context.Background(), SessionOptions{Compression: "none"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w, err := s.Disk(context.Background(), 1<<40, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var given, back atomic.Int64
	rng := rand.New(rand.NewPCG(1, 1))
	for off := int64(0); ; off += 8 * testBlock {
		p := make([]byte, 8*testBlock)
		for b := 0; b < len(p); b += testBlock {
			p[b] = byte(rng.Uint32()) | 1
			p[b+1] = byte(off >> 19)
		}
		given.Add(1)
		if err = w.Write(ctx, off, p, func() { back.Add(1) }); err != nil {
			break
		}
		if off == 64*testBlock {
			cancel()
		}
	}
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if _, err := w.Finish(context.Background()); !errors.Is(err, context.Canceled) {
		t.Errorf("finishing with a piece missing: %v", err)
	}
	w.Abandon()
	if given.Load() != back.Load() {
		t.Errorf("%d buffers given, %d came back", given.Load(), back.Load())
	}
	// The session goes on with a new writer.
	content := image(1, 5*testBlock)
	if _, err := backupIn(context.Background(), s, testVM, testClock(), content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
}

func TestAbandonAnyTime(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 20 {
		w, err := s.Disk(ctx, 1<<30, nil)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		var given, back atomic.Int64
		go func() {
			for off := int64(0); ; off += 2 * testBlock {
				given.Add(1)
				if err := w.Write(ctx, off, image(uint64(off), 2*testBlock), func() { back.Add(1) }); err != nil {
					done <- err
					return
				}
			}
		}()
		time.Sleep(time.Duration(i) * 100 * time.Microsecond)
		w.Abandon()
		if err := <-done; !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
		if given.Load() != back.Load() {
			t.Errorf("%d buffers given, %d came back", given.Load(), back.Load())
		}
	}
}

// Storage where nothing can be removed is enough for backups.
type appendOnly struct{ fsx.FS }

func (appendOnly) Remove(name string) error {
	return fmt.Errorf("remove %s: operation not permitted", name)
}

func TestAppendOnly(t *testing.T) {
	ctx := context.Background()
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, appendOnly{mem})
	defer r.Close()
	content := image(8, 30*testBlock)
	var parent *Disk
	for i := range 3 {
		content[i*testBlock]++
		ref, err := backup(ctx, r, testVM, testClock().Add(time.Duration(i)*time.Minute), content, parent, whole(content))
		if err != nil {
			t.Fatal(err)
		}
		parent = openDisk(t, r, ref)
		same(t, parent, content)
	}
	// Two VMs in one session: no name is used twice.
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if _, err := backupIn(ctx, s, VMID{"h", name}, testClock(), content, nil, whole(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, r)
}

func TestSessionLog(t *testing.T) {
	h := block.Handle(0xabcdef0123456789)
	packs, done := parseSessionLog([]byte(sessionMagic + "\nparent generations/x/y\npacks " + h.String() + "\nmeta " + h.String() + "\nmeta abc"))
	if done || len(packs) != 2 || packs[0] != (packKey{pack.Data, h}) || packs[1] != (packKey{pack.Node, h}) {
		t.Error(packs, done)
	}
	if _, done = parseSessionLog([]byte("end\n")); !done {
		t.Error("end was not seen")
	}
}

func FuzzSessionLog(f *testing.F) {
	f.Add([]byte(sessionMagic + "\npacks 0123456789abcdef\nend\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		packs, _ := parseSessionLog(b)
		for _, k := range packs {
			if !bytes.Contains(b, []byte(k.typ.Dir()+" "+k.handle.String())) {
				t.Fatalf("%v came out of %q", k, b)
			}
		}
	})
}

// Many blocks and a small bound on what the index holds: segments are written
// halfway through, and merged.
func TestSegmentsHalfway(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	for i := range 12 {
		content := image(uint64(100+i), 4*testBlock)
		content[0] = 1
		if _, err := backup(ctx, r, VMID{"h", fmt.Sprint(i)}, testClock(), content, nil, whole(content)); err != nil {
			t.Fatal(err)
		}
	}
	x, err := index.Open(ctx, r.fs, "index", r.ring, index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if n := len(x.Segments()); n >= 8 {
		t.Errorf("%d segments were not merged", n)
	}
	clean(t, r)
}
