package fsx

import (
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"sort"
	"strings"
	"sync"
	"syscall"
)

// Mem is a file system in memory that knows what would survive a crash.
//
// Each file remembers how much of it was synced, and the file system remembers,
// in order, which changes of names were made and not yet synced. Crash keeps
// what was synced and a random part of the rest. What it may leave:
//
//   - of a file's unsynced end: nothing, all, a prefix, or sectors of it with
//     zeros or rubbish between them;
//   - of the unsynced changes of names: any subset, also from the middle, so a
//     synced file vanishes when its directory was not synced. A published file
//     is then found under the old name, the new one or both; under neither
//     only when its old name never lasted.
type Mem struct {
	mu       sync.Mutex
	unlocked *sync.Cond // signalled when a lock is given back
	root     *memNode
	pending  []*nameOp
	life     int // handles of an earlier life are dead
	capacity int64
	used     int64
}

// memNode is a file or a directory. For a directory now is what a process sees
// and safe is what would be found after a crash.
type memNode struct {
	dir       bool
	now, safe map[string]*memNode

	data   []byte
	synced int // bytes of data that last
	links  int // names in now; at none the room is free again

	readers int // shared locks
	writer  bool
}

// nameOp is one change of a name: dir[name] becomes node, or nothing when nil.
type nameOp struct {
	dir   *memNode
	name  string
	node  *memNode
	after *nameOp // lost unless this one is kept: an old name goes only once the new one is there
}

// NewMem returns an empty file system without a limit.
func NewMem() *Mem {
	m := &Mem{root: newDir(), capacity: math.MaxInt64}
	m.unlocked = sync.NewCond(&m.mu)
	return m
}

func newDir() *memNode {
	return &memNode{dir: true, now: map[string]*memNode{}, safe: map[string]*memNode{}, links: 1}
}

// SetCapacity limits the bytes that all files together may hold; writing more
// fails with ENOSPC after what fits.
func (m *Mem) SetCapacity(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = n
}

// Plant puts a file there that lasts, in place of any that has that name: how
// tests damage a repository.
func (m *Mem) Plant(name string, data []byte) error {
	if err := m.MkdirAll(path.Dir(name)); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, base, err := m.parent("plant", name)
	if err != nil {
		return err
	}
	n := &memNode{data: append([]byte(nil), data...), synced: len(data)}
	m.used += int64(len(data))
	m.name(&nameOp{dir: d, name: base, node: n})
	for p := name; p != "."; p = path.Dir(p) {
		if d, err := m.find("plant", path.Dir(p)); err == nil {
			m.syncNames(d)
		}
	}
	return nil
}

// Files lists every file, sorted.
func (m *Mem) Files() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []string
	var walk func(n *memNode, at string)
	walk = func(n *memNode, at string) {
		for name, c := range n.now {
			if p := path.Join(at, name); c.dir {
				walk(c, p)
			} else {
				all = append(all, p)
			}
		}
	}
	walk(m.root, "")
	sort.Strings(all)
	return all
}

func (m *Mem) find(op, name string) (*memNode, error) {
	if err := checkName(op, name); err != nil {
		return nil, err
	}
	n := m.root
	if name == "." {
		return n, nil
	}
	for _, part := range strings.Split(name, "/") {
		if !n.dir {
			return nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOTDIR}
		}
		c, ok := n.now[part]
		if !ok {
			return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		n = c
	}
	return n, nil
}

func (m *Mem) parent(op, name string) (*memNode, string, error) {
	if name == "." {
		return nil, "", &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	d, err := m.find(op, path.Dir(name))
	if err == nil && !d.dir {
		err = &fs.PathError{Op: op, Path: name, Err: syscall.ENOTDIR}
	}
	return d, path.Base(name), err
}

// name makes a change visible and remembers that it may be lost.
func (m *Mem) name(op *nameOp) {
	old := op.dir.now[op.name]
	if old != nil {
		if old.links--; old.links == 0 {
			m.used -= int64(len(old.data))
		}
	}
	if op.node != nil && !op.node.dir {
		op.node.links++
	}
	setName(op.dir.now, op.name, op.node)
	m.pending = append(m.pending, op)
}

func setName(names map[string]*memNode, name string, n *memNode) {
	if n == nil {
		delete(names, name)
	} else {
		names[name] = n
	}
}

func (m *Mem) syncNames(d *memNode) {
	rest := m.pending[:0]
	for _, op := range m.pending {
		if op.dir == d {
			setName(d.safe, op.name, op.node)
			op.after = nil
		} else {
			rest = append(rest, op)
		}
	}
	for i := len(rest); i < len(m.pending); i++ {
		m.pending[i] = nil
	}
	// What waited for a change that lasts now need not wait any more.
	waiting := map[*nameOp]bool{}
	for _, op := range rest {
		waiting[op] = true
	}
	for _, op := range rest {
		if op.after != nil && !waiting[op.after] {
			op.after = nil
		}
	}
	m.pending = rest
}

// Open implements FS.
func (m *Mem) Open(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("open", name)
	if err != nil {
		return nil, err
	}
	return &memFile{m: m, n: n, name: name, life: m.life}, nil
}

// Create implements FS.
func (m *Mem) Create(name string) (File, error) {
	return m.create("create", name, true)
}

// Append implements FS.
func (m *Mem) Append(name string) (File, error) {
	return m.create("append", name, false)
}

func (m *Mem) create(op, name string, excl bool) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.touch(op, name, excl)
	if err != nil {
		return nil, err
	}
	return &memFile{m: m, n: n, name: name, life: m.life, write: true}, nil
}

// touch finds a file or makes it.
func (m *Mem) touch(op, name string, excl bool) (*memNode, error) {
	if err := checkName(op, name); err != nil {
		return nil, err
	}
	d, base, err := m.parent(op, name)
	if err != nil {
		return nil, err
	}
	n := d.now[base]
	switch {
	case n == nil:
		n = &memNode{}
		m.name(&nameOp{dir: d, name: base, node: n})
	case excl:
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrExist}
	case n.dir:
		return nil, &fs.PathError{Op: op, Path: name, Err: syscall.EISDIR}
	}
	return n, nil
}

// Publish implements FS as link and unlink.
func (m *Mem) Publish(old, final string) error {
	return m.rename("publish", old, final, func(there, n *memNode) error {
		if there != nil && there != n {
			return fs.ErrExist
		}
		return nil
	})
}

// Replace implements FS.
func (m *Mem) Replace(old, final string) error {
	return m.rename("replace", old, final, func(there, _ *memNode) error {
		if there != nil && there.dir {
			return syscall.EISDIR
		}
		return nil
	})
}

// rename gives a file another name, if what has that name may be replaced.
func (m *Mem) rename(op, old, final string, may func(there, n *memNode) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(op, old)
	if err != nil {
		return err
	}
	if n.dir {
		return &fs.PathError{Op: op, Path: old, Err: syscall.EISDIR}
	}
	if err := checkName(op, final); err != nil {
		return err
	}
	to, base, err := m.parent(op, final)
	if err != nil {
		return err
	}
	if err := may(to.now[base], n); err != nil {
		return &fs.PathError{Op: op, Path: final, Err: err}
	}
	if path.Clean(old) == path.Clean(final) {
		return nil
	}
	from, oldBase, _ := m.parent(op, old)
	link := &nameOp{dir: to, name: base, node: n}
	m.name(link)
	m.name(&nameOp{dir: from, name: oldBase, after: link})
	return nil
}

// Remove implements FS.
func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("remove", name)
	if err != nil {
		return err
	}
	if n.dir && len(n.now) > 0 {
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.ENOTEMPTY}
	}
	d, base, err := m.parent("remove", name)
	if err != nil {
		return err
	}
	m.name(&nameOp{dir: d, name: base})
	return nil
}

// MkdirAll implements FS.
func (m *Mem) MkdirAll(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := checkName("mkdir", name); err != nil {
		return err
	}
	if name == "." {
		return nil
	}
	d := m.root
	for _, part := range strings.Split(name, "/") {
		c := d.now[part]
		if c == nil {
			c = newDir()
			m.name(&nameOp{dir: d, name: part, node: c})
		}
		if !c.dir {
			return &fs.PathError{Op: "mkdir", Path: name, Err: syscall.ENOTDIR}
		}
		d = c
	}
	return nil
}

// ReadDir implements FS.
func (m *Mem) ReadDir(name string) ([]fs.DirEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find("readdir", name)
	if err != nil {
		return nil, err
	}
	if !d.dir {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: syscall.ENOTDIR}
	}
	list := make([]fs.DirEntry, 0, len(d.now))
	for _, base := range sortedNames(d.now) {
		list = append(list, fs.FileInfoToDirEntry(d.now[base].info(base)))
	}
	return list, nil
}

func sortedNames(names map[string]*memNode) []string {
	list := make([]string, 0, len(names))
	for n := range names {
		list = append(list, n)
	}
	sort.Strings(list)
	return list
}

// Stat implements FS.
func (m *Mem) Stat(name string) (fs.FileInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("stat", name)
	if err != nil {
		return nil, err
	}
	return n.info(path.Base(name)), nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find("sync", name)
	if err != nil {
		return err
	}
	if !d.dir {
		return &fs.PathError{Op: "sync", Path: name, Err: syscall.ENOTDIR}
	}
	m.syncNames(d)
	return nil
}

// Free implements FS.
func (m *Mem) Free() (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return uint64(max(0, m.capacity-m.used)), nil
}

// Lock implements FS.
func (m *Mem) Lock(name string, exclusive, wait bool) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	life := m.life
	for {
		if m.life != life {
			return nil, fmt.Errorf("lock %s: %w", name, ErrCrashed)
		}
		// Looked up each time round: its holder may have removed the file.
		n, err := m.touch("lock", name, false)
		if err != nil {
			return nil, err
		}
		if !n.writer && (!exclusive || n.readers == 0) {
			if exclusive {
				n.writer = true
			} else {
				n.readers++
			}
			return &memLock{m: m, n: n, exclusive: exclusive, life: life}, nil
		}
		if !wait {
			return nil, fmt.Errorf("%s: %w", name, ErrLocked)
		}
		m.unlocked.Wait()
	}
}

type memLock struct {
	m         *Mem
	n         *memNode
	exclusive bool
	life      int
	closed    bool
}

func (l *memLock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.closed {
		return fs.ErrClosed
	}
	l.closed = true
	if l.life != l.m.life {
		return nil
	}
	if l.exclusive {
		l.n.writer = false
	} else {
		l.n.readers--
	}
	l.m.unlocked.Broadcast()
	return nil
}
