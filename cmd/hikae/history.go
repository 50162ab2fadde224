package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/sched/control"
	"hikae/sched/history"
)

func newHistory(a *app.App) *cobra.Command {
	var q control.Query
	cmd := askDaemon(a, &cobra.Command{
		Use:   "history [JOB | HOST/VM]",
		Short: "what the daemon did: runs of jobs, or what was done with a VM",
		Long: `Shows the runs of all jobs or of one, or what was done with one VM, newest first.
When there is more, the last line says how to see it.` + exitCodes(exitNoDaemon),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeJob(a),
	}, func(ctx context.Context, c *control.Client, args []string) error {
		if q.Limit < 1 || q.Limit > 1000 {
			return app.Usagef("--limit must be from 1 to 1000")
		}
		if len(args) == 1 && strings.Contains(args[0], "/") {
			if _, err := parseVM(args[0]); err != nil {
				return err
			}
			q.VM = args[0]
			page, err := c.Tasks(ctx, q)
			if err != nil {
				return err
			}
			return printTasks(a, page)
		}
		if len(args) == 1 {
			q.Job = args[0]
		}
		page, err := c.Runs(ctx, q)
		if err != nil {
			return err
		}
		return printRuns(a, page)
	})
	f := cmd.Flags()
	f.IntVar(&q.Limit, "limit", 20, "how many to show, up to 1000")
	f.Uint64Var(&q.Page, "page", 0, "go on where the page before ended")
	f.StringVar(&q.State, "state", "", "only those in this state: ok, warning, failed, cancelled, interrupted, …")
	return cmd
}

func printRuns(a *app.App, page history.RunPage) error {
	tab := ui.NewTable(">RUN", "JOB", "STATE", "CAUSE", "QUEUED", ">TOOK", ">DONE", ">FAILED", ">READ", ">STORED")
	for _, r := range page.Runs {
		if a.UI.JSON {
			if err := a.UI.Object(r); err != nil {
				return err
			}
		}
		tab.Row(r.ID, r.Job, r.State, r.Trigger, shortTime(r.Queued), tookSeconds(r.Seconds), r.TasksOK, r.TasksFailed, ui.Size(r.BytesRead), ui.Size(r.BytesStored))
	}
	return printPage(a, tab, page.Next)
}

func printTasks(a *app.App, page history.TaskPage) error {
	tab := ui.NewTable(">RUN", "JOB", "WHAT", "STATE", "STARTED", ">TOOK", "GENERATION", ">READ", ">STORED", "ERROR")
	for _, t := range page.Tasks {
		if a.UI.JSON {
			if err := a.UI.Object(t); err != nil {
				return err
			}
		}
		tab.Row(t.Run, t.Job, t.Kind, t.State, shortTime(t.Started), tookSeconds(t.Seconds), orDash(t.Generation), ui.Size(t.BytesRead), ui.Size(t.BytesStored), t.Error)
	}
	return printPage(a, tab, page.Next)
}

func printPage(a *app.App, tab *ui.Table, next uint64) error {
	if tab.Len() == 0 {
		a.UI.Infof("nothing yet")
		return nil
	}
	a.UI.Print(tab)
	if next > 0 {
		a.UI.Infof("there is more: --page %d", next)
	}
	return nil
}

func newLog(a *app.App) *cobra.Command {
	return askDaemon(a, &cobra.Command{
		Use:   "log RUN",
		Short: "a run in full: its VMs, numbers and events",
		Long: `Shows what a run of the daemon did, or does: each VM or other task with its
numbers, errors, warnings and events.` + exitCodes(exitNoDaemon, exitNoJob),
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, c *control.Client, args []string) error {
		id, err := parseRun(args[0])
		if err != nil {
			return err
		}
		d, err := c.Run(ctx, id)
		if err != nil {
			return err
		}
		if a.UI.JSON {
			return a.UI.Object(d)
		}
		printRun(a, d)
		return nil
	})
}

func printRun(a *app.App, d control.RunDetail) {
	r := d.Run
	a.UI.Printf("%s\ncause %s, queued %s, began %s, ended %s\n", ui.Clean(runText(r)), r.Trigger, shortTime(r.Queued), shortTime(r.Started), shortTime(r.Ended))
	if r.Missed > 0 {
		a.UI.Printf("it makes up for %d further times it was due\n", r.Missed)
	}
	if r.Skipped > 0 {
		a.UI.Printf("it was due %d more times while it was under way\n", r.Skipped)
	}
	printEvents(a, "", "", r.Warnings, r.Events, r.EventsDropped)
	for _, t := range d.Tasks {
		a.UI.Printf("\n%s: %s", ui.Clean(taskName(t.Kind, t.Host, t.VM)), t.State)
		if t.Generation != "" {
			a.UI.Printf(", %s, %s", t.Generation, t.Mode)
		}
		if t.BytesRead > 0 {
			a.UI.Printf(", %s changed, %s read, %s stored", ui.Size(t.BytesChanged), ui.Size(t.BytesRead), ui.Size(t.BytesStored))
		}
		if t.Seconds > 0 {
			a.UI.Printf(", %s", ui.Seconds(t.Seconds))
		}
		if t.Attempts > 1 {
			a.UI.Printf(", %d attempts", t.Attempts)
		}
		a.UI.Printf("\n")
		for _, disk := range t.Disks {
			a.UI.Printf("  %s: %s, %s changed, %s read\n", ui.Clean(disk.Label), disk.Mode, ui.Size(disk.BytesChanged), ui.Size(disk.BytesRead))
		}
		printEvents(a, "  ", t.Error, t.Warnings, t.Events, t.EventsDropped)
	}
	for _, t := range d.Active {
		a.UI.Printf("\nnow: %s %s %s\n", ui.Clean(taskName(t.Kind, t.Host, t.VM)), t.Progress.Phase, ui.Clean(t.Progress.Disk))
	}
}

func printEvents(a *app.App, indent, failure string, warnings []string, events []history.Event, dropped int) {
	if failure != "" {
		a.UI.Printf("%serror: %s\n", indent, ui.Clean(failure))
	}
	for _, w := range warnings {
		a.UI.Printf("%swarning: %s\n", indent, ui.Clean(w))
	}
	for _, e := range events {
		a.UI.Printf("%s%s  %s: %s\n", indent, e.Time.Local().Format("2006-01-02 15:04:05"), e.Level, ui.Clean(e.Text))
	}
	if dropped > 0 {
		a.UI.Printf("%s%d events were not kept\n", indent, dropped)
	}
}
