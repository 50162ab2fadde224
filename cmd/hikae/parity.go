package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

// parityHelp is what the flags of parityFlags mean, for the help of hikae repair packs.
const parityHelp = `

Two parts of this need neither passphrase nor key:

  --mend      only mend packs, manifests and the like from their parity files;
              what these do not reach is left as it is
  --parity    make parity files where there is none, a damaged one, or less than
              asked for: --parity 5%, or as much as hikae init --parity said,
              or 3%. It reads what it makes parity for`

// parityOptions are the flags of what hikae repair packs does without keys.
type parityOptions struct {
	mend   bool
	parity string
}

// asAtInit is the value of --parity alone.
const asAtInit = "as at init"

func parityFlags(cmd *cobra.Command, o *parityOptions) {
	f := cmd.Flags()
	f.BoolVar(&o.mend, "mend", false, "only mend from parity files, without keys")
	f.StringVar(&o.parity, "parity", "", "make parity files of `PERCENT` where they are missing or damaged, without keys")
	f.Lookup("parity").NoOptDefVal = asAtInit
	cmd.MarkFlagsMutuallyExclusive("mend", "parity")
	cmd.MarkFlagsMutuallyExclusive("mend", "dry-run")
	cmd.MarkFlagsMutuallyExclusive("parity", "dry-run")
}

// keyless tells whether the flags ask for something that needs no keys.
func (o *parityOptions) keyless() bool { return o.mend || o.parity != "" }

// run does what the flags ask for.
func (o *parityOptions) run(ctx context.Context, a *app.App, args []string) error {
	percent := 0
	if o.parity != "" {
		// As in --parity 3%, where the flag's value is taken for an argument.
		if o.parity == asAtInit && len(args) == 1 {
			o.parity, args = args[0], nil
		}
		if len(args) > 0 {
			return app.Usagef("--parity is for all packs, not for some")
		}
		if o.parity != asAtInit {
			var err error
			if percent, err = parsePercent(o.parity); err != nil {
				return app.Usagef("--parity: %w", err)
			}
		}
	}
	place, err := a.Repository()
	if err != nil {
		return err
	}
	if err := app.NeedsRepository(place.Path); err != nil {
		return err
	}
	began := a.Clock()
	if o.mend {
		return runMend(ctx, a, place.Path, args, began)
	}
	return runAddParity(ctx, a, place.Path, percent, began)
}

func runMend(ctx context.Context, a *app.App, dir string, packs []string, began time.Time) error {
	a.Stopping("ending the repair; what was mended stays so")
	progress := a.UI.Progress(a.Clock)
	report, err := repo.Mend(ctx, dir, repo.MendOptions{
		Packs: packs, Logger: a.Logger(),
		Progress: func(done, total int64) { progress.Set("mend", "", done, total) },
	})
	progress.Close()
	if err != nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		if err := a.UI.Object(struct {
			OK bool `json:"ok"`
			*repo.MendReport
			Seconds float64 `json:"seconds"`
		}{len(report.Problems) == 0, report, took.Seconds()}); err != nil {
			return err
		}
	}
	for _, m := range report.Mended {
		a.UI.Printf("%s: mended from its parity file, %s\n", m.Path, ui.Size(m.Bytes))
	}
	for _, p := range report.Problems {
		printProblem(a, p)
	}
	a.UI.Printf("%d files looked at, %d mended, %s read, in %s\n", report.Files, len(report.Mended), ui.Size(report.BytesRead), ui.Duration(took))
	if n := len(report.Problems); n > 0 {
		return &problemsError{n}
	}
	return nil
}

func runAddParity(ctx context.Context, a *app.App, dir string, percent int, began time.Time) error {
	a.Stopping("ending; the next one goes on")
	progress := a.UI.Progress(a.Clock)
	report, err := repo.AddParity(ctx, dir, repo.ParityOptions{
		Percent: percent, Logger: a.Logger(),
		Progress: func(done, total int64) { progress.Set("parity", "", done, total) },
	})
	progress.Close()
	if err != nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		if err := a.UI.Object(struct {
			OK bool `json:"ok"`
			*repo.ParityReport
			Seconds float64 `json:"seconds"`
		}{len(report.Problems) == 0, report, took.Seconds()}); err != nil {
			return err
		}
	}
	for _, p := range report.Problems {
		printProblem(a, p)
	}
	a.UI.Printf("%d of %d files had %d %% of parity; %d got it, %d got it anew, %s in all, in %s\n", report.FilesBefore, report.Files, report.Percent,
		report.FilesAdded, report.FilesMade, ui.Size(report.BytesParity), ui.Duration(took))
	if report.FilesLarge > 0 {
		a.UI.Warnf("%d files are too large for parity", report.FilesLarge)
	}
	if n := len(report.Problems); n > 0 {
		return &problemsError{n}
	}
	return nil
}
