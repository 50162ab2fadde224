package esxi

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/types"
)

// CreateSnapshot freezes vm's disks and tells what was frozen. name must be
// unique in the VM: when the host's answer is lost, the snapshot is looked up
// by it. When CreateSnapshot fails, a snapshot of that name may exist all the
// same; FindSnapshots tells.
func (h *Host) CreateSnapshot(ctx context.Context, vm *VM, name, description string, quiesce bool) (*Snapshot, error) {
	what := fmt.Sprintf("create snapshot %s of %s", name, vm.Name)
	var id string
	err := h.change(ctx, func(c control) (err error) {
		id, err = c.createSnapshot(ctx, vm.ID, escapedName(name), description, quiesce)
		return err
	})
	if isLost(err) && ctx.Err() == nil {
		h.log.Info("the answer to a snapshot was lost, looking for it", "host", h.name, "vm", vm.Name, "snapshot", name, "error", err)
		found, ferr := h.FindSnapshots(ctx, vm, name)
		if ferr != nil {
			return nil, ferr
		}
		if len(found) == 1 {
			id, err = found[0].ID, nil
		}
	}
	if err != nil {
		return nil, h.explain(ctx, what, err)
	}
	return h.Snapshot(ctx, vm, id)
}

// Snapshot loads one existing snapshot of vm with the disks that it froze.
func (h *Host) Snapshot(ctx context.Context, vm *VM, id string) (*Snapshot, error) {
	what := "look at the snapshot of " + vm.Name
	now, err := h.refresh(ctx, vm.ID)
	if err != nil {
		return nil, h.explain(ctx, what, err)
	}
	i := slices.IndexFunc(now.Snapshots, func(s SnapshotInfo) bool { return s.ID == id })
	if i < 0 {
		return nil, errf(ErrNotFound, nil, "%s: %s: it is not in the VM's tree any more", h.name, what)
	}
	frozen, err := h.inv.snapshotDisks(ctx, now, id)
	if err != nil {
		return nil, h.explain(ctx, what, err)
	}
	s := &Snapshot{ID: id, Name: now.Snapshots[i].Name, VM: *now, Quiesced: now.Snapshots[i].Quiesced, Disks: frozen}
	for i := range s.Disks {
		if err := freeze(&s.Disks[i], now.Disks); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", h.name, what, err)
		}
	}
	return s, nil
}

// freeze marks a snapshot's disk as readable after proving that the VM writes
// elsewhere: the link that is running now must not be among its links.
func freeze(d *Disk, running []Disk) error {
	if d.Unsupported != "" {
		return nil
	}
	for _, r := range running {
		if len(r.Chain) == 0 {
			continue
		}
		top := r.Chain[len(r.Chain)-1]
		if slices.Contains(d.Chain, top) {
			return fmt.Errorf("%s still writes to %s after the snapshot; it is not frozen", d.Label, top)
		}
		// The snapshot's own record may leave out what lies below; the running
		// disk's does not.
		if r.Key == d.Key && len(d.Chain) == 1 {
			if i := slices.Index(r.Chain, d.Chain[0]); i > 0 {
				d.Chain = slices.Clone(r.Chain[:i+1])
			}
		}
	}
	d.frozen = true
	return nil
}

// FindSnapshots lists vm's snapshots called name, once no snapshot is being
// made any more: one whose creation outlived the call that asked for it is
// found too.
func (h *Host) FindSnapshots(ctx context.Context, vm *VM, name string) ([]SnapshotInfo, error) {
	what := fmt.Sprintf("look for snapshots of %s", vm.Name)
	if err := h.settle(ctx, vm.ID, "createSnapshot"); err != nil {
		return nil, h.explain(ctx, what, err)
	}
	now, err := h.refresh(ctx, vm.ID)
	if err != nil {
		return nil, h.explain(ctx, what, err)
	}
	return slices.DeleteFunc(now.Snapshots, func(s SnapshotInfo) bool { return s.Name != name }), nil
}

// RemoveSnapshot removes one snapshot, keeps its children, and returns when its
// links are merged. A snapshot that is gone is no error, so the call can be
// repeated after any failure. Merging goes on on the host when ctx ends.
func (h *Host) RemoveSnapshot(ctx context.Context, id string) error {
	whose := h.ownerOf(ctx, id)
	what, vm := "remove snapshot "+id, whose.vm
	if whose.name != "" {
		what = fmt.Sprintf("remove snapshot %s of %s", whose.name, whose.vmName)
	}
	for try := 1; ; try++ {
		err := h.change(ctx, func(c control) error { return c.removeSnapshot(ctx, id, whose) })
		if err == nil || gone(err) || fault.Is(err, &types.NotFound{}) {
			break
		}
		busy := fault.Is(err, &types.TaskInProgress{})
		if ctx.Err() != nil || !busy && !isLost(err) && !transient(err) || try >= h.t.tries {
			return h.explain(ctx, what, err)
		}
		h.log.Debug("removing a snapshot again", "host", h.name, "snapshot", id, "try", try, "error", err)
		if err := sleep(ctx, jitter(h.t.pause, h.t.longest, try)); err != nil {
			return h.explain(ctx, what, err)
		}
		if vm != "" {
			// When even this cannot be asked, the next removal tells why.
			if err := h.settle(ctx, vm, "removeSnapshot"); errors.Is(err, ErrBusy) {
				return h.explain(ctx, what, err)
			}
		}
	}
	if vm == "" {
		return nil
	}
	return h.consolidate(ctx, what, vm)
}

// Consolidate merges links that a removed snapshot left behind (its datastore
// was full, or a file was locked). It does nothing when there are none.
func (h *Host) Consolidate(ctx context.Context, vm *VM) error {
	return h.consolidate(ctx, "consolidate the disks of "+vm.Name, vm.ID)
}

func (h *Host) consolidate(ctx context.Context, what, vm string) error {
	err := h.merged(ctx, vm)
	if gone(err) || errors.Is(err, ErrNotFound) {
		return nil // the VM itself was removed meanwhile
	}
	return h.explain(ctx, what, err)
}

// ownerOf is whose a snapshot is; its zero value when nobody knows any more.
func (h *Host) ownerOf(ctx context.Context, id string) owner {
	h.mu.Lock()
	o, ok := h.owners[id]
	h.mu.Unlock()
	if ok {
		return o
	}
	o.vm = h.inv.vmOf(ctx, id)
	return o
}

// merged sees to it that no removed snapshot's link stays behind.
func (h *Host) merged(ctx context.Context, vm string) error {
	if err := h.settle(ctx, vm, "removeSnapshot"); err != nil {
		return err
	}
	if h.overSSH() {
		if err := h.ssh.tidy(ctx, vm); err != nil {
			return err
		}
	}
	for try := 1; ; try++ {
		needed, err := h.inv.needsConsolidation(ctx, vm)
		if err != nil || !needed {
			return err
		}
		if try > 3 {
			return errf(ErrBusy, nil, "%s: the snapshot is gone, but the VM's disks still need consolidation after %d attempts; "+
				"run it again, or use Consolidate in the host's own interface", h.name, try-1)
		}
		if err := h.change(ctx, func(c control) error { return c.consolidate(ctx, vm) }); err != nil && !isLost(err) {
			return err
		}
		if err := sleep(ctx, h.t.poll); err != nil {
			return err
		}
	}
}
