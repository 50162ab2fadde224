package fs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A fakeSource shows generations that are described in JSON, so that a test can
// hand them to the process that mounts.
type fakeSource struct {
	mu   sync.Mutex
	gens []fakeGeneration

	stuck   atomic.Pointer[chan struct{}] // closed when the storage answers again
	refused atomic.Bool                   // the storage fails every request
	waiting atomic.Int64                  // requests that wait for it
	opens   atomic.Int64                  // generations opened
	lists   atomic.Int64                  // directories listed
	disks   sync.Map                      // string → *fakeDisk, for counters
}

type fakeGeneration struct {
	Host, VM string
	Sequence uint64
	Time     time.Time
	Disks    []fakeDiskSpec
	Files    map[string]string
	NVRAM    int // size of one more file
}

type fakeDiskSpec struct {
	Name    string // base of the file names
	Size    int64
	Seed    uint64
	Density int           // of data blocks, in 256; ignored with Path
	Path    string        // a raw image to show instead
	Bad     int64         // offset from which one block is damaged; 0 for none
	Delay   time.Duration // of every read that was not prefetched
	Flat    bool          // all memory: one block repeated, for benchmarks
}

const fakeBlock = 128 << 10

func (s *fakeSource) ID() string { return "test" }

func (s *fakeSource) wait(ctx context.Context) error {
	if p := s.stuck.Load(); p != nil {
		s.waiting.Add(1)
		defer s.waiting.Add(-1)
		<-*p // like a dead network mount: not even the context helps
	}
	if s.refused.Load() {
		return fmt.Errorf("read packs/ab/cdef: %w", unix.EIO)
	}
	return ctx.Err()
}

func (s *fakeSource) VMs(ctx context.Context) ([]vmID, error) {
	s.lists.Add(1)
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []vmID
	for _, g := range s.gens {
		if id := (vmID{g.Host, g.VM}); !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func (g *fakeGeneration) ref() ref {
	return ref{vmID{g.Host, g.VM}, g.Sequence, g.Time, g.Time.UTC().Format("2006-01-02T15-04-05Z"), false}
}

func (s *fakeSource) Refs(ctx context.Context, vm vmID) ([]ref, error) {
	s.lists.Add(1)
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var refs []ref
	for _, g := range s.gens {
		if g.ref().vm == vm {
			refs = append(refs, g.ref())
		}
	}
	if refs == nil {
		return nil, fmt.Errorf("%v: %w", vm, errGone)
	}
	return refs, nil
}

func (s *fakeSource) add(g fakeGeneration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gens = append(s.gens, g)
}

func (s *fakeSource) forget(sequence uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gens = slices.DeleteFunc(s.gens, func(g fakeGeneration) bool { return g.Sequence == sequence })
}

func (s *fakeSource) Verified(ctx context.Context, r ref) (time.Time, error) {
	return time.Time{}, s.wait(ctx)
}

func (s *fakeSource) Open(ctx context.Context, r ref) (*snapshot, error) {
	s.opens.Add(1)
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.gens, func(g fakeGeneration) bool { return g.ref() == r })
	if i < 0 {
		return nil, fmt.Errorf("%v: %w", r, errGone)
	}
	g := s.gens[i]
	snap := &snapshot{attrs: []xattr{{"generation", r.String()}, {"consistency", "crash"}}}
	for _, spec := range g.Disks {
		d, err := s.disk(r, spec)
		if err != nil {
			return nil, err
		}
		descriptor := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\n# Extent description\nRW %d VMFS \"%s-flat.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\nddb.virtualHWVersion = \"13\"\n", spec.Size/512, spec.Name)
		attrs := []xattr{{"change_id", "52 00/" + spec.Name}}
		snap.files = append(snap.files,
			file{name: spec.Name + ".vmdk", data: []byte(descriptor), attrs: attrs},
			file{name: spec.Name + flatSuffix, disk: d, stored: d.stored(), attrs: attrs})
	}
	names := make([]string, 0, len(g.Files))
	for name := range g.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	if g.NVRAM > 0 {
		snap.files = append(snap.files, file{name: "v.nvram", data: make([]byte, g.NVRAM)})
	}
	for _, name := range names {
		snap.files = append(snap.files, file{name: name, data: []byte(g.Files[name])})
	}
	return snap, nil
}

func (s *fakeSource) Space(ctx context.Context) (total, free uint64, err error) {
	return 1000 << 30, 400 << 30, s.wait(ctx)
}

func (s *fakeSource) disk(r ref, spec fakeDiskSpec) (*fakeDisk, error) {
	key := r.String() + "/" + spec.Name
	if d, ok := s.disks.Load(key); ok {
		return d.(*fakeDisk), nil
	}
	d := &fakeDisk{spec: spec, src: s, seen: map[int64]bool{}}
	if spec.Path != "" {
		f, err := os.Open(spec.Path)
		if err != nil {
			return nil, err
		}
		d.file = f
	}
	s.disks.Store(key, d)
	return d, nil
}

// fakeDisk is a disk whose content is a function of its seed, so that terabytes
// cost nothing; or a file.
type fakeDisk struct {
	spec fakeDiskSpec
	src  *fakeSource
	file *os.File

	reads, ahead, steps atomic.Int64 // bytes read, bytes prefetched, map lookups
	mu                  sync.Mutex
	seen                map[int64]bool // blocks prefetched
}

func mix(a, b uint64) uint64 {
	x := a*0x9e3779b97f4a7c15 ^ b*0xc2b2ae3d27d4eb4f
	x ^= x >> 29
	x *= 0xbf58476d1ce4e5b9
	return x ^ x>>32
}

func (d *fakeDisk) Size() int64 { return d.spec.Size }

// isData says whether a block is data. Density 0 is a disk of two blocks of
// data, one at its start and one in its middle.
func (s *fakeDiskSpec) isData(block int64) bool {
	if s.Density == 0 {
		return block == 0 || block == s.Size/fakeBlock/2
	}
	return int(mix(s.Seed, uint64(block))&255) < s.Density
}

// fill writes what the disk holds from off on.
func (s *fakeDiskSpec) fill(p []byte, off int64) {
	var word [8]byte
	for len(p) > 0 {
		block := off / fakeBlock
		n := int(min(int64(len(p)), (block+1)*fakeBlock-off))
		if !s.isData(block) {
			clear(p[:n])
			p, off = p[n:], off+int64(n)
			continue
		}
		for end := off + int64(n); off < end; {
			k := 8
			if off&7 == 0 && end-off >= 8 {
				binary.LittleEndian.PutUint64(p, mix(s.Seed, uint64(off)>>3))
			} else {
				binary.LittleEndian.PutUint64(word[:], mix(s.Seed, uint64(off)>>3))
				k = copy(p[:min(int64(len(p)), end-off)], word[off&7:])
			}
			p, off = p[k:], off+int64(k)
		}
	}
}

var flatBlock = make([]byte, fakeBlock)

func (d *fakeDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.src.wait(ctx); err != nil {
		return 0, err
	}
	if off < 0 || off+int64(len(p)) > d.spec.Size {
		return 0, errors.New("outside of the disk")
	}
	if b := d.spec.Bad; b > 0 && off < b+fakeBlock && off+int64(len(p)) > b {
		return 0, fmt.Errorf("%w: pack 00000000000000ab, offset 4711", errDamaged)
	}
	d.reads.Add(int64(len(p)))
	if d.spec.Delay > 0 {
		time.Sleep(d.spec.Delay * time.Duration(d.cold(off, int64(len(p)))))
	}
	switch {
	case d.file != nil:
		return d.file.ReadAt(p, off)
	case d.spec.Flat:
		for i := 0; i < len(p); i += copy(p[i:], flatBlock) {
		}
	default:
		d.spec.fill(p, off)
	}
	return len(p), nil
}

// copied is a loan of bytes that nobody else has.
type copied [][]byte

func (c copied) Parts() [][]byte { return c }
func (c copied) Return()         {}

func (d *fakeDisk) Lend(ctx context.Context, off, n int64) (loan, error) {
	if d.spec.Flat && d.spec.Delay == 0 && n%fakeBlock == 0 {
		return copied(slices.Repeat([][]byte{flatBlock}, int(n/fakeBlock))), d.src.wait(ctx)
	}
	p := make([]byte, n)
	k, err := d.ReadAtContext(ctx, p, off)
	return copied{p[:k]}, err
}

// cold counts the blocks of an area that nobody prefetched, and marks them.
func (d *fakeDisk) cold(off, n int64) (cold int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for b := off / fakeBlock; b*fakeBlock < off+n; b++ {
		if !d.seen[b] {
			d.seen[b] = true
			cold++
		}
	}
	return cold
}

func (d *fakeDisk) Prefetch(off, n int64) {
	d.ahead.Add(n)
	if d.spec.Delay > 0 {
		d.cold(off, n)
	}
}

func (d *fakeDisk) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	if err := d.src.wait(ctx); err != nil {
		return 0, 0, err
	}
	d.steps.Add(1)
	if d.file != nil {
		return fileData(d.file, off, d.spec.Size)
	}
	if d.spec.Flat {
		return off, d.spec.Size, nil
	}
	if d.spec.Density == 0 {
		for _, b := range []int64{0, d.spec.Size / fakeBlock / 2} {
			if off < (b+1)*fakeBlock {
				return max(off, b*fakeBlock), min((b+1)*fakeBlock, d.spec.Size), nil
			}
		}
		return 0, 0, io.EOF
	}
	for b := off / fakeBlock; off < d.spec.Size && b*fakeBlock < d.spec.Size; b++ {
		if d.spec.isData(b) { // one block at a time: areas may adjoin
			return max(off, b*fakeBlock), min((b+1)*fakeBlock, d.spec.Size), nil
		}
	}
	return 0, 0, io.EOF
}

func fileData(f *os.File, off, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	} else if err != nil {
		return 0, 0, err
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, err
	}
	return start, min(end, size), nil
}

// stored counts the bytes that are not holes.
func (d *fakeDisk) stored() (n int64) {
	if d.spec.Flat {
		return d.spec.Size
	}
	for off := int64(0); off < d.spec.Size; {
		var start, end int64
		var err error
		if d.file != nil {
			start, end, err = fileData(d.file, off, d.spec.Size)
		} else if d.spec.Density == 0 {
			return 2 * fakeBlock
		} else {
			var b int64
			for b = off / fakeBlock; b*fakeBlock < d.spec.Size && !d.spec.isData(b); b++ {
			}
			start, end = b*fakeBlock, min((b+1)*fakeBlock, d.spec.Size)
			if start >= d.spec.Size {
				err = io.EOF
			}
		}
		if err != nil {
			return n
		}
		n, off = n+end-start, end
	}
	return n
}

func testTime(day int) time.Time {
	return time.Date(2026, 11, day, 2, 0, 0, 0, time.UTC)
}

// baseName is the folder name of testTime(day).
func baseName(day int) string {
	return strings.ReplaceAll(testTime(day).Format("2006-01-02T15:04:05Z"), ":", "-")
}
