package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
	"hikae/cmd/hikae/internal/ui"
	"hikae/sched"
	"hikae/sched/calendar"
)

func newConfig(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "look at the configuration file",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	check := &cobra.Command{
		Use:   "check",
		Short: "whether the configuration is right, and what the daemon would do",
		Long: `Reads the configuration as hikae daemon would and shows its jobs and when each is
due next, were the daemon started now. What is wrong is named with its line; then
the exit code is 2. No host and no repository is asked.` + exitCodes(),
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return runConfigCheck(a) },
	}
	jsonFlag(a, check)
	cmd.AddCommand(check)
	return cmd
}

// plannedJob is one job in JSON.
type plannedJob struct {
	Job        string     `json:"job"`
	Kind       sched.Kind `json:"kind"`
	VMs        []string   `json:"vms,omitempty"`
	Repository string     `json:"repository"`
	Schedules  []string   `json:"schedules"`
	TimeZone   string     `json:"timezone"`
	Keep       string     `json:"keep,omitempty"`
	Window     string     `json:"window,omitempty"`
	Next       time.Time  `json:"next_run,omitzero"`
}

func runConfigCheck(a *app.App) error {
	f, err := a.Config()
	if err != nil {
		return err
	}
	if f.Path == "" || !config.Exists(f.Path) {
		return fmt.Errorf("%w: there is no file %s", config.ErrConfig, f.Path)
	}
	if err := daemonSecrets(a, f); err != nil {
		return err
	}
	tab := ui.NewTable("JOB", "KIND", "WHAT", "REPOSITORY", "SCHEDULE", "TIME ZONE", "NEXT", "KEEP", "WINDOW")
	for _, j := range f.Jobs {
		p, err := planJob(f, j, a.Clock())
		if err != nil {
			return err
		}
		if a.UI.JSON {
			if err := a.UI.Object(p); err != nil {
				return err
			}
		}
		next := "-"
		if !p.Next.IsZero() {
			next = p.Next.Format("2006-01-02 15:04 MST")
		}
		tab.Row(p.Job, p.Kind, orDash(strings.Join(p.VMs, " ")), p.Repository, strings.Join(p.Schedules, ", "), p.TimeZone, next, orDash(p.Keep), orDash(p.Window))
	}
	if tab.Len() == 0 {
		a.UI.Infof("%s is right, and has no jobs", f.Path)
		return nil
	}
	a.UI.Print(tab)
	a.UI.Infof("%s is right", f.Path)
	return nil
}

// planJob says what the daemon would do with a job, which is known to be valid.
func planJob(f *config.File, j sched.Job, now time.Time) (plannedJob, error) {
	p := plannedJob{
		Job: j.Name, Kind: jobKind(j), VMs: j.VMs, Repository: j.Repository, Schedules: j.Schedules, TimeZone: j.TimeZone, Window: j.Window,
	}
	if p.Repository == "" {
		p.Repository = f.Repositories[0].Name // the only one there is
	}
	if len(p.Schedules) == 0 {
		p.Schedules = []string{"manual"}
	}
	if !j.Keep.Empty() {
		p.Keep = j.Keep.String()
	}
	loc := time.Local
	if j.TimeZone != "" {
		var err error
		if loc, err = time.LoadLocation(j.TimeZone); err != nil {
			return p, fmt.Errorf("job %s: %w", j.Name, err)
		}
	}
	p.TimeZone = loc.String()
	for _, text := range j.Schedules {
		s, err := calendar.Parse(text, loc)
		if err != nil {
			return p, fmt.Errorf("job %s: %w", j.Name, err)
		}
		if s.Kind != calendar.Timed {
			continue
		}
		if next := s.Next(now).In(loc); p.Next.IsZero() || next.Before(p.Next) && !next.IsZero() {
			p.Next = next
		}
	}
	return p, nil
}
