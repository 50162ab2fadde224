package hv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"time"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

// Snapshot is one snapshot of a VM.
type Snapshot struct {
	ID          int // the number the VM gave it; never given twice
	Parent      int // 0 at the root
	Name        string
	Description string
	Created     time.Time
	Quiesced    bool
	Memory      bool // with the guest's memory: reverting to it leaves the VM running
	Disks       []SnapshotDisk
	Config      *vmx.File // the VM's configuration then; its disks name the frozen links
}

// SnapshotDisk is one disk in a snapshot.
type SnapshotDisk struct {
	Place    Place
	File     string // descriptor of the frozen link, relative to the datastore
	ChangeID string // when it froze; "" without change tracking
}

// file is the snapshot's own file, beside the .vmx.
func (s *Snapshot) file(vm *VM) string { return fmt.Sprintf("%s-Snapshot%d.vmsn", vm.base(), s.ID) }

func (s *Snapshot) disk(p Place) (SnapshotDisk, bool) {
	for _, d := range s.Disks {
		if d.Place == p {
			return d, true
		}
	}
	return SnapshotDisk{}, false
}

func (vm *VM) snapshot(id int) *Snapshot {
	for _, s := range vm.snaps {
		if s.ID == id {
			return s
		}
	}
	return nil
}

// SnapshotOptions of CreateSnapshot.
type SnapshotOptions struct {
	Name, Description string
	Memory, Quiesce   bool
}

// snapshotRoom is the least a snapshot needs a disk: a new link's tables.
const snapshotRoom = 2 << 20

// CreateSnapshot freezes the VM's disks as they are and lets the guest write to
// new links from now on. It returns the snapshot's number.
func (vm *VM) CreateSnapshot(o SnapshotOptions) (int, error) {
	vm.mu.Lock()
	id, err := vm.createSnapshot(o)
	vm.mu.Unlock()
	return id, vm.done(err)
}

func (vm *VM) createSnapshot(o SnapshotOptions) (int, error) {
	if err := vm.alive(); err != nil {
		return 0, err
	}
	if o.Name == "" {
		return 0, fail(ErrInvalid, "name", "a specified parameter was not correct: name")
	}
	if !vm.h.space.take(snapshotRoom * int64(len(vm.disks))) {
		return 0, fail(ErrNoSpace, vm.dir(), "there is not enough space on the datastore for a snapshot of %s", vm.name())
	}
	config, err := vmx.Parse(vm.x.Bytes())
	if err != nil {
		return 0, err
	}
	s := &Snapshot{
		ID: vm.lastUID + 1, Parent: vm.current, Name: o.Name, Description: o.Description, Created: vm.h.o.Clock(),
		Quiesced: o.Quiesce && vm.on.Load(), Memory: o.Memory && vm.on.Load(), Config: config,
	}
	var undo []func() error
	failed := func(err error) (int, error) {
		for _, f := range undo {
			err = errors.Join(err, f())
		}
		return 0, err
	}
	for _, d := range vm.disks {
		if d.independent() || d.physical() {
			continue
		}
		if err := d.seen().err; err != nil {
			return failed(err)
		}
		if err := vm.track(d); err != nil {
			return failed(err)
		}
		err := vm.with(d, func(v *vdisk.Disk) error {
			if err := v.Snapshot(vdisk.FormatAuto); err != nil {
				return err
			}
			d.as.Store(see(v))
			return nil
		})
		if err != nil {
			return failed(fileError(d.file, err))
		}
		undo = append(undo, func() error {
			return vm.with(d, func(v *vdisk.Disk) error {
				defer func() { d.as.Store(see(v)) }()
				return v.RemoveSnapshot(context.Background(), len(v.Links())-2, nil)
			})
		})
		links := d.seen().links
		s.Disks = append(s.Disks, SnapshotDisk{d.place, d.file, links[len(links)-2].ChangeID})
	}
	if err := WriteFile(vm.h.abs(vm.beside(s.file(vm))), s.encode()); err != nil {
		return failed(fileError(s.file(vm), err))
	}
	vm.snaps = append(vm.snaps, s)
	vm.current, vm.lastUID = s.ID, s.ID
	vm.follow()
	return s.ID, errors.Join(vm.writeVMX(), vm.writeVMSD())
}

// follow makes the configuration name the links that run now.
func (vm *VM) follow() {
	for _, d := range vm.disks {
		links := d.seen().links
		if len(links) == 0 {
			continue
		}
		if file := vm.h.rel(links[len(links)-1].Descriptor); file != d.file {
			d.file = file
			vm.x.SetDisk(d.place.Slot(), vm.diskName(file))
		}
	}
	vm.holdFiles()
}

// RemoveSnapshot removes a snapshot, with children all that stand on it too,
// and merges the links that no snapshot needs any more. When that has no room
// the snapshot is gone all the same and the VM needs Consolidate.
func (vm *VM) RemoveSnapshot(ctx context.Context, id int, children bool) error {
	return vm.removeSnapshots(ctx, func(s *Snapshot) bool {
		for p := s; p != nil; p = vm.snapshot(p.Parent) {
			if p.ID == id {
				return true
			}
			if !children {
				break
			}
		}
		return false
	}, true)
}

// RemoveAllSnapshots removes all of them; that there is none is no error.
func (vm *VM) RemoveAllSnapshots(ctx context.Context) error {
	return vm.removeSnapshots(ctx, func(*Snapshot) bool { return true }, false)
}

func (vm *VM) removeSnapshots(ctx context.Context, which func(*Snapshot) bool, must bool) error {
	vm.mu.Lock()
	err := vm.dropSnapshots(ctx, which, must)
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) dropSnapshots(ctx context.Context, which func(*Snapshot) bool, must bool) error {
	if err := vm.alive(); err != nil {
		return err
	}
	var kept, dropped []*Snapshot
	for _, s := range vm.snaps {
		if which(s) {
			dropped = append(dropped, s)
			for _, d := range s.Disks {
				vm.loose = append(vm.loose, d.File)
			}
		} else {
			kept = append(kept, s)
		}
	}
	if len(dropped) == 0 {
		if must {
			return fail(ErrGone, "snapshot", "the snapshot was not found")
		}
		return nil
	}
	heir := func(id int) int { // the nearest ancestor that stays
		for slices.ContainsFunc(dropped, func(s *Snapshot) bool { return s.ID == id }) {
			id = vm.snapshot(id).Parent
		}
		return id
	}
	parents := make([]int, len(kept))
	for i, s := range kept {
		parents[i] = heir(s.Parent)
	}
	vm.current = heir(vm.current)
	for i, s := range kept {
		s.Parent = parents[i]
	}
	vm.snaps = kept
	if err := vm.writeVMSD(); err != nil {
		return err
	}
	for _, s := range dropped {
		if err := os.Remove(vm.h.abs(vm.beside(s.file(vm)))); err != nil {
			vm.h.o.Logger.Warn("cannot delete a snapshot's file", "file", s.file(vm), "err", err)
		}
	}
	return vm.consolidate(ctx)
}

// Consolidate merges the links that no snapshot needs.
func (vm *VM) Consolidate(ctx context.Context) error {
	vm.mu.Lock()
	err := vm.alive()
	if err == nil {
		err = vm.consolidate(ctx)
	}
	vm.mu.Unlock()
	return vm.done(err)
}

// Revert takes the VM back to a snapshot: its configuration, and its disks on
// new links over the frozen ones. Without memory in the snapshot the VM is off
// afterwards. Snapshot 0 is the current one.
func (vm *VM) Revert(id int) error {
	vm.mu.Lock()
	err := vm.revert(id)
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) revert(id int) error {
	if err := vm.alive(); err != nil {
		return err
	}
	if id == 0 {
		id = vm.current
	}
	s := vm.snapshot(id)
	if s == nil {
		return fail(ErrGone, "snapshot", "the snapshot was not found")
	}
	if vm.on.Load() || vm.suspended.Load() {
		if err := vm.powerOff(); err != nil {
			return err
		}
	}
	config, err := vmx.Parse(s.Config.Bytes())
	if err != nil {
		return err
	}
	old := vm.disks
	for _, at := range s.Disks {
		running, err := vm.rewind(at)
		if err != nil {
			return err
		}
		config.SetDisk(at.Place.Slot(), vm.diskName(running))
	}
	vm.x, vm.current = config, s.ID
	vm.readDisks(nil)
	if err := errors.Join(vm.writeVMX(), vm.writeVMSD()); err != nil {
		return err
	}
	for _, d := range old { // the links that ran before; a disk the snapshot does not know stays as it is
		if _, ok := s.disk(d.place); ok && !vm.named(d.file) {
			if err := vm.deleteLink(d.file); err != nil {
				return err
			}
		}
	}
	if s.Memory {
		return vm.powerOn()
	}
	return nil
}

// rewind makes a new running link over a frozen one.
func (vm *VM) rewind(at SnapshotDisk) (running string, err error) {
	v, err := vm.openDisk(at.File)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	// Opened at the frozen link there is nothing above it to throw away: other
	// branches of the tree stay.
	if err := v.RevertTo(len(v.Links())-1, nil); err != nil {
		return "", fileError(at.File, err)
	}
	links := v.Links()
	return vm.h.rel(links[len(links)-1].Descriptor), nil
}

// named tells whether the configuration or a snapshot names a link.
func (vm *VM) named(file string) bool {
	for _, d := range vm.disks {
		if d.file == file {
			return true
		}
	}
	for _, s := range vm.snaps {
		for _, d := range s.Disks {
			if d.File == file {
				return true
			}
		}
	}
	return false
}

func (vm *VM) deleteLink(file string) error {
	d, err := vm.h.descriptor(file)
	if err != nil {
		return err
	}
	for _, name := range linkFiles(file, d) {
		if err := vm.h.root.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fileError(name, err)
		}
	}
	return nil
}

// What a .vmsn keeps of a real one's content: the configuration, and each
// disk's change id when it froze.
const changeIDKey = ".changeId"

func (s *Snapshot) encode() []byte {
	x, err := vmx.Parse(s.Config.Bytes())
	if err != nil { // it was parsed before
		return s.Config.Bytes()
	}
	for _, d := range s.Disks {
		if d.ChangeID != "" {
			x.Set(d.Place.Slot()+changeIDKey, d.ChangeID)
		}
	}
	return x.Bytes()
}

// writeVMSD writes the list of snapshots as ESXi does.
func (vm *VM) writeVMSD() error {
	x := &vmx.File{}
	x.Set(".encoding", "UTF-8")
	x.Set("snapshot.lastUID", strconv.Itoa(vm.lastUID))
	if vm.current != 0 {
		x.Set("snapshot.current", strconv.Itoa(vm.current))
	}
	for i, s := range vm.snaps {
		key := fmt.Sprintf("snapshot%d.", i)
		x.Set(key+"uid", strconv.Itoa(s.ID))
		x.Set(key+"filename", s.file(vm))
		if s.Parent != 0 {
			x.Set(key+"parent", strconv.Itoa(s.Parent))
		}
		x.Set(key+"displayName", s.Name)
		if s.Description != "" {
			x.Set(key+"description", s.Description)
		}
		if s.Memory {
			x.Set(key+"type", "1")
		}
		if s.Quiesced {
			x.Set(key+"quiesced", "TRUE")
		}
		micro := s.Created.UnixMicro()
		x.Set(key+"createTimeHigh", strconv.FormatInt(micro>>32, 10))
		x.Set(key+"createTimeLow", strconv.FormatInt(int64(int32(micro)), 10))
		x.Set(key+"numDisks", strconv.Itoa(len(s.Disks)))
		for j, d := range s.Disks {
			x.Set(fmt.Sprintf("%sdisk%d.fileName", key, j), vm.diskName(d.File))
			x.Set(fmt.Sprintf("%sdisk%d.node", key, j), d.Place.Slot())
		}
	}
	x.Set("snapshot.numSnapshots", strconv.Itoa(len(vm.snaps)))
	return WriteFile(vm.h.abs(vm.beside(vm.base()+".vmsd")), x.Bytes())
}

// loadSnapshots reads the list of snapshots; a VM without one has none.
func (vm *VM) loadSnapshots() error {
	name := vm.beside(vm.base() + ".vmsd")
	text, err := os.ReadFile(vm.h.abs(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fileError(name, err)
	}
	x, err := vmx.Parse(text)
	if err != nil {
		return fail(ErrInvalid, name, "%s: %v", name, err)
	}
	get := func(key string) string { v, _ := x.Get(key); return v }
	num := func(key string) int { n, _ := strconv.Atoi(get(key)); return n }
	vm.lastUID, vm.current = num("snapshot.lastUID"), num("snapshot.current")
	for i := range min(num("snapshot.numSnapshots"), 1000) {
		key := fmt.Sprintf("snapshot%d.", i)
		s := &Snapshot{
			ID: num(key + "uid"), Parent: num(key + "parent"), Name: get(key + "displayName"), Description: get(key + "description"),
			Quiesced: get(key+"quiesced") == "TRUE", Memory: get(key+"type") == "1",
			Created: time.UnixMicro(int64(num(key+"createTimeHigh"))<<32 | int64(uint32(num(key+"createTimeLow")))),
		}
		if s.ID <= 0 || vm.snapshot(s.ID) != nil {
			return fail(ErrInvalid, name, "%s: snapshot %d has no number of its own", name, i)
		}
		text, err := os.ReadFile(vm.h.abs(vm.beside(path.Base(get(key + "filename")))))
		if err != nil {
			return fileError(name, err)
		}
		if s.Config, err = vmx.Parse(text); err != nil {
			return fail(ErrInvalid, name, "%s: %v", name, err)
		}
		for j := range min(num(key+"numDisks"), 256) {
			disk := fmt.Sprintf("%sdisk%d.", key, j)
			place, err := ParseSlot(get(disk + "node"))
			if err != nil {
				return err
			}
			file, err := vm.diskFile(get(disk + "fileName"))
			if err != nil {
				return err
			}
			id, _ := s.Config.Get(place.Slot() + changeIDKey)
			s.Config.Delete(place.Slot() + changeIDKey)
			s.Disks = append(s.Disks, SnapshotDisk{place, file, id})
		}
		vm.snaps = append(vm.snaps, s)
		vm.lastUID = max(vm.lastUID, s.ID)
	}
	for _, s := range vm.snaps {
		if s.Parent >= s.ID || s.Parent != 0 && vm.snapshot(s.Parent) == nil { // a parent is always older: no cycles
			return fail(ErrInvalid, name, "%s: snapshot %d stands on none", name, s.ID)
		}
	}
	if vm.current != 0 && vm.snapshot(vm.current) == nil {
		return fail(ErrInvalid, name, "%s: the current snapshot does not exist", name)
	}
	return nil
}
