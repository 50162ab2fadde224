package repo

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

func mustRepairIndex(t fatalist, r *Repository) *RepairIndexReport {
	t.Helper()
	report, err := r.RepairIndex(context.Background(), RepairIndexOptions{runRecords: 50})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// blockPacks counts the packs of blocks.
func blockPacks(mem *fsx.Mem) (n int) {
	for _, name := range stored(mem) {
		if strings.HasPrefix(name, "packs/") {
			n++
		}
	}
	return n
}

// The index comes back whatever became of it: what only it knew, where rewritten packs
// went, is found again; and nothing is stored twice.
func TestRepairIndex(t *testing.T) {
	for what, change := range map[string]func([]byte) []byte{
		"gone":   func([]byte) []byte { return nil },
		"footer": func(b []byte) []byte { b[len(b)-60] ^= 1; return b },
		"page":   func(b []byte) []byte { b[70] ^= 1; return b },
		"cut":    func(b []byte) []byte { return b[:len(b)/2] },
	} {
		t.Run(what, func(t *testing.T) {
			mem, r := newMem(t)
			moved, old := sparse(t, r)
			content := noise(70, 40)
			ref := mustBackup(t, r, VMID{"esx1", "large"}, 20, content)
			mustPrune(t, r, PruneOptions{})
			mustPrune(t, r, PruneOptions{})
			r2 := mustOpen(t, mem)
			var before int64
			x, err := r2.idx(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range x.Segments() {
				before += s.Entries
			}
			_ = r2.Close()
			segments := 0
			for _, name := range mem.Files() {
				if strings.HasPrefix(name, "index/") && !strings.HasSuffix(name, "lock") {
					tamper(t, mem, name, change)
					segments++
				}
			}
			fresh := mustOpen(t, mem)
			defer fresh.Close()
			reader, err := fresh.Pin(context.Background()) // a mount must not matter
			if err != nil {
				t.Fatal(err)
			}
			report := mustRepairIndex(t, fresh)
			if err := reader.Close(); err != nil {
				t.Fatal(err)
			}
			if report.Packs != int64(len(stored(mem))) || report.Records != before || report.Segments != 1 || len(report.PacksUnreadable) != 0 {
				t.Errorf("%+v, %d packs and %d records there", report, len(stored(mem)), before)
			}
			if what != "gone" && (report.SegmentsBefore != segments || report.SegmentsRemoved != segments) {
				t.Errorf("%+v, %d segments there", report, segments)
			}
			same(t, openDisk(t, fresh, ref), content)
			same(t, openDisk(t, fresh, moved), old)
			clean(t, fresh)
			packs := blockPacks(mem)
			again := mustBackup(t, fresh, VMID{"esx1", "again"}, 30, content)
			same(t, openDisk(t, fresh, again), content)
			if n := blockPacks(mem); n > packs {
				t.Errorf("%d packs were made of what is known", n-packs)
			}
			tidy(t, mem, fresh)
		})
	}
}

// A backup under way keeps what it has of the old index, and what it publishes meanwhile.
func TestRepairIndexBesideABackup(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := family(t, r)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	content := noise(77, 9)
	tree, err := write(ctx, s, content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	other := mustOpen(t, mem)
	defer other.Close()
	if report := mustRepairIndex(t, other); report.SegmentsRemoved != 0 {
		t.Errorf("%+v", report)
	}
	ref, err := s.Commit(ctx, Manifest{VM: VMID{"esx1", "b"}, Time: testClock().Add(time.Hour), Disks: []DiskManifest{diskOf("b", tree)}})
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	same(t, openDisk(t, fresh, ref), content)
	for i, ref := range refs {
		same(t, openDisk(t, fresh, ref), contents[i])
	}
	before := len(stored(mem))
	again := mustBackup(t, fresh, VMID{"esx1", "c"}, 90, content)
	same(t, openDisk(t, fresh, again), content)
	if n := len(stored(mem)); n > before {
		t.Errorf("%d packs were made of what is known", n-before)
	}
}

// What the index alone knows of a pack without footer is kept: with it the pack can be
// saved.
func TestRepairIndexKeepsWhatIsNeededToSave(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := noise(3, 8)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(ctx, s, content, nil, whole(content)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil { // no generation has these blocks
		t.Fatal(err)
	}
	for _, name := range stored(mem) {
		tamper(t, mem, name, func(b []byte) []byte {
			b[len(b)-60] ^= 1
			return b
		})
	}
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	if report := mustRepairIndex(t, fresh); len(report.PacksUnreadable) != 2 || report.Records < 8 {
		t.Fatalf("%+v", report)
	}
	report := mustRepair(t, fresh, RepairOptions{})
	saved := 0
	for _, p := range report.Packs {
		saved += p.RecordsSaved
	}
	if saved < 8+1 || report.Left() {
		t.Errorf("%+v", report)
	}
	before := blockPacks(mem)
	ref := mustBackup(t, fresh, testVM, 0, content)
	same(t, openDisk(t, fresh, ref), content)
	if n := blockPacks(mem); n > before {
		t.Errorf("%d packs were made of what was saved", n-before)
	}
}

// A repository without packs has no index.
func TestRepairIndexOfNothing(t *testing.T) {
	mem, r := newMem(t)
	mustBackup(t, r, testVM, 0, noise(1, 2))
	for _, name := range stored(mem) {
		if err := mem.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	if report := mustRepairIndex(t, fresh); report.Segments != 0 || report.SegmentsRemoved != 1 {
		t.Errorf("%+v", report)
	}
}

// Prune says which generations keep it from working, all of them; and it clears marks when
// nothing is missing any more.
func TestPruneAndQuarantine(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	refs, contents := family(t, r)
	bystander := mustBackup(t, r, VMID{"esx1", "b"}, 5, noise(9, 3))
	// The oldest pack of nodes: all three share the leaf that it alone has, as far as they
	// did not change it.
	leaf := openDisk(t, r, refs[0]).tree.Root
	tamper(t, mem, "meta/"+leaf.Pack.String()[:2]+"/"+leaf.Pack.String(), func([]byte) []byte { return nil })
	data := openDisk(t, r, refs[2])
	rec, err := data.tree.Lookup(ctx, loader{r}, 0)
	if err != nil {
		t.Fatal(err)
	}
	tamper(t, mem, "packs/"+rec.Pack.String()[:2]+"/"+rec.Pack.String(), func([]byte) []byte { return nil })
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	_, err = fresh.Prune(ctx, PruneOptions{})
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), refs[0].String()) || strings.Contains(err.Error(), bystander.String()) ||
		!strings.Contains(err.Error(), "hikae forget") {
		t.Fatal(err)
	}
	if report := mustRepair(t, fresh, RepairOptions{}); len(report.Packs) != 2 {
		t.Fatalf("%+v", report)
	}
	newest, healed := mustNext(t, fresh, testVM, 9, contents[2])
	if healed == 0 {
		t.Error("nothing was healed")
	}
	same(t, openDisk(t, fresh, newest), contents[2])
	for i, ref := range refs {
		if reads(t, fresh, ref, contents[i]) > 0 {
			without(t, fresh, ref)
		}
	}
	if report := mustPrune(t, fresh, PruneOptions{DryRun: true}); report.PacksCleared != 2 || len(aside(mem)) != 2 {
		t.Errorf("%+v; quarantine has %v", report, aside(mem))
	}
	if report := mustPrune(t, fresh, PruneOptions{}); report.PacksCleared != 2 || len(aside(mem)) != 0 {
		t.Errorf("%+v; quarantine has %v", report, aside(mem))
	}
	mustPrune(t, fresh, PruneOptions{})
	same(t, openDisk(t, fresh, newest), contents[2])
	tidy(t, mem, fresh)
}

// A mark stays while a generation misses something of the pack.
func TestPruneKeepsMarks(t *testing.T) {
	mem, r := newMem(t)
	mustBackup(t, r, testVM, 0, noise(1, 4))
	for _, name := range stored(mem) {
		if strings.HasPrefix(name, "packs/") {
			tamper(t, mem, name, func(b []byte) []byte {
				b[70] ^= 1
				return b
			})
		}
	}
	fresh := mustOpen(t, mem)
	defer fresh.Close()
	mustRepair(t, fresh, RepairOptions{})
	had := aside(mem)
	if report := mustPrune(t, fresh, PruneOptions{}); report.PacksCleared != 0 || report.BlocksMissing != 1 || len(aside(mem)) != len(had) || len(had) != 2 {
		t.Errorf("%+v; quarantine has %v, had %v", report, aside(mem), had)
	}
	// The file comes back from elsewhere, whole: the next repair sees it.
	for _, name := range had {
		if from := quarantineDir + "/" + name; strings.HasSuffix(name, damagedSuffix) {
			b, err := fsx.ReadFile(mem, from, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			b = bytes.Clone(b)
			b[70] ^= 1
			h := strings.TrimSuffix(strings.TrimPrefix(name, "packs-"), damagedSuffix)
			if err := mem.Plant("packs/"+h[:2]+"/"+h, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	fresh = mustOpen(t, mem)
	defer fresh.Close()
	if report := mustRepair(t, fresh, RepairOptions{}); len(report.Packs) != 0 || len(report.Cleared) != 1 || len(aside(mem)) != 0 {
		t.Errorf("%+v; quarantine has %v", report, aside(mem))
	}
	clean(t, fresh)
	if _, err := mem.Stat(quarantineDir); errors.Is(err, fs.ErrNotExist) {
		t.Error("quarantine/ is gone")
	}
}
