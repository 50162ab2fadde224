package fs

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// fsType is what /proc/self/mounts calls a mount of this package.
const fsType = "fuse.hikae"

// mountInfo is a line of /proc/self/mountinfo, described in proc(5).
type mountInfo struct {
	dir    string
	device string // major:minor
	kind   string // file system type
	source string
}

func mounts() ([]mountInfo, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []mountInfo
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		a, b := strings.Fields(before), strings.Fields(after)
		if ok && len(a) >= 5 && len(b) >= 2 {
			all = append(all, mountInfo{unescapeMount(a[4]), a[2], b[0], unescapeMount(b[1])})
		}
	}
	return all, nil
}

// unescapeMount undoes the octal escapes of blanks and the like.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountAt returns the topmost mount at dir, which is absolute and clean.
func mountAt(dir string) (mountInfo, bool, error) {
	all, err := mounts()
	if err != nil {
		return mountInfo{}, false, fmt.Errorf("find out what is mounted: %w", err)
	}
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].dir == dir {
			return all[i], true, nil
		}
	}
	return mountInfo{}, false, nil
}

// realPath resolves links in all but the last component, which may be a mount
// that no longer answers, and then in that one if it does.
func realPath(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	path := filepath.Join(parent, filepath.Base(abs))
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real, nil
	}
	return path, nil
}

// checkMountpoint returns the real path of a directory something can be mounted
// on, or says in one sentence why nothing can.
func checkMountpoint(dir, repository string, o *Options) (string, error) {
	path, err := realPath(dir)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %s does not exist; create it with: mkdir -p %s", ErrMountpoint, dir, dir)
	} else if err != nil {
		return "", fmt.Errorf("%w: %w", ErrMountpoint, err)
	}
	m, mounted, err := mountAt(path)
	if err != nil {
		return "", err
	}
	if mounted && m.kind == fsType && dead(path) {
		// Left behind by a server of ours that was killed. Nothing is lost by
		// taking it away, and a service that starts again must not need help.
		if err := detach(path); err != nil {
			return "", fmt.Errorf("%w: %s is a mount whose server has died and it cannot be removed (%w)", ErrMountpoint, dir, err)
		}
		o.Logger.Warn("removed a mount whose server had died", "mountpoint", path)
		m, mounted, err = mountAt(path)
		if err != nil {
			return "", err
		}
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("%w: %s does not exist; create it with: mkdir -p %s", ErrMountpoint, dir, dir)
	case err != nil:
		return "", fmt.Errorf("%w: %w", ErrMountpoint, err)
	case !fi.IsDir():
		return "", fmt.Errorf("%w: %s is not a directory", ErrMountpoint, dir)
	case mounted && m.kind == fsType:
		return "", fmt.Errorf("%w: %s shows %s already; unmount that first with: hikae umount %s", ErrMountpoint, dir, m.source, dir)
	case mounted:
		return "", fmt.Errorf("%w: %s is the mountpoint of a file system (%s) already; choose an empty directory", ErrMountpoint, dir, m.kind)
	}
	if repository != "" {
		real, err := filepath.EvalSymlinks(repository)
		if err != nil {
			return "", fmt.Errorf("find the repository's directory: %w", err)
		}
		if within(path, real) {
			return "", fmt.Errorf("%w: %s is inside the repository %s; choose a directory outside of it", ErrMountpoint, dir, repository)
		}
		if within(real, path) {
			return "", fmt.Errorf("%w: %s contains the repository %s, which the mount would hide; choose another directory", ErrMountpoint, dir, repository)
		}
	}
	if o.NonEmpty {
		return path, nil
	}
	d, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrMountpoint, err)
	}
	defer d.Close()
	if names, _ := d.Readdirnames(1); len(names) > 0 {
		return "", fmt.Errorf("%w: %s is not empty (it holds %q) and the mount would hide that; choose an empty directory", ErrMountpoint, dir, names[0])
	}
	return path, nil
}

// dead says whether the server of a mount has died. Attributes may be in the
// kernel's cache, so it asks for something that never is.
func dead(path string) bool {
	var st unix.Statfs_t
	return errors.Is(unix.Statfs(path, &st), unix.ENOTCONN)
}

// within says whether path is dir or lies in it; both are real paths.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// Unmount removes the mount of a repository at dir, whichever process serves
// it. A mount in use is ErrBusy, unless lazy: then it vanishes from the tree at
// once and ends when nobody uses it any more.
func Unmount(dir string, lazy bool) error {
	path, err := realPath(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMountpoint, err)
	}
	m, mounted, err := mountAt(path)
	switch {
	case err != nil:
		return err
	case !mounted:
		return fmt.Errorf("%w: nothing is mounted on %s", ErrMountpoint, dir)
	case m.kind != fsType:
		return fmt.Errorf("%w: what is mounted on %s is not a hikae repository but %s (%s)", ErrMountpoint, dir, m.source, m.kind)
	}
	if lazy {
		return detach(path)
	}
	return unmount(path)
}

func unmount(path string) error {
	var err error
	if os.Geteuid() == 0 {
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	} else {
		err = fusermount("-u", path)
	}
	if errors.Is(err, syscall.EBUSY) {
		return fmt.Errorf("%w: %s is in use; end what uses it (fuser -vm %s lists it) or unmount it with --lazy", ErrBusy, path, path)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

func detach(path string) error {
	var err error
	if os.Geteuid() == 0 {
		err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	} else {
		err = fusermount("-u", "-z", path)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}
