package vdisk

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"hikae/backup/vmdk"
)

// oddSize covers several tables of every format and ends inside a sector's grain, a table and a tracked block.
const oddSize = 16<<20 + 100<<10 + 5*512

// TestMain asks rapid for fewer rounds than its hundred, which files make slow; -rapid.checks still decides.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("30"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func needQemu(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		if os.Getenv("CI") == "" {
			t.Skip("qemu-img, the referee for VMDK files, is not installed: apt install qemu-utils")
		}
		t.Fatal("qemu-img, the referee for VMDK files, is not installed: apt install qemu-utils")
	}
	return path
}

// judge lets qemu-img read a chain and compares with what the guest sees.
func judge(t testing.TB, d *Disk) {
	t.Helper()
	qemu := needQemu(t)
	links := d.Links()
	top := links[len(links)-1].Descriptor
	if out, err := exec.Command(qemu, "check", "-f", "vmdk", top).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check %s: %v\n%s", top, err, out)
	}
	if out, err := exec.Command(qemu, "info", "--backing-chain", top).CombinedOutput(); err != nil ||
		strings.Count(string(out), "image: ") != len(links) {
		t.Fatalf("qemu-img info: %v\n%s", err, out)
	}
	raw := filepath.Join(t.TempDir(), "qemu.raw")
	defer os.Remove(raw)
	if out, err := exec.Command(qemu, "convert", "-f", "vmdk", "-O", "raw", top, raw).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img convert: %v\n%s", err, out)
	}
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "qemu-img against vdisk", contents(t, d), want)
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: differs first at %d: %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

func contents(t testing.TB, d *Disk) []byte {
	t.Helper()
	p := make([]byte, d.Capacity())
	if n, err := d.ReadAt(p, 0); err != nil || n != len(p) {
		t.Fatalf("read %d of %d bytes: %v", n, len(p), err)
	}
	return p
}

func newDisk(t testing.TB, o Options) *Disk {
	t.Helper()
	d, err := Create(t.TempDir(), "web01", oddSize, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// scribble makes n random guest writes and keeps the model in step.
func scribble(t testing.TB, rng *rand.Rand, d *Disk, model []byte, n int) {
	t.Helper()
	for range n {
		size := 1 + rng.IntN(100<<10)
		switch rng.IntN(4) {
		case 0:
			size = 512 * (1 + rng.IntN(8))
		case 1:
			size = 4096 * (1 + rng.IntN(64))
		}
		off := rng.IntN(len(model))
		if rng.IntN(2) == 0 {
			off -= off % 4096
		}
		if rng.IntN(8) == 0 {
			off = len(model) - min(size, len(model)) // the disk's end
		}
		size = min(size, len(model)-off)
		if rng.IntN(6) == 0 {
			must(t, d.Unmap(int64(off), int64(size)))
			clear(model[off : off+size])
			continue
		}
		p := model[off : off+size]
		var block [509]byte // no power of two: no two sectors of a write are alike
		for i := range block {
			block[i] = byte(rng.Uint32())
		}
		for rest := p; len(rest) > 0; {
			rest = rest[copy(rest, block[:]):]
		}
		if _, err := d.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestQemuReadsChains is the referee's word: chains of three links in every mix of formats, read by qemu-img at each depth, and
// again after each removal.
func TestQemuReadsChains(t *testing.T) {
	needQemu(t)
	formats := map[Format]string{FormatCOWD: "cowd", FormatSESparse: "sesparse"}
	t.Parallel()
	for i, mix := range [][]Format{
		{FormatCOWD, FormatCOWD, FormatCOWD},
		{FormatSESparse, FormatSESparse, FormatSESparse},
		{FormatCOWD, FormatSESparse, FormatCOWD},
		{FormatSESparse, FormatCOWD, FormatSESparse},
	} {
		t.Run(formats[mix[0]]+formats[mix[1]]+formats[mix[2]], func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(i), 7))
			d := newDisk(t, Options{Thin: i%2 == 0})
			model := make([]byte, oddSize)
			scribble(t, rng, d, model, 30)
			must(t, d.EnableTracking(TrackingOptions{}))
			for _, f := range mix {
				must(t, d.Snapshot(f))
				if len(d.Links()) < 4 {
					scribble(t, rng, d, model, 25)
				}
			}
			judge(t, d) // an empty link on two others
			scribble(t, rng, d, model, 25)
			same(t, "guest", contents(t, d), model)
			judge(t, d)
			for _, k := range []int{1, 1, 0} {
				must(t, d.RemoveSnapshot(context.Background(), k, nil))
				same(t, "guest", contents(t, d), model)
				judge(t, d)
				scribble(t, rng, d, model, 5)
			}
			if n := len(d.Links()); n != 1 {
				t.Fatalf("%d links are left", n)
			}
			judge(t, d)
			left, err := filepath.Glob(filepath.Join(d.dir, "*"))
			must(t, err)
			if len(left) != 3 {
				t.Fatalf("left behind: %v", left)
			}
		})
	}
}

// TestQemuReadsRandomChains lets chance choose size, depth, formats and writes.
func TestQemuReadsRandomChains(t *testing.T) {
	qemu := needQemu(t)
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "chain")
		must(t, err)
		defer os.RemoveAll(dir)
		size := rapid.SampledFrom([]int64{512, 4096 + 512, 1<<20 - 512, 2<<20 + 512}).Draw(rt, "size")
		d, err := Create(dir, "d", size, Options{Thin: rapid.Bool().Draw(rt, "thin")})
		must(t, err)
		defer d.Close()
		model := make([]byte, size)
		for depth := rapid.IntRange(1, 4).Draw(rt, "links"); ; depth-- {
			rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
			scribble(t, rng, d, model, rapid.IntRange(0, 6).Draw(rt, "writes"))
			if depth == 1 {
				break
			}
			must(t, d.Snapshot(rapid.SampledFrom([]Format{FormatCOWD, FormatSESparse}).Draw(rt, "format")))
		}
		raw := filepath.Join(dir, "raw")
		links := d.Links()
		if out, err := exec.Command(qemu, "convert", "-f", "vmdk", "-O", "raw", links[len(links)-1].Descriptor, raw).CombinedOutput(); err != nil {
			rt.Fatalf("qemu-img convert: %v\n%s", err, out)
		}
		got, err := os.ReadFile(raw)
		must(t, err)
		if !bytes.Equal(got, model) {
			rt.Fatal("qemu-img reads something else")
		}
	})
}

// TestQemuReadsFarEnds: disks as large as the formats go, at places that need every bit of a directory.
func TestQemuReadsFarEnds(t *testing.T) {
	needQemu(t)
	for _, c := range []struct {
		format Format
		size   int64
	}{{FormatCOWD, 2<<40 - 512}, {FormatSESparse, 5<<40 + 3*512}} {
		d, err := Create(t.TempDir(), "d", c.size, Options{Thin: true})
		must(t, err)
		defer d.Close()
		var commands []string
		places := []int64{0, 1<<30 + 512, 1 << 40, c.size / 1024 * 512, c.size - 8192}
		for depth := range 3 {
			must(t, d.Snapshot(c.format))
			for i, off := range places {
				if (i+depth)%3 == 0 {
					continue // what the links below hold shows through
				}
				if shift := int64(depth) * 512; off+8192 < c.size {
					off += shift
				} else {
					off -= shift
				}
				_, err := d.WriteAt(bytes.Repeat([]byte{byte(0x10*depth + i + 1)}, 8192), off)
				must(t, err)
			}
		}
		for _, off := range places {
			for at := max(off-4096, 0); at < min(off+16384, c.size); at += 512 {
				p := make([]byte, 512)
				_, err := d.ReadAt(p, at)
				must(t, err)
				if len(bytes.Trim(p, string(p[:1]))) != 0 {
					t.Fatalf("sector at %d is not of one byte", at)
				}
				commands = append(commands, "-c", fmt.Sprintf("read -P %d %d 512", p[0], at))
			}
		}
		links := d.Links()
		args := append([]string{"-r", "-f", "vmdk"}, commands...)
		out, err := exec.Command("qemu-io", append(args, links[len(links)-1].Descriptor)...).CombinedOutput()
		if err != nil || strings.Contains(string(out), "verification failed") || strings.Count(string(out), "read 512/512 bytes") != len(commands)/2 {
			t.Fatalf("qemu-io: %v\n%s", err, out)
		}
	}
}

// modelDisk is what a disk and its snapshots must hold.
type modelDisk struct {
	guest  []byte
	states [][]byte // of the frozen links
	ids    []string // change ids of the frozen links
	old    []point  // change ids that were stamped, the latest five
}

type point struct {
	id    string
	state []byte
}

// TestRandomLife walks through random guest writes, snapshots, removals, reverts and reopenings against a model in memory.
func TestRandomLife(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "life")
		must(t, err)
		size := rapid.SampledFrom([]int64{512, 3 * 512, 4096*3 + 512, 200 << 10, 2<<20 + 512}).Draw(rt, "size")
		d, err := Create(dir, "d", size, Options{Thin: rapid.Bool().Draw(rt, "thin"), VMFS: rapid.SampledFrom([]int{5, 6}).Draw(rt, "vmfs")})
		must(t, err)
		defer func() { d.Close(); os.RemoveAll(dir) }()
		m := modelDisk{guest: make([]byte, size)}
		seed := byte(0)
		top := func() string { l := d.Links(); return l[len(l)-1].Descriptor }
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off := rapid.Int64Range(0, size-1).Draw(rt, "off")
				n := rapid.Int64Range(1, min(size-off, 300<<10)).Draw(rt, "n")
				if rapid.Bool().Draw(rt, "aligned") {
					off -= off % 512
					n = min((n+511)/512*512, size-off)
				}
				seed++
				p := bytes.Repeat([]byte{seed, seed ^ 0x55, 1}, int(n/3)+1)[:n]
				if _, err := d.WriteAt(p, off); err != nil {
					rt.Fatal(err)
				}
				copy(m.guest[off:], p)
			},
			"unmap": func(rt *rapid.T) {
				off := rapid.Int64Range(0, size-1).Draw(rt, "off")
				n := rapid.Int64Range(1, size-off).Draw(rt, "n")
				if err := d.Unmap(off, n); err != nil {
					rt.Fatal(err)
				}
				clear(m.guest[off : off+n])
			},
			"snapshot": func(rt *rapid.T) {
				if len(m.states) == 4 {
					rt.Skip("deep enough")
				}
				f := rapid.SampledFrom([]Format{FormatAuto, FormatCOWD, FormatSESparse}).Draw(rt, "format")
				if err := d.Snapshot(f); err != nil {
					rt.Fatal(err)
				}
				i := len(m.states)
				m.states = append(m.states, bytes.Clone(m.guest))
				m.ids = append(m.ids, d.ChangeID(i))
				if id := d.ChangeID(i); id != "" {
					m.old = append(m.old, point{id, m.states[i]})
					m.old = m.old[max(0, len(m.old)-5):]
				}
			},
			"remove": func(rt *rapid.T) {
				if len(m.states) == 0 {
					rt.Skip("no snapshot")
				}
				i := rapid.IntRange(0, len(m.states)-1).Draw(rt, "snapshot")
				called := false
				err := d.RemoveSnapshot(context.Background(), i, func(l []Link) error { called = len(l) == len(m.states); return nil })
				if err != nil || !called {
					rt.Fatalf("remove: %v, told of the switch: %v", err, called)
				}
				m.states = append(m.states[:i:i], m.states[i+1:]...)
				m.ids = append(m.ids[:i:i], m.ids[i+1:]...)
			},
			"revert": func(rt *rapid.T) {
				if len(m.states) == 0 {
					rt.Skip("no snapshot")
				}
				i := rapid.IntRange(0, len(m.states)-1).Draw(rt, "snapshot")
				if err := d.RevertTo(i, nil); err != nil {
					rt.Fatal(err)
				}
				m.states, m.ids = m.states[:i+1], m.ids[:i+1]
				m.guest = bytes.Clone(m.states[i])
			},
			"tracking": func(rt *rapid.T) {
				if d.Tracking() {
					if rapid.IntRange(0, 9).Draw(rt, "rarely") > 0 {
						rt.Skip("on")
					}
					must(t, d.DisableTracking())
				} else if err := d.EnableTracking(TrackingOptions{}); len(m.states) > 0 != errors.Is(err, ErrSnapshots) {
					rt.Fatalf("enable with %d snapshots: %v", len(m.states), err)
				}
				for i := range m.ids {
					m.ids[i] = d.ChangeID(i)
				}
			},
			"reopen": func(rt *rapid.T) {
				path, before := top(), d.Links()
				must(t, d.Close())
				if d, err = Open(path, Options{VMFS: 5}); err != nil {
					rt.Fatal(err)
				}
				if got := d.Links(); fmt.Sprint(got) != fmt.Sprint(before) {
					rt.Fatalf("links %v, before %v", got, before)
				}
			},
			"become": func(rt *rapid.T) {
				image := bytes.Clone(m.guest)
				at := rapid.Int64Range(0, size-1).Draw(rt, "at")
				seed++
				image[at] ^= seed | 1
				n, err := d.Become(context.Background(), bytes.NewReader(image), size)
				if err != nil || n > becomeBlock {
					rt.Fatalf("%d bytes written: %v", n, err)
				}
				m.guest = image
			},
			"": func(rt *rapid.T) { checkModel(rt, d, &m) },
		})
	})
}

// checkModel compares contents, change ids and what change tracking tells with the model.
func checkModel(rt *rapid.T, d *Disk, m *modelDisk) {
	links := d.Links()
	if len(links) != len(m.states)+1 {
		rt.Fatalf("%d links, %d snapshots", len(links), len(m.states))
	}
	got := make([]byte, len(m.guest))
	for i, want := range append(append([][]byte{}, m.states...), m.guest) {
		if _, err := d.chain.At(i).ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			rt.Fatalf("link %d does not read as it was (%v)", i, err)
		}
		areas, err := d.Allocated(context.Background(), i)
		if err != nil {
			rt.Fatal(err)
		}
		for _, a := range areas {
			clear(got[a.Offset:a.End()])
		}
		if len(bytes.Trim(got, "\x00")) != 0 {
			rt.Fatalf("link %d has data outside what it tells to be allocated: %v", i, areas)
		}
		desc := d.Descriptor(i)
		if i > 0 && desc.ParentCID != d.Descriptor(i-1).CID {
			rt.Fatalf("link %d names parent %08x, which is %08x", i, desc.ParentCID, d.Descriptor(i-1).CID)
		}
		if (links[i].Tracking != "") != (desc.Version == 3) {
			rt.Fatalf("link %d: version %d, tracking file %q", i, desc.Version, links[i].Tracking)
		}
		if i < len(m.ids) && m.ids[i] != links[i].ChangeID && m.ids[i] == "" {
			rt.Fatalf("link %d got change id %q", i, links[i].ChangeID)
		}
		checkChanged(rt, d, m, i, want)
	}
}

// checkChanged holds the change ids stamped lately against link i: it is refused, or all that differs is told.
func checkChanged(rt *rapid.T, d *Disk, m *modelDisk, i int, now []byte) {
	for _, old := range m.old {
		areas, err := d.Changed(i, old.id)
		if errors.Is(err, ErrChangeID) || errors.Is(err, ErrTracking) {
			continue
		}
		if err != nil {
			rt.Fatal(err)
		}
		was := bytes.Clone(old.state)
		end := int64(-1)
		for _, a := range areas {
			if a.Offset <= end || a.Length <= 0 || a.End() > int64(len(now)) || a.Offset%(64<<10) != 0 {
				rt.Fatalf("areas %v", areas)
			}
			end = a.End()
			copy(was[a.Offset:a.End()], now[a.Offset:a.End()])
		}
		if !bytes.Equal(was, now) {
			rt.Fatalf("link %d differs from change id %s outside %v", i, old.id, areas)
		}
	}
}

// TestChangeTracking: exact areas, the ids a host would give, and the ids it would refuse.
func TestChangeTracking(t *testing.T) {
	ctx := context.Background()
	d := newDisk(t, Options{Thin: true})
	write := func(off int64, n int) {
		t.Helper()
		if _, err := d.WriteAt(bytes.Repeat([]byte{9}, n), off); err != nil {
			t.Fatal(err)
		}
	}
	changed := func(i int, since string) string {
		t.Helper()
		areas, err := d.Changed(i, since)
		must(t, err)
		return fmt.Sprint(areas)
	}
	write(1<<20, 100)
	if _, err := d.Changed(0, "*"); !errors.Is(err, ErrTracking) {
		t.Fatalf("without tracking: %v", err)
	}
	must(t, d.EnableTracking(TrackingOptions{}))
	must(t, d.Snapshot(FormatAuto))
	first := d.ChangeID(0)
	if !strings.HasSuffix(first, "/1") || len(first) != 16*3-1+2 {
		t.Fatalf("change id %q", first)
	}
	write(64<<10, 1)
	write(oddSize-1, 1)
	write(5<<20-1, 2)
	must(t, d.RemoveSnapshot(ctx, 0, nil))
	must(t, d.Snapshot(FormatAuto))
	second := d.ChangeID(0)
	if got, want := changed(0, first), fmt.Sprint([]vmdk.Area{
		{Offset: 64 << 10, Length: 64 << 10},
		{Offset: 5<<20 - 64<<10, Length: 128 << 10},
		{Offset: oddSize / (64 << 10) * (64 << 10), Length: oddSize % (64 << 10)},
	}); got != want {
		t.Fatalf("changed %s, want %s", got, want)
	}
	if got := changed(0, second); got != "[]" {
		t.Fatalf("nothing was written since: %s", got)
	}
	write(10<<20, 1)
	if got := changed(0, second); got != "[]" {
		t.Fatalf("written after the snapshot: %s", got)
	}
	if _, err := d.Changed(0, d.ChangeID(1)); !errors.Is(err, ErrChangeID) {
		t.Fatalf("an id newer than the snapshot: %v", err)
	}
	for _, id := range []string{"", "*", "/", first[:20], strings.Replace(first, "/", "0/", 1), strings.Repeat("0", 32) + "/1"} {
		if _, err := d.Changed(0, id); !errors.Is(err, ErrChangeID) {
			t.Fatalf("change id %q: %v", id, err)
		}
	}
	d.MissNextWrite()
	write(12<<20, 1)
	write(14<<20, 1)
	if got, want := changed(1, second), fmt.Sprint([]vmdk.Area{{Offset: 10 << 20, Length: 64 << 10}, {Offset: 14 << 20, Length: 64 << 10}}); got != want {
		t.Fatalf("changed %s, want %s", got, want)
	}
	must(t, d.RevertTo(0, nil))
	if _, err := d.Changed(1, second); !errors.Is(err, ErrChangeID) {
		t.Fatalf("an id of before a revert: %v", err)
	}
	must(t, d.DisableTracking())
	must(t, d.EnableTracking(TrackingOptions{WithSnapshots: true}))
	id := d.ChangeID(0)
	write(3<<20, 1)
	must(t, d.Snapshot(FormatAuto))
	if got := changed(1, id); got != "[]" {
		t.Fatalf("tracking enabled with snapshots told %s", got)
	}
	write(4<<20, 1)
	if got := changed(2, id); got != fmt.Sprint([]vmdk.Area{{Offset: 4 << 20, Length: 64 << 10}}) {
		t.Fatalf("it works from the next snapshot on: %s", got)
	}
}

// TestContentIDs: a link's content id changes with the first write after it was opened, and never by reading.
func TestContentIDs(t *testing.T) {
	d := newDisk(t, Options{})
	path := d.Links()[0].Descriptor
	cid := func() (uint32, string) { x := d.Descriptor(0); return x.CID, x.Value("ddb.longContentID") }
	reopen := func() {
		t.Helper()
		must(t, d.Close())
		var err error
		d, err = Open(path, Options{})
		must(t, err)
	}
	a, _ := cid()
	contents(t, d)
	reopen()
	if b, _ := cid(); a != b {
		t.Fatalf("reading changed the content id from %08x to %08x", a, b)
	}
	_, err := d.WriteAt([]byte{1}, 0)
	must(t, err)
	b, long := cid()
	if a == b || !strings.HasSuffix(long, fmt.Sprintf("%08x", b)) || len(long) != 32 {
		t.Fatalf("content id %08x, %08x after a write, long %s", a, b, long)
	}
	_, err = d.WriteAt([]byte{2}, 4096)
	must(t, err)
	if c, _ := cid(); b != c {
		t.Fatalf("a second write changed the content id from %08x to %08x", b, c)
	}
	reopen()
	_, err = d.WriteAt([]byte{2}, 0)
	must(t, err)
	if c, _ := cid(); b == c {
		t.Fatalf("content id %08x stayed over a reopening and a write", b)
	}
}

// TestFrozenLinksNeverChange compares the frozen links' files byte by byte through the life of the link above.
func TestFrozenLinksNeverChange(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	d := newDisk(t, Options{Thin: true})
	model := make([]byte, oddSize)
	scribble(t, rng, d, model, 10)
	must(t, d.EnableTracking(TrackingOptions{}))
	must(t, d.Snapshot(FormatCOWD))
	scribble(t, rng, d, model, 10)
	must(t, d.Snapshot(FormatSESparse))
	files := map[string][]byte{}
	for _, l := range d.Links()[:2] {
		for _, f := range []string{l.Descriptor, l.Extent, l.Tracking} {
			p, err := os.ReadFile(f)
			must(t, err)
			files[f] = p
		}
	}
	scribble(t, rng, d, model, 20)
	must(t, d.Snapshot(FormatCOWD))
	scribble(t, rng, d, model, 20)
	must(t, d.RemoveSnapshot(context.Background(), 2, nil))
	must(t, d.Sync())
	for f, want := range files {
		got, err := os.ReadFile(f)
		must(t, err)
		same(t, f, got, want)
	}
}

// TestKilledWhileRemoving copies the files at every point where a kill could stop the removal of a snapshot, as they are then, and
// opens them: by the old running link while its descriptor is there, else by the new one.
func TestKilledWhileRemoving(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ remove, snapshots int }{"running": {1, 2}, "middle": {1, 3}, "base": {0, 2}, "only": {0, 1}} {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 5))
			d, err := Create(t.TempDir(), "d", 2<<20+512, Options{Thin: true})
			must(t, err)
			defer d.Close()
			model := make([]byte, d.Capacity())
			must(t, d.EnableTracking(TrackingOptions{}))
			scribble(t, rng, d, model, 5)
			for i := range c.snapshots {
				must(t, d.Snapshot([]Format{FormatCOWD, FormatSESparse}[i%2]))
				scribble(t, rng, d, model, 6)
			}
			before := bytes.Clone(model)
			since := d.ChangeID(0)
			wantChanged, err := d.Changed(len(d.Links())-1, since)
			must(t, err)
			tops := []string{d.Links()[len(d.Links())-1].Descriptor, d.Links()[len(d.Links())-2].Descriptor}
			steps := 0
			d.hook = func(step string) error {
				steps++
				dir := t.TempDir()
				must(t, os.CopyFS(dir, os.DirFS(d.dir)))
				top := ""
				for _, p := range tops {
					if _, err := os.Stat(filepath.Join(dir, filepath.Base(p))); err == nil {
						top = filepath.Join(dir, filepath.Base(p))
						break
					}
				}
				x, err := Open(top, Options{})
				if err != nil {
					t.Fatalf("killed %s: %v", step, err)
				}
				defer x.Close()
				same(t, "killed "+step, contents(t, x), before)
				if strings.HasPrefix(step, "delete") || step == "switched" {
					judge(t, x)
				}
				// Nothing that changed may be forgotten, and the removal can be done again.
				if c.remove > 0 {
					areas, err := x.Changed(len(x.Links())-1, since)
					must(t, err)
					if fmt.Sprint(areas) != fmt.Sprint(wantChanged) {
						t.Fatalf("killed %s: changed %v, want %v", step, areas, wantChanged)
					}
				}
				for len(x.Links()) > 1 {
					must(t, x.RemoveSnapshot(context.Background(), 0, nil))
				}
				same(t, "killed "+step+", then removed", contents(t, x), before)
				return nil
			}
			must(t, d.RemoveSnapshot(context.Background(), c.remove, nil))
			if steps < 8 {
				t.Fatalf("only %d points were tried", steps)
			}
			same(t, "guest", contents(t, d), before)
		})
	}
}

// TestRemovalThatFails: a step that fails leaves a disk that goes on working, with nothing lost.
func TestRemovalThatFails(t *testing.T) {
	broken := errors.New("broken")
	for fail := 1; ; fail++ {
		rng := rand.New(rand.NewPCG(9, 5))
		d, err := Create(t.TempDir(), "d", 1<<20+512, Options{Thin: true})
		must(t, err)
		model := make([]byte, d.Capacity())
		for range 3 {
			scribble(t, rng, d, model, 3)
			must(t, d.Snapshot(FormatAuto))
		}
		scribble(t, rng, d, model, 3)
		steps, failed := 0, ""
		d.hook = func(step string) error {
			if steps++; steps == fail {
				failed = step
				return broken
			}
			return nil
		}
		err = d.RemoveSnapshot(context.Background(), 1, func([]Link) error { return d.hook("callback") })
		if failed == "" {
			must(t, err)
			d.Close()
			if fail < 8 {
				t.Fatalf("only %d steps", fail)
			}
			return
		}
		if !errors.Is(err, broken) {
			t.Fatalf("%s: %v", failed, err)
		}
		same(t, failed, contents(t, d), model)
		scribble(t, rng, d, model, 5)
		same(t, failed+", then written", contents(t, d), model)
		d.hook = nil
		must(t, d.RemoveSnapshot(context.Background(), 0, nil))
		links := d.Links()
		must(t, d.Close())
		d, err = Open(links[len(links)-1].Descriptor, Options{})
		must(t, err)
		same(t, failed+", then opened", contents(t, d), model)
		d.Close()
	}
}

// TestImport: content and holes survive, odd lengths are filled up, and a terabyte of nothing costs nothing.
func TestImport(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	raw := filepath.Join(dir, "image.raw")
	f, err := os.Create(raw)
	must(t, err)
	const size = 800<<30 + 77
	must(t, f.Truncate(size))
	data := bytes.Repeat([]byte("hikae"), 40000)
	for _, off := range []int64{0, 3 << 30, 700<<30 + 123} {
		_, err = f.WriteAt(data, off)
		must(t, err)
	}
	_, err = f.WriteAt([]byte("end"), size-3)
	must(t, err)
	must(t, f.Close())

	d, err := ImportRaw(ctx, dir, "big", raw, Options{Thin: true})
	must(t, err)
	defer d.Close()
	if d.Capacity() != 800<<30+512 {
		t.Fatalf("capacity %d", d.Capacity())
	}
	must(t, d.EnableTracking(TrackingOptions{}))
	must(t, d.Snapshot(FormatAuto))
	areas, err := d.Allocated(ctx, 0)
	must(t, err)
	var total int64
	for _, a := range areas {
		total += a.Length
	}
	if total < 3*int64(len(data)) || total > 4<<20 {
		t.Fatalf("%d bytes allocated in %v", total, areas)
	}
	p := make([]byte, len(data))
	for _, off := range []int64{0, 3 << 30, 700<<30 + 123} {
		_, err := d.ReadAt(p, off)
		must(t, err)
		same(t, "imported", p, data)
	}
	tail := make([]byte, 512)
	if n, err := d.ReadAt(tail, size-3); n != 3+512-77 || !errors.Is(err, io.EOF) || !bytes.HasPrefix(tail, []byte("end\x00\x00")) {
		t.Fatalf("the end: %d bytes, %v, %q", n, err, tail[:8])
	}
	_, err = d.WriteAt([]byte("new"), 500<<30)
	must(t, err)
	changed, err := d.Changed(1, d.ChangeID(0))
	must(t, err)
	if fmt.Sprint(changed) != fmt.Sprint([]vmdk.Area{{Offset: 500 << 30, Length: 512 << 10}}) {
		t.Fatalf("changed %v: 512 KiB blocks are right for 800 GiB", changed)
	}

	image, err := vmdk.OpenImage(raw)
	must(t, err)
	defer image.Close()
	if n, err := d.Become(ctx, image, image.Capacity()); err != nil || n != becomeBlock {
		t.Fatalf("becoming the image again wrote %d bytes: %v", n, err)
	}
	must(t, d.RemoveSnapshot(ctx, 0, nil))
	if _, err := ImportRaw(ctx, dir, "big", raw, Options{}); !errors.Is(err, os.ErrExist) {
		t.Fatalf("over an existing disk: %v", err)
	}
}

// TestProvisioning: thick eager has all its bytes, thin and lazy only what was written.
func TestProvisioning(t *testing.T) {
	ctx := context.Background()
	for _, o := range []Options{{Thin: true}, {}, {Eager: true}} {
		d, err := Create(t.TempDir(), "d", 1<<20+512, o)
		must(t, err)
		_, err = d.WriteAt(make([]byte, 10), 600<<10)
		must(t, err)
		areas, err := d.Allocated(ctx, 0)
		must(t, err)
		whole := fmt.Sprint(areas) == fmt.Sprint([]vmdk.Area{{Length: 1<<20 + 512}})
		if whole != o.Eager || len(areas) != 1 {
			t.Errorf("%+v: allocated %v", o, areas)
		}
		if got := d.Descriptor(0).Value("ddb.thinProvisioned"); (got == "1") != o.Thin {
			t.Errorf("%+v: thinProvisioned %q", o, got)
		}
		if u, err := vmdk.ParseUUID(d.Descriptor(0).Value("ddb.uuid")); err != nil || u[0] != 0x60 {
			t.Errorf("uuid %x: %v", u, err)
		}
		must(t, d.Close())
	}
	if _, err := Create(t.TempDir(), "d", 1000, Options{}); err == nil {
		t.Error("a disk of 1000 bytes was made")
	}
}

// TestFormats: what a host chooses.
func TestFormats(t *testing.T) {
	for _, c := range []struct {
		vmfs int
		size int64
		want Format
	}{{5, 1 << 30, FormatCOWD}, {5, 2<<40 - 512, FormatCOWD}, {5, 2 << 40, FormatSESparse}, {6, 1 << 20, FormatSESparse}} {
		d, err := Create(t.TempDir(), "d", c.size, Options{Thin: true, VMFS: c.vmfs})
		must(t, err)
		must(t, d.Snapshot(FormatAuto))
		if got := d.Links()[1].Format; got != c.want {
			t.Errorf("VMFS %d, %d bytes: format %d, want %d", c.vmfs, c.size, got, c.want)
		}
		// The far end of large disks.
		_, err = d.WriteAt([]byte("end"), c.size-3)
		must(t, err)
		p := make([]byte, 4)
		if n, err := d.ReadAt(p, c.size-3); n != 3 || !errors.Is(err, io.EOF) || string(p[:3]) != "end" {
			t.Errorf("%d bytes %q: %v", n, p, err)
		}
		if _, end, err := d.NextData(context.Background(), 0); err != nil || end != c.size {
			t.Errorf("data ends at %d: %v", end, err)
		}
		must(t, d.RemoveSnapshot(context.Background(), 0, nil))
		must(t, d.Close())
	}
}

// TestBranches is how a host's tree of snapshots grows from a frozen link.
func TestBranches(t *testing.T) {
	d := newDisk(t, Options{Thin: true})
	_, err := d.WriteAt([]byte("one"), 0)
	must(t, err)
	must(t, d.EnableTracking(TrackingOptions{}))
	must(t, d.Snapshot(FormatAuto))
	_, err = d.WriteAt([]byte("two"), 0)
	must(t, err)
	base := d.Links()[0].Descriptor
	b, err := Open(base, Options{})
	must(t, err)
	defer b.Close()
	must(t, b.RevertTo(0, nil))
	_, err = b.WriteAt([]byte("3333"), 0)
	must(t, err)
	p := make([]byte, 4)
	_, err = d.ReadAt(p, 0)
	must(t, err)
	if string(p) != "two\x00" {
		t.Fatalf("first branch reads %q", p)
	}
	if got := b.Links()[1].Descriptor; got == d.Links()[1].Descriptor {
		t.Fatalf("both branches run on %s", got)
	}
	judge(t, b)
	judge(t, d)
}
