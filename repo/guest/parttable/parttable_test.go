package parttable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const mib = 1 << 20

func mbrSector(entries ...[3]uint32) []byte {
	b := make([]byte, 512)
	for i, e := range entries {
		p := b[446+16*i:]
		p[4] = byte(e[0])
		binary.LittleEndian.PutUint32(p[8:], e[1])
		binary.LittleEndian.PutUint32(p[12:], e[2])
	}
	b[510], b[511] = 0x55, 0xaa
	return b
}

func TestMBRWithLogicalPartitions(t *testing.T) {
	disk := make([]byte, 4*mib)
	copy(disk, mbrSector([3]uint32{0x83, 2048, 1000}, [3]uint32{}, [3]uint32{0x0f, 4000, 4000}, [3]uint32{0x07, 8000, 100000}))
	copy(disk[4000*512:], mbrSector([3]uint32{0x83, 16, 100}, [3]uint32{0x05, 1000, 1000}))
	copy(disk[5000*512:], mbrSector([3]uint32{0x82, 32, 200}))
	want := []Partition{
		{1, 2048 * 512, 1000 * 512, "0x83"},
		{4, 8000 * 512, 4*mib - 8000*512, "0x07"}, // cut at the end of the disk
		{5, 4016 * 512, 100 * 512, "0x83"},
		{6, 5032 * 512, 200 * 512, "0x82"},
	}
	got, err := Read(bytes.NewReader(disk), int64(len(disk)))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestLoopOfExtendedRecordsEnds(t *testing.T) {
	disk := make([]byte, mib)
	copy(disk, mbrSector([3]uint32{0x05, 100, 1000}))
	// two records pointing at each other: relative to the first, which is 100
	copy(disk[100*512:], mbrSector([3]uint32{0x83, 1, 1}, [3]uint32{0x05, 100, 10}))
	copy(disk[200*512:], mbrSector([3]uint32{0x83, 1, 1}, [3]uint32{0x05, 0, 10}))
	got, err := Read(bytes.NewReader(disk), mib)
	if err != nil || len(got) != 2 {
		t.Fatalf("got %v, %v; want two partitions", got, err)
	}
}

func TestFileSystemWithoutTable(t *testing.T) {
	b := make([]byte, mib)
	copy(b[3:], "NTFS    ")
	copy(b[446:], "A disk read error occurred\r\nBOOTMGR is missing")
	b[510], b[511] = 0x55, 0xaa
	for name, disk := range map[string][]byte{"boot sector": b, "zeros": make([]byte, mib), "tiny": make([]byte, 700), "empty": nil} {
		if got, err := Read(bytes.NewReader(disk), int64(len(disk))); err != nil || got != nil {
			t.Errorf("%s: got %v, %v; want none", name, got, err)
		}
	}
}

// gptDisk builds a disk with two partitions and both copies of the table.
func gptDisk(lba int64) []byte {
	le := binary.LittleEndian
	disk := make([]byte, 4*mib)
	copy(disk, mbrSector([3]uint32{0xee, 1, 0xffffffff}))
	table := make([]byte, 128*128)
	for i, p := range [][2]uint64{{512, 600}, {0, 0}, {700, 10_000_000}} {
		if p[0] == 0 {
			continue
		}
		e := table[128*i:]
		e[0] = 0xaf
		le.PutUint64(e[32:], p[0])
		le.PutUint64(e[40:], p[1])
	}
	last := int64(len(disk))/lba - 1
	put := func(at, other, tableAt int64) {
		copy(disk[tableAt*lba:], table)
		h := disk[at*lba:]
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x10000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], uint64(at))
		le.PutUint64(h[32:], uint64(other))
		le.PutUint64(h[72:], uint64(tableAt))
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	}
	put(1, last, 2)
	put(last, 1, last-int64(len(table))/lba)
	return disk
}

func TestGPT(t *testing.T) {
	for _, lba := range []int64{512, 4096} {
		disk := gptDisk(lba)
		kind := "000000AF-0000-0000-0000-000000000000"
		want := []Partition{{1, 512 * lba, 89 * lba, kind}, {3, 700 * lba, int64(len(disk)) - 700*lba, kind}}
		check := func(what string) {
			t.Helper()
			got, err := Read(bytes.NewReader(disk), int64(len(disk)))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%s, sectors of %d: %s", what, lba, d)
			}
		}
		check("first copy")
		disk[2*lba+40]++ // breaks the checksum of the first table
		check("second copy")
		disk[int64(len(disk))-lba+20]++
		want = nil
		check("both copies broken")
	}
}

type failing struct{ at int64 }

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.at {
		return 0, errors.New("bad sector")
	}
	clear(p)
	return len(p), nil
}

func TestReadErrorIsReported(t *testing.T) {
	for _, at := range []int64{0, 600} {
		if _, err := Read(failing{at}, mib); err == nil || !strings.Contains(err.Error(), "bad sector") {
			t.Errorf("failing at %d: got %v", at, err)
		}
	}
	if _, err := Read(bytes.NewReader(make([]byte, 1000)), mib); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short disk: got %v", err)
	}
}

// TestAgainstSfdisk lets sfdisk write tables and compares what it says.
func TestAgainstSfdisk(t *testing.T) {
	if _, err := exec.LookPath("sfdisk"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("sfdisk is not installed")
		}
		t.Skip("sfdisk is not installed")
	}
	for _, script := range []string{
		"label: gpt\n,10M\n,5M\n,\n",
		"label: dos\n,10M\n,20M,E\n,4M\n,5M\n,6M\n,3M\n",
	} {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 64*mib); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sfdisk", "-q", path)
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("sfdisk: %v\n%s", err, out)
		}
		out, err := exec.Command("sfdisk", "-d", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		var want []Partition
		for _, line := range strings.Split(string(out), "\n") {
			dev, rest, ok := strings.Cut(line, " : ")
			if !ok || strings.Contains(rest, "type=5") || strings.Contains(rest, "type=f") {
				continue
			}
			var p Partition
			rest = strings.ReplaceAll(rest, " ", "")
			if _, err := fmt.Sscanf(rest, "start=%d,size=%d,", &p.Offset, &p.Length); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if _, err := fmt.Sscanf(strings.TrimPrefix(dev, path), "%d", &p.Number); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			p.Offset, p.Length = p.Offset*512, p.Length*512
			_, kind, _ := strings.Cut(rest, "type=")
			if p.Type, _, _ = strings.Cut(kind, ","); len(p.Type) == 2 {
				p.Type = "0x" + p.Type
			}
			want = append(want, p)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Read(f, 64*mib)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if len(want) < 3 {
			t.Fatalf("sfdisk made %v", want)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s\n%s", script, d)
		}
		f, err = os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		table, err := Inspect(f, 64*mib)
		f.Close()
		if err != nil || len(table.Faults) > 0 || len(table.Notes) > 0 || len(table.Partitions) != len(want) {
			t.Errorf("%s: %+v, %v", script, table, err)
		}
		if gpt := strings.HasPrefix(script, "label: gpt"); gpt && !slices.Equal(table.Proved, []string{"GPT", "second copy"}) {
			t.Errorf("%s: proved %q", script, table.Proved)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(gptDisk(512)[:40000], int64(4*mib))
	f.Add(gptDisk(4096)[:40000], int64(4*mib))
	f.Add(mbrSector([3]uint32{0x83, 1, 5}, [3]uint32{0x05, 1, 5}), int64(mib))
	f.Add([]byte{}, int64(1)<<62)
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if size < 0 {
			return
		}
		parts, err := Read(padded(b), size)
		if err != nil {
			t.Fatalf("a disk that reads gives an error: %v", err)
		}
		for i, p := range parts {
			if p.Offset < 512 || p.Length < 1 || p.Offset > size || p.Length > size-p.Offset {
				t.Fatalf("%+v does not lie on a disk of %d", p, size)
			}
			if i > 0 && p.Number <= parts[i-1].Number {
				t.Fatalf("numbers do not ascend: %v", parts)
			}
		}
		table, err := Inspect(padded(b), size)
		if err != nil || len(table.Partitions) != len(parts) || (len(parts) > 0 && table.Kind == "") {
			t.Fatalf("Inspect: %+v, %v; Read: %v", table, err, parts)
		}
	})
}

// padded reads as zeros behind its bytes.
type padded []byte

func (b padded) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(b)) {
		copy(p, b[off:])
	}
	return len(p), nil
}
