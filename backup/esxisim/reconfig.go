package esxisim

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/vmx"
)

// reconfigure carries out ReconfigVM_Task: the spec becomes lines of the .vmx.
func (h *Host) reconfigure(vm *hv.VM, spec *types.VirtualMachineConfigSpec) error {
	info, err := vm.Info()
	if err != nil {
		return err
	}
	var drop []string
	err = vm.Reconfigure(func(x *vmx.File) error {
		var err error
		drop, err = h.dropped(x, info, spec)
		if err != nil {
			return err
		}
		return h.apply(x, path.Dir(info.Path), spec)
	})
	if err != nil {
		return err
	}
	for _, rel := range drop {
		err = errors.Join(err, h.hv.DeleteDisk(rel))
	}
	return err
}

// dropped takes the disks a spec removes out of the configuration, and returns
// those whose files are to go too.
func (h *Host) dropped(x *vmx.File, info hv.Info, spec *types.VirtualMachineConfigSpec) (files []string, err error) {
	for _, change := range spec.DeviceChange {
		c := change.GetVirtualDeviceConfigSpec()
		if c.Operation != types.VirtualDeviceConfigSpecOperationRemove {
			continue
		}
		key := c.Device.GetVirtualDevice().Key
		found := false
		for _, d := range info.Disks {
			if d.Place.Key != key {
				continue
			}
			found = true
			x.RemoveDevice(d.Place.Slot())
			if c.FileOperation == types.VirtualDeviceConfigSpecFileOperationDestroy {
				if len(info.Snapshots) > 0 {
					return nil, unsupported("deleting a disk that snapshots need")
				}
				files = append(files, d.Links[len(d.Links)-1].File)
			}
		}
		if n := key - 4000; !found && n >= 0 && n < 10 {
			found = true
			prefix := fmt.Sprintf("ethernet%d.", n)
			x.DeleteFunc(func(k, _ string) bool { return strings.HasPrefix(strings.ToLower(k), prefix) })
		}
		if !found {
			return nil, invalid("deviceChange.device.key")
		}
	}
	return files, nil
}

// apply turns a spec's other parts into lines of a .vmx in directory dir. New
// disks are made on the way.
func (h *Host) apply(x *vmx.File, dir string, spec *types.VirtualMachineConfigSpec) error {
	set := func(key, value string) {
		if value != "" {
			x.Set(key, value)
		}
	}
	set("displayName", spec.Name)
	set("annotation", spec.Annotation)
	set("firmware", spec.Firmware)
	if spec.GuestId != "" {
		set("guestOS", guestOS(spec.GuestId))
	}
	if spec.NumCPUs > 0 {
		set("numvcpus", strconv.Itoa(int(spec.NumCPUs)))
	}
	if spec.MemoryMB > 0 {
		set("memSize", strconv.FormatInt(spec.MemoryMB, 10))
	}
	if v, ok := strings.CutPrefix(spec.Version, "vmx-"); ok {
		n, err := strconv.Atoi(v)
		if err != nil {
			return invalid("configSpec.version")
		}
		set("virtualHW.version", strconv.Itoa(n))
	}
	if spec.Uuid != "" {
		set("uuid.bios", spaced(spec.Uuid))
	}
	if err := h.addDevices(x, dir, spec.DeviceChange); err != nil {
		return err
	}
	if spec.ChangeTrackingEnabled != nil {
		if *spec.ChangeTrackingEnabled && hardware(x) < 7 {
			return unsupported("change tracking needs virtual hardware 7 or newer")
		}
		hv.SetTracking(x, *spec.ChangeTrackingEnabled)
	}
	for _, o := range spec.ExtraConfig {
		v := o.GetOptionValue()
		if text := fmt.Sprint(v.Value); text != "" && v.Value != nil {
			x.Set(v.Key, text)
		} else {
			x.Delete(v.Key)
		}
	}
	return nil
}

// spaced turns the API's "564d11…-…" into a .vmx's "56 4d 11 …-77 …".
func spaced(id string) string {
	hex := strings.ReplaceAll(id, "-", "")
	if len(hex) != 32 {
		return id
	}
	var b strings.Builder
	for i := 0; i < 32; i += 2 {
		switch i {
		case 0:
		case 16:
			b.WriteByte('-')
		default:
			b.WriteByte(' ')
		}
		b.WriteString(hex[i : i+2])
	}
	return b.String()
}

func (h *Host) addDevices(x *vmx.File, dir string, changes []types.BaseVirtualDeviceConfigSpec) error {
	keys := map[int32]int32{} // a spec's own key of a new controller, mostly negative → ESXi's
	for _, change := range changes {
		c := change.GetVirtualDeviceConfigSpec()
		if c.Operation == types.VirtualDeviceConfigSpecOperationAdd {
			if err := addController(x, c.Device, keys); err != nil {
				return err
			}
		}
	}
	for _, change := range changes {
		c := change.GetVirtualDeviceConfigSpec()
		var err error
		switch d := c.Device.(type) {
		case *types.VirtualDisk:
			switch c.Operation {
			case types.VirtualDeviceConfigSpecOperationAdd:
				err = h.addDisk(x, dir, d, c.FileOperation, keys)
			case types.VirtualDeviceConfigSpecOperationEdit:
				err = editDisk(x, d)
			}
		case types.BaseVirtualEthernetCard:
			if c.Operation == types.VirtualDeviceConfigSpecOperationAdd {
				addCard(x, d)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// addController puts a new controller into the configuration.
func addController(x *vmx.File, d types.BaseVirtualDevice, keys map[int32]int32) error {
	var bus, model string
	var first int32
	switch d.(type) {
	case *types.ParaVirtualSCSIController:
		bus, model, first = "scsi", "pvscsi", 1000
	case *types.VirtualLsiLogicController:
		bus, model, first = "scsi", "lsilogic", 1000
	case *types.VirtualLsiLogicSASController:
		bus, model, first = "scsi", "lsisas1068", 1000
	case *types.VirtualBusLogicController:
		bus, model, first = "scsi", "buslogic", 1000
	case *types.VirtualAHCIController:
		bus, first = "sata", 15000
	case *types.VirtualNVMEController:
		bus, first = "nvme", 31000
	default:
		return nil // the rest a VM has anyway
	}
	for n := range int32(4) {
		name := fmt.Sprintf("%s%d", bus, n)
		if !x.True(name + ".present") {
			hv.AddController(x, name, model)
			keys[d.GetVirtualDevice().Key] = first + n
			return nil
		}
	}
	return invalid("deviceChange: no room for another " + bus + " controller")
}

// addDisk attaches a disk, made anew when the spec says so.
func (h *Host) addDisk(x *vmx.File, dir string, d *types.VirtualDisk, op types.VirtualDeviceConfigSpecFileOperation, keys map[int32]int32) error {
	ctl := d.ControllerKey
	if k, ok := keys[ctl]; ok {
		ctl = k
	}
	taken := func(slot string) bool { _, ok := x.Get(slot + ".fileName"); return ok }
	var place hv.Place
	var err error
	if d.UnitNumber != nil && *d.UnitNumber >= 0 {
		place, err = hv.SlotAt(ctl, *d.UnitNumber)
		if err == nil && taken(place.Slot()) {
			return invalid("deviceChange.device.unitNumber")
		}
	} else {
		place, err = hv.FreeUnit(ctl, taken)
	}
	if err != nil {
		return err
	}
	backing, ok := d.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
	if !ok {
		return unsupported("a disk backed by anything but a flat file")
	}
	if backing.Parent != nil {
		return unsupported("a disk that stands on another's link")
	}
	rel, err := h.newDiskPath(x, dir, backing.FileName)
	if err != nil {
		return err
	}
	if op == types.VirtualDeviceConfigSpecFileOperationCreate {
		capacity := d.CapacityInBytes
		if capacity == 0 {
			capacity = d.CapacityInKB * 1024
		}
		adapter := map[string]string{"ide": "ide"}[place.Bus]
		if err := h.hv.NewDisk(rel, capacity, isTrue(backing.ThinProvisioned), isTrue(backing.EagerlyScrub), adapter); err != nil {
			return err
		}
	}
	name := rel
	if path.Dir(rel) == dir {
		name = path.Base(rel)
	} else {
		name = "/vmfs/volumes/" + h.hv.UUID() + "/" + name
	}
	hv.AddController(x, place.ControllerName(), "lsilogic")
	hv.AddDisk(x, place.Slot(), name, backing.DiskMode)
	if x.True("ctkEnabled") {
		x.Set(place.Slot()+".ctkEnabled", "TRUE")
	}
	return nil
}

// newDiskPath is where a disk goes: where the spec says, or, when that is only
// a datastore, into the VM's directory under a name that is free.
func (h *Host) newDiskPath(x *vmx.File, dir, file string) (string, error) {
	if file != "" {
		rel, err := h.hv.Resolve(file)
		if err != nil || path.Ext(rel) == ".vmdk" {
			return rel, err
		}
	}
	name, _ := x.Get("displayName")
	base := path.Base(or(dir, name))
	for i := 0; ; i++ {
		rel := path.Join(dir, base+".vmdk")
		if i > 0 {
			rel = path.Join(dir, fmt.Sprintf("%s_%d.vmdk", base, i))
		}
		if _, err := h.hv.Stat(rel); err != nil {
			return rel, nil
		}
	}
}

func isTrue(b *bool) bool { return b != nil && *b }

// editDisk changes a disk's mode.
func editDisk(x *vmx.File, d *types.VirtualDisk) error {
	slot := vmx.SlotOfKey(d.Key)
	if _, ok := x.Get(slot + ".fileName"); slot == "" || !ok {
		return invalid("deviceChange.device.key")
	}
	if b, ok := d.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok && b.DiskMode != "" {
		x.Set(slot+".mode", strings.ReplaceAll(b.DiskMode, "_", "-"))
	}
	return nil
}

func addCard(x *vmx.File, d types.BaseVirtualEthernetCard) {
	n := 0
	for x.True(fmt.Sprintf("ethernet%d.present", n)) {
		n++
	}
	key := fmt.Sprintf("ethernet%d.", n)
	x.Set(key+"present", "TRUE")
	switch d.(type) {
	case *types.VirtualVmxnet3:
		x.Set(key+"virtualDev", "vmxnet3")
	case *types.VirtualE1000e:
		x.Set(key+"virtualDev", "e1000e")
	default:
		x.Set(key+"virtualDev", "e1000")
	}
	x.Set(key+"networkName", "VM Network")
	card := d.GetVirtualEthernetCard()
	if card.MacAddress != "" && !strings.EqualFold(card.AddressType, "generated") {
		x.Set(key+"addressType", "static")
		x.Set(key+"address", card.MacAddress)
		return
	}
	x.Set(key+"addressType", "generated")
}
