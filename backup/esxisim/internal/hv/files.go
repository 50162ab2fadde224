package hv

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
)

// Resolve turns "[datastore1] dir/file" or "/vmfs/volumes/datastore1/dir/file"
// into a name relative to the datastore; "." is its top.
func (h *Host) Resolve(p string) (string, error) {
	if rest, ok := strings.CutPrefix(p, "/vmfs/volumes/"); ok {
		ds, rel, _ := strings.Cut(rest, "/")
		if ds != h.o.Datastore && ds != h.UUID() {
			return "", fail(ErrPath, p, "no datastore is mounted at /vmfs/volumes/%s", ds)
		}
		return h.Clean(rel)
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(p), "[")
	if !ok {
		return "", fail(ErrPath, p, "invalid datastore path %q", p)
	}
	ds, rel, ok := strings.Cut(rest, "]")
	if !ok {
		return "", fail(ErrPath, p, "invalid datastore path %q", p)
	}
	if ds != h.o.Datastore {
		return "", fail(ErrNotFound, ds, "there is no datastore %q", ds)
	}
	return h.Clean(strings.TrimSpace(rel))
}

// Clean checks a name relative to the datastore. Names that lead out of it or
// to the host's own files are refused.
func (h *Host) Clean(rel string) (string, error) {
	if strings.ContainsRune(rel, 0) {
		return "", fail(ErrPath, rel, "invalid datastore path")
	}
	for part := range strings.SplitSeq(rel, "/") {
		if part == ".." {
			return "", fail(ErrPath, rel, "invalid datastore path %q", rel)
		}
	}
	rel = strings.TrimPrefix(path.Clean("/"+rel), "/")
	if rel == "" {
		return ".", nil
	}
	if rel == PrivateDir || strings.HasPrefix(rel, PrivateDir+"/") {
		return "", fail(ErrNotFound, rel, "%s was not found", rel)
	}
	return rel, nil
}

// Path is a name as the datastore path ESXi shows.
func (h *Host) Path(rel string) string {
	if rel == "." {
		return "[" + h.o.Datastore + "]"
	}
	return "[" + h.o.Datastore + "] " + rel
}

// UUID names the volume under /vmfs/volumes. It is the same for every
// simulated host: nothing depends on it.
func (h *Host) UUID() string { return "5e0026d9-a647150e-d8a8-4cedfb76e9d5" }

func (h *Host) abs(rel string) string { return filepath.Join(h.o.Dir, filepath.FromSlash(rel)) }

func (h *Host) rel(abs string) string {
	rel, err := filepath.Rel(h.o.Dir, abs)
	if err != nil {
		return abs
	}
	return filepath.ToSlash(rel)
}

// fileError says an operating system's error in the host's words.
func fileError(name string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNotDir):
		return fail(ErrNotFound, name, "%s was not found", name)
	case errors.Is(err, fs.ErrExist):
		return fail(ErrExists, name, "%s already exists", name)
	case errors.Is(err, errNoSpace):
		return fail(ErrNoSpace, name, "there is not enough space on the file system for %s", name)
	}
	return fail(ErrPath, name, "cannot access %s: %v", name, err)
}

// Stat describes a file or directory.
func (h *Host) Stat(rel string) (fs.FileInfo, error) {
	fi, err := h.root.Stat(rel)
	return fi, fileError(rel, err)
}

// Open opens a file for reading, unless a running VM holds it.
func (h *Host) Open(rel string) (*os.File, error) {
	if h.InUse(rel, false) {
		return nil, fail(ErrLocked, rel, "failed to lock %s: it is in use by a running VM", rel)
	}
	f, err := h.root.Open(rel)
	return f, fileError(rel, err)
}

// List is a directory's content by name.
func (h *Host) List(rel string) ([]fs.FileInfo, error) {
	d, err := h.root.Open(rel)
	if err != nil {
		return nil, fileError(rel, err)
	}
	defer d.Close()
	list, err := d.Readdir(-1)
	if err != nil {
		return nil, fileError(rel, err)
	}
	kept := list[:0]
	for _, fi := range list {
		if rel != "." || fi.Name() != PrivateDir {
			kept = append(kept, fi)
		}
	}
	sort.Slice(kept, func(i, j int) bool { return kept[i].Name() < kept[j].Name() })
	return kept, nil
}

// Put stores a file. It comes into being at once and grows: an upload that
// breaks off leaves what came. size is what the sender announced, -1 when
// nothing; an upload that cannot fit is refused before its first byte.
func (h *Host) Put(rel string, r io.Reader, size int64) (created bool, err error) {
	if h.InUse(rel, true) {
		return false, fail(ErrLocked, rel, "failed to lock %s: it is in use by a running VM", rel)
	}
	old, err := h.root.Stat(rel)
	created = err != nil
	var gives int64
	if err == nil {
		if old.IsDir() {
			return false, fail(ErrExists, rel, "%s is a directory", rel)
		}
		gives = h.charge(rel, old)
	}
	if size > 0 && !h.space.fits(size-gives) {
		return false, fail(ErrNoSpace, rel, "there is not enough space on the file system for %s: %d bytes", rel, size)
	}
	f, err := h.root.OpenFile(rel, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return false, fileError(rel, err)
	}
	h.space.refresh()
	if strings.HasSuffix(rel, "-flat.vmdk") {
		h.mu.Lock()
		h.uploaded[rel] = true
		h.mu.Unlock()
		if err := h.save(); err != nil {
			return created, errors.Join(err, f.Close())
		}
	}
	err = h.receive(f, rel, r)
	return created, errors.Join(err, f.Close())
}

// receive writes a body, zeros as holes: what is charged for them is what VMFS
// would allocate, what they take of the machine's real disk is nothing.
func (h *Host) receive(f *os.File, rel string, r io.Reader) error {
	buf := make([]byte, 256<<10)
	zero := make([]byte, 4<<10)
	var off int64
	for {
		n, rerr := fill(r, buf)
		if n > 0 {
			if !h.space.take(int64(n)) {
				return fail(ErrNoSpace, rel, "there is not enough space on the file system for %s", rel)
			}
			if err := f.Truncate(off + int64(n)); err != nil { // what comes counts, zeros too
				return fileError(rel, err)
			}
		}
		for i := 0; i < n; i += len(zero) {
			part := buf[i:min(i+len(zero), n)]
			if bytes.Equal(part, zero[:len(part)]) {
				continue
			}
			if _, err := f.WriteAt(part, off+int64(i)); err != nil {
				return fileError(rel, err)
			}
		}
		off += int64(n)
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

// fill reads until buf is full or the reader ends, and returns the reader's own
// error: unlike io.ReadFull it does not mix up a body's end with its breaking off.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = r.Read(buf[n:])
		n += m
	}
	return n, err
}

// Mkdir makes a directory, as strictly as ESXi: what exists already is an
// error, with parents too.
func (h *Host) Mkdir(rel string, parents bool) error {
	if _, err := h.root.Stat(rel); err == nil {
		return fail(ErrExists, rel, "%s already exists", rel)
	}
	if parents {
		return fileError(rel, h.root.MkdirAll(rel, 0o700))
	}
	return fileError(rel, h.root.Mkdir(rel, 0o700))
}

// Delete removes a file, or a directory with everything in it.
func (h *Host) Delete(rel string) error {
	if rel == "." {
		return fail(ErrPath, rel, "the datastore's top cannot be deleted")
	}
	fi, err := h.root.Lstat(rel)
	if err != nil {
		return fileError(rel, err)
	}
	if err := h.free(rel, fi); err != nil {
		return err
	}
	if err := fileError(rel, h.root.RemoveAll(rel)); err != nil {
		return err
	}
	return h.forget(rel, "")
}

// Remove removes a file or an empty directory.
func (h *Host) Remove(rel string) error {
	fi, err := h.root.Lstat(rel)
	if err != nil {
		return fileError(rel, err)
	}
	if fi.IsDir() {
		if list, err := h.List(rel); err == nil && len(list) > 0 {
			return fail(ErrNotEmpty, rel, "%s is not empty", rel)
		}
	}
	return h.Delete(rel)
}

// free makes sure that no running VM uses a file or anything in a directory.
func (h *Host) free(rel string, fi fs.FileInfo) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, files := range h.used {
		for name := range files {
			if name == rel || fi.IsDir() && strings.HasPrefix(name, rel+"/") {
				return fail(ErrLocked, name, "failed to lock %s: it is in use by a running VM", name)
			}
		}
	}
	return nil
}

// forget carries what is known of uploads along with files that moved (to) or
// went.
func (h *Host) forget(rel, to string) error {
	h.space.refresh()
	h.mu.Lock()
	var changed bool
	for name := range h.uploaded {
		rest, below := strings.CutPrefix(name, rel+"/")
		if name != rel && !below {
			continue
		}
		delete(h.uploaded, name)
		changed = true
		if to != "" {
			h.uploaded[path.Join(to, rest)] = true
			if name == rel {
				h.uploaded[to] = true
			}
		}
	}
	h.mu.Unlock()
	if !changed {
		return nil
	}
	return h.save()
}

// Move renames a file or directory. With force an existing file is replaced.
func (h *Host) Move(from, to string, force bool) error {
	fi, err := h.root.Lstat(from)
	if err != nil {
		return fileError(from, err)
	}
	if err := h.free(from, fi); err != nil {
		return err
	}
	if old, err := h.root.Lstat(to); err == nil {
		if !force {
			return fail(ErrExists, to, "%s already exists", to)
		}
		if err := h.free(to, old); err != nil {
			return err
		}
	}
	if err := fileError(from, h.root.Rename(from, to)); err != nil {
		return err
	}
	return h.forget(from, to)
}

// Copy copies a file.
func (h *Host) Copy(from, to string, force bool) error {
	if _, err := h.root.Lstat(to); err == nil && !force {
		return fail(ErrExists, to, "%s already exists", to)
	}
	f, err := h.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.IsDir() {
		return fail(ErrPath, from, "%s is not a file", from)
	}
	_, err = h.Put(to, f, fi.Size())
	return err
}
