package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"hikae/backup/esxi"
)

// Cleaned is one snapshot of a dead run that was removed.
type Cleaned struct {
	VM       string    `json:"vm"`
	Snapshot string    `json:"snapshot"`
	Created  time.Time `json:"created"` // by the journal; zero when the entry was torn
}

// Cleanup removes the snapshots that dead runs of this machine left on a host:
// those whose name stands in the journal below state, no others, whatever they
// are called. Before that it removes what restores of this machine left that
// were killed (see CleanupRestores), which is logged. Runs that are alive are left
// alone. What could not be removed stays in the journal, and the error says so.
func Cleanup(ctx context.Context, host *esxi.Host, hostName, state string, log *slog.Logger) ([]Cleaned, error) {
	_, restores := CleanupRestores(ctx, host, hostName, state, log)
	cleaned, err := cleanupSnapshots(ctx, host, hostName, state, orDiscard(log))
	return cleaned, errors.Join(restores, err)
}

func cleanupSnapshots(ctx context.Context, host *esxi.Host, hostName, state string, log *slog.Logger) ([]Cleaned, error) {
	dead, err := deadEntries(state, hostName)
	defer func() {
		for _, e := range dead {
			e.leave() // no effect on those that are done
		}
	}()
	if err != nil || len(dead) == 0 {
		return nil, err
	}
	// By name over all VMs: the VM may have been renamed, or registered anew,
	// since. The names are random, so a match is ours.
	vms, err := host.VMs(ctx)
	if err != nil {
		return nil, fmt.Errorf("looking for snapshots that earlier runs left behind: %w", err)
	}
	var cleaned []Cleaned
	var failed []error
	for _, e := range dead {
		removed, err := cleanEntry(ctx, host, vms, e)
		for _, vm := range removed {
			log.Warn("removed the snapshot that a dead run left behind", "host", hostName, "vm", vm, "snapshot", e.Snapshot)
			cleaned = append(cleaned, Cleaned{VM: vm, Snapshot: e.Snapshot, Created: e.Created})
		}
		if err == nil {
			err = e.done()
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("snapshot %s of %s, left behind by an earlier run, could not be removed: %w: %w",
				e.Snapshot, e.VM, ErrSnapshotLeft, err))
		}
	}
	return cleaned, errors.Join(failed...)
}

// cleanEntry removes one entry's snapshots and names the VMs that had them.
func cleanEntry(ctx context.Context, host *esxi.Host, vms []esxi.VM, e *entry) (removed []string, err error) {
	for i := range vms {
		vm := &vms[i]
		found := named(vm.Snapshots, e.Snapshot)
		if vm.ID == e.VMID && vm.Invalid == "" {
			// A snapshot that was asked for may still be in the making.
			if found, err = host.FindSnapshots(ctx, vm, e.Snapshot); err != nil {
				if errors.Is(err, esxi.ErrNotFound) {
					continue // removed from the inventory meanwhile
				}
				return removed, err
			}
		}
		for _, s := range found {
			if err := host.RemoveSnapshot(ctx, s.ID); err != nil {
				return removed, err
			}
			removed = append(removed, vm.Name)
		}
		if vm.ID == e.VMID && vm.Invalid == "" {
			// The snapshot may have gone without its links: when the datastore was
			// full, or a file locked.
			if err := host.Consolidate(ctx, vm); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}

func named(all []esxi.SnapshotInfo, name string) (found []esxi.SnapshotInfo) {
	for _, s := range all {
		if s.Name == name {
			found = append(found, s)
		}
	}
	return found
}
