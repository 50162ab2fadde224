package fs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hikae/repo"
)

var repoPass = []byte("passphrase")

// newRepo makes a repository with generations of one VM; each image is the disk
// of one.
func newRepo(t testing.TB, images ...[]byte) *repo.Repository {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	err := repo.Init(ctx, dir, repo.InitOptions{BlockSize: 64 << 10, Passphrase: repoPass, KDF: repo.KDF{Time: 1, MemoryKiB: 8, Threads: 1}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(ctx, dir, repo.Passphrase(repoPass), repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	for i, image := range images {
		commit(t, r, testTime(i+1), image)
	}
	return r
}

func commit(t testing.TB, r *repo.Repository, at time.Time, image []byte) repo.Ref {
	t.Helper()
	return commitAs(t, r, "web 01", at, image)
}

func commitAs(t testing.TB, r *repo.Repository, vm string, at time.Time, image []byte) repo.Ref {
	t.Helper()
	ctx := context.Background()
	s, err := r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w, err := s.Disk(ctx, int64(len(image)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(ctx, 0, image, nil); err != nil {
		t.Fatal(err)
	}
	d, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := s.Commit(ctx, repo.Manifest{
		VM: repo.VMID{Host: "esx1", Name: vm}, Time: at, Mode: repo.ModeFull, Consistency: repo.ConsistencyCrash,
		Disks: []repo.DiskManifest{{Key: 2000, Label: "Hard disk 1", Name: "web01", Capacity: d.Capacity, DataBytes: d.DataBytes, Root: d.Root, Levels: d.Levels, ChangeID: "52 1f/7", Descriptor: "# Disk DescriptorFile\n"}},
		Files: []repo.ManifestFile{{Name: "web01.vmx", Data: []byte("displayName = \"web 01\"\n")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// noise is an image with random stretches of noise and of zeros.
func noise(seed uint64, size int) []byte {
	rng := rand.NewChaCha8([32]byte{byte(seed)})
	b := make([]byte, size)
	for at := 0; at < size; {
		n := min(size-at, int(1+rng.Uint64()%6)<<16)
		if rng.Uint64()%2 == 0 {
			rng.Read(b[at : at+n])
		}
		at += n
	}
	return b
}

// TestRepository mounts a true repository in this very process and compares
// everything. What the kernel shows is covered by tests with other sources.
func TestRepository(t *testing.T) {
	needMount(t)
	one, two := noise(1, 9<<20+4096), noise(2, 9<<20+4096)
	copy(one[1<<20:], two[1<<20:3<<20])
	r := newRepo(t, one, two)
	dir := mountDir(t)
	log := &lockedLog{}
	srv, err := Mount(context.Background(), r, dir, Options{Logger: testLog(log), Refresh: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := srv.Unmount(); err != nil {
			t.Error(err)
			srv.Detach()
		}
		srv.Wait()
	}()
	dog := time.AfterFunc(time.Minute, func() { t.Error("the mount hangs"); detachFully(dir) })
	defer dog.Stop()
	for i, want := range [][]byte{one, two} {
		folder := filepath.Join(dir, "esx1/web 01", baseName(i+1))
		got, err := os.ReadFile(filepath.Join(folder, "web01-flat.vmdk"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("generation %d differs (%v)", i+1, err)
		}
		if got, err := os.ReadFile(filepath.Join(folder, "web01.vmx")); err != nil || !strings.HasPrefix(string(got), "displayName") {
			t.Errorf("vmx: %q, %v", got, err)
		}
		if got, err := os.ReadFile(filepath.Join(folder, "generation.json")); err != nil || !strings.Contains(string(got), `"mode": "full"`) {
			t.Errorf("generation.json: %q, %v", got, err)
		}
		attr := make([]byte, 100)
		for name, want := range map[string]string{"generation": "esx1/web 01@" + baseName(i+1), "disk.change_id": "52 1f/7", "consistency": "crash"} {
			n, err := unix.Getxattr(filepath.Join(folder, "web01-flat.vmdk"), xattrPrefix+name, attr)
			if err != nil || string(attr[:n]) != want {
				t.Errorf("%s: %q, %v", name, attr[:max(n, 0)], err)
			}
		}
	}
	// When a generation was verified can be seen while it is mounted.
	verified := func(name string) string {
		t.Helper()
		path := filepath.Join(dir, "esx1/web 01", baseName(1), name)
		attr := make([]byte, 500)
		n, err := unix.Listxattr(path, attr)
		if err != nil {
			t.Fatal(err)
		}
		listed := strings.Contains(string(attr[:n]), xattrPrefix+verifiedAt+"\x00")
		n, err = unix.Getxattr(path, xattrPrefix+verifiedAt, attr)
		if err != nil && (listed || !errors.Is(err, unix.ENODATA)) {
			t.Fatalf("%s: %v, listed: %v", path, err, listed)
		}
		return string(attr[:max(n, 0)])
	}
	if got := verified("web01.vmx"); got != "" {
		t.Errorf("verified at %q before it was", got)
	}
	refs, err := r.Refs(context.Background(), repo.VMID{Host: "esx1", Name: "web 01"})
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Generation(context.Background(), refs[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Remember(context.Background(), repo.Verification{Time: time.Date(2026, 12, 1, 4, 5, 6, 0, time.UTC)}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); verified("web01-flat.vmdk") != "2026-12-01T04:05:06Z"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("verified at %q", verified("web01-flat.vmdk"))
		}
	}
	for _, name := range []string{"", "web01.vmx", "partitions"} {
		if got := verified(name); got != "2026-12-01T04:05:06Z" {
			t.Errorf("%q was verified at %q", name, got)
		}
	}
	// st_blocks and the areas say the same
	f, err := os.Open(filepath.Join(dir, "esx1/web 01/latest/web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	var data int64
	for off := int64(0); ; {
		start, end, err := fileData(f, off, st.Size)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		data, off = data+end-start, end
	}
	if data != st.Blocks*512 || data == st.Size || data == 0 {
		t.Errorf("areas of %d bytes, %d blocks, %d bytes", data, st.Blocks, st.Size)
	}
	commit(t, r, testTime(9), one)
	eventually(t, "the new generation is the latest", func() bool {
		s, _ := os.Readlink(filepath.Join(dir, "esx1/web 01/latest"))
		return s == baseName(9)
	})
	if t.Failed() {
		t.Logf("log: %s", log)
	}
}

// TestDamagedRepository breaks every pack while mounted.
func TestDamagedRepository(t *testing.T) {
	needMount(t)
	image := noise(5, 4<<20)
	r := newRepo(t, image)
	dir := mountDir(t)
	log := &lockedLog{}
	srv, err := Mount(context.Background(), r, dir, Options{Logger: testLog(log)})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Wait()
	defer srv.Detach()
	dog := time.AfterFunc(time.Minute, func() { t.Error("the mount hangs"); detachFully(dir) })
	defer dog.Stop()
	err = filepath.WalkDir(filepath.Join(r.Dir(), "packs"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if err := os.Chmod(path, 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		for off := int64(100); off < fi.Size(); off += 10000 {
			if _, err := f.WriteAt([]byte{0xff, 0, 0xff}, off); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, "esx1/web 01/latest/web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	failed := 0
	for off := 0; off < len(image); off += 64 << 10 {
		p := make([]byte, 64<<10)
		n, err := f.ReadAt(p, int64(off))
		if !bytes.Equal(p[:n], image[off:off+n]) {
			t.Fatalf("wrong bytes at %d", off)
		}
		if err != nil {
			if !errors.Is(err, unix.EIO) {
				t.Errorf("at %d: %v", off, err)
			}
			failed++
		}
	}
	if failed < 5 {
		t.Errorf("%d blocks failed", failed)
	}
	if s := log.String(); !strings.Contains(s, "pack=") && !strings.Contains(s, "pack ") || !strings.Contains(s, "offset") {
		t.Errorf("the log does not name pack and offset: %s", s)
	}
}
