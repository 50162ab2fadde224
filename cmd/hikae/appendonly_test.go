package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	hikaefs "hikae/fs"
)

// On storage that takes files and gives none back, everything works that backs up and
// reads, and everything that would remove something says so in one sentence.
func TestAppendOnlyStorage(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root, to take files out of a user's hands")
	}
	t.Run("another owner", func(t *testing.T) {
		if _, err := exec.LookPath("python3"); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal("python3 is not installed")
			}
			t.Skip("needs python3")
		}
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Fatal(err)
		}
		group, err := user.LookupGroupId(nobody.Gid)
		if err != nil {
			t.Fatal(err)
		}
		seal := func(t *testing.T, dir string) {
			out, err := exec.Command("python3", "../../contrib/hikae-seal.py", dir, group.Name).CombinedOutput()
			if err != nil {
				t.Fatalf("hikae-seal.py: %v\n%s", err, out)
			}
		}
		appendOnlyStory(t, number(t, nobody.Uid), number(t, nobody.Gid), seal, func(*testing.T, string) {})
	})
	t.Run("chattr", func(t *testing.T) {
		set := func(on bool) func(*testing.T, string) {
			return func(t *testing.T, dir string) {
				if err := setAppendOnly(dir, on); err != nil {
					t.Fatal(err)
				}
			}
		}
		try := t.TempDir()
		if err := errors.Join(setAppendOnly(try, true), setAppendOnly(try, false)); err != nil {
			t.Skipf("the file system of %s has no append-only attribute: %v", try, err)
		}
		appendOnlyStory(t, 0, 0, set(true), set(false))
	})
}

func number(t *testing.T, s string) uint32 {
	t.Helper()
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}

// setAppendOnly is chattr -R +a, for directories: files in them may be made and linked,
// and neither removed nor renamed.
func setAppendOnly(dir string, on bool) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		if flags &^= unix.STATX_ATTR_APPEND; on { // the same bit as FS_APPEND_FL
			flags |= unix.STATX_ATTR_APPEND
		}
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags))
	})
}

// appendOnlyStory is what the user who backs up can do and what not. seal makes the
// repository append-only for that user, unseal ends that for who owns it.
func appendOnlyStory(t *testing.T, uid, gid uint32, seal, unseal func(*testing.T, string)) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"", "bin", "repository", "state", "mnt"} {
		must(os.MkdirAll(path(name), 0o755))
		must(os.Chown(path(name), int(uid), int(gid)))
	}
	for up := dir; up != os.TempDir() && up != "/"; up = filepath.Dir(up) {
		must(os.Chmod(up, 0o755))
	}
	self, err := os.Executable()
	must(err)
	copyFile(t, self, path("bin/hikae"), 0o755)
	must(os.WriteFile(path("passphrase"), []byte("correct horse\n"), 0o400))
	must(os.Chown(path("passphrase"), int(uid), int(gid)))
	image := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(image)
	must(os.WriteFile(path("image.raw"), image, 0o644))

	run := func(uid, gid uint32, args ...string) (string, error) {
		cmd := exec.Command(path("bin/hikae"), append([]string{"--repo", path("repository"), "--passphrase-file", path("passphrase"), "--state", path("state")}, args...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		cmd.Env = append(os.Environ(), "HOME="+dir)
		cmd.Dir = dir
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		return out.String(), err
	}
	does := func(args ...string) string {
		t.Helper()
		out, err := run(uid, gid, args...)
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		if strings.Contains(out, "WARN") || strings.Contains(out, "warning") {
			t.Errorf("%v is worried: %s", args, out)
		}
		return out
	}
	does("init")
	t.Cleanup(func() { unseal(t, path("repository")) }) // or nothing can be removed
	for i := range 3 {
		seal(t, path("repository"))
		_, _ = rand.NewChaCha8([32]byte{byte(2 + i)}).Read(image[i<<20:][:500_000])
		must(os.WriteFile(path("image.raw"), image, 0o644))
		does("import", "old/vm", "--disk", path("image.raw"), "--time", fmt.Sprintf("2026-01-0%dT00:00:00Z", i+1))
	}
	seal(t, path("repository"))
	before := tree(t, path("repository"))
	does("check", "--read-data")
	does("copy", "old/vm@latest", path("copy"))
	found, err := filepath.Glob(path("copy/*-flat.vmdk"))
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	if got, err := os.ReadFile(found[0]); err != nil || !bytes.Equal(got, image) {
		t.Errorf("the copy differs: %v", err)
	}
	if haveFUSE(t) {
		does("mount", path("mnt"))
		t.Cleanup(func() { _ = hikaefs.Unmount(path("mnt"), true) })
		out, err := run(uid, gid, "umount", path("mnt"))
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	slots := does("key", "list", "--json")
	_, id, _ := strings.Cut(slots, `"id":"`)
	must(os.WriteFile(path("second"), []byte("another horse\n"), 0o400))
	must(os.Chown(path("second"), int(uid), int(gid)))
	does("key", "add", "--new-passphrase-file", path("second"))
	seal(t, path("repository"))
	refused := func(args ...string) {
		t.Helper()
		out, err := run(uid, gid, args...)
		if err == nil || strings.Count(out, "nothing can be removed from the repository by this user") != 1 || strings.Count(out, "\n") != 1 {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	refused("forget", "old/vm@1")
	refused("key", "remove", id[:16])
	// Nobody overwrites or removes what is finished, with or without this program.
	for name, sum := range before {
		if got := tree(t, path("repository"))[name]; got != sum {
			t.Errorf("%s is not what it was", name)
		}
	}

	// The owner does all of it, and tidies up.
	owner := func(args ...string) {
		t.Helper()
		unseal(t, path("repository"))
		if out, err := run(0, 0, args...); err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
		seal(t, path("repository"))
	}
	owner("forget", "old/vm@1")
	if _, err := run(uid, gid, "prune"); err == nil { // a file of its own it may remove, so it begins
		refused("prune", "--grace", "0s")
	}
	refused("prune", "--grace", "0s")
	owner("prune", "--grace", "0s")
	owner("prune", "--grace", "0s")
	owner("check", "--read-data")
	for _, sub := range []string{"sessions", "tmp", "condemned"} {
		list, err := os.ReadDir(path("repository/" + sub))
		must(err)
		for _, e := range list {
			switch e.Name() {
			case "lock", "init", "upkeep":
			default:
				t.Errorf("%s/%s was left behind", sub, e.Name())
			}
		}
	}
	does("import", "old/vm", "--disk", path("image.raw"), "--time", "2026-01-05T00:00:00Z")
	does("check", "--read-data")
}

// tree is what is finished in a repository: names and sums.
func tree(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	all := map[string][32]byte{}
	for _, sub := range []string{"config", "keys", "packs", "meta", "index", "generations"} {
		err := filepath.WalkDir(filepath.Join(dir, sub), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			all[path] = sha256.Sum256(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func copyFile(t *testing.T, from, to string, mode fs.FileMode) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
