package repo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

// noise is content that does not compress and that no other seed has.
func noise(seed uint64, blocks int) []byte {
	b := make([]byte, blocks*testBlock)
	key := [32]byte{byte(seed), byte(seed >> 8), 'n'}
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// without forgets a generation.
func without(t fatalist, r *Repository, ref Ref) {
	t.Helper()
	if err := r.Forget(context.Background(), []Ref{ref}, ForgetOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
}

func mustBackup(t fatalist, r *Repository, vm VMID, minute int, content []byte) Ref {
	t.Helper()
	ref, err := backup(context.Background(), r, vm, testClock().Add(time.Duration(minute)*time.Minute), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func mustPrune(t fatalist, r *Repository, o PruneOptions) *PruneReport {
	t.Helper()
	report, err := r.Prune(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// stored lists the packs.
func stored(mem *fsx.Mem) (packs []string) {
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "packs/") || strings.HasPrefix(name, "meta/") {
			packs = append(packs, name)
		}
	}
	return packs
}

// others are unfinished files that sessions are not about.
var others = regexp.MustCompile("^(init|key|forget)")

// tidy proves that nothing is there that is not needed: no pack, no segment, no
// condemned file, no rest of a session.
func tidy(t *testing.T, mem *fsx.Mem, r *Repository) {
	t.Helper()
	report := clean(t, r)
	if n := int64(len(stored(mem))); n != report.Packs {
		t.Errorf("%d packs are there, %d are needed", n, report.Packs)
	}
	x, err := r.idx(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, name := range mem.Files() {
		dir, base, _ := strings.Cut(name, "/")
		switch {
		case base == "lock":
		case dir == condemnedDir, dir == sessionsDir, dir == tmpDir && !others.MatchString(base):
			t.Errorf("%s was left behind", name)
		}
	}
	if s := x.Superseded(); len(s) > 0 {
		t.Errorf("segments were left behind: %v", s)
	}
	err = x.Each(context.Background(), func(rec block.Record) error {
		if _, err := mem.Stat(pack.TypeOf(rec.Kind).Path(rec.Pack)); err != nil {
			t.Errorf("the index leads to a pack that is gone: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestPruneDeadPacks(t *testing.T) {
	mem, r := newMem(t)
	a, b := noise(1, 8), noise(2, 9)
	stay := mustBackup(t, r, testVM, 0, a)
	before := stored(mem)
	goes := mustBackup(t, r, testVM, 1, b)
	all := stored(mem)
	if report := mustPrune(t, r, PruneOptions{}); report.PacksCondemned != 0 || report.BytesDead != 0 {
		t.Fatalf("nothing is dead: %+v", report)
	}
	without(t, r, goes)
	first := mustPrune(t, r, PruneOptions{Grace: DefaultGrace})
	if first.PacksCondemned != 2 || first.PacksDeleted != 0 || first.BytesDead < 9*testBlock || !slices.Equal(stored(mem), all) {
		t.Fatalf("the first run: %+v", first)
	}
	second := mustPrune(t, r, PruneOptions{Grace: DefaultGrace})
	if second.PacksKeptForGrace != 2 || second.PacksDeleted != 0 || !slices.Equal(stored(mem), all) {
		t.Fatalf("within the grace: %+v", second)
	}
	third := mustPrune(t, r, PruneOptions{})
	if third.PacksDeleted != 2 || third.BytesFreed != first.BytesCondemned || third.BytesRemaining != first.BytesLive {
		t.Fatalf("the third run: %+v", third)
	}
	if got := stored(mem); !slices.Equal(got, before) {
		t.Fatalf("%v are left, not %v", got, before)
	}
	same(t, openDisk(t, r, stay), a)
	tidy(t, mem, r)
	// What went is stored anew.
	again := mustBackup(t, r, testVM, 2, b)
	same(t, openDisk(t, r, again), b)
	clean(t, r)
	// And when nothing is left, nothing is left.
	without(t, r, again)
	without(t, r, stay)
	mustPrune(t, r, PruneOptions{})
	if report := mustPrune(t, r, PruneOptions{}); report.BytesRemaining != 0 {
		t.Fatalf("%+v", report)
	}
	tidy(t, mem, r)
}

func TestPruneDryRunChangesNothing(t *testing.T) {
	mem, r := newMem(t)
	mustBackup(t, r, testVM, 0, noise(1, 4))
	goes := mustBackup(t, r, testVM, 1, noise(2, 4))
	without(t, r, goes)
	check := func(condemned, deleted int64) {
		t.Helper()
		files := mem.Files()
		report := mustPrune(t, r, PruneOptions{DryRun: true})
		if !report.DryRun || report.PacksCondemned != condemned || report.PacksDeleted != deleted {
			t.Fatalf("%+v", report)
		}
		if got := mem.Files(); !slices.Equal(got, files) {
			t.Fatalf("%v became %v", files, got)
		}
	}
	check(2, 0)
	mustPrune(t, r, PruneOptions{})
	check(0, 2)
}

// sparse makes a repository whose packs are mostly dead: of 20 blocks written first,
// four are needed.
func sparse(t fatalist, r *Repository) (Ref, []byte) {
	t.Helper()
	first := noise(7, 20)
	goes := mustBackup(t, r, VMID{"esx1", "c"}, 0, first)
	keep := slices.Concat(first[3*testBlock:5*testBlock], noise(8, 2), first[11*testBlock:13*testBlock])
	stays := mustBackup(t, r, testVM, 1, keep)
	without(t, r, goes)
	return stays, keep
}

func TestPruneRewritesSparsePacks(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	ref, content := sparse(t, r)
	if report := mustPrune(t, r, PruneOptions{MaxRewrite: -1}); report.PacksRewritten != 0 || report.PacksCondemned != 1 {
		t.Fatalf("without rewriting, one node pack is dead: %+v", report)
	}
	report := mustPrune(t, r, PruneOptions{})
	if report.PacksRewritten != 1 || report.BytesRewritten < 4*testBlock || report.BytesRewritten > 5*testBlock {
		t.Fatalf("%+v", report)
	}
	same(t, openDisk(t, r, ref), content)
	report = mustPrune(t, r, PruneOptions{})
	if report.PacksDeleted != 1 || report.BytesFreed < 20*testBlock || report.BytesDead-report.BytesFreed != 0 {
		t.Fatalf("%+v", report)
	}
	same(t, openDisk(t, r, ref), content)
	tidy(t, mem, r)
	if report := mustPrune(t, r, PruneOptions{}); report.PacksCondemned+report.PacksRewritten+report.PacksDeleted+report.BytesDead != 0 {
		t.Fatalf("there is an end to it: %+v", report)
	}
	// Another process that knows nothing of the move, and a backup on top.
	other := mustOpen(t, mem)
	defer other.Close()
	d := openDisk(t, other, ref)
	same(t, d, content)
	next := bytes.Clone(content)
	copy(next, noise(9, 1))
	got, err := backup(ctx, other, testVM, testClock().Add(time.Hour), next, d, whole(next))
	if err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, other, got), next)
	clean(t, other)
	// A pointer that is out of date still keeps what it leads to.
	without(t, r, ref)
	mustPrune(t, r, PruneOptions{})
	mustPrune(t, r, PruneOptions{})
	same(t, openDisk(t, r, got), next)
	clean(t, r)
}

func TestPruneWaitsForSessionsAndReaders(t *testing.T) {
	ctx := context.Background()
	for _, who := range []string{"session", "reader"} {
		t.Run(who, func(t *testing.T) {
			mem, r := newMem(t)
			mustBackup(t, r, testVM, 0, noise(1, 4))
			goes := mustBackup(t, r, testVM, 1, noise(2, 4))
			d := openDisk(t, r, goes)
			other := mustOpen(t, mem)
			defer other.Close()
			open := func() io.Closer {
				var c io.Closer
				var err error
				if who == "session" {
					c, err = other.Begin(ctx, SessionOptions{})
				} else {
					c, err = other.Pin(ctx)
				}
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			old := open()
			without(t, r, goes)
			mustPrune(t, r, PruneOptions{})
			young := open()
			defer young.Close()
			for range 2 {
				report := mustPrune(t, r, PruneOptions{})
				if report.PacksDeleted != 0 || report.PacksKeptForSessions != 2 {
					t.Fatalf("while it is open: %+v", report)
				}
			}
			same(t, d, noise(2, 4))
			if err := old.Close(); err != nil {
				t.Fatal(err)
			}
			if report := mustPrune(t, r, PruneOptions{}); report.PacksDeleted != 2 {
				t.Fatalf("who came later does not count: %+v", report)
			}
			if err := young.Close(); err != nil {
				t.Fatal(err)
			}
			mustPrune(t, r, PruneOptions{})
			tidy(t, mem, r)
		})
	}
}

// A session finds dead blocks again before they are condemned and commits after.
func TestPruneSparesWhatASessionReuses(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := noise(2, 6)
	goes := mustBackup(t, r, testVM, 0, content)
	without(t, r, goes)
	other := mustOpen(t, mem)
	defer other.Close()
	s, err := other.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tree, err := write(ctx, s, content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	if s.Stats().BytesNew != 0 {
		t.Fatal("nothing was found again")
	}
	if report := mustPrune(t, r, PruneOptions{}); report.PacksCondemned != 2 {
		t.Fatalf("%+v", report)
	}
	ref, err := s.Commit(ctx, Manifest{VM: testVM, Time: testClock().Add(time.Hour), Disks: []DiskManifest{diskOf("d", tree)}})
	if err != nil {
		t.Fatalf("the run that condemned them waits for this session: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if report := mustPrune(t, r, PruneOptions{}); report.PacksDeleted != 0 || report.PacksReleased != 2 {
		t.Fatalf("%+v", report)
	}
	same(t, openDisk(t, r, ref), content)
	tidy(t, mem, r)
}

// What an open session has stored and not committed is not touched.
func TestPruneSparesOpenSessions(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	content := noise(3, 5)
	tree, err := write(ctx, s, content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.data.Flush(ctx), s.node.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	other := mustOpen(t, mem)
	defer other.Close()
	for range 2 {
		if report := mustPrune(t, other, PruneOptions{}); report.PacksCondemned != 0 || report.Packs != 2 || report.BytesDead != 0 {
			t.Fatalf("%+v", report)
		}
	}
	ref, err := s.Commit(ctx, Manifest{VM: testVM, Time: testClock(), Disks: []DiskManifest{diskOf("d", tree)}})
	if err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, r, ref), content)
}

func TestPruneStopsAtDamage(t *testing.T) {
	for _, what := range []string{"meta/", "generations/"} {
		t.Run(what, func(t *testing.T) {
			mem, r := newMem(t)
			mustBackup(t, r, testVM, 0, noise(1, 4))
			goes := mustBackup(t, r, testVM, 1, noise(2, 4))
			without(t, r, goes)
			mustPrune(t, r, PruneOptions{})
			for _, name := range mem.Files() {
				if !strings.HasPrefix(name, what) || strings.Contains(name, "identity") || strings.Contains(name, "floor") || strings.Contains(name, forgottenPrefix) || strings.HasSuffix(name, "lock") {
					continue
				}
				b, err := fsx.ReadFile(mem, name, 1<<30)
				if err != nil {
					t.Fatal(err)
				}
				b[len(b)/4] ^= 1
				if err := mem.Plant(name, b); err != nil {
					t.Fatal(err)
				}
			}
			fresh := mustOpen(t, mem)
			defer fresh.Close()
			files := stored(mem)
			if _, err := fresh.Prune(context.Background(), PruneOptions{}); !errors.Is(err, ErrDamaged) {
				t.Fatalf("pruned among damage: %v", err)
			}
			if got := stored(mem); !slices.Equal(got, files) {
				t.Fatal("it deleted all the same")
			}
		})
	}
}

// A block that only the index leads to survives the loss of the index.
func TestPruneWithoutIndex(t *testing.T) {
	mem, r := newMem(t)
	sparse(t, r)
	mustPrune(t, r, PruneOptions{})
	mustPrune(t, r, PruneOptions{})
	files := stored(mem)
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "index/") {
			if err := mem.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	for range 2 {
		report := mustPrune(t, fresh, PruneOptions{})
		if report.PacksCondemned != 0 || report.BlocksMissing != 0 {
			t.Fatalf("%+v", report)
		}
	}
	if got := stored(mem); !slices.Equal(got, files) {
		t.Fatalf("%v became %v", files, got)
	}
}

func TestPruneOneAtATime(t *testing.T) {
	mem, r := newMem(t)
	lock, err := mem.Lock(condemnedLock, true, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prune(context.Background(), PruneOptions{}); !errors.Is(err, ErrLocked) {
		t.Fatalf("two at once: %v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	mustPrune(t, r, PruneOptions{})
}

func TestCondemnedFiles(t *testing.T) {
	c := &condemnation{run: "0123456789abcdef", time: testClock()}
	got, err := parseCondemnation(c.encode())
	if err != nil || *got != *c {
		t.Fatalf("%v, %v", got, err)
	}
	f := &pruneRun{time: testClock(), sessions: []string{"0123456789abcdef", "fedcba9876543210"}}
	back, err := parseRun(f.encode())
	if err != nil || !back.time.Equal(f.time) || !slices.Equal(back.sessions, f.sessions) {
		t.Fatalf("%v, %v", back, err)
	}
	for n := range f.encode() {
		if _, err := parseRun(f.encode()[:n]); err == nil {
			t.Errorf("a list cut at %d passes", n)
		}
	}
	for n := range c.encode() {
		if _, err := parseCondemnation(c.encode()[:n]); err == nil {
			t.Errorf("a condemned file cut at %d passes", n)
		}
	}
}

// refusing is storage that takes no locks, as a read-only mount.
type refusing struct{ fsx.FS }

func (refusing) Lock(string, bool, bool) (io.Closer, error) { return nil, syscall.EROFS }

func TestPinOnReadOnlyStorage(t *testing.T) {
	mem, _ := newMem(t)
	r := mustOpen(t, refusing{mem})
	defer r.Close()
	files := mem.Files()
	p, err := r.Pin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Fatal(err)
	}
	if got := mem.Files(); !slices.Equal(got, files) {
		t.Fatalf("%v became %v", files, got)
	}
}
