// Package guest recognises what lies in a guest's disk: its partitions, and in each
// of them, or in a disk without any, a file system or whatever else is there.
//
// It looks at signatures, checksums and a few structures that must agree with each
// other and with the room they are in, far less than the checker of a file system
// does. That is enough to tell a disk from one whose beginning is lost, is of
// another day, or of another disk.
//
// A disk is whatever a guest wrote to it, so nothing in it is believed: every length
// is bounded before memory is taken, no loop is longer than a constant, and what
// makes no sense is reported, never an error and never a panic. Only a failing read
// is an error. That something is not recognised is no fault, and neither is a file
// system that was in use when the disk was copied.
package guest

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"hikae/repo/guest/parttable"
)

// Content is what was recognised in a partition or a disk.
type Content struct {
	Kind   string   `json:"kind"` // "ext4", "ntfs", "lvm2", …; "" for what is not recognised
	Label  string   `json:"label,omitempty"`
	UUID   string   `json:"uuid,omitempty"`
	Bytes  int64    `json:"bytes,omitempty"`  // its size as it says itself; 0 when it does not
	Proved []string `json:"proved,omitempty"` // what was checked and holds
	Notes  []string `json:"notes,omitempty"`  // worth knowing, and no fault: it was in use, a spare copy is old
	Faults []string `json:"faults,omitempty"` // what does not hold together
}

func (c *Content) proved(what string) { c.Proved = append(c.Proved, what) }

func (c *Content) note(format string, args ...any) {
	c.Notes = append(c.Notes, fmt.Sprintf(format, args...))
}

func (c *Content) fault(format string, args ...any) {
	c.Faults = append(c.Faults, fmt.Sprintf(format, args...))
}

// fits notes the size that something says it has, and whether there is room for it.
func (c *Content) fits(bytes uint64, v *view) {
	if bytes == 0 || bytes > uint64(v.size) {
		c.fault("it says that it has %d bytes, and there is room for %d", bytes, v.size)
		return
	}
	c.Bytes = int64(bytes)
	c.proved("size")
}

// sound notes a check that must hold.
func (c *Content) sound(ok bool, what string) bool {
	if ok {
		c.proved(what)
	} else {
		c.fault("%s: wrong", what)
	}
	return ok
}

// spare notes a check of a spare copy, whose being wrong hurts nobody yet.
func (c *Content) spare(ok bool, what string) {
	if ok {
		c.proved(what)
	} else {
		c.note("%s: wrong or not there", what)
	}
}

// recogniser fills in c and tells whether the view is of its kind.
type recogniser func(v *view, c *Content) bool

// recognisers in the order in which they are asked. What may stand in a place that
// others leave alone, so that it survives them, comes late.
var recognisers = []recogniser{
	luks, lvm, mdraid, bitlocker, ntfs, exfat, refs, fat, xfs, btrfs, ext, f2fs,
	apfs, hfsplus, squashfs, ufs, vmfs, swap, iso9660, zfs,
}

// lost finds copies of what should have been at the beginning. They count only
// where nothing else is recognised.
var lost = []recogniser{luks2Lost, ntfsLost, extLost, btrfsLost}

// Recognise tells what lies in size bytes. What was found in spite of a read that
// failed is returned with the error.
func Recognise(r io.ReaderAt, size int64) (Content, error) {
	v := &view{r: r, size: size}
	c := recognise(v)
	if v.err != nil { // what was not read is not wrong
		c.Notes, c.Faults = nil, nil
	}
	return c, v.err
}

func recognise(v *view) Content {
	var all []Content
	for _, look := range recognisers {
		var c Content
		if look(v, &c) {
			all = append(all, c)
			if len(c.Faults) == 0 {
				break
			}
		}
	}
	if len(all) > 0 {
		// Something whole, even behind what an earlier user of the room has left.
		return slices.MinFunc(all, func(a, b Content) int { return cmp.Compare(min(len(a.Faults), 1), min(len(b.Faults), 1)) })
	}
	for _, look := range lost {
		var c Content
		if v.err == nil && look(v, &c) {
			return c
		}
	}
	var c Content
	if head := v.bytes(0, min(v.size, 64<<10)); head != nil && !slices.ContainsFunc(head, func(b byte) bool { return b != 0 }) {
		c.note("it begins with zeros")
	}
	return c
}

// Partition is a partition and what is in it.
type Partition struct {
	parttable.Partition
	Content Content `json:"content"`
	Err     error   `json:"-"` // the read that failed, if one did
}

// Disk is what lies in a disk.
type Disk struct {
	Table      parttable.Table `json:"table"`
	Err        error           `json:"-"` // the read of the table that failed, if one did
	Partitions []Partition     `json:"partitions"`
	// Whole is what is in a disk without a partition table, else nil.
	Whole *Partition `json:"whole,omitempty"`
}

// Look tells what lies in a disk of size bytes. It reads a few blocks of each
// partition. Reads that fail are told where they happened, and end nothing else.
func Look(r io.ReaderAt, size int64) Disk {
	var d Disk
	d.Table, d.Err = parttable.Inspect(r, size)
	d.Partitions = []Partition{}
	if d.Table.Kind == "" && d.Err == nil {
		d.Whole = &Partition{Partition: parttable.Partition{Length: size}}
		d.Whole.Content, d.Whole.Err = Recognise(r, size)
	}
	for _, p := range d.Table.Partitions {
		q := Partition{Partition: p}
		q.Content, q.Err = Recognise(io.NewSectionReader(r, p.Offset, p.Length), p.Length)
		d.Partitions = append(d.Partitions, q)
	}
	return d
}
