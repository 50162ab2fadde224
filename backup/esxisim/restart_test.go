package esxisim

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
)

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	h := start(t, Options{Dir: dir})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{ChangeTracking: true, PowerOn: true}))
	must(t, h.ImportVM(t.Context(), "off", []string{image(t, 2*mib, 1)}, VMOptions{}))
	if _, err := Start(t.Context(), Options{Dir: dir}); err == nil {
		t.Error("two hosts have one directory")
	}
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	s1 := snapshot(t, c, vm, "1")
	must(t, h.WriteAt("vm", 0, noise(100_000, 3), mib))
	want, pin := disk(t, h, "vm", 0), h.Thumbprint()
	c.Logout(t.Context())
	must(t, h.Close())
	must(t, h.Close())

	h = start(t, Options{Dir: dir})
	if h.Thumbprint() != pin {
		t.Error("another certificate")
	}
	same(t, "after the restart", disk(t, h, "vm", 0), want)
	c = login(t, h)
	vm, p := vmOf(t, c, "vm")
	if p.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn || p.Snapshot == nil || p.Snapshot.CurrentSnapshot.Value != s1.Self.Value {
		t.Errorf("%s, %+v", p.Runtime.PowerState, p.Snapshot)
	}
	if _, p := vmOf(t, c, "off"); p.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		t.Error("it was off")
	}
	s2 := snapshot(t, c, vm, "2")
	list, _ := areas(t, c, vm, &s2.Self, backing(t, s1.Config.Hardware.Device).ChangeId, 4*mib)
	if len(list) == 0 || list[0].Start > mib {
		t.Errorf("changed: %+v", list)
	}
}

// TestManySessions is for the race detector: several clients snapshot, read and
// list while guests write.
func TestManySessions(t *testing.T) {
	h := start(t, Options{MaxInFlight: 64})
	const vms, rounds = 3, 2
	for i := range vms {
		must(t, h.ImportVM(t.Context(), fmt.Sprintf("vm%d", i), []string{image(t, 4*mib, uint64(i))}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var guests, clients sync.WaitGroup
	for i := range vms {
		guests.Go(func() {
			for n := uint64(0); ctx.Err() == nil; n++ {
				if err := h.WriteAt(fmt.Sprintf("vm%d", i), 0, noise(5000, n), int64(n%800)*5000); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	for i := range 2 * vms {
		c := login(t, h)
		w := browse(t, h)
		w.enter()
		name := fmt.Sprintf("vm%d", i%vms)
		vm, _ := vmOf(t, c, name)
		clients.Go(func() {
			for n := range rounds {
				task, err := vm.CreateSnapshot(ctx, fmt.Sprintf("%d-%d", i, n), "", false, false)
				if err != nil {
					t.Error(err)
					return
				}
				info, err := task.WaitForResult(ctx, nil)
				if err != nil {
					t.Error(err)
					return
				}
				ref := info.Result.(types.ManagedObjectReference)
				var all []mo.VirtualMachine
				if err := property.DefaultCollector(c.Client).Retrieve(ctx, []types.ManagedObjectReference{vm.Reference()}, nil, &all); err != nil {
					t.Error(err)
				}
				if _, err := methods.QueryChangedDiskAreas(ctx, c.Client, &types.QueryChangedDiskAreas{This: vm.Reference(), Snapshot: &ref, DeviceKey: 2000, ChangeId: "*"}); err != nil {
					t.Error(err)
				}
				if _, _, err := w.do(http.MethodGet, w.url("/"+name+"/"+name+"-flat.vmdk"), nil); err != nil {
					t.Error(err)
				}
				if _, err := find.NewFinder(c.Client).VirtualMachineList(ctx, "*"); err != nil {
					t.Error(err)
				}
				yes := true
				task, err = vm.RemoveSnapshot(ctx, ref.Value, false, &yes)
				if err == nil {
					err = task.Wait(ctx)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	clients.Wait()
	cancel()
	guests.Wait()
	for _, vm := range h.hv.VMs() {
		info, err := vm.Info()
		must(t, err)
		if len(info.Disks[0].Links) != 1 || len(info.Snapshots) != 0 {
			t.Errorf("left: %+v, %+v", info.Disks[0].Links, info.Snapshots)
		}
	}
}

// TestTwoHosts is for the race detector too: hosts in one process share
// nothing, govmomi's templates of a host included.
func TestTwoHosts(t *testing.T) {
	var both sync.WaitGroup
	for i := range 2 {
		dir, raw := t.TempDir(), image(t, 4*mib, uint64(i))
		both.Go(func() {
			h, err := Start(t.Context(), Options{Dir: dir})
			if err != nil {
				t.Error(err)
				return
			}
			name := fmt.Sprintf("vm%d", i)
			err = h.ImportVM(t.Context(), name, []string{raw}, VMOptions{PowerOn: true})
			if err == nil {
				_, err = h.hv.VMs()[0].CreateSnapshot(hv.SnapshotOptions{Name: "s"})
			}
			if names := h.VMs(); err != nil || len(names) != 1 || names[0] != name {
				t.Error(names, err)
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
}
