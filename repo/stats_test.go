package repo

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// distinct adds the blocks of content that are not zeros to seen and returns how
// many bytes were new.
func distinct(content []byte, seen map[string]bool) (fresh int64) {
	for off := 0; off < len(content); off += testBlock {
		b := make([]byte, testBlock)
		copy(b, content[off:])
		if !isZero(b) && !seen[string(b)] {
			seen[string(b)] = true
			fresh += testBlock
		}
	}
	return fresh
}

func TestStats(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	shared := image(7, 20*testBlock)
	next := slices.Clone(shared)
	copy(next[3*testBlock:], image(8, 4*testBlock))
	copy(next[3*testBlock:], "surely another block")
	clear(next[10*testBlock : 11*testBlock])
	other := slices.Concat(shared[:9*testBlock], image(9, 6*testBlock+77))
	db := VMID{"esx1", "db"}
	story := []struct {
		vm      VMID
		content []byte
	}{{testVM, shared}, {testVM, next}, {testVM, next}, {db, other}}
	sealed, nodes := int64(0), int64(0)
	for i, s := range story {
		session, err := r.Begin(ctx, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = backupIn(ctx, session, s.vm, testClock().Add(time.Duration(i)*time.Hour), s.content, nil, whole(s.content))
		if err := errors.Join(err, session.Close()); err != nil {
			t.Fatal(err)
		}
		sealed += session.Stats().BytesSealed
		nodes += session.Stats().Nodes
	}

	all := map[string]bool{}
	byVM := map[VMID]map[string]bool{testVM: {}, db: {}}
	growth := map[VMID][]int64{}
	var total, logical int64
	for _, s := range story {
		total += distinct(s.content, all)
		growth[s.vm] = append(growth[s.vm], distinct(s.content, byVM[s.vm]))
		// A short block at the end counts as long as it is.
		for off := 0; off < len(s.content); off += testBlock {
			if b := s.content[off:min(off+testBlock, len(s.content))]; !isZero(b) {
				logical += int64(len(b))
			}
		}
	}
	var once *RepositoryStats
	for _, memory := range []int64{0, 300, 1} {
		got, err := r.Stats(ctx, StatsOptions{MemoryBytes: memory})
		if err != nil {
			t.Fatal(err)
		}
		if got.Total.Unique != total || got.Total.Logical != logical {
			t.Fatalf("memory %d: unique %d, want %d; logical %d, want %d", memory, got.Total.Unique, total, got.Total.Logical, logical)
		}
		if len(got.VMs) != 2 || got.Unreadable != 0 {
			t.Fatalf("%+v", got)
		}
		if want := sealed; got.Total.Compressed > want+int64(len(all))*17 || got.Total.Compressed < want {
			t.Errorf("compressed %d, the sessions stored %d", got.Total.Compressed, want)
		}
		for _, v := range got.VMs {
			var each []int64
			for _, g := range v.Generations {
				each = append(each, g.Unique)
			}
			if !slices.Equal(each, growth[v.VM]) {
				t.Errorf("memory %d: %v grew by %v, want %v", memory, v.VM, each, growth[v.VM])
			}
		}
		var onDisk int64
		for _, name := range mem.Files() {
			info, err := mem.Stat(name)
			if err != nil {
				t.Fatal(err)
			}
			onDisk += info.Size()
		}
		if p := got.Physical; p.Total != onDisk || p.Data+p.Nodes+p.Index+p.Other != onDisk || p.Data < got.Total.Compressed || p.Nodes < got.Total.Metadata {
			t.Errorf("%+v, the files have %d bytes", p, onDisk)
		}
		if once == nil {
			once = got
		} else if got.Total != once.Total {
			t.Errorf("in several passes %+v, in one %+v", got.Total, once.Total)
		}
	}
	if nodes == 0 || once.Total.Metadata == 0 {
		t.Error("no nodes")
	}

	one, err := r.Stats(ctx, StatsOptions{VMs: []VMID{db}})
	if err != nil || len(one.VMs) != 1 || one.Total.Unique != growth[db][0] {
		t.Fatalf("%+v, %v", one, err)
	}
	if _, err := r.Stats(ctx, StatsOptions{VMs: []VMID{{"esx1", "none"}}}); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}

	// What cannot be read is counted, and does not end it.
	for _, name := range packFiles(mem, "meta/") {
		if err := mem.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	hurt := mustOpen(t, mem)
	defer hurt.Close()
	lost, err := hurt.Stats(ctx, StatsOptions{})
	if err != nil || lost.Unreadable == 0 || lost.Total.Unique != 0 || lost.Total.Logical != logical {
		t.Fatalf("%+v, %v", lost, err)
	}
}

func TestStatsEmpty(t *testing.T) {
	_, r := newMem(t)
	got, err := r.Stats(context.Background(), StatsOptions{})
	if err != nil || got.Total != (SpaceStats{}) || got.Total.Deduplication() != 0 || got.Total.Compression() != 0 || got.Physical.Total == 0 {
		t.Fatalf("%+v, %v", got, err)
	}
}

// A storage that fails ends the count with what failed, unless it did not matter.
func TestStatsStorageFails(t *testing.T) {
	mem := fsx.NewMem()
	initMem(t, mem)
	r := mustOpen(t, mem)
	nights(t, r, testVM, 2)
	_ = r.Close()
	for k := 1; ; k++ {
		faulty := fsx.NewFaulty(mem)
		n, err := openMem(faulty)
		if err != nil {
			t.Fatal(err)
		}
		faulty.Plan(fsx.Plan{Ops: fsx.OpAny, At: k})
		got, err := n.Stats(context.Background(), StatsOptions{})
		fired := faulty.Fired()
		_ = n.Close()
		if !fired {
			if err != nil || k < 10 {
				t.Fatalf("after %d operations: %v", k-1, err)
			}
			return
		}
		if err == nil && got.Total.Logical == 0 {
			t.Fatalf("operation %d failed, and nothing is told", k)
		}
		if err != nil && !strings.Contains(err.Error(), "injected failure") {
			t.Fatalf("operation %d: %v", k, err)
		}
	}
}

func TestIDSet(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var s idSet
	last := map[block.ID]uint32{}
	var ids []block.ID
	for who := uint32(1); who < 4; who++ {
		for range 20000 {
			var id block.ID
			if len(ids) > 0 && rng.IntN(3) == 0 {
				id = ids[rng.IntN(len(ids))]
			} else {
				for i := 0; i < len(id); i += 8 {
					binary.LittleEndian.PutUint64(id[i:], rng.Uint64())
				}
				ids = append(ids, id)
			}
			before, known := last[id]
			ever, mine := s.mark(id, who)
			if ever == known || mine != (before != who) {
				t.Fatalf("%v by %d: ever %v, mine %v, before %d", id, who, ever, mine, before)
			}
			last[id] = who
		}
	}
}
