package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"hikae/backup/esxi"
)

// verify reads a sample of every restored disk back and compares it with the
// generation by id. The host lets nobody but a VM's owner read its running
// links, so the sample is read as a backup reads: below a snapshot, which also
// shows that the host can use the VM. It goes again in every ending.
func (r *restoring) verify(ctx context.Context) (err error) {
	if r.VerifyBlocks < 0 || len(r.disks) == 0 {
		return nil
	}
	r.meter.begin(PhaseVerify, int64(len(r.disks))*int64(r.VerifyBlocks+2)*verifyBlock, "")
	id := newRunID()
	e := &entry{Snapshot: snapshotPrefix + id}
	if r.State != "" {
		if e, err = writeEntry(r.State, entry{
			Run: id, Host: r.HostName, VM: r.Name, VMID: r.vm.ID, Snapshot: snapshotPrefix + id, Created: r.now().UTC(), PID: os.Getpid(),
		}); err != nil {
			return err
		}
	}
	var snap *esxi.Snapshot
	defer func() {
		err = errors.Join(err, removeSnapshot(ctx, r.Host, r.HostName, r.vm, snap, e, func() {}))
	}()
	make, cancel := context.WithTimeout(context.WithoutCancel(ctx), createLimit)
	defer cancel()
	description := fmt.Sprintf("made by hikae at %s to check a restored VM; removed at once", r.now().UTC().Format(time.RFC3339))
	if snap, err = r.Host.CreateSnapshot(make, r.vm, snapshotPrefix+id, description, false); err != nil {
		return err
	}
	for _, d := range snap.Disks {
		if err := r.verifyDisk(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// verifyDisk compares one disk, found by the name of its descriptor.
func (r *restoring) verifyDisk(ctx context.Context, d esxi.Disk) error {
	n := -1
	for i, m := range r.manifest.Disks {
		if d.Unsupported == "" && len(d.Chain) > 0 && d.Chain[0] == r.path(m.Name+".vmdk") {
			n = i
		}
	}
	if n < 0 {
		return fmt.Errorf("the restored VM has a disk %v that does not come from the generation: %w", d.Chain, ErrVerify)
	}
	m, want := r.manifest.Disks[n], r.disks[n]
	if d.Capacity != want.Size() {
		return fmt.Errorf("%s (%s) has %d bytes on the host and %d in the generation: %w", m.Label, m.Name, d.Capacity, want.Size(), ErrVerify)
	}
	reader, err := r.Host.OpenDisk(ctx, d)
	if err != nil {
		return err
	}
	defer func() { _ = reader.Close() }()
	p := &diskPlan{disk: d, parent: want, block: verifyBlock, src: reader}
	sample, err := choose(ctx, p, r.VerifyBlocks)
	if err != nil {
		return err
	}
	ends := leftOut(nil, verifyBlock, d.Capacity) // partition tables live at both ends
	sample = append(sample, ends.at(0), ends.at(ends.n-1))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, a := range sample {
		g.Go(func() error {
			buf := make([]byte, a.Length)
			if err := readFull(ctx, reader, buf, a.Offset); err != nil {
				return err
			}
			same, err := want.Matches(ctx, a.Offset, buf)
			if err == nil && !same {
				err = fmt.Errorf("%s (%s) reads back other bytes than were sent, at byte %d: %w", m.Label, m.Name, a.Offset, ErrVerify)
			}
			if err == nil {
				p.audited.Add(a.Length)
				r.meter.add(m.Label, a.Length)
			}
			return err
		})
	}
	err = g.Wait()
	r.res.BytesVerified += p.audited.Load()
	return err
}
