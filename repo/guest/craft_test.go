package guest

import (
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
)

// sparse is an image of which only some places are not zero.
type sparse struct {
	size int64
	at   map[int64][]byte
}

func newSparse(size int64) *sparse { return &sparse{size, map[int64][]byte{}} }

// put places n bytes of zeros and returns them, to be filled.
func (s *sparse) put(at int64, n int) []byte {
	b := make([]byte, n)
	s.at[at] = b
	return b
}

func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	if off >= s.size {
		return 0, io.EOF
	}
	clear(p)
	for at, b := range s.at {
		if from := off - at; from >= int64(len(b)) || -from >= int64(len(p)) {
			continue
		} else if from >= 0 {
			copy(p, b[from:])
		} else {
			copy(p[-from:], b)
		}
	}
	if n := s.size - off; n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

var testUUID = []byte{0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0x4d, 0xef, 0x81, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}

const testUUIDText = "12345678-9abc-4def-8123-456789abcdef"

// The images below are made by the documents that the recognisers name, because
// the programs that make such file systems are seldom installed. TestAgainstBlkid
// has a second opinion about them.

func craftXFS() *sparse {
	const agBlocks, size = 4096, 2 * 4096 * 4096
	s := newSparse(size)
	for at := range int64(2) {
		b := s.put(at*agBlocks*4096, 512)
		copy(b, "XFSB")
		be.PutUint32(b[4:], 4096)
		be.PutUint64(b[8:], 2*agBlocks)
		copy(b[32:], testUUID)
		be.PutUint64(b[48:], 1000) // log
		be.PutUint64(b[56:], 128)  // root: block 16, inode 0 of 8
		be.PutUint64(b[64:], 129)
		be.PutUint64(b[72:], 130)
		be.PutUint32(b[80:], 1)
		be.PutUint32(b[84:], agBlocks)
		be.PutUint32(b[88:], 2)
		be.PutUint32(b[96:], 855)
		be.PutUint16(b[100:], 0xb4a5)
		be.PutUint16(b[102:], 512)
		be.PutUint16(b[104:], 512)
		be.PutUint16(b[106:], 8)
		copy(b[108:], "data")
		copy(b[120:], []byte{12, 9, 9, 3, 12, 0, 0, 25})
		be.PutUint64(b[136:], 60)
		be.PutUint64(b[144:], 7000)
		be.PutUint32(b[200:], 0x18a)
		be.PutUint32(b[204:], 0x18a)
		copy(b[248:], testUUID)
		le.PutUint32(b[224:], crc32c(b))
	}
	copy(s.put(16*4096, 2), "IN")
	return s
}

func craftBtrfs() *sparse {
	const size = 128 << 20
	s := newSparse(size)
	for _, at := range []int64{64 << 10, 64 << 20} {
		b := s.put(at, 4096)
		copy(b[32:], testUUID)
		le.PutUint64(b[48:], uint64(at))
		le.PutUint64(b[56:], 1)
		copy(b[64:], "_BHRfS_M")
		le.PutUint64(b[72:], 5)
		le.PutUint64(b[80:], 30<<20)
		le.PutUint64(b[88:], 22<<20)
		le.PutUint64(b[112:], size)
		le.PutUint64(b[120:], 1<<20)
		le.PutUint64(b[136:], 1)
		le.PutUint32(b[144:], 4096)
		le.PutUint32(b[148:], 16384)
		le.PutUint64(b[201:], 1)
		le.PutUint64(b[209:], size)
		copy(b[299:], "pool")
		le.PutUint32(b, crc32c(b[32:]))
	}
	return s
}

func craftExFAT() *sparse {
	const size = 4 << 20
	s := newSparse(size)
	for i := range int64(2) {
		b := s.put(i*12*512, 12*512)
		copy(b, "\xeb\x76\x90EXFAT   ")
		le.PutUint64(b[72:], size/512)
		le.PutUint32(b[80:], 32)  // tables
		le.PutUint32(b[84:], 8)   // their size
		le.PutUint32(b[88:], 64)  // clusters
		le.PutUint32(b[92:], 900) // how many
		le.PutUint32(b[96:], 5)   // root directory
		le.PutUint32(b[100:], 0xcafe1234)
		le.PutUint16(b[104:], 0x100)
		copy(b[108:], []byte{9, 3, 1, 0x80, 0})
		for at := 510; at < 9*512; at += 512 {
			b[at], b[at+1] = 0x55, 0xaa
		}
		var sum uint32
		for i, x := range b[:11*512] {
			if i != 106 && i != 107 && i != 112 {
				sum = (sum<<31 | sum>>1) + uint32(x)
			}
		}
		for at := 11 * 512; at < 12*512; at += 4 {
			le.PutUint32(b[at:], sum)
		}
	}
	le.PutUint32(s.put(32*512, 64), 0xfffffff8)
	root := s.put((64+3*8)*512, 64)
	copy(root, "\x83\x03c\x00a\x00m\x00")
	return s
}

func craftLVM() *sparse {
	const size, area, areaSize = 16 << 20, 4096, 1<<20 - 4096
	s := newSparse(size)
	b := s.put(512, 512)
	copy(b, "LABELONE")
	le.PutUint64(b[8:], 1)
	le.PutUint32(b[20:], 32)
	copy(b[24:], "LVM2 001")
	p := b[32:]
	copy(p, "abcdefghijklmnopqrstuvwxyz012345")
	le.PutUint64(p[32:], size)
	le.PutUint64(p[40:], 1<<20) // data, to the end
	le.PutUint64(p[72:], area)
	le.PutUint64(p[80:], areaSize)
	le.PutUint32(b[16:], lvmSum(b[20:]))

	text := []byte("vg0 {\nid = \"x\"\nseqno = 3\n}\n" + strings.Repeat("# filler\n", 200) + "\x00")
	off := areaSize - 1000 // so that it goes on at the beginning of the ring
	copy(s.put(int64(area+off), 1000), text)
	copy(s.put(area+512, len(text)-1000), text[1000:])
	h := s.put(area, 512)
	copy(h[4:], " LVM2 x[5A%r0N*>")
	le.PutUint32(h[20:], 1)
	le.PutUint64(h[24:], area)
	le.PutUint64(h[32:], areaSize)
	le.PutUint64(h[40:], uint64(off))
	le.PutUint64(h[48:], uint64(len(text)))
	le.PutUint32(h[56:], lvmSum(text))
	le.PutUint32(h, lvmSum(h[4:]))
	return s
}

func craftLUKS1() *sparse {
	s := newSparse(4 << 20)
	b := s.put(0, 592)
	copy(b, luksMagic)
	be.PutUint16(b[6:], 1)
	copy(b[8:], "aes")
	copy(b[40:], "xts-plain64")
	copy(b[72:], "sha256")
	be.PutUint32(b[104:], 4096)
	be.PutUint32(b[108:], 64)
	copy(b[168:], testUUIDText)
	for i := range 8 {
		be.PutUint32(b[208+48*i:], 0xdead)
	}
	be.PutUint32(b[208:], 0x00ac71f3)
	return s
}

func craftLUKS2() *sparse {
	const header = 16 << 10
	s := newSparse(4 << 20)
	for i, magic := range []string{luksMagic, "SKUL\xba\xbe"} {
		b := s.put(int64(i)*header, header)
		copy(b, magic)
		be.PutUint16(b[6:], 2)
		be.PutUint64(b[8:], header)
		be.PutUint64(b[16:], 3)
		copy(b[24:], "secret")
		copy(b[72:], "sha256")
		copy(b[104:], "salt")
		copy(b[168:], testUUIDText)
		be.PutUint64(b[256:], uint64(i)*header)
		copy(b[4096:], `{"keyslots":{},"tokens":{},"segments":{},"digests":{},"config":{"json_size":"12288","keyslots_size":"0"}}`)
		sum := sha256.Sum256(b)
		copy(b[448:], sum[:])
	}
	return s
}

func craftMDRaid() *sparse {
	s := newSparse(8 << 20)
	b := s.put(4096, 256+2*129) // a half word at the end of its sum
	le.PutUint32(b, 0xa92b4efc)
	le.PutUint32(b[4:], 1)
	copy(b[16:], testUUID)
	copy(b[32:], "nas:0")
	le.PutUint32(b[72:], 1)
	le.PutUint64(b[80:], 12288)
	le.PutUint32(b[92:], 2)
	le.PutUint64(b[128:], 2048)
	le.PutUint64(b[136:], 12288)
	le.PutUint64(b[144:], 8)
	le.PutUint32(b[220:], 129)
	var sum uint64
	for i := 0; i+4 <= len(b); i += 4 {
		sum += uint64(le.Uint32(b[i:]))
	}
	sum += uint64(le.Uint16(b[len(b)-2:]))
	le.PutUint32(b[216:], uint32(sum)+uint32(sum>>32))
	return s
}

func craftAPFS() *sparse {
	s := newSparse(1 << 20)
	b := s.put(0, 4096)
	le.PutUint64(b[8:], 1)
	le.PutUint64(b[16:], 1)
	le.PutUint32(b[24:], 0x80000001)
	copy(b[32:], "NXSB")
	le.PutUint32(b[36:], 4096)
	le.PutUint64(b[40:], 256)
	copy(b[72:], testUUID)
	le.PutUint64(b, fletcher64(b[8:]))
	return s
}

func craftHFSPlus() *sparse {
	const size = 4 << 20
	s := newSparse(size)
	for _, at := range []int64{1024, size - 1024} {
		b := s.put(at, 512)
		copy(b, "H+\x00\x04")
		be.PutUint32(b[4:], 0x100)
		be.PutUint32(b[40:], 4096)
		be.PutUint32(b[44:], size/4096)
		be.PutUint32(b[48:], 100)
	}
	return s
}

func craftISO() *sparse {
	s := newSparse(1 << 20)
	b := s.put(16*2048, 2048)
	copy(b, "\x01CD001\x01")
	copy(b[40:], fmt.Sprintf("%-32s", "TOOLS"))
	le.PutUint32(b[80:], 512)
	be.PutUint32(b[84:], 512)
	le.PutUint16(b[128:], 2048)
	be.PutUint16(b[130:], 2048)
	return s
}

func craftSquash() *sparse {
	s := newSparse(1 << 20)
	b := s.put(0, 96)
	copy(b, "hsqs")
	le.PutUint32(b[12:], 131072)
	le.PutUint16(b[28:], 4)
	le.PutUint64(b[40:], 500000)
	return s
}

func craftF2FS() *sparse {
	s := newSparse(64 << 20)
	for i := range int64(2) {
		b := s.put(i*4096+1024, 3072)
		le.PutUint32(b, 0xf2f52010)
		le.PutUint16(b[4:], 1)
		le.PutUint16(b[6:], 16)
		copy(b[8:], []byte{9, 0, 0, 0, 3, 0, 0, 0, 12, 0, 0, 0, 9})
		le.PutUint64(b[36:], 64<<20/4096)
		copy(b[108:], testUUID)
		copy(b[124:], "f\x00l\x00")
	}
	return s
}

func craftReFS() *sparse {
	s := newSparse(1 << 20)
	b := s.put(0, 512)
	copy(b[3:], "ReFS\x00\x00\x00\x00")
	copy(b[16:], "FSRS")
	le.PutUint64(b[24:], 2000)
	le.PutUint32(b[32:], 512)
	return s
}

func craftBitLocker() *sparse {
	s := newSparse(1 << 20)
	b := s.put(0, 512)
	copy(b, "\xeb\x58\x90-FVE-FS-")
	le.PutUint64(b[176:], 65536)
	copy(s.put(65536, 8), "-FVE-FS-")
	return s
}

func craftUFS2() *sparse {
	s := newSparse(1 << 20)
	le.PutUint32(s.put(65536+1372, 4), 0x19540119)
	return s
}

func craftUFS1() *sparse {
	s := newSparse(1 << 20)
	le.PutUint32(s.put(8192+1372, 4), 0x00011954)
	return s
}

func craftVMFS() *sparse {
	s := newSparse(4 << 20)
	le.PutUint32(s.put(1<<20, 4), 0xc001d00d)
	return s
}

func craftZFS() *sparse {
	s := newSparse(4 << 20)
	le.PutUint64(s.put(128<<10+5*1024, 8), 0x00bab10c)
	return s
}
