package fs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// attach mounts on path and returns the descriptor the kernel's requests come
// through.
//
// go-fuse could do this itself. It is done here because what goes wrong has to
// be said in a sentence, which fusermount3 prints and go-fuse lets pass by, and
// because a mount made directly and one made by fusermount3 shall be alike.
func attach(path, source string, o *Options) (fd int, err error) {
	if os.Geteuid() == 0 {
		return attachDirectly(path, source, o)
	}
	return attachByHelper(path, source, o)
}

// options that both ways give to the kernel, with the reason for each.
func kernelOptions(o *Options) []string {
	opts := []string{
		// The kernel checks the permissions shown. Without this a mount that
		// others may use would let them read whatever its modes say.
		"default_permissions",
		// The largest read the kernel may ask for: fewer, larger requests.
		"max_read=" + strconv.Itoa(maxRead),
	}
	if o.AllowOther {
		opts = append(opts, "allow_other")
	}
	return opts
}

func attachDirectly(path, source string, o *Options) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, noFuse(err)
	}
	data := append([]string{
		"fd=" + strconv.Itoa(fd),
		"rootmode=40000",
		"user_id=0", // whose processes may use the mount, unless all may
		"group_id=0",
	}, kernelOptions(o)...)
	// Nothing in a backup may become a device or a set-uid program here.
	flags := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOATIME)
	if err := unix.Mount(source, path, fsType, flags, strings.Join(data, ",")); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.ENODEV) {
			return -1, noFuse(err)
		}
		if errors.Is(err, unix.EPERM) {
			return -1, fmt.Errorf("mount on %s: %w; in a container this needs CAP_SYS_ADMIN", path, err)
		}
		return -1, fmt.Errorf("mount on %s: %w", path, err)
	}
	return fd, nil
}

func noFuse(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("this system has no FUSE (%w); load it with: modprobe fuse", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("this process may not use FUSE (%w); see the permissions of /dev/fuse", err)
	}
	return fmt.Errorf("open /dev/fuse: %w", err)
}

// helper finds the set-uid program that mounts for users other than root.
func helper() (string, error) {
	for _, name := range []string{"fusermount3", "fusermount"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
		for _, dir := range []string{"/usr/bin", "/bin"} {
			if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
				return path, nil
			}
		}
	}
	return "", errors.New("mounting as a user other than root needs fusermount3, which is not installed; install it with: apt install fuse3 (or dnf install fuse3)")
}

// attachByHelper lets fusermount3 mount. It sends the descriptor back over a
// socket whose number it finds in its environment.
func attachByHelper(path, source string, o *Options) (int, error) {
	bin, err := helper()
	if err != nil {
		return -1, err
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return -1, noFuse(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket for %s: %w", bin, err)
	}
	defer func() { _ = unix.Close(pair[0]) }()
	theirs := os.NewFile(uintptr(pair[1]), "fusermount")
	defer theirs.Close()
	// A comma in the source's name would begin a new option.
	name := strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(source)
	opts := append([]string{"ro", "nosuid", "nodev", "noatime", "subtype=hikae", "fsname=" + name}, kernelOptions(o)...)
	cmd := exec.Command(bin, "-o", strings.Join(opts, ","), "--", path)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3", "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{theirs} // becomes descriptor 3
	if err := runHelper(cmd); err != nil {
		if o.AllowOther && strings.Contains(err.Error(), "user_allow_other") {
			return -1, fmt.Errorf("--allow-other as a user other than root must be permitted by the line user_allow_other in /etc/fuse.conf")
		}
		return -1, fmt.Errorf("mount on %s: %w", path, err)
	}
	theirs.Close()
	buf, oob := make([]byte, 4), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("descriptor from %s: %w", bin, err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("%s sent no descriptor (%w)", bin, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("%s sent no descriptor (%w)", bin, err)
	}
	return fds[0], nil
}

// fusermount runs the helper to unmount.
func fusermount(args ...string) error {
	bin, err := helper()
	if err != nil {
		return err
	}
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return runHelper(cmd)
}

// runHelper turns what the helper prints into an error.
func runHelper(cmd *exec.Cmd) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil {
		return nil
	}
	text := strings.Join(strings.Fields(stderr.String()), " ")
	if strings.HasSuffix(text, "Device or resource busy") {
		return fmt.Errorf("%s: %w", text, syscall.EBUSY)
	}
	if text == "" {
		return fmt.Errorf("%s: %w", filepath.Base(cmd.Path), err)
	}
	return errors.New(text)
}

// readAhead makes the kernel read further ahead on the mount: 1 MiB requests
// instead of 128 KiB ones. Only root can, and not in every container; the
// mount's own prefetching works either way.
func readAhead(path string) error {
	m, ok, err := mountAt(path)
	if err != nil || !ok {
		return err
	}
	return os.WriteFile("/sys/class/bdi/"+m.device+"/read_ahead_kb", []byte(strconv.Itoa(maxRead>>10)), 0)
}

// forgoPoll makes the kernel learn, by trying, that files of the mount cannot
// be polled. The Go runtime polls every file it opens: the first to open one
// would otherwise send a request that can block the very process that is to
// answer it, should that be the one that serves the mount. The name is one that
// go-fuse knows and answers for.
func forgoPoll(path string) error {
	fd, err := unix.Open(filepath.Join(path, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err
}

// sideLine answers the kernel's requests past go-fuse.
type sideLine struct {
	mu sync.Mutex
	fd int // a second descriptor of the same connection; -1 when closed
}

func newSideLine(fd int) (*sideLine, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("second descriptor for /dev/fuse: %w", err)
	}
	return &sideLine{fd: dup}, nil
}

// tell sends struct fuse_out_header of linux/fuse.h: length, negative errno, the
// request. That the request is answered already is fine.
func (l *sideLine) tell(unique uint64, errno syscall.Errno) {
	var b [16]byte
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], uint32(-int32(errno)))
	binary.NativeEndian.PutUint64(b[8:], unique)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		_, _ = unix.Write(l.fd, b[:])
	}
}

func (l *sideLine) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = unix.Close(l.fd)
	l.fd = -1
}
