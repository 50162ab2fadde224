package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

type checkOptions struct {
	readData bool
	scrub    bool
	budget   string
}

func newCheck(a *app.App) *cobra.Command {
	var o checkOptions
	cmd := &cobra.Command{
		Use:   "check",
		Short: "prove that the repository is whole",
		Long: `Proves the structure of the repository: that every generation opens, that none
was taken away or put in, and that every block it points to is there.

With --read-data it also decrypts and hashes every block, which reads the whole
repository.

With --scrub it does something else, without passphrase or key: it reads files
and compares them with the SHA-256 at their end. That finds bit rot, but not
someone who tampers. Files that were never verified come first, then those that
were verified the longest ago; the repository remembers when that was. So a part
of it each night proves all of it in turn:

  --budget 10%    a tenth of the repository
  --budget 20GB   so many bytes (KB, MB, GB, TB, or KiB, MiB, GiB, TiB)
  --budget 1h     as long as that (s, m, h)

Ctrl-C keeps what was proved. What --read-data read counts as verified as well.
hikae stats shows what was verified when.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged),
		Example: `  hikae check
  hikae check --scrub --budget 5%`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.scrub {
				return runScrub(cmd.Context(), a, o)
			}
			return runCheck(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.readData, "read-data", false, "decrypt and hash every block")
	f.BoolVar(&o.scrub, "scrub", false, "verify files by their SHA-256, without keys")
	f.StringVar(&o.budget, "budget", "", "scrub only so much: a percentage, a size or a time (default everything)")
	cmd.MarkFlagsMutuallyExclusive("scrub", "read-data")
	jsonFlag(a, cmd)
	return cmd
}

func runCheck(ctx context.Context, a *app.App, o checkOptions) error {
	if o.budget != "" {
		return app.Usagef("--budget is for --scrub")
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the check; it changes nothing but its notes of what was verified when")
	began := a.Clock()
	progress := a.UI.Progress(a.Clock)
	show := func(done, total int64) { progress.Count("check", "generations", done, total) }
	if o.readData {
		show = func(done, total int64) { progress.Set("check", "", done, total) }
	}
	report, err := r.Check(ctx, repo.CheckOptions{ReadData: o.readData, Remember: true, Progress: show})
	progress.Close()
	if err != nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		if err := a.UI.Object(struct {
			OK bool `json:"ok"`
			*repo.CheckReport
			ReadData bool    `json:"read_data"`
			Seconds  float64 `json:"seconds"`
		}{len(report.Problems) == 0, report, o.readData, took.Seconds()}); err != nil {
			return err
		}
	}
	for _, p := range report.Problems {
		printProblem(a, p)
	}
	a.UI.Printf("%d VMs, %d generations, %d disks; %d tree nodes, %d packs of %s looked at", report.VMs, report.Generations, report.Disks,
		report.Nodes, report.Packs, ui.Size(report.PackBytes))
	if o.readData {
		a.UI.Printf("; %d records, %s read", report.Records, ui.Size(report.BytesRead))
	}
	a.UI.Printf(", in %s\n", ui.Duration(took))
	if n := len(report.Problems); n > 0 {
		return &problemsError{n}
	}
	a.UI.Printf("no problems found\n")
	return nil
}

func printProblem(a *app.App, p repo.Problem) {
	a.UI.Printf("PROBLEM: %s\n", ui.Clean(p.What))
	if p.Pack != "" {
		a.UI.Printf("  pack %s, offset %d\n", p.Pack, p.Offset)
	}
	if len(p.Generations) > 0 {
		a.UI.Printf("  hurts %s\n", ui.Clean(strings.Join(p.Generations, ", ")))
	}
	for _, at := range p.Areas {
		a.UI.Printf("    %s, %s: %s at offset %d\n", ui.Clean(at.Generation), ui.Clean(at.Disk), ui.Size(at.Length), at.Offset)
	}
	if p.MoreAreas {
		a.UI.Printf("    and more\n")
	}
	if p.Remedy != "" {
		a.UI.Printf("  remedy: %s\n", ui.Clean(p.Remedy))
	}
}

// errProblems says that a check found problems.
var errProblems = errors.New("problems found")

// problemsError ends a check that found problems.
type problemsError struct{ n int }

func (e *problemsError) Error() string {
	if e.n == 1 {
		return "the repository has 1 problem"
	}
	return fmt.Sprintf("the repository has %d problems", e.n)
}

func (e *problemsError) Is(target error) bool { return target == errProblems }
