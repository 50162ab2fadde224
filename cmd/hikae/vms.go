package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
)

func newVMs(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vms [HOST]",
		Short: "list the VMs on a host, or on all hosts",
		Long: `Lists the VMs of one host, or of all hosts of the configuration, and how each
would be backed up.` + exitCodes(exitNotFound, exitHost, exitSomeFailed),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeHost(a),
		RunE:              func(cmd *cobra.Command, args []string) error { return runVMs(cmd.Context(), a, args) },
	}
	jsonFlag(a, cmd)
	return cmd
}

func runVMs(ctx context.Context, a *app.App, args []string) error {
	hosts, err := a.Hosts()
	if err != nil {
		return err
	}
	if len(args) == 1 {
		h, err := a.Host(args[0])
		if err != nil {
			return err
		}
		hosts = []config.Host{h}
	}
	if len(hosts) == 0 {
		a.UI.Infof("No hosts yet; next: hikae host add NAME --address ADDRESS --user USER --password-file FILE")
		return nil
	}
	var all []vmReport
	failed := 0
	for _, h := range hosts {
		vms, err := hostVMs(ctx, a, h)
		if err != nil {
			if len(hosts) == 1 || ctx.Err() != nil {
				return err
			}
			// One host that is down must not hide the others.
			a.UI.Errorf("%v", err)
			failed++
			continue
		}
		all = append(all, vms...)
		if a.UI.JSON {
			for _, v := range vms {
				if err := a.UI.Object(v); err != nil {
					return err
				}
			}
		}
	}
	if len(all) > 0 {
		a.UI.Print(vmTable(all))
	}
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d hosts", errSomeFailed, failed, len(hosts))
	}
	return nil
}

func hostVMs(ctx context.Context, a *app.App, h config.Host) ([]vmReport, error) {
	host, err := a.ConnectTo(ctx, h)
	if err != nil {
		return nil, err
	}
	defer closeHost(ctx, a, host)
	vms, err := host.VMs(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]vmReport, 0, len(vms))
	for i := range vms {
		out = append(out, describeVM(h.Name, &vms[i]))
	}
	return out, nil
}
