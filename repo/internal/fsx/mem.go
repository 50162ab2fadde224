package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"path"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"
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

// Crash ends the life of all handles and locks and throws away a part, chosen by
// rng, of what was not synced. The file system can be used again at once.
func (m *Mem) Crash(rng *rand.Rand) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.life++
	// Half the crashes keep almost nothing or almost all: that is where
	// orderings go wrong that a fair coin would rarely try.
	keep := []float64{0, 0.1, 0.5, 0.9, 1}[rng.IntN(5)]
	kept := map[*nameOp]bool{}
	for _, op := range m.pending {
		if op.after != nil && !kept[op.after] {
			continue
		}
		if rng.Float64() < keep {
			kept[op] = true
			setName(op.dir.safe, op.name, op.node)
		}
	}
	m.pending = nil
	m.used = 0
	m.settle(m.root, rng, map[*memNode]bool{})
	m.unlocked.Broadcast()
}

// settle makes the surviving state below n the current one.
func (m *Mem) settle(n *memNode, rng *rand.Rand, seen map[*memNode]bool) {
	if seen[n] {
		n.links++
		return
	}
	seen[n] = true
	n.links, n.readers, n.writer = 1, 0, false
	if !n.dir {
		n.data = tear(n.data, n.synced, rng)
		n.synced = len(n.data)
		m.used += int64(len(n.data))
		return
	}
	n.now = make(map[string]*memNode, len(n.safe))
	// In a fixed order, so that a seed means the same every time.
	for _, name := range sortedNames(n.safe) {
		c := n.safe[name]
		n.now[name] = c
		m.settle(c, rng, seen)
	}
}

// tear returns what is left of a file of which only the first synced bytes last.
func tear(data []byte, synced int, rng *rand.Rand) []byte {
	const sector = 512
	rest := len(data) - synced
	if rest == 0 {
		return data
	}
	switch rng.IntN(4) {
	case 0:
		return data[:synced:synced]
	case 1:
		return data
	case 2:
		n := synced + rng.IntN(rest+1)
		return data[:n:n]
	}
	// The size went to disk before the bytes did.
	torn := append([]byte(nil), data[:synced+rng.IntN(rest+1)]...)
	for at := synced; at < len(torn); {
		end := min(at/sector*sector+sector, len(torn))
		switch rng.IntN(3) {
		case 0:
			clear(torn[at:end])
		case 1:
			for i := at; i < end; i++ {
				torn[i] = byte(rng.Uint32())
			}
		}
		at = end
	}
	return torn
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
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("publish", old)
	if err != nil {
		return err
	}
	if n.dir {
		return &fs.PathError{Op: "publish", Path: old, Err: syscall.EISDIR}
	}
	if err := checkName("publish", final); err != nil {
		return err
	}
	to, base, err := m.parent("publish", final)
	if err != nil {
		return err
	}
	if there := to.now[base]; there != nil && there != n {
		return &fs.PathError{Op: "publish", Path: final, Err: fs.ErrExist}
	}
	if path.Clean(old) == path.Clean(final) {
		return nil
	}
	from, oldBase, _ := m.parent("publish", old)
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

type memFile struct {
	m     *Mem
	n     *memNode
	name  string
	life  int
	write bool

	at     int
	closed bool
}

// use checks that the handle lives; m.mu is held.
func (f *memFile) use(op string, write bool) error {
	err := error(nil)
	switch {
	case f.closed:
		err = fs.ErrClosed
	case f.life != f.m.life:
		err = ErrCrashed
	case f.n.dir:
		err = syscall.EISDIR
	case write && !f.write, op == "read" && f.write:
		err = syscall.EBADF
	default:
		return nil
	}
	return &fs.PathError{Op: op, Path: f.name, Err: err}
}

func (f *memFile) Name() string { return f.name }

func (f *memFile) Read(p []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("read", false); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if f.at >= len(f.n.data) {
		return 0, io.EOF
	}
	n := copy(p, f.n.data[f.at:])
	f.at += n
	return n, nil
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("read", false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: f.name, Err: errors.New("negative offset")}
	}
	if off >= int64(len(f.n.data)) {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := copy(p, f.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Write always adds at the end: nothing in a repository is ever overwritten.
func (f *memFile) Write(p []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("write", true); err != nil {
		return 0, err
	}
	n := len(p)
	if room := f.m.capacity - f.m.used; int64(n) > room {
		n = int(max(0, room))
	}
	f.n.data = append(f.n.data, p[:n]...)
	if f.n.links > 0 {
		f.m.used += int64(n)
	}
	if n < len(p) {
		return n, &fs.PathError{Op: "write", Path: f.name, Err: syscall.ENOSPC}
	}
	return n, nil
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.use("sync", false); err != nil {
		return err
	}
	f.n.synced = len(f.n.data)
	return nil
}

func (f *memFile) Stat() (fs.FileInfo, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed || f.life != f.m.life {
		return nil, f.use("stat", false)
	}
	return f.n.info(path.Base(f.name)), nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return f.use("close", false)
	}
	f.closed = true
	return nil
}

func (n *memNode) info(base string) fs.FileInfo {
	return memInfo{name: base, size: int64(len(n.data)), dir: n.dir}
}

// memInfo says nothing of times: nothing in a repository may depend on them.
type memInfo struct {
	name string
	size int64
	dir  bool
}

func (i memInfo) Name() string { return i.name }
func (i memInfo) Size() int64  { return i.size }
func (i memInfo) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o700
	}
	return 0o600
}
func (i memInfo) ModTime() time.Time { return time.Time{} }
func (i memInfo) IsDir() bool        { return i.dir }
func (i memInfo) Sys() any           { return nil }
