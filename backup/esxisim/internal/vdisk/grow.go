package vdisk

import (
	"errors"
	"fmt"
	"os"

	"hikae/backup/vmdk"
)

// Grow makes the disk bigger, with zeros at its end. The capacity, in bytes, is a multiple of 512. Change tracking keeps its identity
// and its block size and knows of no change in what was added: as hosts are known to get wrong, so nobody may rely on change ids across
// it. ErrSnapshots: a disk with snapshots cannot grow.
func (d *Disk) Grow(capacity int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return err
	}
	l := d.links[0]
	switch {
	case len(d.links) > 1:
		return fmt.Errorf("%s: it cannot grow: %w", d.name, ErrSnapshots)
	case l.desc.Extents[0].Type == ExtentRDM:
		return fmt.Errorf("%s: a raw device mapping cannot grow: %w", d.name, ErrFormat)
	case capacity < d.size || capacity%vmdk.SectorSize != 0:
		return fmt.Errorf("%s: it has %d bytes and cannot have %d", d.name, d.size, capacity)
	}
	if err := d.release(); err != nil {
		return err
	}
	if err := os.Truncate(l.extent(), capacity); err != nil {
		return errors.Join(err, d.rebuild())
	}
	if l.tracking != nil {
		table, _, err := l.readTable()
		if err != nil {
			return errors.Join(err, d.rebuild())
		}
		head := *l.tracking
		head.Capacity = capacity
		if err := writeTracking(l.ctk(), &head, table, l.strange); err != nil {
			return errors.Join(err, d.rebuild())
		}
		l.tracking = &head
	}
	desc := l.desc.Clone()
	desc.Extents[0].Sectors = capacity / vmdk.SectorSize
	shape := vmdk.NewFlatDescriptor(d.name, capacity, desc.Value("ddb.adapterType"), false, "", 0)
	desc.SetValue("ddb.geometry.cylinders", shape.Value("ddb.geometry.cylinders"))
	desc.SetValue("ddb.geometry.heads", shape.Value("ddb.geometry.heads"))
	desc.SetValue("ddb.geometry.sectors", shape.Value("ddb.geometry.sectors"))
	if err := writeDescriptor(l.path, desc); err != nil {
		return errors.Join(err, d.rebuild())
	}
	l.desc, d.size = desc, capacity
	return errors.Join(l.grown(), d.rebuild())
}
