package hv

import (
	"context"
	"errors"
	"path/filepath"
	"slices"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmdk"
)

// TakeAllAreas is Changed's change id for all areas that may hold data.
const TakeAllAreas = "*"

// Changed tells which areas of a disk were written after a change id, up to a
// snapshot, or up to now for snapshot 0 while the VM is off.
func (vm *VM) Changed(ctx context.Context, snapshot int, key int32, since string) (areas []vmdk.Area, capacity int64, err error) {
	vm.mu.RLock()
	defer vm.mu.RUnlock()
	if err := vm.alive(); err != nil {
		return nil, 0, err
	}
	i := slices.IndexFunc(vm.disks, func(d *disk) bool { return d.place.Key == key })
	if i < 0 {
		return nil, 0, fail(ErrInvalid, "deviceKey", "a specified parameter was not correct: deviceKey")
	}
	d := vm.disks[i]
	if snapshot == 0 {
		if vm.on.Load() {
			return nil, 0, fail(ErrPower, vm.name(), "%s is powered on: changes can only be told up to a snapshot", vm.name())
		}
		err = vm.with(d, func(v *vdisk.Disk) error {
			capacity = v.Capacity()
			areas, err = changed(ctx, v, len(v.Links())-1, since)
			return err
		})
		return areas, capacity, err
	}
	s := vm.snapshot(snapshot)
	if s == nil {
		return nil, 0, fail(ErrGone, "snapshot", "snapshot %d was not found", snapshot)
	}
	at, ok := s.disk(d.place)
	if !ok {
		return nil, 0, fail(ErrInvalid, "deviceKey", "a specified parameter was not correct: deviceKey")
	}
	if at.ChangeID == "" {
		return nil, 0, fail(ErrTracking, at.File, "change tracking was not active at the snapshot of %s", at.File)
	}
	ask := func(v *vdisk.Disk, link int) error {
		capacity = v.Capacity()
		var err error
		areas, err = changed(ctx, v, link, since)
		return err
	}
	link := linkIndex(d.seen().links, vm.h.abs(at.File))
	if link >= 0 {
		err = vm.with(d, func(v *vdisk.Disk) error { return ask(v, link) })
		return areas, capacity, err
	}
	// The snapshot stands on another branch: no VM writes to its links.
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := vm.openDisk(at.File)
	if err != nil {
		return nil, 0, err
	}
	err = ask(v, len(v.Links())-1)
	return areas, capacity, errors.Join(err, v.Close())
}

func linkIndex(links []vdisk.Link, descriptor string) int {
	return slices.IndexFunc(links, func(l vdisk.Link) bool { return l.Descriptor == descriptor })
}

func changed(ctx context.Context, v *vdisk.Disk, link int, since string) ([]vmdk.Area, error) {
	if v.ChangeID(link) == "" {
		name := v.Links()[link].Descriptor
		return nil, fail(ErrTracking, filepath.Base(name), "change tracking is not active on %s", filepath.Base(name))
	}
	if since == TakeAllAreas {
		return v.Allocated(ctx, link)
	}
	areas, err := v.Changed(link, since)
	switch {
	case errors.Is(err, vdisk.ErrChangeID):
		return nil, fail(ErrChangeID, "changeId", "a specified parameter was not correct: changeId")
	case errors.Is(err, vdisk.ErrTracking):
		return nil, fail(ErrTracking, "", "change tracking is not active")
	}
	return areas, err
}
