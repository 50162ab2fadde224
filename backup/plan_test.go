package backup

import (
	"context"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/repo"
)

// oldDisk makes a generation with one disk of the given content and opens it.
func (w *world) oldDisk(raw string) *repo.Disk {
	w.t.Helper()
	res, err := Import(w.t.Context(), ImportOptions{Repo: w.repo, VM: repo.VMID{Host: "esx1", Name: "old"}, Disks: []string{raw}, Clock: w.now})
	must(w.t, err)
	d, err := w.generation(res.Ref).OpenDisk(0)
	must(w.t, err)
	return d
}

func TestPlans(t *testing.T) {
	const b = 128 * kib
	w := newWorld(t, esxisim.Options{})
	parentDisk := w.oldDisk(image(t, 64*b, 1, area0(0, b)))
	small := w.oldDisk(image(t, 32*b+512, 2, area0(0, b)))
	const then, now, other = "aa bb/3", "aa bb/4", "cc dd/9"
	told := map[string][]area{then: {area0(b+1, 5)}, "*": {area0(0, b), area0(40*b, b), area0(63*b, b)}}
	deaf := func(context.Context, *diskPlan, string) ([]area, string, error) {
		return nil, "the host cannot tell", nil
	}
	for name, c := range map[string]struct {
		full           bool
		parent         *repo.Disk
		first          bool // the VM has no generation
		then, now      string
		deaf           bool
		doubt          string
		mode, reason   string
		areas          []area
		zeros, sampled bool
	}{
		"first": {
			first: true, now: now, mode: repo.ModeFull, reason: "first generation of this VM",
			areas: told["*"], zeros: true, sampled: true,
		},
		"first, tracking off, allocation known": {
			first: true, mode: repo.ModeFull, reason: "first generation of this VM; change tracking is off, so all that is allocated was read",
			areas: told["*"], zeros: true, sampled: true,
		},
		"tracking off, allocation known": {
			parent: parentDisk, then: then, mode: repo.ModeScan, reason: "change tracking is off", areas: told["*"], zeros: true, sampled: true,
		},
		"first, tracking off": {
			first: true, deaf: true, mode: repo.ModeFull, reason: "first generation of this VM; change tracking is off, so everything was read",
			areas: []area{area0(0, 64*b)},
		},
		"asked for": {
			full: true, parent: parentDisk, then: then, now: now, mode: repo.ModeFull, reason: "a full backup was asked for",
			areas: told["*"], zeros: true, sampled: true,
		},
		"new disk":    {now: now, mode: repo.ModeFull, reason: "the previous generation does not have this disk", areas: told["*"], zeros: true, sampled: true},
		"incremental": {parent: parentDisk, then: then, now: now, mode: repo.ModeIncremental, areas: []area{area0(b, b)}, sampled: true},
		"reset": {
			parent: parentDisk, then: then, now: other, mode: repo.ModeScan, reason: "change tracking was reset since the previous generation",
			areas: told["*"], zeros: true, sampled: true,
		},
		"reverted":     {parent: parentDisk, then: now, now: then, mode: repo.ModeScan, reason: "the disk was reverted to a state before the previous generation", areas: told["*"], zeros: true, sampled: true},
		"tracking off": {parent: parentDisk, then: then, deaf: true, mode: repo.ModeScan, reason: "change tracking is off", areas: []area{area0(0, 64*b)}},
		"deaf host":    {parent: parentDisk, then: then, now: now, deaf: true, mode: repo.ModeScan, reason: "the host cannot tell", areas: []area{area0(0, 64*b)}},
		"doubt":        {parent: parentDisk, then: then, now: now, doubt: "it lied", mode: repo.ModeScan, reason: "it lied", areas: []area{area0(0, 64*b)}},
		"grown": {
			parent: small, then: then, now: now, mode: repo.ModeIncremental, reason: "the disk has grown since the previous generation",
			areas: []area{area0(b, b), area0(32*b, b), area0(40*b, b), area0(63*b, b)}, sampled: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := &run{Options: Options{Full: c.full, VM: "web01"}, worker: worker{log: orDiscard(nil)}}
			r.oracle = func(_ context.Context, _ *diskPlan, since string) ([]area, string, error) {
				return slices.Clone(told[since]), "", nil
			}
			if c.deaf {
				r.oracle = deaf
			}
			if !c.first {
				r.parent = &parent{}
			}
			p := &diskPlan{disk: esxi.Disk{Capacity: 64 * b, ChangeID: c.now}, parent: c.parent, block: b}
			if c.parent != nil {
				p.before = &repo.DiskManifest{ChangeID: c.then}
			}
			must(t, r.plan(t.Context(), p, c.doubt))
			if p.mode != c.mode || p.reason != c.reason || p.zeros != c.zeros || p.told != c.sampled || !slices.Equal(p.areas, c.areas) {
				t.Errorf("mode %s, reason %q, zeros %v, sampled %v, areas %v", p.mode, p.reason, p.zeros, p.told, p.areas)
			}
			if p.changed != total(c.areas) {
				t.Errorf("%d bytes changed, want %d", p.changed, total(c.areas))
			}
		})
	}
}

func TestSamples(t *testing.T) {
	const b = 128 * kib
	w := newWorld(t, esxisim.Options{})
	old := w.oldDisk(image(t, 4096*b, 1, area0(100*b, 40*b), area0(3000*b, 8*b)))
	cover := []area{area0(0, 10*b), area0(110*b, 5*b), area0(4000*b, 96*b)}
	p := &diskPlan{disk: esxi.Disk{Capacity: old.Size()}, parent: old, block: b, areas: cover}
	data := 0
	for range 20 {
		got, err := choose(t.Context(), p, 16)
		must(t, err)
		seen := map[int64]bool{}
		for _, a := range got {
			seen[a.Offset] = true
		}
		if len(got) != 16 || len(seen) != 16 {
			t.Errorf("%d samples of %d blocks", len(got), len(seen))
		}
		for _, a := range got {
			if len(intersect([]area{a}, cover)) > 0 {
				t.Errorf("%v is not left out", a)
			}
			if len(intersect([]area{a}, []area{area0(100*b, 40*b), area0(3000*b, 8*b)})) > 0 {
				data++
			}
		}
	}
	if data < 20*8 {
		t.Errorf("%d of %d samples are on data; half should be", data, 20*16)
	}
	all, err := choose(t.Context(), p, 5000)
	must(t, err)
	if len(all) != 4096-111 {
		t.Errorf("%d blocks when all were asked for", len(all))
	}
}

// A previous generation whose packs are gone must not stop the next one.
func TestDamagedParent(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 4*mib)))
	w.backup()
	w.write(0, 8*mib, 4096, 5)
	must(t, filepath.WalkDir(filepath.Join(w.dir, "meta"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Remove(path)
	}))
	w.open()
	res := w.backup()
	if res.Mode != repo.ModeFull || !strings.Contains(res.Reason, "previous generation is damaged") {
		t.Errorf("%+v", res)
	}
	w.sameAsGuest(res.Ref)
	w.write(0, 9*mib, 4096, 6)
	res = w.backup()
	if res.Mode != repo.ModeIncremental {
		t.Errorf("%+v", res)
	}
	w.sameAsGuest(res.Ref)
}

// setTracking switches change tracking as an operator would, powered off.
func (w *world) setTracking(on bool) {
	w.t.Helper()
	ctx := w.t.Context()
	u, err := soap.ParseURL("https://" + w.sim.Address() + "/sdk")
	must(w.t, err)
	c, err := govmomi.NewClient(ctx, &url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, User: url.UserPassword(w.sim.User(), w.sim.Password())}, true)
	must(w.t, err)
	defer c.DefaultTransport().CloseIdleConnections()
	defer c.Logout(ctx)
	vm, err := find.NewFinder(c.Client).VirtualMachine(ctx, "web01")
	must(w.t, err)
	must(w.t, w.sim.PowerOff("web01"))
	task, err := vm.Reconfigure(ctx, types.VirtualMachineConfigSpec{ChangeTrackingEnabled: &on})
	must(w.t, err)
	must(w.t, task.Wait(ctx))
	must(w.t, w.sim.PowerOn("web01"))
}

func TestTrackingReset(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 4*mib)))
	w.backup()
	w.setTracking(false)
	w.write(0, 8*mib, 4096, 5)
	off := w.backup()
	if off.Mode != repo.ModeScan || off.Reason != "change tracking is off" {
		t.Errorf("%+v", off)
	}
	w.sameAsGuest(off.Ref)
	w.setTracking(true)
	w.write(0, 9*mib, 4096, 6)
	on := w.backup()
	if on.Mode != repo.ModeScan || on.Reason != "change tracking was off at the previous generation" || on.BytesRead > 8*mib {
		t.Errorf("%+v", on)
	}
	w.sameAsGuest(on.Ref)
	w.setTracking(false)
	w.write(0, 10*mib, 4096, 7) // nobody saw this
	w.setTracking(true)
	reset := w.backup()
	if reset.Mode != repo.ModeScan || !strings.Contains(reset.Reason, "reset") {
		t.Errorf("%+v", reset)
	}
	w.sameAsGuest(reset.Ref)
	w.write(0, 11*mib, 4096, 8)
	if last := w.backup(); last.Mode != repo.ModeIncremental {
		t.Errorf("%+v", last)
	} else {
		w.sameAsGuest(last.Ref)
	}
}
