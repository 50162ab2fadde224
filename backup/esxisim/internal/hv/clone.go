package hv

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
)

// Clone copies a disk with all its parents into a new one without any.
func (h *Host) Clone(ctx context.Context, from, to string, thin, eager bool) (err error) {
	base, ok := strings.CutSuffix(path.Base(to), ".vmdk")
	if !ok || base == "" {
		return fail(ErrInvalid, "name", "%s is not the path of a .vmdk file", to)
	}
	chain, err := h.chain(from)
	if err != nil {
		return err
	}
	for _, name := range []string{to, path.Join(path.Dir(to), base+"-flat.vmdk")} {
		if _, err := h.Stat(name); err == nil {
			return fail(ErrExists, name, "%s already exists", name)
		}
	}
	src, err := vmdk.OpenImage(h.abs(from))
	if err != nil {
		return fail(ErrInvalid, from, "cannot open the disk %s: %v", from, err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	need := src.Capacity()
	if thin {
		need = 0
		for _, l := range chain {
			for _, name := range l.files {
				if fi, err := h.Stat(name); err == nil {
					need += allocated(fi)
				}
			}
		}
	}
	if !h.space.fits(min(need, src.Capacity())) {
		return fail(ErrNoSpace, to, "there is not enough space on the file system for %s", to)
	}
	d, err := vdisk.ImportRaw(ctx, h.abs(path.Dir(to)), base, h.abs(from), vdisk.Options{Thin: thin, Eager: eager, VMFS: h.o.VMFS, Adapter: chain[len(chain)-1].adapter})
	h.space.refresh()
	if errors.Is(err, fs.ErrNotExist) {
		return fail(ErrNotFound, path.Dir(to), "%s was not found", path.Dir(to))
	}
	if err != nil {
		return err
	}
	return d.Close()
}

// chainLink is a link of a disk, as its files say it.
type chainLink struct {
	file, adapter string
	files         []string
	d             *vmdk.Descriptor
}

// chain reads a disk's links from the one named down to the base. A link that a
// running VM writes to cannot be read.
func (h *Host) chain(rel string) ([]chainLink, error) {
	var chain []chainLink
	for name := rel; name != "" && len(chain) <= maxLinks; {
		if _, err := h.Stat(name); err != nil {
			return nil, err
		}
		d, err := h.descriptor(name)
		if err != nil {
			return nil, fail(ErrInvalid, name, "%s is no disk: %v", name, err)
		}
		l := chainLink{file: name, adapter: d.Value("ddb.adapterType"), files: linkFiles(name, d), d: d}
		for _, f := range l.files {
			if h.InUse(f, false) {
				return nil, fail(ErrLocked, f, "failed to lock %s: it is in use by a running VM", f)
			}
		}
		chain = append(chain, l)
		name = h.parentOf(name, d)
	}
	return chain, nil
}

// CheckChain tells what is wrong with a disk's chain: a parent that is not
// there or is not the one the link was made over.
func (h *Host) CheckChain(rel string) error {
	chain, err := h.chain(rel)
	if err != nil {
		return err
	}
	for i, l := range chain[:len(chain)-1] {
		if l.d.ParentCID != chain[i+1].d.CID {
			return fail(ErrInvalid, l.file, "Content ID mismatch (parentCID %08x != %08x)", l.d.ParentCID, chain[i+1].d.CID)
		}
	}
	for _, l := range chain {
		for _, f := range l.files {
			if _, err := h.Stat(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// RenameDisk gives a disk without snapshots another name.
func (h *Host) RenameDisk(from, to string) error {
	base, ok := strings.CutSuffix(path.Base(to), ".vmdk")
	if !ok || base == "" {
		return fail(ErrInvalid, "name", "%s is not the path of a .vmdk file", to)
	}
	chain, err := h.chain(from)
	if err != nil {
		return err
	}
	if len(chain) > 1 {
		return fail(ErrUnsupported, from, "%s has parents", from)
	}
	if _, err := h.Stat(to); err == nil {
		return fail(ErrExists, to, "%s already exists", to)
	}
	d := chain[0].d.Clone()
	old := strings.TrimSuffix(path.Base(from), ".vmdk")
	rename := func(name string) string { return base + strings.TrimPrefix(name, old) }
	for i, e := range d.Extents {
		d.Extents[i].File = rename(e.File)
		if err := h.Move(path.Join(path.Dir(from), e.File), path.Join(path.Dir(to), rename(e.File)), false); err != nil {
			return err
		}
	}
	if t := d.ChangeTrackPath; t != "" {
		d.ChangeTrackPath = rename(t)
		if err := h.Move(path.Join(path.Dir(from), t), path.Join(path.Dir(to), rename(t)), false); err != nil {
			return err
		}
	}
	if err := WriteFile(h.abs(to), d.Bytes()); err != nil {
		return fileError(to, err)
	}
	return h.Delete(from)
}

// GrowDisk makes a disk of no running VM bigger, capacity in bytes.
func (h *Host) GrowDisk(rel string, capacity int64) error {
	chain, err := h.chain(rel)
	if err != nil {
		return err
	}
	for _, vm := range h.VMs() {
		vm.mu.RLock()
		needed := len(vm.snaps) > 0 && vm.named(rel)
		vm.mu.RUnlock()
		if needed {
			return fail(ErrUnsupported, rel, "%s is needed by snapshots of %s", rel, vm.path)
		}
	}
	d := chain[0].d
	if len(chain) > 1 || h.InUse(rel, true) {
		return fail(ErrLocked, rel, "%s is in use or has parents", rel)
	}
	if capacity < d.Capacity() || capacity%512 != 0 {
		return fail(ErrInvalid, "capacity", "%s has %d bytes already", rel, d.Capacity())
	}
	if d.Value("ddb.thinProvisioned") != "1" && !h.space.fits(capacity-d.Capacity()) {
		return fail(ErrNoSpace, rel, "there is not enough space on the file system for %s", rel)
	}
	v, err := vdisk.Open(h.abs(rel), vdisk.Options{VMFS: h.o.VMFS})
	if err != nil {
		return fail(ErrInvalid, rel, "%v", err)
	}
	err = errors.Join(v.Grow(capacity), v.Close())
	h.space.refresh()
	for _, vm := range h.VMs() {
		vm.mu.Lock()
		for _, d := range vm.disks {
			if d.file == rel {
				vm.look(d)
			}
		}
		vm.mu.Unlock()
		h.o.Changed(vm.id)
	}
	return err
}

// Extent is one piece of a disk's mapping onto its volume.
type Extent struct {
	Offset, Length int64 // bytes
	Allocated      bool  // it has blocks on the volume
	Zeroed         bool  // the blocks were never written: they read as zeros
	Place          int64 // on the volume, in bytes
}

// blockSize is VMFS's.
const blockSize = 1 << 20

// Mapping tells how a flat disk lies on its volume, in whole blocks.
func (h *Host) Mapping(rel string) (capacity int64, list []Extent, err error) {
	chain, err := h.chain(rel)
	if err != nil {
		return 0, nil, err
	}
	d := chain[0].d
	if len(d.Extents) != 1 || len(chain[0].files) < 2 {
		return 0, nil, fail(ErrInvalid, rel, "%s has no single extent", rel)
	}
	data := chain[0].files[1]
	fi, err := h.Stat(data)
	if err != nil {
		return 0, nil, err
	}
	thick := h.charge(data, fi) >= fi.Size()
	f, err := os.Open(h.abs(data))
	if err != nil {
		return 0, nil, fileError(data, err)
	}
	defer f.Close()
	add := func(off, end int64, written bool) {
		if off >= end {
			return
		}
		e := Extent{Offset: off, Length: end - off, Allocated: written || thick, Zeroed: !written && thick}
		if n := len(list); n > 0 && list[n-1].Allocated == e.Allocated && list[n-1].Zeroed == e.Zeroed {
			list[n-1].Length += e.Length
			return
		}
		list = append(list, e)
	}
	for off := int64(0); off < fi.Size(); {
		start, end, derr := nextData(f, off)
		if derr != nil {
			add(off, fi.Size(), false)
			break
		}
		start, end = max(start/blockSize*blockSize, off), min((end+blockSize-1)/blockSize*blockSize, fi.Size())
		add(off, start, false)
		add(start, end, true)
		off = max(end, off+1)
	}
	place := int64(1) << 32 // somewhere: what was allocated together lies together
	for i := range list {
		if list[i].Allocated {
			list[i].Place = place
			place += (list[i].Length + blockSize - 1) / blockSize * blockSize
		}
	}
	return fi.Size(), list, nil
}

// AttachOptions of Attach.
type AttachOptions struct {
	Size int64  // bytes
	Thin bool   // else thick
	Mode string // "" is persistent; independent_persistent, independent_nonpersistent
	RDM  string // "" is a flat disk; vdisk.TypePhysicalRDM, vdisk.TypeVirtualRDM
}

// Attach makes an empty disk and attaches it to the VM on the first free unit of
// its first SCSI controller.
func (vm *VM) Attach(o AttachOptions) error {
	info, err := vm.Info()
	if err != nil {
		return err
	}
	if !vm.h.space.fits(map[bool]int64{true: 0, false: o.Size}[o.Thin || o.RDM != ""]) {
		return fail(ErrNoSpace, info.Path, "there is no room for another disk of %s", info.Name)
	}
	base := ""
	for i := 1; base == ""; i++ {
		name := strings.TrimSuffix(path.Base(info.Path), ".vmx") + "_" + string(rune('0'+i%10))
		if i >= 10 {
			return fail(ErrInvalid, info.Name, "%s has enough disks", info.Name)
		}
		if _, err := vm.h.Stat(vm.beside(name + ".vmdk")); err != nil {
			base = name
		}
	}
	d, err := vdisk.Create(vm.h.abs(vm.dir()), base, o.Size, vdisk.Options{Thin: o.Thin || o.RDM != "", RDM: o.RDM, VMFS: vm.h.o.VMFS})
	if err == nil {
		err = d.Close()
	}
	if err != nil {
		return err
	}
	vm.h.space.refresh()
	return vm.Reconfigure(func(x *vmx.File) error {
		AddController(x, "scsi0", "pvscsi")
		place, err := FreeUnit(1000, func(slot string) bool { _, ok := x.Get(slot + ".fileName"); return ok })
		if err != nil {
			return err
		}
		AddDisk(x, place.Slot(), base+".vmdk", o.Mode)
		if x.True("ctkEnabled") {
			x.Set(place.Slot()+".ctkEnabled", "TRUE")
		}
		return nil
	})
}
