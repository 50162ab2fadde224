package main

import (
	"context"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
)

type restoreOptions struct {
	to        string
	datastore string
	name      string
	powerOn   bool
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
When anything fails, what was made is removed again; nothing else is touched.` +
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
		Progress: showEvents(a, progress, g.Ref().String()), Logger: a.Logger(), Clock: a.Clock,
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
	a.UI.Printf("%s restored as %s in %s: %s sent, %s read back and compared, %s, %s\n", ui.Clean(res.Generation), ui.Clean(res.Host+"/"+res.VM),
		ui.Clean(res.Folder), ui.Size(res.BytesSent), ui.Size(res.BytesVerified), end, ui.Seconds(res.Seconds))
	return nil
}
