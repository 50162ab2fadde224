package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/sched"
	"hikae/sched/control"
)

func newJobs(a *app.App) *cobra.Command {
	return askDaemon(a, &cobra.Command{
		Use:   "jobs",
		Short: "the jobs of the daemon: when they run next, how they ended last",
		Long: `Asks the daemon for its jobs. Times are those of this machine's time zone. Without
a daemon, hikae config check shows the jobs of the configuration.` + exitCodes(exitNoDaemon),
		Args: cobra.NoArgs,
	}, func(ctx context.Context, c *control.Client, _ []string) error {
		jobs, err := c.Jobs(ctx)
		if err != nil {
			return err
		}
		if a.UI.JSON {
			for _, j := range jobs.Jobs {
				if err := a.UI.Object(j); err != nil {
					return err
				}
			}
			return nil
		}
		tab := ui.NewTable("JOB", "KIND", "WHAT", "REPOSITORY", "SCHEDULE", "NEXT", "NOW", "LAST", "ENDED")
		for _, j := range jobs.Jobs {
			tab.Row(j.Job, j.Kind, orDash(strings.Join(j.VMs, " ")), j.Repository, strings.Join(j.Schedules, ", "),
				shortTime(j.Next), orDash(j.State), orDash(j.LastState), shortTime(j.LastEnded))
		}
		a.UI.Print(tab)
		return nil
	})
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// jobKind is a job's kind with its default filled in.
func jobKind(j sched.Job) sched.Kind {
	if j.Kind == "" {
		return sched.KindBackup
	}
	return j.Kind
}
