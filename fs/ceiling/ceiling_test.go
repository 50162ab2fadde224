package ceiling

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestMount(t *testing.T) {
	if _, err := os.Stat("/dev/fuse"); err != nil && os.Getenv("CI") == "" {
		t.Skip("needs /dev/fuse")
	}
	if _, err := exec.LookPath("fusermount3"); err != nil && os.Geteuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("needs fusermount3")
	}
	for _, direct := range []bool{false, true} {
		dir := t.TempDir()
		const size = 3*request + 5000
		s, err := Mount(dir, Options{Size: size, Direct: direct})
		if err != nil {
			t.Fatal(err)
		}
		// Read by another process: one that polls its own mount waits for itself.
		got, err := exec.Command("cat", filepath.Join(dir, Name)).Output()
		if err != nil || !bytes.Equal(got, make([]byte, size)) {
			t.Errorf("direct %v: %d bytes, %v", direct, len(got), err)
		}
		tail := exec.Command("tail", "-c", "+3150728", filepath.Join(dir, Name)) // in the last request
		if got, err := tail.Output(); err != nil || len(got) != size-3150727 {
			t.Errorf("direct %v: the end has %d bytes, %v", direct, len(got), err)
		}
		if err := s.Unmount(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, Name)); err == nil {
			t.Error("still mounted")
		}
	}
}
