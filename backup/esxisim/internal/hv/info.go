package hv

import (
	"cmp"
	"path"
	"slices"
	"time"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

// Info is a VM at one moment. It shares nothing with the VM.
type Info struct {
	ID        int
	Path      string // of the .vmx, relative to the datastore
	Name      string
	On        bool
	Suspended bool
	Question  *Question
	Started   time.Time // when it runs
	Config    *vmx.File
	Disks     []DiskInfo // in controller order
	Snapshots []SnapshotInfo
	Current   int // number of the current snapshot; 0: none
	Unmerged  bool
	Files     []FileInfo
}

// DiskInfo is one disk of a VM, now or in a snapshot.
type DiskInfo struct {
	Place    Place
	Mode     string
	Links    []LinkInfo // base first; one that names the file only when the disk cannot be opened
	Capacity int64      // bytes; 0 when the disk cannot be opened
	UUID     string     // as the descriptor writes it
	Thin     bool
	Adapter  string
	LongID   string
	RDM      string // createType of a raw device mapping; "" for others
}

// LinkInfo is one link of a disk.
type LinkInfo struct {
	File     string // descriptor, relative to the datastore
	Format   vdisk.Format
	ChangeID string // "" without change tracking
}

// SnapshotInfo is one snapshot of a VM.
type SnapshotInfo struct {
	ID, Parent        int
	Name, Description string
	Created           time.Time
	Quiesced, Memory  bool
	File              string // relative to the datastore
	Config            *vmx.File
	Disks             []DiskInfo
}

// maxLinks is the longest chain ESXi runs; it also ends one that leads back to
// itself, as an uploaded descriptor may.
const maxLinks = 32

// FileInfo is one file the VM consists of.
type FileInfo struct {
	Name string // relative to the datastore
	Size int64
	Used int64
}

// Info tells how the VM is now.
func (vm *VM) Info() (Info, error) {
	vm.mu.RLock()
	defer vm.mu.RUnlock()
	if err := vm.alive(); err != nil {
		return Info{}, err
	}
	info := Info{
		ID: vm.id, Path: vm.path, Name: vm.name(), On: vm.on.Load(), Started: vm.started, Config: clone(vm.x),
		Current: vm.current, Unmerged: vm.unmerged, Suspended: vm.suspended.Load(),
	}
	if vm.asked != nil {
		q := vm.asked.Question
		info.Question = &q
	}
	// A link's change id is that of the snapshot it was frozen for, and the
	// running disk's own for the rest.
	ids := map[string]string{}
	for _, d := range vm.disks {
		for _, l := range d.seen().links {
			ids[vm.h.rel(l.Descriptor)] = l.ChangeID
		}
	}
	for _, s := range vm.snaps {
		for _, d := range s.Disks {
			ids[d.File] = d.ChangeID
		}
	}
	for _, d := range vm.disks {
		info.Disks = append(info.Disks, vm.diskInfo(d.place, d.mode, d.file, d.seen(), ids))
	}
	for _, s := range vm.snaps {
		si := SnapshotInfo{
			ID: s.ID, Parent: s.Parent, Name: s.Name, Description: s.Description, Created: s.Created,
			Quiesced: s.Quiesced, Memory: s.Memory, File: vm.beside(s.file(vm)), Config: clone(s.Config),
		}
		for _, d := range s.Disks {
			mode, _ := s.Config.Get(d.Place.Slot() + ".mode")
			si.Disks = append(si.Disks, vm.diskInfo(d.Place, cmp.Or(mode, "persistent"), d.File, vm.at(d), ids))
		}
		info.Snapshots = append(info.Snapshots, si)
	}
	for _, name := range vm.files() {
		if fi, err := vm.h.root.Stat(name); err == nil {
			info.Files = append(info.Files, FileInfo{name, fi.Size(), vm.h.charge(name, fi)})
		}
	}
	return info, nil
}

func clone(x *vmx.File) *vmx.File {
	c, err := vmx.Parse(x.Bytes())
	if err != nil { // longer than a .vmx may be: it was parsed before
		return &vmx.File{}
	}
	return c
}

// at is what is known of the disk a snapshot's link belongs to.
func (vm *VM) at(sd SnapshotDisk) seen {
	for _, d := range vm.disks {
		if d.place == sd.Place {
			return d.seen()
		}
	}
	return seen{}
}

func (vm *VM) diskInfo(place Place, mode, file string, s seen, ids map[string]string) DiskInfo {
	info := DiskInfo{Place: place, Mode: mode, Capacity: s.capacity, UUID: s.uuid, Thin: s.thin, Adapter: s.adapter, LongID: s.longID, RDM: s.rdm}
	for name := file; name != "" && len(info.Links) < maxLinks; {
		d, err := vm.h.descriptor(name)
		if err != nil {
			if name == file {
				info.Links = []LinkInfo{{File: file}}
			}
			break
		}
		format := vdisk.FormatFlat
		switch path.Base(d.CreateType) {
		case "vmfsSparse":
			format = vdisk.FormatCOWD
		case "seSparse":
			format = vdisk.FormatSESparse
		}
		info.Links = append(info.Links, LinkInfo{File: name, Format: format, ChangeID: ids[name]})
		if info.Capacity == 0 {
			info.Capacity = d.Capacity()
		}
		if info.UUID == "" {
			info.UUID = d.Value("ddb.uuid")
		}
		name = vm.h.parentOf(name, d)
	}
	slices.Reverse(info.Links)
	return info
}
