package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

func newCBT(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cbt",
		Short: "switch VMs' change tracking on and off",
		Long: `With change tracking (changed block tracking, CBT) a host keeps a list of what a
VM writes, so that a backup reads only that. Without it a backup reads the whole disk
and stores what changed: the same result, and slower.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		newCBTVerb(a, "status", "tell how change tracking stands", `Tells for each VM whether change tracking is switched on and, disk by disk, whether
it is at work. Changes nothing.`, cbtStatus),
		newCBTVerb(a, "enable", "switch change tracking on", `Switches change tracking on and says from when on it holds. Refuses while the VM has
snapshots: tracking that begins on a snapshot misses what was written before it, and
nothing would tell. Over SSH (the free edition) it refuses while the VM runs, too. The
first backup afterwards reads everything once.`, cbtEnable),
		newCBTVerb(a, "disable", "switch change tracking off", `Switches change tracking off. Backups go on and read everything.`, cbtDisable),
	)
	return cmd
}

// cbtWork does one VM.
type cbtWork func(ctx context.Context, a *app.App, host *esxi.Host, vm *esxi.VM, id repo.VMID) error

func newCBTVerb(a *app.App, name, short, long string, work cbtWork) *cobra.Command {
	cmd := &cobra.Command{
		Use:               name + " HOST/VM...",
		Short:             short,
		Long:              long + exitCodes(exitNotFound, exitHost, exitSomeFailed),
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeBackupVM(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCBT(cmd.Context(), a, args, work)
		},
	}
	jsonFlag(a, cmd)
	return cmd
}

func runCBT(ctx context.Context, a *app.App, args []string, work cbtWork) error {
	var ids []repo.VMID
	for _, arg := range args {
		id, err := parseVM(arg)
		if err != nil {
			return err
		}
		if _, err := a.Host(id.Host); err != nil {
			return err
		}
		ids = append(ids, id)
	}
	hosts := newConnections(a)
	defer hosts.close(ctx)
	failed := 0
	for _, id := range ids {
		err := cbtOne(ctx, a, hosts, id, work)
		if err == nil {
			continue
		}
		if len(ids) == 1 || ctx.Err() != nil {
			return err
		}
		failed++
		a.UI.Errorf("%v: %v", id, err)
	}
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d VMs", errSomeFailed, failed, len(ids))
	}
	return nil
}

func cbtOne(ctx context.Context, a *app.App, hosts *connections, id repo.VMID, work cbtWork) error {
	host, err := hosts.get(ctx, id.Host)
	if err != nil {
		return err
	}
	vm, err := host.VM(ctx, id.Name)
	if err != nil {
		return err
	}
	return work(ctx, a, host, vm, id)
}

// cbtLine is a VM's change tracking in JSON.
type cbtLine struct {
	Host     string    `json:"host"`
	VM       string    `json:"vm"`
	Enabled  bool      `json:"enabled"`
	Changed  bool      `json:"changed"`            // by this command
	Effect   string    `json:"effect,omitempty"`   // from when on it holds
	Obstacle string    `json:"obstacle,omitempty"` // why it could not be switched on now
	Disks    []cbtDisk `json:"disks"`
}

type cbtDisk struct {
	Key    int32  `json:"key"`
	Label  string `json:"label"`
	Active bool   `json:"active"`
}

// cbtState is what the host says of a VM now.
func cbtState(ctx context.Context, host *esxi.Host, vm *esxi.VM, id repo.VMID) (cbtLine, error) {
	st, err := host.TrackingState(ctx, vm)
	if err != nil {
		return cbtLine{}, err
	}
	l := cbtLine{Host: id.Host, VM: id.Name, Enabled: st.Enabled, Disks: []cbtDisk{}}
	for _, d := range st.Disks {
		l.Disks = append(l.Disks, cbtDisk{d.Key, d.Label, d.Active})
	}
	if !st.Enabled && st.Obstacle != nil {
		l.Obstacle = st.Obstacle.Error()
	}
	return l, nil
}

func cbtStatus(ctx context.Context, a *app.App, host *esxi.Host, vm *esxi.VM, id repo.VMID) error {
	l, err := cbtState(ctx, host, vm, id)
	if err != nil {
		return err
	}
	if a.UI.JSON {
		return a.UI.Object(l)
	}
	switch {
	case !l.Enabled && l.Obstacle != "":
		a.UI.Printf("%v: off; it cannot be switched on now: %s\n", id, ui.Clean(l.Obstacle))
	case !l.Enabled:
		a.UI.Printf("%v: off; switch it on with hikae cbt enable %v\n", id, id)
	default:
		a.UI.Printf("%v: on\n", id)
		for _, d := range l.Disks {
			state := "at work"
			if !d.Active {
				state = "not at work yet: it begins when the VM is started, or with the next snapshot"
			}
			a.UI.Printf("  %s: %s\n", ui.Clean(d.Label), state)
		}
	}
	return nil
}

func cbtEnable(ctx context.Context, a *app.App, host *esxi.Host, vm *esxi.VM, id repo.VMID) error {
	c, err := host.EnableTracking(ctx, vm)
	return cbtChanged(ctx, a, host, vm, id, "on", c, err)
}

func cbtDisable(ctx context.Context, a *app.App, host *esxi.Host, vm *esxi.VM, id repo.VMID) error {
	c, err := host.DisableTracking(ctx, vm)
	return cbtChanged(ctx, a, host, vm, id, "off", c, err)
}

func cbtChanged(ctx context.Context, a *app.App, host *esxi.Host, vm *esxi.VM, id repo.VMID, state string, c esxi.TrackingChange, err error) error {
	if err != nil {
		return err
	}
	if a.UI.JSON {
		l, err := cbtState(ctx, host, vm, id)
		if err != nil {
			return err
		}
		l.Changed, l.Effect = c.Changed, c.Effect
		return a.UI.Object(l)
	}
	if !c.Changed {
		a.UI.Printf("%v: change tracking is %s already\n", id, state)
		return nil
	}
	a.UI.Printf("%v: change tracking is %s; %s\n", id, state, ui.Clean(c.Effect))
	return nil
}
