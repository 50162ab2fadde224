package backup

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
	"hikae/repo"
)

var tracked = esxisim.VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}

func area0(off, n int64) area { return area{Offset: off, Length: n} }

func TestFullThenIncremental(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked,
		image(t, 64*mib, 1, area0(0, 3*mib), area0(40*mib+7*512, 100000), area0(64*mib-512, 512)),
		image(t, 33*mib+512, 2, area0(mib, mib)))
	first := w.backup()
	if first.Mode != repo.ModeFull || first.Reason == "" || first.Consistency != repo.ConsistencyCrash {
		t.Errorf("first: %+v", first)
	}
	if first.BytesRead > 8*mib || first.BytesCapacity != 97*mib+512 {
		t.Errorf("a full backup of sparse disks read %d of %d bytes", first.BytesRead, first.BytesCapacity)
	}
	w.sameAsGuest(first.Ref)
	w.noSnapshots()

	w.write(0, 5*mib+1000, 3000, 10)
	w.write(0, 64*mib-100, 100, 11)
	w.write(1, 33*mib, 512, 12)
	w.sim.ResetStats()
	second := w.backup()
	if second.Mode != repo.ModeIncremental || second.Reason != "" {
		t.Errorf("second: %+v", second)
	}
	if float64(second.BytesRead) > 1.1*float64(second.BytesChanged) || second.BytesChanged > mib || second.BytesAudited == 0 {
		t.Errorf("second read %d bytes for %d changed, audited %d", second.BytesRead, second.BytesChanged, second.BytesAudited)
	}
	if out := w.sim.Stats().Folder.BytesOut; out > second.BytesRead+second.BytesAudited+64*kib {
		t.Errorf("%d bytes crossed the wire, the result says %d and %d", out, second.BytesRead, second.BytesAudited)
	}
	w.sameAsGuest(second.Ref)
	w.noSnapshots()
	w.checkRepo()

	third := w.backup()
	if third.Mode != repo.ModeIncremental || third.BytesChanged != 0 || third.BytesRead != 0 {
		t.Errorf("nothing changed: %+v", third)
	}
	w.sameAsGuest(third.Ref)
	if full := w.backup(func(o *Options) { o.Full = true }); full.Mode != repo.ModeFull || full.BytesStored > mib {
		t.Errorf("a full backup of known blocks: %+v", full)
	} else {
		w.sameAsGuest(full.Ref)
	}
}

// The generation's folder must describe itself as an ordinary VM's.
func TestFolder(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 8*mib, 1, area0(0, mib)), image(t, 9*mib, 2, area0(0, mib)))
	g := w.generation(w.backup().Ref)
	m := g.Manifest()
	if m.VM != (repo.VMID{Host: "esx1", Name: "web01"}) || m.Guest.UUID == "" || m.Guest.PowerState != "poweredOn" || m.Host.Version == "" {
		t.Errorf("manifest: %+v", m)
	}
	var config *vmx.File
	for _, f := range m.Files {
		if strings.HasSuffix(f.Name, ".vmx") {
			c, err := vmx.Parse(f.Data)
			must(t, err)
			config = c
		}
	}
	if config == nil {
		t.Fatal("no configuration")
	}
	slots := config.Disks()
	if len(slots) != 2 {
		t.Fatalf("the configuration has %v", slots)
	}
	for i, d := range m.Disks {
		if slots[i].File != d.Name+".vmdk" {
			t.Errorf("disk %d is %s, the configuration says %s", i, d.Name, slots[i].File)
		}
		desc, err := vmdk.ParseDescriptor([]byte(d.Descriptor))
		must(t, err)
		if desc.Version != 1 || desc.ChangeTrackPath != "" || desc.ParentFileNameHint != "" || desc.Capacity() != d.Capacity ||
			desc.Extents[0].File != d.Name+"-flat.vmdk" {
			t.Errorf("descriptor: %s", d.Descriptor)
		}
		if d.ChangeID == "" || d.UUID == "" || d.Mode != repo.ModeFull {
			t.Errorf("disk: %+v", d)
		}
	}
}

func TestScanWithoutTracking(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", esxisim.VMOptions{PowerOn: true}, image(t, 64*mib, 1, area0(0, 8*mib)))
	first := w.backup()
	if first.Mode != repo.ModeFull || !strings.Contains(first.Reason, "change tracking is off") {
		t.Errorf("first: %+v", first)
	}
	w.write(0, 9*mib, 4096, 3)
	w.write(0, 0, 4096, 4)
	second := w.backup()
	if second.Mode != repo.ModeScan || second.Reason != "change tracking is off" {
		t.Errorf("second: %+v", second)
	}
	if second.BytesStored > mib {
		t.Errorf("a scan stored %d bytes for two changed blocks", second.BytesStored)
	}
	w.sameAsGuest(second.Ref)
	w.checkRepo()
}

// The free licence forbids snapshots: nothing is left, and the kind of error
// comes through.
func TestFreeLicence(t *testing.T) {
	w := newWorld(t, esxisim.Options{Free: true})
	w.addVM("web01", tracked, image(t, 8*mib, 1, area0(0, mib)))
	if _, err := w.try(); !errors.Is(err, esxi.ErrRestricted) || errors.Is(err, ErrSnapshotLeft) {
		t.Errorf("%v", err)
	}
	w.noSnapshots()
}

// The cost of an incremental run must be that of the changes, whatever the
// disk's size.
func TestSizeDoesNotMatter(t *testing.T) {
	var cost [2]Result
	var wire [2]int64
	for i, size := range []int64{8 << 30, 800 << 30} {
		w := newWorld(t, esxisim.Options{})
		w.addVM("web01", tracked, image(t, size, 1, area0(0, 4*mib), area0(size/2, 4*mib), area0(size-mib, mib)))
		w.backup()
		for n := range int64(40) {
			w.write(0, size/50*n, 8192, uint64(n))
		}
		w.write(0, size/2, 2*mib, 99)
		w.sim.ResetStats()
		cost[i] = w.backup(func(o *Options) { o.Clock = nil })
		wire[i] = w.sim.Stats().Folder.BytesOut
		if cost[i].Mode != repo.ModeIncremental {
			t.Errorf("%d bytes: %+v", size, cost[i])
		}
		if cost[i].BytesRead*10 > cost[i].BytesChanged*11 {
			t.Errorf("read %d for %d changed", cost[i].BytesRead, cost[i].BytesChanged)
		}
		w.sameAsGuest(cost[i].Ref)
	}
	t.Logf("8 GiB: %d changed, %d read, %d on the wire, %.2f s; 800 GiB: %d, %d, %d, %.2f s", cost[0].BytesChanged, cost[0].BytesRead,
		wire[0], cost[0].Seconds, cost[1].BytesChanged, cost[1].BytesRead, wire[1], cost[1].Seconds) // for people; no test depends on it
	// Tracking is coarser on larger disks, so the areas may be larger, but not
	// with the disk.
	if cost[1].BytesRead > 12*cost[0].BytesRead {
		t.Errorf("800 GiB: %d bytes read, 8 GiB: %d", cost[1].BytesRead, cost[0].BytesRead)
	}
	if cost[1].BytesAudited != cost[0].BytesAudited {
		t.Errorf("audits differ: %d and %d", cost[1].BytesAudited, cost[0].BytesAudited)
	}
}

func TestALieMakesAScan(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 4*mib)), image(t, 8*mib, 2, area0(0, mib)))
	w.backup()
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultLie, VM: "web01"}); err != nil {
		t.Fatal(err)
	}
	w.write(0, 2*mib+5, 512, 7) // missed
	w.write(1, 3*mib, 512, 8)   // tracked
	all := func(o *Options) { o.AuditBlocks = 1000 }
	res := w.backup(all)
	if res.Mode != repo.ModeScan || !strings.Contains(res.Reason, "said to be unchanged") {
		t.Errorf("%+v", res)
	}
	for _, d := range res.Disks {
		if d.Mode != repo.ModeScan || d.BytesRead != d.BytesCapacity {
			t.Errorf("a lie about one disk ends the trust in all: %+v", d)
		}
	}
	if len(res.Warnings) == 0 || !strings.Contains(res.Warnings[0], "cannot be trusted") {
		t.Errorf("the operator is not told: %q", res.Warnings)
	}
	w.sameAsGuest(res.Ref)
	if next := w.backup(all); next.Mode != repo.ModeIncremental {
		t.Errorf("after the scan: %+v", next)
	}
	w.checkRepo()
}

func TestPowerAndQuiesce(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", esxisim.VMOptions{ChangeTracking: true, Thin: true}, image(t, 8*mib, 1, area0(0, mib)))
	if res := w.backup(func(o *Options) { o.Quiesce = true }); res.Consistency != repo.ConsistencyOff {
		t.Errorf("%+v", res)
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, esxisim.Options{DatastoreBytes: 4 << 30})
	w.addVM("web01", tracked, image(t, 8*mib, 1, area0(0, mib)))
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSpace, Free: 500 * mib}); err != nil {
		t.Fatal(err)
	}
	_, err := w.try()
	if !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "500.0 MiB free") || !strings.Contains(err.Error(), "1.0 GiB") {
		t.Errorf("no room: %v", err)
	}
	w.sim.ClearFaults()
	w.noSnapshots()
	if _, err := w.try(func(o *Options) { o.VM = "nobody" }); err == nil {
		t.Error("a VM that is not there was backed up")
	}
	unlock, err := lockVM(w.state, "esx1", "web01")
	must(t, err)
	if _, err := w.try(); !errors.Is(err, ErrRunning) {
		t.Errorf("a VM that another run has in hand: %v", err)
	}
	unlock()
	w.backup()
}

func TestConnectionTrouble(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 14*mib)))
	for _, f := range []esxisim.Fault{
		{Kind: esxisim.FaultDrop, After: 300000, Count: 3, Verb: "GET", Path: "flat"},
		{Kind: esxisim.FaultExpire},
		{Kind: esxisim.FaultBusy, Count: 5},
		{Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", Lost: true},
		{Kind: esxisim.FaultCall, Method: "RemoveSnapshot_Task", Lost: true},
	} {
		t.Run(f.Kind+f.Method, func(t *testing.T) {
			if _, err := w.sim.Inject(f); err != nil {
				t.Fatal(err)
			}
			res := w.backup(func(o *Options) { o.Full = true })
			w.sim.ClearFaults()
			w.sameAsGuest(res.Ref)
			w.noSnapshots()
		})
	}
	w.checkRepo()
}

// When the snapshot cannot be removed, the run says so, and the next one does it.
func TestSnapshotLeftBehind(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 8*mib, 1, area0(0, mib)))
	vm, err := w.host.VM(t.Context(), "web01")
	must(t, err)
	if _, err := w.host.CreateSnapshot(t.Context(), vm, "hikae-0123456789abcdef", "somebody else's", false); err != nil {
		t.Fatal(err)
	}
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "RemoveSnapshot_Task", Fault: "GenericVmConfigFault", InTask: true, Count: -1}); err != nil {
		t.Fatal(err)
	}
	res, err := w.try()
	if !errors.Is(err, ErrSnapshotLeft) || !strings.Contains(err.Error(), "the next run") {
		t.Fatalf("%v", err)
	}
	if res.Ref.Sequence == 0 {
		t.Fatalf("the generation was made all the same: %+v", res)
	}
	w.sameAsGuest(res.Ref)
	w.sim.ClearFaults()
	w.write(0, 4096, 4096, 5)
	res = w.backup()
	if len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "was removed") {
		t.Errorf("%q", res.Warnings)
	}
	w.sameAsGuest(res.Ref)
	vm, err = w.host.VM(t.Context(), "web01")
	must(t, err)
	if len(vm.Snapshots) != 1 || vm.Snapshots[0].Description != "somebody else's" {
		t.Errorf("snapshots left: %+v", vm.Snapshots)
	}
}

// A VM with snapshots of its own is read through its chain.
func TestChain(t *testing.T) {
	w := newWorld(t, esxisim.Options{VMFS: 5})
	w.addVM("web01", tracked, image(t, 32*mib, 1, area0(0, 4*mib)))
	for i := range 2 {
		vm, err := w.host.VM(t.Context(), "web01")
		must(t, err)
		if _, err := w.host.CreateSnapshot(t.Context(), vm, "mine", "", false); err != nil {
			t.Fatal(err)
		}
		w.write(0, int64(3+10*i)*mib+77, 200000, uint64(20+i))
	}
	first := w.backup()
	w.sameAsGuest(first.Ref)
	w.write(0, 30*mib, 1000, 9)
	second := w.backup()
	w.sameAsGuest(second.Ref)
	if second.Mode != repo.ModeIncremental {
		t.Errorf("%+v", second)
	}
	vm, err := w.host.VM(t.Context(), "web01")
	must(t, err)
	if len(vm.Snapshots) != 2 {
		t.Errorf("the VM's own snapshots: %+v", vm.Snapshots)
	}
}

// Ctrl-C at any moment leaves no snapshot and a sound repository.
func TestCancelled(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 32*mib, 1, area0(0, 30*mib)))
	for _, phase := range []string{PhaseCheck, PhaseSnapshot, PhaseAudit, PhaseRead, PhaseCommit} {
		t.Run(phase, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			stop := errors.New("enough")
			o := w.options()
			o.Progress = func(e Event) {
				if e.Phase == phase && (phase != PhaseRead || e.Done > 10*mib) {
					cancel(stop)
				}
			}
			began := time.Now()
			res, err := Run(ctx, o)
			if stopped := errors.Is(err, stop) || errors.Is(err, context.Canceled); !stopped || res.Ref.Sequence != 0 {
				t.Errorf("%v, %+v", err, res)
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v to stop", took)
			}
			w.noSnapshots()
		})
	}
	w.sameAsGuest(w.backup().Ref)
	w.checkRepo()
}

// Somebody who removes snapshots while they are read spoils what was read: it
// must not become a generation.
func TestSnapshotsRemovedMeanwhile(t *testing.T) {
	for _, ours := range []bool{true, false} {
		w := newWorld(t, esxisim.Options{})
		w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 8*mib)))
		vm, err := w.host.VM(t.Context(), "web01")
		must(t, err)
		if _, err := w.host.CreateSnapshot(t.Context(), vm, "mine", "", false); err != nil {
			t.Fatal(err)
		}
		w.write(0, 3*mib, 10000, 5)
		first := w.backup()
		w.write(0, 9*mib, 10000, 6)
		done := false
		res, err := w.try(func(o *Options) {
			o.Progress = func(e Event) {
				if e.Phase != PhaseRead || e.Done == 0 || done {
					return
				}
				done = true
				now, err := w.host.VM(t.Context(), "web01")
				must(t, err)
				for _, s := range now.Snapshots {
					if strings.HasPrefix(s.Name, snapshotPrefix) == ours {
						must(t, w.host.RemoveSnapshot(t.Context(), s.ID))
					}
				}
			}
		})
		if !done || err == nil || res.Ref.Sequence != 0 {
			t.Errorf("ours %v: %v %+v", ours, err, res)
		}
		t.Log(err)
		w.noSnapshots()
		latest, err := w.repo.Resolve(t.Context(), first.Ref.VM, "latest")
		must(t, err)
		if latest != first.Ref {
			t.Errorf("the latest generation is %v", latest)
		}
		w.sameAsGuest(w.backup().Ref)
	}
}
