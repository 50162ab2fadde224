package fs

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"hikae/repo/guest/parttable"
)

// opened is a generation whose manifest has been read.
type opened struct {
	gen    *genDir
	attrs  []xattr
	files  []*content // by place
	byName map[string]*content
	disks  []*shownDisk
	weight int64 // bytes it keeps in memory, roughly
}

// content is a regular file of the mount: a small file, or a window of a disk.
type content struct {
	gen   *genDir
	name  string
	ino   uint64
	ident uint64
	mtime time.Time
	size  int64
	attrs []xattr

	data []byte // when disk is nil

	disk *shownDisk
	base int64 // where the window begins on the disk

	mu     sync.Mutex
	stored int64 // bytes that are not holes; −1 while not counted
}

// shownDisk is a disk of an opened generation. It does not hold on to that: an
// open disk must not keep the generation's other files in memory.
type shownDisk struct {
	disk
	gen    *genDir
	attrs  []xattr // of the generation
	index  int
	name   string // base of its file names
	stored int64
	areas  areas

	asking *shared
	mu     sync.Mutex
	parts  []*content // nil until looked for; the whole disk when it has no partition table
}

// String names the disk in log lines.
func (d *shownDisk) String() string { return d.name }

const flatSuffix = "-flat.vmdk"

// newOpened makes the folder of a generation.
func newOpened(g *genDir, s *snapshot, shelf *shelf) *opened {
	repoID := shelf.src.ID()
	o := &opened{gen: g, attrs: s.attrs, byName: map[string]*content{}, weight: 4096}
	for i, f := range s.files {
		name := escapeName(f.name)
		if o.byName[name] != nil || name == partitionsName || i >= maxFolderFiles {
			shelf.log.Error("a file of the generation cannot be shown: its name is taken", "generation", g.ref.String(), "file", f.name)
			continue
		}
		c := &content{
			gen: g, name: name, ino: inoInGeneration(g.ref.sequence, uint64(placeFiles+i)),
			ident: identity(repoID, g.ref.String(), name), mtime: g.ref.time,
			size: int64(len(f.data)), data: f.data, stored: int64(len(f.data)),
			attrs: joined(s.attrs, f.attrs),
		}
		if f.disk != nil {
			d := &shownDisk{disk: f.disk, gen: g, attrs: s.attrs, asking: shelf.asking, index: len(o.disks), name: strings.TrimSuffix(name, flatSuffix), stored: f.stored}
			c.disk, c.size, c.stored = d, f.disk.Size(), f.stored
			o.disks = append(o.disks, d)
		}
		o.files = append(o.files, c)
		o.byName[name] = c
		o.weight += int64(len(f.data)) + 1024
	}
	return o
}

func joined(a, b []xattr) []xattr { return append(a[:len(a):len(a)], b...) }

// partitions returns the files that show the partitions of all disks. A disk
// whose partition table is lost is left out, for it must not hide the others.
func (o *opened) partitions(ctx context.Context, t *tree) ([]*content, error) {
	var all []*content
	for _, d := range o.disks {
		if d.index >= maxShownDisks {
			break
		}
		parts, err := d.partitions(ctx, t.src.ID())
		if errors.Is(err, errDamaged) {
			t.complaints.about(err, "partitions of a disk are not shown", "generation", o.gen.ref.String(), "disk", d.name)
		} else if err != nil {
			return nil, err
		}
		all = append(all, parts...)
	}
	return all, nil
}

// partitions reads the partition table once.
func (d *shownDisk) partitions(ctx context.Context, repoID string) ([]*content, error) {
	d.mu.Lock()
	parts := d.parts
	d.mu.Unlock()
	if parts != nil {
		return parts, nil
	}
	key := fmt.Sprintf("partitions %d %v", d.index, d.gen.ref)
	return once(ctx, d.asking, key, func(ctx context.Context) ([]*content, error) {
		found, err := parttable.Read(diskReader{ctx, d.disk}, d.Size())
		if err != nil {
			return nil, fmt.Errorf("disk %s of %v: %w", d.name, d.gen.ref, err)
		}
		parts := []*content{}
		for _, p := range found {
			if p.Number <= maxShownPartition {
				parts = append(parts, d.partition(repoID, p.Number, p.Offset, p.Length))
			}
		}
		if len(found) == 0 && d.Size() > 0 {
			parts = append(parts, d.partition(repoID, 0, 0, d.Size()))
		}
		d.mu.Lock()
		d.parts = parts
		d.mu.Unlock()
		return parts, nil
	})
}

func (d *shownDisk) partition(repoID string, number int, off, size int64) *content {
	name := d.name + ".img"
	if number > 0 {
		name = d.name + "-p" + strconv.Itoa(number) + ".img"
	}
	g := d.gen
	c := &content{
		gen: g, name: name, mtime: g.ref.time, size: size, disk: d, base: off, stored: -1,
		ino:   inoInGeneration(g.ref.sequence, placePartition|uint64(d.index)<<10|uint64(number)),
		ident: identity(repoID, g.ref.String(), partitionsName, name),
		attrs: joined(d.attrs, []xattr{
			{"partition.disk", d.name},
			{"partition.offset", strconv.FormatInt(off, 10)},
		}),
	}
	if size == d.Size() {
		c.stored = d.stored
	}
	return c
}

// diskReader is a disk as an io.ReaderAt.
type diskReader struct {
	ctx context.Context
	d   disk
}

func (r diskReader) ReadAt(p []byte, off int64) (int, error) {
	return r.d.ReadAtContext(r.ctx, p, off)
}

// shelf keeps generations opened, the least recently used ones going first.
// Files that are open keep theirs whatever the shelf does.
type shelf struct {
	src    source
	log    *slog.Logger
	asking *shared

	mu     sync.Mutex
	of     map[*genDir]*list.Element // of *opened
	order  *list.List                // most recent first
	weight int64
}

const (
	shelfPlaces = 256
	shelfWeight = 16 << 20
)

func newShelf(asking *shared, src source, log *slog.Logger) *shelf {
	return &shelf{src: src, log: log, asking: asking, of: map[*genDir]*list.Element{}, order: list.New()}
}

func (s *shelf) get(g *genDir) *opened {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.of[g]
	if e == nil {
		return nil
	}
	s.order.MoveToFront(e)
	return e.Value.(*opened)
}

func (s *shelf) put(o *opened) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[o.gen] = s.order.PushFront(o)
	s.weight += o.weight
	for s.order.Len() > 1 && (s.order.Len() > shelfPlaces || s.weight > shelfWeight) {
		last := s.order.Remove(s.order.Back()).(*opened)
		delete(s.of, last.gen)
		s.weight -= last.weight
	}
}

// open reads a generation's manifest, unless it is on the shelf.
func (s *shelf) open(ctx context.Context, g *genDir) (*opened, error) {
	if o := s.get(g); o != nil {
		return o, nil
	}
	return once(ctx, s.asking, fmt.Sprintf("open %d %v", g.ref.sequence, g.ref), func(ctx context.Context) (*opened, error) {
		if o := s.get(g); o != nil { // someone else was quicker
			return o, nil
		}
		snap, err := s.src.Open(ctx, g.ref)
		if err != nil {
			return nil, fmt.Errorf("open generation %v: %w", g.ref, err)
		}
		o := newOpened(g, snap, s)
		s.put(o)
		return o, nil
	})
}
