package hv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
)

const diskSize = 2 << 20

func open(t *testing.T, dir string, o Options) *Host {
	t.Helper()
	o.Dir, o.Datastore, o.Clock = dir, "datastore1", time.Now
	if o.Capacity == 0 {
		o.Capacity = 1 << 40
	}
	if o.VMFS == 0 {
		o.VMFS = 6
	}
	h, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func rawImage(t *testing.T, p []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.raw")
	if err := os.WriteFile(name, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// walker does random things to a VM and knows what must come of them.
type walker struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	o     Options
	h     *Host
	vm    *VM
	now   []byte
	snaps map[int]frozen
}

// frozen is a snapshot as it must stay.
type frozen struct {
	parent   int
	data     []byte
	changeID string
}

func (w *walker) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *walker) step() string {
	ids := make([]int, 0, len(w.snaps))
	for id := range w.snaps {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	switch n := w.rng.IntN(100); {
	case n < 50:
		if !w.vm.On() {
			w.must(w.vm.PowerOn())
		}
		p := make([]byte, 1+w.rng.IntN(90_000))
		if w.rng.IntN(4) > 0 { // else zeros
			rand.NewChaCha8([32]byte{byte(w.rng.Uint32()), byte(w.rng.Uint32())}).Read(p)
		}
		off := w.rng.IntN(len(w.now) - len(p) + 1)
		w.must(w.vm.WriteAt(0, p, int64(off)))
		copy(w.now[off:], p)
		return fmt.Sprintf("write %d at %d", len(p), off)
	case n < 68:
		if len(w.snaps) > 6 {
			return "nothing"
		}
		parent := w.vm.current
		id, err := w.vm.CreateSnapshot(SnapshotOptions{Name: "s"})
		w.must(err)
		info, err := w.vm.Info()
		w.must(err)
		var change string
		for _, s := range info.Snapshots {
			if s.ID == id {
				change = s.Disks[0].Links[len(s.Disks[0].Links)-1].ChangeID
			}
		}
		if change == "" {
			w.t.Error("a snapshot without a change id")
		}
		w.snaps[id] = frozen{parent, bytes.Clone(w.now), change}
		return fmt.Sprintf("snapshot %d on %d", id, parent)
	case n < 80:
		if len(ids) == 0 {
			return "nothing"
		}
		id, children := ids[w.rng.IntN(len(ids))], w.rng.IntN(4) == 0
		w.must(w.vm.RemoveSnapshot(context.Background(), id, children))
		for changed := true; changed; {
			changed = false
			for i, s := range w.snaps {
				if _, ok := w.snaps[s.parent]; children && s.parent != 0 && (s.parent == id || !ok) && i != id {
					delete(w.snaps, i)
					changed = true
				}
			}
			if children {
				delete(w.snaps, id)
			}
		}
		if s, ok := w.snaps[id]; ok {
			delete(w.snaps, id)
			for i, c := range w.snaps {
				if c.parent == id {
					c.parent = s.parent
					w.snaps[i] = c
				}
			}
		}
		return fmt.Sprintf("remove %d, children %v", id, children)
	case n < 82:
		w.must(w.vm.RemoveAllSnapshots(context.Background()))
		clear(w.snaps)
		return "remove all"
	case n < 88:
		if len(ids) == 0 {
			return "nothing"
		}
		id := ids[w.rng.IntN(len(ids))]
		w.must(w.vm.Revert(id))
		w.now = bytes.Clone(w.snaps[id].data)
		return fmt.Sprintf("revert to %d", id)
	case n < 92:
		if w.vm.On() {
			w.must(w.vm.PowerOff())
			return "power off"
		}
		w.must(w.vm.PowerOn())
		return "power on"
	case n < 94:
		image := bytes.Clone(w.now)
		copy(image[w.rng.IntN(len(image)-5000):], make([]byte, 5000))
		w.h.o.Logger.Debug("become")
		return w.become(image)
	default:
		on := w.vm.On()
		w.must(w.h.Close())
		w.h = open(w.t, w.dir, w.o)
		var err error
		w.vm, err = w.h.Find("vm")
		w.must(err)
		if w.vm.On() != on {
			w.t.Errorf("running %v after the restart, %v before", w.vm.On(), on)
		}
		return "restart"
	}
}

func (w *walker) become(data []byte) string {
	if !w.vm.On() {
		w.must(w.vm.PowerOn())
	}
	image := openRaw(w.t, rawImage(w.t, data))
	defer image.Close()
	n, err := w.vm.Become(context.Background(), 0, image)
	w.must(err)
	if n > 2*becomeBlock {
		w.t.Errorf("became another by writing %d bytes", n)
	}
	w.now = data
	return "become"
}

// check compares everything with what must be.
func (w *walker) check() {
	w.t.Helper()
	got := make([]byte, len(w.now))
	w.must(w.vm.ReadAt(0, got, 0))
	if !bytes.Equal(got, w.now) {
		w.t.Fatal("the guest sees something else")
	}
	if len(w.vm.snaps) != len(w.snaps) {
		w.t.Fatalf("%d snapshots, not %d", len(w.vm.snaps), len(w.snaps))
	}
	for _, s := range w.vm.snaps {
		want, ok := w.snaps[s.ID]
		if !ok || s.Parent != want.parent {
			w.t.Fatalf("snapshot %d stands on %d, not on %d", s.ID, s.Parent, want.parent)
		}
		d, err := vdisk.Open(w.h.abs(s.Disks[0].File), vdisk.Options{})
		w.must(err)
		_, err = d.ReadAt(got, 0)
		if err = errors.Join(err, d.Close()); err != nil || !bytes.Equal(got, want.data) {
			w.t.Fatalf("snapshot %d changed: %v", s.ID, err)
		}
		if s.Disks[0].ChangeID != want.changeID {
			w.t.Fatalf("snapshot %d has another change id", s.ID)
		}
		w.checkAreas(s, want)
	}
}

// checkAreas compares what tracking tells up to a snapshot with every state
// that it may tell from.
func (w *walker) checkAreas(s *Snapshot, want frozen) {
	w.t.Helper()
	for p := want.parent; p != 0; p = w.snaps[p].parent {
		old := w.snaps[p]
		areas, size, err := w.vm.Changed(context.Background(), s.ID, 2000, old.changeID)
		if uuid(old.changeID) != uuid(want.changeID) {
			if !errors.Is(err, ErrChangeID) {
				w.t.Fatalf("changes since another identity: %v", err)
			}
			continue
		}
		w.must(err)
		off := int64(0)
		for _, a := range append(areas, vmdk.Area{Offset: size}) {
			if !bytes.Equal(old.data[off:a.Offset], want.data[off:a.Offset]) {
				w.t.Fatalf("from snapshot %d to %d something from %d to %d changed untold", p, s.ID, off, a.Offset)
			}
			off = a.End()
		}
	}
}

func uuid(changeID string) string { u, _, _ := strings.Cut(changeID, "/"); return u }

func TestRandomWalk(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := &walker{t: t, rng: rand.New(rand.NewPCG(seed, 1)), dir: t.TempDir(), snaps: map[int]frozen{}}
			w.o.VMFS = 5 + int(seed%2)
			w.h = open(t, w.dir, w.o)
			defer func() {
				if err := w.h.Close(); err != nil {
					t.Error(err)
				}
			}()
			w.now = make([]byte, diskSize)
			copy(w.now[1<<20:], bytes.Repeat([]byte("begin"), 50_000))
			vm, err := w.h.Import(t.Context(), "vm", []string{rawImage(t, w.now)}, ImportOptions{ChangeTracking: true, Thin: true})
			w.must(err)
			w.vm = vm
			var log []string
			defer func() {
				if t.Failed() {
					t.Log(strings.Join(log[max(0, len(log)-25):], "\n"))
				}
			}()
			for range 90 {
				log = append(log, w.step())
				w.check()
			}
			w.must(w.vm.RemoveAllSnapshots(t.Context()))
			clear(w.snaps)
			w.check()
			if links := w.vm.disks[0].seen().links; len(links) != 1 {
				t.Errorf("%d links are left", len(links))
			}
			left, err := filepath.Glob(filepath.Join(w.dir, "vm", "*-0*"))
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v %v", left, err)
			}
		})
	}
}

func TestConfigKeepsItsLines(t *testing.T) {
	h := open(t, t.TempDir(), Options{})
	defer h.Close()
	vm, err := h.Import(t.Context(), "vm", []string{rawImage(t, make([]byte, 1<<20))}, ImportOptions{ChangeTracking: true})
	if err != nil {
		t.Fatal(err)
	}
	name := h.abs(vm.path)
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Unregister(); err != nil {
		t.Fatal(err)
	}
	odd := append(text, "# a remark\nodd.key = \"it|22s\"\nno assignment\n"...)
	if err := os.WriteFile(name, odd, 0o600); err != nil {
		t.Fatal(err)
	}
	if vm, err = h.Register(vm.path, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.CreateSnapshot(SnapshotOptions{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(string(odd), `scsi0:0.fileName = "vm.vmdk"`, `scsi0:0.fileName = "vm-000001.vmdk"`, 1)
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	x, err := vmx.Parse(got)
	if err != nil || len(x.Disks()) != 1 {
		t.Error(err, x.Disks())
	}
}
