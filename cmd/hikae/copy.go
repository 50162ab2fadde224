package main

import (
	"context"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
)

func newCopy(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "copy HOST/VM@GENERATION DEST",
		Short: "copy a generation's files into a folder",
		Long: `Copies the files of a generation (disks as flat VMDK files, the VM's
configuration) into the folder DEST, which is made when it is missing. Holes stay
holes. A copy that was interrupted goes on where it was when it is run again.` +
			exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitNoRoom),
		Example:           "  hikae copy esx1/web01@latest /srv/rescue/web01",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeGeneration(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCopy(cmd.Context(), a, args[0], args[1])
		},
	}
	jsonFlag(a, cmd)
	return cmd
}

func runCopy(ctx context.Context, a *app.App, arg, dest string) error {
	vm, selector, err := parseGeneration(arg)
	if err != nil {
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
	a.Stopping("ending the copy; run it again to go on")
	progress := a.UI.Progress(a.Clock)
	res, err := backup.Copy(ctx, backup.CopyOptions{
		Generation: g, Dest: dest, Progress: showEvents(a, progress, g.Ref().String()), Logger: a.Logger(), Clock: a.Clock,
	})
	progress.Close()
	if err != nil {
		return err
	}
	if a.UI.JSON {
		return a.UI.Object(res)
	}
	a.UI.Printf("%s copied to %s: %s, %s of them data", ui.Clean(res.Generation), ui.Clean(dest), ui.Size(res.BytesCapacity), ui.Size(res.BytesData))
	if res.BytesKept > 0 {
		a.UI.Printf(" (%s from an earlier run)", ui.Size(res.BytesKept))
	}
	a.UI.Printf(", %s\n", ui.Seconds(res.Seconds))
	return nil
}
