package index

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"sort"
	"sync/atomic"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

// segment is a file of records, as far as it is kept in memory.
type segment struct {
	file  string
	name  name
	bytes int64
	seal  seal
	footer

	broken atomic.Bool // a page failed: not to be merged
}

// tailSize is read at once from a file's end: trailer, and the footer of all but
// large segments.
const tailSize = 16 << 10

// openSegment reads header, trailer and footer.
func openSegment(fsys fsx.FS, dir string, n name, ring *keys.Ring) (*segment, error) {
	s := &segment{file: path.Join(dir, n.String()), name: n}
	f, err := fsys.Open(s.file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if s.bytes = fi.Size(); s.bytes < headerSize+trailerSize {
		return nil, fmt.Errorf("it has only %d bytes", s.bytes)
	}
	var h header
	if err := readAt(f, h[:], 0); err != nil {
		return nil, err
	}
	if err := h.check(ring.Repository(), n); err != nil {
		return nil, err
	}
	if s.seal, err = newSeal(ring, h); err != nil {
		return nil, err
	}
	tail := make([]byte, min(s.bytes, tailSize))
	tailAt := s.bytes - int64(len(tail))
	if err := readAt(f, tail, tailAt); err != nil {
		return nil, err
	}
	end, err := decodeTrailer(tail[len(tail)-trailerSize:], s.bytes)
	if err != nil {
		return nil, err
	}
	var sealed []byte
	if end.off >= tailAt {
		sealed = tail[end.off-tailAt:][:end.size]
	} else {
		sealed = make([]byte, end.size)
		if err := readAt(f, sealed, end.off); err != nil {
			return nil, err
		}
	}
	plain, err := s.seal.open(sealed, end.off, sealFooter)
	if err != nil {
		return nil, fmt.Errorf("its footer is not authentic: %w", err)
	}
	foot, err := decodeFooter(plain, end.off)
	if err != nil {
		return nil, err
	}
	s.footer = *foot
	return s, nil
}

// readAt fills b or fails.
func readAt(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(b), off, err)
}

// load reads and opens one page into buf.
func (s *segment) load(f *files, buf []byte, off int64, size int, what byte) ([]byte, error) {
	file, err := f.get(s.file)
	if err != nil {
		return nil, err
	}
	defer f.put(file)
	if err := readAt(file, buf[:size], off); err != nil {
		return nil, err
	}
	plain, err := s.seal.open(buf[:size], off, what)
	if err != nil {
		return nil, fmt.Errorf("the page at %d is not authentic: %w", off, err)
	}
	return plain, nil
}

// find collects the places of an id. What it reads stays in the cache.
func (s *segment) find(ctx context.Context, c *cache, f *files, id *block.ID, out []block.Location) ([]block.Location, error) {
	prefix := binary.BigEndian.Uint64(id[:])
	// The page before the first one whose fence is not smaller may end with the
	// id; further ones follow while their fence is the same.
	first := sort.Search(len(s.fences), func(i int) bool { return s.fences[i] >= prefix })
	group, passed := -1, false
	for p := max(0, first-1); p < len(s.fences) && s.fences[p] <= prefix; p++ {
		if g := p / groupPages; g != group {
			group = g
			off, size := s.filter(g)
			fp, err := c.get(ctx, pageKey{s.name, off}, &c.filters, func(buf []byte) ([]byte, error) {
				return s.load(f, buf, off, size, sealFilter)
			})
			if err != nil {
				return out, err
			}
			passed = filterHas(fp.bytes, id[:])
			c.release(fp)
		}
		if !passed {
			continue
		}
		off, size := s.page(p)
		rp, err := c.get(ctx, pageKey{s.name, off}, &c.record, func(buf []byte) ([]byte, error) {
			return s.load(f, buf, off, size, sealRecords)
		})
		if err != nil {
			return out, err
		}
		out, err = findInPage(rp.bytes, id, out)
		c.release(rp)
		if err != nil {
			return out, fmt.Errorf("the page at %d: %w", off, err)
		}
	}
	return out, nil
}

// findInPage collects the places of an id in a page of records.
func findInPage(b []byte, id *block.ID, out []block.Location) ([]block.Location, error) {
	n := len(b) / block.Size
	i := sort.Search(n, func(i int) bool { return bytes.Compare(b[i*block.Size:][:32], id[:]) >= 0 })
	for ; i < n && bytes.Equal(b[i*block.Size:][:32], id[:]); i++ {
		r, err := decodeRecord(b[i*block.Size:])
		if err != nil {
			return out, err
		}
		out = append(out, r.Location)
	}
	return out, nil
}

func decodeRecord(b []byte) (block.Record, error) {
	r, err := block.Decode(b)
	if err == nil && r.IsHole() {
		err = errors.New("a hole in the index")
	}
	return r, err
}

// scan yields a segment's records in order without using the cache, a few pages
// at a time.
type scan struct {
	s     *segment
	files *files
	p     int // the next page to read
	buf   []byte
	pages [][]byte // opened, not yet used up
}

const scanPages = 4

func (r *scan) next() ([]byte, error) {
	for len(r.pages) > 0 && len(r.pages[0]) == 0 {
		r.pages = r.pages[1:]
	}
	if len(r.pages) == 0 {
		if r.p == r.s.pages() {
			return nil, io.EOF
		}
		if err := r.fill(); err != nil {
			r.s.broken.Store(true)
			return nil, damaged(r.s.file, err)
		}
	}
	rec := r.pages[0][:block.Size]
	r.pages[0] = r.pages[0][block.Size:]
	return rec, nil
}

// fill reads the next pages of one group.
func (r *scan) fill() error {
	if r.buf == nil {
		r.buf = make([]byte, scanPages*pageSize)
	}
	off, _ := r.s.page(r.p)
	last := min(r.s.pages(), r.p+scanPages, (r.p/groupPages+1)*groupPages) - 1
	end, n := r.s.page(last)
	file, err := r.files.get(r.s.file)
	if err != nil {
		return err
	}
	err = readAt(file, r.buf[:int(end-off)+n], off)
	r.files.put(file)
	if err != nil {
		return err
	}
	r.pages = r.pages[:0]
	for p := r.p; p <= last; p++ {
		at, size := r.s.page(p)
		plain, err := r.s.seal.open(r.buf[at-off:][:size], at, sealRecords)
		if err != nil {
			return fmt.Errorf("the page at %d is not authentic: %w", at, err)
		}
		r.pages = append(r.pages, plain)
	}
	r.p = last + 1
	return nil
}

// verify reads all of a segment and checks everything that it promises.
func (s *segment) verify(ctx context.Context, f *files) error {
	if err := s.verifySum(ctx, f); err != nil {
		return err
	}
	var buf, prev []byte
	var filter []byte
	src := &scan{s: s, files: f}
	for i := int64(0); i < s.entries; i++ {
		if i%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		rec, err := src.next()
		if err != nil {
			return err
		}
		if _, err := decodeRecord(rec); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if bytes.Compare(prev, rec[:32]) > 0 {
			return fmt.Errorf("entry %d is out of order", i)
		}
		prev = append(prev[:0], rec[:32]...)
		if i%pageEntries == 0 && s.fences[i/pageEntries] != binary.BigEndian.Uint64(rec) {
			return fmt.Errorf("entry %d does not fit its page's fence", i)
		}
		if i%groupEntries == 0 {
			off, size := s.filter(int(i / groupEntries))
			if buf == nil {
				buf = make([]byte, pageSize)
			}
			if filter, err = s.load(f, buf, off, size, sealFilter); err != nil {
				return err
			}
		}
		if !filterHas(filter, rec) {
			return fmt.Errorf("entry %d is not in its group's filter", i)
		}
	}
	return nil
}

// verifySum checks the file's own checksum, for which no key is needed.
func (s *segment) verifySum(ctx context.Context, f *files) error {
	file, err := f.get(s.file)
	if err != nil {
		return err
	}
	defer f.put(file)
	sum := sha256.New()
	r := io.NewSectionReader(file, 0, s.bytes-sha256.Size)
	buf := make([]byte, 256<<10)
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		n, err := r.Read(buf)
		sum.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	want := make([]byte, sha256.Size)
	if err := readAt(file, want, s.bytes-sha256.Size); err != nil {
		return err
	}
	if !bytes.Equal(sum.Sum(nil), want) {
		return errors.New("the checksum does not fit")
	}
	return nil
}
