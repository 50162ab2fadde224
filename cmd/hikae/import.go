package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/cmd/hikae/internal/app"
)

type importOptions struct {
	disks       []string
	vmx         string
	time        string
	changed     []string
	compression string
}

func newImport(a *app.App) *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import HOST/VM --disk FILE[,FILE]",
		Short: "make a generation of disk images that exist already",
		Long: `Makes a generation of local disk images: raw files, flat VMDK files with their
descriptor, sparse VMDK files; what ghettoVCB and other tools left behind. No
host is needed. Images of the same VM, imported in the order in which they were
made, share what they have in common.` +
			exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitNoRoom),
		Example: "  hikae import esx1/web01 --disk web01.vmdk,data.vmdk --vmx web01.vmx --time '2026-10-01 02:00'",
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			return completeBackupVM(a)(nil, args, word)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return runImport(cmd.Context(), a, o, args[0])
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.disks, "disk", nil, "disk images, in the order of the VM's disks")
	f.StringVar(&o.vmx, "vmx", "", "the VM's configuration file")
	f.StringVar(&o.time, "time", "", "when the images were made, as 2026-10-01T02:00:00Z or '2026-10-01 02:00' (default: the newest image's time)")
	f.StringSliceVar(&o.changed, "changed", nil, "for each disk a CSV file of OFFSET,LENGTH: what changed since the generation before")
	must(f.MarkHidden("changed"))
	f.StringVar(&o.compression, "compression", "", "zstd (default), zstd-default, zstd-better, s2 or none")
	must(cmd.MarkFlagRequired("disk"))
	jsonFlag(a, cmd)
	return cmd
}

func runImport(ctx context.Context, a *app.App, o importOptions, arg string) error {
	vm, err := parseVM(arg)
	if err != nil {
		return err
	}
	if err := checkCompression(o.compression); err != nil {
		return err
	}
	when, err := parseTime(o.time)
	if err != nil {
		return err
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the import; what was stored is used when it is run again")
	progress := a.UI.Progress(a.Clock)
	res, err := backup.Import(ctx, backup.ImportOptions{
		Repo: r, VM: vm, Disks: o.disks, VMX: o.vmx, Time: when, Changed: o.changed, Compression: o.compression,
		Progress: showEvents(a, progress, vm.String()), Logger: a.Logger(), Clock: a.Clock,
	})
	progress.Close()
	if err != nil {
		return err
	}
	return printResult(a, res)
}

// parseTime reads a time as people and generations write it; without a zone it
// is local. Empty is the zero time.
func parseTime(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15-04-05Z"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	for _, layout := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, app.Usagef("--time %q is not a time: write it as 2026-10-01T02:00:00Z or '2026-10-01 02:00'", s)
}
