package hv

import (
	"errors"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

// VM is one registered VM.
type VM struct {
	h    *Host
	id   int
	path string // of the .vmx, relative to the datastore
	on   atomic.Bool

	// mu: guest I/O and questions share it, changes hold it alone.
	mu       sync.RWMutex
	gone     bool // unregistered, or the host is closed
	x        *vmx.File
	disks    []*disk // in controller order
	snaps    []*Snapshot
	current  int      // the snapshot the running links stand on; 0: none
	lastUID  int      // highest snapshot number ever given
	unmerged bool     // links are left that no snapshot needs
	loose    []string // links that snapshots named until they were removed
	started  time.Time

	suspended atomic.Bool
	asked     *pending // the question it waits with
	questions int      // asked so far
}

// disk is one disk as the .vmx names it.
type disk struct {
	place Place
	file  string // descriptor of the running link, relative to the datastore
	mode  string // persistent, independent_persistent, …

	mu sync.Mutex   // held while the disk of a VM that is off is open for a moment
	d  *vdisk.Disk  // open while the VM runs
	as atomic.Value // seen: as it was last
}

// seen is what is known of a disk without opening it.
type seen struct {
	links    []vdisk.Link
	capacity int64
	uuid     string
	thin     bool
	adapter  string
	cid      uint32
	longID   string
	rdm      string // createType of a raw device mapping
	err      error
}

func (d *disk) seen() seen { s, _ := d.as.Load().(seen); return s }

func (d *disk) independent() bool { return strings.HasPrefix(d.mode, "independent") }

// physical tells a disk that no snapshot can freeze.
func (d *disk) physical() bool { return d.seen().rdm == vdisk.TypePhysicalRDM }

// ID is the VM's number.
func (vm *VM) ID() int { return vm.id }

// On tells whether the VM runs.
func (vm *VM) On() bool { return vm.on.Load() }

// Name is the VM's name as people read it.
func (vm *VM) Name() string {
	vm.mu.RLock()
	defer vm.mu.RUnlock()
	return vm.name()
}

func (vm *VM) name() string {
	if n, ok := vm.x.Get("displayName"); ok && n != "" {
		return n
	}
	return path.Base(path.Dir(vm.path))
}

func (vm *VM) dir() string { return path.Dir(vm.path) }

// base is the .vmx's name without its ending: snapshots are named after it.
func (vm *VM) base() string { return strings.TrimSuffix(path.Base(vm.path), ".vmx") }

// beside is a file in the VM's directory, relative to the datastore.
func (vm *VM) beside(name string) string { return path.Join(vm.dir(), name) }

// alive is to be asked under vm.mu by everything that changes the VM.
func (vm *VM) alive() error {
	if vm.gone {
		return fail(ErrGone, vm.path, "the VM %s is not registered any more", vm.path)
	}
	return nil
}

// with gives a disk to f: the one the VM has open, or, while it is off, opened
// for the moment.
func (vm *VM) with(d *disk, f func(*vdisk.Disk) error) error {
	if d.d != nil {
		return f(d.d)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := vm.openDisk(d.file)
	if err != nil {
		return err
	}
	return errors.Join(f(v), v.Close())
}

// openDisk opens a disk by a link's descriptor. Called under vm.mu.
func (vm *VM) openDisk(file string) (*vdisk.Disk, error) {
	h := vm.h
	v, err := vdisk.Open(h.abs(file), vdisk.Options{VMFS: h.o.VMFS, Hardware: hardware(vm.x)})
	if err != nil {
		if _, serr := os.Stat(h.abs(file)); serr != nil {
			return nil, fileError(file, serr)
		}
		return nil, fail(ErrInvalid, file, "cannot open the disk %s or one of the snapshot disks it depends on: %v", file, err)
	}
	return v, nil
}

// look renews what is known of a disk.
func (vm *VM) look(d *disk) {
	var s seen
	s.err = vm.with(d, func(v *vdisk.Disk) error { s = see(v); return nil })
	d.as.Store(s)
}

func see(v *vdisk.Disk) seen {
	s := seen{links: v.Links(), capacity: v.Capacity()}
	base := v.Descriptor(0)
	s.uuid, s.thin = base.Value("ddb.uuid"), base.Value("ddb.thinProvisioned") == "1"
	s.adapter, s.longID = base.Value("ddb.adapterType"), base.Value("ddb.longContentID")
	s.cid = v.Descriptor(len(s.links) - 1).CID
	if t := base.CreateType; t == vdisk.TypePhysicalRDM || t == vdisk.TypeVirtualRDM {
		s.rdm = t
	}
	return s
}

// writeVMX writes the .vmx. Called under vm.mu.
func (vm *VM) writeVMX() error { return WriteFile(vm.h.abs(vm.path), vm.x.Bytes()) }

// PowerOn starts the VM, without any question.
func (vm *VM) PowerOn() error {
	vm.mu.Lock()
	err := vm.startable()
	if err == nil {
		err = vm.powerOn()
	}
	vm.mu.Unlock()
	return vm.done(err)
}

// done finishes a change: the inventory is saved and the change told.
func (vm *VM) done(err error) error {
	vm.h.space.refresh()
	if err == nil {
		err = vm.h.save()
	}
	vm.h.o.Changed(vm.id)
	return err
}

func (vm *VM) powerOn() error {
	if err := vm.alive(); err != nil {
		return err
	}
	if vm.on.Load() {
		return fail(ErrPower, vm.name(), "%s is powered on already", vm.name())
	}
	if err := vm.wake(); err != nil {
		return err
	}
	vm.identify()
	vm.x.Set("uuid.location", vm.location())
	if err := vm.writeVMX(); err != nil {
		return err
	}
	for _, d := range vm.disks {
		if err := vm.track(d); err != nil {
			return errors.Join(err, vm.closeDisks())
		}
		v, err := vm.openDisk(d.file)
		if err != nil {
			return errors.Join(err, vm.closeDisks())
		}
		d.d = v
		vm.look(d)
	}
	vm.started = vm.h.o.Clock()
	vm.on.Store(true)
	vm.holdFiles()
	return nil
}

// identify gives a VM that has none, or that was told to make a new one, its
// identity, as ESXi does at the first start.
func (vm *VM) identify() {
	_, has := vm.x.Get("uuid.bios")
	action, _ := vm.x.Get("uuid.action")
	if !has || strings.EqualFold(action, "create") {
		id := newUUID()
		vm.x.Set("uuid.bios", id)
		vm.x.Set("uuid.location", id)
		vm.x.Set("vc.uuid", newUUID())
	}
	vm.x.Delete("uuid.action")
	var nics []string
	for key, value := range vm.x.All() {
		nic, ok := strings.CutSuffix(key, ".addressType")
		if _, has := vm.x.Get(nic + ".generatedAddress"); ok && !has && strings.EqualFold(value, "generated") {
			nics = append(nics, nic)
		}
	}
	for _, nic := range nics {
		vm.x.Set(nic+".generatedAddress", newMAC())
		vm.x.Set(nic+".generatedAddressOffset", "0")
	}
}

// PowerOff stops the VM.
func (vm *VM) PowerOff() error {
	vm.mu.Lock()
	err := vm.powerOff()
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) powerOff() error {
	if err := vm.alive(); err != nil {
		return err
	}
	if vm.suspended.Load() {
		return vm.wake()
	}
	if !vm.on.Load() {
		return fail(ErrPower, vm.name(), "%s is powered off already", vm.name())
	}
	err := vm.closeDisks()
	vm.on.Store(false)
	vm.holdFiles()
	return err
}

func (vm *VM) closeDisks() error {
	var errs []error
	for _, d := range vm.disks {
		if d.d == nil {
			continue
		}
		v := d.d
		errs = append(errs, v.Sync())
		d.as.Store(see(v))
		d.d = nil
		errs = append(errs, v.Close())
	}
	return errors.Join(errs...)
}

// holdFiles tells the host which files the VM holds now: what it writes to
// against everyone, what it reads only against writers.
func (vm *VM) holdFiles() {
	held := map[string]bool{}
	if vm.on.Load() {
		held[vm.path] = false
		if nvram, ok := vm.x.Get("nvram"); ok {
			held[vm.beside(nvram)] = false
		}
		for _, d := range vm.disks {
			links := d.seen().links
			for i, l := range links {
				running := i == len(links)-1
				held[vm.h.rel(l.Descriptor)] = false
				held[vm.h.rel(l.Extent)] = running
				if l.Tracking != "" {
					held[vm.h.rel(l.Tracking)] = running
				}
			}
		}
	}
	vm.h.mu.Lock()
	defer vm.h.mu.Unlock()
	if len(held) == 0 {
		delete(vm.h.used, vm.id)
		return
	}
	vm.h.used[vm.id] = held
}

// Tracked tells whether the configuration wants change tracking for a disk.
func (vm *VM) tracked(d *disk) bool {
	return vm.x.True("ctkEnabled") && vm.x.True(d.place.Slot()+".ctkEnabled") && !d.independent() && !d.physical()
}

// track brings a disk's change tracking in line with the configuration. With
// snapshots it stays as it is until they are gone: only then does a host know
// what changed before.
func (vm *VM) track(d *disk) error {
	want := vm.tracked(d)
	if s := d.seen(); s.err == nil && len(s.links) > 0 && (s.links[len(s.links)-1].Tracking != "") == want {
		return nil
	}
	return vm.with(d, func(v *vdisk.Disk) error {
		var err error
		switch {
		case want && !v.Tracking():
			err = v.EnableTracking(vdisk.TrackingOptions{})
		case !want && v.Tracking():
			err = v.DisableTracking()
		}
		d.as.Store(see(v))
		if errors.Is(err, vdisk.ErrSnapshots) {
			return nil
		}
		return err
	})
}

// Reconfigure changes the configuration. edit gets a copy and may refuse.
// Change tracking takes effect at once while the VM is off, else with the next
// snapshot or start.
func (vm *VM) Reconfigure(edit func(*vmx.File) error) error {
	vm.mu.Lock()
	err := vm.reconfigure(edit)
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) reconfigure(edit func(*vmx.File) error) error {
	if err := vm.alive(); err != nil {
		return err
	}
	x, err := vmx.Parse(vm.x.Bytes())
	if err != nil {
		return err
	}
	if err := edit(x); err != nil {
		return err
	}
	oldX, oldDisks := vm.x, vm.disks
	vm.x = x
	vm.readDisks(oldDisks)
	for _, d := range vm.disks {
		if slices.Contains(oldDisks, d) {
			continue
		}
		if err := d.seen().err; err != nil {
			vm.x, vm.disks = oldX, oldDisks
			return err
		}
		if vm.on.Load() { // hot add
			if d.d, err = vm.openDisk(d.file); err != nil {
				vm.x, vm.disks = oldX, oldDisks
				return err
			}
		}
	}
	for _, d := range oldDisks {
		if d.d != nil && !slices.Contains(vm.disks, d) { // hot remove
			err = errors.Join(err, d.d.Close())
			d.d = nil
		}
	}
	if !vm.on.Load() && !vm.suspended.Load() {
		for _, d := range vm.disks {
			err = errors.Join(err, vm.track(d))
		}
	}
	err = errors.Join(err, vm.writeVMX())
	vm.holdFiles()
	return err
}
