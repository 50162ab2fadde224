package esxi

import (
	"context"
	"errors"
	"io"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func file(name string) types.VirtualDeviceFileBackingInfo {
	return types.VirtualDeviceFileBackingInfo{FileName: name}
}

func disk(key, controller, unit int32, b types.BaseVirtualDeviceBackingInfo) *types.VirtualDisk {
	return &types.VirtualDisk{
		VirtualDevice:   types.VirtualDevice{Key: key, ControllerKey: controller, UnitNumber: &unit, Backing: b},
		CapacityInBytes: 1 << 30, CapacityInKB: 1 << 20,
	}
}

func plain(name string) *types.VirtualDiskFlatVer2BackingInfo {
	return &types.VirtualDiskFlatVer2BackingInfo{VirtualDeviceFileBackingInfo: file(name), DiskMode: "persistent"}
}

// Disks count in controller order, whatever order the host lists devices in.
func TestDiskOrder(t *testing.T) {
	scsi := func(key, bus int32, sharing types.VirtualSCSISharing) types.VirtualSCSIController {
		return types.VirtualSCSIController{
			VirtualController: types.VirtualController{VirtualDevice: types.VirtualDevice{Key: key}, BusNumber: bus}, SharedBus: sharing,
		}
	}
	got := disks([]types.BaseVirtualDevice{
		disk(2001, 1001, 0, plain("[ds] vm/g.vmdk")),
		disk(32000, 31000, 0, plain("[ds] vm/f.vmdk")),
		disk(16000, 15000, 0, plain("[ds] vm/e.vmdk")),
		disk(2002, 1000, 10, plain("[ds] vm/d.vmdk")),
		disk(2000, 1000, 2, plain("[ds] vm/c.vmdk")),
		disk(3001, 201, 0, plain("[ds] vm/b.vmdk")),
		disk(3000, 200, 1, plain("[ds] vm/a.vmdk")),
		&types.ParaVirtualSCSIController{VirtualSCSIController: scsi(1000, 0, types.VirtualSCSISharingNoSharing)},
		&types.VirtualLsiLogicSASController{VirtualSCSIController: scsi(1001, 1, types.VirtualSCSISharingPhysicalSharing)},
		&types.VirtualIDEController{VirtualController: types.VirtualController{VirtualDevice: types.VirtualDevice{Key: 200}}},
		&types.VirtualIDEController{VirtualController: types.VirtualController{VirtualDevice: types.VirtualDevice{Key: 201}, BusNumber: 1}},
		&types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{
			VirtualController: types.VirtualController{VirtualDevice: types.VirtualDevice{Key: 15000}},
		}},
		&types.VirtualNVMEController{VirtualController: types.VirtualController{VirtualDevice: types.VirtualDevice{Key: 31000}}},
		&types.VirtualCdrom{VirtualDevice: types.VirtualDevice{Key: 3002, ControllerKey: 201}},
	})
	d := func(key int32, name, adapter, controller string, unit int32, unsupported string) Disk {
		return Disk{
			Key: key, Label: "disk " + strconv.Itoa(int(key)), Capacity: 1 << 30, Chain: []string{"[ds] vm/" + name + ".vmdk"}, Mode: "persistent",
			Adapter: adapter, Controller: controller, Unit: unit, Unsupported: unsupported,
		}
	}
	want := []Disk{
		d(3000, "a", "ide", "ide0", 1, ""),
		d(3001, "b", "ide", "ide1", 0, ""),
		d(2000, "c", "pvscsi", "scsi0", 2, ""),
		d(2002, "d", "pvscsi", "scsi0", 10, ""),
		d(2001, "g", "lsisas1068", "scsi1", 0, "its controller shares the bus with other VMs, and ESXi takes no snapshots of such disks"),
		d(16000, "e", "sata", "sata0", 0, ""),
		d(32000, "f", "nvme", "nvme0", 0, ""),
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Disk{})); diff != "" {
		t.Error(diff)
	}
}

func TestBackings(t *testing.T) {
	thin := true
	flatOf := func(edit func(*types.VirtualDiskFlatVer2BackingInfo)) types.BaseVirtualDeviceBackingInfo {
		b := plain("[ds] vm/vm.vmdk")
		edit(b)
		return b
	}
	for _, c := range []struct {
		name    string
		b       types.BaseVirtualDeviceBackingInfo
		refused string
		chain   string
	}{
		{"flat", plain("[ds] vm/vm.vmdk"), "", "[ds] vm/vm.vmdk"},
		{"chain", flatOf(func(b *types.VirtualDiskFlatVer2BackingInfo) {
			b.FileName = "[ds] vm/vm-000002.vmdk"
			b.ThinProvisioned, b.ChangeId, b.Uuid = &thin, "52 f3/7", "6000C294"
			b.Parent = plain("[ds] vm/vm-000001.vmdk")
			b.Parent.Parent = plain("[ds] vm/vm.vmdk")
		}), "", "[ds] vm/vm.vmdk|[ds] vm/vm-000001.vmdk|[ds] vm/vm-000002.vmdk"},
		{"sesparse", &types.VirtualDiskSeSparseBackingInfo{
			VirtualDeviceFileBackingInfo: file("[ds] vm/vm-000001.vmdk"), DiskMode: "persistent",
			Parent: &types.VirtualDiskSeSparseBackingInfo{VirtualDeviceFileBackingInfo: file("[ds] vm/vm.vmdk")},
		}, "", "[ds] vm/vm.vmdk|[ds] vm/vm-000001.vmdk"},
		{"physical rdm", &types.VirtualDiskRawDiskMappingVer1BackingInfo{
			VirtualDeviceFileBackingInfo: file("[ds] vm/vm-rdm.vmdk"), CompatibilityMode: "physicalMode", DiskMode: "independent_persistent",
		}, "raw device mapping (physicalMode)", "[ds] vm/vm-rdm.vmdk"},
		{"raw", &types.VirtualDiskRawDiskVer2BackingInfo{}, "raw device", ""},
		{"partition", &types.VirtualDiskPartitionedRawDiskVer2BackingInfo{}, "partition", ""},
		{"pmem", &types.VirtualDiskLocalPMemBackingInfo{VirtualDeviceFileBackingInfo: file("[pmem] x.vmdk")}, "persistent memory", "[pmem] x.vmdk"},
		{"old", &types.VirtualDiskSparseVer2BackingInfo{VirtualDeviceFileBackingInfo: file("[ds] vm/vm.vmdk")}, "its format", "[ds] vm/vm.vmdk"},
		{"independent", flatOf(func(b *types.VirtualDiskFlatVer2BackingInfo) { b.DiskMode = "independent_persistent" }), "snapshots leave it out", "[ds] vm/vm.vmdk"},
		{"nonpersistent", flatOf(func(b *types.VirtualDiskFlatVer2BackingInfo) { b.DiskMode = "independent_nonpersistent" }), "snapshots leave it out", "[ds] vm/vm.vmdk"},
		{"undoable", flatOf(func(b *types.VirtualDiskFlatVer2BackingInfo) { b.DiskMode = "undoable" }), "its mode is undoable", "[ds] vm/vm.vmdk"},
		{"multi-writer", flatOf(func(b *types.VirtualDiskFlatVer2BackingInfo) { b.Sharing = "sharingMultiWriter" }), "multi-writer", "[ds] vm/vm.vmdk"},
		{"encrypted", flatOf(func(b *types.VirtualDiskFlatVer2BackingInfo) { b.KeyId = &types.CryptoKeyId{KeyId: "1"} }), "encrypted", "[ds] vm/vm.vmdk"},
		{"none", nil, "does not say where", ""},
	} {
		d := disks([]types.BaseVirtualDevice{disk(2000, 1000, 0, c.b)})[0]
		if c.refused == "" != (d.Unsupported == "") || !strings.Contains(d.Unsupported, c.refused) {
			t.Errorf("%s: unsupported %q, want %q", c.name, d.Unsupported, c.refused)
		}
		if got := strings.Join(d.Chain, "|"); got != c.chain {
			t.Errorf("%s: chain %q, want %q", c.name, got, c.chain)
		}
		if c.name == "chain" && (!d.Thin || d.ChangeID != "52 f3/7" || d.UUID != "6000C294") {
			t.Errorf("%s: %+v", c.name, d)
		}
	}
}

func TestFreeze(t *testing.T) {
	running := []Disk{{Key: 2000, Chain: []string{"[ds] a.vmdk", "[ds] a-000001.vmdk", "[ds] a-000002.vmdk"}}, {Key: 2001, Chain: []string{"[ds] b.vmdk"}}}
	d := Disk{Key: 2000, Chain: []string{"[ds] a.vmdk", "[ds] a-000001.vmdk"}}
	if err := freeze(&d, running); err != nil || !d.frozen {
		t.Errorf("frozen chain: %v", err)
	}
	// The snapshot names its own link only: the rest comes from the running disk.
	d = Disk{Key: 2000, Chain: []string{"[ds] a-000001.vmdk"}}
	if err := freeze(&d, running); err != nil || len(d.Chain) != 2 || d.Chain[0] != "[ds] a.vmdk" {
		t.Errorf("short chain: %v, %q", err, d.Chain)
	}
	d = Disk{Key: 2001, Chain: []string{"[ds] b.vmdk"}}
	if err := freeze(&d, running); err == nil || d.frozen {
		t.Error("the running link passes for a frozen one")
	}
	d = Disk{Key: 2001, Chain: []string{"[ds] b.vmdk"}, Unsupported: "x"}
	if err := freeze(&d, running); err != nil || d.frozen {
		t.Error("an unsupported disk stops the snapshot or is frozen")
	}
}

func TestPaths(t *testing.T) {
	stores := map[string]string{"5e00-ab": "datastore1", "datastore1": "datastore1", "big store": "big store"}
	for _, c := range []struct{ from, name, want string }{
		{"[ds] vm/vm.vmdk", "vm-flat.vmdk", "[ds] vm/vm-flat.vmdk"},
		{"[ds] vm.vmdk", "vm-flat.vmdk", "[ds] vm-flat.vmdk"},
		{"[ds] a/b/vm.vmdk", "../vm-flat.vmdk", "[ds] a/vm-flat.vmdk"},
		{"[ds] vm/vm.vmdk", "/vmfs/volumes/5e00-ab/base/vm-flat.vmdk", "[datastore1] base/vm-flat.vmdk"},
		{"[ds] vm/vm.vmdk", "/vmfs/volumes/big store/base/vm-flat.vmdk", "[big store] base/vm-flat.vmdk"},
		{"[ds] vm/vm.vmdk", "/vmfs/volumes/gone/vm-flat.vmdk", ""},
		{"[ds] vm/vm.vmdk", "/vmfs/volumes/datastore1/../../../etc/passwd", ""},
		{"[ds] vm/vm.vmdk", "/dev/disks/naa.1", ""},
		{"[ds] vm/vm.vmdk", "../../x", ""},
		{"[ds] vm/vm.vmdk", "", ""},
		{"vm.vmdk", "x", ""},
	} {
		got, err := beside(c.from, c.name, stores)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("beside(%q, %q) = %q, %v", c.from, c.name, got, err)
		}
	}
	for _, c := range []struct{ in, ds, file string }{
		{"[ds] a/b", "ds", "a/b"},
		{"[ds]a", "ds", "a"},
		{"[ds] /a//b/", "ds", "a/b"},
		{"[ds]", "ds", ""},
		{"[a b] c d", "a b", "c d"},
		{"[ds] ../../x", "ds", "x"},
	} {
		if ds, f, err := splitPath(c.in); ds != c.ds || f != c.file || err != nil {
			t.Errorf("splitPath(%q) = %q, %q, %v", c.in, ds, f, err)
		}
	}
	for _, s := range []string{"", "ds] x", "[] x", "/vmfs/volumes/x", "[ds] a\x00b"} {
		if _, _, err := splitPath(s); err == nil {
			t.Errorf("%q is taken for a datastore path", s)
		}
	}
}

func TestNames(t *testing.T) {
	for shown, kept := range map[string]string{"web01": "web01", "a/b": "a%2fb", `a\b`: "a%5cb", "100%": "100%25", "ü %2f": "ü %252f"} {
		if got := escapedName(shown); got != kept {
			t.Errorf("escapedName(%q) = %q", shown, got)
		}
		if got := displayName(kept); got != shown {
			t.Errorf("displayName(%q) = %q", kept, got)
		}
	}
	if got := displayName("50% done"); got != "50% done" {
		t.Errorf("a name that is no escape became %q", got)
	}
}

func TestNVRAM(t *testing.T) {
	vm := &mo.VirtualMachine{Config: &types.VirtualMachineConfigInfo{
		Files:       types.VirtualMachineFileInfo{VmPathName: "[ds] web/web.vmx"},
		ExtraConfig: []types.BaseOptionValue{&types.OptionValue{Key: "nvram", Value: "web.nvram"}},
	}}
	if got := nvram(vm); got != "[ds] web/web.nvram" {
		t.Errorf("from the .vmx: %q", got)
	}
	vm.LayoutEx = &types.VirtualMachineFileLayoutEx{File: []types.VirtualMachineFileLayoutExFileInfo{{Name: "[ds] web/other.nvram", Type: "nvram"}}}
	if got := nvram(vm); got != "[ds] web/other.nvram" {
		t.Errorf("from the layout: %q", got)
	}
	vm.LayoutEx, vm.Config.ExtraConfig = nil, nil
	if got := nvram(vm); got != "" {
		t.Errorf("from nothing: %q", got)
	}
}

func TestMerge(t *testing.T) {
	got := merge([]Extent{{100, 50}, {0, 10}, {10, 5}, {140, 5}, {150, 1}, {300, 1}})
	if diff := cmp.Diff([]Extent{{0, 15}, {100, 51}, {300, 1}}, got); diff != "" {
		t.Error(diff)
	}
	if merge(nil) != nil {
		t.Error("something came of nothing")
	}
}

// The question is answered by its text, for keys and their order differ.
func TestMovedOrCopied(t *testing.T) {
	choice := func(labels ...string) types.VirtualMachineQuestionInfo {
		q := types.VirtualMachineQuestionInfo{Id: "27", Text: "msg.uuid.altered:This virtual machine might have been moved or copied."}
		for i, l := range labels {
			q.Choice.ChoiceInfo = append(q.Choice.ChoiceInfo, &types.ElementDescription{Description: types.Description{Label: l}, Key: strconv.Itoa(i)})
		}
		return q
	}
	old := choice("Cancel", "I _moved it", "I _copied it")
	buttons := choice("button.uuid.copiedTheVM", "button.uuid.movedTheVM", "Cancel")
	for _, c := range []struct {
		q    types.VirtualMachineQuestionInfo
		keep bool
		want string
	}{{old, true, "1"}, {old, false, "2"}, {buttons, true, "1"}, {buttons, false, "0"}} {
		if got, ok := choose(&c.q, c.keep); !ok || got != c.want {
			t.Errorf("keep %v: %q, %v", c.keep, got, ok)
		}
	}
	other := old
	other.Text = "msg.hbacommon.outofspace:There is no more space for virtual disk web01.vmdk."
	if _, ok := choose(&other, false); ok {
		t.Error("another question was answered")
	}
	vm := &mo.VirtualMachine{Config: &types.VirtualMachineConfigInfo{}}
	if wantsToKeep(vm) {
		t.Error("keeps without being told")
	}
	vm.Config.ExtraConfig = []types.BaseOptionValue{&types.OptionValue{Key: "uuid.action", Value: "keep"}}
	if !wantsToKeep(vm) {
		t.Error("does not keep")
	}
}

func TestExplain(t *testing.T) {
	h := &Host{name: "lab", addr: "10.0.0.5:443", user: "root"}
	vim := func(f types.BaseMethodFault, text string) error {
		return task.Error{LocalizedMethodFault: &types.LocalizedMethodFault{Fault: f, LocalizedMessage: text}}
	}
	for _, c := range []struct {
		err  error
		kind error
		want string
	}{
		{vim(&types.RestrictedVersion{}, "Current license or ESXi version prohibits execution of the requested operation."), ErrRestricted, "assign a licence key"},
		{vim(&types.NoPermission{}, "no"), ErrDenied, "Administrator role"},
		{vim(&types.NoDiskSpace{}, "Insufficient disk space on datastore 'datastore1'."), ErrNoSpace, "Insufficient disk space on datastore 'datastore1'."},
		{vim(&types.FileAlreadyExists{}, "x"), ErrExists, "exists already"},
		{vim(&types.AlreadyExists{}, "x"), ErrExists, "exists already"},
		{vim(&types.FileNotFound{}, "x"), ErrNotFound, "not there"},
		{vim(&types.ManagedObjectNotFound{}, "x"), ErrNotFound, "not there"},
		{vim(&types.FileLocked{}, "x"), ErrLocked, "locked"},
		{vim(&types.ApplicationQuiesceFault{}, "x"), ErrQuiesce, "VMware Tools"},
		{vim(&types.TaskInProgress{}, "x"), ErrBusy, "try again later"},
		{vim(&types.InvalidName{}, "The name is not valid."), nil, "lab: snapshot: The name is not valid."},
		{soap.WrapVimFault(&types.NotAuthenticated{}), ErrLogin, "session of user root"},
		{&url.Error{Op: "Post", URL: "https://10.0.0.5/sdk", Err: syscall.ECONNREFUSED}, ErrUnreachable, "lab (10.0.0.5:443): snapshot: the host cannot be reached: connection refused"},
		{io.ErrUnexpectedEOF, ErrUnreachable, "cannot be reached"},
		{&lost{io.ErrUnexpectedEOF}, ErrUnreachable, "cannot be reached"},
		{&httpStatus{503, "503 Service Unavailable"}, ErrBusy, "stays busy (HTTP 503 Service Unavailable)"},
		{&httpStatus{404, "404 Not Found"}, nil, "lab: snapshot: it answers HTTP 404 Not Found"},
	} {
		err := h.explain(t.Context(), "snapshot", c.err)
		if c.kind != nil && !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v became %v, want %q", c.err, err, c.want)
		}
		if !errors.Is(err, c.err) && !errors.As(err, new(task.Error)) { // task errors are not comparable
			t.Errorf("%v: the cause is lost", err)
		}
	}
	if h.explain(t.Context(), "x", nil) != nil {
		t.Error("no error became one")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.explain(ctx, "x", io.EOF); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	for in, want := range map[string]string{
		"esx1": "esx1:443", "esx1:8443": "esx1:8443", "10.0.0.5": "10.0.0.5:443", "https://esx1/": "esx1:443",
		"::1": "[::1]:443", "[::1]": "[::1]:443", "[::1]:9": "[::1]:9",
		"": "", "a/b": "", "root@esx1": "", "esx1:": "", ":443": "",
	} {
		if got, err := hostPort(in); got != want || (err == nil) != (want != "") {
			t.Errorf("hostPort(%q) = %q, %v", in, got, err)
		}
	}
	full := strings.Repeat("AB:", 31) + "AB"
	for _, in := range []string{full, strings.ToLower(full), strings.ReplaceAll(full, ":", ""), " " + full + " "} {
		if got, err := parseThumbprint(in); got != full || err != nil {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"AB", "xy" + full[2:], full + ":AB"} {
		if _, err := parseThumbprint(in); err == nil {
			t.Errorf("%q is taken for a thumbprint", in)
		}
	}
}
