package repo

import (
	"context"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"hikae/repo/internal/fsx"
)

// noDead proves that all packs that are there are needed.
func noDead(t fatalist, mem *fsx.Mem, r *Repository) {
	t.Helper()
	want := clean(t, r).Packs
	for _, name := range protected(t, mem) {
		if f, _ := storedName(name); f.kind == storedPack {
			want--
		}
	}
	if want != 0 {
		t.Fatalf("%d packs more than needed", -want)
	}
}

// Prune takes the parity of what it deletes along, and orphans of dead sessions.
func TestPruneDeletesParity(t *testing.T) {
	mem, r := newParityMem(t, 4)
	keep := noise(1, 5)
	stays := mustBackup(t, r, testVM, 0, keep)
	goes := mustBackup(t, r, VMID{"esx1", "a"}, 1, noise(2, 5))
	without(t, r, goes)
	plant(t, mem, "packs/01/0102030405060708"+paritySuffix, []byte("an orphan"))
	plant(t, mem, "packs/01/stranger"+paritySuffix, []byte("not ours"))
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
	if err := mem.Remove("packs/01/stranger" + paritySuffix); err != nil {
		t.Fatal("a file with an unknown name is gone:", err)
	}
	covered(t, mem)
	same(t, openDisk(t, r, stays), keep)
	noDead(t, mem, r)

	// Rewritten packs have parity as well.
	ref, content := sparse(t, r)
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
	covered(t, mem)
	same(t, openDisk(t, r, ref), content)

	// While somebody misses a block nothing that could bring it back is deleted.
	var lost string
	for _, name := range protected(t, mem) {
		if strings.HasPrefix(name, "packs/") {
			lost = name
		}
	}
	b := read(t, mem, lost)
	if err := mem.Remove(lost); err != nil {
		t.Fatal(err)
	}
	r.packs.Clear()
	mustPrune(t, r, PruneOptions{})
	if _, err := mem.Stat(lost + paritySuffix); err != nil {
		t.Fatal(err)
	}
	plant(t, mem, lost, b)
}

func TestPruneWithParityCrashes(t *testing.T) {
	for k := 1; ; k += 9 {
		mem, r := newParityMem(t, 4)
		keep := noise(1, 5)
		stays := mustBackup(t, r, testVM, 0, keep)
		without(t, r, mustBackup(t, r, VMID{"esx1", "a"}, 1, noise(2, 5)))
		mustPrune(t, r, PruneOptions{})
		_ = r.Close()
		faulty := fsx.NewFaulty(mem)
		r = mustOpen(t, faulty)
		faulty.Plan(fsx.Plan{Ops: fsx.OpChanges, Mode: fsx.CrashNow, At: k})
		_, err := r.Prune(context.Background(), PruneOptions{})
		fired := faulty.Fired()
		_ = r.Close()
		if !fired && err != nil {
			t.Fatal(err)
		}
		mem.Crash(rand.New(rand.NewPCG(uint64(k), 2)))
		r = mustOpen(t, mem)
		for range 3 {
			mustPrune(t, r, PruneOptions{})
		}
		covered(t, mem)
		same(t, openDisk(t, r, stays), keep)
		noDead(t, mem, r)
		_ = r.Close()
		if !fired {
			return
		}
	}
}

// Old readers know nothing of parity and verified dates: a repository with them reads
// as one without.
func TestParityIsPassedOver(t *testing.T) {
	mem, r := newParityMem(t, 3)
	content := noise(4, 9)
	ref := mustBackup(t, r, testVM, 0, content)
	mustScrub(t, mem, ScrubOptions{})
	for _, name := range mem.Files() {
		if strings.HasSuffix(name, paritySuffix) || strings.HasPrefix(name, verifiedDir+"/") {
			plant(t, mem, name, []byte("rubbish"))
		}
	}
	same(t, openDisk(t, r, ref), content)
	clean(t, r)
	refs, err := r.Refs(context.Background(), testVM)
	if err != nil || !slices.Equal(refs, []Ref{ref}) {
		t.Fatal(refs, err)
	}
	if err := r.Forget(context.Background(), []Ref{ref}, ForgetOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		mustPrune(t, r, PruneOptions{})
	}
	for _, name := range mem.Files() {
		if strings.HasSuffix(name, paritySuffix) && !strings.Contains(name, identityName) && !strings.Contains(name, forgottenPrefix) {
			t.Errorf("%s was left behind", name)
		}
	}
}

// late is a directory that is listed while a pack and its parity get their names: only
// the parity is seen.
type late struct {
	fsx.FS
	pack string
}

func (l late) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := l.FS.ReadDir(name)
	if name == path.Dir(l.pack) {
		list = slices.DeleteFunc(list, func(e fs.DirEntry) bool { return e.Name() == path.Base(l.pack) })
	}
	return list, err
}

func TestOrphansAreLookedForTwice(t *testing.T) {
	mem, r := newParityMem(t, 4)
	mustBackup(t, r, testVM, 0, noise(1, 5))
	for _, name := range protected(t, mem) {
		if err := dropOrphans(context.Background(), late{mem, name}); err != nil {
			t.Fatal(err)
		}
	}
	covered(t, mem)
}
