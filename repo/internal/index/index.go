package index

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"sync"
	"syscall"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

// ErrDamaged says that a segment is not what was written. It costs
// deduplication until the index is rebuilt, nothing else.
var ErrDamaged = errors.New("damaged index segment")

func damaged(file string, err error) error {
	if errors.Is(err, ErrDamaged) {
		return err
	}
	return fmt.Errorf("%s: %w: %w", file, ErrDamaged, err)
}

// Options of an index. The zero value is good.
type Options struct {
	// CacheBytes bounds the cache of pages; 0 is 48 MiB, which holds the filters
	// of 34 million entries. At least 256 KiB is used.
	CacheBytes int64
	// Logger is told of damage, once for each file; nil: nobody is.
	Logger *slog.Logger
	// TempName makes a name that nobody has used for a file being written, in a
	// directory that exists; nil: random names in tmp/.
	TempName func() string
}

// Index finds where ids were put. All methods may be used by many goroutines.
type Index struct {
	fsys  fsx.FS
	dir   string
	ring  *keys.Ring
	opt   Options
	cache *cache
	files files

	flushing sync.Mutex // one Flush at a time
	changing sync.Mutex // held while the set of segments changes

	mu         sync.RWMutex // guards what follows; never held while storage is used
	pending    *batch
	flushed    *batch     // on its way to storage, else nil
	late       bool       // the last one did not get there
	live       []*segment // newest first; the slice is replaced, never changed
	names      []name     // all segments' files that were there at the last listing
	superseded []string
	damage     map[string]error
	madeDir    bool
}

// SegmentInfo describes a segment.
type SegmentInfo struct {
	File     string
	Entries  int64
	Bytes    int64
	Sequence uint64
	Epoch    uint32
}

// Open reads the footers of the segments in dir, largest first, passing over what
// is superseded. A segment that cannot be read is reported by Damaged and to the
// log, and left out. A directory that is not there is an empty index.
func Open(ctx context.Context, fsys fsx.FS, dir string, ring *keys.Ring, opt Options) (*Index, error) {
	if opt.CacheBytes == 0 {
		opt.CacheBytes = 48 << 20
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.TempName == nil {
		opt.TempName = func() string {
			r := random32()
			return "tmp/index-" + hex.EncodeToString(r[:8])
		}
	}
	x := &Index{
		fsys: fsys, dir: dir, ring: ring, opt: opt, cache: newCache(opt.CacheBytes),
		files: files{fsys: fsys, max: 64, open: map[string]*openFile{}}, pending: newBatch(), damage: map[string]error{},
	}
	return x, x.Reload(ctx)
}

func random32() (b [32]byte) {
	_, _ = rand.Read(b[:]) // never fails: the program ends if the system has no randomness
	return b
}

// Close closes files. What was added and not flushed is lost.
func (x *Index) Close() error {
	x.files.closeAll()
	return nil
}

// Reload takes up segments that others published and lets go of those that are
// superseded or gone. Segments that could not be opened are tried again.
func (x *Index) Reload(ctx context.Context) error {
	x.changing.Lock()
	defer x.changing.Unlock()
	return x.reload(ctx)
}

func (x *Index) reload(ctx context.Context) error {
	x.mu.RLock()
	known := make(map[name]*segment, len(x.live))
	for _, s := range x.live {
		known[s.name] = s
	}
	x.mu.RUnlock()
	for try := 0; ; try++ {
		v, err := x.list(ctx, known, try < 3)
		if errors.Is(err, errVanished) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read the index: %w", err)
		}
		x.mu.Lock()
		x.live, x.names, x.superseded = v.live, v.names, v.superseded
		old := x.damage
		for _, s := range v.live {
			if err := old[s.file]; err != nil && s.broken.Load() {
				v.damage[s.file] = err
			}
		}
		x.damage = v.damage
		x.mu.Unlock()
		for file, err := range v.damage {
			if old[file] == nil {
				x.warn(file, err)
			}
		}
		return nil
	}
}

// errVanished says that a file went away between listing and opening: somebody
// deleted it because another one, perhaps not in our list, supersedes it.
var errVanished = errors.New("a segment vanished")

// view is what a listing of the directory came to.
type view struct {
	live       []*segment
	names      []name
	superseded []string
	damage     map[string]error
}

func (x *Index) list(ctx context.Context, known map[name]*segment, again bool) (*view, error) {
	entries, err := x.fsys.ReadDir(x.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	type candidate struct {
		name name
		size int64
	}
	var all []candidate
	v := &view{damage: map[string]error{}}
	for _, e := range entries {
		n, ok := parseName(e.Name())
		if !ok {
			continue // the lock, or what a server left behind
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			v.damage[path.Join(x.dir, e.Name())] = damaged(path.Join(x.dir, e.Name()), err)
			continue
		}
		all = append(all, candidate{n, fi.Size()})
		v.names = append(v.names, n)
	}
	// The largest names most of those that need not be opened.
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(b.size, a.size), bytes.Compare(a.name[:], b.name[:]))
	})
	dead := map[name]bool{}
	var read []*segment
	for _, c := range all {
		if dead[c.name] {
			continue
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		s := known[c.name]
		if s == nil {
			s, err = openSegment(x.fsys, x.dir, c.name, x.ring)
			if errors.Is(err, fs.ErrNotExist) && again {
				return nil, errVanished
			}
			if err != nil {
				file := path.Join(x.dir, c.name.String())
				v.damage[file] = damaged(file, err)
				continue
			}
		}
		read = append(read, s)
		for _, n := range s.superseded {
			if n != s.name {
				dead[n] = true
			}
		}
	}
	for _, s := range read {
		if !dead[s.name] {
			v.live = append(v.live, s)
		}
	}
	sortLive(v.live)
	for _, n := range v.names {
		if dead[n] {
			file := path.Join(x.dir, n.String())
			v.superseded = append(v.superseded, file)
			delete(v.damage, file) // a larger one, opened before what supersedes it
		}
	}
	return v, nil
}

// sortLive puts the newest first.
func sortLive(live []*segment) {
	slices.SortFunc(live, func(a, b *segment) int {
		return cmp.Or(cmp.Compare(b.sequence, a.sequence), bytes.Compare(a.name[:], b.name[:]))
	})
}

// Lookup offers the places of an id to accept, newest first, until it accepts
// one; nil accepts any. The error is the context's, never damage: what cannot be
// read is not found, and Damaged tells. accept is called without any lock held.
func (x *Index) Lookup(ctx context.Context, id block.ID, accept func(block.Location) bool) (bool, error) {
	var room [4]block.Location
	x.mu.RLock()
	out := x.pending.find(id, room[:0])
	if x.flushed != nil {
		out = x.flushed.find(id, out)
	}
	live := x.live
	x.mu.RUnlock()
	for i := 0; ; i++ {
		for _, l := range out {
			if accept == nil || accept(l) {
				return true, nil
			}
		}
		if i == len(live) {
			return false, nil
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
		var err error
		out, err = live[i].find(ctx, x.cache, &x.files, &id, out[:0])
		if err != nil {
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			x.report(live[i], err)
		}
	}
}

// report remembers that a segment's page could not be read. One whose file is gone
// was superseded meanwhile: who misses something has to reload, and then it is no
// longer in use.
func (x *Index) report(s *segment, err error) {
	s.broken.Store(true)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESTALE) {
		x.opt.Logger.Debug("an index segment is gone", "file", s.file, "error", err)
		return
	}
	x.mu.Lock()
	known := x.damage[s.file] != nil
	if !known {
		x.damage[s.file] = damaged(s.file, err)
	}
	x.mu.Unlock()
	if !known {
		x.warn(s.file, err)
	}
}

func (x *Index) warn(file string, err error) {
	x.opt.Logger.Warn("an index segment cannot be read: blocks it knows are stored again; rebuild the index from the packs",
		"file", file, "error", err)
}

// Damaged lists what could not be read so far, sorted by file. Each error is
// ErrDamaged and names its file.
func (x *Index) Damaged() []error {
	x.mu.RLock()
	defer x.mu.RUnlock()
	files := make([]string, 0, len(x.damage))
	for f := range x.damage {
		files = append(files, f)
	}
	slices.Sort(files)
	list := make([]error, len(files))
	for i, f := range files {
		list[i] = x.damage[f]
	}
	return list
}

// Segments describes the segments in use, newest first.
func (x *Index) Segments() []SegmentInfo {
	x.mu.RLock()
	defer x.mu.RUnlock()
	list := make([]SegmentInfo, len(x.live))
	for i, s := range x.live {
		list[i] = s.info()
	}
	return list
}

func (s *segment) info() SegmentInfo {
	return SegmentInfo{File: s.file, Entries: s.entries, Bytes: s.bytes, Sequence: s.sequence, Epoch: s.seal.header.epoch()}
}

// Superseded lists, sorted, the files that merged segments have made superfluous.
// They may be deleted.
func (x *Index) Superseded() []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return slices.Clone(x.superseded)
}

// Each calls fn for every record in the segments, sorted by id, the newest of one
// id first, none twice. It does not see what is not flushed. Its memory is 64 KiB
// for each segment. Here damage is an error, for a caller who needs all of them.
func (x *Index) Each(ctx context.Context, fn func(block.Record) error) error {
	x.mu.RLock()
	live := x.live
	files := make([]string, 0, len(x.damage))
	for f := range x.damage {
		files = append(files, f)
	}
	x.mu.RUnlock()
	if len(files) > 0 {
		return errors.Join(x.Damaged()...)
	}
	m, err := x.mergeOf(live)
	if err != nil {
		return err
	}
	var same []byte
	for n := 0; ; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		b, err := m.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		r, err := decodeRecord(b)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if len(same) > 0 && !bytes.Equal(same[:32], b[:32]) {
			same = same[:0]
		}
		if seen(same, b) {
			continue
		}
		same = append(same, b...)
		if err := fn(r); err != nil {
			return err
		}
	}
}

// Verify reads all of a segment in use and checks its checksum, every seal, the
// order, the fences and the filters. file is as in SegmentInfo.
func (x *Index) Verify(ctx context.Context, file string) error {
	x.mu.RLock()
	i := slices.IndexFunc(x.live, func(s *segment) bool { return s.file == file })
	live, known := x.live, x.damage[file]
	x.mu.RUnlock()
	if i < 0 {
		if known != nil {
			return known
		}
		return fmt.Errorf("%s: %w: no such segment is in use", file, fs.ErrNotExist)
	}
	err := live[i].verify(ctx, &x.files)
	if err != nil && ctx.Err() == nil {
		err = damaged(file, err)
		x.report(live[i], err)
	}
	return err
}
