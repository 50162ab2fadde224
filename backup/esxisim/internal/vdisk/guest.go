package vdisk

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"hikae/backup/vmdk"
)

// ReadAt reads what the guest sees now.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.open(); err != nil {
		return 0, err
	}
	return d.chain.ReadAt(p, off)
}

// NextData finds the guest's first area at or after off that may hold data; io.EOF: nothing but zeros follows.
func (d *Disk) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.open(); err != nil {
		return 0, 0, err
	}
	return d.chain.NextData(ctx, off)
}

// WriteAt writes as the guest, to the running link. Offset and length need no alignment.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.beginWrite(off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	r := d.running
	if r.delta == nil {
		return r.file.WriteAt(p, off)
	}
	if err := r.delta.WriteAt(context.Background(), p, off, d.parent()); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Unmap is the guest giving back a range, which reads as zeros from then on.
func (d *Disk) Unmap(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.beginWrite(off, n); err != nil || n == 0 {
		return err
	}
	r := d.running
	if r.delta == nil {
		return clearRange(r.file, off, n, d.thin())
	}
	return r.delta.Zero(context.Background(), off, n, d.parent())
}

// parent is what a copy-up reads: untyped nil without links below.
func (d *Disk) parent() io.ReaderAt {
	if d.below == nil {
		return nil
	}
	return d.below
}

func (d *Disk) thin() bool { return d.links[0].desc.Value("ddb.thinProvisioned") == "1" }

// beginWrite gets the running link ready for a write and records it. Recorded before it is done, a write may be told that
// never happened, but never the other way round.
func (d *Disk) beginWrite(off, n int64) error {
	if err := d.open(); err != nil {
		return err
	}
	if off < 0 || n < 0 || off > d.size || n > d.size-off {
		return fmt.Errorf("%s: write of %d bytes at %d: the disk has %d", d.name, n, off, d.size)
	}
	if n == 0 {
		return nil
	}
	if d.running == nil {
		if err := d.start(); err != nil {
			return err
		}
	}
	if d.miss || d.blind {
		d.miss = false
		return nil
	}
	if t := d.running.track; t != nil {
		return t.mark(off, n)
	}
	return nil
}

// start opens the running link for writing, with a new content id: from now on its content is another.
func (d *Disk) start() (err error) {
	l := d.links[len(d.links)-1]
	f, err := os.OpenFile(l.extent(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	r := &running{file: f}
	defer func() {
		if err != nil {
			f.Close()
			if r.track != nil {
				r.track.file.Close()
			}
		}
	}()
	if l.format != FormatFlat {
		// The length now: it may have grown since the link was opened for reading.
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if r.delta, err = vmdk.OpenDelta(context.Background(), f, st.Size(), l.desc.CreateType); err != nil {
			return fmt.Errorf("%s: %w", l.extent(), err)
		}
	}
	if l.tracking != nil {
		if r.track, err = l.openTracker(); err != nil {
			return err
		}
	}
	desc := l.desc.Clone()
	if err := d.newContentID(desc); err != nil {
		return err
	}
	if err := writeDescriptor(l.path, desc); err != nil {
		return err
	}
	l.desc, d.running = desc, r
	if err = d.rebuild(); err != nil {
		d.running = nil
	}
	return err
}

// newContentID draws a CID and a longContentID that ends with it.
func (d *Disk) newContentID(desc *vmdk.Descriptor) error {
	var id [16]byte
	for {
		if _, err := io.ReadFull(d.o.Rand, id[:]); err != nil {
			return err
		}
		if cid := binary.BigEndian.Uint32(id[12:]); cid < vmdk.NoParent-1 && cid != desc.CID {
			desc.CID = cid
			break
		}
	}
	desc.SetValue("ddb.longContentID", hex.EncodeToString(id[:]))
	return nil
}

const (
	becomeStep  = 1 << 20  // read and compared at a time
	becomeBlock = 64 << 10 // written as a whole when anything in it differs
)

// Become makes the guest writes that turn the disk's first size bytes into r's, block by block, and nothing else; zeros are
// written as zeros. It returns the bytes written. If r has NextData(ctx, off), as *vmdk.Image has, ranges that are holes on both
// sides are not read.
func (d *Disk) Become(ctx context.Context, r io.ReaderAt, size int64) (written int64, err error) {
	if size < 0 || size > d.size {
		return 0, fmt.Errorf("%s: an image of %d bytes does not fit the disk of %d", d.name, size, d.size)
	}
	want, have := make([]byte, becomeStep), make([]byte, becomeStep)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return written, err
		}
		next, err := d.nextEither(ctx, r, off)
		if errors.Is(err, io.EOF) || err == nil && next >= size {
			return written, nil
		} else if err != nil {
			return written, err
		}
		off = max(off, next-next%becomeStep)
		n := min(becomeStep-off%becomeStep, size-off)
		if m, err := r.ReadAt(want[:n], off); int64(m) < n {
			return written, fmt.Errorf("%s: image at %d: %w", d.name, off, noEOF(err))
		}
		if m, err := d.ReadAt(have[:n], off); int64(m) < n {
			return written, fmt.Errorf("%s: read at %d: %w", d.name, off, noEOF(err))
		}
		for i := int64(0); i < n; i += becomeBlock {
			p := want[i:min(i+becomeBlock, n)]
			if bytes.Equal(p, have[i:i+int64(len(p))]) {
				continue
			}
			if _, err := d.WriteAt(p, off+i); err != nil {
				return written, err
			}
			written += int64(len(p))
		}
		off += n
	}
	return written, nil
}

func noEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// nextEither is the first place at or after off where the disk or r may have data.
func (d *Disk) nextEither(ctx context.Context, r io.ReaderAt, off int64) (int64, error) {
	f, ok := r.(interface {
		NextData(ctx context.Context, off int64) (start, end int64, err error)
	})
	if !ok {
		return off, nil
	}
	a, _, errA := f.NextData(ctx, off)
	if errA != nil && !errors.Is(errA, io.EOF) {
		return 0, errA
	}
	b, _, errB := d.NextData(ctx, off)
	switch {
	case errB != nil && !errors.Is(errB, io.EOF):
		return 0, errB
	case errA != nil && errB != nil:
		return 0, io.EOF
	case errA != nil:
		return b, nil
	case errB != nil:
		return a, nil
	}
	return min(a, b), nil
}
