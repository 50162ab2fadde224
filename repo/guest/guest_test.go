package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// needs skips a test whose tool is missing; with CI set it has to be there.
func needs(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err == nil {
		return
	}
	for _, dir := range []string{"/sbin/", "/usr/sbin/"} {
		if _, err := os.Stat(dir + tool); err == nil {
			t.Setenv("PATH", os.Getenv("PATH")+":"+dir)
			return
		}
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("CI is set and %s is not installed", tool)
	}
	t.Skipf("%s is not installed", tool)
}

// made is what a program makes of size bytes of zeros.
func made(t *testing.T, size int64, tool string, args ...string) []byte {
	t.Helper()
	needs(t, tool)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, append(args, path)...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", tool, err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func recognised(t *testing.T, b []byte) Content {
	t.Helper()
	c, err := Recognise(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const mib = 1 << 20

// changed is a copy of an image that was changed.
func changed(b []byte, change func(b []byte)) []byte {
	b = bytes.Clone(b)
	change(b)
	return b
}

// faulty demands the kind and one fault with these words.
func faulty(t *testing.T, what string, b []byte, kind, fault string) {
	t.Helper()
	c := recognised(t, b)
	if c.Kind != kind || !slices.ContainsFunc(c.Faults, func(s string) bool { return strings.Contains(s, fault) }) {
		t.Errorf("%s: %+v, want the fault %q", what, c, fault)
	}
}

func TestExt(t *testing.T) {
	for _, c := range []struct {
		kind string
		want Content
	}{
		{"ext2", Content{Proved: []string{"size", "backup superblock"}}},
		{"ext3", Content{Proved: []string{"size", "backup superblock"}}},
		{"ext4", Content{Proved: []string{"superblock checksum", "size", "backup superblock"}}},
	} {
		b := made(t, 16*mib, "mke2fs", "-q", "-t", c.kind, "-b", "1024", "-L", "roots", "-U", testUUIDText, "-O", map[bool]string{true: "metadata_csum", false: "none"}[c.kind == "ext4"])
		c.want.Kind, c.want.Label, c.want.UUID, c.want.Bytes = c.kind, "roots", testUUIDText, 16*mib
		got := recognised(t, b)
		if c.kind != "ext4" { // "none" takes away what makes ext3 of ext2
			got.Kind = c.kind
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", c.kind, d)
		}
	}
	b := made(t, 16*mib, "mke2fs", "-q", "-t", "ext4", "-b", "1024", "-O", "metadata_csum")
	if c := recognised(t, made(t, 16*mib, "mke2fs", "-q", "-t", "ext3")); c.Kind != "ext3" {
		t.Errorf("%+v", c)
	}
	faulty(t, "one byte of the superblock", changed(b, func(b []byte) { b[1024+0x88]++ }), "ext4", "superblock checksum: wrong")
	faulty(t, "no superblock", changed(b, func(b []byte) { clear(b[1024:2048]) }), "ext4", "the backup superblock at byte 8389632 is there")
	faulty(t, "half of it", b[:8*mib], "ext4", "there is room for 8388608")
	if c := recognised(t, changed(b, func(b []byte) { clear(b[8193*1024 : 8194*1024]) })); len(c.Faults) > 0 || !slices.Contains(c.Notes, "backup superblock: wrong or not there") {
		t.Errorf("no backup superblock: %+v", c)
	}
	// Power was cut: the journal is to be replayed, and that is no fault.
	used := changed(b, func(b []byte) {
		le.PutUint32(b[1024+0x60:], le.Uint32(b[1024+0x60:])|extRecover)
		le.PutUint32(b[1024+0x3fc:], ^crc32c(b[1024:1024+0x3fc]))
	})
	if c := recognised(t, used); len(c.Faults) > 0 || len(c.Notes) != 1 || !strings.Contains(c.Notes[0], "journal has to be replayed") {
		t.Errorf("in use: %+v", c)
	}
}

func TestFAT(t *testing.T) {
	for bits, size := range map[string]int64{"12": 2 * mib, "16": 16 * mib, "32": 64 * mib} {
		b := made(t, size, "mkfs.fat", "-F", bits, "-n", "DISK", "-i", "CAFE1234", "-s", "1")
		c := recognised(t, b)
		if c.Kind != "fat"+bits || c.Label != "DISK" || c.UUID != "CAFE-1234" || c.Bytes != size || len(c.Faults)+len(c.Notes) > 0 {
			t.Errorf("FAT%s: %+v", bits, c)
		}
		if bits == "32" && !slices.Contains(c.Proved, "backup boot sector") {
			t.Errorf("proved %q", c.Proved)
		}
		faulty(t, "no table", changed(b, func(b []byte) { clear(b[int(le.Uint16(b[14:]))*512:][:512]) }), "fat"+bits, "first file allocation table: wrong")
		faulty(t, "half of it", b[:len(b)/2], "fat"+bits, "there is room for")
		if bits == "32" {
			c := recognised(t, changed(b, func(b []byte) { b[32*512+7] &^= 8 }))
			if !slices.Contains(c.Notes, "it was in use") || len(c.Faults) > 0 {
				t.Errorf("in use: %+v", c)
			}
		}
	}
}

func TestNTFS(t *testing.T) {
	b := made(t, 8*mib, "mkfs.ntfs", "-q", "-F", "-f", "-s", "512", "-p", "0", "-H", "0", "-S", "0", "-L", "Windows")
	want := Content{
		Kind: "ntfs", Label: "Windows", Bytes: 8*mib - 512,
		Proved: []string{"boot sector", "size", "backup boot sector", "$MFT record", "$MFTMirr record", "$Volume record"},
	}
	got := recognised(t, b)
	if got.UUID == "" {
		t.Error("no serial number")
	}
	got.UUID = ""
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	n, _ := ntfsBoot(b)
	faulty(t, "torn record", changed(b, func(b []byte) { b[n.mft+510]++ }), "ntfs", "$MFT record: wrong")
	faulty(t, "no table", changed(b, func(b []byte) { clear(b[n.mft:][:4096]) }), "ntfs", "$MFT record: wrong")
	faulty(t, "no $Volume", changed(b, func(b []byte) { clear(b[n.mft+3*n.record:][:4]) }), "ntfs", "$Volume record: wrong")
	faulty(t, "no boot sector", changed(b, func(b []byte) { clear(b[:512]) }), "ntfs", "the backup boot sector at byte 8388096 is there")
	faulty(t, "half of it", b[:4*mib], "ntfs", "there is room for")
	dirty := changed(b, func(b []byte) {
		r := b[n.mft+3*n.record:][:n.record]
		i := bytes.Index(r, []byte{0x70, 0, 0, 0})
		r[i+int(le.Uint16(r[i+20:]))+10] |= 1
	})
	if c := recognised(t, dirty); len(c.Faults) > 0 || !slices.Contains(c.Notes, "it was in use, or wants to be checked") {
		t.Errorf("dirty: %+v", c)
	}
}

func TestSwap(t *testing.T) {
	b := made(t, mib, "mkswap", "-q", "-p", "4096", "-U", testUUIDText, "-L", "sw")
	if d := cmp.Diff(Content{Kind: "swap", Label: "sw", UUID: testUUIDText, Bytes: mib, Proved: []string{"header", "size"}}, recognised(t, b)); d != "" {
		t.Error(d)
	}
	faulty(t, "half of it", b[:mib/2], "swap", "there is room for")
	if c := recognised(t, changed(b, func(b []byte) { copy(b[4086:], "S1SUSPEND\x00") })); c.Kind != "swap" || len(c.Notes) != 1 {
		t.Errorf("hibernated: %+v", c)
	}
}

// crafted are the images that no program is needed for.
var crafted = []struct {
	craft   func() *sparse
	want    Content
	blkid   string // TYPE, as blkid has it; "" where it wants to see more of it
	corrupt int64  // a byte whose change must be a fault; 0 for none
	fault   string
}{
	{craftXFS, Content{Kind: "xfs", Label: "data", UUID: testUUIDText, Bytes: 32 * mib, Proved: []string{"superblock", "superblock checksum", "size", "root inode", "second superblock"}}, "xfs", 300, "superblock checksum"},
	{craftXFS, Content{Kind: "xfs", Label: "data", UUID: testUUIDText, Bytes: 32 * mib, Proved: []string{"superblock", "superblock checksum", "size", "root inode", "second superblock"}}, "xfs", 65536, "root inode"},
	{craftBtrfs, Content{Kind: "btrfs", Label: "pool", UUID: testUUIDText, Bytes: 128 * mib, Proved: []string{"superblock checksum", "superblock", "size", "backup superblock"}}, "btrfs", 65536 + 3000, "superblock checksum"},
	{craftBtrfs, Content{Kind: "btrfs", Label: "pool", UUID: testUUIDText, Bytes: 128 * mib, Proved: []string{"superblock checksum", "superblock", "size", "backup superblock"}}, "btrfs", 65536 + 64, "the backup superblock at byte 67108864 is there"},
	{craftExFAT, Content{Kind: "exfat", Label: "cam", UUID: "CAFE-1234", Bytes: 4 * mib, Proved: []string{"boot sector", "boot checksum", "size", "backup boot region"}}, "exfat", 2000, "boot checksum"},
	{craftLVM, Content{Kind: "lvm2", Label: "vg0", UUID: "abcdef-ghij-klmn-opqr-stuv-wxyz-012345", Bytes: 16 * mib, Proved: []string{"label checksum", "size", "metadata header checksum", "metadata checksum"}}, "LVM2_member", 1000, "label checksum"},
	{craftLVM, Content{Kind: "lvm2", Label: "vg0", UUID: "abcdef-ghij-klmn-opqr-stuv-wxyz-012345", Bytes: 16 * mib, Proved: []string{"label checksum", "size", "metadata header checksum", "metadata checksum"}}, "LVM2_member", 4096 + 600, "metadata checksum"},
	{craftLUKS1, Content{Kind: "luks1", UUID: testUUIDText, Proved: []string{"key slots"}}, "crypto_LUKS", 209, "key slots"},
	{craftLUKS2, Content{Kind: "luks2", Label: "secret", UUID: testUUIDText, Proved: []string{"header checksum", "second header"}}, "crypto_LUKS", 5000, "header checksum"},
	{craftLUKS2, Content{Kind: "luks2", Label: "secret", UUID: testUUIDText, Proved: []string{"header checksum", "second header"}}, "crypto_LUKS", 2, "the second header at byte 16384 is there"},
	{craftMDRaid, Content{Kind: "mdraid", Label: "nas:0", UUID: testUUIDText, Proved: []string{"superblock checksum"}, Notes: []string{"a member of a RAID of level 1 with 2 disks"}}, "linux_raid_member", 4096 + 300, "superblock checksum"},
	{craftAPFS, Content{Kind: "apfs", UUID: testUUIDText, Bytes: mib, Proved: []string{"superblock checksum", "size"}}, "apfs", 1000, "superblock checksum"},
	{craftHFSPlus, Content{Kind: "hfsplus", Bytes: 4 * mib, Proved: []string{"volume header", "size", "alternate volume header"}}, "", 1024 + 43, "volume header"},
	{craftISO, Content{Kind: "iso9660", Label: "TOOLS", Bytes: mib, Proved: []string{"volume descriptor", "size"}}, "iso9660", 16*2048 + 81, "volume descriptor"},
	{craftSquash, Content{Kind: "squashfs", Bytes: 500000, Proved: []string{"size"}}, "squashfs", 43, "it says"},
	{craftF2FS, Content{Kind: "f2fs", Label: "fl", UUID: testUUIDText, Bytes: 64 * mib, Proved: []string{"size", "second superblock"}}, "f2fs", 1024 + 16, "superblock"},
	{craftReFS, Content{Kind: "refs", Bytes: 2000 * 512, Proved: []string{"size"}}, "", 26, "it says"},
	{craftBitLocker, Content{Kind: "bitlocker", Proved: []string{"metadata"}}, "", 0, ""},
	{craftUFS2, Content{Kind: "ufs2"}, "ufs", 0, ""},
	{craftUFS1, Content{Kind: "ufs"}, "ufs", 0, ""},
	{craftVMFS, Content{Kind: "vmfs"}, "", 0, ""},
	{craftZFS, Content{Kind: "zfs", Proved: []string{"uberblock"}}, "", 0, ""},
}

func TestCrafted(t *testing.T) {
	for _, c := range crafted {
		s := c.craft()
		got, err := Recognise(s, s.size)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", c.want.Kind, d)
		}
		if c.corrupt == 0 {
			continue
		}
		for at, b := range s.at {
			if c.corrupt >= at && c.corrupt < at+int64(len(b)) {
				b[c.corrupt-at] ^= 0x5a
			}
		}
		got, err = Recognise(s, s.size)
		if err != nil || got.Kind != c.want.Kind || len(got.Faults) == 0 || !strings.Contains(got.Faults[0], c.fault) {
			t.Errorf("%s with byte %d changed: %+v, %v; want the fault %q", c.want.Kind, c.corrupt, got, err, c.fault)
		}
	}
}

// TestAgainstBlkid asks util-linux what the crafted images are.
func TestAgainstBlkid(t *testing.T) {
	needs(t, "blkid")
	for i, c := range crafted {
		if c.blkid == "" || i > 0 && c.want.Kind == crafted[i-1].want.Kind {
			continue
		}
		s := c.craft()
		path := filepath.Join(t.TempDir(), "image")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		for at, b := range s.at {
			if _, err := f.WriteAt(b, at); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.Truncate(s.size), f.Close()); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("blkid", "-p", "-o", "export", path).CombinedOutput()
		if err != nil {
			t.Errorf("%s: blkid does not know it: %v\n%s", c.want.Kind, err, out)
			continue
		}
		say := "\n" + string(out)
		if !strings.Contains(say, "\nTYPE="+c.blkid+"\n") {
			t.Errorf("%s: blkid says\n%s", c.want.Kind, out)
		}
		if c.want.UUID != "" && !strings.Contains(say, "\nUUID="+c.want.UUID+"\n") {
			t.Errorf("%s: the UUID is %s, blkid says\n%s", c.want.Kind, c.want.UUID, out)
		}
		if c.want.Label != "" && c.want.Kind != "lvm2" && !strings.Contains(say, "\nLABEL="+c.want.Label+"\n") {
			t.Errorf("%s: the label is %s, blkid says\n%s", c.want.Kind, c.want.Label, out)
		}
	}
}

func TestNotRecognised(t *testing.T) {
	if c := recognised(t, make([]byte, mib)); c.Kind != "" || len(c.Faults) > 0 || len(c.Notes) != 1 {
		t.Errorf("zeros: %+v", c)
	}
	if c := recognised(t, bytes.Repeat([]byte("noise"), 100000)); c.Kind != "" || len(c.Faults)+len(c.Notes) > 0 {
		t.Errorf("noise: %+v", c)
	}
	for n := range 3 {
		if c := recognised(t, make([]byte, n)); c.Kind != "" || len(c.Faults) > 0 {
			t.Errorf("%d bytes: %+v", n, c)
		}
	}
}

// TestWholeBehindLeftovers: what the one before has left does not count.
func TestWholeBehindLeftovers(t *testing.T) {
	s := craftXFS()
	copy(s.put(1024, 1024), changed(made(t, 16*mib, "mke2fs", "-q", "-t", "ext4"), func(b []byte) { b[1024+0x88]++ })[1024:2048])
	if c, err := Recognise(s, s.size); err != nil || c.Kind != "xfs" || len(c.Faults) > 0 {
		t.Errorf("%+v, %v", c, err)
	}
	s = craftUFS2()
	copy(s.put(3, 8), "ReFS\x00\x00\x00\x00") // and what follows is not there
	copy(s.put(16, 4), "FSRS")
	copy(s.put(24, 8), "\xff\xff\xff\xff\x00\x00\x00\x00")
	copy(s.put(32, 4), "\x00\x02\x00\x00")
	if c, err := Recognise(s, s.size); err != nil || c.Kind != "ufs2" || len(c.Faults) > 0 {
		t.Errorf("%+v, %v", c, err)
	}
}

// broken fails reads of some bytes.
type broken struct {
	io.ReaderAt
	from, to int64
}

var errBroken = errors.New("bad sector")

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off < b.to && off+int64(len(p)) > b.from {
		return 0, errBroken
	}
	return b.ReaderAt.ReadAt(p, off)
}

func TestReadErrors(t *testing.T) {
	s := craftXFS()
	c, err := Recognise(broken{s, 16 * 4096, 17 * 4096}, s.size)
	if !errors.Is(err, errBroken) || c.Kind != "xfs" || len(c.Faults) > 0 || !slices.Contains(c.Proved, "superblock checksum") {
		t.Errorf("%+v, %v", c, err)
	}
	if !strings.Contains(err.Error(), fmt.Sprint(16*4096)) {
		t.Errorf("the place is not in %q", err)
	}
}

// TestLook partitions a disk as sfdisk does and puts things into it.
func TestLook(t *testing.T) {
	const size = 64 * mib
	needs(t, "sfdisk")
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sfdisk", "-q", path)
	cmd.Stdin = strings.NewReader("label: gpt\nsize=1M,type=21686148-6449-6E6F-744E-656564454649\nsize=16M\nsize=33M\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(disk[2*mib:], made(t, 16*mib, "mke2fs", "-q", "-t", "ext4"))
	xfs := craftXFS()
	_, _ = xfs.ReadAt(disk[18*mib:18*mib+xfs.size], 0)
	d := Look(bytes.NewReader(disk), size)
	if d.Err != nil || d.Whole != nil || len(d.Table.Faults) > 0 || len(d.Partitions) != 3 {
		t.Fatalf("%+v", d)
	}
	for i, kind := range []string{"", "ext4", "xfs"} {
		if p := d.Partitions[i]; p.Content.Kind != kind || p.Err != nil || len(p.Content.Faults) > 0 {
			t.Errorf("partition %d: %+v", i+1, p)
		}
	}
	// The beginning of one is gone, and it is that one that is named.
	d = Look(broken{bytes.NewReader(disk), 2 * mib, 3 * mib}, size)
	if d.Err != nil || !errors.Is(d.Partitions[1].Err, errBroken) || d.Partitions[0].Err != nil || d.Partitions[2].Err != nil {
		t.Errorf("%+v", d)
	}
	d = Look(broken{bytes.NewReader(disk), 0, 512}, size)
	if !errors.Is(d.Err, errBroken) || d.Whole != nil {
		t.Errorf("%+v", d)
	}
	// A disk without a table.
	d = Look(xfs, xfs.size)
	if d.Whole == nil || d.Whole.Content.Kind != "xfs" || len(d.Partitions) != 0 {
		t.Errorf("%+v", d)
	}
}
