package backup

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"hikae/repo"
)

// uploadDisks sends all disks as files, a few at once.
func (r *restoring) uploadDisks(ctx context.Context) error {
	r.meter.begin(PhaseUpload, r.res.BytesCapacity, "")
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(targetsAtOnce)
	for i, d := range r.disks {
		g.Go(func() error {
			m := r.manifest.Disks[i]
			if err := r.uploadDisk(ctx, m.Name+"-flat.vmdk", m.Label, d); err != nil {
				return fmt.Errorf("%s (%s): %w", m.Label, m.Name, err)
			}
			return r.uploadSmall(ctx, m.Name+".vmdk", []byte(m.Descriptor))
		})
	}
	return g.Wait()
}

// uploadDisk sends one disk. A transfer that breaks starts again: the host takes
// whole files only.
func (r *restoring) uploadDisk(ctx context.Context, name, label string, d *repo.Disk) error {
	for attempt := 1; ; attempt++ {
		c := newContent(ctx, d, r.bufs, func(n int64) { r.meter.add(label, n) })
		err := r.Host.Upload(ctx, r.path(name), c, d.Size())
		sent := c.Close()
		r.sent(sent)
		if err == nil || ctx.Err() != nil || attempt == sendAttempts || !worthAnother(err) {
			return err
		}
		r.log.Warn("an upload broke, starting it again", "file", name, "after", sent, "error", err)
		r.meter.grow(sent)
		if err := r.Host.Delete(ctx, r.path(name)); err != nil {
			return err
		}
	}
}

// sent counts bytes of disks that went to the host.
func (r *restoring) sent(n int64) {
	r.meter.mu.Lock()
	r.res.BytesSent += n
	r.meter.mu.Unlock()
}
