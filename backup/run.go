package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"hikae/backup/esxi"
	"hikae/repo"
)

// defaultAudit is how many blocks a disk a run re-reads to test the host's word.
const defaultAudit = 16

// How long undoing may take when nobody is waiting to stop it. Merging a large
// delta link takes a slow datastore a while.
const (
	createLimit = 20 * time.Minute // making a snapshot, quiescing the guest included
	removeLimit = 2 * time.Hour
)

// run is one run of Run.
type run struct {
	Options
	worker
	now   func() time.Time
	id    string
	began time.Time
	taken time.Time // when the snapshot was made: the generation's time

	oracle oracle

	vm     *esxi.VM
	snap   *esxi.Snapshot
	parent *parent
	files  vmFiles
	plans  []*diskPlan
	res    Result
}

// parent is the VM's previous generation.
type parent struct {
	gen      *repo.Generation
	manifest *repo.Manifest
}

// Run backs up one VM and returns what it came to. The generation exists when
// Result.Ref is set, even if an error is returned as well: then something after
// the commit failed, as a rule removing the snapshot (ErrSnapshotLeft).
//
// When ctx ends, Run stops reading, removes its snapshot (for at most 30 s) and
// returns. Blocks that were stored stay usable for the next run.
func Run(ctx context.Context, o Options) (Result, error) {
	switch {
	case o.Repo == nil || o.Host == nil:
		return Result{}, errors.New("a backup needs a repository and a host")
	case o.State == "":
		return Result{}, errors.New("a backup needs a state directory for its journal")
	}
	if err := (repo.VMID{Host: o.HostName, Name: o.VM}).Validate(); err != nil {
		return Result{}, err
	}
	if o.AuditBlocks == 0 {
		o.AuditBlocks = defaultAudit
	}
	r := &run{Options: o, now: orNow(o.Clock), id: newRunID()}
	r.began = r.now()
	r.worker = worker{
		log:   orDiscard(o.Logger).With("host", o.HostName, "vm", o.VM, "run", r.id),
		meter: newMeter(o.Progress), auditBlocks: o.AuditBlocks,
	}
	r.oracle = r.askHost
	r.res = Result{Host: o.HostName, VM: o.VM, Disks: []DiskResult{}}
	err := r.run(ctx)
	r.res.Seconds = r.now().Sub(r.began).Seconds()
	return r.res, err
}

// run is the whole road; what has to be undone is deferred as soon as it is done.
func (r *run) run(ctx context.Context) (err error) {
	unlock, err := lockVM(r.State, r.HostName, r.VM)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.check(ctx); err != nil {
		return err
	}
	r.session, err = r.Repo.Begin(ctx, repo.SessionOptions{Compression: r.Compression})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.session.Close()) }()
	if err := r.findParent(ctx); err != nil {
		return err
	}
	if err := r.readFiles(ctx); err != nil {
		return err
	}
	return r.withSnapshot(ctx, func(ctx context.Context) error {
		if err := r.readDisks(ctx); err != nil {
			return err
		}
		if err := r.stillFrozen(ctx); err != nil {
			return err
		}
		return r.commit(ctx)
	})
}

// check finds everything that would stop the run later, before anything is
// touched; only what an earlier run left behind is cleaned up in between, for
// its snapshot takes room and lengthens the chains.
func (r *run) check(ctx context.Context) error {
	r.meter.begin(PhaseCheck, 0, "")
	var err error
	if r.vm, err = r.Host.VM(ctx, r.VM); err != nil {
		return err
	}
	if err := supported(r.vm); err != nil {
		return err
	}
	cleaned, err := Cleanup(ctx, r.Host, r.HostName, r.State, r.log)
	for _, c := range cleaned {
		r.meter.begin(PhaseCleanup, 0, "removed snapshot "+c.Snapshot+" of "+c.VM+", left behind by a run that was cut off")
		r.warn("an earlier run was cut off; its snapshot %s of %s was removed", c.Snapshot, c.VM)
	}
	if err != nil {
		// Another VM's leftovers must not keep this one from being backed up.
		r.log.Warn("cleaning up after earlier runs failed", "error", err)
		r.warn("%s", oneLine(err))
	}
	if len(cleaned) > 0 {
		if r.vm, err = r.Host.VM(ctx, r.VM); err != nil {
			return err
		}
	}
	return nil
}

// supported refuses what cannot be backed up, one sentence a disk.
func supported(vm *esxi.VM) error {
	if vm.Invalid != "" {
		return fmt.Errorf("%s cannot be used by its host (%s): %w", vm.Name, vm.Invalid, ErrUnsupported)
	}
	if len(vm.Disks) == 0 {
		return fmt.Errorf("%s has no disks, there is nothing to back up: %w", vm.Name, ErrUnsupported)
	}
	var bad []string
	for _, d := range vm.Disks {
		if d.Unsupported != "" {
			bad = append(bad, fmt.Sprintf("%s of %s: %s", d.Label, vm.Name, d.Unsupported))
		}
	}
	if len(bad) > 0 {
		return fmt.Errorf("%s: %w", strings.Join(bad, "; "), ErrUnsupported)
	}
	return nil
}

// findParent opens the VM's newest generation, by sequence, and then knows
// enough to tell whether there is room for a snapshot.
func (r *run) findParent(ctx context.Context) error {
	var err error
	var why string
	r.parent, why, err = before(ctx, r.Repo, repo.VMID{Host: r.HostName, Name: r.VM}, repo.Latest)
	if err != nil {
		return err
	}
	if why != "" {
		r.warn("%s", why)
	}
	stores, err := r.Host.Datastores(ctx)
	if err != nil {
		return err
	}
	return deltaRoom(stores, r.vm, r.parent)
}

// before opens the generation of a VM that pick chooses as the parent; nil when
// there is none, or, with the reason, when it cannot be read: then the run does
// without.
func before(ctx context.Context, rp *repo.Repository, vm repo.VMID, pick func([]repo.Ref) repo.Ref) (*parent, string, error) {
	refs, err := rp.Refs(ctx, vm)
	if errors.Is(err, repo.ErrNotFound) || err == nil && len(refs) == 0 {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	ref := pick(refs)
	gen, err := rp.Generation(ctx, ref)
	if errors.Is(err, repo.ErrDamaged) || errors.Is(err, repo.ErrNotFound) {
		return nil, fmt.Sprintf("the previous generation %s cannot be read, nothing is taken from it: %s", ref.Name(), oneLine(err)), nil
	}
	if err != nil {
		return nil, "", err
	}
	return &parent{gen: gen, manifest: gen.Manifest()}, "", nil
}

// withSnapshot does the work between making a snapshot and removing it. The
// snapshot is removed in every ending of work, a panic included; when that
// fails the journal keeps it and the error says so.
func (r *run) withSnapshot(ctx context.Context, work func(context.Context) error) (err error) {
	name := snapshotPrefix + r.id
	e, err := writeEntry(r.State, entry{
		Run: r.id, Host: r.HostName, VM: r.VM, VMID: r.vm.ID, Snapshot: name, Created: r.now().UTC(), PID: os.Getpid(),
	})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, removeSnapshot(ctx, r.Host, r.HostName, r.vm, r.snap, e, func() { r.meter.begin(PhaseRemove, 0, "") }))
	}()
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := r.freeze(ctx, name); err != nil {
		return err
	}
	return work(ctx)
}

// freeze makes the snapshot. It is not interrupted half-way: a snapshot that
// came to be is easier to remove than one that may still come.
func (r *run) freeze(ctx context.Context, name string) (err error) {
	r.meter.begin(PhaseSnapshot, 0, "")
	r.taken = r.now()
	description := fmt.Sprintf("made by hikae at %s; removed when the backup ends", r.taken.UTC().Format(time.RFC3339))
	make, cancel := context.WithTimeout(context.WithoutCancel(ctx), createLimit)
	defer cancel()
	quiesce := r.Quiesce && r.vm.Power == "poweredOn"
	r.snap, err = r.Host.CreateSnapshot(make, r.vm, name, description, quiesce)
	if quiesce && errors.Is(err, esxi.ErrQuiesce) {
		r.warn("the guest could not be quiesced, so this generation is crash-consistent: %s", oneLine(err))
		// Nothing of the first attempt may stay beneath the second.
		found, ferr := r.Host.FindSnapshots(make, r.vm, name)
		for _, s := range found {
			ferr = errors.Join(ferr, r.Host.RemoveSnapshot(make, s.ID))
		}
		if ferr != nil {
			return ferr
		}
		quiesce = false
		r.snap, err = r.Host.CreateSnapshot(make, r.vm, name, description, false)
	}
	if err != nil {
		return err
	}
	switch {
	case quiesce:
		r.res.Consistency = repo.ConsistencyQuiesced
	case r.vm.Power == "poweredOff":
		r.res.Consistency = repo.ConsistencyOff
	default:
		r.res.Consistency = repo.ConsistencyCrash
	}
	r.log.Info("snapshot made", "snapshot", name, "consistency", r.res.Consistency)
	return context.Cause(ctx)
}

// removeSnapshot removes what the journal entry e speaks of. snap is nil when
// making it failed, and then a snapshot of that name may exist all the same.
func removeSnapshot(ctx context.Context, host *esxi.Host, hostName string, vm *esxi.VM, snap *esxi.Snapshot, e *entry, begin func()) error {
	undo, cancel := undoContext(ctx, removeLimit)
	defer cancel()
	var ids []string
	var err error
	if snap != nil {
		begin()
		ids = []string{snap.ID}
	} else {
		var found []esxi.SnapshotInfo
		found, err = host.FindSnapshots(undo, vm, e.Snapshot)
		for _, s := range found {
			ids = append(ids, s.ID)
		}
	}
	for _, id := range ids {
		err = errors.Join(err, host.RemoveSnapshot(undo, id))
	}
	if err == nil {
		err = e.done()
	}
	if err != nil {
		e.leave()
		return fmt.Errorf("snapshot %s of %s/%s could not be removed; it stays in the journal and the next run for %s removes it: %w: %w",
			e.Snapshot, hostName, vm.Name, hostName, ErrSnapshotLeft, err)
	}
	return nil
}

// stillFrozen makes sure that nobody removed our snapshot, or one below it,
// while it was read: the host would have been merging other data into the very
// links that were read.
func (r *run) stillFrozen(ctx context.Context) error {
	now, err := r.Host.Snapshot(ctx, r.vm, r.snap.ID)
	if errors.Is(err, esxi.ErrNotFound) {
		return fmt.Errorf("somebody removed the snapshot of %s while it was being read, so nothing was kept of it; run the backup again: %w", r.VM, err)
	}
	if err != nil {
		return err
	}
	for _, d := range r.snap.Disks {
		if same := diskByKey(now.Disks, d.Key); same == nil || !slices.Equal(same.Chain, d.Chain) {
			return fmt.Errorf("the links of %s (%s) changed while they were being read, so nothing was kept of them: "+
				"somebody removes or reverts snapshots of this VM; run the backup again afterwards", d.Label, r.VM)
		}
	}
	return nil
}

// commit makes the generation.
func (r *run) commit(ctx context.Context) error {
	r.meter.begin(PhaseCommit, 0, "")
	about := r.Host.About()
	m := repo.Manifest{
		VM:          repo.VMID{Host: r.HostName, Name: r.VM},
		Time:        r.taken.UTC().Truncate(time.Second),
		Consistency: r.res.Consistency,
		Host:        repo.HostInfo{Product: about.Product, Version: about.Version, Build: about.Build},
		Guest: repo.GuestInfo{
			UUID: r.vm.UUID, InstanceUUID: r.vm.InstanceUUID, GuestID: r.vm.GuestID,
			HardwareVersion: r.vm.HardwareVersion, PowerState: r.vm.Power,
		},
		Files: r.files.list,
	}
	for _, p := range r.plans {
		if p.tracking.wrong != "" {
			r.warn("%s: %s; everything was read, so this generation is right, and the file is not believed for some time", p.disk.Label, p.tracking.wrong)
		}
		m.Disks = append(m.Disks, p.manifest())
		r.res.Disks = append(r.res.Disks, p.result())
	}
	m.Mode, m.Reason = overall(r.res.Disks)
	return r.res.commit(ctx, r.session, m, r.began, r.now)
}

// commit writes the manifest and fills in what is known then.
func (res *Result) commit(ctx context.Context, s *repo.Session, m repo.Manifest, began time.Time, now func() time.Time) error {
	for _, d := range res.Disks {
		res.BytesCapacity += d.BytesCapacity
		res.BytesChanged += d.BytesChanged
		res.BytesRead += d.BytesRead
		res.BytesHealed += d.BytesHealed
		res.BytesAudited += d.BytesAudited
	}
	m.Stats = repo.Stats{
		BytesCapacity: res.BytesCapacity, BytesChanged: res.BytesChanged, BytesRead: res.BytesRead,
		// What the files came to is known only after the commit; this is their
		// content without tree nodes and index.
		BytesAudited: res.BytesAudited, BytesStored: s.Stats().BytesSealed, Seconds: now().Sub(began).Seconds(),
	}
	// Generations are told apart by whole seconds; two runs of a tiny VM can
	// fall into one. The later one then says the next second.
	var ref repo.Ref
	var err error
	for range 5 {
		if ref, err = s.Commit(ctx, m); !errors.Is(err, repo.ErrExists) {
			break
		}
		m.Time = m.Time.Add(time.Second)
	}
	if err != nil {
		return err
	}
	res.Ref, res.Generation, res.Sequence = ref, ref.Name(), ref.Sequence
	res.Mode, res.Reason, res.Consistency = m.Mode, m.Reason, m.Consistency
	res.BytesStored = s.Stats().BytesStored
	return nil
}

// overall is the mode of a generation by those of its disks: what was least
// incremental about it counts.
func overall(disks []DiskResult) (mode, reason string) {
	count := map[string]int{}
	reasons := map[string][]string{} // reason → labels
	var order []string
	for _, d := range disks {
		count[d.Mode]++
		if d.Reason == "" {
			continue
		}
		if reasons[d.Reason] == nil {
			order = append(order, d.Reason)
		}
		reasons[d.Reason] = append(reasons[d.Reason], d.Label)
	}
	switch {
	case count[repo.ModeFull] == len(disks):
		mode = repo.ModeFull
	case count[repo.ModeScan] > 0:
		mode = repo.ModeScan
	default:
		mode = repo.ModeIncremental
	}
	var parts []string
	for _, r := range order {
		if len(reasons[r]) < len(disks) {
			r = strings.Join(reasons[r], ", ") + ": " + r
		}
		parts = append(parts, r)
	}
	return mode, strings.Join(parts, "; ")
}

// warn keeps something the operator should know although the run goes on.
func (r *run) warn(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.res.Warnings = append(r.res.Warnings, text)
	r.log.Warn(text)
}
