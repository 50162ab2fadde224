package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"
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

// area returns the area that off, which is on the disk, is in. Walking through
// the map of a large full disk takes a while, so the walk goes on for the next
// one who asks when this one can wait no longer.
func (d *shownDisk) area(ctx context.Context, off int64) (area, error) {
	if k, ok := d.areas.at(off); ok {
		return k, nil
	}
	key := fmt.Sprintf("area %d %d %v", off, d.index, d.gen.ref)
	return once(ctx, d.asking, key, func(ctx context.Context) (area, error) {
		start, end, err := d.NextData(ctx, off)
		var n area
		switch {
		case errors.Is(err, io.EOF):
			n = area{off, d.Size(), true}
		case err != nil:
			return area{}, fmt.Errorf("map of disk %s of %v: %w", d.name, d.gen.ref, err)
		case start > off:
			d.areas.add(area{start, min(end, d.Size()), false})
			n = area{off, min(start, d.Size()), true}
		case end > off:
			n = area{off, min(end, d.Size()), false}
		default:
			return area{}, fmt.Errorf("map of disk %s of %v: area %d to %d found after %d", d.name, d.gen.ref, start, end, off)
		}
		d.areas.add(n)
		return n, nil
	})
}

// walk calls f with the areas in [from, to), clipped, until it returns false.
func (d *shownDisk) walk(ctx context.Context, from, to int64, f func(area) bool) error {
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := d.area(ctx, from)
		if err != nil {
			return err
		}
		k.start, k.end = from, min(k.end, to)
		if !f(k) {
			return nil
		}
		from = k.end
	}
	return nil
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
	found := c.size
	err := c.disk.walk(ctx, c.base+off, c.base+c.size, func(k area) bool {
		if k.hole == (whence == seekHole) {
			found = k.start - c.base
		}
		return found == c.size
	})
	if err == nil && found == c.size && whence == seekData {
		err = syscall.ENXIO
	}
	return found, err // at the end of every file is a hole
}

// From linux/fs.h.
const (
	seekData = 3
	seekHole = 4
)

// mapTime is how long anybody waits for a walk through a disk's map. Whoever
// asked then gets an answer that is true but says less: that all is data.
const mapTime = 5 * time.Second

// countStored returns how many bytes of the file are not holes. For a partition
// that takes a walk over the disk's map, or over what lies outside when that is
// less: most disks have one large partition and little beside it.
func (c *content) countStored(ctx context.Context) (int64, error) {
	c.mu.Lock()
	n := c.stored
	c.mu.Unlock()
	if n >= 0 {
		return n, nil
	}
	n = 0
	count := func(k area) bool {
		if !k.hole {
			n += k.end - k.start
		}
		return true
	}
	var err error
	if end := c.base + c.size; c.size > c.disk.Size()/2 {
		if err = c.disk.walk(ctx, 0, c.base, count); err == nil {
			err = c.disk.walk(ctx, end, c.disk.Size(), count)
		}
		n = max(0, min(c.size, c.disk.stored-n))
	} else {
		err = c.disk.walk(ctx, c.base, end, count)
	}
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	c.stored = n
	c.mu.Unlock()
	return n, nil
}
