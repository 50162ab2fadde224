package fs

import (
	"context"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// listing is a directory at one moment. The slices are the catalog's own, which
// are never changed in place, so an open directory costs nothing however long
// it is.
type listing struct {
	self, parent uint64 // inode numbers
	hosts        []*hostDir
	vms          []*vmDir
	gens         []*genDir
	newest       *genDir
	files        []*content
	of           *opened // the generation, when this is its folder and it has disks
	complete     bool    // entries can be sent with their attributes without further reading
}

// dirent is one entry; n is the zero node where it would have to be looked up.
type dirent struct {
	name string
	ino  uint64
	mode uint32
	n    node
}

func named(name string, n node) dirent { return dirent{name, n.ino, n.mode, n} }

// at returns the i'th entry.
func (l *listing) at(t *tree, i int) (dirent, bool) {
	switch i {
	case 0:
		return dirent{name: ".", ino: l.self, mode: dirMode}, true
	case 1:
		return dirent{name: "..", ino: l.parent, mode: dirMode}, true
	}
	i -= 2
	if i < len(l.hosts) {
		return named(l.hosts[i].name, t.hostNode(l.hosts[i])), true
	}
	i -= len(l.hosts)
	if i < len(l.vms) {
		return dirent{name: l.vms[i].name, ino: l.vms[i].ino, mode: dirMode}, true
	}
	i -= len(l.vms)
	if i < len(l.gens) {
		return named(l.gens[i].ref.name, genNode(l.gens[i])), true
	}
	i -= len(l.gens)
	if l.newest != nil {
		if i == 0 {
			return named(latestName, latestNode(l.newest)), true
		}
		i--
	}
	if i < len(l.files) {
		c := l.files[i]
		return named(c.name, contentNode(c)), true
	}
	i -= len(l.files)
	if l.of != nil && i == 0 {
		return named(partitionsName, partitionsNode(l.of)), true
	}
	return dirent{}, false
}

func (t *tree) list(ctx context.Context, n node) (*listing, error) {
	up, err := t.parent(ctx, n)
	if err != nil {
		return nil, err
	}
	l := &listing{self: n.ino, parent: up.ino, complete: true}
	switch {
	case n.mode&syscall.S_IFMT != syscall.S_IFDIR:
		return nil, syscall.ENOTDIR
	case n.opened != nil:
		l.complete = false // counting their blocks can take a walk over the disk's map
		l.files, err = n.opened.partitions(ctx, t)
	case n.gen != nil:
		var o *opened
		if o, err = t.shelf.open(ctx, n.gen); err == nil {
			l.files = o.files
			if len(o.disks) > 0 {
				l.of = o
			}
		}
	case n.vm != nil:
		if l.gens, err = t.cat.generations(ctx, n.vm); err == nil {
			l.newest = latest(l.gens)
		}
	case n.host != nil:
		if _, err = t.cat.list(ctx); err == nil { // news; the node may be older
			var h *hostDir
			if h, err = t.cat.host(ctx, n.ino); err == nil {
				l.vms = h.vms
			}
		}
	default:
		l.hosts, err = t.cat.list(ctx)
	}
	return l, err
}

// dirHandle is an open directory.
type dirHandle struct {
	ino uint64

	mu   sync.Mutex
	l    *listing // as it was when it was opened; nil for what never changes
	read bool     // from the start; a second time means rewinddir, which asks for news
}

func (t *tree) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ino := in.NodeId
	l, errno := t.readList(in.Unique, cancel, ino)
	if errno != 0 {
		return fuse.Status(errno)
	}
	if kindOf(ino) == kindGeneration { // never changes
		out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
		l = nil // the shelf has it, and an open folder must not keep the generation in memory
	}
	out.Fh = t.handles.add(&dirHandle{ino: ino, l: l})
	return fuse.OK
}

func (t *tree) readList(unique uint64, cancel <-chan struct{}, ino uint64) (*listing, syscall.Errno) {
	return attempt(t, unique, cancel, "listing a directory failed", func(ctx context.Context) (*listing, error) {
		n, err := t.node(ctx, ino)
		if err != nil {
			return nil, err
		}
		return t.list(ctx, n)
	})
}

func (t *tree) ReleaseDir(in *fuse.ReleaseIn) { t.handles.remove(in.Fh) }

func (t *tree) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	l, errno := t.listingOf(cancel, in)
	if errno != 0 {
		return fuse.Status(errno)
	}
	for i := in.Offset; ; i++ {
		e, ok := l.at(t, int(i))
		if !ok || !out.AddDirEntry(fuse.DirEntry{Name: e.name, Ino: e.ino, Mode: e.mode, Off: i + 1}) {
			return fuse.OK
		}
	}
}

// ReadDirPlus sends attributes along, so that "ls -l" need not ask again.
func (t *tree) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	l, errno := t.listingOf(cancel, in)
	if errno != 0 {
		return fuse.Status(errno)
	}
	for i := in.Offset; ; i++ {
		e, ok := l.at(t, int(i))
		if !ok {
			return fuse.OK
		}
		slot := out.AddDirLookupEntry(fuse.DirEntry{Name: e.name, Ino: e.ino, Mode: e.mode, Off: i + 1})
		if slot == nil {
			return fuse.OK
		}
		if l.complete && e.n.ino != 0 {
			x := t.entry(context.Background(), e.n) // needs no reading
			t.put(&x, slot)
		}
	}
}

func (t *tree) listingOf(cancel <-chan struct{}, in *fuse.ReadIn) (*listing, syscall.Errno) {
	x, _ := t.handles.of.Load(in.Fh)
	h, ok := x.(*dirHandle)
	if !ok {
		return nil, syscall.EBADF
	}
	if in.Offset > 1<<31 {
		return nil, syscall.EINVAL
	}
	h.mu.Lock()
	again := in.Offset == 0 && h.read
	h.read = true
	l := h.l
	h.mu.Unlock()
	if !again && l != nil {
		return l, 0
	}
	fixed := l == nil
	l, errno := t.readList(in.Unique, cancel, h.ino)
	if errno == 0 && !fixed {
		h.mu.Lock()
		h.l = l
		h.mu.Unlock()
	}
	return l, errno
}
