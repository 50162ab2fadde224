package fs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The judges are programs that know nothing of this one.

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

const (
	guestSize = 96 << 20
	guestPart = 3 << 20 // where the file system begins
)

// guestDisk makes a disk as a guest would have it: a partition table and an
// ext4 file system with files. It returns the disk and the folder of the files.
func guestDisk(t testing.TB) (image, files string) {
	t.Helper()
	needTools(t, "mkfs.ext4", "sfdisk")
	dir := t.TempDir()
	image, files = filepath.Join(dir, "guest.raw"), filepath.Join(dir, "files")
	rng := rand.NewChaCha8([32]byte{7})
	for i := range 20 {
		sub := filepath.Join(files, fmt.Sprintf("dir%d", i%4))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, rng.Uint64()%(1<<18))
		rng.Read(b)
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%d", i)), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, guestSize); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sfdisk", "-q", image)
	cmd.Stdin = strings.NewReader("label: gpt\nstart=3MiB, size=64MiB\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	run(t, "mkfs.ext4", "-q", "-d", files, "-E", fmt.Sprintf("offset=%d", guestPart), image, "64M")
	return image, files
}

func mountGuest(t testing.TB) (m *mounted, folder, image, files string) {
	t.Helper()
	image, files = guestDisk(t)
	m = mountGens(t, order{Gens: []fakeGeneration{{Host: "esx1", VM: "guest", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{{Name: "guest", Size: guestSize, Path: image}}}}})
	return m, m.path("esx1/guest/latest"), image, files
}

func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

// dataBlocks counts what is not hole. An image may take more: reserved blocks
// that read as zeros are holes to SEEK_DATA.
func dataBlocks(t testing.TB, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return ((&fakeDisk{spec: fakeDiskSpec{Size: guestSize}, file: f}).stored() + 511) / 512
}

func TestJudgeCp(t *testing.T) {
	needTools(t, "cp", "cmp", "du")
	_, folder, image, _ := mountGuest(t)
	flat := filepath.Join(folder, "guest-flat.vmdk")
	want := dataBlocks(t, image)
	if got := blocks(t, flat); got != want {
		t.Errorf("%d blocks shown, the image has %d", got, want)
	}
	for _, how := range []string{"auto", "always"} {
		copied := filepath.Join(t.TempDir(), "copy")
		run(t, "cp", "--sparse="+how, flat, copied)
		run(t, "cmp", copied, image)
		if got := blocks(t, copied); got > want+want/10+64 {
			t.Errorf("sparse=%s: the copy takes %d blocks, the image %d", how, got, want)
		}
	}
	if got := strings.Fields(run(t, "du", "-B512", flat))[0]; got != fmt.Sprint(want) {
		t.Errorf("du says %s", got)
	}
}

// Copying a huge disk that is nearly empty must not read the emptiness.
func TestJudgeCpOfHugeEmptyDisk(t *testing.T) {
	needTools(t, "cp")
	m := mountGens(t, order{Gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{{Name: "d", Size: 1 << 40, Seed: 5}}}}})
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, "cp", "--sparse=auto", m.path("h/v/latest/d-flat.vmdk"), copied)
	if r := m.must(order{Op: "stats"}); r.Reads > 8<<20 {
		t.Errorf("%d bytes read", r.Reads)
	}
	fi, err := os.Stat(copied)
	if err != nil || fi.Size() != 1<<40 || blocks(t, copied) > 1024 {
		t.Errorf("the copy has %d blocks, %v", blocks(t, copied), err)
	}
}

func TestJudgeQemuImg(t *testing.T) {
	needTools(t, "qemu-img")
	_, folder, image, _ := mountGuest(t)
	desc := filepath.Join(folder, "guest.vmdk")
	var info struct {
		Format string `json:"format"`
		Size   int64  `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", desc)), &info); err != nil || info.Format != "vmdk" || info.Size != guestSize {
		t.Errorf("info: %+v, %v", info, err)
	}
	if out := run(t, "qemu-img", "compare", "-f", "vmdk", "-F", "raw", desc, image); !strings.Contains(out, "identical") {
		t.Error(out)
	}
	copied := filepath.Join(t.TempDir(), "copy.qcow2")
	run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "qcow2", desc, copied)
	if out := run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", copied, image); !strings.Contains(out, "identical") {
		t.Error(out)
	}
	if out := run(t, "qemu-img", "map", "--output=json", "-f", "raw", filepath.Join(folder, "guest-flat.vmdk")); strings.Count(out, `"data": false`) < 2 {
		t.Errorf("map shows no holes: %s", out)
	}
}

func sameTree(t *testing.T, a, b string) {
	t.Helper()
	out := run(t, "diff", "-r", "--exclude=lost+found", a, b)
	if out != "" {
		t.Error(out)
	}
}

// The guest's file system mounts, by offset and as a file of its own.
func TestJudgeLoopMount(t *testing.T) {
	needRoot(t)
	needTools(t, "losetup", "mount", "umount", "diff", "e2fsck")
	_, folder, _, files := mountGuest(t)
	if out, err := exec.Command("losetup", "-f").CombinedOutput(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("no loop devices: %v: %s", err, out)
		}
		t.Skipf("no loop devices: %s", out)
	}
	loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", "--read-only", fmt.Sprintf("--offset=%d", guestPart), fmt.Sprintf("--sizelimit=%d", 64<<20), filepath.Join(folder, "guest-flat.vmdk")))
	defer exec.Command("losetup", "-d", loop).Run()
	run(t, "e2fsck", "-fn", loop)
	guest := mountDir(t)
	run(t, "mount", "-o", "ro", loop, guest)
	func() {
		defer exec.Command("umount", guest).Run()
		sameTree(t, files, guest)
	}()
	part := filepath.Join(folder, "partitions/guest-p1.img")
	run(t, "mount", "-o", "ro,loop", part, guest)
	func() {
		defer exec.Command("umount", guest).Run()
		sameTree(t, files, guest)
	}()
	run(t, "losetup", "-d", loop)
	// the copy of a partition is a file system as well
	copied := filepath.Join(t.TempDir(), "p1.img")
	run(t, "cp", "--sparse=auto", part, copied)
	run(t, "e2fsck", "-fn", copied)
	if a, b := blocks(t, copied), blocks(t, part); a > b+b/10+64 {
		t.Errorf("the copy takes %d blocks, the partition %d", a, b)
	}
}

func TestJudgeFio(t *testing.T) {
	needTools(t, "fio")
	m := mountGens(t, order{Gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{{Name: "d", Size: 16 << 20, Seed: 5, Density: 200}}}}})
	flat := m.path("h/v/latest/d-flat.vmdk")
	for _, args := range [][]string{
		{"--rw=randread", "--bs=4k", "--numjobs=4", "--io_size=2m"},
		{"--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--io_size=2m"},
		{"--rw=read", "--bs=1m", "--numjobs=4", "--offset_increment=4m", "--size=4m"},
		{"--rw=randread", "--bsrange=512-300k", "--ioengine=mmap", "--io_size=4m"},
	} {
		out := run(t, "fio", append([]string{"--name=j", "--filename=" + flat, "--readonly", "--output-format=json", "--size=16m", "--group_reporting"}, args...)...)
		var r struct {
			Jobs []struct{ Error, Total_err int }
		}
		if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &r); err != nil || len(r.Jobs) == 0 || r.Jobs[0].Error != 0 {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	spec := fakeDiskSpec{Size: 16 << 20, Seed: 5, Density: 200}
	want := make([]byte, spec.Size)
	spec.fill(want, 0)
	got, err := os.ReadFile(flat)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("what the page cache holds now is wrong (%v)", err)
	}
}
