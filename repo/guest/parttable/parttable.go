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
	Number int // as Linux numbers it: GPT slot + 1; 1–4 in the boot record, 5 and up for logical ones
	Offset int64
	Length int64
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
	if size < 2*sector {
		return nil, nil
	}
	mbr := make([]byte, sector)
	if err := readFull(r, mbr, 0); err != nil {
		return nil, err
	}
	// The first copy of a GPT is at the second logical sector; whether those
	// are 512 or 4096 bytes long is not written anywhere.
	for _, lba := range []int64{512, 4096} {
		parts, ok, err := readGPT(r, size, lba, lba)
		if ok || err != nil {
			return parts, err
		}
	}
	if protective(mbr) {
		// The first copy is lost; the second one is in the last sector.
		for _, lba := range []int64{512, 4096} {
			parts, ok, err := readGPT(r, size, lba, size-size%lba-lba)
			if ok || err != nil {
				return parts, err
			}
		}
		return nil, nil
	}
	return readMBR(r, size, mbr)
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

// readGPT reads the table whose header is at off. ok is false when there is
// none, or none that its own checksums confirm.
func readGPT(r io.ReaderAt, size, lba, off int64) (parts []Partition, ok bool, err error) {
	if off < lba || off > size-lba {
		return nil, false, nil
	}
	h := make([]byte, 512)
	if err := readFull(r, h, off); err != nil {
		return nil, false, err
	}
	if string(h[:8]) != "EFI PART" {
		return nil, false, nil
	}
	le := binary.LittleEndian
	hsize := le.Uint32(h[12:])
	if hsize < 92 || hsize > 512 {
		return nil, false, nil
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20]) // the header's checksum is taken with its own field zero
	if crc32.ChecksumIEEE(h[:hsize]) != sum {
		return nil, false, nil
	}
	if le.Uint64(h[24:]) != uint64(off/lba) { // says itself where it is: anything else is a copied stray
		return nil, false, nil
	}
	start, count, esize := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if count > maxEntries || esize < minGPTEntry || esize > maxGPTEntry || esize%8 != 0 ||
		start == 0 || start > uint64(size/lba) {
		return nil, false, nil
	}
	n := int64(count) * int64(esize)
	if n > size-int64(start)*lba {
		return nil, false, nil
	}
	table := make([]byte, n) // at most 4 MiB
	if err := readFull(r, table, int64(start)*lba); err != nil {
		return nil, false, err
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, false, nil
	}
	for i := range int(count) {
		e := table[int64(i)*int64(esize):][:minGPTEntry]
		if [16]byte(e[:16]) == ([16]byte{}) { // unused
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first == 0 || last < first || first >= uint64(size/lba) {
			continue
		}
		last = min(last, uint64(size/lba)-1)
		parts = append(parts, Partition{i + 1, int64(first) * lba, int64(last-first+1) * lba})
	}
	return parts, true, nil
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

// place turns sectors into a partition that lies on the disk. Guests grow and
// shrink disks: what reaches past the end is cut, as Linux does.
func place(number int, start, count, size int64) (Partition, bool) {
	off, length := start*sector, count*sector // at most 2^41 each
	if start < 1 || count < 1 || off >= size {
		return Partition{}, false
	}
	return Partition{number, off, min(length, size-off)}, true
}

func readMBR(r io.ReaderAt, size int64, mbr []byte) ([]Partition, error) {
	e, ok := entries(mbr)
	if !ok {
		return nil, nil
	}
	var parts []Partition
	var chain int64 // sector of the first extended record
	for i, x := range e {
		switch {
		case x.kind == 0:
		case extended(x.kind):
			if chain == 0 {
				chain = x.start
			}
		default:
			if p, ok := place(i+1, x.start, x.count, size); ok {
				parts = append(parts, p)
			}
		}
	}
	// Every extended record has one logical partition, relative to itself, and
	// a link to the next record, relative to the first.
	b := make([]byte, sector)
	for n, at := 5, chain; at > 0 && at <= size/sector-1 && n < 5+maxLogical; {
		if err := readFull(r, b, at*sector); err != nil {
			return nil, err
		}
		e, ok := entries(b)
		if !ok {
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
				if p, ok := place(n, at+x.start, x.count, size); ok {
					parts = append(parts, p)
					n++
				}
			}
		}
		at = next
	}
	return parts, nil
}
