package fs

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	latestName     = "latest"
	partitionsName = "partitions"

	// forever is how long the kernel may keep what cannot change. It forgets it
	// anyway when it needs the memory.
	forever = 10 * 365 * 24 * time.Hour

	dirMode  = syscall.S_IFDIR | 0o555
	fileMode = syscall.S_IFREG | 0o444
	linkMode = syscall.S_IFLNK | 0o777

	// blockSize is told as the size to read in.
	blockSize = 128 << 10
)

// tree answers the kernel's requests. Those it has no method for the kernel either
// refuses by itself, the mount being read-only, or does without: Access and
// permissions (default_permissions), Fsync, Statx, locks.
type tree struct {
	fuse.RawFileSystem
	src        source
	cat        *catalog
	shelf      *shelf
	patience   *patience
	complaints complaints
	pace       pace
	handles    handles
	verdicts   verdicts
	owner      fuse.Owner
	umask      uint32
	ttl        time.Duration // how long names above and of generations are believed
	since      time.Time     // of the mount
}

func (t *tree) String() string { return "hikae" }

// attempt runs a request under patience and turns its error into an errno.
func attempt[T any](t *tree, unique uint64, cancel <-chan struct{}, what string, f func(context.Context) (T, error)) (T, syscall.Errno) {
	v, err := try(t.patience, unique, cancel, f)
	t.complaints.about(err, what)
	return v, toErrno(err)
}

// node is anything in the tree. The innermost thing it is part of is set, and
// what contains that.
type node struct {
	ino, ident uint64
	mode       uint32
	mtime      time.Time
	mutable    bool // its attributes may change
	lasting    bool // its name in its directory stays for ever

	host    *hostDir
	vm      *vmDir
	gen     *genDir
	opened  *opened
	content *content
	target  string // of a link
}

func (t *tree) rootNode() node {
	return node{ino: inoRoot, mode: dirMode, mtime: t.since, mutable: true}
}

func (t *tree) hostNode(h *hostDir) node {
	return node{ino: h.ino, ident: h.ident, mode: dirMode, mtime: t.since, mutable: true, host: h}
}

func (t *tree) vmNode(ctx context.Context, vm *vmDir) (node, error) {
	gens, err := t.cat.generations(ctx, vm)
	if err != nil {
		return node{}, err
	}
	n := node{ino: vm.ino, ident: vm.ident, mode: dirMode, mtime: t.since, mutable: true, vm: vm}
	if len(gens) > 0 {
		n.mtime = gens[len(gens)-1].ref.time
	}
	return n, nil
}

func latestNode(g *genDir) node {
	return node{ino: inoOfLatest(g.ref.sequence), ident: g.ident, mode: linkMode, mtime: g.ref.time, vm: g.vm, target: g.ref.name}
}

func genNode(g *genDir) node {
	return node{ino: inoInGeneration(g.ref.sequence, placeFolder), ident: g.ident, mode: dirMode, mtime: g.ref.time, gen: g}
}

func partitionsNode(o *opened) node {
	return node{
		ino: inoInGeneration(o.gen.ref.sequence, placePartitions), ident: o.gen.ident + 1, mode: dirMode,
		mtime: o.gen.ref.time, lasting: true, gen: o.gen, opened: o,
	}
}

func contentNode(c *content) node {
	return node{ino: c.ino, ident: c.ident, mode: fileMode, mtime: c.mtime, lasting: true, gen: c.gen, content: c}
}

// node finds what an inode number means.
func (t *tree) node(ctx context.Context, ino uint64) (node, error) {
	n, err := t.find(ctx, ino)
	if errors.Is(err, errGone) {
		err = errStale
	}
	return n, err
}

func (t *tree) find(ctx context.Context, ino uint64) (node, error) {
	switch kindOf(ino) {
	case kindHost:
		h, err := t.cat.host(ctx, ino)
		if err != nil {
			return node{}, err
		}
		return t.hostNode(h), nil
	case kindVM:
		vm, err := t.cat.vm(ctx, ino)
		if err != nil {
			return node{}, err
		}
		return t.vmNode(ctx, vm)
	case kindLatest, kindGeneration:
	default:
		if ino == inoRoot {
			return t.rootNode(), nil
		}
		return node{}, errGone
	}
	sequence, place := splitIno(ino)
	g, err := t.cat.generation(ctx, sequence)
	switch {
	case err != nil:
		return node{}, err
	case kindOf(ino) == kindLatest:
		return latestNode(g), nil
	case place == placeFolder:
		return genNode(g), nil
	}
	o, err := t.shelf.open(ctx, g)
	if err != nil {
		return node{}, err
	}
	if place == placePartitions {
		return partitionsNode(o), nil
	}
	files := o.files
	if place >= placePartition {
		if files, err = o.partitions(ctx, t); err != nil {
			return node{}, err
		}
	}
	for _, c := range files {
		if c.ino == ino {
			return contentNode(c), nil
		}
	}
	return node{}, errGone
}

// parent is what ".." means; NFS servers ask for it.
func (t *tree) parent(ctx context.Context, n node) (node, error) {
	switch {
	case n.content != nil && n.content.disk != nil && n.content.ino&placePartition != 0:
		o, err := t.shelf.open(ctx, n.gen)
		if err != nil {
			return node{}, err
		}
		return partitionsNode(o), nil
	case n.content != nil, n.opened != nil:
		return genNode(n.gen), nil
	case n.gen != nil:
		return t.vmNode(ctx, n.gen.vm)
	case n.target != "":
		return t.vmNode(ctx, n.vm)
	case n.vm != nil:
		return t.node(ctx, inoOfHost(n.vm.id.host))
	}
	return t.rootNode(), nil
}

// child looks a name up in a directory.
func (t *tree) child(ctx context.Context, dir node, name string) (node, error) {
	switch {
	case name == ".":
		return dir, nil
	case name == "..":
		return t.parent(ctx, dir)
	case dir.mode&syscall.S_IFMT != syscall.S_IFDIR:
		return node{}, syscall.ENOTDIR
	case dir.opened != nil:
		parts, err := dir.opened.partitions(ctx, t)
		if err != nil {
			return node{}, err
		}
		for _, c := range parts {
			if c.name == name {
				return contentNode(c), nil
			}
		}
	case dir.gen != nil:
		o, err := t.shelf.open(ctx, dir.gen)
		if err != nil {
			return node{}, err
		}
		if c := o.byName[name]; c != nil {
			return contentNode(c), nil
		}
		if name == partitionsName && len(o.disks) > 0 {
			return partitionsNode(o), nil
		}
	case dir.vm != nil:
		gens, err := t.cat.generations(ctx, dir.vm)
		if err != nil {
			return node{}, err
		}
		if name == latestName && len(gens) > 0 {
			return latestNode(latest(gens)), nil
		}
		if i, ok := slices.BinarySearchFunc(gens, name, byGenName); ok {
			return genNode(gens[i]), nil
		}
	case dir.host != nil:
		vm, err := find(ctx, t.cat, func() *vmDir { return t.cat.vmNamed(dir.host.ino, name) })
		if err != nil {
			return node{}, err
		}
		return t.vmNode(ctx, vm)
	default:
		h, err := find(ctx, t.cat, func() *hostDir { return t.cat.hostNamed(name) })
		if err != nil {
			return node{}, err
		}
		return t.hostNode(h), nil
	}
	return node{}, errGone
}

// attr fills in what stat shows, and says for how long that stays true.
func (t *tree) attr(ctx context.Context, n node, a *fuse.Attr) time.Duration {
	*a = fuse.Attr{Ino: n.ino, Mode: n.mode &^ t.umask, Nlink: 1, Owner: t.owner, Blksize: blockSize}
	a.SetTimes(&n.mtime, &n.mtime, &n.mtime)
	switch {
	case n.content != nil:
		a.Size = uint64(n.content.size)
		ctx, stop := context.WithTimeout(ctx, mapTime)
		stored, err := n.content.countStored(ctx)
		stop()
		if err != nil {
			// The map is damaged somewhere, or the walk takes long. Neither must
			// keep anyone from the file; so for now the number is a guess.
			if !errors.Is(err, context.DeadlineExceeded) {
				t.complaints.about(err, "counting stored bytes failed", "file", n.content.name)
			}
			stored = min(n.content.size, n.content.disk.stored)
			n.mutable = true
		}
		a.Blocks = uint64(stored+511) / 512
	case n.target != "":
		a.Mode = n.mode
		a.Size = uint64(len(n.target))
	}
	if n.mutable {
		return t.ttl
	}
	return forever
}

// entry is the answer to a lookup.
type entry struct {
	n        node
	attr     fuse.Attr
	attrTime time.Duration
	negative time.Duration // for how long the name is known not to be there
}

func (t *tree) entry(ctx context.Context, n node) (e entry) {
	e.n = n
	e.attrTime = t.attr(ctx, n, &e.attr)
	return e
}

func (t *tree) put(e *entry, out *fuse.EntryOut) {
	out.NodeId, out.Generation, out.Attr = e.n.ino, e.n.ident, e.attr
	out.SetAttrTimeout(e.attrTime)
	out.SetEntryTimeout(t.ttl)
	if e.n.lasting {
		out.SetEntryTimeout(forever)
	}
}

func (t *tree) Lookup(cancel <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	e, errno := attempt(t, in.Unique, cancel, "lookup failed", func(ctx context.Context) (e entry, err error) {
		d, err := t.node(ctx, in.NodeId)
		if err != nil {
			return e, err
		}
		n, err := t.child(ctx, d, name)
		if errors.Is(err, errGone) {
			// What is not in a generation's folder will never be.
			e.negative = t.ttl
			if d.gen != nil {
				e.negative = forever
			}
			return e, nil
		}
		if err != nil {
			return e, err
		}
		return t.entry(ctx, n), nil
	})
	switch {
	case errno != 0:
		return fuse.Status(errno)
	case e.negative > 0 && (name == "." || name == ".."):
		return fuse.Status(syscall.ESTALE)
	case e.negative > 0:
		out.SetEntryTimeout(e.negative) // node 0: no such name
	default:
		t.put(&e, out)
	}
	return fuse.OK
}

// Forget has nothing to forget: inode numbers are computed.
func (t *tree) Forget(uint64, uint64) {}

func (t *tree) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	e, errno := attempt(t, in.Unique, cancel, "stat failed", func(ctx context.Context) (e entry, err error) {
		n, err := t.node(ctx, in.NodeId)
		if err != nil {
			return e, err
		}
		return t.entry(ctx, n), nil
	})
	if errno != 0 {
		return fuse.Status(errno)
	}
	out.Attr = e.attr
	out.SetTimeout(e.attrTime)
	return fuse.OK
}

func (t *tree) Readlink(cancel <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n, errno := attempt(t, in.Unique, cancel, "reading a link failed", func(ctx context.Context) (node, error) { return t.node(ctx, in.NodeId) })
	if errno == 0 && n.target == "" {
		errno = syscall.EINVAL
	}
	if errno != 0 {
		return nil, fuse.Status(errno)
	}
	return []byte(n.target), fuse.OK
}

// StatFs tells about the storage of the repository: that is what fills up.
func (t *tree) StatFs(cancel <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	const unit = 4096
	v, errno := attempt(t, in.Unique, cancel, "statfs failed", func(ctx context.Context) ([2]uint64, error) {
		total, free, err := t.src.Space(ctx)
		return [2]uint64{total, free}, err
	})
	*out = fuse.StatfsOut{Blocks: v[0] / unit, Bfree: v[1] / unit, Bavail: v[1] / unit, Bsize: unit, Frsize: unit, NameLen: maxName}
	return fuse.Status(errno)
}
