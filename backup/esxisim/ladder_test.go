package esxisim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/vmdk"
)

// What happens to a VM between two backups, and what of it shows.

// snapshotIDOf makes a snapshot and returns it with its disk's change id.
func snapshotIDOf(t *testing.T, h *Host, vm *object.VirtualMachine, name string) (types.ManagedObjectReference, string) {
	t.Helper()
	s := snapshot(t, login(t, h), vm, name)
	return s.Self, backing(t, s.Config.Hardware.Device).ChangeId
}

func tracked(t *testing.T, o Options) (*Host, *object.VirtualMachine) {
	t.Helper()
	h := sshHost(t, o)
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 16*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
	vm, _ := vmOf(t, login(t, h), "vm")
	return h, vm
}

func uuidOf(t *testing.T, id string) [16]byte {
	t.Helper()
	uuid, _, err := vmdk.ParseChangeID(id)
	must(t, err)
	return uuid
}

func ctk(t *testing.T, h *Host, name string) ([]byte, int64) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(h.o.Dir, "vm", name))
	must(t, err)
	return text, int64(len(text))
}

func changedBytes(t *testing.T, h *Host, vm *object.VirtualMachine, s types.ManagedObjectReference, since string, size int64) (sum int64) {
	t.Helper()
	list, _ := areas(t, login(t, h), vm, &s, since, size)
	for _, a := range list {
		sum += a.Length
	}
	return sum
}

func TestGrownDisk(t *testing.T) {
	h, vm := tracked(t, Options{})
	_, id := snapshotIDOf(t, h, vm, "a")
	if err := h.GrowDisk("vm", 0, 32*mib); err == nil {
		t.Error("a disk with a snapshot grows")
	}
	must(t, h.RemoveSnapshot("vm", "a"))
	must(t, h.GrowDisk("vm", 0, 32*mib))
	must(t, h.WriteAt("vm", 0, noise(mib, 9), 31*mib))
	if err := h.GrowDisk("vm", 0, 16*mib); err == nil {
		t.Error("it shrinks")
	}
	if p := props(t, vm); !strings.Contains(p.Config.Hardware.Device[len(p.Config.Hardware.Device)-2].GetVirtualDevice().DeviceInfo.GetDescription().Summary, "32,768 KB") {
		t.Error("the VM does not know its disk's size")
	}
	s, later := snapshotIDOf(t, h, vm, "b")
	if uuidOf(t, id) != uuidOf(t, later) {
		t.Error("growing gave tracking a new identity: clients would not be tempted")
	}
	if got := changedBytes(t, h, vm, s, id, 32*mib); got != mib {
		t.Error("changed:", got)
	}
	if text, size := ctk(t, h, "vm-ctk.vmdk"); size != 512+4*512 || len(text) == 0 {
		t.Error("tracking file of", size)
	}
	must(t, h.RemoveSnapshot("vm", "b"))
	must(t, h.PowerOff("vm"))
	must(t, h.PowerOn("vm"))
	got := disk(t, h, "vm", 0)
	same(t, "the end", got[31*mib:], noise(mib, 9))
}

func TestRevertedVM(t *testing.T) {
	h, vm := tracked(t, Options{})
	_, id := snapshotIDOf(t, h, vm, "a")
	before := disk(t, h, "vm", 0)
	must(t, h.WriteAt("vm", 0, noise(mib, 9), 5*mib))
	if err := h.Revert("vm", "none"); err == nil {
		t.Error("reverted to nothing")
	}
	must(t, h.Revert("vm", "a"))
	same(t, "reverted", disk(t, h, "vm", 0), before)
	must(t, h.PowerOn("vm"))
	if _, later := snapshotIDOf(t, h, vm, "b"); uuidOf(t, id) == uuidOf(t, later) {
		t.Error("the change id is of the same epoch")
	}
}

func TestTrackingWithSnapshotsMisses(t *testing.T) {
	h := sshHost(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 16*mib, 1)}, VMOptions{Thin: true, PowerOn: true}))
	vm, _ := vmOf(t, login(t, h), "vm")
	must(t, h.Snapshot("vm", "old"))
	must(t, h.TrackWithSnapshots("vm"))
	must(t, h.WriteAt("vm", 0, noise(mib, 3), 2*mib)) // missed
	_, id := snapshotIDOf(t, h, vm, "a")
	must(t, h.WriteAt("vm", 0, noise(mib, 4), 4*mib))
	s, _ := snapshotIDOf(t, h, vm, "b")
	if got := changedBytes(t, h, vm, s, id, 16*mib); got != mib {
		t.Error("after the next snapshot tracking sees", got)
	}
}

func TestCrashedHost(t *testing.T) {
	h, vm := tracked(t, Options{})
	_, id := snapshotIDOf(t, h, vm, "a")
	must(t, h.WriteAt("vm", 0, noise(mib, 9), 5*mib))
	content := disk(t, h, "vm", 0)
	c, shell := login(t, h), dial(t, h)
	must(t, h.Crash())
	if err := shell.Wait(); err == nil {
		t.Error("the SSH connection lives")
	}
	if active, err := c.SessionManager.SessionIsActive(t.Context()); err == nil && active {
		t.Error("the session lives")
	}
	vm, p := vmOf(t, login(t, h), "vm")
	if p.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		t.Error(p.Runtime.PowerState)
	}
	must(t, h.PowerOn("vm"))
	same(t, "after the crash", disk(t, h, "vm", 0), content)
	s, later := snapshotIDOf(t, h, vm, "b")
	if uuidOf(t, id) == uuidOf(t, later) {
		t.Error("the change id survived")
	}
	_, err := methods.QueryChangedDiskAreas(t.Context(), vm.Client(), &types.QueryChangedDiskAreas{This: vm.Reference(), Snapshot: &s, DeviceKey: 2000, ChangeId: id})
	if err == nil {
		t.Error("areas since an id of before the crash")
	}
}

func TestStrangeTracking(t *testing.T) {
	h, vm := tracked(t, Options{})
	_, id := snapshotIDOf(t, h, vm, "a")
	must(t, h.UseStrangeTracking("vm"))
	must(t, h.WriteAt("vm", 0, noise(mib, 9), 5*mib))
	s, later := snapshotIDOf(t, h, vm, "b")
	if uuidOf(t, id) != uuidOf(t, later) || changedBytes(t, h, vm, s, id, 16*mib) != mib {
		t.Error("the host itself does not know any more what changed")
	}
	for _, name := range []string{"vm-ctk.vmdk", "vm-000001-ctk.vmdk", "vm-000002-ctk.vmdk"} {
		text, size := ctk(t, h, name)
		if _, err := vmdk.ParseTracking(text, size); !errors.Is(err, vmdk.ErrFormat) || !vmdk.IsTracking(text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, h.RemoveSnapshot("vm", "a"))
	must(t, h.RemoveSnapshot("vm", "b"))
	must(t, h.PowerOff("vm"))
	must(t, h.PowerOn("vm"))
	must(t, h.WriteAt("vm", 0, noise(mib, 9), 9*mib))
	s, _ = snapshotIDOf(t, h, vm, "c")
	if got := changedBytes(t, h, vm, s, later, 16*mib); got != mib {
		t.Error("after the merge:", got)
	}
}

func TestDisksThatNoSnapshotFreezes(t *testing.T) {
	h := sshHost(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 8*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true}))
	must(t, h.AddDisk("vm", DiskOptions{Size: 4 * mib, Thin: true, Independent: true}))
	must(t, h.AddDisk("vm", DiskOptions{Size: 4 * mib, RawDevice: "physical"}))
	must(t, h.AddDisk("vm", DiskOptions{Size: 4 * mib, RawDevice: "virtual"}))
	if err := h.AddDisk("vm", DiskOptions{Size: 4 * mib, RawDevice: "other"}); err == nil {
		t.Error("a raw device of another kind")
	}
	must(t, h.PowerOn("vm"))
	for i := range 4 {
		must(t, h.WriteAt("vm", i, noise(mib, uint64(i)), mib))
	}
	must(t, h.Snapshot("vm", "a"))
	c := dial(t, h)
	out := want(t, c, "vim-cmd vmsvc/device.getdevices 1")
	for text, n := range map[string]int{
		`diskMode = "independent_persistent"`: 1, `(vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo) {`: 1,
		`compatibilityMode = "physicalMode"`: 1, `fileName = "[datastore1] vm/vm-000001.vmdk"`: 1, `fileName = "[datastore1] vm/vm_3-000001.vmdk"`: 1,
		`fileName = "[datastore1] vm/vm_1.vmdk"`: 1, `fileName = "[datastore1] vm/vm_2.vmdk"`: 1,
	} {
		if strings.Count(out, text) != n {
			t.Errorf("%s: %d times\n%s", text, strings.Count(out, text), out)
		}
	}
	want(t, c, "grep -q '^RW 8192 VMFSRDM \"vm_2-rdmp.vmdk\"' /vmfs/volumes/datastore1/vm/vm_2.vmdk && grep -q 'createType=\"vmfsRawDeviceMap\"' /vmfs/volumes/datastore1/vm/vm_3.vmdk")
	for i := range 4 {
		must(t, h.WriteAt("vm", i, noise(mib, uint64(i+10)), 2*mib))
	}
	must(t, h.Revert("vm", "a"))
	for i, kept := range []bool{false, true, true, false} {
		got := make([]byte, mib)
		must(t, h.ReadAt("vm", i, got, 2*mib))
		if (string(got) == string(noise(mib, uint64(i+10)))) != kept {
			t.Errorf("disk %d: what came after the snapshot is there: %v", i, !kept)
		}
	}
}

func TestSuspendedVM(t *testing.T) {
	dir := t.TempDir()
	h, vm := tracked(t, Options{Dir: dir})
	must(t, h.Suspend("vm"))
	if p := props(t, vm); p.Runtime.PowerState != types.VirtualMachinePowerStateSuspended {
		t.Error(p.Runtime.PowerState)
	}
	if err := h.WriteAt("vm", 0, []byte("x"), 0); err == nil {
		t.Error("a sleeper writes")
	}
	must(t, h.Snapshot("vm", "a"))
	must(t, h.Close())
	h = start(t, Options{Dir: dir, SSH: &SSHOptions{}})
	c := dial(t, h)
	if out := want(t, c, "vim-cmd vmsvc/power.getstate 1; ls /vmfs/volumes/datastore1/vm/*.vmss"); !strings.Contains(out, "Suspended\n/vmfs") {
		t.Error(out)
	}
	want(t, c, "vim-cmd vmsvc/power.on 1")
	must(t, h.WriteAt("vm", 0, []byte("x"), 0))
	if _, errs, status := sh(t, c, "ls /vmfs/volumes/datastore1/vm/*.vmss"); status != 1 {
		t.Error("its memory is left", errs)
	}
	want(t, c, "vim-cmd vmsvc/power.suspend 1 && vim-cmd vmsvc/power.off 1")
	if out := want(t, c, "vim-cmd vmsvc/power.getstate 1"); !strings.Contains(out, "Powered off") {
		t.Error(out)
	}
}
