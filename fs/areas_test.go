package fs

import (
	"context"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// A walk to the next hole of a long stretch of data happens once, not for every
// question.
func TestSeekRemembers(t *testing.T) {
	src := &fakeSource{gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{{Name: "d", Size: 1 << 30, Seed: 1, Density: 256}}}}}
	tr, _ := testTree(t, src, Options{})
	n, err := tr.walk("h/v/latest/d-flat.vmdk")
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 1<<30; off += 2 << 20 {
		if got, err := n.content.seek(context.Background(), off, seekHole); got != 1<<30 || err != nil {
			t.Fatal(got, err)
		}
		if got, err := n.content.seek(context.Background(), off, seekData); got != off || err != nil {
			t.Fatal(got, err)
		}
	}
	if steps := n.content.disk.disk.(*fakeDisk).steps.Load(); steps > 8192+10 {
		t.Errorf("%d steps over 8192 blocks", steps)
	}
}

func TestSeekAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := fakeDiskSpec{Size: rapid.Int64Range(1, 40*fakeBlock).Draw(t, "size"), Seed: rapid.Uint64().Draw(t, "seed"), Density: rapid.IntRange(1, 255).Draw(t, "density")}
		d := &shownDisk{disk: &fakeDisk{spec: spec, src: &fakeSource{}}, gen: &genDir{}, asking: newShared(context.Background())}
		d.stored = d.disk.(*fakeDisk).stored()
		base := rapid.Int64Range(0, spec.Size-1).Draw(t, "base")
		c := &content{disk: d, base: base, size: rapid.Int64Range(1, spec.Size-base).Draw(t, "window"), stored: -1}
		model := func(off int64, data bool) int64 {
			for ; off < c.size; off++ {
				if spec.isData((c.base+off)/fakeBlock) == data {
					return off
				}
			}
			if data {
				return -1
			}
			return c.size
		}
		for range 20 {
			off := rapid.Int64Range(0, c.size-1).Draw(t, "off")
			for whence, data := range map[uint32]bool{seekData: true, seekHole: false} {
				got, err := c.seek(context.Background(), off, whence)
				if errors.Is(err, unix.ENXIO) {
					got = -1
				} else if err != nil {
					t.Fatal(err)
				}
				if want := model(off, data); got != want {
					t.Fatalf("whence %d from %d: got %d, want %d", whence, off, got, want)
				}
			}
		}
		var want int64
		for off := c.base; off < c.base+c.size; {
			end := min((off/fakeBlock+1)*fakeBlock, c.base+c.size)
			if spec.isData(off / fakeBlock) {
				want += end - off
			}
			off = end
		}
		if got, err := c.countStored(context.Background()); got != want || err != nil {
			t.Fatalf("%d bytes stored, %v; want %d", got, err, want)
		}
	})
}

func TestDamagedPartitionTableHidesOnlyItself(t *testing.T) {
	gens := []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{
		{Name: "a", Size: 1 << 20, Density: 256},
		{Name: "b", Size: 1 << 20, Density: 256, Bad: 1},
		{Name: "c", Size: 1 << 20, Density: 256},
	}}}
	src := &fakeSource{gens: gens}
	tr, _ := testTree(t, src, Options{})
	var got []string
	l, errno := tr.readList(0, nil, inoInGeneration(1, placePartitions))
	if errno != 0 {
		t.Fatal(errno)
	}
	for _, c := range l.files {
		got = append(got, c.name)
	}
	if s := strings.Join(got, " "); s != "a.img c.img" {
		t.Errorf("shown: %s", s)
	}
	if _, err := tr.walk("h/v/latest/partitions/b.img"); !errors.Is(err, errGone) {
		t.Errorf("the damaged one: %v", err)
	}
	// storage that fails for a moment is another matter: what would be left out
	// now would be missing for ever
	tr, _ = testTree(t, src, Options{})
	if _, err := tr.walk("h/v/latest/a-flat.vmdk"); err != nil {
		t.Fatal(err)
	}
	src.refused.Store(true)
	if _, errno := tr.readList(0, nil, inoInGeneration(1, placePartitions)); errno != unix.EIO {
		t.Errorf("with failing storage: %v", errno)
	}
	src.refused.Store(false)
	if l, errno := tr.readList(0, nil, inoInGeneration(1, placePartitions)); errno != 0 || len(l.files) != 2 {
		t.Errorf("when it works again: %v", errno)
	}
}
