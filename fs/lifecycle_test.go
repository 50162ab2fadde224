package fs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMountpointsThatCannotBe(t *testing.T) {
	needMount(t)
	base := mountDir(t)
	defer os.RemoveAll(base)
	repo := filepath.Join(base, "repo")
	for _, dir := range []string{"repo/packs", "full/x", "empty", "outer/repo2"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(base, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(repo, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	mounted := mountGens(t, order{Gens: oneVM()})
	for _, c := range []struct{ repo, dir, want string }{
		{repo, filepath.Join(base, "none"), "does not exist; create it with: mkdir -p"},
		{repo, filepath.Join(base, "none/deeper"), "does not exist"},
		{repo, filepath.Join(base, "file"), "is not a directory"},
		{repo, filepath.Join(base, "full"), `is not empty (it holds "x")`},
		{repo, repo, "is inside the repository"},
		{repo, filepath.Join(repo, "packs"), "is inside the repository"},
		{repo, filepath.Join(base, "link/packs"), "is inside the repository"},
		{filepath.Join(base, "outer/repo2"), filepath.Join(base, "outer"), "contains the repository"},
		{repo, mounted.dir, "already; unmount that first with: hikae umount"},
		{repo, "/proc", "is the mountpoint of a file system (proc) already"},
	} {
		o := Options{Logger: quietLog()}
		s, err := mount(context.Background(), &fakeSource{}, c.repo, c.dir, o)
		if err == nil {
			s.Unmount()
		}
		if !errors.Is(err, ErrMountpoint) || !strings.Contains(errText(err), c.want) || strings.Contains(errText(err), "\n") {
			t.Errorf("%s: %v; want %q", c.dir, err, c.want)
		}
	}
	for _, dir := range []string{filepath.Join(base, "empty"), filepath.Join(base, "none"), "/proc"} {
		if err := Unmount(dir, false); !errors.Is(err, ErrMountpoint) {
			t.Errorf("unmount of %s: %v", dir, err)
		}
	}
	// allowed when asked for
	s, err := mount(context.Background(), &fakeSource{}, repo, filepath.Join(base, "full"), Options{Logger: quietLog(), NonEmpty: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unmount(); err != nil {
		t.Error(err)
	}
	if err := s.Unmount(); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestBusyMount(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	f, err := os.Open(m.path("esx1/web01/latest/web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, err := m.ask(order{Op: "unmount"}); err == nil || !r.Busy || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("unmount: %v, busy %v", err, r.Busy)
	}
	if err := Unmount(m.dir, false); !errors.Is(err, ErrBusy) {
		t.Errorf("unmount by another process: %v", err)
	}
	m.must(order{Op: "detach"})
	if _, ok, err := mountAt(m.dir); ok || err != nil {
		t.Errorf("still mounted (%v)", err)
	}
	got, want := make([]byte, 5000), make([]byte, 5000)
	web01.fill(want, 300<<10)
	if _, err := f.ReadAt(got, 300<<10); err != nil || !bytes.Equal(got, want) {
		t.Errorf("reading after the detachment: %v", err)
	}
	m.must(order{Op: "unmount"}) // nothing more to do
	f.Close()
	m.must(order{Op: "wait"})
}

func TestUnmountedFromOutside(t *testing.T) {
	for _, lazy := range []bool{false, true} {
		m := mountGens(t, order{Gens: oneVM()})
		names(t, m.path("esx1/web01/latest/"))
		if err := Unmount(m.dir, lazy); err != nil {
			t.Fatal(err)
		}
		m.must(order{Op: "wait"})
		m.must(order{Op: "unmount"})
	}
}

// A server that is killed leaves readers with errors and a mount that the next
// one replaces.
func TestKilledServer(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	f, err := os.Open(m.path("esx1/web01/latest/web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m.must(order{Op: "stick"})
	done := make(chan error)
	go func() {
		_, err := f.ReadAt(make([]byte, 10), 5<<20)
		done <- err
	}()
	eventually(t, "the read waits", func() bool { return m.must(order{Op: "stats"}).Waiting > 0 })
	m.cmd.Process.Kill()
	if err := <-done; err == nil {
		t.Error("a read succeeds without a server")
	}
	m.cmd.Wait()
	if _, err := os.ReadDir(m.dir); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("list: %v", err)
	}
	again := start(t)
	again.dir = m.dir
	again.must(order{Op: "mount", Dir: m.dir, Repo: t.TempDir(), Gens: oneVM()})
	if got := names(t, m.path("esx1")); len(got) != 2 {
		t.Errorf("after mounting again: %v", got)
	}
	if !strings.Contains(again.log.String(), "whose server had died") {
		t.Errorf("not in the log: %s", again.log)
	}
}

// Somebody who waits for storage that does not answer can be interrupted, and
// killed.
func TestReadersCanBeInterrupted(t *testing.T) {
	m := mountGens(t, order{Gens: oneVM()})
	m.must(order{Op: "stick"})
	defer func() { m.must(order{Op: "loosen"}) }()
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGKILL} {
		cmd := exec.Command("cat", m.path("esx1/web01/latest/web01-flat.vmdk"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the reader waits", func() bool { return m.must(order{Op: "stats"}).Waiting > 0 })
		time.Sleep(50 * time.Millisecond)
		cmd.Process.Signal(sig)
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err == nil {
				t.Error("the reader succeeded")
			}
		case <-time.After(20 * time.Second):
			t.Errorf("the reader survives %v", sig)
			m.kill()
			<-done
		}
	}
}

// File handles as NFS servers give them to clients must mean the same when the
// mount has been made anew.
func TestFileHandlesOutliveTheMount(t *testing.T) {
	needRoot(t)
	paths := []string{"esx1", "esx1/web01", "esx1/web01/" + baseName(1), "esx1/web01/" + baseName(1) + "/web01-flat.vmdk", "esx1/web01/" + baseName(1) + "/partitions/web01.img"}
	handles := make([]unix.FileHandle, len(paths))
	func() {
		m := mountGens(t, order{Gens: oneVM()})
		for i, p := range paths {
			h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, m.path(p), 0)
			if err != nil {
				t.Fatal(err)
			}
			handles[i] = h
		}
		m.must(order{Op: "unmount"})
	}()
	m := mountGens(t, order{Gens: oneVM()})
	root, err := unix.Open(m.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range paths {
		fd, err := unix.OpenByHandleAt(root, handles[i], unix.O_RDONLY)
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		f := os.NewFile(uintptr(fd), p)
		var a, b unix.Stat_t
		if err := errors.Join(unix.Fstat(fd, &a), unix.Stat(m.path(p), &b)); err != nil || a.Ino != b.Ino || a.Mode != b.Mode {
			t.Errorf("%s: %+v and %+v (%v)", p, a, b, err)
		}
		if a.Mode&unix.S_IFMT == unix.S_IFREG {
			want := make([]byte, web01.Size)
			web01.fill(want, 0)
			if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: bytes differ (%v)", p, err)
			}
		} else if got, err := f.Readdirnames(-1); err != nil || len(got) == 0 {
			t.Errorf("%s: %v, %v", p, got, err)
		}
		f.Close()
	}
	unix.Close(root)
	m.must(order{Op: "unmount"})
	// A handle of a generation that is no more is stale, and so is one whose
	// number has come to mean something else.
	for what, gens := range map[string][]fakeGeneration{
		"gone":     oneVM()[1:],
		"replaced": append(oneVM()[1:], fakeGeneration{Host: "esx3", VM: "other", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{web01}}),
	} {
		m := mountGens(t, order{Gens: gens})
		root, err := unix.Open(m.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.OpenByHandleAt(root, handles[3], unix.O_RDONLY)
		if !errors.Is(err, unix.ESTALE) {
			t.Errorf("%s: handle opens: %d, %v", what, fd, err)
		}
		unix.Close(root)
	}
}

// Without root the mount goes through fusermount3 and is for its user alone.
func TestWithoutRoot(t *testing.T) {
	needRoot(t) // to become somebody else
	needTools(t, "fusermount3", "setpriv")
	base := mountDir(t)
	defer os.RemoveAll(base)
	dir, repo, bin := filepath.Join(base, "mnt"), filepath.Join(base, "repo"), filepath.Join(base, "server")
	for _, d := range []string{dir, repo} {
		if err := errors.Join(os.Mkdir(d, 0o700), os.Chown(d, 65534, 65534)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", os.Args[0], bin).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m := &mounted{t: t, dir: dir, log: &lockedLog{}}
	m.startServer("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", bin)
	if r, err := m.ask(order{Op: "mount", Dir: dir, Repo: repo, Gens: oneVM(), Others: true}); err == nil || !strings.Contains(err.Error(), "user_allow_other in /etc/fuse.conf") {
		b, _ := os.ReadFile("/etc/fuse.conf")
		if !strings.Contains("\n"+string(b), "\nuser_allow_other") {
			t.Errorf("allow other: %+v, %v", r, err)
		}
		detachFully(dir)
	}
	m.must(order{Op: "mount", Dir: dir, Repo: repo, Gens: oneVM()})
	defer detachFully(dir)
	path := filepath.Join(dir, "esx1/web01", baseName(1), "web01-flat.vmdk")
	out, err := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", path).Output()
	want := make([]byte, web01.Size)
	web01.fill(want, 0)
	if err != nil || !bytes.Equal(out, want) {
		t.Errorf("reading as the user: %v, %d bytes", err, len(out))
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrPermission) {
		t.Errorf("root reads another user's mount: %v", err)
	}
	info, ok, err := mountAt(dir)
	if !ok || err != nil || info.kind != fsType || info.source != repo {
		t.Errorf("mount: %+v, %v", info, err)
	}
	m.must(order{Op: "unmount"})
	if _, ok, _ := mountAt(dir); ok {
		t.Error("still mounted")
	}
	// busy, by the helper's words
	m.must(order{Op: "mount", Dir: dir, Repo: repo, Gens: oneVM()})
	cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", "cd "+dir+" && echo in && read x")
	in, _ := cmd.StdinPipe()
	stdout, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stdout.Read(make([]byte, 3))
	if r, err := m.ask(order{Op: "unmount"}); err == nil || !r.Busy {
		t.Errorf("unmount in use: %v, busy %v", err, r.Busy)
	}
	m.must(order{Op: "detach"})
	in.Close()
	cmd.Wait()
	m.must(order{Op: "wait"})
}

// Others may read only when they were let in, and then only what the modes say.
func TestOtherUsers(t *testing.T) {
	needRoot(t)
	needTools(t, "setpriv")
	for _, c := range []struct {
		others bool
		umask  uint32
		want   bool
	}{{false, 0, false}, {true, 0, true}, {true, 0o077, false}} {
		m := start(t)
		if err := os.Chmod(m.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		m.must(order{Op: "mount", Dir: m.dir, Repo: t.TempDir(), Gens: oneVM(), Others: c.others, Umask: c.umask})
		out, err := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", m.path("esx1/web01/latest/web01.vmx")).Output()
		if got := err == nil && string(out) == "a = 2\n"; got != c.want {
			t.Errorf("%+v: %q, %v", c, out, err)
		}
	}
}

// Many open files and readers at once: memory has to stay where it was, and so
// have the goroutines.
func TestMemoryDoesNotGrowWithOpenFiles(t *testing.T) {
	gens := []fakeGeneration{}
	for i := range 300 {
		gens = append(gens, fakeGeneration{Host: "h", VM: "v", Sequence: uint64(i + 1), Time: testTime(1).Add(time.Duration(i) * time.Hour), Disks: []fakeDiskSpec{{Name: "d", Size: 1 << 40, Seed: uint64(i)}}, NVRAM: 256 << 10})
	}
	m := mountGens(t, order{Gens: gens})
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	before := m.must(order{Op: "stats"})
	p := make([]byte, 256<<10)
	for i := range gens {
		dir := m.path("h/v", gens[i].ref().name)
		f, err := os.Open(filepath.Join(dir, "d-flat.vmdk"))
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, f)
		for off := int64(0); off < 2<<20; off += int64(len(p)) {
			if _, err := f.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.ReadFile(filepath.Join(dir, "v.nvram")); err != nil {
			t.Fatal(err)
		}
	}
	after := m.must(order{Op: "stats"})
	if after.HeapBytes > before.HeapBytes+40<<20 {
		t.Errorf("heap %d MiB, then %d MiB", before.HeapBytes>>20, after.HeapBytes>>20)
	}
	if after.Goroutines > before.Goroutines+50 {
		t.Errorf("%d goroutines, then %d", before.Goroutines, after.Goroutines)
	}
}
