package esxisim

import (
	"context"
	"net/url"
	"os"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func newClient(ctx context.Context, sc *soap.Client, user *url.Userinfo) (*govmomi.Client, error) {
	vc, err := vim25.NewClient(ctx, sc)
	if err != nil {
		return nil, err
	}
	c := &govmomi.Client{Client: vc, SessionManager: session.NewManager(vc)}
	return c, c.Login(ctx, user)
}

// snapshot makes one through the API and fetches it.
func snapshot(t *testing.T, c *govmomi.Client, vm *object.VirtualMachine, name string) mo.VirtualMachineSnapshot {
	t.Helper()
	task, err := vm.CreateSnapshot(t.Context(), name, "", false, false)
	must(t, err)
	info, err := task.WaitForResult(t.Context(), nil)
	must(t, err)
	var s mo.VirtualMachineSnapshot
	must(t, vm.Properties(t.Context(), info.Result.(types.ManagedObjectReference), nil, &s))
	return s
}

func remove(t *testing.T, vm *object.VirtualMachine, s mo.VirtualMachineSnapshot, children bool) {
	t.Helper()
	yes := true
	task, err := vm.RemoveSnapshot(t.Context(), s.Self.Value, children, &yes)
	must(t, err)
	must(t, task.Wait(t.Context()))
}

func backing(t *testing.T, devices []types.BaseVirtualDevice) *types.VirtualDiskFlatVer2BackingInfo {
	t.Helper()
	for _, d := range devices {
		if d, ok := d.(*types.VirtualDisk); ok {
			return d.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
		}
	}
	t.Fatal("no disk")
	return nil
}

// areas asks for all changed areas, page by page.
func areas(t *testing.T, c *govmomi.Client, vm *object.VirtualMachine, s *types.ManagedObjectReference, since string, capacity int64) (list []types.DiskChangeExtent, pages int) {
	t.Helper()
	for off := int64(0); off < capacity; {
		res, err := methods.QueryChangedDiskAreas(t.Context(), c.Client, &types.QueryChangedDiskAreas{
			This: vm.Reference(), Snapshot: s, DeviceKey: 2000, StartOffset: off, ChangeId: since,
		})
		must(t, err)
		if res.Returnval.StartOffset != off || res.Returnval.Length <= 0 {
			t.Fatalf("asked at %d, told %+v", off, res.Returnval)
		}
		list = append(list, res.Returnval.ChangedArea...)
		off += res.Returnval.Length
		pages++
	}
	return list, pages
}

func TestSnapshotFreezes(t *testing.T) {
	for vmfs, running := range map[int]string{5: "web01-000001-delta.vmdk", 6: "web01-000001-sesparse.vmdk"} {
		h := start(t, Options{VMFS: vmfs})
		raw := image(t, 64*mib, 1)
		must(t, h.ImportVM(t.Context(), "web01", []string{raw}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
		want, err := os.ReadFile(raw)
		must(t, err)
		same(t, "imported", disk(t, h, "web01", 0), want)

		c := login(t, h)
		vm, p := vmOf(t, c, "web01")
		if p.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn || !*p.Config.ChangeTrackingEnabled {
			t.Fatalf("power %s, tracking %v", p.Runtime.PowerState, *p.Config.ChangeTrackingEnabled)
		}
		s1 := snapshot(t, c, vm, "one")
		b := backing(t, s1.Config.Hardware.Device)
		if b.FileName != "[datastore1] web01/web01.vmdk" || b.ChangeId == "" || b.Parent != nil {
			t.Errorf("frozen: %+v", b)
		}
		b = backing(t, props(t, vm).Config.Hardware.Device)
		if b.FileName != "[datastore1] web01/web01-000001.vmdk" || b.Parent == nil || b.Parent.FileName != "[datastore1] web01/web01.vmdk" {
			t.Errorf("running: %+v", b)
		}
		must(t, h.WriteAt("web01", 0, noise(100_000, 7), 5*mib+77))
		copy(want[5*mib+77:], noise(100_000, 7))
		same(t, "after the snapshot", disk(t, h, "web01", 0), want)
		if _, err := os.Stat(h.o.Dir + "/web01/" + running); err != nil {
			t.Error(err)
		}

		s2 := snapshot(t, c, vm, "two")
		first := backing(t, s1.Config.Hardware.Device).ChangeId
		list, _ := areas(t, c, vm, &s2.Self, first, 64*mib)
		if len(list) != 1 || list[0].Start > 5*mib+77 || list[0].Start+list[0].Length < 5*mib+100_077 || list[0].Length > 3*65536 {
			t.Errorf("changed: %+v", list)
		}
		remove(t, vm, s1, false)
		same(t, "after the removal", disk(t, h, "web01", 0), want)
		remove(t, vm, s2, false)
		same(t, "after all", disk(t, h, "web01", 0), want)
		if b := backing(t, props(t, vm).Config.Hardware.Device); b.FileName != "[datastore1] web01/web01.vmdk" || b.Parent != nil {
			t.Errorf("running: %+v", b)
		}
	}
}
