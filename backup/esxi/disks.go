package esxi

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/vmware/govmomi/vim25/types"
)

// disks picks the virtual disks out of a VM's devices, in controller order.
func disks(devices []types.BaseVirtualDevice) []Disk {
	type controller struct {
		kind, adapter string
		bus           int32
		rank          int
		shared        bool
	}
	controllers := map[int32]controller{}
	for _, d := range devices {
		c := controller{}
		switch d := d.(type) {
		case *types.VirtualIDEController:
			c = controller{"ide", "ide", d.BusNumber, 0, false}
		case *types.VirtualNVMEController:
			c = controller{"nvme", "nvme", d.BusNumber, 3, false}
		case types.BaseVirtualSCSIController:
			s := d.GetVirtualSCSIController()
			c = controller{"scsi", "lsilogic", s.BusNumber, 1, s.SharedBus != "" && s.SharedBus != types.VirtualSCSISharingNoSharing}
			switch d.(type) {
			case *types.VirtualBusLogicController:
				c.adapter = "buslogic"
			case *types.VirtualLsiLogicSASController:
				c.adapter = "lsisas1068"
			case *types.ParaVirtualSCSIController:
				c.adapter = "pvscsi"
			}
		case types.BaseVirtualSATAController:
			c = controller{"sata", "sata", d.GetVirtualSATAController().BusNumber, 2, false}
		default:
			continue
		}
		controllers[d.GetVirtualDevice().Key] = c
	}

	type placed struct {
		Disk
		rank int
		bus  int32
	}
	var found []placed
	for _, d := range devices {
		v, ok := d.(*types.VirtualDisk)
		if !ok {
			continue
		}
		disk := Disk{Key: v.Key, Capacity: v.CapacityInBytes}
		if disk.Capacity == 0 {
			disk.Capacity = v.CapacityInKB << 10
		}
		if v.DeviceInfo != nil {
			disk.Label = v.DeviceInfo.GetDescription().Label
		}
		if disk.Label == "" {
			disk.Label = fmt.Sprintf("disk %d", v.Key)
		}
		if v.UnitNumber != nil {
			disk.Unit = *v.UnitNumber
		}
		c, known := controllers[v.ControllerKey]
		if known {
			disk.Controller, disk.Adapter = fmt.Sprintf("%s%d", c.kind, c.bus), c.adapter
		} else {
			c.rank = 9
		}
		backing(&disk, v.Backing)
		if disk.Unsupported == "" && c.shared {
			disk.Unsupported = "its controller shares the bus with other VMs, and ESXi takes no snapshots of such disks"
		}
		if disk.Unsupported == "" && disk.Capacity <= 0 {
			disk.Unsupported = "the host does not tell its size"
		}
		found = append(found, placed{disk, c.rank, c.bus})
	}
	slices.SortFunc(found, func(a, b placed) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.bus, b.bus), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Key, b.Key))
	})
	out := make([]Disk, 0, len(found))
	for _, f := range found {
		out = append(out, f.Disk)
	}
	return out
}

// backing reads what lies behind a disk: its chain, its identity, and whether
// it can be backed up at all.
func backing(d *Disk, b types.BaseVirtualDeviceBackingInfo) {
	var encrypted *types.CryptoKeyId
	switch b := b.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		d.Mode, d.UUID, d.ChangeID = b.DiskMode, b.Uuid, b.ChangeId
		d.Thin = b.ThinProvisioned != nil && *b.ThinProvisioned
		encrypted = b.KeyId
		if b.Sharing != "" && b.Sharing != string(types.VirtualDiskSharingSharingNone) {
			d.Unsupported = "it is shared with other VMs (multi-writer), and ESXi takes no snapshots of such disks"
		}
	case *types.VirtualDiskSeSparseBackingInfo:
		d.Mode, d.UUID, d.ChangeID, d.Thin = b.DiskMode, b.Uuid, b.ChangeId, true
		encrypted = b.KeyId
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		d.Mode, d.UUID, d.ChangeID = b.DiskMode, b.Uuid, b.ChangeId
		d.Unsupported = fmt.Sprintf("it is a raw device mapping (%s): its data is on a LUN, not in a file of the datastore; "+
			"back it up inside the guest, or convert it to a virtual disk", b.CompatibilityMode)
	case *types.VirtualDiskRawDiskVer2BackingInfo:
		d.Unsupported = "it is a raw device of the host; back it up inside the guest"
	case *types.VirtualDiskPartitionedRawDiskVer2BackingInfo:
		d.Unsupported = "it is a partition of a raw device; back it up inside the guest"
	case *types.VirtualDiskLocalPMemBackingInfo:
		d.Mode, d.UUID = b.DiskMode, b.Uuid
		d.Unsupported = "it lies in persistent memory, of which ESXi takes no snapshots"
	case nil:
		d.Unsupported = "the host does not say where it lies"
	default:
		d.Unsupported = fmt.Sprintf("its format (%T) is not one that ESXi 6.5 and later create", b)
	}
	d.Chain = chain(b)
	switch {
	case d.Unsupported != "":
	case d.Mode == string(types.VirtualDiskModeIndependent_persistent), d.Mode == string(types.VirtualDiskModeIndependent_nonpersistent):
		d.Unsupported = "its mode is " + d.Mode + ": snapshots leave it out; make it dependent in the VM's settings"
	case d.Mode != "" && d.Mode != string(types.VirtualDiskModePersistent):
		d.Unsupported = "its mode is " + d.Mode + ": its changes are thrown away or kept apart; make it persistent in the VM's settings"
	case encrypted != nil:
		d.Unsupported = "it is encrypted by the host, and its file shows only cipher text"
	case len(d.Chain) == 0:
		d.Unsupported = "the host does not say where it lies"
	}
}

// chain lists a backing's descriptors, base first.
func chain(b types.BaseVirtualDeviceBackingInfo) (names []string) {
	for b != nil && len(names) < 64 { // ESXi allows 32 links
		var next types.BaseVirtualDeviceBackingInfo
		switch b := b.(type) {
		case *types.VirtualDiskFlatVer2BackingInfo:
			names = append(names, b.FileName)
			if b.Parent != nil {
				next = b.Parent
			}
		case *types.VirtualDiskSeSparseBackingInfo:
			names = append(names, b.FileName)
			if b.Parent != nil {
				next = b.Parent
			}
		case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
			names = append(names, b.FileName)
			if b.Parent != nil {
				next = b.Parent
			}
		default:
			if f, ok := b.(types.BaseVirtualDeviceFileBackingInfo); ok {
				names = append(names, f.GetVirtualDeviceFileBackingInfo().FileName)
			}
		}
		b = next
	}
	slices.Reverse(names)
	return names
}
