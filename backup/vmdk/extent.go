package vmdk

import (
	"context"
	"fmt"
	"sort"
)

// kind says where the bytes of a segment are.
type kind uint8

const (
	fromParent kind = iota // this link does not hold them
	zero                   // they are zero
	data                   // in src at fileOff, as they are
	packed                 // in a compressed grain: the extent reads them itself
)

// segment is a run of an extent's bytes that are kept alike and together.
type segment struct {
	kind    kind
	n       int64
	src     *source
	fileOff int64
	ext     extent // for packed
	off     int64  // for packed: in ext
}

// extent is a run of a link's sectors in one file. Offsets count from where the extent begins.
type extent interface {
	capacity() int64
	// next returns the first segment of [off, off+n), as long as it is cheap to tell: 1 to n bytes.
	next(ctx context.Context, off, n int64) (segment, error)
	// prefetch loads the tables for [off, off+n) with few reads. It is a hint.
	prefetch(ctx context.Context, off, n int64)
	// readPacked reads from compressed grains.
	readPacked(ctx context.Context, p []byte, off int64) error
}

// noPacked is for extents whose segments are never packed.
type noPacked struct{}

func (noPacked) readPacked(context.Context, []byte, int64) error {
	panic("vmdk: this extent has no compressed grains") // a mistake in this package, whatever the file says
}

// flat holds every byte of its range.
type flat struct {
	noPacked
	src    *source
	start  int64
	length int64
}

func newFlat(src *source, start, length int64) (*flat, error) {
	if src.Size >= 0 && (start > src.Size || length > src.Size-start) {
		return nil, fmt.Errorf("%s: %w: the descriptor says %d bytes at %d, but the file has %d", src.name, ErrFormat, length, start,
			src.Size)
	}
	return &flat{src: src, start: start, length: length}, nil
}

func (f *flat) capacity() int64 { return f.length }

func (f *flat) next(_ context.Context, off, n int64) (segment, error) {
	return segment{kind: data, n: n, src: f.src, fileOff: f.start + off}, nil
}

func (f *flat) prefetch(context.Context, int64, int64) {}

// zeros is an extent of type ZERO.
type zeros struct {
	noPacked
	length int64
}

func (z zeros) capacity() int64 { return z.length }

func (z zeros) next(_ context.Context, _, n int64) (segment, error) {
	return segment{kind: zero, n: n}, nil
}

func (z zeros) prefetch(context.Context, int64, int64) {}

// link is all extents of one link, one behind the other.
type link struct {
	parts []extent
	ends  []int64 // where each part ends
}

func (l *link) add(e extent) {
	l.parts = append(l.parts, e)
	l.ends = append(l.ends, l.capacity()+e.capacity())
}

func (l *link) capacity() int64 {
	if len(l.ends) == 0 {
		return 0
	}
	return l.ends[len(l.ends)-1]
}

// at finds the part that holds off, and where it begins.
func (l *link) at(off int64) (extent, int64) {
	i := sort.Search(len(l.ends), func(i int) bool { return l.ends[i] > off })
	start := int64(0)
	if i > 0 {
		start = l.ends[i-1]
	}
	return l.parts[i], start
}

func (l *link) next(ctx context.Context, off, n int64) (segment, error) {
	e, start := l.at(off)
	s, err := e.next(ctx, off-start, min(n, e.capacity()-(off-start)))
	if err == nil && (s.n <= 0 || s.n > n) {
		panic("vmdk: an extent told of a segment outside what it was asked for")
	}
	return s, err
}

func (l *link) prefetch(ctx context.Context, off, n int64) {
	for n > 0 {
		e, start := l.at(off)
		m := min(n, e.capacity()-(off-start))
		e.prefetch(ctx, off-start, m)
		off, n = off+m, n-m
	}
}
