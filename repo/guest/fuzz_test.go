package guest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// zeroes reads as its bytes and as zeros behind them. It fails a test that asks for
// more at once than there may be memory for.
type zeroes struct {
	t    *testing.T
	b    []byte
	size int64
}

func (z zeroes) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > z.size || len(p) > maxRead {
		z.t.Fatalf("%d bytes read at %d of %d", len(p), off, z.size)
	}
	clear(p)
	if off < int64(len(z.b)) {
		copy(p, z.b[off:])
	}
	return len(p), nil
}

// head is the first n bytes of an image.
func (s *sparse) head(n int64) []byte {
	b := make([]byte, min(n, s.size))
	_, _ = s.ReadAt(b, 0)
	return b
}

// seed adds what a program makes, where it is installed.
func seed(f *testing.F, size, keep int64, tool string, args ...string) {
	f.Helper()
	path := filepath.Join(f.TempDir(), "image")
	if os.WriteFile(path, make([]byte, size), 0o600) != nil || exec.Command(tool, append(args, path)...).Run() != nil {
		return // TestExt and its like say that it is not installed
	}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:keep], size)
}

// resum makes the checksums right again of what was changed behind them, so that
// what they protect is fuzzed as well.
func resum(b []byte) {
	if len(b) >= 2048 {
		le.PutUint32(b[1024+0x3fc:], ^crc32c(b[1024:1024+0x3fc])) // ext
	}
	if len(b) >= 512 && string(b[:4]) == "XFSB" {
		if n := int(be.Uint16(b[102:])); n >= 512 && n <= len(b) {
			clear(b[224:228])
			le.PutUint32(b[224:], crc32c(b[:n]))
		}
	}
	if len(b) >= 68<<10 {
		le.PutUint32(b[64<<10:], crc32c(b[64<<10+32:][:4096-32])) // btrfs
	}
	if len(b) >= 4608 && string(b[512:520]) == "LABELONE" {
		le.PutUint32(b[512+16:], lvmSum(b[512+20:1024]))
		le.PutUint32(b[4096:], lvmSum(b[4100:4608]))
	}
	if len(b) >= 6144 && string(b[3:8]) == "EXFAT" {
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
	if len(b) >= 4096 && string(b[32:36]) == "NXSB" {
		le.PutUint64(b, fletcher64(b[8:4096]))
	}
}

func FuzzRecognise(f *testing.F) {
	for i, c := range crafted {
		if i == 0 || crafted[i-1].want.Kind != c.want.Kind {
			s := c.craft()
			n := int64(8 << 10)
			switch c.want.Kind {
			case "btrfs", "ufs2", "bitlocker", "iso9660", "luks2", "exfat", "xfs":
				n = 72 << 10
			case "zfs":
				n = 140 << 10
			}
			f.Add(s.head(n), s.size)
		}
	}
	seed(f, 16*mib, 2048, "mke2fs", "-q", "-t", "ext4", "-b", "1024", "-O", "metadata_csum")
	seed(f, 8*mib, 24<<10, "mkfs.ntfs", "-q", "-F", "-f", "-s", "512", "-p", "0", "-H", "0", "-S", "0")
	seed(f, 2*mib, 1024, "mkfs.fat", "-F", "12")
	seed(f, 64*mib, 32*512+512, "mkfs.fat", "-F", "32", "-s", "1")
	seed(f, mib, 4096, "mkswap", "-q", "-p", "4096")
	f.Add([]byte{}, int64(1)<<62)
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if size < int64(len(b)) {
			return
		}
		for range 2 {
			c, err := Recognise(zeroes{t, b, size}, size)
			if err != nil {
				t.Fatal(err)
			}
			if c.Kind == "" && len(c.Proved)+len(c.Faults) > 0 || c.Bytes < 0 || c.Bytes > size {
				t.Fatalf("%+v", c)
			}
			b = append([]byte(nil), b...)
			resum(b)
		}
		if d := Look(zeroes{t, b, size}, size); d.Err != nil {
			t.Fatal(d.Err)
		}
	})
}

// FuzzPatch changes a few bytes anywhere in one of the crafted images.
func FuzzPatch(f *testing.F) {
	for i := range crafted {
		f.Add(uint8(i), uint32(crafted[i].corrupt), []byte{0xff, 1})
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint32, patch []byte) {
		s := crafted[int(which)%len(crafted)].craft()
		for off, b := range s.at {
			if from := int64(at) - off; from >= 0 && from < int64(len(b)) {
				copy(b[from:], patch)
			}
		}
		if c, err := Recognise(s, s.size); err != nil || c.Bytes < 0 || c.Bytes > s.size {
			t.Fatalf("%+v, %v", c, err)
		}
	})
}

var _ io.ReaderAt = zeroes{}

func ExampleRecognise() {
	s := craftXFS()
	c, err := Recognise(s, s.size)
	fmt.Println(c.Kind, c.Label, c.Proved, err)
	// Output: xfs data [superblock superblock checksum size root inode second superblock] <nil>
}
