package esxi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"hikae/backup/esxi/internal/vimcmd"
)

// createSnapshot makes a snapshot and waits until the host shows it.
func (c *sshControl) createSnapshot(ctx context.Context, vm, name, description string, quiesce bool) (string, error) {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return "", err
	}
	before, err := c.tasks(ctx, "vmsvc/get.tasklist", num)
	if err != nil {
		return "", err
	}
	flag := "0"
	if quiesce {
		flag = "1"
	}
	// Who cancels while the command is on its way would look for the snapshot
	// before the host began to make it.
	starting, cancel := outlive(ctx, startGrace)
	r, err := c.sh.vim(starting, false, "vmsvc/snapshot.create", num, name, description, "0", flag)
	cancel()
	if err != nil {
		return "", c.doubtful(vm, "createSnapshot", err)
	}
	said := r.fault()
	for pause, look := c.h.t.poll, 0; ; pause, look = min(pause*3/2, 10*c.h.t.poll), look+1 {
		now, err := c.h.refresh(ctx, vm)
		if err != nil {
			return "", &lost{err}
		}
		if i := slices.IndexFunc(now.Snapshots, func(s SnapshotInfo) bool { return s.Name == displayName(name) }); i >= 0 {
			return now.Snapshots[i].ID, nil
		}
		working, failed, err := c.since(ctx, num, "createSnapshot", before)
		switch {
		case err != nil:
			return "", &lost{err}
		case failed != nil:
			return "", failed
		case working:
		case said != nil:
			return "", said
		case look >= appear:
			return "", c.doubtful(vm, "createSnapshot", &lost{fmt.Errorf("the host said nothing against it, but the snapshot did not appear (%s)", r.text())})
		}
		if err := sleep(ctx, pause); err != nil {
			return "", &lost{err}
		}
	}
}

// appear is how many looks a change has to show, after its command has returned
// and when no task is at work.
const appear = 10

// since looks at the tasks of a kind that were not there before: whether one is
// at work, and how the last one failed.
func (c *sshControl) since(ctx context.Context, num, kind string, before []string) (working bool, failed, err error) {
	tasks, err := c.tasks(ctx, "vmsvc/get.tasklist", num)
	if err != nil {
		return false, nil, err
	}
	for _, t := range tasks {
		if slices.Contains(before, t) || !kinds[kind](t) {
			continue
		}
		state, why, err := c.task(ctx, t)
		if err != nil {
			return false, nil, err
		}
		working = working || state == "queued" || state == "running"
		if why != nil {
			failed = why
		}
	}
	return working, failed, nil
}

// removeSnapshot removes exactly the snapshot that whose names: by its number,
// after a look that the number still has the name.
func (c *sshControl) removeSnapshot(ctx context.Context, _ string, whose owner) error {
	missing := asFault(&vimcmd.Fault{Type: "vmodl.fault.ManagedObjectNotFound", Message: "the snapshot is not there"})
	if whose.vm == "" || whose.number == 0 {
		return missing
	}
	num, err := c.vmid(ctx, whose.vm)
	if err != nil {
		return err
	}
	find := func() (at *vimcmd.Snapshot, children bool, err error) {
		all, err := c.sh.tree(ctx, num)
		if err != nil {
			return nil, false, err
		}
		for i := range all {
			if all[i].ID == int(whose.number) {
				at = &all[i]
			}
			children = children || all[i].Parent == int(whose.number)
		}
		return at, children, nil
	}
	at, children, err := find()
	switch {
	case err != nil:
		return err
	case at == nil:
		return missing
	case displayName(at.Name) != whose.name:
		return fmt.Errorf("snapshot %d is called %q now, not %q; it is left alone", whose.number, displayName(at.Name), whose.name)
	}
	before, err := c.tasks(ctx, "vmsvc/get.tasklist", num)
	if err != nil {
		return err
	}
	id := strconv.Itoa(int(whose.number))
	r, err := c.sh.vim(ctx, false, "vmsvc/snapshot.remove", num, id, "0") // 0: not the children
	if err == nil && strings.Contains(r.out+r.err, "Usage:") && !children {
		// A release that has no such argument. It does not matter when there are
		// no children.
		r, err = c.sh.vim(ctx, false, "vmsvc/snapshot.remove", num, id)
	}
	if err != nil {
		return c.doubtful(whose.vm, "removeSnapshot", err)
	}
	said := r.fault()
	for pause, look := c.h.t.poll, 0; ; pause, look = min(pause*3/2, 10*c.h.t.poll), look+1 {
		working, failed, err := c.since(ctx, num, "removeSnapshot", before)
		if err != nil {
			return &lost{err}
		}
		at, _, err := find()
		switch {
		case err != nil:
			return &lost{err}
		case at == nil && failed != nil:
			return failed // it is gone, but its links were not merged
		case at == nil && !working:
			return nil
		case working:
		case failed != nil:
			return failed
		case said != nil:
			return said
		case look >= appear:
			return fmt.Errorf("the host said nothing against it, but the snapshot is still there (%s)", r.text())
		}
		if err := sleep(ctx, pause); err != nil {
			return &lost{err}
		}
	}
}

// consolidating is the name of the snapshot that consolidate makes. It belongs to
// nobody else, so one that a killed run left is removed by the next.
const consolidating = "hikae-consolidate"

// consolidate merges links that a removal left behind. vim-cmd has no word for
// it, but removing any snapshot merges what nothing refers to any more. Removing
// all of them would take other people's along, so one is made to be removed.
func (c *sshControl) consolidate(ctx context.Context, vm string) error {
	if err := c.tidy(ctx, vm); err != nil {
		return err
	}
	if _, err := c.createSnapshot(ctx, vm, consolidating, "made and removed at once, to merge what another left behind", false); err != nil {
		return err
	}
	return c.tidy(ctx, vm)
}

// tidy removes the snapshots that consolidate made.
func (c *sshControl) tidy(ctx context.Context, vm string) error {
	now, err := c.h.refresh(ctx, vm)
	if err != nil {
		return err
	}
	for _, s := range now.Snapshots {
		if s.Name == consolidating {
			err = errors.Join(err, c.removeSnapshot(ctx, s.ID, owner{vm, now.Name, s.Name, s.number}))
		}
	}
	return err
}
