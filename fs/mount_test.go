package fs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var web01 = fakeDiskSpec{Name: "web01", Size: 10<<20 + 512*7, Seed: 1, Density: 128}

func oneVM() []fakeGeneration {
	return []fakeGeneration{
		{Host: "esx1", VM: "web01", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{web01}, Files: map[string]string{"web01.vmx": "a = 1\n", "generation.json": "{}\n"}},
		{Host: "esx1", VM: "web01", Sequence: 2, Time: testTime(2), Disks: []fakeDiskSpec{web01}, Files: map[string]string{"web01.vmx": "a = 2\n"}},
		{Host: "esx1", VM: "db\t1", Sequence: 3, Time: testTime(1)},
		{Host: "esx2", VM: "web01", Sequence: 4, Time: testTime(1)},
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := []string{}
	for _, e := range entries {
		n := e.Name()
		if e.IsDir() {
			n += "/"
		}
		if e.Type()&os.ModeSymlink != 0 {
			n += "@"
		}
		s = append(s, n)
	}
	return s
}

func TestTreeOfFolders(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	for _, c := range []struct {
		dir  string
		want []string
	}{
		{"", []string{"esx1/", "esx2/"}},
		{"esx1", []string{"db%091/", "web01/"}},
		{"esx1/web01", []string{baseName(1) + "/", baseName(2) + "/", "latest@"}},
		{"esx1/web01/" + baseName(1), []string{"generation.json", "partitions/", "web01-flat.vmdk", "web01.vmdk", "web01.vmx"}},
		{"esx1/db%091/" + baseName(1), []string{}},
		{"esx1/web01/latest/partitions", []string{"web01.img"}},
	} {
		if d := cmp.Diff(c.want, names(t, m.path(c.dir))); d != "" {
			t.Errorf("%s: %s", c.dir, d)
		}
	}
	if got, err := os.Readlink(m.path("esx1/web01/latest")); err != nil || got != baseName(2) {
		t.Errorf("latest -> %q, %v", got, err)
	}
	if b, err := os.ReadFile(m.path("esx1/web01/latest/web01.vmx")); err != nil || string(b) != "a = 2\n" {
		t.Errorf("vmx of the latest: %q, %v", b, err)
	}
	for _, missing := range []string{"esx3", "esx1/web02", "esx1/web01/2020-01-01T00-00-00Z", "esx1/web01/latest/x", "esx1/db%091/" + baseName(1) + "/partitions"} {
		if _, err := os.Lstat(m.path(missing)); !os.IsNotExist(err) {
			t.Errorf("%s: got %v, want not found", missing, err)
		}
	}
}

func TestContentsAndMetadata(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	path := m.path("esx1/web01", baseName(1), "web01-flat.vmdk")
	want := make([]byte, web01.Size)
	web01.fill(want, 0)
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the flat file differs from the disk")
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	stored := (&fakeDisk{spec: web01}).stored()
	if st.Size != web01.Size || st.Blocks != (stored+511)/512 || time.Unix(st.Mtim.Unix()) != testTime(1).Local() || st.Mode != syscall.S_IFREG|0o444 || int(st.Uid) != os.Geteuid() {
		t.Errorf("stat: %+v; want %d bytes in %d blocks", st, web01.Size, (stored+511)/512)
	}
	var part unix.Stat_t
	if err := unix.Stat(m.path("esx1/web01", baseName(1), "partitions/web01.img"), &part); err != nil || part.Blocks != st.Blocks || part.Size != st.Size {
		t.Errorf("whole disk as a partition: %+v, %v", part, err)
	}
	// direct I/O sees the same bytes
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
		t.Errorf("direct reads differ (%v)", err)
	}
	// extended attributes
	buf := make([]byte, 200)
	n, err := unix.Getxattr(path, "user.hikae.generation", buf)
	if err != nil || string(buf[:n]) != "esx1/web01@"+baseName(1) {
		t.Errorf("attribute: %q, %v", buf[:max(n, 0)], err)
	}
	if n, err = unix.Listxattr(path, buf); err != nil || string(buf[:n]) != "user.hikae.generation\x00user.hikae.consistency\x00user.hikae.change_id\x00" {
		t.Errorf("attributes: %q, %v", buf[:max(n, 0)], err)
	}
	if n, err = unix.Listxattr(path, nil); err != nil || n != 66 {
		t.Errorf("size of attributes: %d, %v", n, err)
	}
	if _, err = unix.Getxattr(path, "user.hikae.nothing", buf); !errors.Is(err, unix.ENODATA) {
		t.Errorf("missing attribute: %v", err)
	}
	if _, err = unix.Getxattr(path, "user.hikae.generation", buf[:4]); !errors.Is(err, unix.ERANGE) {
		t.Errorf("attribute into a short buffer: %v", err)
	}
	if _, err = unix.Getxattr(m.dir, "user.hikae.generation", buf); !errors.Is(err, unix.ENODATA) {
		t.Errorf("attribute of the root: %v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(m.dir, &fs); err != nil || fs.Blocks*uint64(fs.Bsize) != 1000<<30 || fs.Bavail*uint64(fs.Bsize) != 400<<30 {
		t.Errorf("statfs: %+v, %v", fs, err)
	}
}

func TestReadOnly(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	path := m.path("esx1/web01/latest/web01.vmx")
	for what, err := range map[string]error{
		"open for writing": func() error { _, err := os.OpenFile(path, os.O_RDWR, 0); return err }(),
		"create":           os.WriteFile(m.path("esx1/x"), nil, 0o600),
		"mkdir":            os.Mkdir(m.path("x"), 0o700),
		"remove":           os.Remove(path),
		"rename":           os.Rename(path, path+"2"),
		"truncate":         os.Truncate(path, 0),
		"chmod":            os.Chmod(path, 0o777),
		"setxattr":         unix.Setxattr(path, "user.x", nil, 0),
	} {
		if !strings.Contains(errText(err), "read-only file system") {
			t.Errorf("%s: %v", what, err)
		}
	}
	all, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(all), "\n") {
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != m.dir {
			continue
		}
		for _, opt := range []string{"ro", "nosuid", "nodev", "default_permissions"} {
			if !strings.Contains(","+f[3]+",", ","+opt+",") {
				t.Errorf("%s is not among the mount's options: %s", opt, line)
			}
		}
		if f[2] != "fuse.hikae" {
			t.Errorf("type of the mount: %s", line)
		}
		return
	}
	t.Error("not among the mounts")
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestSeekDataAndHole(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	f, err := os.Open(m.path("esx1/web01/latest/web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// what the disk's own map says
	model := func(off int64, data bool) int64 {
		for ; off < web01.Size; off = (off/fakeBlock + 1) * fakeBlock {
			if web01.isData(off/fakeBlock) == data {
				return off
			}
		}
		if data {
			return -1
		}
		return web01.Size
	}
	for off := int64(0); off < web01.Size; off += 30011 {
		for _, data := range []bool{true, false} {
			whence := seekHole
			if data {
				whence = seekData
			}
			got, err := unix.Seek(int(f.Fd()), off, whence)
			if errors.Is(err, unix.ENXIO) {
				got = -1
			} else if err != nil {
				t.Fatal(err)
			}
			if want := model(off, data); got != want {
				t.Fatalf("whence %d from %d: got %d, want %d", whence, off, got, want)
			}
		}
	}
	if _, err := unix.Seek(int(f.Fd()), web01.Size, seekHole); !errors.Is(err, unix.ENXIO) {
		t.Errorf("seek from the end: %v", err)
	}
	if r := m.must(order{Op: "stats"}); r.Reads != 0 {
		t.Errorf("seeking read %d bytes", r.Reads)
	}
}

func TestInodesAreStable(t *testing.T) {
	inodes := func() map[string]uint64 {
		m := mountGens(t, order{Gens: oneVM()})
		got := map[string]uint64{}
		seen := map[uint64]string{}
		err := filepath.WalkDir(m.dir, func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			if other, ok := seen[st.Ino]; ok {
				t.Errorf("%s and %s have the same inode number", path, other)
			}
			seen[st.Ino] = path
			got[strings.TrimPrefix(path, m.dir)] = st.Ino
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	first := inodes()
	if len(first) != 24 {
		t.Errorf("%d inodes: %v", len(first), first)
	}
	if d := cmp.Diff(first, inodes()); d != "" {
		t.Error(d)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 200 {
		if f() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("never happened: %s", what)
}

func TestGenerationsComeAndGo(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM(), Refresh: 50 * time.Millisecond})
	latest := func() string { s, _ := os.Readlink(m.path("esx1/web01/latest")); return s }
	if latest() != baseName(2) {
		t.Fatalf("latest is %s", latest())
	}
	f, err := os.Open(m.path("esx1/web01", baseName(2), "web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m.must(order{Op: "add", Gens: []fakeGeneration{{Host: "esx1", VM: "web01", Sequence: 9, Time: testTime(9)}, {Host: "esx9", VM: "new", Sequence: 10, Time: testTime(9)}}})
	eventually(t, "the link follows", func() bool { return latest() == baseName(9) })
	eventually(t, "the new generation is listed", func() bool { return len(names(t, m.path("esx1/web01"))) == 4 })
	eventually(t, "the new host is listed", func() bool { return len(names(t, m.dir)) == 3 })
	m.must(order{Op: "forget", Sequence: 2})
	m.must(order{Op: "forget", Sequence: 9})
	eventually(t, "the forgotten one is gone", func() bool {
		_, err := os.Stat(m.path("esx1/web01", baseName(2), "web01-flat.vmdk"))
		return os.IsNotExist(err)
	})
	eventually(t, "the link follows back", func() bool { return latest() == baseName(1) })
	// who has it open still reads right bytes
	got, want := make([]byte, 100000), make([]byte, 100000)
	web01.fill(want, 1<<20)
	if _, err := f.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("reading a forgotten generation: %v", err)
	}
	m.must(order{Op: "forget", Sequence: 4})
	eventually(t, "a host without VMs is gone", func() bool { return len(names(t, m.dir)) == 2 })
}

func TestDamageIsAnError(t *testing.T) {
	spec := fakeDiskSpec{Name: "d", Size: 8 << 20, Seed: 3, Density: 256, Bad: 4 << 20}
	m := mountGens(t, order{Gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{spec}}}})
	f, err := os.Open(m.path("h/v/latest/d-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, want := make([]byte, spec.Size), make([]byte, spec.Size)
	spec.fill(want, 0)
	var bad int64
	for off := int64(0); off < spec.Size; off += 4096 {
		n, err := f.ReadAt(got[off:off+4096], off)
		damaged := off >= spec.Bad && off < spec.Bad+fakeBlock
		switch {
		case damaged && (n != 0 || !strings.Contains(errText(err), "input/output error")):
			t.Fatalf("damaged area at %d: %d bytes, %v", off, n, err)
		case damaged:
			bad++
			copy(got[off:], want[off:off+4096])
		case err != nil:
			t.Fatalf("good area at %d: %v", off, err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("wrong bytes")
	}
	if bad != fakeBlock/4096 {
		t.Errorf("%d damaged pages", bad)
	}
	log := m.log.String()
	if n := strings.Count(log, "level=ERROR"); n != 1 {
		t.Errorf("%d lines in the log", n)
	}
	for _, s := range []string{"generation=h/v@" + baseName(1), "disk=d", "pack 00000000000000ab, offset 4711", "file=d-flat.vmdk"} {
		if !strings.Contains(log, s) {
			t.Errorf("the log does not say %q:\n%s", s, log)
		}
	}
}

func TestStorageThatDoesNotAnswer(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM(), Timeout: 300 * time.Millisecond, Refresh: time.Millisecond})
	f, err := os.Open(m.path("esx1/web01/latest/web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m.must(order{Op: "stick"})
	buf := make([]byte, 4096)
	if _, err := f.ReadAt(buf, 0); !strings.Contains(errText(err), "input/output error") {
		t.Errorf("read: %v", err)
	}
	if _, err := os.ReadDir(m.path("esx1/web01")); !strings.Contains(errText(err), "input/output error") {
		t.Errorf("list: %v", err)
	}
	m.must(order{Op: "loosen"})
	want := make([]byte, 4096)
	web01.fill(want, 0)
	if _, err := f.ReadAt(buf, 0); err != nil || !bytes.Equal(buf, want) {
		t.Errorf("read when it is back: %v", err)
	}
	if got := names(t, m.path("esx1/web01")); len(got) != 3 {
		t.Errorf("list when it is back: %v", got)
	}
	m.must(order{Op: "refuse"})
	if _, err := f.ReadAt(buf, 5<<20); !strings.Contains(errText(err), "input/output error") {
		t.Errorf("read from failing storage: %v", err)
	}
	m.must(order{Op: "accept"})
	if _, err := f.ReadAt(buf, 5<<20); err != nil {
		t.Errorf("read when it works again: %v", err)
	}
	eventually(t, "nobody waits any more", func() bool { return m.must(order{Op: "stats"}).Waiting == 0 })
	if n := strings.Count(m.log.String(), "does not answer"); n != 1 {
		t.Errorf("%d lines in the log about it:\n%s", n, m.log)
	}
}
