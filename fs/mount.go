package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

var (
	// ErrMountpoint says that a directory cannot be mounted on, or that there
	// is nothing to unmount.
	ErrMountpoint = errors.New("mountpoint")
	// ErrBusy says that a mount is in use.
	ErrBusy = errors.New("mount in use")
)

// Options say how a repository is shown. The zero value shows all of it to the
// calling user only.
type Options struct {
	// AllowOther lets other users read, root included. Users other than root
	// can give it only when /etc/fuse.conf says so.
	AllowOther bool
	// UID and GID own everything shown; nil is the calling user and group.
	UID, GID *uint32
	// Umask takes permission bits away: files have 0444, folders 0555.
	Umask uint32
	// Filter hides hosts, VMs and generations.
	Filter Filter
	// NonEmpty allows a mountpoint that holds files, which the mount hides.
	NonEmpty bool
	// CacheBytes is the size of the repository's block cache. Half of it is
	// what all sequential readers together fetch ahead. 0 is 32 MiB.
	CacheBytes int64
	// Refresh is how long the names of hosts, VMs and generations are believed
	// before the repository is asked again. 0 is one second.
	Refresh time.Duration
	// Timeout is how long a reader waits for storage that does not answer
	// before it gets an input/output error. 0 is one minute.
	Timeout time.Duration
	// Renew is how long the mount stays registered with the repository as one
	// reader before it registers anew, which lets go of what was forgotten
	// before. 0 is ten minutes.
	Renew time.Duration
	// Logger gets what goes wrong; nil is slog.Default().
	Logger *slog.Logger
	// Debug logs every request of the kernel.
	Debug bool
	// Clock tells the time; nil is time.Now.
	Clock func() time.Time
}

// Filter hides what it does not name. The zero value hides nothing.
type Filter struct {
	Hosts []string  // names of hosts
	VMs   []string  // names of VMs, or HOST/VM
	Since time.Time // generations made earlier are hidden
}

func (f *Filter) vm(id vmID) bool {
	return (len(f.Hosts) == 0 || slices.Contains(f.Hosts, id.host)) &&
		(len(f.VMs) == 0 || slices.Contains(f.VMs, id.name) || slices.Contains(f.VMs, id.String()))
}

func (f *Filter) generation(r ref) bool { return !r.time.Before(f.Since) }

func (o *Options) setDefaults() error {
	if o.CacheBytes <= 0 {
		o.CacheBytes = 32 << 20
	}
	if o.Refresh <= 0 {
		o.Refresh = time.Second
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Renew <= 0 {
		o.Renew = defaultRenew
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Clock == nil {
		o.Clock = time.Now //nolint:forbidigo // the default, here and nowhere else
	}
	if o.UID == nil {
		uid := uint32(os.Geteuid())
		o.UID = &uid
	}
	if o.GID == nil {
		gid := uint32(os.Getegid())
		o.GID = &gid
	}
	if o.Umask > 0o777 {
		return fmt.Errorf("a umask of %#o is out of range: 0777 is the largest", o.Umask)
	}
	return nil
}

// Server serves one mount.
type Server struct {
	dir    string
	done   chan struct{}
	finish sync.Once // closes done

	mu   sync.Mutex
	gone bool // from its directory
}

// mount shows a source on dir. The directory is ready to use when it returns.
// The context's values go with every read; its end has no effect on the mount.
func mount(ctx context.Context, src source, repository, dir string, o Options) (*Server, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	path, err := checkMountpoint(dir, repository, &o)
	if err != nil {
		return nil, err
	}
	fd, err := attach(path, repository, &o)
	if err != nil {
		return nil, err
	}
	line, err := newSideLine(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, errors.Join(err, detach(path))
	}
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	t := newTree(base, src, &o, line.tell)
	srv, err := fuse.NewServer(t, fmt.Sprintf("/dev/fd/%d", fd), fuseOptions(&o))
	if err != nil {
		cancel()
		line.close()
		return nil, errors.Join(fmt.Errorf("serve %s: %w", path, err), detach(path))
	}
	pins := newPins(src, t.cat, &o)
	go pins.keep(base)
	s := &Server{dir: path, done: make(chan struct{})}
	go func() {
		srv.Serve()
		cancel() // what still waits for storage waits for nobody
		line.close()
		pins.ended(defaultGrace)
		s.finish.Do(func() { close(s.done) })
	}()
	if err := forgoPoll(path); err != nil {
		o.Logger.Debug("polling stays on", "error", err)
	}
	if os.Geteuid() == 0 {
		if err := readAhead(path); err != nil {
			o.Logger.Debug("the kernel's reading ahead stays at its default", "error", err)
		}
	}
	pins.begun(o.Timeout)
	return s, nil
}

// newTree makes the tree; the options have their defaults.
func newTree(base context.Context, src source, o *Options, tell func(uint64, syscall.Errno)) *tree {
	log, asking := o.Logger, newShared(base)
	t := &tree{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		src:           src,
		cat:           newCatalog(asking, src, o.Filter, o.Refresh, o.Clock, log),
		shelf:         newShelf(asking, src, log),
		complaints:    complaints{log: log, now: o.Clock},
		pace:          pace{budget: o.CacheBytes / 2, now: o.Clock},
		owner:         fuse.Owner{Uid: *o.UID, Gid: *o.GID},
		umask:         o.Umask,
		ttl:           o.Refresh,
		since:         o.Clock().Truncate(time.Second),
	}
	t.patience = newPatience(context.WithoutCancel(base), o.Timeout, defaultGrace, func(unique uint64, told error) {
		t.complaints.about(told, "") // now: the storage may never answer
		tell(unique, toErrno(told))
	})
	return t
}

// fuseOptions are go-fuse's, with the reason for each.
func fuseOptions(o *Options) *fuse.MountOptions {
	return &fuse.MountOptions{
		Name: "hikae",
		// 1 MiB requests, the most a kernel makes. Also the size of reads, and
		// has to agree with max_read.
		MaxWrite: maxRead,
		// How many requests the kernel makes on its own account at a time:
		// reading ahead for several readers. Each holds up to 1 MiB.
		MaxBackground: 32,
		// Splicing helps when the bytes are in a file. Ours are in memory, and
		// go-fuse would try and log a failure for nearly every large read.
		DisableSplice: true,
		// Contents never change: the kernel need not look whether they did.
		ExplicitDataCacheControl: true,
		// A link is another inode when it points elsewhere.
		EnableSymlinkCaching: true,
		ExtraCapabilities: 0 |
			// NFS servers find files by inode number after a restart.
			fuse.CAP_EXPORT_SUPPORT |
			// A large direct read becomes several requests at once.
			fuse.CAP_ASYNC_DIO,
		PanicHandler: func(r any) fuse.Status {
			o.Logger.Error("a request failed by a defect of the program", "panic", r)
			return fuse.EIO
		},
		Debug:  o.Debug,
		Logger: fuseLog(o),
	}
}

// fuseLog passes on what go-fuse says of itself. It names requests it does not
// know, which is no concern of an operator.
func fuseLog(o *Options) *log.Logger {
	level := slog.LevelDebug
	if o.Debug {
		level = slog.LevelInfo
	}
	l := slog.NewLogLogger(o.Logger.Handler(), level)
	if !o.Debug {
		l.SetOutput(trouble{l.Writer(), o.Logger})
	}
	return l
}

// trouble raises lines that tell of a broken connection to warnings.
type trouble struct {
	io.Writer
	log *slog.Logger
}

func (t trouble) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "Failed to read from fuse") {
		t.log.Warn(strings.TrimSpace(string(p)))
		return len(p), nil
	}
	return t.Writer.Write(p)
}

// Wait returns when the mount has ended: unmounted by whomever, and no longer
// in use.
func (s *Server) Wait() { <-s.done }

// Done is closed when the mount has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Dir is where the repository is mounted, links resolved.
func (s *Server) Dir() string { return s.dir }

// Unmount ends the mount and waits for its end. A mount in use is ErrBusy and
// goes on. It is no error when the mount has ended already or was detached.
func (s *Server) Unmount() error {
	left, err := s.leave(unmount)
	if err != nil || !left {
		return err
	}
	select {
	case <-s.done:
	case <-time.After(2 * defaultGrace):
		// Nobody uses the mount any more. What storage keeps from ending is an
		// answer to somebody who has long been told that there is none.
		s.finish.Do(func() { close(s.done) })
	}
	return nil
}

// Detach takes the mount out of the directory tree at once. It goes on for
// those who have files open in it, until the last one closes or the process
// ends; Wait tells.
func (s *Server) Detach() error {
	_, err := s.leave(detach)
	return err
}

// leave takes the mount away from its directory; left is false when somebody
// else has done so.
func (s *Server) leave(how func(string) error) (left bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone || s.ended() {
		return false, nil
	}
	err = how(s.dir)
	if err != nil && !errors.Is(err, unix.EINVAL) && !s.ended() { // EINVAL: nothing is mounted there
		return false, err
	}
	s.gone = true
	return err == nil, nil
}

func (s *Server) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}
