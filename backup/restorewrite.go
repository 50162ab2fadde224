package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"strings"

	"golang.org/x/sync/errgroup"

	"hikae/backup/esxi"
	"hikae/backup/vmdk"
	"hikae/repo"
)

// How disks are written over SSH.
const (
	// rangesAtOnce is a little more than the connections a host gives, so that
	// none of them waits for the next range to be read; the other buffers read
	// ahead.
	rangesAtOnce = 6
	// The host hashes stretches: one command for each costs more than the zeros in
	// short gaps, and hashing those shows that they are zeros.
	hashGap      = 1 << 20
	hashMost     = 64 << 20
	hashesAtOnce = 4
)

// written is a disk that lies on the host, on no VM yet.
type written struct {
	*esxi.DiskWriter
	name  string // for messages
	label string
	sums  checksums
}

// writeDisks makes all disks and writes their data.
func (r *restoring) writeDisks(ctx context.Context) error {
	r.meter.begin(PhaseUpload, r.res.BytesData, "")
	r.targets = make([]*written, len(r.disks))
	slots := make(chan struct{}, rangesAtOnce)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(targetsAtOnce)
	for i, d := range r.disks {
		g.Go(func() error {
			m := r.manifest.Disks[i]
			w := &written{name: fmt.Sprintf("%s (%s)", m.Label, m.Name), label: m.Label}
			err := r.createDisk(ctx, w, m.Name, d.Size(), r.kinds[i])
			if err == nil {
				err = r.writeDisk(ctx, w, d, slots)
				r.sent(w.BytesSent())
			}
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			r.targets[i] = w
			return nil
		})
	}
	return g.Wait()
}

// createDisk makes an empty disk, and finds out how the host can hash it.
func (r *restoring) createDisk(ctx context.Context, w *written, name string, size int64, kind esxi.Provisioning) error {
	err := r.again(ctx, name, func() (err error) {
		w.DiskWriter, err = r.Host.CreateDisk(ctx, r.path(name+".vmdk"), size, kind)
		if errors.Is(err, esxi.ErrExists) {
			// The command before was carried out and its answer was lost. The
			// folder is ours, so the disk is.
			err = r.Host.Delete(ctx, r.path(name+".vmdk"))
			if err == nil {
				err = r.Host.Delete(ctx, r.path(name+"-flat.vmdk"))
			}
			if err == nil {
				w.DiskWriter, err = r.Host.CreateDisk(ctx, r.path(name+".vmdk"), size, kind)
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	r.log.Debug("made a disk", "disk", name, "bytes", size, "provisioning", string(kind))
	if r.VerifyBlocks < 0 {
		return nil
	}
	if w.sums.hash, err = w.NewHash(ctx); errors.Is(err, esxi.ErrUnsupported) {
		return nil // a sample is read back later
	}
	return err
}

// writeDisk writes a disk's data: read ahead in order, written in any.
func (r *restoring) writeDisk(ctx context.Context, w *written, d *repo.Disk, slots chan struct{}) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		var walkErr error
		// The writes outlive the reading, and its context.
		err := stream(ctx, d, dataSteps(ctx, d, 0, false, &walkErr), r.bufs, func(reading context.Context, s step, data []byte, release func()) error {
			select {
			case slots <- struct{}{}:
			case <-reading.Done():
				release()
				return context.Cause(reading)
			}
			w.sums.add(s.Offset, data)
			g.Go(func() error {
				defer func() {
					release()
					<-slots
				}()
				n, err := w.WriteAtContext(ctx, data, s.Offset)
				r.meter.add(w.label, int64(n))
				r.log.Debug("wrote", "disk", w.label, "offset", s.Offset, "bytes", n, "error", err)
				return err
			})
			return nil
		})
		if walkErr != nil {
			err = walkErr
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	w.sums.flush()
	return nil
}

// finishDisks compares the host's hashes of all disks with what was sent, gives
// the disks the identity they had, and has the host look at them.
func (r *restoring) finishDisks(ctx context.Context) error {
	if err := r.compareHashes(ctx); err != nil {
		return err
	}
	for i, w := range r.targets {
		m := r.manifest.Disks[i]
		text, err := describe(w.Descriptor(), m.Descriptor)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		if err := r.uploadSmall(ctx, m.Name+".vmdk", text); err != nil {
			return err
		}
		if err := w.CheckDisk(ctx); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		r.log.Debug("the host has checked a disk", "disk", m.Name)
	}
	return nil
}

// compareHashes has the host hash every stretch that was written.
func (r *restoring) compareHashes(ctx context.Context) error {
	var total int64
	for _, w := range r.targets {
		if r.VerifyBlocks >= 0 && w.sums.hash == nil {
			r.warn("the host has no program to compute hashes with; a sample is read back instead")
			return nil
		}
		total += w.sums.total()
	}
	if r.VerifyBlocks < 0 {
		return nil
	}
	r.meter.begin(PhaseVerify, total, "")
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(hashesAtOnce)
	for _, w := range r.targets {
		for _, s := range w.sums.list {
			g.Go(func() error {
				sum, err := w.Hash(ctx, s.Offset, s.Length)
				if err != nil {
					return fmt.Errorf("%s: %w", w.name, err)
				}
				if !bytes.Equal(sum, s.sum[:len(sum)]) || len(sum) != w.sums.hash.Size() {
					return fmt.Errorf("%s: the host holds other bytes than were sent, in the %s from byte %d: %w", w.name, size(s.Length), s.Offset, ErrVerify)
				}
				r.meter.add(w.label, s.Length)
				return nil
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	r.res.BytesVerified += total
	r.hashed = true
	return nil
}

// checksums are the hashes of what is written to a disk, in ascending order of
// offsets. It is for one goroutine.
type checksums struct {
	hash hash.Hash // nil for none
	at   area      // the stretch being hashed
	list []checksum
}

// checksum is 48 bytes: a disk that could not be worse has one a MiB.
type checksum struct {
	area
	sum [maxSum]byte // the beginning of it, for shorter hashes
}

const maxSum = 32

var zeroes [64 << 10]byte

// add takes the next data.
func (c *checksums) add(off int64, data []byte) {
	if c.hash == nil {
		return
	}
	gap := off - c.at.End()
	if c.at.Length > 0 && (gap > hashGap || off+int64(len(data))-c.at.Offset > hashMost) {
		c.flush()
	}
	if c.at.Length == 0 {
		c.at = area{Offset: off}
		gap = 0
	}
	for ; gap > 0; gap -= min(gap, int64(len(zeroes))) {
		c.hash.Write(zeroes[:min(gap, int64(len(zeroes)))])
	}
	c.hash.Write(data)
	c.at.Length = off + int64(len(data)) - c.at.Offset
}

// flush ends the stretch being hashed.
func (c *checksums) flush() {
	if c.hash == nil || c.at.Length == 0 {
		return
	}
	s := checksum{area: c.at}
	copy(s.sum[:], c.hash.Sum(nil))
	c.list = append(c.list, s)
	c.hash.Reset()
	c.at = area{}
}

func (c *checksums) total() (n int64) {
	for _, s := range c.list {
		n += s.Length
	}
	return n
}

// describe is the descriptor of a disk that the host made, with what the guest
// and its owner knew the original by: identity, controller, geometry, VMware
// Tools. Files, provisioning and version stay the host's.
func describe(made *vmdk.Descriptor, original string) ([]byte, error) {
	was, err := vmdk.ParseDescriptor([]byte(original))
	if err != nil {
		return nil, err
	}
	for _, e := range was.DDB {
		for _, key := range []string{"ddb.uuid", "ddb.adapterType", "ddb.geometry.", "ddb.toolsVersion", "ddb.toolsInstallType"} {
			if e.Key == key || strings.HasSuffix(key, ".") && strings.HasPrefix(e.Key, key) {
				made.SetValue(e.Key, e.Value)
			}
		}
	}
	return made.Bytes(), nil
}

// provisioning is what a disk was: a descriptor tells thin from thick.
func provisioning(d *vmdk.Descriptor) esxi.Provisioning {
	if d.Value("ddb.thinProvisioned") == "1" {
		return esxi.Thin
	}
	return esxi.ThickLazy
}
