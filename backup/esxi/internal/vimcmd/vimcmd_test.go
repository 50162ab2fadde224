package vimcmd

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFault(t *testing.T) {
	f := FindFault(`(vim.fault.NotFound) {
   faultCause = (vmodl.MethodFault) null,
   faultMessage = <unset>
   msg = "Unable to find a VM corresponding to "1""
}
`)
	if f == nil || f.Type != "vim.fault.NotFound" || f.Message != `Unable to find a VM corresponding to "1"` {
		t.Fatal(f)
	}
	f = FindFault("Power on failed\n(vmodl.fault.ManagedObjectNotFound) {\n   dynamicType = <unset>,\n   obj = 'vim.Task:x',\n   msg = \"gone\",\n}")
	if f == nil || f.Type != "vmodl.fault.ManagedObjectNotFound" || f.Message != "gone" {
		t.Fatal(f)
	}
	for _, fine := range []string{"", "Create Snapshot:\n", "(vim.TaskInfo) {\n   error = (vmodl.MethodFault) null,\n}", "   (vim.fault.Indented) {\n}"} {
		if f := FindFault(fine); f != nil {
			t.Errorf("%q: %v", fine, f)
		}
	}
}

const devices = `Devices:
(vim.vm.device.VirtualDevice) [
   (vim.vm.device.VirtualLsiLogicController) {
      dynamicType = <unset>,
      key = 1000,
      device = (int) [
         2000
      ],
      sharedBus = "noSharing"
   },
   (vim.vm.device.VirtualDisk) {
      key = 2000,
      deviceInfo = (vim.Description) {
         label = "Hard disk 1",
         summary = "209,715,200 KB"
      },
      backing = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
         fileName = "[datastore1] a "quoted" name/x, y.vmdk",
         datastore = 'vim.Datastore:5e0026d9-a647150e-d8a8-4cedfb76e9d5',
         thinProvisioned = false,
         eagerlyScrub = <unset>,
         uuid = "6000C294-7b3f-53be-cb4b-ee5e3d92722e",
         changeId = "52 f3 b6 37/2",
         parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) null
      },
      note = "first line
second = "line"
third",
      capacityInKB = 209715200
   }
]
`

func TestDump(t *testing.T) {
	v, err := ParseDump(devices)
	if err != nil {
		t.Fatal(err)
	}
	if len(v.Items) != 2 {
		t.Fatalf("%d devices", len(v.Items))
	}
	d := v.Items[1]
	if d.Type != "vim.vm.device.VirtualDisk" {
		t.Error(d.Type)
	}
	if n, ok := d.Get("capacityInKB").Int(); n != 209715200 || !ok {
		t.Error(n, ok)
	}
	for path, want := range map[string]string{
		"backing fileName":   `[datastore1] a "quoted" name/x, y.vmdk`,
		"backing changeId":   "52 f3 b6 37/2",
		"backing datastore":  "vim.Datastore:5e0026d9-a647150e-d8a8-4cedfb76e9d5",
		"deviceInfo label":   "Hard disk 1",
		"deviceInfo nothing": "",
	} {
		if got := d.Get(strings.Fields(path)...).Text; got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	if note := d.Get("note").Text; !strings.HasPrefix(note, "first line\nsecond") || !strings.HasSuffix(note, "third") {
		t.Errorf("%q", note)
	}
	if d.Get("backing", "eagerlyScrub").IsSet || d.Get("backing", "parent").IsSet || !d.Get("backing", "thinProvisioned").IsSet {
		t.Error("set and unset are mixed up")
	}
	if _, err := ParseDump(devices[:400]); err == nil {
		t.Error("half an output passed")
	}
}

func TestVMs(t *testing.T) {
	vms, invalid, err := ParseVMs(`Skipping invalid VM '4'
Vmid   Name          File              Guest OS       Version   Annotation
1      x8     [pve-esx] x8/x8.vmx   centos9_64Guest   vmx-20
12     a'; rm -rf x; '   [datastore 1] a b/c [d].vmx   otherGuest   vmx-08   a note
of two lines
12     fake     [other] x.vmx   g   vmx-08
`)
	if err != nil {
		t.Fatal(err)
	}
	want := []VM{{1, "x8", "pve-esx", "x8/x8.vmx"}, {12, "a'; rm -rf x; '", "datastore 1", "a b/c [d].vmx"}}
	if d := cmp.Diff(want, vms); d != "" {
		t.Error(d)
	}
	if len(invalid) != 1 || invalid[0] != 4 {
		t.Error(invalid)
	}
	if _, _, err := ParseVMs("sh: vim-cmd: not found"); err == nil {
		t.Error("no heading passed")
	}
}

func TestSnapshots(t *testing.T) {
	got, err := ParseSnapshots(`Get Snapshot:
|-ROOT
--Snapshot Name        : snap1
--Snapshot Id        : 1
--Snapshot Desciption  : Shapshot #1
second line
--Snapshot Id : 77
--Snapshot Created On  : 10/4/2026 19:0:52
--Snapshot State       : powered off
--|-CHILD
----Snapshot Name        : Corelinux running
----Snapshot Id        : 2
----Snapshot Desciption  :
----Snapshot Created On  : 10/4/2026 19:22:55
----Snapshot State       : powered on
--|-CHILD
----Snapshot Name        : sibling
----Snapshot Id        : 3
`)
	if err != nil {
		t.Fatal(err)
	}
	at := func(h, m, s int) time.Time { return time.Date(2026, 10, 4, h, m, s, 0, time.UTC) }
	want := []Snapshot{
		{1, "snap1", 0, "Shapshot #1\nsecond line", at(19, 0, 52)},
		{2, "Corelinux running", 1, "", at(19, 22, 55)},
		{ID: 3, Name: "sibling", Parent: 1},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got, err := ParseSnapshots("Get Snapshot:\n"); err != nil || len(got) != 0 {
		t.Error(got, err)
	}
	if _, err := ParseSnapshots("(vim.fault.NotFound) {\n}"); err == nil {
		t.Error("a fault passed as a tree")
	}
}

func TestSmall(t *testing.T) {
	if s, err := ParsePowerState("Retrieved runtime info\nPowered on\n"); s != "on" || err != nil {
		t.Error(s, err)
	}
	tasks, err := ParseTasks("(ManagedObjectReference) [\n   'vim.Task:haTask-512-vim.VirtualMachine.powerOn-2826',\n   'vim.Task:b'\n]\n")
	if d := cmp.Diff([]string{"haTask-512-vim.VirtualMachine.powerOn-2826", "b"}, tasks); d != "" || err != nil {
		t.Error(d, err)
	}
	if tasks, err := ParseTasks("(ManagedObjectReference) []\n"); len(tasks) != 0 || err != nil {
		t.Error(tasks, err)
	}
	m, err := ParseMessage(`Virtual machine message 27:
msg.uuid.altered:This virtual machine might have been moved or copied.

0. Cancel (Cancel)
1. I _moved it (I _moved it)
2. I _copied it (I _copied it) [default]
`)
	if err != nil || m.ID != "27" || len(m.Choices) != 3 || !m.Choices[2].Default || m.Choices[1].Text != "I _moved it (I _moved it)" || !strings.HasPrefix(m.Text, "msg.uuid.altered:") {
		t.Errorf("%+v %v", m, err)
	}
	if m, err := ParseMessage("No message.\n"); m != nil || err != nil {
		t.Error(m, err)
	}
	f, err := ParseFilesystems("Free,MountPoint,Mounted,Size,Type,UUID,VolumeName,\n100,/vmfs/volumes/x,true,1000,VMFS-6,x,data store,\n5,,false,9,vfat,y,,\n")
	if d := cmp.Diff([]Filesystem{{"/vmfs/volumes/x", "data store", "x", "VMFS-6", true, 1000, 100}, {"", "", "y", "vfat", false, 9, 5}}, f); d != "" || err != nil {
		t.Error(d, err)
	}
	if v, b, err := ParseVersion("VMware ESXi 7.0.3 build-20036589\nVMware ESXi 7.0 Update 3\n"); v != "7.0.3" || b != "20036589" || err != nil {
		t.Error(v, b, err)
	}
	if id, ok := ParseVMID("22\n"); id != 22 || !ok {
		t.Error(id, ok)
	}
	if !Done("Clone: 10% done.\rClone: 100% done.", "Clone") || Done("Clone: 10% done.", "Clone") {
		t.Error("progress")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(devices)
	f.Add("Get Snapshot:\n|-ROOT\n--Snapshot Name        : a\n--Snapshot Id        : 1\n")
	f.Add("Vmid Name File\n1 a [d] a.vmx g vmx-1\n")
	f.Add("(a) {\n b = \"\n")
	f.Fuzz(func(t *testing.T, s string) {
		_, _ = ParseDump(s)
		_ = FindFault(s)
		_, _, _ = ParseVMs(s)
		_, _ = ParseSnapshots(s)
		_, _ = ParseTasks(s)
		_, _ = ParseMessage(s)
		_, _ = ParseFilesystems(s)
		_, _, _ = ParseVersion(s)
		_, _ = ParseVMID(s)
	})
}
