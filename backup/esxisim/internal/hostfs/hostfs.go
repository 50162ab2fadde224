// Package hostfs is the tree of files that a shell of the simulated host sees:
// a small root of its own, in memory on a real host and in a private directory
// here, and the datastore at /vmfs/volumes/<uuid>, with the symbolic link that
// names it.
//
// Errors are those of system calls, so that tools can say them as they do.
package hostfs

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"hikae/backup/esxisim/internal/hv"
)

const volumes = "/vmfs/volumes"

// FS is the tree. It is safe for concurrent use.
type FS struct {
	hv   *hv.Host
	root *os.Root
	dir  string
}

// File is an open file.
type File interface {
	io.Reader
	io.ReaderAt
	io.Writer
	io.WriterAt
	io.Closer
	Stat() (fs.FileInfo, error)
	Truncate(size int64) error
}

// New makes the tree. What is not on the datastore lives in dir, which is
// emptied: a host that starts has forgotten it. files are put there by their
// paths, executable when the content is empty.
func New(h *hv.Host, dir string, files map[string]string) (*FS, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	f := &FS{hv: h, root: root, dir: dir}
	for _, d := range []string{"bin", "sbin", "dev", "etc", "tmp", "var/log", "var/run", "vmfs/volumes", "vmfs/devices/disks"} {
		if err := root.MkdirAll(d, 0o755); err != nil {
			return nil, errors.Join(err, root.Close())
		}
	}
	for name, text := range files {
		mode := fs.FileMode(0o644)
		if text == "" {
			mode = 0o755
		}
		name = strings.TrimPrefix(name, "/")
		err := root.MkdirAll(path.Dir(name), 0o755)
		if err == nil {
			err = root.WriteFile(name, []byte(text), mode)
		}
		if err != nil {
			return nil, errors.Join(err, root.Close())
		}
	}
	return f, nil
}

// Close lets go of the tree and deletes what is not on the datastore.
func (f *FS) Close() error { return errors.Join(f.root.Close(), os.RemoveAll(f.dir)) }

// place is where a path leads.
type place struct {
	ds   bool
	rel  string // relative to the datastore, or to the root
	link bool   // the datastore's name itself
}

// place resolves an absolute path.
func (f *FS) place(name string) (place, error) {
	name = path.Clean(name)
	rest, ok := strings.CutPrefix(name, volumes+"/")
	if !ok {
		rel := strings.TrimPrefix(name, "/")
		if rel == "" {
			rel = "."
		}
		return place{rel: rel}, nil
	}
	vol, rel, deeper := strings.Cut(rest, "/")
	switch vol {
	case f.hv.Datastore():
		if !deeper {
			return place{ds: true, rel: ".", link: true}, nil
		}
	case f.hv.UUID():
	default:
		return place{rel: strings.TrimPrefix(name, "/")}, nil
	}
	rel, err := f.hv.Clean(rel)
	if err != nil {
		return place{}, syscall.ENOENT
	}
	return place{ds: true, rel: rel}, nil
}

// DatastorePath is a path's name relative to the datastore, if it is there.
func (f *FS) DatastorePath(name string) (rel string, ok bool) {
	p, err := f.place(name)
	return p.rel, err == nil && p.ds
}

// Errno turns the hypervisor's errors into those of system calls.
func Errno(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hv.ErrNotFound), errors.Is(err, hv.ErrGone):
		return syscall.ENOENT
	case errors.Is(err, hv.ErrExists):
		return syscall.EEXIST
	case errors.Is(err, hv.ErrNoSpace):
		return syscall.ENOSPC
	case errors.Is(err, hv.ErrLocked):
		return syscall.EBUSY
	case errors.Is(err, hv.ErrNotEmpty):
		return syscall.ENOTEMPTY
	case errors.Is(err, hv.ErrInvalid), errors.Is(err, hv.ErrPath):
		return syscall.EINVAL
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}

// Info is what is known of a file.
type Info struct {
	Name    string
	Size    int64
	Used    int64 // bytes that it takes on its volume
	Mode    fs.FileMode
	ModTime time.Time
	Link    string // where a symbolic link leads
}

// IsDir tells whether it is a directory.
func (i Info) IsDir() bool { return i.Mode.IsDir() }

func (f *FS) info(p place, name string, fi fs.FileInfo) Info {
	i := Info{Name: name, Size: fi.Size(), Mode: fi.Mode(), ModTime: fi.ModTime()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		i.Used = st.Blocks * 512
	}
	if p.ds {
		i.Used = f.hv.Used(p.rel, fi)
		i.Mode = i.Mode.Type() | 0o600
		if fi.IsDir() {
			i.Mode = fs.ModeDir | 0o755
		}
		if strings.HasSuffix(p.rel, ".vmx") {
			i.Mode |= 0o755
		}
	}
	return i
}

// Stat describes what a path leads to, symbolic links followed.
func (f *FS) Stat(name string) (Info, error) {
	if d, ok := device(name); ok {
		return Info{Name: path.Base(name), Mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, ModTime: d}, nil
	}
	p, err := f.place(name)
	if err != nil {
		return Info{}, err
	}
	var fi fs.FileInfo
	if p.ds {
		fi, err = f.hv.Stat(p.rel)
	} else {
		fi, err = f.root.Stat(p.rel)
	}
	if err != nil {
		return Info{}, Errno(err)
	}
	return f.info(p, path.Base(name), fi), nil
}

// Lstat is Stat for the symbolic link itself.
func (f *FS) Lstat(name string) (Info, error) {
	p, err := f.place(name)
	if err != nil {
		return Info{}, err
	}
	i, err := f.Stat(name)
	if err == nil && p.link {
		i.Mode, i.Link, i.Size = fs.ModeSymlink|0o777, f.hv.UUID(), int64(len(f.hv.UUID()))
	}
	return i, err
}

// RealPath is a path without symbolic links.
func (f *FS) RealPath(name string) (string, error) {
	if _, err := f.Stat(name); err != nil {
		return "", err
	}
	p, err := f.place(name)
	if err != nil || !p.ds {
		return path.Clean(name), err
	}
	return path.Join(volumes, f.hv.UUID(), p.rel), nil
}

// List is a directory's content by name.
func (f *FS) List(name string) ([]Info, error) {
	p, err := f.place(name)
	if err != nil {
		return nil, err
	}
	var list []fs.FileInfo
	if p.ds {
		if list, err = f.hv.List(p.rel); err != nil {
			return nil, Errno(err)
		}
	} else {
		d, err := f.root.Open(p.rel)
		if err != nil {
			return nil, Errno(err)
		}
		list, err = d.Readdir(-1)
		if err = errors.Join(err, d.Close()); err != nil {
			return nil, Errno(err)
		}
	}
	var out []Info
	for _, fi := range list {
		out = append(out, f.info(place{ds: p.ds, rel: path.Join(p.rel, fi.Name())}, fi.Name(), fi))
	}
	if path.Clean(name) == volumes {
		for _, n := range []string{f.hv.UUID(), f.hv.Datastore()} {
			i, err := f.Lstat(path.Join(volumes, n))
			if err != nil {
				return nil, err
			}
			i.Name = n
			out = append(out, i)
		}
	}
	slices.SortFunc(out, func(a, b Info) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Open opens a file with flags of os.OpenFile.
func (f *FS) Open(name string, flag int) (File, error) {
	if _, ok := device(name); ok {
		return deviceFile(path.Base(name)), nil
	}
	p, err := f.place(name)
	if err != nil {
		return nil, err
	}
	if i, err := f.Stat(name); err == nil && i.IsDir() {
		return nil, syscall.EISDIR
	}
	if p.ds {
		file, err := f.hv.OpenFile(p.rel, flag)
		if err != nil {
			return nil, Errno(err)
		}
		return dsFile{file}, nil
	}
	if flag&os.O_CREATE != 0 && strings.HasPrefix(path.Clean(name), volumes+"/") {
		return nil, syscall.ENOENT
	}
	file, err := f.root.OpenFile(p.rel, flag, 0o644)
	if err != nil {
		return nil, Errno(err)
	}
	return file, nil
}

// dsFile says the errors of a datastore's file as system calls do.
type dsFile struct{ *hv.File }

func (f dsFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	return n, Errno(err)
}

func (f dsFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	return n, Errno(err)
}

func (f dsFile) Truncate(size int64) error { return Errno(f.File.Truncate(size)) }

// Mkdir makes a directory.
func (f *FS) Mkdir(name string) error {
	p, err := f.place(name)
	switch {
	case err != nil:
		return err
	case p.ds:
		return Errno(f.hv.Mkdir(p.rel, false))
	case strings.HasPrefix(path.Clean(name), volumes+"/"):
		return syscall.EPERM // only volumes are there
	}
	return Errno(f.root.Mkdir(p.rel, 0o755))
}

// Remove removes a file or an empty directory.
func (f *FS) Remove(name string) error {
	p, err := f.place(name)
	switch {
	case err != nil:
		return err
	case p.rel == ".":
		return syscall.EBUSY
	case p.ds:
		return Errno(f.hv.Remove(p.rel))
	}
	return Errno(f.root.Remove(p.rel))
}

// Rename moves a file or directory. Between volumes the error is EXDEV.
func (f *FS) Rename(from, to string) error {
	a, err := f.place(from)
	if err != nil {
		return err
	}
	b, err := f.place(to)
	switch {
	case err != nil:
		return err
	case a.ds != b.ds:
		return syscall.EXDEV
	case a.rel == "." || b.rel == ".":
		return syscall.EBUSY
	case a.ds:
		return Errno(f.hv.Rename(a.rel, b.rel))
	}
	return Errno(f.root.Rename(a.rel, b.rel))
}

// Chmod changes what is executable; on the datastore it does nothing.
func (f *FS) Chmod(name string, mode fs.FileMode) error {
	p, err := f.place(name)
	if err != nil {
		return err
	}
	if p.ds {
		_, err := f.Stat(name)
		return err
	}
	return Errno(f.root.Chmod(p.rel, mode))
}

// ReadFile is a small file's content.
func (f *FS) ReadFile(name string, limit int64) ([]byte, error) {
	file, err := f.Open(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = syscall.EFBIG
	}
	return text, Errno(err)
}

func device(name string) (time.Time, bool) {
	switch path.Clean(name) {
	case "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random":
		return time.Time{}, true
	}
	return time.Time{}, false
}

// deviceFile is one of the devices without storage.
type deviceFile string

func (d deviceFile) Read(p []byte) (int, error) {
	switch d {
	case "null":
		return 0, io.EOF
	case "zero":
		clear(p)
	default:
		return rand.Read(p)
	}
	return len(p), nil
}

func (d deviceFile) ReadAt(p []byte, _ int64) (int, error)  { return d.Read(p) }
func (d deviceFile) Write(p []byte) (int, error)            { return len(p), nil }
func (d deviceFile) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (d deviceFile) Close() error                           { return nil }
func (d deviceFile) Truncate(int64) error                   { return nil }

func (d deviceFile) Stat() (fs.FileInfo, error) {
	return nil, fmt.Errorf("/dev/%s: %w", string(d), syscall.EINVAL)
}
