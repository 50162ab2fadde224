package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

type backupOptions struct {
	full        bool
	quiesce     bool
	compression string
}

func newBackup(a *app.App) *cobra.Command {
	var o backupOptions
	cmd := &cobra.Command{
		Use:   "backup HOST/VM...",
		Short: "back up VMs from their hosts",
		Long: `Makes a new generation of each VM named, one after the other; one that fails
does not keep the next from being tried.

A VM with change tracking is read where the host says it changed, and a sample
of the rest is read to see whether that is true. Any other is read whole and
compared with the generation before; only what differs is stored.

The VM gets a snapshot for as long as it is read. Ctrl-C ends the backup, removes
the snapshot and keeps what was stored for the next run; after a kill the next
run removes the snapshot.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitHost, exitNoRoom, exitSomeFailed),
		Example:           "  hikae backup esx1/web01 esx1/db01",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeBackupVM(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runBackup(cmd.Context(), a, o, args)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.full, "full", false, "read all allocated areas and take nothing from the generation before")
	f.BoolVar(&o.quiesce, "quiesce", false, "ask the guest to bring its file systems to rest first (VMware Tools)")
	f.StringVar(&o.compression, "compression", "", "zstd (default), zstd-default, zstd-better, s2 or none")
	jsonFlag(a, cmd)
	return cmd
}

// failedLine is a VM that could not be backed up, in JSON.
type failedLine struct {
	Host     string `json:"host"`
	VM       string `json:"vm"`
	Error    string `json:"error"`
	ExitCode int    `json:"exit_code"`
}

func runBackup(ctx context.Context, a *app.App, o backupOptions, args []string) error {
	if err := checkCompression(o.compression); err != nil {
		return err
	}
	var vms []repo.VMID
	for _, arg := range args {
		vm, err := parseVM(arg)
		if err != nil {
			return err
		}
		if _, err := a.Host(vm.Host); err != nil {
			return err
		}
		vms = append(vms, vm)
	}
	state, err := a.StateDir()
	if err != nil {
		return err
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	hosts := newConnections(a)
	defer hosts.close(ctx)

	failed := 0
	for _, vm := range vms {
		err := backupOne(ctx, a, o, r, hosts, state, vm)
		if err == nil {
			continue
		}
		if len(vms) == 1 || ctx.Err() != nil {
			return err
		}
		failed++
		a.UI.Errorf("%v: %v", vm, err)
		if a.UI.JSON {
			if err := a.UI.Object(failedLine{vm.Host, vm.Name, err.Error(), exitCode(err)}); err != nil {
				return err
			}
		}
	}
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d VMs", errSomeFailed, failed, len(vms))
	}
	return nil
}

func backupOne(ctx context.Context, a *app.App, o backupOptions, r *repo.Repository, hosts *connections, state string, vm repo.VMID) error {
	a.Stopping("ending the backup of " + vm.String() + " and removing its snapshot")
	host, err := hosts.get(ctx, vm.Host)
	if err != nil {
		return err
	}
	progress := a.UI.Progress(a.Clock)
	defer progress.Close()
	res, err := backup.Run(ctx, backup.Options{
		Repo: r, Host: host, HostName: vm.Host, VM: vm.Name, State: state,
		Full: o.full, Quiesce: o.quiesce, Compression: o.compression,
		Progress: showEvents(a, progress, vm.String()),
		Logger:   a.Logger(), Clock: a.Clock,
	})
	progress.Close()
	// A generation that exists is told, whatever failed after it.
	if res.Generation != "" {
		if err := printResult(a, res); err != nil {
			return err
		}
	}
	return err
}

// printResult tells what a backup or an import came to.
func printResult(a *app.App, res backup.Result) error {
	for _, w := range res.Warnings {
		a.UI.Warnf("%s/%s: %s", res.Host, res.VM, w)
	}
	if a.UI.JSON {
		return a.UI.Object(res)
	}
	line := fmt.Sprintf("%s/%s@%s: %s, %s changed, %s read, %s stored, %s", res.Host, res.VM, res.Generation, res.Mode,
		ui.Size(res.BytesChanged), ui.Size(res.BytesRead+res.BytesAudited), ui.Size(res.BytesStored), ui.Seconds(res.Seconds))
	if res.Reason != "" {
		line += " (" + res.Reason + ")"
	}
	a.UI.Printf("%s\n", ui.Clean(line))
	return nil
}

// showEvents passes what the engine tells on to the progress display.
func showEvents(a *app.App, progress *ui.Progress, name string) func(backup.Event) {
	last := ""
	return func(e backup.Event) {
		if e.Message != "" && e.Message != last {
			last = e.Message
			a.UI.Infof("%s: %s", name, e.Message)
		}
		progress.Set(name, phaseText[e.Phase], e.Done, e.Total)
	}
}

// phaseText is a phase of the engine for people.
var phaseText = map[string]string{
	backup.PhaseCheck:    "checking",
	backup.PhaseCleanup:  "cleaning up after an earlier run",
	backup.PhaseSnapshot: "making the snapshot",
	backup.PhaseAudit:    "sampling",
	backup.PhaseRead:     "reading",
	backup.PhaseUpload:   "sending",
	backup.PhaseCommit:   "committing",
	backup.PhaseRemove:   "removing the snapshot",
	backup.PhaseVerify:   "reading back",
	backup.PhaseRegister: "registering",
	backup.PhasePowerOn:  "starting",
}

func checkCompression(s string) error {
	known := []string{"", "zstd", "zstd-default", "zstd-better", "s2", "none"}
	for _, k := range known {
		if s == k {
			return nil
		}
	}
	return app.Usagef("--compression is %s, not %q", strings.Join(known[1:], ", "), s)
}

// connections keeps one login per host for a verb that visits several VMs.
type connections struct {
	a     *app.App
	hosts map[string]*esxi.Host
	// failed hosts are not tried again: another refused login could lock the
	// account.
	failed map[string]error
}

func newConnections(a *app.App) *connections {
	return &connections{a: a, hosts: map[string]*esxi.Host{}, failed: map[string]error{}}
}

func (c *connections) get(ctx context.Context, name string) (*esxi.Host, error) {
	if h := c.hosts[name]; h != nil {
		return h, nil
	}
	if err := c.failed[name]; err != nil {
		return nil, err
	}
	h, err := c.a.Connect(ctx, name)
	if err != nil {
		if errors.Is(err, esxi.ErrLogin) || errors.Is(err, esxi.ErrThumbprint) || errors.Is(err, esxi.ErrHostKey) {
			c.failed[name] = err
		}
		return nil, err
	}
	c.hosts[name] = h
	return h, nil
}

func (c *connections) close(ctx context.Context) {
	for _, h := range c.hosts {
		closeHost(ctx, c.a, h)
	}
}
