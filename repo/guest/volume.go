package guest

import (
	"bytes"
	"crypto/sha256"
	"hash/crc32"
	"strings"
)

// Containers of other things: what is in them is not looked at.

// lvmSum is LVM's CRC: the polynomial of zlib's, begun with its own number and not
// inverted (lvm2, libdevmapper/misc/crc.c and lib/misc/crc.h).
func lvmSum(b []byte) uint32 {
	const initial = 0xf597a6cf
	return ^crc32.Update(^uint32(initial), crc32.IEEETable, b)
}

// lvm: a physical volume of LVM2 (lvm2, lib/format_text/layout.h and lib/label/label.h):
// a label in one of the first four sectors, a list of metadata areas, and in them
// text.
func lvm(v *view, c *Content) bool {
	for sector := range int64(4) {
		b := v.bytes(512*sector, 512)
		if b == nil || string(b[:8]) != "LABELONE" || string(b[24:32]) != "LVM2 001" {
			continue
		}
		c.Kind = "lvm2"
		if !c.sound(le.Uint64(b[8:]) == uint64(sector) && lvmSum(b[20:]) == le.Uint32(b[16:]), "label checksum") {
			return true
		}
		header := int(le.Uint32(b[20:]))
		if header < 32 || header > 512-40-32 {
			c.fault("label: wrong")
			return true
		}
		b = b[header:]
		c.UUID = lvmUUID(b[:32])
		c.fits(le.Uint64(b[32:]), v)
		// Two lists of places, each ended by zeros: of data and of metadata.
		list, areas := b[40:], 0
		for metadata := false; len(list) >= 16; list = list[16:] {
			at, size := le.Uint64(list), le.Uint64(list[8:])
			switch {
			case at == 0 && metadata:
				return true
			case at == 0:
				metadata = true
			case metadata && areas < 2:
				areas++
				lvmMetadata(v, c, at, size)
			}
		}
		return true
	}
	return false
}

// lvmMetadata looks at one metadata area: a header, and behind it a ring in which
// the newest text lies.
func lvmMetadata(v *view, c *Content, at, size uint64) {
	if at > uint64(v.size) || size > uint64(v.size)-at || size < 1024 {
		c.fault("metadata area: it does not lie in the volume")
		return
	}
	b := v.bytes(int64(at), 512)
	if b == nil || !c.sound(string(b[4:20]) == " LVM2 x[5A%r0N*>" && lvmSum(b[4:]) == le.Uint32(b), "metadata header checksum") {
		return
	}
	off, n := le.Uint64(b[40:]), le.Uint64(b[48:])
	if off == 0 || n == 0 {
		c.note("it belongs to no volume group")
		return
	}
	if off < 512 || off >= size || n > size-512 || n > maxRead {
		c.fault("metadata text: its place cannot be")
		return
	}
	head := min(n, size-off)
	text := v.bytes(int64(at+off), int64(head))
	if n > head {
		text = append(text, v.bytes(int64(at+512), int64(n-head))...)
	}
	if !c.sound(uint64(len(text)) == n && lvmSum(text) == le.Uint32(b[56:]), "metadata checksum") {
		return
	}
	if name, _, ok := bytes.Cut(text, []byte(" {")); ok && len(name) < 128 && !bytes.ContainsAny(name, "\n\x00") {
		c.Label = string(name) // of the volume group
	}
}

// lvmUUID shows 32 characters as LVM does.
func lvmUUID(b []byte) string {
	for _, c := range b {
		if c < '!' || c > '~' {
			return ""
		}
	}
	s := string(b)
	return strings.Join([]string{s[:6], s[6:10], s[10:14], s[14:18], s[18:22], s[22:26], s[26:]}, "-")
}

const luksMagic = "LUKS\xba\xbe"

// luks: "LUKS1 On-Disk Format Specification" 1.2.3 and "LUKS2 On-Disk Format
// Specification" 1.1.3.
func luks(v *view, c *Content) bool {
	b := v.bytes(0, 592)
	if b == nil || string(b[:6]) != luksMagic {
		return false
	}
	switch be.Uint16(b[6:]) {
	case 1:
		c.Kind, c.UUID = "luks1", text(b[168:208])
		active, whole := 0, true
		for i := range 8 {
			switch be.Uint32(b[208+48*i:]) {
			case 0x00ac71f3:
				active++
			case 0x0000dead:
			default:
				whole = false
			}
		}
		c.sound(whole && active > 0, "key slots")
		if payload := uint64(be.Uint32(b[104:])) * 512; payload > uint64(v.size) {
			c.fault("its data would begin past the end, at byte %d", payload)
		}
	case 2:
		c.Kind = "luks2"
		size, ok := luks2Header(v, 0, luksMagic, c)
		if !c.sound(ok, "header checksum") {
			return true
		}
		_, ok = luks2Header(v, size, "SKUL\xba\xbe", &Content{})
		c.spare(ok, "second header")
	default:
		c.Kind = "luks"
		c.note("version %d is not known here", be.Uint16(b[6:]))
	}
	return true
}

// luks2Header proves a header with its area of JSON: a SHA-256 over both.
func luks2Header(v *view, at int64, magic string, c *Content) (size int64, ok bool) {
	b := v.bytes(at, 4096)
	if b == nil || string(b[:6]) != magic || be.Uint16(b[6:]) != 2 {
		return 0, false
	}
	c.Label, c.UUID = text(b[24:72]), text(b[168:208])
	n := be.Uint64(b[8:])
	if n > maxRead || !powerOfTwo(int64(n), 16<<10, maxRead) || be.Uint64(b[256:]) != uint64(at) || text(b[72:104]) != "sha256" {
		return 0, false
	}
	all := v.bytes(at, int64(n))
	return int64(n), all != nil && sha256.Sum256(without(all, 448, 64)) == [32]byte(all[448:480])
}

// luks2Lost finds the second header.
func luks2Lost(v *view, c *Content) bool {
	for at := int64(16 << 10); at <= maxRead; at *= 2 {
		if !v.has(at, "SKUL\xba\xbe") {
			continue
		}
		if _, ok := luks2Header(v, at, "SKUL\xba\xbe", c); ok {
			c.Kind = "luks2"
			c.fault("its header is lost; the second header at byte %d is there", at)
			return true
		}
	}
	return false
}

// vmfs: the magic numbers of the volume and file system information, as vmfs-tools
// has them (vmfs_volume.h, vmfs_fs.h).
func vmfs(v *view, c *Content) bool {
	b := v.bytes(1<<20, 4)
	if b == nil || le.Uint32(b) != 0xc001d00d {
		return false
	}
	c.Kind = "vmfs"
	return true
}

// zfs: "ZFS On-Disk Specification" (Sun Microsystems, 2006), chapter 1: a label of
// 256 KiB, its second half a ring of uberblocks of 1 KiB and more.
func zfs(v *view, c *Content) bool {
	b := v.bytes(128<<10, 128<<10)
	for at := 0; at+8 <= len(b); at += 1024 {
		if m := b[at : at+8]; le.Uint64(m) == 0x00bab10c || be.Uint64(m) == 0x00bab10c {
			c.Kind = "zfs"
			c.proved("uberblock")
			return true
		}
	}
	return false
}
