package hv

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"hikae/backup/vmdk"
)

var (
	errNoSpace error = syscall.ENOSPC
	errNotDir  error = syscall.ENOTDIR
)

// space accounts for the datastore's room. Walking the directory for every
// write would be slow: between walks it keeps a lower bound of what is free
// (free at the last walk less all that was written since, as if nothing had
// been overwritten), and walks again only when the bound does not suffice.
type space struct {
	h     *Host
	mu    sync.Mutex
	bound int64 // at least so much is free
	known bool
	limit *int64 // capacity set by a fault
}

// Space is the datastore's capacity and free room in bytes.
func (h *Host) Space() (capacity, free int64) {
	h.space.mu.Lock()
	defer h.space.mu.Unlock()
	used := h.usage()
	return h.o.Capacity, max(h.space.total()-used, 0)
}

// LimitSpace leaves the datastore so many free bytes, from now on. Below zero
// lifts the limit.
func (h *Host) LimitSpace(free int64) {
	h.space.mu.Lock()
	defer h.space.mu.Unlock()
	h.space.known = false
	h.space.limit = nil
	if free >= 0 {
		limit := min(h.usage()+free, h.o.Capacity)
		h.space.limit = &limit
	}
}

func (s *space) total() int64 {
	if s.limit != nil {
		return *s.limit
	}
	return s.h.o.Capacity
}

// fits says whether n more bytes have room.
func (s *space) fits(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.has(n)
}

// take is fits, and counts the bytes as written.
func (s *space) take(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.has(n) {
		return false
	}
	s.bound -= n
	return true
}

func (s *space) has(n int64) bool {
	if !s.known || s.bound < n {
		s.bound, s.known = s.total()-s.h.usage(), true
	}
	return s.bound >= n
}

// refresh makes the next question walk the directory.
func (s *space) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = false
}

// usage is what the datastore's files take.
func (h *Host) usage() (total int64) {
	// Files come and go while this walks; what is not there any more takes nothing.
	_ = filepath.WalkDir(h.o.Dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			if d != nil && d.IsDir() && !errors.Is(err, fs.ErrNotExist) {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() {
			if d.Name() == PrivateDir {
				return fs.SkipDir
			}
			return nil
		}
		if fi, err := d.Info(); err == nil {
			total += h.charge(h.rel(name), fi)
		}
		return nil
	})
	return total
}

// charge is what one file takes on VMFS. Flat files of thick disks, and those
// that were uploaded, have all their blocks; the directory under them may keep
// zeros as holes all the same.
func (h *Host) charge(rel string, fi fs.FileInfo) int64 {
	taken := allocated(fi)
	base, flat := strings.CutSuffix(rel, "-flat.vmdk")
	if !flat || fi.Size() <= taken {
		return taken
	}
	h.mu.Lock()
	full := h.uploaded[rel]
	h.mu.Unlock()
	if !full {
		text, err := os.ReadFile(h.abs(base + ".vmdk"))
		if err == nil {
			d, err := vmdk.ParseDescriptor(text)
			full = err == nil && d.Value("ddb.thinProvisioned") != "1"
		}
	}
	if full {
		return fi.Size()
	}
	return taken
}

func allocated(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}
