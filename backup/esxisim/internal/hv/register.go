package hv

import (
	"cmp"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"hikae/backup/vmdk"
	"hikae/backup/vmx"
)

// Register takes a VM into the inventory by its .vmx. A name given replaces the
// one in the file.
func (h *Host) Register(rel, name string) (*VM, error) {
	vm, err := h.load1(rel, 0)
	if err != nil {
		return nil, err
	}
	if name != "" && name != vm.Name() {
		vm.mu.Lock()
		vm.x.Set("displayName", name)
		err = vm.writeVMX()
		vm.mu.Unlock()
	}
	err = errors.Join(err, h.save())
	h.o.Changed(vm.id)
	return vm, err
}

// load1 reads a VM's files and puts it into the inventory under a number; 0 is
// the next free one.
func (h *Host) load1(rel string, id int) (*VM, error) {
	if !strings.HasSuffix(rel, ".vmx") {
		return nil, fail(ErrInvalid, "path", "%s is not the path of a .vmx file", rel)
	}
	for _, vm := range h.VMs() {
		if vm.path == rel {
			return nil, fail(ErrRegistered, strconv.Itoa(vm.id), "the specified key, name, or identifier '%d' already exists", vm.id)
		}
	}
	f, err := h.Open(rel)
	if err != nil {
		return nil, err
	}
	f.Close()
	text, err := os.ReadFile(h.abs(rel))
	if err != nil {
		return nil, fileError(rel, err)
	}
	x, err := vmx.Parse(text)
	if err != nil {
		return nil, fail(ErrInvalid, rel, "%s: %v", rel, err)
	}
	vm := &VM{h: h, path: rel, x: x}
	if err := vm.loadSnapshots(); err != nil {
		return nil, err
	}
	vm.readDisks(nil)
	vm.unmerged = vm.needsMerge()
	if state, ok := x.Get(suspendKey); ok && state != "" {
		_, err := h.root.Stat(vm.beside(path.Base(state)))
		vm.suspended.Store(err == nil)
	}

	h.mu.Lock()
	defer h.mu.Unlock()
	for _, other := range h.vms {
		if other.path == rel { // registered by someone else meanwhile
			return nil, fail(ErrRegistered, strconv.Itoa(other.id), "the specified key, name, or identifier '%d' already exists", other.id)
		}
	}
	if vm.id = id; id == 0 {
		vm.id = h.next
	}
	h.next = max(h.next, vm.id+1)
	h.vms[vm.id] = vm
	return vm, nil
}

// readDisks makes the list of disks from the .vmx, keeping those of old that
// are still in it as they are.
func (vm *VM) readDisks(old []*disk) {
	var disks []*disk
	for _, l := range vm.x.Disks() {
		place, err := ParseSlot(l.Slot)
		if err != nil {
			vm.h.o.Logger.Warn("a disk is attached where there is no place", "vm", vm.path, "slot", l.Slot)
			continue
		}
		file, err := vm.diskFile(l.File)
		if err != nil {
			file = vm.beside(path.Base(l.File))
		}
		mode, _ := vm.x.Get(l.Slot + ".mode")
		if mode = strings.ReplaceAll(mode, "-", "_"); mode == "" {
			mode = "persistent"
		}
		if i := slices.IndexFunc(old, func(d *disk) bool { return d.place == place && d.file == file }); i >= 0 {
			old[i].mode = mode
			disks = append(disks, old[i])
			continue
		}
		disks = append(disks, &disk{place: place, file: file, mode: mode})
	}
	slices.SortFunc(disks, func(a, b *disk) int {
		return cmp.Or(cmp.Compare(a.place.Controller, b.place.Controller), cmp.Compare(a.place.Unit, b.place.Unit))
	})
	vm.disks = disks
	for _, d := range disks {
		if d.seen().links == nil {
			vm.look(d)
		}
	}
}

// diskFile resolves a disk's file as a .vmx names it.
func (vm *VM) diskFile(file string) (string, error) {
	if strings.HasPrefix(file, "/") {
		return vm.h.Resolve(file)
	}
	return vm.h.Clean(path.Join(vm.dir(), file))
}

// diskName is a disk's file as the VM's .vmx should name it.
func (vm *VM) diskName(rel string) string {
	if path.Dir(rel) == vm.dir() {
		return path.Base(rel)
	}
	return "/vmfs/volumes/" + vm.h.UUID() + "/" + rel
}

// Unregister takes the VM out of the inventory; its files stay.
func (vm *VM) Unregister() error {
	vm.mu.Lock()
	err := vm.unregister()
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) unregister() error {
	if err := vm.alive(); err != nil {
		return err
	}
	if vm.on.Load() {
		return fail(ErrPower, vm.name(), "%s is powered on", vm.name())
	}
	vm.gone = true
	vm.h.mu.Lock()
	defer vm.h.mu.Unlock()
	delete(vm.h.vms, vm.id)
	return nil
}

// Destroy unregisters the VM and deletes its files, and its directory when
// nothing else is in it.
func (vm *VM) Destroy() error {
	vm.mu.Lock()
	err := vm.unregister()
	var files []string
	if err == nil {
		files = vm.files()
	}
	vm.mu.Unlock()
	for _, name := range files {
		if e := vm.h.Delete(name); e != nil && !errors.Is(e, ErrNotFound) {
			err = errors.Join(err, e)
		}
	}
	if err == nil && vm.dir() != "." {
		if e := vm.h.Remove(vm.dir()); e != nil && !errors.Is(e, ErrNotEmpty) {
			err = e
		}
	}
	return vm.done(err)
}

// files are all the VM consists of.
func (vm *VM) files() []string {
	files := []string{vm.path, vm.beside(vm.base() + ".vmsd"), vm.beside("vmware.log")}
	if nvram, ok := vm.x.Get("nvram"); ok {
		files = append(files, vm.beside(nvram))
	}
	if state, ok := vm.x.Get(suspendKey); ok && state != "" {
		files = append(files, vm.beside(path.Base(state)))
	}
	tops := map[string]bool{}
	for _, d := range vm.disks {
		tops[d.file] = true
	}
	for _, s := range vm.snaps {
		files = append(files, vm.beside(s.file(vm)))
		for _, d := range s.Disks {
			tops[d.File] = true
		}
	}
	links := map[string]bool{}
	for top := range tops {
		for name := top; name != "" && !links[name]; {
			links[name] = true
			d, err := vm.h.descriptor(name)
			if err != nil {
				break
			}
			files = append(files, linkFiles(name, d)...)
			name = vm.h.parentOf(name, d)
		}
	}
	return files
}

// descriptor reads a link's descriptor.
func (h *Host) descriptor(rel string) (*vmdk.Descriptor, error) {
	text, err := os.ReadFile(h.abs(rel))
	if err != nil {
		return nil, fileError(rel, err)
	}
	return vmdk.ParseDescriptor(text)
}

// parentOf is the descriptor of a link's parent; "" for a base link.
func (h *Host) parentOf(rel string, d *vmdk.Descriptor) string {
	hint := d.ParentFileNameHint
	switch {
	case d.ParentCID == vmdk.NoParent || hint == "":
		return ""
	case filepath.IsAbs(hint):
		p, err := h.Resolve(hint)
		if err != nil {
			return h.rel(hint)
		}
		return p
	}
	return path.Join(path.Dir(rel), hint)
}

// linkFiles are the files of one link.
func linkFiles(rel string, d *vmdk.Descriptor) []string {
	files := []string{rel}
	for _, e := range d.Extents {
		if e.File != "" {
			files = append(files, path.Join(path.Dir(rel), e.File))
		}
	}
	if d.ChangeTrackPath != "" {
		files = append(files, path.Join(path.Dir(rel), d.ChangeTrackPath))
	}
	return files
}
