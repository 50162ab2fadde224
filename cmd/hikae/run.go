package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/sched/control"
	"hikae/sched/history"
)

// waitEvery is how often run --wait looks whether the run has ended.
const waitEvery = 500 * time.Millisecond

func newRun(a *app.App) *cobra.Command {
	var wait, now bool
	cmd := askDaemon(a, &cobra.Command{
		Use:   "run JOB",
		Short: "have the daemon run a job now",
		Long: `Has the daemon run a job, whatever its schedule says, and prints the number of the
run. A job that is under way already is an error that names its run.

--wait waits for the end and ends with 0 when the run went well, with warnings
or without. Ctrl-C ends the waiting, not the run.` + exitCodes(exitSomeFailed, exitNoDaemon, exitNoJob),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeJob(a),
	}, func(ctx context.Context, c *control.Client, args []string) error {
		id, err := c.Start(ctx, args[0], now)
		if err != nil {
			return err
		}
		if !wait {
			if a.UI.JSON {
				return a.UI.Object(runLine{id})
			}
			a.UI.Printf("run %d of %s; hikae log %d shows it\n", id, args[0], id)
			return nil
		}
		return waitForRun(ctx, a, c, id)
	})
	cmd.Flags().BoolVar(&wait, "wait", false, "wait for the end of the run")
	cmd.Flags().BoolVar(&now, "now", false, "begin even outside of the job's window")
	return cmd
}

// runLine is a run that began, in JSON.
type runLine struct {
	Run uint64 `json:"run"`
}

func waitForRun(ctx context.Context, a *app.App, c *control.Client, id uint64) error {
	a.UI.Infof("run %d began; waiting for its end", id)
	a.Stopping(fmt.Sprintf("no longer waiting; run %d goes on", id))
	for {
		d, err := c.Run(ctx, id)
		if err != nil {
			return err
		}
		if !history.Ended(d.Run.State) {
			if !pause(ctx, waitEvery) {
				return ctx.Err()
			}
			continue
		}
		if a.UI.JSON {
			err = a.UI.Object(d.Run)
		} else {
			a.UI.Printf("%s\n", ui.Clean(runText(d.Run)))
		}
		if err != nil {
			return err
		}
		return runError(d.Run)
	}
}

// runText is a run in a line.
func runText(r history.Run) string {
	text := fmt.Sprintf("run %d of %s: %s, %d of %d done", r.ID, r.Job, r.State, r.TasksOK, r.Tasks)
	if r.BytesRead > 0 {
		text += fmt.Sprintf(", %s read, %s stored", ui.Size(r.BytesRead), ui.Size(r.BytesStored))
	}
	if r.BytesFreed > 0 {
		text += fmt.Sprintf(", %s freed", ui.Size(r.BytesFreed))
	}
	return text + ", " + ui.Seconds(r.Seconds)
}

// runError is the error that a run's end is; nil when it went well.
func runError(r history.Run) error {
	switch {
	case r.State == history.OK || r.State == history.Warning:
		return nil
	case r.State == history.Failed && r.TasksOK > 0:
		return fmt.Errorf("run %d: %w: %d of %d; hikae log %d tells why", r.ID, errSomeFailed, r.TasksFailed, r.Tasks, r.ID)
	case r.Error != "":
		return fmt.Errorf("run %d %s: %s", r.ID, r.State, r.Error)
	}
	return fmt.Errorf("run %d was %s", r.ID, r.State)
}

func newCancel(a *app.App) *cobra.Command {
	vm := ""
	cmd := askDaemon(a, &cobra.Command{
		Use:   "cancel RUN",
		Short: "end a run of the daemon",
		Long: `Ends a run: what waits is given up, what is under way is stopped and its snapshot
removed. With --vm only that VM's part of it. It returns at once; hikae status
shows when the run has ended.` + exitCodes(exitNoDaemon, exitNoJob),
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, c *control.Client, args []string) error {
		id, err := parseRun(args[0])
		if err != nil {
			return err
		}
		if vm != "" {
			if _, err := parseVM(vm); err != nil {
				return err
			}
		}
		if err := c.Cancel(ctx, id, vm); err != nil {
			return err
		}
		if a.UI.JSON {
			return a.UI.Object(runLine{id})
		}
		a.UI.Printf("run %d is being ended\n", id)
		return nil
	})
	cmd.Flags().StringVar(&vm, "vm", "", "only this HOST/VM of the run")
	return cmd
}
