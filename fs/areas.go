package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
)

// area is a part of a disk that is all hole, or all data. More data may follow
// a data area directly.
type area struct {
	start, end int64
	hole       bool
}

// areas remembers a few areas of a disk. Programs that copy files ask for the
// next hole over and over while they walk through one long stretch of data;
// without a memory each answer would be a walk to its end.
type areas struct {
	mu    sync.Mutex
	known [8]area
	next  int // the one to replace
}

func (a *areas) at(off int64) (area, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, k := range a.known {
		if k.start <= off && off < k.end {
			return k, true
		}
	}
	return area{}, false
}

// add remembers an area. It takes the place of one it continues.
func (a *areas) add(n area) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, k := range a.known {
		if k.end > k.start && k.hole == n.hole && k.start <= n.end && n.start <= k.end {
			a.known[i] = area{min(k.start, n.start), max(k.end, n.end), n.hole}
			return
		}
	}
	a.known[a.next] = n
	a.next = (a.next + 1) % len(a.known)
}

// find returns the area that off is in. Off is less than the size of the disk.
func (a *areas) find(ctx context.Context, d disk, off int64) (area, error) {
	if k, ok := a.at(off); ok {
		return k, nil
	}
	start, end, err := d.NextData(ctx, off)
	var n area
	switch {
	case errors.Is(err, io.EOF):
		n = area{off, d.Size(), true}
	case err != nil:
		return area{}, err
	case start > off:
		n = area{off, min(start, d.Size()), true}
	case end > off:
		n = area{off, min(end, d.Size()), false}
	default:
		return area{}, fmt.Errorf("data area %d to %d found after %d", start, end, off)
	}
	a.add(n)
	return n, nil
}

// seek is lseek(2) with SEEK_DATA or SEEK_HOLE in a window of a disk; off is
// relative to the window. Reading needs only the disk's map.
func (c *content) seek(ctx context.Context, off int64, whence uint32) (int64, error) {
	if off < 0 || off >= c.size {
		return 0, syscall.ENXIO
	}
	if c.disk == nil {
		if whence == seekHole {
			return c.size, nil
		}
		return off, nil
	}
	for pos := c.base + off; pos < c.base+c.size; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		k, err := c.disk.areas.find(ctx, c.disk, pos)
		if err != nil {
			return 0, fmt.Errorf("map of disk %s of %v: %w", c.disk.name, c.disk.of.gen.ref, err)
		}
		if k.hole == (whence == seekHole) {
			return pos - c.base, nil
		}
		pos = k.end
	}
	if whence == seekHole { // there is one behind the end of every file
		return c.size, nil
	}
	return 0, syscall.ENXIO
}

// From linux/fs.h.
const (
	seekData = 3
	seekHole = 4
)
