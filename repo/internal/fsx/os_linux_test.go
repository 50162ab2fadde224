package fsx

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// appendOnly sets a directory's append-only attribute until the test ends.
func appendOnly(t *testing.T, dir string) bool {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	// 0x20 is FS_APPEND_FL, see ioctl_iflags(2).
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return false
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|0x20)); err != nil {
		return false
	}
	t.Cleanup(func() {
		f, err := os.Open(dir)
		must(t, err)
		defer f.Close()
		must(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)))
	})
	return true
}

// TestLockDies: a process that is killed holds nothing up.
func TestLockDies(t *testing.T) {
	if dir := os.Getenv("FSX_TEST_LOCK_IN"); dir != "" {
		fsys, err := OS(dir)
		must(t, err)
		_, err = fsys.Lock("l", true, false)
		must(t, err)
		os.Stdout.WriteString("held\n")
		time.Sleep(time.Minute)
		return
	}
	dir := t.TempDir()
	fsys, err := OS(dir)
	must(t, err)
	c := exec.Command(os.Args[0], "-test.run=^TestLockDies$")
	c.Env = append(os.Environ(), "FSX_TEST_LOCK_IN="+dir)
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	defer c.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatal(line, err)
	}
	_, err = fsys.Lock("l", true, false)
	mustBe(t, err, ErrLocked)
	must(t, c.Process.Kill())
	var killed *exec.ExitError
	if err := c.Wait(); !errors.As(err, &killed) {
		t.Fatal(err)
	}
	l, err := fsys.Lock("l", true, false)
	must(t, err)
	must(t, l.Close())
}

// TestLockReadOnly: who may only read can take a shared lock on a file that is
// there.
func TestLockReadOnly(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may write everywhere")
	}
	dir := t.TempDir()
	fsys, err := OS(dir)
	must(t, err)
	l, err := fsys.Lock("l", true, false)
	must(t, err)
	must(t, l.Close())
	must(t, os.Chmod(dir+"/l", 0o400))
	must(t, os.Chmod(dir, 0o500))
	defer os.Chmod(dir, 0o700)
	l, err = fsys.Lock("l", false, false)
	must(t, err)
	must(t, l.Close())
	if _, err := fsys.Lock("m", false, false); err == nil {
		t.Error("made a lock where nothing can be made")
	}
}
