package esxisim

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// isFault fails unless err is the fault.
func isFault[F types.BaseMethodFault](t *testing.T, what string, err error, want F) {
	t.Helper()
	if !fault.Is(err, want) {
		t.Errorf("%s: %v, not %T", what, err, want)
	}
}

func wait(t *testing.T, task *object.Task, err error) error {
	t.Helper()
	must(t, err)
	return task.Wait(t.Context())
}

func TestChangedAreasComeInPages(t *testing.T) {
	h := start(t, Options{})
	size := int64(96 * mib)
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, size, 1)}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	s1 := snapshot(t, c, vm, "1")
	first := backing(t, s1.Config.Hardware.Device).ChangeId
	for off := int64(0); off < size; off += 128 << 10 {
		must(t, h.WriteAt("vm", 0, []byte("here"), off+5000))
	}
	s2 := snapshot(t, c, vm, "2")
	list, pages := areas(t, c, vm, &s2.Self, first, size)
	if want := int(size / (128 << 10)); len(list) != want || pages != (want+areasPerAnswer-1)/areasPerAnswer {
		t.Errorf("%d areas on %d pages, not %d", len(list), pages, want)
	}
	for i, a := range list {
		if a.Start != int64(i)*128<<10 || a.Length != 64<<10 {
			t.Fatalf("area %d: %+v", i, a)
		}
	}
	// Up to the first snapshot, all that may hold data: what the image has, no more.
	list, _ = areas(t, c, vm, &s1.Self, "*", size)
	var total int64
	for _, a := range list {
		total += a.Length
	}
	if total < 3*mib || total > 4*mib {
		t.Errorf("allocated: %d bytes in %+v", total, list)
	}

	ask := func(s *types.ManagedObjectReference, key int32, since string, start int64) error {
		_, err := methods.QueryChangedDiskAreas(t.Context(), c.Client, &types.QueryChangedDiskAreas{
			This: vm.Reference(), Snapshot: s, DeviceKey: key, ChangeId: since, StartOffset: start,
		})
		return err
	}
	second := backing(t, s2.Config.Hardware.Device).ChangeId
	isFault(t, "a newer id", ask(&s1.Self, 2000, second, 0), &types.InvalidArgument{})
	isFault(t, "another identity", ask(&s2.Self, 2000, "52 00 00 00 00 00 00 00-00 00 00 00 00 00 00 00/1", 0), &types.InvalidArgument{})
	isFault(t, "nonsense", ask(&s2.Self, 2000, "nonsense", 0), &types.InvalidArgument{})
	isFault(t, "no such disk", ask(&s2.Self, 2001, first, 0), &types.InvalidArgument{})
	isFault(t, "beyond the end", ask(&s2.Self, 2000, first, size), &types.InvalidArgument{})
	isFault(t, "a running VM's now", ask(nil, 2000, first, 0), &types.InvalidPowerState{})
	remove(t, vm, s2, false)
	isFault(t, "a removed snapshot", ask(&s2.Self, 2000, first, 0), &types.ManagedObjectNotFound{})
	must(t, h.PowerOff("vm"))
	must(t, ask(nil, 2000, first, 0))

	// A stored id outlives its snapshot.
	must(t, h.PowerOn("vm"))
	remove(t, vm, s1, false)
	s3 := snapshot(t, c, vm, "3")
	if list, _ := areas(t, c, vm, &s3.Self, second, size); len(list) != 0 {
		t.Errorf("nothing was written since, but %d areas changed", len(list))
	}
}

func TestTrackingIsSwitched(t *testing.T) {
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{PowerOn: true}))
	c := login(t, h)
	vm, p := vmOf(t, c, "vm")
	if *p.Config.ChangeTrackingEnabled || !p.Capability.ChangeTrackingSupported {
		t.Error("tracking is on, or not to be had")
	}
	s1 := snapshot(t, c, vm, "1")
	_, err := methods.QueryChangedDiskAreas(t.Context(), c.Client, &types.QueryChangedDiskAreas{This: vm.Reference(), Snapshot: &s1.Self, DeviceKey: 2000, ChangeId: "*"})
	isFault(t, "without tracking", err, &types.FileFault{})
	on := true
	task, err := vm.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{ChangeTrackingEnabled: &on})
	must(t, wait(t, task, err))
	text, err := os.ReadFile(filepath.Join(h.o.Dir, "vm/vm.vmx"))
	must(t, err)
	for _, line := range []string{`ctkEnabled = "TRUE"`, `scsi0:0.ctkEnabled = "TRUE"`} {
		if !bytes.Contains(text, []byte(line)) {
			t.Errorf("the .vmx lacks %s", line)
		}
	}
	// While a snapshot exists tracking does not begin: it could not know what changed before.
	s2 := snapshot(t, c, vm, "2")
	if id := backing(t, s2.Config.Hardware.Device).ChangeId; id != "" {
		t.Errorf("tracking began over a snapshot: %s", id)
	}
	remove(t, vm, s1, true)
	s3 := snapshot(t, c, vm, "3")
	if backing(t, s3.Config.Hardware.Device).ChangeId == "" {
		t.Error("no change id")
	}
	if _, err := os.Stat(filepath.Join(h.o.Dir, "vm/vm-ctk.vmdk")); err != nil {
		t.Error(err)
	}
	remove(t, vm, s3, false)
	must(t, h.PowerOff("vm"))
	on = false
	task, err = vm.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{ChangeTrackingEnabled: &on})
	must(t, wait(t, task, err))
	if _, err := os.Stat(filepath.Join(h.o.Dir, "vm/vm-ctk.vmdk")); !errors.Is(err, os.ErrNotExist) {
		t.Error("tracking is off and its file is there", err)
	}
}

func TestFreeLicence(t *testing.T) {
	h := start(t, Options{Free: true})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{PowerOn: true}))
	c := login(t, h)
	vm, p := vmOf(t, c, "vm")
	if p.Config == nil || p.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn {
		t.Error("reading does not work")
	}
	ctx := t.Context()
	rv := &types.RestrictedVersion{}
	_, err := vm.CreateSnapshot(ctx, "s", "", false, false)
	isFault(t, "snapshot", err, rv)
	if !strings.Contains(fmt.Sprint(err), "Current license or ESXi version prohibits") {
		t.Errorf("text: %v", err)
	}
	_, err = vm.PowerOff(ctx)
	isFault(t, "power", err, rv)
	_, err = vm.Reconfigure(ctx, types.VirtualMachineConfigSpec{})
	isFault(t, "reconfigure", err, rv)
	isFault(t, "unregister", vm.Unregister(ctx), rv)
	isFault(t, "mkdir", object.NewFileManager(c.Client).MakeDirectory(ctx, "[datastore1] x", nil, false), rv)
	_, err = vm.Clone(ctx, object.NewFolder(c.Client, types.ManagedObjectReference{Type: "Folder", Value: "ha-folder-vm"}), "x", types.VirtualMachineCloneSpec{})
	isFault(t, "clone", err, rv)
	ds, err := find.NewFinder(c.Client).DefaultDatastore(ctx)
	must(t, err)
	if _, err := ds.Stat(ctx, "vm/vm.vmx"); err != nil {
		t.Error(err)
	}
	w := browse(t, h)
	w.enter()
	w.want(http.StatusCreated, http.MethodPut, w.url("/vm/x"), strings.NewReader("x"))
	w.want(http.StatusNoContent, http.MethodDelete, w.url("/vm/x"), nil)
}

func TestRestoreByHand(t *testing.T) {
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "old", []string{image(t, 4*mib, 1), image(t, 2*mib, 2)}, VMOptions{}))
	c := login(t, h)
	ctx := t.Context()
	fm := object.NewFileManager(c.Client)
	must(t, fm.MakeDirectory(ctx, "[datastore1] new", nil, false))
	isFault(t, "again", fm.MakeDirectory(ctx, "[datastore1] new", nil, false), &types.FileAlreadyExists{})
	isFault(t, "again, with parents", fm.MakeDirectory(ctx, "[datastore1] new", nil, true), &types.FileAlreadyExists{})
	finder := find.NewFinder(c.Client)
	ds, err := finder.DefaultDatastore(ctx)
	must(t, err)
	text, err := os.ReadFile(filepath.Join(h.o.Dir, "old/old.vmx"))
	must(t, err)
	lines := strings.ReplaceAll(string(text), `displayName = "old"`, `displayName = "new"`) + "uuid.action = \"create\"\n"
	for _, name := range []string{"old.vmdk", "old-flat.vmdk", "old_1.vmdk", "old_1-flat.vmdk", "old.nvram"} {
		must(t, ds.UploadFile(ctx, filepath.Join(h.o.Dir, "old", name), "new/"+name, nil))
	}
	must(t, ds.Upload(ctx, strings.NewReader(lines), "new/new.vmx", nil))
	folder := object.NewFolder(c.Client, types.ManagedObjectReference{Type: "Folder", Value: "ha-folder-vm"})
	pool, err := finder.DefaultResourcePool(ctx)
	must(t, err)
	task, err := folder.RegisterVM(ctx, "[datastore1] new/none.vmx", "", false, pool, nil)
	isFault(t, "no file", wait(t, task, err), &types.FileNotFound{})
	task, err = folder.RegisterVM(ctx, "[datastore1] new/new.vmx", "", false, pool, nil)
	must(t, wait(t, task, err))
	task, err = folder.RegisterVM(ctx, "[datastore1] new/new.vmx", "", false, pool, nil)
	isFault(t, "again", wait(t, task, err), &types.AlreadyExists{})

	vm, p := vmOf(t, c, "new")
	var disks []*types.VirtualDisk
	for _, d := range p.Config.Hardware.Device {
		if d, ok := d.(*types.VirtualDisk); ok {
			disks = append(disks, d)
		}
	}
	if len(disks) != 2 || disks[0].Key != 2000 || disks[1].Key != 2001 || disks[0].ControllerKey != 1000 || disks[0].CapacityInBytes != 4*mib {
		t.Errorf("disks: %+v", disks)
	}
	if b := disks[0].Backing.(*types.VirtualDiskFlatVer2BackingInfo); b.FileName != "[datastore1] new/old.vmdk" || !strings.HasPrefix(strings.ToUpper(b.Uuid), "6000C29") {
		t.Errorf("backing: %+v", b)
	}
	for n := range 2 {
		same(t, "restored", disk(t, h, "new", n), disk(t, h, "old", n))
	}
	_, old := vmOf(t, c, "old")
	task, err = vm.PowerOn(ctx)
	must(t, wait(t, task, err))
	if now := props(t, vm); now.Config.Uuid == old.Config.Uuid || now.Config.Uuid == p.Config.Uuid {
		t.Error("the copy has the original's identity")
	}
	must(t, h.WriteAt("new", 1, []byte("alive"), 0))
	isFault(t, "unregister while it runs", vm.Unregister(ctx), &types.InvalidPowerState{})
	task, err = vm.Destroy(ctx)
	isFault(t, "destroy while it runs", wait(t, task, err), &types.InvalidPowerState{})
	must(t, h.PowerOff("new"))
	must(t, vm.Unregister(ctx))
	if _, err := finder.VirtualMachine(ctx, "new"); err == nil {
		t.Error("it is still there")
	}
	if _, err := os.Stat(filepath.Join(h.o.Dir, "new/old-flat.vmdk")); err != nil {
		t.Error("its files are not", err)
	}
	task, err = fm.DeleteDatastoreFile(ctx, "[datastore1] new", nil)
	must(t, wait(t, task, err))
	vm, _ = vmOf(t, c, "old")
	task, err = vm.Destroy(ctx)
	must(t, wait(t, task, err))
	if _, err := os.Stat(filepath.Join(h.o.Dir, "old")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestFullDatastore(t *testing.T) {
	h := start(t, Options{DatastoreBytes: 64 * mib})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 16*mib, 1)}, VMOptions{Thin: true, PowerOn: true}))
	if err := h.ImportVM(t.Context(), "thick", []string{image(t, 80*mib, 1)}, VMOptions{}); err == nil {
		t.Error("a thick disk larger than the datastore was imported")
	}
	if _, err := os.Stat(filepath.Join(h.o.Dir, "thick")); !errors.Is(err, os.ErrNotExist) {
		t.Error("and left something behind", err)
	}
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	space := func(free int64) {
		t.Helper()
		_, err := h.Inject(Fault{Kind: FaultSpace, Free: free})
		must(t, err)
	}
	space(mib)
	ds, err := find.NewFinder(c.Client).DefaultDatastore(t.Context())
	must(t, err)
	var p mo.Datastore
	must(t, ds.Properties(t.Context(), ds.Reference(), []string{"summary"}, &p))
	if p.Summary.FreeSpace > mib || p.Summary.FreeSpace < mib/2 || p.Summary.Type != "VMFS" {
		t.Errorf("shown: %+v", p.Summary)
	}
	task, err := vm.CreateSnapshot(t.Context(), "s", "", false, false)
	isFault(t, "snapshot", wait(t, task, err), &types.NoDiskSpace{})
	must(t, h.WriteAt("vm", 0, noise(mib/2, 1), 4*mib))
	if err := h.WriteAt("vm", 0, noise(2*mib, 1), 5*mib); err == nil {
		t.Error("a write went beyond the datastore")
	}
	must(t, h.WriteAt("vm", 0, noise(mib/2, 1), 4*mib)) // it has these blocks
	h.ClearFaults()

	// Merging into a thin disk needs room: without it the snapshot is gone, its links are not.
	s := snapshot(t, c, vm, "s")
	must(t, h.WriteAt("vm", 0, noise(4*mib, 2), 8*mib))
	want := disk(t, h, "vm", 0)
	space(mib)
	yes := true
	task, err = vm.RemoveSnapshot(t.Context(), s.Self.Value, false, &yes)
	isFault(t, "remove", wait(t, task, err), &types.NoDiskSpace{})
	now := props(t, vm)
	if now.Snapshot != nil || !now.Runtime.ConsolidationNeeded {
		t.Errorf("snapshots %+v, consolidation needed %v", now.Snapshot, now.Runtime.ConsolidationNeeded)
	}
	same(t, "unmerged", disk(t, h, "vm", 0), want)
	h.ClearFaults()
	res, err := methods.ConsolidateVMDisks_Task(t.Context(), c.Client, &types.ConsolidateVMDisks_Task{This: vm.Reference()})
	must(t, err)
	must(t, object.NewTask(c.Client, res.Returnval).Wait(t.Context()))
	now = props(t, vm)
	if b := backing(t, now.Config.Hardware.Device); now.Runtime.ConsolidationNeeded || b.Parent != nil {
		t.Errorf("after consolidation: %v, %+v", now.Runtime.ConsolidationNeeded, b)
	}
	same(t, "merged", disk(t, h, "vm", 0), want)
}

func TestSessionsEnd(t *testing.T) {
	var now atomic.Int64
	now.Store(time.Now().UnixNano())
	h := start(t, Options{SessionTimeout: 10 * time.Minute, Clock: func() time.Time { return time.Unix(0, now.Load()) }})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{}))
	pass := func(d time.Duration) { now.Add(int64(d)) }
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	w := browse(t, h)
	w.enter()
	pass(7 * time.Minute)
	props(t, vm)
	w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm.vmdk"), nil)
	pass(7 * time.Minute)
	props(t, vm) // SOAP calls keep it alive
	w.want(http.StatusUnauthorized, http.MethodGet, w.url("/vm/vm.vmdk"), nil)
	pass(11 * time.Minute)
	_, err := vm.PowerOn(t.Context())
	isFault(t, "expired", err, &types.NotAuthenticated{})
	if s, err := c.SessionManager.UserSession(t.Context()); s != nil || err != nil {
		t.Errorf("session %v, %v", s, err)
	}

	// Who waits for a change hears of the end too.
	c = login(t, h)
	waiting := make(chan error, 1)
	go func() {
		waiting <- property.Wait(t.Context(), property.DefaultCollector(c.Client), vm.Reference(), []string{"runtime.powerState"},
			func([]types.PropertyChange) bool { return false })
	}()
	for range 200 {
		h.waits.mu.Lock()
		n := len(h.waits.stops)
		h.waits.mu.Unlock()
		if n > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	_, err = h.Inject(Fault{Kind: FaultExpire})
	must(t, err)
	isFault(t, "waiting", <-waiting, &types.NotAuthenticated{})
	if err := c.Login(t.Context(), nil); err == nil {
		t.Error("logged in without a name")
	}
}

func TestCallFaults(t *testing.T) {
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{PowerOn: true}))
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	inject := func(f Fault) {
		t.Helper()
		f.Kind, f.Method = FaultCall, "CreateSnapshot_Task"
		_, err := h.Inject(f)
		must(t, err)
	}
	create := func() error {
		task, err := vm.CreateSnapshot(t.Context(), "s", "", false, false)
		if err != nil {
			return err
		}
		return task.Wait(t.Context())
	}
	inject(Fault{Fault: "TaskInProgress", Skip: 1})
	must(t, create())
	isFault(t, "call", create(), &types.TaskInProgress{})
	inject(Fault{Fault: "ApplicationQuiesceFault", InTask: true, Message: "cannot quiesce"})
	err := create()
	isFault(t, "task", err, &types.ApplicationQuiesceFault{})
	if !strings.Contains(err.Error(), "cannot quiesce") {
		t.Error(err)
	}
	inject(Fault{Delay: 50 * time.Millisecond, InTask: true})
	must(t, create())
	inject(Fault{Lost: true})
	if err := create(); err == nil || fault.Is(err, &types.TaskInProgress{}) {
		t.Errorf("a lost answer came: %v", err)
	}
	n := 0
	for range 200 { // the call itself was carried out
		info, err := h.hv.VMs()[0].Info()
		must(t, err)
		if n = len(info.Snapshots); n == 3 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n != 3 {
		t.Errorf("%d snapshots", n)
	}
}

func TestLie(t *testing.T) {
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{ChangeTracking: true, PowerOn: true}))
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	s1 := snapshot(t, c, vm, "1")
	_, err := h.Inject(Fault{Kind: FaultLie, VM: "vm"})
	must(t, err)
	must(t, h.WriteAt("vm", 0, []byte("untold"), mib))
	must(t, h.WriteAt("vm", 0, []byte("told"), 3*mib))
	s2 := snapshot(t, c, vm, "2")
	list, _ := areas(t, c, vm, &s2.Self, backing(t, s1.Config.Hardware.Device).ChangeId, 4*mib)
	if len(list) != 1 || list[0].Start != 3*mib {
		t.Errorf("changed: %+v", list)
	}
}
