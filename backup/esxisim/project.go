package esxisim

import (
	"path"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/vmx"
)

// managed is a VM as the vSphere API shows it.
func (h *Host) managed(info hv.Info) mo.VirtualMachine {
	ref := vmRef(info.ID)
	var vm mo.VirtualMachine
	vm.Self, vm.Name = ref, info.Name
	vm.Config = h.config(info, info.Config, info.Disks)
	vm.Datastore = []types.ManagedObjectReference{h.ds.Self}
	vm.ResourcePool = &types.ManagedObjectReference{Type: "ResourcePool", Value: esx.ResourcePool.Self.Value}
	vm.EnvironmentBrowser = types.ManagedObjectReference{Type: "EnvironmentBrowser", Value: "ha-env-browser"}

	vm.Runtime = types.VirtualMachineRuntimeInfo{
		Host:                &types.ManagedObjectReference{Type: "HostSystem", Value: esx.HostSystem.Self.Value},
		ConnectionState:     types.VirtualMachineConnectionStateConnected,
		PowerState:          power(info.On, info.Suspended),
		Question:            question(info),
		FaultToleranceState: types.VirtualMachineFaultToleranceStateNotConfigured,
		RecordReplayState:   types.VirtualMachineRecordReplayStateInactive,
		MaxCpuUsage:         2000 * vm.Config.Hardware.NumCPU, MaxMemoryUsage: vm.Config.Hardware.MemoryMB,
		CleanPowerOff: types.NewBool(!info.On), ConsolidationNeeded: info.Unmerged,
	}
	running, tools := types.VirtualMachineToolsRunningStatusGuestToolsNotRunning, types.VirtualMachineToolsStatusToolsNotRunning
	if info.On {
		vm.Runtime.BootTime = types.NewTime(info.Started)
		running, tools = types.VirtualMachineToolsRunningStatusGuestToolsRunning, types.VirtualMachineToolsStatusToolsOk
	}
	vm.Guest = &types.GuestInfo{
		ToolsRunningStatus: string(running), ToolsStatus: tools, GuestId: vm.Config.GuestId, GuestFullName: vm.Config.GuestFullName,
		GuestState: map[bool]string{true: "running", false: "notRunning"}[info.On],
	}
	ctk := hardware(info.Config) >= 7
	vm.Capability = types.VirtualMachineCapability{
		SnapshotOperationsSupported: true, MultipleSnapshotsSupported: true, SnapshotConfigSupported: true,
		PoweredOffSnapshotsSupported: true, MemorySnapshotsSupported: true, RevertToSnapshotSupported: true,
		QuiescedSnapshotsSupported: true, DiskSharesSupported: true, ChangeTrackingSupported: ctk,
		DiskOnlySnapshotOnSuspendedVMSupported: types.NewBool(true),
	}
	h.layout(&vm, info)
	vm.Summary = types.VirtualMachineSummary{
		Vm: &ref, Runtime: vm.Runtime, OverallStatus: types.ManagedEntityStatusGreen,
		Guest: &types.VirtualMachineGuestSummary{
			GuestId: vm.Config.GuestId, GuestFullName: vm.Config.GuestFullName, ToolsStatus: tools, ToolsRunningStatus: string(running),
		},
		Config: types.VirtualMachineConfigSummary{
			Name: info.Name, VmPathName: h.hv.Path(info.Path), MemorySizeMB: vm.Config.Hardware.MemoryMB, NumCpu: vm.Config.Hardware.NumCPU,
			NumVirtualDisks: int32(len(info.Disks)), Uuid: vm.Config.Uuid, InstanceUuid: vm.Config.InstanceUuid,
			GuestId: vm.Config.GuestId, GuestFullName: vm.Config.GuestFullName, Annotation: vm.Config.Annotation, HwVersion: vm.Config.Version,
		},
		Storage: &types.VirtualMachineStorageSummary{Timestamp: h.o.Clock()},
	}
	for _, f := range info.Files {
		vm.Summary.Storage.Committed += f.Used
		vm.Summary.Storage.Uncommitted += f.Size - min(f.Used, f.Size)
		vm.Summary.Storage.Unshared += f.Used
	}
	vm.Storage = &types.VirtualMachineStorageInfo{
		Timestamp: h.o.Clock(),
		PerDatastoreUsage: []types.VirtualMachineUsageOnDatastore{{
			Datastore: h.ds.Self, Committed: vm.Summary.Storage.Committed, Uncommitted: vm.Summary.Storage.Uncommitted, Unshared: vm.Summary.Storage.Unshared,
		}},
	}
	for _, d := range vm.Config.Hardware.Device {
		if _, ok := d.(types.BaseVirtualEthernetCard); ok {
			vm.Summary.Config.NumEthernetCards++
			vm.Network = []types.ManagedObjectReference{h.network}
		}
	}
	if len(info.Snapshots) > 0 {
		vm.Snapshot = &types.VirtualMachineSnapshotInfo{RootSnapshotList: snapshotTree(info, 0)}
		if info.Current != 0 {
			current := snapshotRef(info.ID, info.Current)
			vm.Snapshot.CurrentSnapshot = &current
		}
		for _, s := range vm.Snapshot.RootSnapshotList {
			vm.RootSnapshot = append(vm.RootSnapshot, s.Snapshot)
		}
	}
	return vm
}

// questionPrefix is what the ids of questions begin with.
const questionPrefix = "_vmx"

// question is what a VM waits with.
func question(info hv.Info) *types.VirtualMachineQuestionInfo {
	if info.Question == nil {
		return nil
	}
	q := &types.VirtualMachineQuestionInfo{Id: questionPrefix + strconv.Itoa(info.Question.ID), Text: info.Question.Text}
	for i, c := range info.Question.Choices {
		if c.Default {
			q.Choice.DefaultIndex = int32(i)
		}
		label, _, _ := strings.Cut(c.Label, " (")
		q.Choice.ChoiceInfo = append(q.Choice.ChoiceInfo, &types.ElementDescription{
			Key: strconv.Itoa(i), Description: types.Description{Label: label, Summary: label},
		})
	}
	return q
}

func state(vm *hv.VM) types.VirtualMachinePowerState { return power(vm.On(), vm.Suspended()) }

func power(on, suspended bool) types.VirtualMachinePowerState {
	if suspended {
		return types.VirtualMachinePowerStateSuspended
	}
	if on {
		return types.VirtualMachinePowerStatePoweredOn
	}
	return types.VirtualMachinePowerStatePoweredOff
}

func snapshotTree(info hv.Info, parent int) []types.VirtualMachineSnapshotTree {
	var list []types.VirtualMachineSnapshotTree
	for _, s := range info.Snapshots {
		if s.Parent == parent {
			list = append(list, types.VirtualMachineSnapshotTree{
				Snapshot: snapshotRef(info.ID, s.ID), Vm: vmRef(info.ID), Name: s.Name, Description: s.Description, Id: int32(s.ID),
				CreateTime: s.Created.UTC(), State: power(s.Memory, false), Quiesced: s.Quiesced, ReplaySupported: types.NewBool(false),
				ChildSnapshotList: snapshotTree(info, s.ID), // a parent's number is lower than its children's
			})
		}
	}
	return list
}

// config is a configuration with its devices, of a VM or of a snapshot.
func (h *Host) config(info hv.Info, x *vmx.File, disks []hv.DiskInfo) *types.VirtualMachineConfigInfo {
	get := func(key string) string { v, _ := x.Get(key); return v }
	dir := path.Dir(info.Path)
	reserved := &types.ResourceAllocationInfo{
		Reservation: types.NewInt64(0), Limit: types.NewInt64(-1), ExpandableReservation: types.NewBool(false),
		Shares: &types.SharesInfo{Level: types.SharesLevelNormal, Shares: 1000},
	}
	c := &types.VirtualMachineConfigInfo{
		ChangeVersion: info.Started.UTC().Format("2006-01-02T15:04:05.000000Z"),
		Modified:      h.o.Clock(), Name: get("displayName"), GuestId: guestID(get("guestOS")), GuestFullName: guestID(get("guestOS")),
		AlternateGuestName: get("guestOSAltName"), Annotation: get("annotation"),
		Version: "vmx-" + strconv.Itoa(hardware(x)), Uuid: dashed(get("uuid.bios")), InstanceUuid: dashed(get("vc.uuid")),
		LocationId: dashed(get("uuid.location")), Firmware: or(get("firmware"), "bios"),
		Files: types.VirtualMachineFileInfo{
			VmPathName: h.hv.Path(info.Path), SnapshotDirectory: h.hv.Path(dir) + "/", SuspendDirectory: h.hv.Path(dir) + "/", LogDirectory: h.hv.Path(dir) + "/",
		},
		Tools: &types.ToolsConfigInfo{ToolsVersion: 10249}, DefaultPowerOps: types.VirtualMachineDefaultPowerOpInfo{PowerOffType: "soft"},
		Hardware: types.VirtualHardware{
			NumCPU: int32(number(get("numvcpus"), 1)), NumCoresPerSocket: types.NewInt32(int32(number(get("cpuid.coresPerSocket"), 1))),
			MemoryMB: int32(number(get("memSize"), 256)), Device: h.devices(x, disks),
		},
		CpuAllocation: reserved, MemoryAllocation: reserved,
		ChangeTrackingEnabled: types.NewBool(x.True("ctkEnabled")), BootOptions: &types.VirtualMachineBootOptions{},
		SwapPlacement: "inherit", MaxMksConnections: 40,
		DatastoreUrl: []types.VirtualMachineConfigInfoDatastoreUrlPair{{Name: datastoreName, Url: "/vmfs/volumes/" + h.hv.UUID()}},
	}
	if c.Name == "" {
		c.Name = info.Name
	}
	for key, value := range x.All() {
		if !shown[strings.ToLower(key)] {
			c.ExtraConfig = append(c.ExtraConfig, &types.OptionValue{Key: key, Value: value})
		}
	}
	return c
}

// shown are keys of a .vmx with fields of their own in the API.
var shown = map[string]bool{
	"displayname": true, "guestos": true, "annotation": true, "uuid.bios": true, "vc.uuid": true, "uuid.location": true,
	"firmware": true, "numvcpus": true, "memsize": true, "virtualhw.version": true, ".encoding": true, "config.version": true,
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func number(s string, otherwise int) int {
	n, err := strconv.Atoi(s)
	if err != nil || n <= 0 {
		return otherwise
	}
	return n
}

func hardware(x *vmx.File) int {
	v, _ := x.Get("virtualHW.version")
	return number(v, 13)
}

// guestID turns a .vmx's "debian11-64" into the API's "debian11_64Guest".
func guestID(os string) string {
	if os == "" {
		return "otherGuest"
	}
	if os == "other-64" {
		return "otherGuest64"
	}
	return strings.ReplaceAll(os, "-", "_") + "Guest"
}

// guestOS is the way back.
func guestOS(id string) string {
	if id == "otherGuest64" {
		return "other-64"
	}
	return strings.ReplaceAll(strings.TrimSuffix(id, "Guest"), "_", "-")
}

// dashed turns "56 4d 11 …-77 …" into "564d11…-…" as the API shows it.
func dashed(id string) string {
	hex := strings.NewReplacer(" ", "", "-", "").Replace(id)
	if len(hex) != 32 {
		return id
	}
	return hex[:8] + "-" + hex[8:12] + "-" + hex[12:16] + "-" + hex[16:20] + "-" + hex[20:]
}

// layout fills in which files the VM consists of.
func (h *Host) layout(vm *mo.VirtualMachine, info hv.Info) {
	now := h.o.Clock()
	ex := &types.VirtualMachineFileLayoutEx{Timestamp: now}
	keys := map[string]int32{}
	for i, f := range info.Files {
		keys[f.Name] = int32(i)
		ex.File = append(ex.File, types.VirtualMachineFileLayoutExFileInfo{
			Key: int32(i), Name: h.hv.Path(f.Name), Type: fileType(f.Name), Size: f.Size, UniqueSize: f.Used, Accessible: types.NewBool(true),
		})
	}
	plain := &types.VirtualMachineFileLayout{}
	disks := func(list []hv.DiskInfo) (out []types.VirtualMachineFileLayoutExDiskLayout) {
		for _, d := range list {
			l := types.VirtualMachineFileLayoutExDiskLayout{Key: d.Place.Key}
			for _, link := range d.Links {
				unit := types.VirtualMachineFileLayoutExDiskUnit{}
				stem := strings.TrimSuffix(link.File, ".vmdk")
				for _, name := range []string{link.File, stem + "-flat.vmdk", stem + "-delta.vmdk", stem + "-sesparse.vmdk"} {
					if key, ok := keys[name]; ok {
						unit.FileKey = append(unit.FileKey, key)
					}
				}
				l.Chain = append(l.Chain, unit)
			}
			out = append(out, l)
		}
		return out
	}
	ex.Disk = disks(info.Disks)
	for _, s := range info.Snapshots {
		ex.Snapshot = append(ex.Snapshot, types.VirtualMachineFileLayoutExSnapshotLayout{
			Key: snapshotRef(info.ID, s.ID), DataKey: keys[s.File], MemoryKey: -1, Disk: disks(s.Disks),
		})
		plain.Snapshot = append(plain.Snapshot, types.VirtualMachineFileLayoutSnapshotLayout{Key: snapshotRef(info.ID, s.ID), SnapshotFile: []string{h.hv.Path(s.File)}})
	}
	for _, d := range info.Disks {
		l := types.VirtualMachineFileLayoutDiskLayout{Key: d.Place.Key}
		for _, link := range d.Links {
			l.DiskFile = append(l.DiskFile, h.hv.Path(link.File))
		}
		plain.Disk = append(plain.Disk, l)
	}
	for _, f := range info.Files {
		switch fileType(f.Name) {
		case "nvram", "snapshotList":
			plain.ConfigFile = append(plain.ConfigFile, path.Base(f.Name))
		case "log":
			plain.LogFile = append(plain.LogFile, path.Base(f.Name))
		}
	}
	vm.Layout, vm.LayoutEx = plain, ex
}

func fileType(name string) string {
	for _, t := range []struct{ suffix, kind string }{
		{".vmx", "config"},
		{".vmsd", "snapshotList"},
		{".vmsn", "snapshotData"},
		{".nvram", "nvram"},
		{".log", "log"},
		{"-ctk.vmdk", "diskExtent"},
		{"-flat.vmdk", "diskExtent"},
		{"-delta.vmdk", "diskExtent"},
		{"-sesparse.vmdk", "diskExtent"},
		{".vmdk", "diskDescriptor"},
	} {
		if strings.HasSuffix(name, t.suffix) {
			return t.kind
		}
	}
	return "uwswap"
}
