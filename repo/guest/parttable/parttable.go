// Package parttable finds the partitions of a disk: those of a GUID partition
// table (UEFI specification 2.10, chapter 5), or those of a master boot record
// with its chain of extended records.
//
// A disk is whatever a guest wrote to it, so nothing in a table is believed:
// what is read is bounded before it is allocated, chains end, and partitions
// that do not lie on the disk are left out. A disk whose table does not hold
// together has no partitions; that is not an error. Only a failing read is.
package parttable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Partition is one partition, in bytes of the disk. Offset is at least 512,
// Length at least 1, and Offset+Length at most the size of the disk.
type Partition struct {
	Number int    `json:"number"` // as Linux numbers it: GPT slot + 1; 1–4 in the boot record, 5 and up for logical ones
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Type   string `json:"type,omitempty"` // as the table has it: "0x83", or a GUID in capitals
}

const (
	sector      = 512 // the unit of master boot records
	maxLogical  = 124 // longest chain followed; Linux stops at 256 minors, others sooner
	maxEntries  = 1024
	minGPTEntry = 128
	maxGPTEntry = 4096
)

// Read returns the disk's partitions by ascending number; none for a disk
// without a partition table.
func Read(r io.ReaderAt, size int64) ([]Partition, error) {
	var t Table
	_, err := t.read(r, size)
	return t.Partitions, err
}

// read finds the table that counts; g is that one when it is a GPT.
func (t *Table) read(r io.ReaderAt, size int64) (g *gpt, err error) {
	if size < 2*sector {
		return nil, nil
	}
	mbr := make([]byte, sector)
	if err := readFull(r, mbr, 0); err != nil {
		return nil, err
	}
	_, boot := entries(mbr)
	t.protected = protective(mbr)
	// The first copy of a GPT is at the second logical sector; whether those
	// are 512 or 4096 bytes long is not written anywhere.
	var lost error
	for _, lba := range []int64{512, 4096} {
		g, err := readGPT(r, size, lba, lba)
		if fault := (*faultError)(nil); errors.As(err, &fault) {
			lost = fault
		} else if g != nil || err != nil {
			return t.use(g), err
		}
	}
	if t.protected {
		// The first copy is lost; the second one is in the last sector.
		if lost == nil {
			lost = errors.New("it is not there")
		}
		for _, lba := range []int64{512, 4096} {
			g, err := readGPT(r, size, lba, size-size%lba-lba)
			if fault := (*faultError)(nil); errors.As(err, &fault) {
				continue
			}
			if g != nil || err != nil {
				t.fault("the first copy of the GPT does not hold: %v; the second one is used", lost)
				return t.use(g), err
			}
		}
		t.Kind = GPT
		t.fault("the boot record says that there is a GPT, and neither copy holds: %v", lost)
		return nil, nil
	}
	if boot {
		return nil, t.readMBR(r, size, mbr)
	}
	return nil, nil
}

func (t *Table) use(g *gpt) *gpt {
	if g != nil {
		t.Kind, t.SectorSize, t.Partitions = GPT, g.lba, g.parts
		t.Faults = append(t.Faults, g.faults...)
	}
	return g
}

// readFull reads all of p; the caller has checked that it lies on the disk.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) || err == nil || errors.Is(err, io.EOF) {
		if n == len(p) {
			return nil
		}
		return fmt.Errorf("partition table: %d bytes at %d: %w", len(p), off, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("partition table: %d bytes at %d: %w", len(p), off, err)
}

// gpt is a copy of a GUID partition table that its own checksums confirm.
type gpt struct {
	lba       int64 // bytes of a logical sector
	at        int64 // where its header is, in bytes
	alternate int64 // where it says the other copy's is, in bytes; −1 beyond all disks
	disk      [16]byte
	sum       uint32 // of the entries
	parts     []Partition
	faults    []string
}

// faultError says why what calls itself a GPT is none.
type faultError struct{ what string }

func (e *faultError) Error() string { return e.what }

// readGPT reads the table whose header is at off. It is nil without an error where
// there is none, and a *faultError where one does not hold.
func readGPT(r io.ReaderAt, size, lba, off int64) (*gpt, error) {
	if off < lba || off > size-lba {
		return nil, nil
	}
	h := make([]byte, 512)
	if err := readFull(r, h, off); err != nil {
		return nil, err
	}
	if string(h[:8]) != "EFI PART" {
		return nil, nil
	}
	bad := func(what string) (*gpt, error) { return nil, &faultError{what} }
	le := binary.LittleEndian
	hsize := le.Uint32(h[12:])
	if hsize < 92 || hsize > 512 {
		return bad("the size of its header cannot be")
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20]) // the header's checksum is taken with its own field zero
	if crc32.ChecksumIEEE(h[:hsize]) != sum {
		return bad("the checksum of its header is wrong")
	}
	if le.Uint64(h[24:]) != uint64(off/lba) { // says itself where it is: anything else is a copied stray
		return bad("its header belongs to another place")
	}
	start, count, esize := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if count > maxEntries || esize < minGPTEntry || esize > maxGPTEntry || esize%8 != 0 ||
		start == 0 || start > uint64(size/lba) {
		return bad("the place of its entries cannot be")
	}
	n := int64(count) * int64(esize)
	if n > size-int64(start)*lba {
		return bad("its entries would reach past the end of the disk")
	}
	table := make([]byte, n) // at most 4 MiB
	if err := readFull(r, table, int64(start)*lba); err != nil {
		return nil, err
	}
	g := &gpt{lba: lba, at: off, alternate: -1, disk: [16]byte(h[56:72]), sum: le.Uint32(h[88:])}
	if crc32.ChecksumIEEE(table) != g.sum {
		return bad("the checksum of its entries is wrong")
	}
	if other := le.Uint64(h[32:]); other < uint64(size/lba) {
		g.alternate = int64(other) * lba
	}
	for i := range int(count) {
		e := table[int64(i)*int64(esize):][:minGPTEntry]
		if [16]byte(e[:16]) == ([16]byte{}) { // unused
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		end := uint64(size / lba)
		if first == 0 || last < first || last >= end {
			g.faults = append(g.faults, fmt.Sprintf("partition %d does not lie on the disk: sectors %d to %d of %d", i+1, first, last, end))
		}
		if first == 0 || last < first || first >= end {
			continue
		}
		last = min(last, end-1)
		g.parts = append(g.parts, Partition{i + 1, int64(first) * lba, int64(last-first+1) * lba, guid(e[:16])})
	}
	return g, nil
}

// guid shows a GUID as people know it: the first three groups are stored with
// their lowest byte first.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08X-%04X-%04X-%X-%X", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

type mbrEntry struct {
	kind         byte
	start, count int64 // sectors
}

// entries returns the four entries of a boot record. ok is false when the
// sector is not one: the boot sector of a file system carries the same
// signature, but code or text where the entries would be.
func entries(b []byte) (e [4]mbrEntry, ok bool) {
	if b[510] != 0x55 || b[511] != 0xaa {
		return e, false
	}
	for i := range e {
		p := b[446+16*i:][:16]
		if p[0]&0x7f != 0 { // 0x80 bootable or 0
			return e, false
		}
		e[i] = mbrEntry{p[4], int64(binary.LittleEndian.Uint32(p[8:])), int64(binary.LittleEndian.Uint32(p[12:]))}
	}
	return e, true
}

func protective(b []byte) bool {
	e, ok := entries(b)
	return ok && e[0].kind == 0xee
}

func extended(kind byte) bool { return kind == 0x05 || kind == 0x0f || kind == 0x85 }

// place adds a partition that lies on the disk. Guests grow and shrink disks: what
// reaches past the end is cut, as Linux does.
func (t *Table) place(number int, kind byte, start, count, size int64) bool {
	off, length := start*sector, count*sector // at most 2^41 each
	if start < 1 || count < 1 || off+length > size {
		t.fault("partition %d does not lie on the disk: %d sectors from %d, of %d", number, count, start, size/sector)
	}
	if start < 1 || count < 1 || off >= size {
		return false
	}
	t.Partitions = append(t.Partitions, Partition{number, off, min(length, size-off), fmt.Sprintf("0x%02x", kind)})
	return true
}

// readMBR reads a boot record, which mbr is.
func (t *Table) readMBR(r io.ReaderAt, size int64, mbr []byte) error {
	e, _ := entries(mbr)
	var chain int64 // sector of the first extended record
	for i, x := range e {
		switch {
		case x.kind == 0:
			continue
		case extended(x.kind):
			if chain == 0 {
				chain = x.start
			}
		default:
			t.place(i+1, x.kind, x.start, x.count, size)
		}
		t.Kind, t.SectorSize = MBR, sector
	}
	// Every extended record has one logical partition, relative to itself, and
	// a link to the next record, relative to the first.
	b := make([]byte, sector)
	for n, at := 5, chain; at > 0 && n < 5+maxLogical; {
		if at > size/sector-1 {
			t.fault("the chain of logical partitions leads past the end of the disk, to sector %d", at)
			break
		}
		if err := readFull(r, b, at*sector); err != nil {
			return err
		}
		e, ok := entries(b)
		if !ok {
			t.fault("the chain of logical partitions breaks at sector %d", at)
			break
		}
		next := int64(0)
		for _, x := range e[:2] {
			switch {
			case x.kind == 0:
			case extended(x.kind):
				if next == 0 && chain+x.start > at { // only forward, so that no loop is possible
					next = chain + x.start
				}
			default:
				if t.place(n, x.kind, at+x.start, x.count, size) {
					n++
				}
			}
		}
		at = next
	}
	return nil
}
