package esxisim

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

const pciKey = 100

// devices are a configuration's devices with the keys ESXi gives them.
func (h *Host) devices(x *vmx.File, disks []hv.DiskInfo) []types.BaseVirtualDevice {
	list := []types.BaseVirtualDevice{
		&types.VirtualIDEController{VirtualController: controller(200, "IDE 0", 0, 0)},
		&types.VirtualIDEController{VirtualController: controller(201, "IDE 1", 1, 0)},
		&types.VirtualPS2Controller{VirtualController: controller(300, "PS2 controller 0", 0, 0)},
		&types.VirtualPCIController{VirtualController: controller(pciKey, "PCI controller 0", 0, 0)},
		&types.VirtualSIOController{VirtualController: controller(400, "SIO controller 0", 0, 0)},
		&types.VirtualKeyboard{VirtualDevice: device(600, "Keyboard ", "Keyboard", 300, 0)},
		&types.VirtualPointingDevice{VirtualDevice: device(700, "Pointing device", "Pointing device; Device", 300, 1)},
		&types.VirtualMachineVideoCard{VirtualDevice: device(500, "Video card ", "Video card", pciKey, 0), VideoRamSizeInKB: 4096},
		&types.VirtualMachineVMCIDevice{VirtualDevice: device(12000, "VMCI device", "Device on the virtual machine PCI bus", pciKey, 17)},
	}
	list = append(list, controllers(x, disks)...)
	for i, d := range disks {
		list = append(list, h.disk(i, d))
	}
	list = append(list, h.cards(x)...)
	for _, d := range list { // each controller names its devices
		child := d.GetVirtualDevice()
		for _, c := range list {
			if p, ok := c.(types.BaseVirtualController); ok && c.GetVirtualDevice().Key == child.ControllerKey && child.ControllerKey != 0 {
				p.GetVirtualController().Device = append(p.GetVirtualController().Device, child.Key)
			}
		}
	}
	return list
}

func device(key int32, label, summary string, parent, unit int32) types.VirtualDevice {
	d := types.VirtualDevice{Key: key, ControllerKey: parent, DeviceInfo: &types.Description{Label: label, Summary: summary}}
	if parent != 0 {
		d.UnitNumber = types.NewInt32(unit)
	}
	return d
}

func controller(key int32, label string, number, parent int32) types.VirtualController {
	return types.VirtualController{VirtualDevice: device(key, label, label, parent, 3+number), BusNumber: number}
}

// controllers are those the configuration has, and those a disk sits on.
func controllers(x *vmx.File, disks []hv.DiskInfo) []types.BaseVirtualDevice {
	var list []types.BaseVirtualDevice
	for _, bus := range []string{"scsi", "sata", "nvme"} {
		for n := range int32(4) {
			name := bus + strconv.Itoa(int(n))
			used := slices.ContainsFunc(disks, func(d hv.DiskInfo) bool { return d.Place.ControllerName() == name })
			if !used && !x.True(name+".present") {
				continue
			}
			model, _ := x.Get(name + ".virtualDev")
			list = append(list, newController(bus, model, n))
		}
	}
	return list
}

func newController(bus, model string, n int32) types.BaseVirtualDevice {
	scsi := func(label string) types.VirtualSCSIController {
		return types.VirtualSCSIController{
			VirtualController:  controller(1000+n, fmt.Sprintf("SCSI controller %d", n), n, pciKey),
			SharedBus:          types.VirtualSCSISharingNoSharing,
			ScsiCtlrUnitNumber: 7, HotAddRemove: types.NewBool(true),
		}
	}
	switch {
	case bus == "sata":
		c := &types.VirtualAHCIController{}
		c.VirtualController = controller(15000+n, fmt.Sprintf("SATA controller %d", n), n, pciKey)
		return c
	case bus == "nvme":
		c := &types.VirtualNVMEController{}
		c.VirtualController = controller(31000+n, fmt.Sprintf("NVME controller %d", n), n, pciKey)
		return c
	case strings.EqualFold(model, "pvscsi"):
		return &types.ParaVirtualSCSIController{VirtualSCSIController: scsi(model)}
	case strings.EqualFold(model, "lsisas1068"):
		return &types.VirtualLsiLogicSASController{VirtualSCSIController: scsi(model)}
	case strings.EqualFold(model, "buslogic") || model == "":
		return &types.VirtualBusLogicController{VirtualSCSIController: scsi(model)}
	}
	return &types.VirtualLsiLogicController{VirtualSCSIController: scsi(model)}
}

// disk is one disk with its chain of links.
func (h *Host) disk(index int, d hv.DiskInfo) types.BaseVirtualDevice {
	if d.RDM != "" && len(d.Links) == 1 {
		return h.mapping(index, d)
	}
	var backing *types.VirtualDiskFlatVer2BackingInfo
	for _, l := range d.Links {
		backing = &types.VirtualDiskFlatVer2BackingInfo{
			VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: h.hv.Path(l.File), Datastore: &types.ManagedObjectReference{Type: "Datastore", Value: h.ds.Self.Value}},
			DiskMode:                     d.Mode, WriteThrough: types.NewBool(false), Split: types.NewBool(false),
			ThinProvisioned: types.NewBool(d.Thin), Uuid: dashed(d.UUID), ContentId: d.LongID, ChangeId: l.ChangeID, Parent: backing,
			DigestEnabled: types.NewBool(false), Sharing: string(types.VirtualDiskSharingSharingNone),
		}
		switch l.Format {
		case vdisk.FormatCOWD:
			backing.DeltaDiskFormat, backing.DeltaGrainSize = "redoLogFormat", 512
		case vdisk.FormatSESparse:
			backing.DeltaDiskFormat, backing.DeltaGrainSize = "seSparseFormat", 4096
		}
	}
	return h.diskWith(index, d, backing)
}

// mapping is a raw device mapping.
func (h *Host) mapping(index int, d hv.DiskInfo) types.BaseVirtualDevice {
	mode := "physicalMode"
	if d.RDM == vdisk.TypeVirtualRDM {
		mode = "virtualMode"
	}
	return h.diskWith(index, d, &types.VirtualDiskRawDiskMappingVer1BackingInfo{
		VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: h.hv.Path(d.Links[0].File), Datastore: &types.ManagedObjectReference{Type: "Datastore", Value: h.ds.Self.Value}},
		LunUuid:                      "02000000006000c29" + strings.ReplaceAll(dashed(d.UUID), "-", ""), DeviceName: "vml.0100000000", CompatibilityMode: mode, DiskMode: d.Mode,
		Uuid: dashed(d.UUID), ContentId: d.LongID, ChangeId: d.Links[0].ChangeID, Sharing: string(types.VirtualDiskSharingSharingNone),
	})
}

func (h *Host) diskWith(index int, d hv.DiskInfo, backing types.BaseVirtualDeviceBackingInfo) types.BaseVirtualDevice {
	return &types.VirtualDisk{
		VirtualDevice: types.VirtualDevice{
			Key: d.Place.Key, ControllerKey: d.Place.Controller, UnitNumber: types.NewInt32(d.Place.Unit), Backing: backing,
			DeviceInfo: &types.Description{Label: fmt.Sprintf("Hard disk %d", index+1), Summary: thousands(d.Capacity/1024) + " KB"},
		},
		CapacityInKB: d.Capacity / 1024, CapacityInBytes: d.Capacity,
		Shares: &types.SharesInfo{Shares: 1000, Level: types.SharesLevelNormal},
	}
}

func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// cards are the network adapters.
func (h *Host) cards(x *vmx.File) []types.BaseVirtualDevice {
	var list []types.BaseVirtualDevice
	for n := range int32(10) {
		key := fmt.Sprintf("ethernet%d.", n)
		if !x.True(key + "present") {
			continue
		}
		get := func(k string) string { v, _ := x.Get(key + k); return v }
		card := types.VirtualEthernetCard{
			VirtualDevice: device(4000+n, fmt.Sprintf("Network adapter %d", n+1), get("networkName"), pciKey, 7+n),
			AddressType:   get("addressType"), MacAddress: or(get("generatedAddress"), get("address")), WakeOnLanEnabled: types.NewBool(true),
		}
		card.Backing = &types.VirtualEthernetCardNetworkBackingInfo{
			VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: get("networkName")},
			Network:                        &types.ManagedObjectReference{Type: h.network.Type, Value: h.network.Value},
		}
		connected, _ := x.Get(key + "startConnected")
		card.Connectable = &types.VirtualDeviceConnectInfo{StartConnected: !strings.EqualFold(connected, "FALSE"), AllowGuestControl: true}
		switch strings.ToLower(get("virtualDev")) {
		case "vmxnet3":
			v := &types.VirtualVmxnet3{}
			v.VirtualEthernetCard = card
			list = append(list, v)
		case "e1000e":
			list = append(list, &types.VirtualE1000e{VirtualEthernetCard: card})
		default:
			list = append(list, &types.VirtualE1000{VirtualEthernetCard: card})
		}
	}
	return list
}
