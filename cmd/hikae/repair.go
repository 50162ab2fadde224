package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

func newRepair(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "mend a damaged repository: packs, the index",
		Long: `Mends what hikae check found. What cannot be mended is read again from the VMs by
their next backups.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newRepairPacks(a), newRepairIndex(a))
	return cmd
}

func newRepairPacks(a *app.App) *cobra.Command {
	var o repo.RepairOptions
	var parity parityOptions
	cmd := &cobra.Command{
		Use:   "packs [PACK...]",
		Short: "save what can be saved of damaged packs, and have the rest backed up again",
		Long: `Finds damaged and missing packs: all of them, which reads the whole repository,
or among those named, as hikae check names them; missing ones in any case.

A damaged pack is mended from its parity file, if it has one that reaches. Else
all in it that still opens is written to new packs, and the file is put aside in
the folder quarantine of the repository. What is lost is listed, with the
generations and the places on their disks, and remembered: the next backup of
each of these VMs reads it again from the host, incremental or not. Then older
generations that have the same there are whole again too; others stay hurt, and
can be forgotten.

A later repair or prune that finds nothing missing clears what was put aside.

It may run beside backups, mounts and restores, and may be interrupted at any
time; while a prune or another repair runs it ends at once. It ends with exit
code 5 while a generation is hurt.` + parityHelp + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitNoRoom),
		Example: `  hikae repair packs --dry-run
  hikae repair packs 0a1b2c3d4e5f6071`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if parity.keyless() {
				return parity.run(cmd.Context(), a, args)
			}
			o.Packs = args
			return runRepairPacks(cmd.Context(), a, o)
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only say what would be done")
	parityFlags(cmd, &parity)
	jsonFlag(a, cmd)
	return cmd
}

func runRepairPacks(ctx context.Context, a *app.App, o repo.RepairOptions) error {
	for i, name := range o.Packs {
		o.Packs[i] = strings.ToLower(name)
		if len(name) != 16 || strings.Trim(o.Packs[i], "0123456789abcdef") != "" {
			return app.Usagef("%q is not the name of a pack: 16 hexadecimal digits", name)
		}
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the repair; the next one goes on")
	began := a.Clock()
	progress := a.UI.Progress(a.Clock)
	o.Progress = func(phase string, done, total int64) {
		switch phase {
		case "walk":
			progress.Count("repair: "+phase, "generations", done, total)
		case "save":
			progress.Count("repair: "+phase, "packs", done, total)
		default:
			progress.Set("repair: "+phase, "", done, total)
		}
	}
	report, err := r.RepairPacks(ctx, o)
	progress.Close()
	if err != nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		if err := a.UI.Object(struct {
			OK bool `json:"ok"`
			*repo.RepairReport
			Seconds float64 `json:"seconds"`
		}{!report.Left(), report, took.Seconds()}); err != nil {
			return err
		}
	}
	printRepair(a, report, took)
	if report.Left() {
		return &hurtError{report}
	}
	return nil
}

func printRepair(a *app.App, r *repo.RepairReport, took time.Duration) {
	for _, name := range r.Mended {
		a.UI.Printf("%s: mended from its parity file\n", name)
	}
	for _, what := range r.Unreadable {
		a.UI.Printf("PROBLEM: %s\n  not mended: copy it back from another copy of the repository\n", ui.Clean(what))
	}
	for _, p := range r.Packs {
		printRepaired(a, p, r.DryRun)
	}
	if n := len(r.Cleared); n > 0 {
		a.UI.Printf("nothing is missing any more of %s, put aside before: %s\n", packs(n), willBe(r.DryRun, "cleared"))
	}
	a.UI.Printf("%s of %s read, for %d generations, in %s\n", packs(int(r.PacksRead)), ui.Size(r.BytesRead), r.Generations, ui.Duration(took))
	if len(r.Packs) == 0 && len(r.Unreadable) == 0 && len(r.Mended) == 0 {
		a.UI.Printf("nothing to repair\n")
	}
}

// willBe is what a dry run would do, or what was done.
func willBe(dry bool, done string) string {
	if dry {
		return "would be " + done
	}
	return done
}

func packs(n int) string {
	if n == 1 {
		return "1 pack"
	}
	return fmt.Sprintf("%d packs", n)
}

func printRepaired(a *app.App, p repo.RepairedPack, dry bool) {
	a.UI.Printf("pack %s of %s: %s\n", p.Pack, p.Type, ui.Clean(p.What))
	switch p.Outcome {
	case repo.OutcomeMended:
		a.UI.Printf("  mended from its parity file\n")
		return
	case repo.OutcomeInUse:
		a.UI.Printf("  a backup that is under way made it: left alone, repair again when that has ended\n")
		return
	}
	if p.RecordsSaved+p.RecordsElsewhere > 0 {
		a.UI.Printf("  %s, %s; %d are in other packs\n", willBe(dry, fmt.Sprintf("saved: %d of %d records", p.RecordsSaved, p.Records)),
			ui.Size(p.BytesSaved), p.RecordsElsewhere)
	}
	if p.RecordsLost > 0 {
		a.UI.Printf("  lost: %d of %d records\n", p.RecordsLost, p.Records)
	}
	if p.InPlace {
		a.UI.Printf("  the storage does not let the damaged file be taken away: it stays where it is, and nothing points to it any more\n")
	} else if p.File != "" {
		a.UI.Printf("  %s\n", willBe(dry, "put aside: "+p.File))
	}
	if len(p.Generations) == 0 {
		if p.Outcome == repo.OutcomeLost {
			a.UI.Printf("  no generation needs what is lost\n")
		}
		return
	}
	a.UI.Printf("  hurts %s\n", ui.Clean(strings.Join(p.Generations, ", ")))
	for _, at := range p.Areas {
		a.UI.Printf("    %s, %s: %s at offset %d\n", ui.Clean(at.Generation), ui.Clean(at.Disk), ui.Size(at.Length), at.Offset)
	}
	if p.MoreAreas {
		a.UI.Printf("    and more\n")
	}
}

// hurtError ends a repair that left generations hurt.
type hurtError struct{ report *repo.RepairReport }

func (e *hurtError) Error() string {
	hurt := make(map[string]bool)
	vms := make(map[string]bool)
	var names []string
	for _, p := range e.report.Packs {
		for _, g := range p.Generations {
			hurt[g] = true
			if vm, _, _ := strings.Cut(g, "@"); !vms[vm] {
				vms[vm] = true
				names = append(names, vm)
			}
		}
	}
	switch {
	case len(hurt) == 0:
		return "not all could be repaired"
	case e.report.DryRun:
		return fmt.Sprintf("%d generations are hurt", len(hurt))
	}
	const most = 10
	if len(names) > most {
		names = append(names[:most], "…")
	}
	return ui.Clean(fmt.Sprintf("%d generations are hurt; back up again, so that what the VMs still have is read from their hosts: %s", len(hurt), strings.Join(names, ", ")))
}

func (e *hurtError) Is(target error) bool { return target == errProblems }

func newRepairIndex(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "index",
		Short: "make the index anew from the packs",
		Long: `Makes the index anew out of what the packs say of themselves, and puts it in the
place of the old one, however damaged that is. It reads the end of each pack.

The index keeps blocks from being stored twice and finds those that were moved;
nothing else depends on it. Backups, mounts and restores may go on meanwhile, and
the repair may be interrupted at any time: until it is done the old index stays
in use.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitNoRoom),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRepairIndex(cmd.Context(), a) },
	}
	jsonFlag(a, cmd)
	return cmd
}

func runRepairIndex(ctx context.Context, a *app.App) error {
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the repair; the old index stays in use")
	began := a.Clock()
	progress := a.UI.Progress(a.Clock)
	report, err := r.RepairIndex(ctx, repo.RepairIndexOptions{Progress: func(phase string, done, total int64) {
		what := "packs"
		if phase == "merge" {
			what = "records"
		}
		progress.Count("repair: "+phase, what, done, total)
	}})
	progress.Close()
	if err != nil {
		return err
	}
	took := a.Clock().Sub(began)
	if a.UI.JSON {
		if err := a.UI.Object(struct {
			OK bool `json:"ok"`
			*repo.RepairIndexReport
			Seconds float64 `json:"seconds"`
		}{len(report.PacksUnreadable) == 0, report, took.Seconds()}); err != nil {
			return err
		}
	}
	a.UI.Printf("%d records of %s, %s of index, in %s\n", report.Records, packs(int(report.Packs)), ui.Size(report.Bytes), ui.Duration(took))
	if report.Damaged > 0 {
		a.UI.Printf("%d files of the old index were damaged\n", report.Damaged)
	}
	if left := report.SegmentsBefore - report.SegmentsRemoved; left > 0 {
		a.UI.Printf("%d files of the old index stay until a prune finds no backup under way\n", left)
	}
	if n := len(report.PacksUnreadable); n > 0 {
		return fmt.Errorf("%s cannot be read, hikae repair packs %s saves what can be saved: %w", packs(n),
			strings.Join(report.PacksUnreadable[:min(n, 10)], " "), errProblems)
	}
	return nil
}
