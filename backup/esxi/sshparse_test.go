package esxi

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"hikae/backup/esxi/internal/sshtest"
	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmx"
)

// canned is a host that prints what a test says, by the beginning of the
// command line, and nothing for what it does not know.
func canned(t *testing.T, answers map[string]string) (*Host, *sshtest.Server) {
	t.Helper()
	all := map[string]string{
		"vmware -vl":       "VMware ESXi 6.5.0 build-13932383\nVMware ESXi 6.5.0 Update 3\n",
		"vim-cmd vimsvc/l": "   vmodl key: esxBasic\n   name: vSphere 6 Hypervisor\n",
	}
	for k, v := range answers {
		all[k] = v
	}
	s, err := sshtest.Start(sshtest.Options{}, func(c *sshtest.Call) int {
		best := ""
		for k := range all {
			if strings.HasPrefix(c.Line, k) && len(k) > len(best) {
				best = k
			}
		}
		io.WriteString(c.Stdout, all[best])
		return 0
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	h, err := connect(t.Context(), Config{Name: "lab", SSH: &SSHConfig{
		Address: s.Address(), Fingerprint: s.Fingerprints()[0], User: "root", Password: func() (string, error) { return "secret", nil },
	}}, quick())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close(t.Context()) })
	return h, s
}

const summary = `Listsummary:

(vim.vm.Summary) {
   dynamicType = <unset>,
   vm = 'vim.VirtualMachine:7',
   runtime = (vim.vm.RuntimeInfo) {
      connectionState = "connected",
      powerState = "poweredOff",
      question = (vim.vm.QuestionInfo) null,
      consolidationNeeded = false,
   },
   config = (vim.vm.Summary.ConfigSummary) {
      name = "a",
      vmPathName = "[d] a/a.vmx",
      uuid = "564d",
      instanceUuid = "52aa",
      guestId = "other-64",
      annotation = "
",
   name = "evil",
   vmPathName = "[d] evil/evil.vmx",
   ",
   },
}
`

const deviceDump = `Devices:

(vim.vm.VirtualHardware) {
   numCPU = 1,
   device = (vim.vm.device.VirtualDevice) [
      (vim.vm.device.ParaVirtualSCSIController) {
         key = 1000,
         busNumber = 0,
         sharedBus = "noSharing",
      },
      (vim.vm.device.VirtualDisk) {
         key = 2000,
         deviceInfo = (vim.Description) {
            label = "Hard disk 1",
            summary = "8,192 KB",
         },
         backing = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
            fileName = "[d] a/a-000002.vmdk",
            diskMode = "persistent",
            thinProvisioned = true,
            uuid = "6000C29",
            changeId = "52 f3/2",
            parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
               fileName = "[d] a/a-000001.vmdk",
               parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {
                  fileName = "[d] a/a.vmdk",
                  parent = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) null,
               },
            },
            sharing = "sharingNone",
         },
         controllerKey = 1000,
         unitNumber = 3,
         capacityInKB = 8192,
      },
      (vim.vm.device.VirtualDisk) {
         key = 2001,
         backing = (vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo) {
            fileName = "[d] a/rdm.vmdk",
            compatibilityMode = "physicalMode",
         },
         controllerKey = 1000,
         unitNumber = 4,
         capacityInKB = 8192,
      },
      (vim.vm.device.VirtualDisk) {
         key = 2002,
         backing = (vim.vm.device.VirtualDisk.FutureBackingInfo) {
            fileName = "[d] a/new.vmdk",
         },
         controllerKey = 1000,
         unitNumber = 5,
         capacityInKB = 8192,
      },
   ],
}
`

const twoSnapshots = `Get Snapshot:
|-ROOT
--Snapshot Name        : theirs
--Snapshot Id        : 1
--Snapshot Desciption  :
--Snapshot Created On  : 10/4/2026 19:0:52
--Snapshot State       : powered off
--|-CHILD
----Snapshot Name        : ours
----Snapshot Id        : 2
----Snapshot Desciption  :
----Snapshot Created On  : 10/4/2026 19:22:55
----Snapshot State       : powered off
`

const snapshotFile = `.encoding = "UTF-8"
snapshot.lastUID = "2"
snapshot.current = "2"
snapshot0.uid = "1"
snapshot0.disk0.fileName = "a.vmdk"
snapshot0.disk0.node = "scsi0:3"
snapshot1.uid = "2"
snapshot1.disk0.fileName = "/vmfs/volumes/d/a/a-000001.vmdk"
snapshot1.disk0.node = "scsi0:3"
`

func TestShellInventory(t *testing.T) {
	h, s := canned(t, map[string]string{
		"vim-cmd vmsvc/getallvms":           "Skipping invalid VM '9'\nVmid   Name   File   Guest OS   Version   Annotation\n7      a   [d] a/a.vmx   other-64   vmx-13   \n",
		"vim-cmd vmsvc/get.summary 7":       summary,
		"vim-cmd vmsvc/device.getdevices 7": deviceDump,
		"vim-cmd vmsvc/snapshot.get 7":      twoSnapshots,
		"cat /vmfs/volumes/d/a/a.vmx":       "virtualHW.version = \"8\"\nctkEnabled = \"TRUE\"\nnvram = \"a.nvram\"\n",
		"cat /vmfs/volumes/d/a/a.vmsd":      snapshotFile,
		"esxcli": "Free,MountPoint,Mounted,Size,Type,UUID,VolumeName,\n100,/vmfs/volumes/5e00,true,1000,VMFS-6,5e00,d,\n" +
			"5,/vmfs/volumes/1,true,9,vfat,y,BOOTBANK1,\n5,/vmfs/volumes/2,true,9,VMFS-L,z,OSDATA-1,\n0,,false,0,NFS,q,away,\n",
	})
	vms, err := h.VMs(t.Context())
	if err != nil || len(vms) != 2 {
		t.Fatalf("%+v, %v", vms, err)
	}
	vm, bad := vms[0], vms[1]
	if bad.ID != "9" || bad.Invalid == "" {
		t.Errorf("%+v", bad)
	}
	if vm.Name != "a" || vm.ConfigPath != "[d] a/a.vmx" || vm.HardwareVersion != "vmx-08" || !vm.ChangeTracking || vm.NVRAMPath != "[d] a/a.nvram" ||
		vm.Power != "poweredOff" || vm.GuestID != "other-64" || len(vm.Disks) != 3 || len(vm.Snapshots) != 2 || !vm.Snapshots[1].Current ||
		vm.Snapshots[1].Parent != vm.Snapshots[0].ID || vm.Snapshots[0].Created.Hour() != 19 {
		t.Errorf("%+v", vm)
	}
	d := vm.Disks[0]
	if !slices.Equal(d.Chain, []string{"[d] a/a.vmdk", "[d] a/a-000001.vmdk", "[d] a/a-000002.vmdk"}) || d.Capacity != 8<<20 || d.Adapter != "pvscsi" ||
		d.Controller != "scsi0" || d.Unit != 3 || d.ChangeID != "52 f3/2" || d.Label != "Hard disk 1" || d.Unsupported != "" {
		t.Errorf("%+v", d)
	}
	if vm.Disks[1].Unsupported == "" || vm.Disks[2].Unsupported == "" {
		t.Errorf("%+v", vm.Disks[1:])
	}
	for i, want := range [][]string{{"[d] a/a.vmdk"}, {"[d] a/a.vmdk", "[d] a/a-000001.vmdk"}} {
		snap, err := h.Snapshot(t.Context(), &vm, vm.Snapshots[i].ID)
		if err != nil || len(snap.Disks) != 1 || !slices.Equal(snap.Disks[0].Chain, want) || !snap.Disks[0].frozen {
			t.Errorf("snapshot %d: %+v, %v", i, snap, err)
		}
	}
	if ds, err := h.Datastores(t.Context()); err != nil || len(ds) != 2 || ds[0].Name != "away" || ds[0].Accessible || ds[1].Name != "d" || ds[1].Free != 100 {
		t.Errorf("%+v, %v", ds, err)
	}
	// A number that has another name now is somebody else's snapshot.
	h.mu.Lock()
	id := vm.Snapshots[1].ID
	o := h.owners[id]
	o.name = "what was called so before"
	h.owners[id] = o
	h.mu.Unlock()
	if err := h.ssh.removeSnapshot(t.Context(), id, o); err == nil || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("another name: %v", err)
	}
	for _, line := range s.Lines() {
		if strings.Contains(line, "snapshot.remove") {
			t.Errorf("it ran %q", line)
		}
	}
	// This host takes no third argument. Ours has no children, so that is no harm;
	// it has no effect either here, which is told.
	h2, s2 := canned(t, map[string]string{
		"vim-cmd vmsvc/get.summary 7":         summary,
		"vim-cmd vmsvc/snapshot.get 7":        twoSnapshots,
		"vim-cmd vmsvc/get.tasklist 7":        "(ManagedObjectReference) []\n",
		"vim-cmd vmsvc/snapshot.remove 7 2 0": "Usage: snapshot.remove vmid snapId\n",
		"vim-cmd vmsvc/snapshot.remove 7 1 0": "Usage: snapshot.remove vmid snapId\n",
	})
	h2.paths["7"] = "[d] a/a.vmx"
	if err := h2.ssh.removeSnapshot(t.Context(), "7-snapshot-2", owner{"7", "a", "ours", 2}); err == nil || !strings.Contains(err.Error(), "still there") {
		t.Errorf("removed nothing: %v", err)
	}
	if err := h2.ssh.removeSnapshot(t.Context(), "7-snapshot-1", owner{"7", "a", "theirs", 1}); err == nil {
		t.Error("removed nothing")
	}
	var plain []string
	for _, line := range s2.Lines() {
		if strings.HasPrefix(line, "vim-cmd vmsvc/snapshot.remove") && !strings.HasSuffix(line, " 0") {
			plain = append(plain, line)
		}
	}
	if len(plain) != 1 || plain[0] != "vim-cmd vmsvc/snapshot.remove 7 2" {
		t.Errorf("it ran %q", plain)
	}
}

func TestNoESXi(t *testing.T) {
	s, err := sshtest.Start(sshtest.Options{}, func(*sshtest.Call) int { return 127 })
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, err = connect(t.Context(), Config{Name: "nas", SSH: &SSHConfig{
		Address: s.Address(), Fingerprint: s.Fingerprints()[0], User: "root", Password: func() (string, error) { return "secret", nil },
	}}, quick())
	if err == nil {
		t.Error("something that is no ESXi host was taken for one")
	}
}

func TestJudgeLicence(t *testing.T) {
	for _, c := range []struct {
		name, edition, hours string
		want                 string
	}{
		{"vSphere 4 Hypervisor", "esxBasic", "", APIForbidden},
		{"vSphere 8 Hypervisor", "esx.hypervisor.cpuPackageCoreLimited", "", APIForbidden},
		{"VMware vSphere 7 Hypervisor", "", "", APIForbidden},
		{"vSphere 7 Enterprise Plus", "esx.enterprisePlus.cpuPackage", "", APIAllowed},
		{"VMware ESX Server", "esx.eval.entitlement.cpuCoreMin", "900", APIAllowed},
		{"Evaluation Mode", "eval", "0", APIForbidden},
		{"", "", "", APIUnknown},
	} {
		props := map[string]string{}
		if c.hours != "" {
			props["expirationHours"], props["expirationMinutes"] = c.hours, "0"
		}
		if got := judgeLicence(c.name, c.edition, props); got.API != c.want {
			t.Errorf("%s (%s): %+v", c.name, c.edition, got)
		}
	}
}

func TestBlocks(t *testing.T) {
	for _, c := range [][2]int64{{0, 512}, {0, 32}, {511, 2}, {4096, 4096}, {1 << 20, 1 << 20}, {12345, 16 << 20}, {65536, 131072}, {1<<40 + 512, 1 << 20}, {0, 16 << 20}, {1<<20 - 1, 2}} {
		bs, skip, count, lead := blocks(c[0], c[1])
		start, end := bs*skip, bs*(skip+count)
		if start > c[0] || end < c[0]+c[1] || lead != c[0]-start || bs < leastBlock || bs > mostBlock {
			t.Errorf("%v: bs %d skip %d count %d lead %d", c, bs, skip, count, lead)
		}
		if over := end - start - c[1]; over > max(c[1]/8, 2*leastBlock) {
			t.Errorf("%v: %d bytes too much", c, over)
		}
		if count > 1<<12 {
			t.Errorf("%v: %d blocks of %d", c, count, bs)
		}
	}
}

func TestHostPath(t *testing.T) {
	if got, err := hostPath("[data store] a/../b c/x.vmx"); got != "/vmfs/volumes/data store/b c/x.vmx" || err != nil {
		t.Error(got, err)
	}
	if got, err := hostPath("[d] "); got != "/vmfs/volumes/d" || err != nil {
		t.Error(got, err)
	}
	for _, bad := range []string{"", "x", "[] x", "[..] x", "[a/b] x", "[.] x"} {
		if got, err := hostPath(bad); err == nil {
			t.Errorf("%q is %q", bad, got)
		}
	}
	if got, err := hostPath("[d] ../../../etc/passwd"); err != nil || got != "/vmfs/volumes/d/etc/passwd" {
		t.Error(got, err)
	}
}

func TestFaultTypes(t *testing.T) {
	h := &Host{name: "lab"}
	for typ, kind := range map[string]error{
		"vim.fault.RestrictedVersion": ErrRestricted, "vim.fault.NotFound": ErrNotFound, "vmodl.fault.ManagedObjectNotFound": ErrNotFound,
		"vim.fault.AlreadyExists": ErrExists, "vim.fault.NoDiskSpace": ErrNoSpace, "vim.fault.FileLocked": ErrLocked,
	} {
		err := h.explain(t.Context(), "try", asFault(&vimcmd.Fault{Type: typ, Message: "as the host says"}))
		if !errors.Is(err, kind) {
			t.Errorf("%s: %v", typ, err)
		}
	}
	if err := asFault(&vimcmd.Fault{Type: "vim.fault.NoSuchThing", Message: "what"}); !strings.Contains(err.Error(), "NoSuchThing") {
		t.Error(err)
	}
	wrapped, err := vimcmd.ParseDump("(vim.TaskInfo) {\n error = (vmodl.LocalizedMethodFault) {\n fault = (vim.fault.NoDiskSpace) {\n file = \"x\"\n },\n localizedMessage = \"full\"\n },\n}")
	if err != nil {
		t.Fatal(err)
	}
	if f := taskFault(wrapped.Get("error")); f.Type != "vim.fault.NoDiskSpace" || f.Message != "full" {
		t.Errorf("%+v", f)
	}
}

func FuzzDevices(f *testing.F) {
	f.Add(deviceDump)
	f.Add("(a) [\n(vim.vm.device.VirtualDisk) {\nkey = 2\n},\n]")
	f.Fuzz(func(t *testing.T, s string) {
		v, err := vimcmd.ParseDump(s)
		if err != nil {
			return
		}
		for _, d := range disks(devices(v)) {
			if len(d.Chain) > 64 || d.Unsupported == "" && (len(d.Chain) == 0 || d.Capacity <= 0) {
				t.Errorf("%+v", d)
			}
		}
	})
}

func FuzzSnapshotFile(f *testing.F) {
	f.Add([]byte(snapshotFile), "2")
	f.Fuzz(func(t *testing.T, b []byte, number string) {
		list, err := vmx.Parse(b)
		if err != nil {
			return
		}
		files, err := frozenFiles(list, number)
		if err != nil {
			return
		}
		for slot, file := range files {
			if slot == "" || file == "" {
				t.Error(fmt.Sprint(files))
			}
		}
	})
}
