// Package ceiling serves one file out of memory over FUSE: the least work that a
// FUSE server can do, and so the speed that no mount passes on this machine.
// Benchmarks measure it beside the mount, in the same run.
package ceiling

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Name is the one file's.
const Name = "memory"

// request is the largest read the kernel may ask for, in bytes.
const request = 1 << 20

// Options say how the file is served.
type Options struct {
	// Size of the file in bytes.
	Size int64
	// Direct serves past the page cache: the fastest way to read once, but
	// nothing is there when it is read again.
	Direct bool
}

// Server serves one mount.
type Server struct {
	srv  *fuse.Server
	done chan struct{}
}

// Mount serves the file in dir, an empty directory, with the options that are
// best for large reads: 1 MiB requests, and the kernel reading as far ahead
// where that can be set (as root).
func Mount(dir string, o Options) (*Server, error) {
	f := &file{RawFileSystem: fuse.NewDefaultRawFileSystem(), size: uint64(o.Size), data: make([]byte, request)}
	if o.Direct {
		f.flags = fuse.FOPEN_DIRECT_IO
	}
	srv, err := fuse.NewServer(f, dir, &fuse.MountOptions{
		Name: "ceiling", FsName: "memory", MaxWrite: request, MaxBackground: 32, DisableSplice: true,
		ExplicitDataCacheControl: true, ExtraCapabilities: fuse.CAP_ASYNC_DIO, DirectMount: os.Geteuid() == 0,
	})
	if err != nil {
		return nil, fmt.Errorf("mount a file of memory on %s: %w", dir, err)
	}
	s := &Server{srv, make(chan struct{})}
	go func() {
		srv.Serve()
		close(s.done)
	}()
	if err := srv.WaitMount(); err != nil {
		return nil, fmt.Errorf("mount a file of memory on %s: %w", dir, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err == nil && os.Geteuid() == 0 {
		bdi := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
		_ = os.WriteFile(bdi, []byte(strconv.Itoa(request>>10)), 0) // not in every container
	}
	return s, nil
}

// Unmount ends the mount. One in use goes on, and that is an error.
func (s *Server) Unmount() error {
	if err := s.srv.Unmount(); err != nil {
		return fmt.Errorf("unmount a file of memory: %w", err)
	}
	<-s.done
	return nil
}

// file answers the kernel's requests.
type file struct {
	fuse.RawFileSystem
	size  uint64
	data  []byte
	flags uint32
}

const forever = 365 * 24 * time.Hour

func (f *file) attr(ino uint64) fuse.Attr {
	if ino == fuse.FUSE_ROOT_ID {
		return fuse.Attr{Ino: ino, Mode: syscall.S_IFDIR | 0o555, Nlink: 1}
	}
	return fuse.Attr{Ino: ino, Mode: syscall.S_IFREG | 0o444, Nlink: 1, Size: f.size, Blocks: f.size / 512, Blksize: 128 << 10}
}

func (f *file) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != Name {
		return fuse.ENOENT
	}
	out.NodeId = fuse.FUSE_ROOT_ID + 1
	out.Attr = f.attr(out.NodeId)
	out.SetAttrTimeout(forever)
	out.SetEntryTimeout(forever)
	return fuse.OK
}

func (f *file) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.Attr = f.attr(in.NodeId)
	out.SetTimeout(forever)
	return fuse.OK
}

func (f *file) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH | f.flags
	return fuse.OK
}

func (f *file) Read(_ <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	if in.Offset >= f.size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	return fuse.ReadResultData(f.data[:min(uint64(in.Size), uint64(len(f.data)), f.size-in.Offset)]), fuse.OK
}
