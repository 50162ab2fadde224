package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

func mustRepair(t fatalist, r *Repository, o RepairOptions) *RepairReport {
	t.Helper()
	report, err := r.RepairPacks(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// next is a backup as hikae makes it: the areas given, and what is lost of the previous
// generation, are read from the host, which has content.
func next(ctx context.Context, r *Repository, vm VMID, at time.Time, content []byte, changed []extent) (ref Ref, healed int64, err error) {
	refs, err := r.Refs(ctx, vm)
	if err != nil {
		return Ref{}, 0, err
	}
	g, err := r.Generation(ctx, refs[len(refs)-1])
	if err != nil {
		return Ref{}, 0, err
	}
	d, err := g.OpenDisk(0)
	if err != nil {
		return Ref{}, 0, err
	}
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		return Ref{}, 0, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	rest, lost, err := s.Lost(ctx, d, false)
	if err != nil {
		return Ref{}, 0, err
	}
	read := make([]bool, (len(content)+testBlock-1)/testBlock)
	for _, e := range changed {
		for b := e.off / testBlock; b*testBlock < e.off+e.n; b++ {
			read[b] = true
		}
	}
	for _, e := range lost {
		healed += e.Length
		for b := e.Offset / testBlock; b*testBlock < e.Offset+e.Length; b++ {
			read[b] = true
		}
	}
	var areas []extent
	for b, yes := range read {
		if yes {
			off := int64(b) * testBlock
			areas = append(areas, extent{off, min(testBlock, int64(len(content))-off)})
		}
	}
	ref, err = backupIn(ctx, s, vm, at, content, rest, areas)
	return ref, healed, err
}

func mustNext(t fatalist, r *Repository, vm VMID, minute int, content []byte, changed ...extent) (Ref, int64) {
	t.Helper()
	ref, healed, err := next(context.Background(), r, vm, testClock().Add(time.Duration(minute)*time.Minute), content, changed)
	if err != nil {
		t.Fatal(err)
	}
	return ref, healed
}

// aside lists what is in quarantine/.
func aside(mem *fsx.Mem) (names []string) {
	for _, name := range mem.Files() {
		if rest, ok := strings.CutPrefix(name, quarantineDir+"/"); ok {
			names = append(names, rest)
		}
	}
	return names
}

// tamper changes a file.
func tamper(t fatalist, mem *fsx.Mem, name string, change func([]byte) []byte) {
	t.Helper()
	b, err := fsx.ReadFile(mem, name, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	b = change(bytes.Clone(b))
	if err := mem.Remove(name); err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return
	}
	if err := mem.Plant(name, b); err != nil {
		t.Fatal(err)
	}
}

// family is three generations of a disk with a level of nodes above the leaves: the
// content of the first two, and the third, which is what the VM still has. Each has
// packs of its own.
func family(t fatalist, r *Repository) (refs []Ref, contents [][]byte) {
	content := append(noise(1, 8), make([]byte, 270*testBlock+77)...)
	copy(content[260*testBlock:], noise(2, 6))
	copy(content[len(content)-77:], "the end")
	refs = append(refs, mustBackup(t, r, testVM, 0, content))
	contents = append(contents, content)
	for i := 1; i < 3; i++ {
		content = bytes.Clone(content)
		copy(content[i*testBlock:], noise(uint64(10+i), 2))
		copy(content[(260+i)*testBlock:], noise(uint64(20+i), 2))
		ref, healed := mustNext(t, r, testVM, i, content, extent{int64(i) * testBlock, 2 * testBlock}, extent{int64(260+i) * testBlock, 2 * testBlock})
		if healed != 0 {
			t.Fatalf("%d bytes were lost of what is whole", healed)
		}
		refs = append(refs, ref)
		contents = append(contents, content)
	}
	return refs, contents
}

// reads compares all that can be read of a generation with what it should be, and
// counts the blocks that cannot. Of zeros a sample will do.
func reads(t fatalist, r *Repository, ref Ref, want []byte) (lost int) {
	t.Helper()
	d := openDisk(t, r, ref)
	room, zeros := make([]byte, testBlock), make([]byte, testBlock)
	for off := 0; off < len(want); off += testBlock {
		p := room[:min(testBlock, len(want)-off)]
		if off/testBlock%25 != 0 && bytes.Equal(want[off:off+len(p)], zeros[:len(p)]) {
			continue
		}
		_, err := d.ReadAt(p, int64(off))
		switch {
		case errors.Is(err, ErrDamaged):
			lost++
		case err != nil:
			t.Fatal(err)
		case !bytes.Equal(p, want[off:off+len(p)]):
			t.Fatalf("%v: wrong bytes at %d", ref, off)
		}
	}
	return lost
}

// hurts is the number of blocks that generations miss, by the areas of the report.
func (r *RepairReport) blocksHurt() (n int64) {
	for _, p := range r.Packs {
		for _, a := range p.Areas {
			n += (a.Length + testBlock - 1) / testBlock
		}
	}
	return n
}

// Every class of byte of every pack is flipped; packs are cut, lengthened, taken away and
// exchanged. The repair saves what opens; the next backup brings back what the VM still has;
// then only those miss something of which the VM has nothing any more.
func TestRepairOfEveryDamage(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := family(t, r)
	files := map[string][]byte{}
	for _, name := range mem.Files() {
		b, err := fsx.ReadFile(mem, name, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = b
	}
	z := &zoo{files: files}
	now := contents[2]
	footerAt := func(b []byte) int { return int(b[len(b)-48]) | int(b[len(b)-47])<<8 | int(b[len(b)-46])<<16 }
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte {
			b[at] ^= 0x20
			return b
		}
	}
	// The packs of a kind are alike, and every run takes others: a part of the damages
	// will do for each.
	few := 6
	if tortureTime(t) > 0 {
		few = 1
	}
	start := rand.IntN(few)
	total, nth := 0, 0
	var order []string
	try := func(name, what string, most int, b []byte) {
		t.Helper()
		if nth++; nth%few != 0 {
			return
		}
		total++
		mem := z.plant(t, name, b)
		r := mustOpen(t, mem)
		defer r.Close()
		dry := mustRepair(t, r, RepairOptions{DryRun: true})
		if n := len(aside(mem)); n > 0 {
			t.Fatalf("%s: a dry run put %d files aside", what, n)
		}
		report := mustRepair(t, r, RepairOptions{})
		if len(report.Packs) != 1 || report.Packs[0].Pack != filepath.Base(name) || len(report.Unreadable) > 0 || report.Packs[0].What == "" {
			t.Fatalf("%s: %+v", what, report)
		}
		if len(dry.Packs) != 1 || !slices.Equal(dry.Packs[0].Areas, report.Packs[0].Areas) || dry.Packs[0].RecordsLost != report.Packs[0].RecordsLost {
			t.Errorf("%s: a dry run foretold %+v, it was %+v", what, dry.Packs, report.Packs)
		}
		p := report.Packs[0]
		lost := 0
		for i, ref := range refs {
			lost += reads(t, r, ref, contents[i])
		}
		// A node may stand for zeros besides the blocks that it had.
		if hurt := report.blocksHurt(); (lost == 0) != (hurt == 0) || strings.HasPrefix(name, "packs/") && !p.MoreAreas && int64(lost) != hurt {
			t.Errorf("%s: %d blocks cannot be read, the report says %d", what, lost, hurt)
		}
		if p.RecordsLost > most {
			t.Errorf("%s: %d records lost, %d at most should be: %+v", what, p.RecordsLost, most, p)
		}
		if report.Left() != (lost > 0) {
			t.Errorf("%s: Left is %v", what, report.Left())
		}
		if _, err := mem.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the damaged pack is still there: %v", what, err)
		}
		if (len(aside(mem)) > 0) != (b != nil || lost > 0) {
			t.Errorf("%s: quarantine has %v", what, aside(mem))
		}
		// The VM goes on, and loses on the way what only the second generation had.
		newest, healed := mustNext(t, r, testVM, 9, now, extent{0, testBlock})
		if n := reads(t, r, newest, now); n > 0 {
			t.Errorf("%s: %d blocks are missing after a backup", what, n)
		}
		if n := reads(t, r, refs[2], now); n > 0 && strings.HasPrefix(name, "packs/") {
			t.Errorf("%s: %d blocks of the generation before are not healed", what, n)
		}
		if healed > 0 && lost == 0 {
			t.Errorf("%s: %d bytes healed of nothing", what, healed)
		}
		check, err := r.Check(ctx, CheckOptions{ReadData: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range check.Problems {
			if slices.Contains(p.Generations, newest.String()) || p.Remedy != remedyLost {
				t.Errorf("%s: %+v", what, p)
			}
		}
		// Who misses something for good has to go; then all is as if nothing had been.
		for i, ref := range refs {
			if reads(t, r, ref, contents[i]) > 0 {
				without(t, r, ref)
			}
		}
		again := mustRepair(t, r, RepairOptions{})
		if again.Left() || len(again.Packs) > 0 || len(aside(mem)) > 0 {
			t.Errorf("%s: a second repair found %+v; quarantine has %v", what, again, aside(mem))
		}
		clean(t, r)
		mustPrune(t, r, PruneOptions{})
		mustPrune(t, r, PruneOptions{})
		if n := reads(t, r, newest, now); n > 0 {
			t.Errorf("%s: %d blocks are missing after a prune", what, n)
		}
	}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range files {
			if (strings.HasPrefix(name, "packs/") || strings.HasPrefix(name, "meta/")) && !yield(name) {
				return
			}
		}
	}) {
		b := files[name]
		foot := footerAt(b)
		nth = start + len(order)
		order = append(order, name)
		for _, c := range []struct{ at, most int }{
			{0, 0},
			{8, 0},
			{10, 0},
			{12, 0},
			{16, 0},
			{32, 0},
			{45, 0},
			{63, 0}, // header: all of it can be found out
			{64, 1},
			{foot - 1, 1}, // a record
			{foot, 0},
			{foot + 50, 0},
			{len(b) - 49, 0}, // the footer
			{len(b) - 48, 0},
			{len(b) - 44, 0},
			{len(b) - 36, 0},
			{len(b) - 1, 0}, // the trailer
		} {
			try(name, fmt.Sprintf("%s: byte %d of %d", name, c.at, len(b)), c.most, flip(c.at)(bytes.Clone(b)))
		}
		for _, n := range []int{0, 40, 64, foot / 2, foot, len(b) - 1} {
			most := 1 << 20
			if n >= foot {
				most = 0
			}
			try(name, fmt.Sprintf("%s: cut to %d", name, n), most, b[:n:n])
		}
		try(name, name+": longer", 0, append(bytes.Clone(b), 0))
		try(name, name+": gone", 1<<20, nil)
		for other, c := range files {
			if other != name && filepath.Dir(filepath.Dir(other)) == filepath.Dir(filepath.Dir(name)) {
				try(name, name+": exchanged for "+other, 1<<20, c)
			}
		}
	}
	t.Logf("%d damages", total)
}

// What is lost of a parent is found before a mark is cleared, and costs nothing without.
func TestLost(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := family(t, r)
	d := openDisk(t, r, refs[2])
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rest, lost, err := s.Lost(ctx, d, false)
	if err != nil || rest != d || lost != nil {
		t.Errorf("%v, %v, %v", rest, lost, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// All packs of blocks are gone.
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "packs/") {
			if err := mem.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	r = mustOpen(t, mem)
	defer r.Close()
	report := mustRepair(t, r, RepairOptions{})
	if len(report.Packs) != 3 || len(aside(mem)) != 3 {
		t.Fatalf("%+v, quarantine has %v", report, aside(mem))
	}
	for _, p := range report.Packs {
		if !p.Missing || p.Outcome != OutcomeLost || len(p.Generations) == 0 {
			t.Errorf("%+v", p)
		}
	}
	d = openDisk(t, r, refs[2])
	s, err = r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, lost, err = s.Lost(ctx, d, false)
	want := []Extent{{0, 8 * testBlock}, {260 * testBlock, 6 * testBlock}, {278 * testBlock, 77}}
	if err != nil || !slices.Equal(lost, want) {
		t.Fatalf("%v, %v", lost, err)
	}
	// Who does not write it again gets no disk out of it.
	for _, areas := range [][]extent{nil, {{0, 8 * testBlock}}, {{0, 7 * testBlock}, {260 * testBlock, 6 * testBlock}, {278 * testBlock, 77}}, {{testBlock, int64(len(contents[2])) - testBlock}}} {
		if _, err := write(ctx, s, contents[2], d, areas); !errors.Is(err, ErrDamaged) {
			t.Errorf("%v: %v", areas, err)
		}
	}
	if _, err := write(ctx, s, contents[2], d, []extent{{0, 8 * testBlock}, {259 * testBlock, 8 * testBlock}, {278 * testBlock, 77}}); err != nil {
		t.Error(err)
	}
}

// Nodes that are lost cost what they span, and no more; the count of data stays right,
// also where zeros have come in their place.
func TestLostNodes(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name string
		keep func(level int, i int) bool // of the nodes of the newest generation
	}{
		{"a leaf", func(level, i int) bool { return level > 1 || i != 0 }},
		{"the other leaf", func(level, i int) bool { return level > 1 || i != 1 }},
		{"the root", func(level, _ int) bool { return level == 1 }},
		{"all", func(int, int) bool { return false }},
	} {
		for _, zero := range []bool{false, true} {
			t.Run(fmt.Sprint(c.name, ", zeros ", zero), func(t *testing.T) {
				mem, r := newMem(t)
				refs, contents := family(t, r)
				d := openDisk(t, r, refs[2])
				root, err := r.readNode(ctx, d.tree.Root)
				if err != nil {
					t.Fatal(err)
				}
				// Each node gets bytes that do not open, where it may not stay.
				spoil := func(p, off uint32, handle string) {
					tamper(t, mem, "meta/"+handle[:2]+"/"+handle, func(b []byte) []byte {
						b[off+p] ^= 1
						return b
					})
				}
				for i := range 2 {
					e, err := entryOf(root, i)
					if err != nil {
						t.Fatal(err)
					}
					if !c.keep(1, i) {
						spoil(3, e.Offset, e.Pack.String())
					}
				}
				if !c.keep(2, 0) {
					spoil(3, d.tree.Root.Offset, d.tree.Root.Pack.String())
				}
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				r = mustOpen(t, mem)
				defer r.Close()
				report := mustRepair(t, r, RepairOptions{})
				if !report.Left() || len(report.Packs) != 1 || report.Packs[0].Type != "nodes" {
					t.Fatalf("%+v", report)
				}
				content := contents[2]
				if zero {
					content = bytes.Clone(content)
					clear(content[:20*testBlock])
					clear(content[255*testBlock:])
				}
				var changed []extent
				if zero {
					changed = []extent{{0, 20 * testBlock}, {255 * testBlock, int64(len(content)) - 255*testBlock}}
				}
				ref, healed := mustNext(t, r, testVM, 9, content, changed...)
				same(t, openDisk(t, r, ref), content)
				want := map[string]int64{"a leaf": 256 * testBlock, "the other leaf": int64(len(content)) - 256*testBlock}[c.name]
				if want == 0 {
					want = int64(len(content))
				}
				if healed != want {
					t.Errorf("%d bytes healed, not %d", healed, want)
				}
				if !zero && c.keep(2, 0) {
					// The same leaf was made again, so the old generation is whole as well.
					// A root could only be the same if the nodes below had not been moved.
					same(t, openDisk(t, r, refs[2]), contents[2])
					clean(t, r)
				}
			})
		}
	}
}

// A disk that has grown by a level since a generation of which nodes are lost.
func TestLostAndGrown(t *testing.T) {
	mem, r := newMem(t)
	content := noise(1, 200)
	refs := []Ref{mustBackup(t, r, testVM, 0, content)}
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "meta/") {
			if err := mem.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	r = mustOpen(t, mem)
	defer r.Close()
	mustRepair(t, r, RepairOptions{})
	grown := append(bytes.Clone(content), noise(2, 100)...)
	ref, healed := mustNext(t, r, testVM, 1, grown, extent{200 * testBlock, 100 * testBlock})
	if healed != 200*testBlock {
		t.Errorf("%d bytes healed", healed)
	}
	same(t, openDisk(t, r, ref), grown)
	// The leaf is another one now, with more entries.
	if n := reads(t, r, refs[0], content); n != 200 {
		t.Errorf("%d blocks of the generation whose leaf is lost cannot be read", n)
	}
}

// A node that rots in its place is found by who looks, and is not taken for known when it
// is made again.
func TestSearchWithoutMarks(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := family(t, r)
	root := openDisk(t, r, refs[2]).tree.Root
	tamper(t, mem, pack.Node.Path(root.Pack), func(b []byte) []byte {
		for i := 64; i < len(b)-200; i += 20 {
			b[i] ^= 1
		}
		return b
	})
	r = mustOpen(t, mem)
	defer r.Close()
	d := openDisk(t, r, refs[2])
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := write(ctx, s, contents[2], d, []extent{{0, testBlock}}); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	rest, lost, err := s.Lost(ctx, d, true)
	if err != nil || len(lost) != 1 || lost[0].Length != d.Size() {
		t.Fatal(lost, err)
	}
	ref, err := backupIn(ctx, s, testVM, testClock().Add(time.Hour), contents[2], rest, whole(contents[2]))
	if err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, r, ref), contents[2])
}

// Backups that are under way when a pack is put aside either do not need it or fail, and
// pass when they are run again.
func TestRepairBesideABackup(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := noise(5, 6)
	mustBackup(t, r, testVM, 0, content)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := write(ctx, s, content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	own, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	other := noise(6, 4)
	otherTree, err := write(ctx, own, other, nil, whole(other))
	if err != nil {
		t.Fatal(err)
	}
	before := stored(mem)
	if err := own.data.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range stored(mem) {
		if strings.HasPrefix(name, "packs/") {
			tamper(t, mem, name, func(b []byte) []byte {
				b[70] ^= 1
				return b
			})
		}
	}
	second := mustOpen(t, mem)
	defer second.Close()
	report := mustRepair(t, second, RepairOptions{})
	if len(report.Packs) != 2 || !report.Left() {
		t.Fatalf("%+v", report)
	}
	for _, p := range report.Packs {
		want := OutcomeInUse
		if slices.Contains(before, "packs/"+p.Pack[:2]+"/"+p.Pack) {
			want = OutcomeLost
		}
		if p.Outcome != want {
			t.Errorf("%+v, not %s", p, want)
		}
	}
	if _, err := s.Commit(ctx, Manifest{VM: VMID{"esx1", "b"}, Disks: []DiskManifest{diskOf("b", tree)}}); err == nil || !strings.Contains(err.Error(), "run the backup again") {
		t.Errorf("a commit on a pack that was put aside: %v", err)
	}
	_ = s.Close()
	// What the session made itself is left to it; the next repair finds it.
	ref, err := own.Commit(ctx, Manifest{VM: VMID{"esx1", "c"}, Disks: []DiskManifest{diskOf("c", otherTree)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := own.Close(); err != nil {
		t.Fatal(err)
	}
	report = mustRepair(t, second, RepairOptions{})
	if len(report.Packs) != 2 || !report.Left() { // the first one is still lost
		t.Fatalf("%+v", report)
	}
	mustNext(t, second, testVM, 5, content)
	mustNext(t, second, VMID{"esx1", "c"}, 6, other)
	same(t, openDisk(t, second, ref), other)
	clean(t, second)
	if report = mustRepair(t, second, RepairOptions{}); len(report.Packs) > 0 || len(report.Cleared) != 2 || len(aside(mem)) > 0 {
		t.Errorf("%+v; quarantine has %v", report, aside(mem))
	}
}

// Two packs that have the same records, each with another one spoilt: what one lost the
// other still has, and neither is trusted to keep it.
func TestRepairOfTwins(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := noise(8, 4)
	var sessions []*Session
	var trees []DiskTree
	for range 2 {
		s, err := r.Begin(ctx, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for b := range 4 { // one by one, so that both packs have them in the same order
			tree, err := write(ctx, s, content, nil, []extent{{int64(b) * testBlock, testBlock}})
			if err != nil {
				t.Fatal(err)
			}
			trees = append(trees, tree)
		}
		tree, err := write(ctx, s, content, nil, whole(content))
		if err != nil {
			t.Fatal(err)
		}
		sessions, trees = append(sessions, s), append(trees, tree)
	}
	var refs []Ref
	for i, s := range sessions {
		ref, err := s.Commit(ctx, Manifest{VM: VMID{"esx1", fmt.Sprint(i)}, Time: testClock(), Disks: []DiskManifest{diskOf("d", trees[5*i+4])}})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref)
	}
	n := 0
	for _, name := range stored(mem) {
		if strings.HasPrefix(name, "packs/") {
			tamper(t, mem, name, func(b []byte) []byte {
				b[70+n*(testBlock+pack.Overhead)] ^= 1
				return b
			})
			n++
		}
	}
	if n != 2 {
		t.Fatalf("%d packs of blocks", n)
	}
	r = mustOpen(t, mem)
	defer r.Close()
	for _, dry := range []bool{true, false} {
		report := mustRepair(t, r, RepairOptions{DryRun: dry})
		saved := 0
		for _, p := range report.Packs {
			if p.Outcome != OutcomeSaved {
				t.Errorf("%+v", p)
			}
			saved += p.RecordsSaved
		}
		if len(report.Packs) != 2 || report.Left() || saved != 4 {
			t.Errorf("%+v", report)
		}
	}
	for _, ref := range refs {
		same(t, openDisk(t, r, ref), content)
	}
	clean(t, r)
}

func TestRepairOneAtATime(t *testing.T) {
	mem, r := newMem(t)
	mustBackup(t, r, testVM, 0, noise(1, 2))
	lock, err := mem.Lock(condemnedLock, true, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.RepairPacks(context.Background(), RepairOptions{}); !errors.Is(err, ErrLocked) {
		t.Error(err)
	}
	if _, err := r.RepairIndex(context.Background(), RepairIndexOptions{}); !errors.Is(err, ErrLocked) {
		t.Error(err)
	}
	mustRepair(t, r, RepairOptions{DryRun: true})
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	mustRepair(t, r, RepairOptions{})
	if _, err := r.RepairPacks(context.Background(), RepairOptions{Packs: []string{"0123456789abcdef"}}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

// Named packs only are read.
func TestRepairOfNamedPacks(t *testing.T) {
	mem, r := newMem(t)
	family(t, r)
	var packs []string
	for _, name := range stored(mem) {
		if strings.HasPrefix(name, "packs/") {
			packs = append(packs, filepath.Base(name))
			tamper(t, mem, name, func(b []byte) []byte {
				b[80] ^= 1
				return b
			})
		}
	}
	report := mustRepair(t, r, RepairOptions{Packs: packs[1:2]})
	if report.PacksRead != 1 || len(report.Packs) != 1 || report.Packs[0].Pack != packs[1] {
		t.Errorf("%+v", report)
	}
}

// keeper is storage that takes files and lets go of none, nor lets one be moved.
type keeper struct{ fsx.FS }

func (keeper) Remove(name string) error {
	return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrPermission}
}

func (k keeper) Publish(old, final string) error {
	if !strings.HasPrefix(old, tmpDir+"/") {
		return &fs.PathError{Op: "link", Path: old, Err: fs.ErrPermission}
	}
	return k.FS.Publish(old, final)
}

// On append-only storage a damaged pack stays where it is; all the same nobody points to
// it any more, and what it lost is healed.
func TestRepairAppendOnly(t *testing.T) {
	mem, r := newMem(t)
	ctx := context.Background()
	_, contents := family(t, r)
	underWay, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := write(ctx, underWay, contents[2], nil, whole(contents[2]))
	if err != nil {
		t.Fatal(err)
	}
	var hurt string
	for _, name := range stored(mem) {
		if strings.HasPrefix(name, "packs/") {
			hurt = name
		}
	}
	tamper(t, mem, hurt, func(b []byte) []byte {
		b[80] ^= 1
		return b
	})
	r = mustOpen(t, keeper{mem})
	defer r.Close()
	for range 2 {
		report := mustRepair(t, r, RepairOptions{})
		if len(report.Packs) != 1 || !report.Packs[0].InPlace || report.Packs[0].RecordsLost != 1 {
			t.Fatalf("%+v", report)
		}
	}
	// Who is about to point to it sees the mark.
	if _, err := underWay.Commit(ctx, Manifest{VM: testVM, Disks: []DiskManifest{diskOf("d", tree)}}); err == nil || !strings.Contains(err.Error(), "run the backup again") {
		t.Errorf("a commit on a pack that is marked: %v", err)
	}
	_ = underWay.Close()
	ref, healed := mustNext(t, r, testVM, 9, contents[2])
	same(t, openDisk(t, r, ref), contents[2])
	if healed > testBlock {
		t.Errorf("%d bytes healed", healed)
	}
	// Stored whole it is known, but not there.
	again := mustBackup(t, r, VMID{"esx1", "b"}, 10, contents[2])
	r2 := mustOpen(t, mem)
	defer r2.Close()
	if err := mem.Remove(hurt); err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, r2, again), contents[2])
	same(t, openDisk(t, r2, ref), contents[2])
}

// A repair that is cut off anywhere harms nothing, and the next one ends it.
func repairStory(t *testing.T, plan fsx.Plan) (fired bool) {
	t.Helper()
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, mem)
	refs, contents := family(t, r)
	for i, name := range stored(mem) { // meta/ comes first
		tamper(t, mem, name, func(b []byte) []byte {
			switch i {
			case 1: // a node
				b[70] ^= 1
			case 3: // the footer
				b[len(b)-60] ^= 1
			case 4: // a block
				b[70] ^= 1
			case 5:
				return nil
			}
			return b
		})
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	before := 0
	r = mustOpen(t, mem)
	for i, ref := range refs {
		before += reads(t, r, ref, contents[i])
	}
	_ = r.Close()

	faulty := fsx.NewFaulty(mem)
	r, err := openMem(faulty)
	if err != nil {
		t.Fatal(err)
	}
	faulty.Plan(plan)
	_, err = r.RepairPacks(context.Background(), RepairOptions{})
	fired = faulty.Fired()
	if !fired && err != nil {
		t.Fatal(err)
	}
	if n := faulty.RetriedSyncs(); n > 0 {
		t.Fatalf("%d syncs were tried again after they failed", n)
	}
	if err := r.Close(); err != nil && !fired {
		t.Fatal(err)
	}
	if plan.Mode == fsx.CrashNow && fired {
		mem.Crash(rand.New(rand.NewPCG(uint64(plan.At), 6)))
	}

	r = mustOpen(t, mem)
	defer r.Close()
	after := 0
	for i, ref := range refs {
		after += reads(t, r, ref, contents[i])
	}
	if after > before {
		t.Errorf("%d blocks cannot be read, %d before", after, before)
	}
	mustRepair(t, r, RepairOptions{})
	newest, _ := mustNext(t, r, testVM, 9, contents[2])
	same(t, openDisk(t, r, newest), contents[2])
	for i, ref := range refs {
		if reads(t, r, ref, contents[i]) > 0 {
			without(t, r, ref)
		}
	}
	if report := mustRepair(t, r, RepairOptions{}); report.Left() || len(aside(mem)) > 0 {
		t.Errorf("%+v; quarantine has %v", report, aside(mem))
	}
	for range 3 {
		mustPrune(t, r, PruneOptions{})
	}
	if n := reads(t, r, newest, contents[2]); n > 0 {
		t.Errorf("%d blocks are missing in the end", n)
	}
	tidy(t, mem, r)
	return fired
}

func TestRepairFailsAnywhere(t *testing.T) {
	for _, c := range []struct {
		mode     fsx.Mode
		ops      fsx.Op
		at, step int
	}{
		{fsx.CrashNow, fsx.OpChanges, 1, 8},
		{fsx.CrashNow, fsx.OpAny, 1, 120},
		{fsx.FailOnce, fsx.OpAny, 1, 120},
		{fsx.FailAfter, fsx.OpChanges, 1, 30},
		{fsx.NoSpace, fsx.OpChanges, 1, 30},
	} {
		t.Run(fmt.Sprint(c.mode, c.ops), func(t *testing.T) {
			if tortureTime(t) > 0 {
				c.at, c.step = 1, 1
			}
			for k := c.at + rand.IntN(c.step); ; k += c.step {
				fired := repairStory(t, fsx.Plan{Ops: c.ops, Mode: c.mode, At: k})
				if t.Failed() {
					t.Fatalf("at operation %d", k)
				}
				if !fired {
					t.Logf("about %d operations", k-1)
					return
				}
			}
		})
	}
}

func TestParseQuarantine(t *testing.T) {
	k := packKey{pack.Node, 0x0102030405060708}
	for name, want := range map[string]struct{ mark, ok bool }{
		"meta-0102030405060708":            {true, true},
		"meta-0102030405060708.damaged":    {false, true},
		"meta-0102030405060708.damaged-2":  {false, true},
		"meta-0102030405060708.damagedx":   {},
		"meta-0102030405060708.other":      {},
		"meta-01020304050607":              {},
		"packs-0102030405060708x":          {},
		"0102030405060708":                 {},
		"meta-0102030405060708.damaged-2/": {false, true},
	} {
		got, mark, ok := parseQuarantine(name)
		if ok != want.ok || ok && (mark != want.mark || got != k) {
			t.Errorf("%s: %v %v %v", name, got, mark, ok)
		}
	}
}

func entryOf(root []byte, i int) (block.Record, error) { return tree.Entry(root, 2, i) }

// With parity beside them packs and manifests are mended, and nothing is lost.
func TestRepairMends(t *testing.T) {
	mem := fsx.NewMem()
	if err := initFS(context.Background(), mem, "mem", InitOptions{BlockSize: testBlock, Passphrase: passphrase, KDF: cheap, Clock: testClock, Parity: 5}); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, mem)
	defer r.Close()
	refs, contents := family(t, r)
	hurt := 0
	for i, name := range stored(mem) {
		if strings.HasSuffix(name, paritySuffix) {
			continue
		}
		tamper(t, mem, name, func(b []byte) []byte {
			switch i % 3 {
			case 0:
				b[70] ^= 1
			case 1:
				b[len(b)-50] ^= 1
			default:
				b[10] ^= 1
			}
			return b
		})
		hurt++
	}
	tamper(t, mem, r.manifestPath(refs[1]), func(b []byte) []byte {
		b[100] ^= 1
		return b
	})
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	report := mustRepair(t, fresh, RepairOptions{})
	if len(report.Packs) != hurt || len(report.Mended) != 1 || report.Left() {
		t.Fatalf("%+v", report)
	}
	for _, p := range report.Packs {
		if p.Outcome != OutcomeMended {
			t.Errorf("%+v", p)
		}
	}
	for i, ref := range refs {
		same(t, openDisk(t, fresh, ref), contents[i])
	}
	clean(t, fresh)
	if n := len(aside(mem)); n > 0 {
		t.Errorf("quarantine has %v", aside(mem))
	}
}
