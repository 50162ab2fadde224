package main

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/sched/control"
)

func socketFlag(cmd *cobra.Command, to *string) {
	cmd.Flags().StringVar(to, "socket", "", "where the daemon listens (default [daemon].socket, then /run/hikae/hikae.sock as root, else hikae/hikae.sock in $XDG_RUNTIME_DIR, else hikae.sock in the state directory)")
}

// defaultSocket is where root's daemon listens.
const defaultSocket = "/run/hikae/hikae.sock"

// socketPath is where the daemon listens: the flag, the configuration, or the
// user's place for such things.
func socketPath(a *app.App, flag string) (string, error) {
	if flag != "" {
		return filepath.Abs(flag)
	}
	f, err := a.Config()
	if err != nil {
		return "", err
	}
	if f.Daemon.Socket != "" {
		return f.Daemon.Socket, nil
	}
	if os.Geteuid() == 0 {
		return defaultSocket, nil
	}
	if dir := a.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "hikae", "hikae.sock"), nil
	}
	if a.Flags.State == "" {
		a.Flags.State = f.Daemon.State
	}
	dir, err := a.StateDir()
	return filepath.Join(dir, "hikae.sock"), err
}

// askDaemon gives a verb that talks to the daemon its --socket and --json, and the
// client.
func askDaemon(a *app.App, cmd *cobra.Command, ask func(ctx context.Context, c *control.Client, args []string) error) *cobra.Command {
	var socket string
	socketFlag(cmd, &socket)
	jsonFlag(a, cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		path, err := socketPath(a, socket)
		if err != nil {
			return err
		}
		c := control.NewClient(path)
		defer c.Close()
		return ask(cmd.Context(), c, args)
	}
	return cmd
}

// completeJob offers the jobs of the configuration.
func completeJob(a *app.App) completer {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var names []string
		if f, err := a.Config(); err == nil && len(args) == 0 {
			for _, j := range f.Jobs {
				names = append(names, j.Name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func parseRun(arg string) (uint64, error) {
	id, err := strconv.ParseUint(arg, 10, 64)
	if err != nil || id == 0 {
		return 0, app.Usagef("%q is not the number of a run; hikae history shows them", arg)
	}
	return id, nil
}

// shortTime is a moment for people, in their time zone; - when there is none.
func shortTime(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04")
}

// tookSeconds is a duration for people; - when there is none yet.
func tookSeconds(s float64) string {
	if s == 0 {
		return "-"
	}
	return ui.Seconds(s)
}

// pause waits; false when the context ends first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
