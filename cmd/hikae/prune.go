package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

type pruneOptions struct {
	maxRewrite string
	grace      time.Duration
	dryRun     bool
}

func newPrune(a *app.App) *cobra.Command {
	var o pruneOptions
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "free the room of what was forgotten",
		Long: `Frees the room that no generation needs any more. It may run beside backups,
mounts and restores, and may be interrupted at any time; the next one goes on.

It works in two runs. The first condemns packs that nothing needs. A later one
deletes them, if they are still not needed, --grace has passed, and no backup,
restore or copy that was under way then still is; with a mount it is ten minutes
that must have passed. Packs of which less than half is needed are written anew
without the rest, the emptiest first, --max-rewrite at most.

When anything that must be known cannot be read, nothing is deleted. While
another prune of the repository runs this one ends at once.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitNoRoom),
		Example: `  hikae prune --dry-run
  hikae prune --max-rewrite 20GiB`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runPrune(cmd.Context(), a, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.maxRewrite, "max-rewrite", "", "write at most SIZE anew; 0 for nothing (default a tenth of the repository, at least 256 MiB)")
	f.DurationVar(&o.grace, "grace", repo.DefaultGrace, "how long packs stay condemned before they are deleted")
	f.BoolVar(&o.dryRun, "dry-run", false, "only say what would be done")
	jsonFlag(a, cmd)
	return cmd
}

func runPrune(ctx context.Context, a *app.App, o pruneOptions) error {
	po := repo.PruneOptions{DryRun: o.dryRun, Grace: o.grace}
	if o.grace < 0 {
		return app.Usagef("--grace: %v is negative", o.grace)
	}
	if o.maxRewrite != "" {
		n, err := ui.ParseSize(o.maxRewrite)
		if err != nil {
			return app.Usagef("--max-rewrite: %w", err)
		}
		if po.MaxRewrite = n; n == 0 {
			po.MaxRewrite = -1
		}
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the prune; the next one goes on")
	began := a.Clock()
	progress := a.UI.Progress(a.Clock)
	po.Progress = func(phase string, done, total int64) {
		switch phase {
		case "mark":
			progress.Count("prune: "+phase, "generations", done, total)
		case "rewrite":
			progress.Set("prune: "+phase, "", done, total)
		default:
			progress.Count("prune: "+phase, "packs", done, total)
		}
	}
	report, err := r.Prune(ctx, po)
	progress.Close()
	if err != nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		return a.UI.Object(struct {
			*repo.PruneReport
			Seconds float64 `json:"seconds"`
		}{report, took.Seconds()})
	}
	printPrune(a, report, took)
	return nil
}

func printPrune(a *app.App, p *repo.PruneReport, took time.Duration) {
	a.UI.Printf("%d generations need %s of %s in %d packs; %s are dead\n",
		p.Generations, ui.Size(p.BytesLive), ui.Size(p.BytesTotal), p.Packs, ui.Size(p.BytesDead))
	line := func(what string, packs, bytes int64) {
		if packs > 0 {
			a.UI.Printf("%s: %d packs, %s\n", what, packs, ui.Size(bytes))
		}
	}
	would := ""
	if p.DryRun {
		would = "would be "
	}
	line(would+"deleted", p.PacksDeleted, p.BytesFreed)
	line(would+"written anew, what is needed of", p.PacksRewritten, p.BytesRewritten)
	line(would+"condemned, to be deleted by a later run", p.PacksCondemned, p.BytesCondemned)
	line("condemned before, kept for now", p.PacksKeptForGrace+p.PacksKeptForSessions, p.BytesKept)
	if p.PacksKeptForSessions > 0 {
		a.UI.Printf("  of these %d wait for backups or mounts that were under way then\n", p.PacksKeptForSessions)
	}
	if p.PacksReleased > 0 {
		a.UI.Printf("%s condemned no longer, for they are needed again: %d packs\n", map[bool]string{true: "would be", false: "are"}[p.DryRun], p.PacksReleased)
	}
	a.UI.Printf("%s remain, in %s\n", ui.Size(p.BytesRemaining), ui.Duration(took))
	if p.PacksUnreadable > 0 {
		a.UI.Warnf("%d packs cannot be read and were left alone; hikae check --read-data says more", p.PacksUnreadable)
	}
	if p.BlocksMissing > 0 {
		a.UI.Warnf("%d blocks that generations need are missing; hikae check says more", p.BlocksMissing)
	}
}
