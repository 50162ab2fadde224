package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

// runScrub is hikae check --scrub.
func runScrub(ctx context.Context, a *app.App, o checkOptions) error {
	budget, err := parseBudget(o.budget)
	if err != nil {
		return app.Usagef("--budget: %w", err)
	}
	place, err := a.Repository()
	if err != nil {
		return err
	}
	if err := app.NeedsRepository(place.Path); err != nil {
		return err
	}
	a.Stopping("ending the scrub; what was proved so far is remembered")
	began := a.Clock()
	progress := a.UI.Progress(a.Clock)
	report, err := repo.Scrub(ctx, place.Path, repo.ScrubOptions{
		Budget: budget, Clock: a.Clock, Logger: a.Logger(),
		Progress: func(done, total int64) { progress.Set("scrub", "", done, total) },
	})
	progress.Close()
	if report == nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		if err := a.UI.Object(struct {
			OK    bool `json:"ok"`
			Scrub bool `json:"scrub"`
			*repo.ScrubReport
			Seconds float64 `json:"seconds"`
		}{len(report.Problems) == 0, true, report, took.Seconds()}); err != nil {
			return err
		}
	}
	printScrub(a, report, took)
	if err != nil {
		return err
	}
	if n := len(report.Problems); n > 0 {
		return &problemsError{n}
	}
	a.UI.Printf("no problems found\n")
	return nil
}

func printScrub(a *app.App, s *repo.ScrubReport, took time.Duration) {
	for _, p := range s.Problems {
		printProblem(a, p)
	}
	a.UI.Printf("%d of %d packs and %d of %d other files verified, %s of %s read, in %s\n", s.PacksVerified, s.Packs,
		s.FilesVerified-s.PacksVerified, s.Files-s.Packs, ui.Size(s.BytesRead), ui.Size(s.Bytes), ui.Duration(took))
	a.UI.Printf("%s\n", verifiedText(s.Oldest, s.PacksNever, s.Packs))
}

// verifiedText says when packs were verified.
func verifiedText(oldest *time.Time, never, packs int64) string {
	text := "oldest proof: none"
	if oldest != nil {
		text = "oldest proof: " + oldest.UTC().Format("2006-01-02 15:04 UTC")
	}
	return fmt.Sprintf("%s; never verified: %d of %d packs", text, never, packs)
}

// parseBudget reads 10%, 20GB or 1h; nothing is everything.
func parseBudget(s string) (b repo.ScrubBudget, err error) {
	if s == "" {
		return b, nil
	}
	if number, ok := strings.CutSuffix(s, "%"); ok {
		b.Percent, err = strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || !(b.Percent > 0 && b.Percent <= 100) {
			return b, fmt.Errorf("%q is not a percentage above 0 to 100", s)
		}
		return b, nil
	}
	if b.Time, err = time.ParseDuration(s); err == nil {
		if b.Time <= 0 {
			return b, fmt.Errorf("%q is no time", s)
		}
		return b, nil
	}
	if b.Bytes, err = parseDecimal(s); err != nil || b.Bytes == 0 {
		return b, fmt.Errorf("%q is none of a percentage (10%%), a size (20GB, 20GiB) and a time (1h)", s)
	}
	return b, nil
}

// parseDecimal is ui.ParseSize that also knows KB, MB, GB and TB, which are powers of
// thousand.
func parseDecimal(s string) (int64, error) {
	for i, unit := range []string{"KB", "MB", "GB", "TB"} {
		if number, ok := strings.CutSuffix(strings.ToUpper(s), unit); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
			for range i + 1 {
				if n < 0 || n > 1<<52 {
					return 0, fmt.Errorf("%q is out of range", s)
				}
				n *= 1000
			}
			return n, err
		}
	}
	return ui.ParseSize(s)
}
