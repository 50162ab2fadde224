package esxisim

import (
	"fmt"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

// What a VM's owner does to it behind the backup's back.

// Suspend puts a VM to sleep. PowerOn wakes it, PowerOff lets it forget.
func (h *Host) Suspend(vm string) error { return h.with(vm, (*hv.VM).Suspend) }

// Snapshot makes a snapshot of a VM, as its owner does.
func (h *Host) Snapshot(vm, name string) error {
	return h.with(vm, func(vm *hv.VM) error {
		_, err := vm.CreateSnapshot(hv.SnapshotOptions{Name: name})
		return err
	})
}

// Snapshots are the names of a VM's snapshots, each after its parent.
func (h *Host) Snapshots(vm string) (names []string, err error) {
	err = h.with(vm, func(vm *hv.VM) error {
		info, err := vm.Info()
		for _, s := range info.Snapshots {
			names = append(names, s.Name)
		}
		return err
	})
	return names, err
}

// snapshot finds a VM's newest snapshot of a name.
func snapshotID(vm *hv.VM, name string) (int, error) {
	info, err := vm.Info()
	if err != nil {
		return 0, err
	}
	id := 0
	for _, s := range info.Snapshots {
		if s.Name == name {
			id = max(id, s.ID)
		}
	}
	if id == 0 {
		return 0, fmt.Errorf("%s has no snapshot called %q", info.Name, name)
	}
	return id, nil
}

// Revert takes a VM back to its newest snapshot of a name. It is off afterwards.
func (h *Host) Revert(vm, name string) error {
	return h.with(vm, func(vm *hv.VM) error {
		id, err := snapshotID(vm, name)
		if err != nil {
			return err
		}
		return vm.Revert(id)
	})
}

// RemoveSnapshot removes a VM's newest snapshot of a name.
func (h *Host) RemoveSnapshot(vm, name string) error {
	return h.with(vm, func(vm *hv.VM) error {
		id, err := snapshotID(vm, name)
		if err != nil {
			return err
		}
		return vm.RemoveSnapshot(h.ctx, id, false)
	})
}

// GrowDisk makes a disk bigger, size in bytes; the VM has no snapshots. Change
// tracking keeps its identity, as hosts are known to do wrongly.
func (h *Host) GrowDisk(vm string, disk int, size int64) error {
	return h.with(vm, func(vm *hv.VM) error { return vm.Grow(disk, size) })
}

// SetChangeTracking turns change tracking on or off. A VM that runs follows at
// its next snapshot or start.
func (h *Host) SetChangeTracking(vm string, on bool) error {
	return h.with(vm, func(vm *hv.VM) error {
		return vm.Reconfigure(func(x *vmx.File) error { hv.SetTracking(x, on); return nil })
	})
}

// TrackWithSnapshots turns change tracking on although the VM has snapshots, as
// hosts since 6.5 do without an error: it then misses all writes up to the next
// snapshot.
func (h *Host) TrackWithSnapshots(vm string) error { return h.with(vm, (*hv.VM).TrackWithSnapshots) }

// UseStrangeTracking keeps a VM's change tracking in files of an unknown layout.
// The host itself goes on to know what changed.
func (h *Host) UseStrangeTracking(vm string) error { return h.with(vm, (*hv.VM).UseStrangeTracking) }

// DiskOptions of AddDisk.
type DiskOptions struct {
	Size        int64 // bytes
	Thin        bool
	Independent bool // snapshots leave it out
	// RawDevice is "physical" or "virtual" for a mapped device; "" is a flat
	// disk. No snapshot can freeze a physical one.
	RawDevice string
}

// AddDisk gives a VM another disk, empty.
func (h *Host) AddDisk(vm string, o DiskOptions) error {
	a := hv.AttachOptions{Size: o.Size, Thin: o.Thin}
	switch o.RawDevice {
	case "":
	case "physical":
		a.RDM = vdisk.TypePhysicalRDM
	case "virtual":
		a.RDM = vdisk.TypeVirtualRDM
	default:
		return fmt.Errorf("a raw device is mapped physical or virtual, not %q", o.RawDevice)
	}
	if o.Independent {
		a.Mode = "independent-persistent"
	}
	return h.with(vm, func(vm *hv.VM) error { return vm.Attach(a) })
}

// Annotate sets a VM's note.
func (h *Host) Annotate(vm, note string) error {
	return h.with(vm, func(vm *hv.VM) error {
		return vm.Reconfigure(func(x *vmx.File) error { x.Set("annotation", note); return nil })
	})
}

// Crash is a failure of the host's power and its return: every VM is off,
// change tracking of those that ran knows nothing any more, sessions and
// connections are gone. The host serves again at once.
func (h *Host) Crash() error {
	if h.ssh != nil {
		h.ssh.cut()
		h.console.crash()
	}
	h.sessions.expireAll()
	return h.hv.Crash()
}
