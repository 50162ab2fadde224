package esxi

import (
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxi/internal/vimcmd"
)

// devices makes the API's types out of a VM's devices as vmsvc/device.getdevices
// prints them: disks and what they hang on, the rest is left out. So one function
// reads them for both ways.
func devices(v vimcmd.Value) []types.BaseVirtualDevice {
	var out []types.BaseVirtualDevice
	v.Walk(func(v vimcmd.Value) {
		kind, ok := strings.CutPrefix(v.Type, "vim.vm.device.")
		if !ok || !v.Get("key").IsSet || strings.Contains(kind, ".") {
			return
		}
		if d := device(kind, v); d != nil {
			out = append(out, d)
		}
	})
	return out
}

func device(kind string, v vimcmd.Value) types.BaseVirtualDevice {
	base := types.VirtualDevice{Key: int32Of(v.Get("key")), ControllerKey: int32Of(v.Get("controllerKey"))}
	if u := v.Get("unitNumber"); u.IsSet {
		n := int32Of(u)
		base.UnitNumber = &n
	}
	bus := types.VirtualController{VirtualDevice: base, BusNumber: int32Of(v.Get("busNumber"))}
	scsi := types.VirtualSCSIController{VirtualController: bus, SharedBus: types.VirtualSCSISharing(v.Get("sharedBus").Text)}
	switch kind {
	case "VirtualIDEController":
		return &types.VirtualIDEController{VirtualController: bus}
	case "VirtualNVMEController":
		return &types.VirtualNVMEController{VirtualController: bus}
	case "VirtualAHCIController", "VirtualSATAController":
		return &types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: bus}}
	case "VirtualLsiLogicController":
		return &types.VirtualLsiLogicController{VirtualSCSIController: scsi}
	case "VirtualLsiLogicSASController":
		return &types.VirtualLsiLogicSASController{VirtualSCSIController: scsi}
	case "VirtualBusLogicController":
		return &types.VirtualBusLogicController{VirtualSCSIController: scsi}
	case "ParaVirtualSCSIController":
		return &types.ParaVirtualSCSIController{VirtualSCSIController: scsi}
	case "VirtualDisk":
		base.DeviceInfo = &types.Description{Label: v.Get("deviceInfo", "label").Text}
		base.Backing = diskBacking(v.Get("backing"))
		d := &types.VirtualDisk{VirtualDevice: base}
		d.CapacityInKB, _ = v.Get("capacityInKB").Int()
		d.CapacityInBytes, _ = v.Get("capacityInBytes").Int()
		return d
	}
	return nil
}

// diskBacking reads what lies behind a disk, parents included; nil when there is
// nothing, and a type that cannot be backed up for what is not known.
func diskBacking(v vimcmd.Value) types.BaseVirtualDeviceBackingInfo {
	if !v.IsObject() {
		return nil
	}
	file := types.VirtualDeviceFileBackingInfo{FileName: v.Get("fileName").Text}
	mode, uuid, change := v.Get("diskMode").Text, v.Get("uuid").Text, v.Get("changeId").Text
	var key *types.CryptoKeyId
	if v.Get("keyId").IsSet {
		key = &types.CryptoKeyId{}
	}
	switch strings.TrimPrefix(v.Type, "vim.vm.device.VirtualDisk.") {
	case "FlatVer2BackingInfo":
		b := &types.VirtualDiskFlatVer2BackingInfo{
			VirtualDeviceFileBackingInfo: file, DiskMode: mode, Uuid: uuid, ChangeId: change, KeyId: key,
			Sharing: v.Get("sharing").Text,
		}
		if t := v.Get("thinProvisioned"); t.IsSet {
			b.ThinProvisioned = types.NewBool(t.Bool())
		}
		b.Parent, _ = diskBacking(v.Get("parent")).(*types.VirtualDiskFlatVer2BackingInfo)
		return b
	case "SeSparseBackingInfo":
		b := &types.VirtualDiskSeSparseBackingInfo{
			VirtualDeviceFileBackingInfo: file, DiskMode: mode, Uuid: uuid, ChangeId: change, KeyId: key,
		}
		b.Parent, _ = diskBacking(v.Get("parent")).(*types.VirtualDiskSeSparseBackingInfo)
		return b
	case "RawDiskMappingVer1BackingInfo":
		return &types.VirtualDiskRawDiskMappingVer1BackingInfo{
			VirtualDeviceFileBackingInfo: file, DiskMode: mode, Uuid: uuid, ChangeId: change,
			CompatibilityMode: v.Get("compatibilityMode").Text,
		}
	case "RawDiskVer2BackingInfo":
		return &types.VirtualDiskRawDiskVer2BackingInfo{}
	case "PartitionedRawDiskVer2BackingInfo":
		return &types.VirtualDiskPartitionedRawDiskVer2BackingInfo{}
	case "LocalPMemBackingInfo":
		return &types.VirtualDiskLocalPMemBackingInfo{VirtualDeviceFileBackingInfo: file, DiskMode: mode, Uuid: uuid}
	}
	return &types.VirtualDeviceFileBackingInfo{FileName: file.FileName}
}

// int32Of is a number within its type, or 0.
func int32Of(v vimcmd.Value) int32 {
	n, ok := v.Int()
	if !ok || n != int64(int32(n)) {
		return 0
	}
	return int32(n)
}
