package guest

// apfs: "Apple File System Reference" (Apple, 2020): the container's superblock and
// the checksum of objects.
func apfs(v *view, c *Content) bool {
	b := v.bytes(0, 4096)
	if b == nil || string(b[32:36]) != "NXSB" {
		return false
	}
	c.Kind, c.UUID = "apfs", uuid(b[72:88])
	if !c.sound(fletcher64(b[8:]) == le.Uint64(b), "superblock checksum") {
		return true
	}
	if bs, n := le.Uint32(b[36:]), le.Uint64(b[40:]); powerOfTwo(bs, 4096, 65536) && n < 1<<47 {
		c.fits(n*uint64(bs), v)
	} else {
		c.fault("superblock: wrong")
	}
	return true
}

// fletcher64 is the checksum of an object without its first eight bytes, where it
// stands.
func fletcher64(b []byte) uint64 {
	const mod = 0xffffffff
	var a, s uint64
	for ; len(b) >= 4; b = b[4:] {
		a = (a + uint64(le.Uint32(b))) % mod
		s = (s + a) % mod
	}
	low := mod - (a+s)%mod
	return (mod-(a+low)%mod)<<32 | low
}

// hfsplus: Apple, Technical Note TN1150. The second header is in the last but one
// sector.
func hfsplus(v *view, c *Content) bool {
	b := v.bytes(1024, 512)
	if b == nil || string(b[:4]) != "H+\x00\x04" && string(b[:4]) != "HX\x00\x05" {
		return false
	}
	c.Kind = "hfsplus"
	bs, n := be.Uint32(b[40:]), be.Uint32(b[44:])
	if !c.sound(powerOfTwo(bs, 512, 1<<30), "volume header") {
		return true
	}
	c.fits(uint64(bs)*uint64(n), v)
	if be.Uint32(b[4:])&0x100 == 0 {
		c.note("it was in use")
	}
	at := v.size - v.size%512 - 1024
	c.spare(v.has(at, string(b[:4])), "alternate volume header")
	return true
}

// ufs: FreeBSD, sys/ufs/ffs/fs.h: where superblocks are, and their magic at the end.
func ufs(v *view, c *Content) bool {
	const magicAt = 1372
	for _, at := range []int64{65536, 8192} {
		b := v.bytes(at+magicAt, 4)
		if b == nil {
			continue
		}
		for _, magic := range []uint32{le.Uint32(b), be.Uint32(b)} {
			if magic == 0x19540119 {
				c.Kind = "ufs2"
				return true
			}
			if magic == 0x00011954 && at == 8192 {
				c.Kind = "ufs"
				return true
			}
		}
	}
	return false
}

// iso9660: ECMA-119, the primary volume descriptor in the sector numbered 16.
func iso9660(v *view, c *Content) bool {
	b := v.bytes(16*2048, 2048)
	if b == nil || string(b[1:6]) != "CD001" || b[0] > 3 {
		return false
	}
	c.Kind = "iso9660"
	if b[0] != 1 {
		return true
	}
	c.Label = text(b[40:72])
	// Numbers stand twice, in both orders of bytes.
	blocks, bs := le.Uint32(b[80:]), le.Uint16(b[128:])
	if c.sound(blocks == be.Uint32(b[84:]) && bs == be.Uint16(b[130:]) && powerOfTwo(bs, 512, 2048), "volume descriptor") {
		c.fits(uint64(blocks)*uint64(bs), v)
	}
	return true
}
