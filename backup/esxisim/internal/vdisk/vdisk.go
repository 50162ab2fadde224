// Package vdisk keeps the disk of a simulated VM in true VMDK files: a flat base, COWD or SEsparse links above it, and
// change tracking files, all as a host writes them.
//
// # Invariants
//
//   - The files are the disk. Nothing else is kept anywhere, and qemu-img reads the same bytes from them as the guest.
//   - Only the running link, the last of the chain, is ever written. A frozen link is opened read-only and never changes, until
//     the removal of its snapshot merges the link above into it.
//   - A process killed at any point leaves a chain that opens and holds every guest write that returned. Removing a snapshot merges
//     the data first, then switches descriptors, one at a time and each by a rename, and deletes last.
//   - As on a host: a link names its parent and the parent's content id; the running link's content id changes with the first
//     write after it was opened; change tracking makes the descriptor's version 3.
package vdisk

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"hikae/backup/vmdk"
)

var (
	// ErrChangeID means a change id of another disk, or one newer than the point asked about.
	ErrChangeID = errors.New("change id does not belong to this disk's change tracking")
	// ErrTracking means change tracking is off.
	ErrTracking = errors.New("change tracking is off")
	// ErrSnapshots means a call that needs a disk without snapshots.
	ErrSnapshots = errors.New("the disk has snapshots")
	// ErrNoSnapshot means a snapshot's number that does not exist.
	ErrNoSnapshot = errors.New("no such snapshot")
	// ErrFormat means a chain this package does not write.
	ErrFormat = errors.New("not a disk of this host")
)

// Format is how a link is kept.
type Format int

// FormatAuto chooses as a host does: SEsparse on VMFS 6 and for disks from 2 TiB on, else COWD.
const (
	FormatAuto Format = iota
	FormatFlat
	FormatCOWD
	FormatSESparse
)

// Descriptors of raw device mappings.
const (
	ExtentRDM       = "VMFSRDM"
	TypePhysicalRDM = "vmfsPassthroughRawDeviceMap"
	TypeVirtualRDM  = "vmfsRawDeviceMap"
)

// maxCOWD is the size from which on a host uses SEsparse whatever the datastore, in bytes.
const maxCOWD = 2 << 40

// Options of a disk. The zero value is thick (lazily zeroed), lsilogic, a random identity, on VMFS 6.
type Options struct {
	Thin    bool
	Eager   bool   // eagerly zeroed: every byte is written
	Adapter string // "" is lsilogic
	UUID    string // "60 00 C2 9…"; "" is random
	VMFS    int    // 5 or 6; 0 is 6
	// RDM makes a raw device mapping, TypePhysicalRDM or TypeVirtualRDM; a file plays the device.
	RDM string
	// Hardware is the VM's virtual hardware version, which decides how fine change tracking is; 0 is older than 17.
	Hardware int
	Rand     io.Reader
}

// Link is one link's files, as full paths.
type Link struct {
	Descriptor, Extent string
	Tracking           string // "" when change tracking is off
	Format             Format
	ChangeID           string // "" when change tracking is off
}

// Disk is one disk. It is safe for concurrent use.
type Disk struct {
	o    Options
	dir  string
	name string // without -00000N
	size int64
	hook func(step string) error // tests: told before each change of the files that a kill could separate

	mu      sync.RWMutex
	links   []*link
	chain   *vmdk.Chain // all links
	below   *vmdk.Chain // all but the running one; nil without snapshots
	running *running    // nil until the first write
	miss    bool        // tracking misses the next write
	blind   bool        // tracking misses every write to this link
	closed  bool
}

// link is one link, opened for reading.
type link struct {
	path     string
	desc     *vmdk.Descriptor
	format   Format
	file     *vmdk.LocalFile
	tracking *vmdk.Tracking // header; nil when off
	strange  bool           // the tracking file has a layout of its own
}

func (l *link) dir() string    { return filepath.Dir(l.path) }
func (l *link) extent() string { return filepath.Join(l.dir(), l.desc.Extents[0].File) }
func (l *link) ctk() string    { return filepath.Join(l.dir(), l.desc.ChangeTrackPath) }

// running is the running link, opened for writing.
type running struct {
	file  *os.File
	delta *vmdk.Delta // nil: flat
	track *tracker    // nil: off
}

// Create makes NAME.vmdk and NAME-flat.vmdk in dir. The capacity, in bytes, is a multiple of 512.
func Create(dir, name string, capacity int64, o Options) (*Disk, error) {
	if capacity <= 0 || capacity%vmdk.SectorSize != 0 {
		return nil, fmt.Errorf("disk %s of %d bytes: not a positive number of sectors", name, capacity)
	}
	return create(dir, name, capacity, o, func(f *os.File) error {
		if o.Eager {
			return writeZeros(f, 0, capacity)
		}
		return f.Truncate(capacity)
	})
}

// ImportRaw makes a disk with an image's content, holes kept. The image is raw, or anything vmdk.OpenImage reads. The capacity is
// its size rounded up to whole sectors.
func ImportRaw(ctx context.Context, dir, name, raw string, o Options) (d *Disk, err error) {
	image, err := vmdk.OpenImage(raw)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	return create(dir, name, image.Capacity(), o, func(f *os.File) error {
		if err := copyImage(ctx, f, image, raw); err != nil {
			return err
		}
		if o.Eager {
			return fillHoles(ctx, f)
		}
		return nil
	})
}

func create(dir, name string, capacity int64, o Options, fill func(*os.File) error) (d *Disk, err error) {
	if name == "" || strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("disk name %q", name)
	}
	o = o.withDefaults()
	path := filepath.Join(dir, name+".vmdk")
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("%s: %w", path, os.ErrExist)
	}
	uuid := o.UUID
	if uuid == "" {
		var b [16]byte
		if _, err := io.ReadFull(o.Rand, b[:]); err != nil {
			return nil, err
		}
		// VMware's own prefix for disks, NAA 6 with their company id.
		b[0], b[1], b[2], b[3] = 0x60, 0x00, 0xc2, 0x90|b[3]&0xf
		uuid = strings.Replace(vmdk.FormatUUID(b), "c2", "C2", 1)
	}
	suffix := "-flat.vmdk"
	switch o.RDM {
	case TypePhysicalRDM:
		suffix = "-rdmp.vmdk"
	case TypeVirtualRDM:
		suffix = "-rdm.vmdk"
	}
	flat := filepath.Join(dir, name+suffix)
	f, err := os.OpenFile(flat, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.Remove(flat)
		}
	}()
	if err := errors.Join(fill(f), f.Close()); err != nil {
		return nil, err
	}
	// The id of content that was never written, as a host has it.
	desc := vmdk.NewFlatDescriptor(name, capacity, o.Adapter, o.Thin, uuid, vmdk.NoParent-1)
	desc.SetValue("ddb.longContentID", strings.Repeat("f", 31)+"e")
	if o.RDM != "" {
		desc.CreateType, desc.Extents[0].Type, desc.Extents[0].File = o.RDM, ExtentRDM, name+suffix
	}
	if err := writeDescriptor(path, desc); err != nil {
		return nil, err
	}
	return Open(path, o)
}

func (o Options) withDefaults() Options {
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.VMFS == 0 {
		o.VMFS = 6
	}
	return o
}

// Open opens a disk by the descriptor of its running link, with all parents. It reads only; the first write opens
// that link for writing. Of the options VMFS, Hardware and Rand matter.
func Open(descriptor string, o Options) (*Disk, error) {
	d := &Disk{o: o.withDefaults(), dir: filepath.Dir(descriptor)}
	path := descriptor
	for {
		l, err := openLink(path)
		if err == nil && len(d.links) >= 255 {
			err = fmt.Errorf("%s: %w: more than 255 links", path, ErrFormat)
		}
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		d.links = append([]*link{l}, d.links...)
		if l.desc.ParentCID == vmdk.NoParent {
			break
		}
		if path = l.desc.ParentFileNameHint; !filepath.IsAbs(path) {
			path = filepath.Join(l.dir(), path)
		}
	}
	d.name = strings.TrimSuffix(filepath.Base(d.links[0].path), ".vmdk")
	d.size = d.links[0].desc.Capacity()
	if err := d.rebuild(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func openLink(path string) (*link, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	desc, err := vmdk.ParseDescriptor(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	l := &link{path: path, desc: desc}
	if len(desc.Extents) != 1 {
		return nil, fmt.Errorf("%s: %w: %d extents", path, ErrFormat, len(desc.Extents))
	}
	switch desc.Extents[0].Type {
	case vmdk.ExtentVMFS, vmdk.ExtentFlat, ExtentRDM:
		l.format = FormatFlat
	case vmdk.ExtentVMFSSparse:
		l.format = FormatCOWD
	case vmdk.ExtentSESparse:
		l.format = FormatSESparse
	default:
		return nil, fmt.Errorf("%s: %w: extent of type %s", path, ErrFormat, desc.Extents[0].Type)
	}
	if l.format == FormatFlat && desc.Extents[0].Offset != 0 {
		return nil, fmt.Errorf("%s: %w: flat extent at sector %d", path, ErrFormat, desc.Extents[0].Offset)
	}
	f, err := os.Open(l.extent())
	if err != nil {
		return nil, err
	}
	if l.file, err = vmdk.NewLocalFile(f); err != nil {
		f.Close()
		return nil, err
	}
	if desc.ChangeTrackPath != "" {
		if l.tracking, l.strange, err = readTracking(l.ctk()); err != nil {
			f.Close()
			return nil, err
		}
	}
	return l, nil
}

// rebuild puts the chains together anew, after links came or went.
func (d *Disk) rebuild() (err error) {
	sources := make([]vmdk.LinkSource, len(d.links))
	for i, l := range d.links {
		sources[i] = vmdk.LinkSource{
			Name: l.path, Descriptor: l.desc, Files: []vmdk.File{{R: l.file, Size: l.file.Size()}},
		}
		if l.desc.Extents[0].Type == ExtentRDM { // here a file plays the device
			sources[i].Descriptor = l.desc.Clone()
			sources[i].Descriptor.CreateType, sources[i].Descriptor.Extents[0].Type = vmdk.TypeVMFS, vmdk.ExtentVMFS
		}
	}
	top := len(sources) - 1
	if d.running != nil {
		sources[top].Running = d.running.delta
	}
	if d.chain, err = vmdk.OpenChain(context.Background(), sources, vmdk.ChainOptions{}); err != nil {
		return err
	}
	if d.below = nil; top > 0 {
		d.below = d.chain.At(top - 1)
	}
	return nil
}

// Close closes the files.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	if !d.closed {
		errs = append(errs, d.release())
		for _, l := range d.links {
			errs = append(errs, l.file.Close())
		}
	}
	d.closed = true
	return errors.Join(errs...)
}

// release closes the running link's writing side. The chains need a rebuild afterwards.
func (d *Disk) release() error {
	r := d.running
	if d.running = nil; r == nil {
		return nil
	}
	err := errors.Join(r.file.Close(), d.links[len(d.links)-1].grown())
	if r.track != nil {
		err = errors.Join(err, r.track.file.Close())
	}
	return err
}

// grown lets the reading side know the file's length after writes.
func (l *link) grown() (err error) {
	f, err := vmdk.NewLocalFile(l.file.File)
	if err == nil {
		l.file = f
	}
	return err
}

// Sync forces what the guest wrote to the storage.
func (d *Disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil || d.running == nil {
		return err
	}
	err := d.running.file.Sync()
	if t := d.running.track; t != nil {
		err = errors.Join(err, t.file.Sync())
	}
	return err
}

func (d *Disk) open() error {
	if d.closed {
		return fmt.Errorf("%s: %w", d.links[len(d.links)-1].path, os.ErrClosed)
	}
	return nil
}

// Capacity is the disk's size in bytes.
func (d *Disk) Capacity() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.size
}

// Links are the links, base first; the last one is the running link.
func (d *Disk) Links() []Link {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.list()
}

func (d *Disk) list() []Link {
	out := make([]Link, len(d.links))
	for i, l := range d.links {
		out[i] = Link{Descriptor: l.path, Extent: l.extent(), Format: l.format}
		if l.tracking != nil {
			out[i].Tracking, out[i].ChangeID = l.ctk(), l.tracking.ChangeID()
		}
	}
	return out
}

// Descriptor is a copy of link i's descriptor.
func (d *Disk) Descriptor(i int) *vmdk.Descriptor {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.links[i].desc.Clone()
}
