package vdisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"hikae/backup/vmdk"
)

// step is a point where a kill leaves files that must be a valid chain.
func (d *Disk) step(format string, args ...any) error {
	if d.hook == nil {
		return nil
	}
	return d.hook(fmt.Sprintf(format, args...))
}

// Snapshot freezes the running link and starts a new one above it: NAME-00000N.vmdk with the first N that is free. Afterwards
// the frozen link is number len(Links())-2.
func (d *Disk) Snapshot(f Format) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return err
	}
	if err := d.release(); err != nil {
		return err
	}
	var head *vmdk.Tracking
	if t := d.links[len(d.links)-1].tracking; t != nil {
		head = d.newTracking(t.UUID, t.Number+1, t.Granularity)
	}
	l, err := d.newLink(d.links[len(d.links)-1], f, head)
	if err != nil {
		return errors.Join(err, d.rebuild())
	}
	d.links = append(d.links, l)
	d.blind = false
	return d.rebuild()
}

// newLink writes an empty link over parent.
func (d *Disk) newLink(parent *link, f Format, head *vmdk.Tracking) (l *link, err error) {
	if f == FormatAuto {
		f = FormatCOWD
		if d.o.VMFS >= 6 || d.size >= maxCOWD {
			f = FormatSESparse
		}
	}
	createType, extentType, suffix := vmdk.TypeSESparse, vmdk.ExtentSESparse, "-sesparse.vmdk"
	switch f {
	case FormatCOWD:
		createType, extentType, suffix = vmdk.TypeVMFSSparse, vmdk.ExtentVMFSSparse, "-delta.vmdk"
	case FormatSESparse:
	default:
		return nil, fmt.Errorf("%s: a snapshot is kept as COWD or SEsparse: %w", d.name, ErrFormat)
	}
	name, err := d.freeName()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(d.dir, name+".vmdk")
	extent := filepath.Join(d.dir, name+suffix)
	file, err := os.OpenFile(extent, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeFiles(path, extent, filepath.Join(d.dir, name+"-ctk.vmdk")))
		}
	}()
	_, err = vmdk.CreateDelta(context.Background(), file, createType, d.size)
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if err := d.step("extent of %s", name); err != nil {
		return nil, err
	}
	hint := filepath.Base(parent.path)
	if parent.dir() != d.dir {
		hint = parent.path
	}
	desc := &vmdk.Descriptor{
		Version: 1, Encoding: "UTF-8", CID: parent.desc.CID, ParentCID: parent.desc.CID, CreateType: createType,
		Other:              []string{`isNativeSnapshot="no"`},
		ParentFileNameHint: hint,
		Extents:            []vmdk.Extent{{Access: "RW", Sectors: d.size / vmdk.SectorSize, Type: extentType, File: name + suffix}},
	}
	desc.SetValue("ddb.longContentID", parent.desc.Value("ddb.longContentID"))
	l = &link{path: path, desc: desc}
	if head != nil {
		if err := d.track(l, head, nil); err != nil {
			return nil, err
		}
	} else if err := writeDescriptor(path, desc); err != nil {
		return nil, err
	}
	return openLink(path)
}

// freeName is the first link name that no file has.
func (d *Disk) freeName() (string, error) {
	for n := 1; n < 1e6; n++ {
		name := fmt.Sprintf("%s-%06d", d.name, n)
		free := true
		for _, suffix := range []string{".vmdk", "-delta.vmdk", "-sesparse.vmdk", "-ctk.vmdk"} {
			if _, err := os.Lstat(filepath.Join(d.dir, name+suffix)); !errors.Is(err, os.ErrNotExist) {
				free = false
			}
		}
		if free {
			return name, nil
		}
	}
	return "", fmt.Errorf("%s: no free name for a snapshot in %s", d.name, d.dir)
}

// RemoveSnapshot removes the snapshot whose state is link i: link i+1 is merged into link i and deleted. Links above keep their
// content. No other link may stand on link i or on link i+1.
//
// switched, when not nil, is called when the new chain is complete and before anything of the old one is deleted, with the
// new links, so that the caller can rewrite what names them; if it fails both chains are there and the old one stays in use.
func (d *Disk) RemoveSnapshot(ctx context.Context, i int, switched func(links []Link) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return err
	}
	if i < 0 || i+1 >= len(d.links) {
		return fmt.Errorf("%s: snapshot %d: %w", d.name, i, ErrNoSnapshot)
	}
	if err := errors.Join(d.release(), d.rebuild()); err != nil {
		return err
	}
	p, c := d.links[i], d.links[i+1]
	// Until the switch the child still covers what the parent has taken in: the chain is the old one, with the same bytes.
	for _, do := range []func() error{
		func() error { return d.mergeData(ctx, i) },
		func() error { return d.step("data merged") },
		func() error { return mergeTables(p, c) },
		func() error { return d.step("tracking merged") },
	} {
		if err := do(); err != nil {
			return errors.Join(err, d.rebuild())
		}
	}
	undo, err := d.switchParent(i)
	if err != nil {
		return errors.Join(err, d.rebuild())
	}
	old := d.links
	merged, err := openLink(p.path)
	if err != nil {
		return errors.Join(err, undo(), d.rebuild())
	}
	d.links = append(slices.Concat(old[:i], []*link{merged}), old[i+2:]...)
	if err = d.step("switched"); err == nil && switched != nil {
		err = switched(d.list())
	}
	if err != nil {
		merged.file.Close()
		d.links = old
		return errors.Join(err, undo(), d.rebuild())
	}
	// The child's descriptor goes before the parent's content id does: whoever still opens the disk by it finds a whole chain.
	err = errors.Join(p.file.Close(), c.file.Close(), d.delete(c.path))
	if err == nil {
		err = d.adoptID(i, c)
	}
	return errors.Join(err, d.rebuild(), d.deleteLinks(c))
}

// switchParent makes the link above i+1 stand on i: one rename, after which both it and link i+1 are whole chains. Link i keeps its
// content id for that, although its content is another now: it is the one id both of them name.
func (d *Disk) switchParent(i int) (undo func() error, err error) {
	if i+2 >= len(d.links) {
		return func() error { return nil }, nil
	}
	g, p := d.links[i+2], d.links[i]
	old, desc := g.desc, g.desc.Clone()
	desc.ParentFileNameHint, desc.ParentCID = filepath.Base(p.path), p.desc.CID
	if p.dir() != g.dir() {
		desc.ParentFileNameHint = p.path
	}
	if err := writeDescriptor(g.path, desc); err != nil {
		return nil, err
	}
	g.desc = desc
	return func() error {
		g.desc = old
		return writeDescriptor(g.path, old)
	}, nil
}

// adoptID gives the new running link i the content id of the old one, now that no other link names it.
func (d *Disk) adoptID(i int, c *link) error {
	if i != len(d.links)-1 {
		return nil
	}
	l := d.links[i]
	desc := l.desc.Clone()
	desc.CID = c.desc.CID
	desc.SetValue("ddb.longContentID", c.desc.Value("ddb.longContentID"))
	if err := d.step("before the content id"); err != nil {
		return err
	}
	if err := writeDescriptor(l.path, desc); err != nil {
		return err
	}
	l.desc = desc
	return nil
}

func (d *Disk) deleteLinks(links ...*link) error {
	for _, l := range links {
		files := []string{l.path, l.extent()}
		if l.tracking != nil {
			files = append(files, l.ctk())
		}
		for _, f := range files {
			if err := d.delete(f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *Disk) delete(path string) error {
	if err := d.step("delete %s", filepath.Base(path)); err != nil {
		return err
	}
	return removeFiles(path)
}

// mergeData writes what link i+1 holds into link i.
func (d *Disk) mergeData(ctx context.Context, i int) (err error) {
	p := d.links[i]
	f, err := os.OpenFile(p.extent(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), p.grown()) }()
	var delta *vmdk.Delta
	var below io.ReaderAt
	if p.format != FormatFlat {
		if delta, err = vmdk.OpenDelta(ctx, f, p.file.Size(), p.desc.CreateType); err != nil {
			return fmt.Errorf("%s: %w", p.extent(), err)
		}
		if i > 0 {
			below = d.chain.At(i - 1)
		}
	}
	held := d.chain.At(i + 1)
	buf := make([]byte, copyStep)
	for off := int64(0); ; {
		a, isZero, err := d.chain.Held(ctx, i+1, off)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := d.step("merge at %d", a.Offset); err != nil {
			return err
		}
		if !isZero {
			a.Length = min(a.Length, int64(len(buf)))
		}
		switch {
		case isZero && delta == nil:
			err = clearRange(f, a.Offset, a.Length, d.thin())
		case isZero:
			err = delta.Zero(ctx, a.Offset, a.Length, below)
		default:
			p := buf[:a.Length]
			if _, err = held.ReadAtContext(ctx, p, a.Offset); err != nil {
				break
			}
			if delta != nil {
				err = delta.WriteAt(ctx, p, a.Offset, below)
			} else {
				_, err = f.WriteAt(p, a.Offset)
			}
		}
		if err != nil {
			return err
		}
		off = a.End()
	}
}

// RevertTo starts a new running link over link i and throws away what is above link i. With i the running link itself nothing is
// thrown away: that one is frozen, which a caller that keeps a tree of snapshots uses to start another branch. Change tracking
// gets a new identity. switched is called as in RemoveSnapshot.
func (d *Disk) RevertTo(i int, switched func(links []Link) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return err
	}
	if i < 0 || i >= len(d.links) {
		return fmt.Errorf("%s: link %d: %w", d.name, i, ErrNoSnapshot)
	}
	if err := d.release(); err != nil {
		return err
	}
	var head *vmdk.Tracking
	if t := d.links[i].tracking; t != nil {
		var uuid [16]byte
		if _, err := io.ReadFull(d.o.Rand, uuid[:]); err != nil {
			return errors.Join(err, d.rebuild())
		}
		head = d.newTracking(uuid, 1, t.Granularity)
	}
	l, err := d.newLink(d.links[i], FormatAuto, head)
	if err != nil {
		return errors.Join(err, d.rebuild())
	}
	old := d.links
	d.links = append(slices.Clone(old[:i+1]), l)
	if switched != nil {
		if err := switched(d.list()); err != nil {
			l.file.Close()
			d.links = old
			return errors.Join(err, d.deleteLinks(l), d.rebuild())
		}
	}
	d.blind = false
	var errs []error
	for _, l := range old[i+1:] {
		errs = append(errs, l.file.Close())
	}
	// From the top: what is left when this is cut short is a shorter chain, not a broken one.
	gone := slices.Clone(old[i+1:])
	slices.Reverse(gone)
	return errors.Join(errors.Join(errs...), d.deleteLinks(gone...), d.rebuild())
}
