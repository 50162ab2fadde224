package guest

import (
	"crypto/sha256"
	"encoding/binary"
)

var (
	le = binary.LittleEndian
	be = binary.BigEndian
)

// The superblock of ext2, ext3 and ext4: Linux, Documentation/filesystems/ext4/super.rst.
const (
	extSuper = 1024 // where it is, and its size

	extHasJournal   = 0x4 // of the compatible features
	extSparseSuper2 = 0x200
	extRecover      = 0x4 // of the incompatible ones
	extJournalDev   = 0x8
	ext64bit        = 0x80
	extOnly4        = 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000 // extents and later
	extOnly4RO      = 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400                                            // huge files and later
	extMetadataCsum = 0x400
)

type extSuperblock struct{ b []byte }

// extAt reads a superblock; ok tells whether it is one by its magic and by numbers
// that no other two bytes of magic would come with.
func extAt(v *view, off int64) (s extSuperblock, ok bool) {
	b := v.bytes(off, extSuper)
	if b == nil || le.Uint16(b[0x38:]) != 0xef53 {
		return s, false
	}
	s = extSuperblock{b}
	return s, le.Uint32(b[0x18:]) <= 6 && le.Uint32(b[0x4c:]) <= 1 && le.Uint32(b[0x14:]) <= 1 && le.Uint32(b[0x20:]) > 0 && le.Uint32(b[0x20:]) <= 8*65536
}

func (s extSuperblock) blockSize() int64 { return 1024 << le.Uint32(s.b[0x18:]) }

func (s extSuperblock) has(field int, bits uint32) bool { return le.Uint32(s.b[field:])&bits != 0 }

func (s extSuperblock) summed() bool { return s.has(0x64, extMetadataCsum) }

// sum is the kernel's crc32c, which is not inverted at the end.
func (s extSuperblock) sumOK() bool { return ^crc32c(s.b[:0x3fc]) == le.Uint32(s.b[0x3fc:]) }

func (s extSuperblock) bytes() uint64 {
	n := uint64(le.Uint32(s.b[4:]))
	if s.has(0x60, ext64bit) {
		n |= uint64(le.Uint32(s.b[0x150:])) << 32
	}
	if n > 1<<47 { // more than there is a unit for; the product must not overflow
		return ^uint64(0)
	}
	return n * uint64(s.blockSize())
}

func (s extSuperblock) describe(c *Content) {
	switch {
	case s.has(0x60, extJournalDev):
		c.Kind = "ext journal"
	case s.has(0x60, extOnly4) || s.has(0x64, extOnly4RO):
		c.Kind = "ext4"
	case s.has(0x5c, extHasJournal):
		c.Kind = "ext3"
	default:
		c.Kind = "ext2"
	}
	c.UUID, c.Label = uuid(s.b[0x68:0x78]), text(s.b[0x78:0x88])
}

func ext(v *view, c *Content) bool {
	s, ok := extAt(v, extSuper)
	if !ok || le.Uint16(s.b[0x5a:]) != 0 { // a copy from inside another file system is no beginning
		return false
	}
	s.describe(c)
	if s.summed() && !c.sound(s.sumOK(), "superblock checksum") {
		return true // nothing else in it is worth a word
	}
	c.fits(s.bytes(), v)
	if inode := le.Uint16(s.b[0x58:]); le.Uint32(s.b[0x4c:]) > 0 && (!powerOfTwo(inode, 128, 65535) || int64(inode) > s.blockSize()) {
		c.fault("inodes of %d bytes cannot be", inode)
	}
	if s.has(0x60, extRecover) {
		c.note("its journal has to be replayed: it was in use")
	} else if le.Uint16(s.b[0x3a:])&1 == 0 {
		c.note("it was in use")
	}
	if le.Uint16(s.b[0x3a:])&2 != 0 {
		c.note("the guest has found errors in it and says so in the superblock")
	}
	if c.Kind == "ext journal" || c.Bytes == 0 {
		return true
	}
	group := uint32(1)
	if s.has(0x5c, extSparseSuper2) {
		group = le.Uint32(s.b[0x24c:])
	}
	at := (int64(le.Uint32(s.b[0x14:])) + int64(group)*int64(le.Uint32(s.b[0x20:]))) * s.blockSize()
	if group == 0 || at >= c.Bytes {
		return true // too small to have a copy
	}
	copied, ok := extAt(v, at)
	// Kernels before 6.0 leave wrong checksums in the copies when they enlarge a
	// file system, so that is no fault.
	c.spare(ok && string(copied.b[0x68:0x78]) == string(s.b[0x68:0x78]) && (!copied.summed() || copied.sumOK()), "backup superblock")
	return true
}

// extLost finds the copy of a superblock in the second group of blocks.
func extLost(v *view, c *Content) bool {
	for _, bs := range []int64{4096, 1024, 2048} {
		at := 8 * bs * bs
		if bs == 1024 {
			at += bs // the first block is the boot block there
		}
		if s, ok := extAt(v, at); ok && s.blockSize() == bs && le.Uint16(s.b[0x5a:]) == 1 && s.bytes() <= uint64(v.size) && (!s.summed() || s.sumOK()) {
			s.describe(c)
			c.fault("its superblock is lost; the backup superblock at byte %d is there", at)
			return true
		}
	}
	return false
}

// xfs: xfs_format.h of Linux, struct xfs_dsb. Numbers are big endian, the checksum
// is little endian.
func xfs(v *view, c *Content) bool {
	b := v.bytes(0, 512)
	if b == nil || string(b[:4]) != "XFSB" {
		return false
	}
	c.Kind, c.UUID, c.Label = "xfs", uuid(b[32:48]), text(b[108:120])
	bs, blocks, agBlocks := int64(be.Uint32(b[4:])), be.Uint64(b[8:]), be.Uint32(b[84:])
	sector, inode := be.Uint16(b[102:]), be.Uint16(b[104:])
	v5 := be.Uint16(b[100:])&0xf == 5
	if !c.sound(powerOfTwo(bs, 512, 65536) && powerOfTwo(sector, 512, 32768) && powerOfTwo(inode, 256, 2048) && agBlocks > 0 && blocks < 1<<46, "superblock") {
		return true
	}
	if v5 {
		if b = v.bytes(0, int64(sector)); b == nil || !c.sound(xfsSum(b), "superblock checksum") {
			return true
		}
	}
	c.fits(blocks*uint64(bs), v)
	// The root directory's inode: allocation group, block in it, inode in that.
	root, perBlock, agLog := be.Uint64(b[56:]), b[123], b[124]
	if perBlock > 8 || agLog > 31 {
		c.fault("inode numbers of %d and %d bits cannot be", perBlock, agLog)
		return true
	}
	group := root >> (perBlock + agLog)
	block := root >> perBlock & (1<<agLog - 1)
	if group < 1<<32 {
		at := (int64(group)*int64(agBlocks)+int64(block))*bs + int64(root&(1<<perBlock-1))*int64(inode)
		c.sound(v.has(at, "IN"), "root inode")
	}
	if be.Uint32(b[88:]) > 1 {
		second := v.bytes(int64(agBlocks)*bs, int64(sector))
		c.spare(second != nil && string(second[:4]) == "XFSB" && string(second[32:48]) == string(b[32:48]) && (!v5 || xfsSum(second)), "second superblock")
	}
	return true
}

func xfsSum(b []byte) bool { return crc32c(without(b, 224, 4)) == le.Uint32(b[224:]) }

// btrfs: btrfs documentation, "On-disk format", superblock.
const btrfsSuper = 64 << 10

func btrfsAt(v *view, at int64) (b []byte, ok bool) {
	b = v.bytes(at, 4096)
	return b, b != nil && string(b[64:72]) == "_BHRfS_M"
}

// btrfsSum tells whether the checksum holds; known is false for kinds of checksums
// that are not computed here.
func btrfsSum(b []byte) (ok, known bool) {
	switch le.Uint16(b[196:]) {
	case 0:
		return crc32c(b[32:]) == le.Uint32(b), true
	case 2:
		return sha256.Sum256(b[32:]) == [32]byte(b[:32]), true
	}
	return false, false
}

func btrfs(v *view, c *Content) bool {
	b, ok := btrfsAt(v, btrfsSuper)
	if !ok {
		return false
	}
	c.Kind, c.UUID, c.Label = "btrfs", uuid(b[32:48]), text(b[299:555])
	if ok, known := btrfsSum(b); !known {
		c.note("its checksums are of a kind that is not checked here")
	} else if !c.sound(ok, "superblock checksum") {
		return true
	}
	c.sound(le.Uint64(b[48:]) == btrfsSuper && powerOfTwo(le.Uint32(b[144:]), 512, 65536) && powerOfTwo(le.Uint32(b[148:]), 4096, 65536), "superblock")
	c.fits(le.Uint64(b[209:]), v) // of this device
	if n := le.Uint64(b[136:]); n != 1 {
		c.note("one of %d devices of the file system", n)
	}
	if le.Uint64(b[96:]) != 0 {
		c.note("its log has to be replayed: it was in use")
	}
	if mirror := int64(64 << 20); v.size >= mirror+4096 {
		m, ok := btrfsAt(v, mirror)
		if ok {
			good, known := btrfsSum(m)
			ok = string(m[32:48]) == string(b[32:48]) && (good || !known)
		}
		c.spare(ok, "backup superblock")
	}
	return true
}

// btrfsLost finds the second superblock.
func btrfsLost(v *view, c *Content) bool {
	b, ok := btrfsAt(v, 64<<20)
	if !ok || le.Uint64(b[48:]) != 64<<20 {
		return false
	}
	if good, known := btrfsSum(b); known && !good {
		return false
	}
	c.Kind, c.UUID, c.Label = "btrfs", uuid(b[32:48]), text(b[299:555])
	c.fault("its superblock is lost; the backup superblock at byte %d is there", 64<<20)
	return true
}

// f2fs: Linux, include/linux/f2fs_fs.h, struct f2fs_super_block. Two copies, in the
// first two blocks.
func f2fs(v *view, c *Content) bool {
	b := v.bytes(1024, 3072)
	if b == nil || le.Uint32(b) != 0xf2f52010 {
		return false
	}
	c.Kind, c.UUID, c.Label = "f2fs", uuid(b[108:124]), text16(trim16(b[124:124+1024]))
	if log, blocks := le.Uint32(b[16:]), le.Uint64(b[36:]); log < 9 || log > 16 || blocks > 1<<47 {
		c.fault("superblock: wrong")
	} else {
		c.fits(blocks<<log, v)
	}
	c.spare(v.has(4096+1024, "\x10\x20\xf5\xf2"), "second superblock")
	return true
}

// trim16 cuts a field of UTF-16 at its end.
func trim16(b []byte) []byte {
	for i := 0; i+1 < len(b); i += 2 {
		if b[i] == 0 && b[i+1] == 0 {
			return b[:i]
		}
	}
	return b
}

// swap: Linux, include/linux/swap.h, union swap_header. The signature ends the first
// page, whose size is the processor's.
func swap(v *view, c *Content) bool {
	for _, page := range []int64{4096, 8192, 16384, 65536} {
		sig := v.bytes(page-10, 10)
		switch string(sig) {
		case "SWAPSPACE2":
		case "S1SUSPEND\x00", "S2SUSPEND\x00", "ULSUSPEND\x00", "LINHIB0001":
			c.note("the guest was hibernated into it")
		case "SWAP-SPACE":
			c.Kind = "swap"
			return true
		default:
			continue
		}
		b := v.bytes(1024, 44)
		if b == nil {
			return false
		}
		c.Kind, c.UUID, c.Label = "swap", uuid(b[12:28]), text(b[28:44])
		if c.sound(le.Uint32(b) == 1, "header") {
			c.fits((uint64(le.Uint32(b[4:]))+1)*uint64(page), v)
		}
		return true
	}
	return false
}

// mdraid: Linux, include/uapi/linux/raid/md_p.h, version 1 superblocks at the
// beginning; those at the end look like what they hold.
func mdraid(v *view, c *Content) bool {
	for _, at := range []int64{4096, 0} {
		b := v.bytes(at, 256)
		if b == nil || le.Uint32(b) != 0xa92b4efc || le.Uint32(b[4:]) != 1 {
			continue
		}
		c.Kind, c.UUID, c.Label = "mdraid", uuid(b[16:32]), text(b[32:64])
		devices := le.Uint32(b[220:])
		if devices > 384*8 {
			c.fault("superblock: wrong")
			return true
		}
		all := v.bytes(at, 256+2*int64(devices))
		if all == nil {
			return true
		}
		// The sum of its 32-bit words, its own one zero, folded once.
		var sum uint64
		for rest := without(all, 216, 4); ; rest = rest[4:] {
			if len(rest) < 4 {
				if len(rest) >= 2 {
					sum += uint64(le.Uint16(rest))
				}
				break
			}
			sum += uint64(le.Uint32(rest))
		}
		c.sound(uint32(sum)+uint32(sum>>32) == le.Uint32(b[216:]), "superblock checksum")
		c.note("a member of a RAID of level %d with %d disks", int32(le.Uint32(b[72:])), le.Uint32(b[92:]))
		return true
	}
	return false
}

// squashfs: Linux, Documentation/filesystems/squashfs.rst.
func squashfs(v *view, c *Content) bool {
	b := v.bytes(0, 96)
	if b == nil || string(b[:4]) != "hsqs" || le.Uint16(b[28:]) != 4 {
		return false
	}
	c.Kind = "squashfs"
	c.fits(le.Uint64(b[40:]), v)
	return true
}
