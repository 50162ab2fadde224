package guest

import (
	"fmt"
)

// ntfs: the boot sector as Microsoft documents it ("NTFS partition boot sector",
// Windows 2000 resource kit), file records as the Linux-NTFS project's documentation
// and Linux' fs/ntfs3/ntfs.h have them.
func ntfs(v *view, c *Content) bool {
	b := v.bytes(0, 512)
	if b == nil || string(b[3:11]) != "NTFS    " {
		return false
	}
	n, ok := ntfsBoot(b)
	c.Kind, c.UUID = "ntfs", n.serial
	if !c.sound(ok, "boot sector") {
		return true
	}
	c.fits(n.bytes, v)
	// The copy is behind the last sector of the volume.
	if n.bytes < uint64(v.size) {
		copied := v.bytes(int64(n.bytes), 512)
		c.spare(copied != nil && string(copied) == string(b), "backup boot sector")
	}
	if !c.sound(v.fileRecord(n.mft, n.record) != nil, "$MFT record") {
		return true
	}
	c.spare(v.fileRecord(n.mirror, n.record) != nil, "$MFTMirr record")
	if volume := v.fileRecord(n.mft+3*n.record, n.record); c.sound(volume != nil, "$Volume record") {
		ntfsVolume(volume, c)
	}
	return true
}

// ntfsLost finds the copy of a boot sector in the last sector.
func ntfsLost(v *view, c *Content) bool {
	for _, sector := range []int64{512, 4096} {
		at := v.size - v.size%sector - sector
		b := v.bytes(at, 512)
		if b == nil || string(b[3:11]) != "NTFS    " {
			continue
		}
		if n, ok := ntfsBoot(b); ok && n.bytes <= uint64(v.size) {
			c.Kind, c.UUID = "ntfs", n.serial
			c.fault("its boot sector is lost; the backup boot sector at byte %d is there", at)
			return true
		}
	}
	return false
}

// ntfsGeometry is where things are, in bytes.
type ntfsGeometry struct {
	bytes       uint64 // of the volume
	mft, mirror int64
	record      int64 // size of a file record
	serial      string
}

func ntfsBoot(b []byte) (n ntfsGeometry, ok bool) {
	sector, per := int64(le.Uint16(b[11:])), int64(b[13])
	if b[13] > 0x80 { // a negative power of two: clusters of more than 64 KiB
		if b[13] < 256-31 {
			return n, false
		}
		per = 1 << (256 - int64(b[13]))
	}
	cluster := sector * per
	total, mft, mirror := le.Uint64(b[40:]), le.Uint64(b[48:]), le.Uint64(b[56:])
	n.serial = fmt.Sprintf("%016X", le.Uint64(b[72:]))
	switch k := int8(b[64]); {
	case k > 0:
		n.record = int64(k) * cluster
	case k > -31:
		n.record = 1 << -k
	}
	if !powerOfTwo(sector, 256, 4096) || !powerOfTwo(cluster, sector, 2<<20) || !powerOfTwo(n.record, 512, 64<<10) ||
		total == 0 || total > 1<<50 || mft > 1<<40 || mirror > 1<<40 || b[510] != 0x55 || b[511] != 0xaa {
		return n, false
	}
	n.bytes, n.mft, n.mirror = total*uint64(sector), int64(mft)*cluster, int64(mirror)*cluster
	return n, true
}

// fileRecord reads a file record and undoes its fixups: the last two bytes of each
// 512 are kept elsewhere, and a number stands there that must be the same in all. It
// is nil where that, or the signature, is wrong.
func (v *view) fileRecord(at, size int64) []byte {
	b := v.bytes(at, size)
	if b == nil || string(b[:4]) != "FILE" {
		return nil
	}
	off, count := int64(le.Uint16(b[4:])), int64(le.Uint16(b[6:]))
	if count != size/512+1 || off < 8 || off+2*count > 510 {
		return nil
	}
	for i := int64(1); i < count; i++ {
		end := b[i*512-2:][:2]
		if end[0] != b[off] || end[1] != b[off+1] {
			return nil
		}
		copy(end, b[off+2*i:][:2])
	}
	return b
}

// ntfsVolume reads label and state from the attributes of $Volume.
func ntfsVolume(b []byte, c *Content) {
	for at := int(le.Uint16(b[20:])); at+24 <= len(b); {
		kind, length := le.Uint32(b[at:]), int(le.Uint32(b[at+4:]))
		if kind == 0xffffffff || length < 24 || length > len(b)-at {
			return
		}
		attribute := b[at : at+length]
		value, n := int(le.Uint16(attribute[20:])), int(le.Uint32(attribute[16:]))
		if attribute[8] == 0 && n >= 0 && value <= length && n <= length-value {
			switch data := attribute[value : value+n]; {
			case kind == 0x60:
				c.Label = text16(data)
			case kind == 0x70 && n >= 12 && le.Uint16(data[10:])&1 != 0:
				c.note("it was in use, or wants to be checked")
			}
		}
		at += length
	}
}

// bitlocker: libbde's documentation of the BitLocker drive encryption format. What
// is below cannot be seen.
func bitlocker(v *view, c *Content) bool {
	if !v.has(3, "-FVE-FS-") {
		return false
	}
	c.Kind = "bitlocker"
	b := v.bytes(0, 512)
	// Since Windows 7 three places of the metadata are in the boot sector.
	for _, off := range []int{176, 184, 192} {
		if at := le.Uint64(b[off:]); at > 0 && at < uint64(v.size) && v.has(int64(at), "-FVE-FS-") {
			c.proved("metadata")
			return true
		}
	}
	return true
}

// refs: libfsrefs' documentation of the Resilient File System, volume header.
func refs(v *view, c *Content) bool {
	b := v.bytes(0, 64)
	if b == nil || string(b[3:11]) != "ReFS\x00\x00\x00\x00" || string(b[16:20]) != "FSRS" {
		return false
	}
	c.Kind = "refs"
	if n, sector := le.Uint64(b[24:]), le.Uint32(b[32:]); powerOfTwo(sector, 512, 4096) && n < 1<<50 {
		c.fits(n*uint64(sector), v)
	}
	return true
}

// fat: Microsoft, "FAT32 File System Specification", 1.03.
func fat(v *view, c *Content) bool {
	b := v.bytes(0, 512)
	if b == nil || b[510] != 0x55 || b[511] != 0xaa || b[0] != 0xeb && b[0] != 0xe9 {
		return false
	}
	sector, per, reserved, copies := le.Uint16(b[11:]), b[13], uint64(le.Uint16(b[14:])), uint64(b[16])
	media := b[21]
	if !powerOfTwo(sector, 512, 4096) || !powerOfTwo(per, 1, 128) || reserved == 0 || copies == 0 || copies > 4 || media != 0xf0 && media < 0xf8 {
		return false
	}
	table, total := uint64(le.Uint16(b[22:])), uint64(le.Uint16(b[19:]))
	wide := table == 0 // FAT32
	if wide {
		table = uint64(le.Uint32(b[36:]))
	}
	if total == 0 {
		total = uint64(le.Uint32(b[32:]))
	}
	begin := reserved + copies*table + (uint64(le.Uint16(b[17:]))*32+uint64(sector)-1)/uint64(sector)
	if table == 0 || total <= begin {
		return false
	}
	clusters := (total - begin) / uint64(per)
	bits := uint64(12)
	switch {
	case wide:
		bits = 32
	case clusters >= 4085:
		bits = 16
	}
	c.Kind = fmt.Sprintf("fat%d", bits)
	ids := b[39:]
	if wide {
		ids = b[67:]
	}
	c.UUID = fmt.Sprintf("%04X-%04X", le.Uint16(ids[2:]), le.Uint16(ids))
	if c.Label = text(ids[4:15]); c.Label == "NO NAME" {
		c.Label = ""
	}
	c.fits(total*uint64(sector), v)
	c.sound(table*uint64(sector) >= (clusters+2)*bits/8, "size of the tables")
	fatTables(v, c, int64(reserved)*int64(sector), int64(table)*int64(sector), bits, copies, media)
	if wide {
		fat32Spares(v, c, b, int64(sector))
	}
	return true
}

// fatTables looks at the beginnings of the file allocation tables.
func fatTables(v *view, c *Content, at, size int64, bits, copies uint64, media byte) {
	first := v.bytes(at, 512)
	if !c.sound(first != nil && first[0] == media, "first file allocation table") {
		return
	}
	switch {
	case bits == 16 && le.Uint16(first[2:])&0x8000 == 0, bits == 32 && le.Uint32(first[4:])&0x08000000 == 0:
		c.note("it was in use")
	}
	if copies > 1 {
		second := v.bytes(at+size, 512)
		c.spare(second != nil && second[0] == media, "second file allocation table")
	}
}

// fat32Spares looks at what only FAT32 has.
func fat32Spares(v *view, c *Content, b []byte, sector int64) {
	if n := int64(le.Uint16(b[48:])); n != 0 && n != 0xffff {
		c.spare(v.has(n*sector, "RRaA") && v.has(n*sector+484, "rrAa"), "FSInfo sector")
	}
	if n := int64(le.Uint16(b[50:])); n != 0 && n != 0xffff {
		copied := v.bytes(n*sector, 512)
		// Behind the parameters are flags and labels that are kept up to date in the
		// first one only.
		c.spare(copied != nil && string(copied[:64]) == string(b[:64]), "backup boot sector")
	}
}

// exfat: Microsoft, "exFAT file system specification".
func exfat(v *view, c *Content) bool {
	b := v.bytes(0, 512)
	if b == nil || string(b[3:11]) != "EXFAT   " {
		return false
	}
	c.Kind, c.UUID = "exfat", fmt.Sprintf("%04X-%04X", le.Uint16(b[102:]), le.Uint16(b[100:]))
	log := b[108]
	if !c.sound(log >= 9 && log <= 12 && b[109] <= 25-log && b[510] == 0x55 && b[511] == 0xaa && le.Uint64(b[72:]) < 1<<50, "boot sector") {
		return true
	}
	region := int64(12) << log
	if !c.sound(exfatSum(v.bytes(0, region), log), "boot checksum") {
		return true
	}
	c.fits(le.Uint64(b[72:])<<log, v)
	c.spare(exfatSum(v.bytes(region, region), log), "backup boot region")
	if le.Uint16(b[106:])&2 != 0 {
		c.note("it was in use")
	}
	if le.Uint16(b[106:])&4 != 0 {
		c.note("the guest has found bad media")
	}
	// The label is among the first entries of the root directory.
	if root := int64(le.Uint32(b[96:])); root >= 2 {
		at := (int64(le.Uint32(b[88:])) + (root-2)<<b[109]) << log
		entries := v.bytes(at, 512)
		for i := 0; i+32 <= len(entries); i += 32 {
			if e := entries[i : i+32]; e[0] == 0x83 && e[1] <= 11 {
				c.Label = text16(e[2 : 2+2*int(e[1])])
			}
		}
	}
	return true
}

// exfatSum proves a boot region: eleven sectors, and one full of their checksum,
// which leaves out what changes while the volume is in use.
func exfatSum(b []byte, log byte) bool {
	if b == nil {
		return false
	}
	sector := 1 << log
	var sum uint32
	for i, x := range b[:11*sector] {
		if i != 106 && i != 107 && i != 112 {
			sum = sum>>1 | sum<<31
			sum += uint32(x)
		}
	}
	for i := 11 * sector; i < 12*sector; i += 4 {
		if le.Uint32(b[i:]) != sum {
			return false
		}
	}
	return true
}
