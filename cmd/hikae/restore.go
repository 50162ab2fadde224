package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
)

type restoreOptions struct {
	to        string
	datastore string
	name      string
	powerOn   bool
	// One of them at most.
	thin, thick, eager, asOriginal bool
}

// provisioning is what the flags say of the disks.
func (o restoreOptions) provisioning() esxi.Provisioning {
	switch {
	case o.thin:
		return esxi.Thin
	case o.thick:
		return esxi.ThickLazy
	case o.eager:
		return esxi.ThickEager
	}
	return "" // as each was
}

func newRestore(a *app.App) *cobra.Command {
	var o restoreOptions
	cmd := &cobra.Command{
		Use:   "restore HOST/VM@GENERATION --to HOST --datastore DATASTORE",
		Short: "make a VM on a host out of a generation",
		Long: `Makes a VM on a host out of a generation: its folder on the datastore, its disks,
its configuration last, then registers it and, if wanted, starts it.

Under another name (--name) it becomes a VM of its own beside the original, with
a new identity. Under the original name it is refused while that VM is there.

On a host with SSH (hikae host add --ssh) the disks are made as they were, thin or
thick, or as --thin, --thick or --eager-zeroed say; only what is not zeros is
sent, over several connections, and the host's own hashes of all of it are
compared before it knows of the VM. Without SSH disks are sent whole over HTTPS,
zeros included; they become thick, and a sample is read back at the end. The
free licence allows no change over HTTPS, so there SSH is needed.

Name, datastore and room are checked before anything is touched. When anything
fails, what was made is removed again; nothing else is touched. What a restore
that was killed had made, the next restore or backup on that host removes.` +
			exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitHost, exitNoRoom),
		Example:           "  hikae restore esx1/web01@latest --to esx1 --datastore datastore1 --name web01-restored --power-on",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeGeneration(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runRestore(cmd.Context(), a, o, args[0])
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.to, "to", "", "host to restore to, as hikae host list names it")
	f.StringVar(&o.datastore, "datastore", "", "datastore for the VM's files, as hikae host test names it")
	f.StringVar(&o.name, "name", "", "name of the new VM (default: the original one)")
	f.BoolVar(&o.powerOn, "power-on", false, "start it when it is there")
	f.BoolVar(&o.asOriginal, "as-original", false, "disks thin or thick as each one was (the default)")
	f.BoolVar(&o.thin, "thin", false, "thin disks: room is taken as it is written (needs SSH)")
	f.BoolVar(&o.thick, "thick", false, "thick disks: room is taken at once, zeroed when written first")
	f.BoolVar(&o.eager, "eager-zeroed", false, "thick disks, zeroed at once (takes as long as they are large)")
	cmd.MarkFlagsMutuallyExclusive("as-original", "thin", "thick", "eager-zeroed")
	for _, name := range []string{"to", "datastore"} {
		must(cmd.MarkFlagRequired(name))
	}
	must(cmd.RegisterFlagCompletionFunc("to", func(_ *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		return hostNames(a, word, ""), cobra.ShellCompDirectiveNoFileComp
	}))
	jsonFlag(a, cmd)
	return cmd
}

func runRestore(ctx context.Context, a *app.App, o restoreOptions, arg string) error {
	vm, selector, err := parseGeneration(arg)
	if err != nil {
		return err
	}
	if _, err := a.Host(o.to); err != nil {
		return err
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	defer pin(ctx, a, r)()
	g, err := resolveGeneration(ctx, r, vm, selector)
	if err != nil {
		return err
	}
	state, err := a.StateDir()
	if err != nil {
		return err
	}
	host, err := a.Connect(ctx, o.to)
	if err != nil {
		return err
	}
	defer closeHost(ctx, a, host)
	a.Stopping("ending the restore and removing what it made")
	progress := a.UI.Progress(a.Clock)
	res, err := backup.Restore(ctx, backup.RestoreOptions{
		Generation: g, Host: host, HostName: o.to, Datastore: o.datastore, Name: o.name, PowerOn: o.powerOn, State: state,
		Provisioning: o.provisioning(),
		Progress:     showEvents(a, progress, g.Ref().String()), Logger: a.Logger(), Clock: a.Clock,
	})
	progress.Close()
	for _, w := range res.Warnings {
		a.UI.Warnf("%s/%s: %s", res.Host, res.VM, w)
	}
	if err != nil {
		return err
	}
	if a.UI.JSON {
		return a.UI.Object(res)
	}
	end := "registered"
	if res.PoweredOn {
		end = "registered and started"
	}
	way, verified := "over SSH", "hashed by the host and compared"
	if res.Way == backup.WayUpload {
		way, verified = "whole over HTTPS", "read back and compared"
	}
	a.UI.Printf("%s restored as %s in %s: %s sent %s (%s), %s %s, %s, %s\n", ui.Clean(res.Generation), ui.Clean(res.Host+"/"+res.VM),
		ui.Clean(res.Folder), ui.Size(res.BytesSent), way, ui.Rate(res.BytesSent, time.Duration(res.SecondsSent*float64(time.Second))),
		ui.Size(res.BytesVerified), verified, end, ui.Seconds(res.Seconds))
	return nil
}
