package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/sched"
	"hikae/sched/control"
)

// watchEvery is how often status --watch looks.
const watchEvery = 2 * time.Second

func newStatus(a *app.App) *cobra.Command {
	watch := false
	cmd := askDaemon(a, &cobra.Command{
		Use:   "status",
		Short: "how things stand: warnings, each VM's last good generation, what runs",
		Long: `One screen: what should be looked at on top; then of each VM its last good
generation, how old that is and when the next is due; then what runs, with how
far it is and when it may end, and what waits, and for what.

--watch shows it again every two seconds until Ctrl-C.` + exitCodes(exitNoDaemon),
		Args: cobra.NoArgs,
	}, func(ctx context.Context, c *control.Client, _ []string) error {
		a.Stopping("ending the watch; it changes nothing")
		for {
			st, err := c.Status(ctx)
			if err != nil {
				return err
			}
			if a.UI.JSON {
				err = a.UI.Object(st)
			} else {
				if out, ok := a.UI.Out.(*os.File); ok && watch && term.IsTerminal(int(out.Fd())) {
					a.UI.Printf("\x1b[H\x1b[2J") // cursor home, clear (ECMA-48)
				}
				printStatus(a, st)
			}
			if err != nil || !watch {
				return err
			}
			if !pause(ctx, watchEvery) {
				return ctx.Err()
			}
			if !a.UI.JSON {
				a.UI.Printf("\n")
			}
		}
	})
	cmd.Flags().BoolVar(&watch, "watch", false, "show it again every two seconds")
	return cmd
}

func printStatus(a *app.App, st control.Status) {
	if st.Stopping {
		a.UI.Printf("The daemon is stopping.\n")
	}
	if st.Daemon.ConfigError != "" {
		a.UI.Printf("error: the configuration was not read again: %s\n", ui.Clean(st.Daemon.ConfigError))
	}
	for _, w := range st.Warnings {
		a.UI.Printf("%s: %s\n", w.Level, ui.Clean(w.Text))
	}
	if st.Stopping || st.Daemon.ConfigError != "" || len(st.Warnings) > 0 {
		a.UI.Printf("\n")
	}
	tab := ui.NewTable("VM", "LAST GOOD", ">AGE", "NEXT", "JOBS")
	for _, v := range st.VMs {
		last, old := "none", "-"
		if v.Last != nil {
			last, old = v.Last.Generation, ui.Seconds(v.Age)
		}
		switch {
		case v.Stale:
			old += " !"
		case v.Unprotected:
			old += " ?"
		}
		tab.Row(v.Host+"/"+v.VM, last, old, shortTime(v.Next), orDash(strings.Join(v.Jobs, ", ")))
	}
	if tab.Len() > 0 {
		a.UI.Print(tab)
	} else {
		a.UI.Printf("No VM was seen yet; the first run of a job lists them.\n")
	}
	for _, r := range st.Running {
		done := r.TasksOK + r.TasksFailed + r.TasksSkipped + r.TasksCancelled
		a.UI.Printf("\nrun %d of %s: %s, %d of %d done, %d failed\n", r.ID, r.Job, r.State, done, r.Tasks, r.TasksFailed)
		for _, t := range r.Active {
			a.UI.Printf("  %s\n", ui.Clean(activeText(t, st.Time)))
		}
	}
	for i, w := range st.Queue {
		if i == 0 {
			a.UI.Printf("\n")
		}
		a.UI.Printf("waiting: %s of run %d (%s): %s\n", ui.Clean(taskName(w.Kind, w.Host, w.VM)), w.Run, w.Job, ui.Clean(w.For))
	}
}

// taskName is what a task does, and with what.
func taskName(kind, host, vm string) string {
	switch {
	case vm != "":
		return kind + " " + host + "/" + vm
	case host != "":
		return kind + " " + host
	}
	return kind
}

// activeText is a task that is under way, in a line.
func activeText(t sched.TaskStatus, now time.Time) string {
	p := t.Progress
	text := fmt.Sprintf("%s, since %s", taskName(t.Kind, t.Host, t.VM), ui.Duration(max(now.Sub(t.Started), 0)))
	if p.Phase != "" {
		text += ", " + strings.TrimSpace(p.Phase+" "+p.Disk)
	}
	if p.Total > 0 {
		text += fmt.Sprintf(", %d %%", min(100*p.Done/p.Total, 100))
	}
	if p.Rate > 0 && t.VM != "" {
		text += ", " + ui.Size(int64(p.Rate)) + "/s"
	}
	if !p.ETA.IsZero() {
		text += ", about " + ui.Duration(max(p.ETA.Sub(now), 0)) + " left"
	}
	return text
}
