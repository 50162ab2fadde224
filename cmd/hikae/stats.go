package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

func newStats(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "stats [HOST/VM]",
		Short: "what the copies are, and what they take",
		Long: `Counts, for each VM and for all together, or for one VM generation by generation:

  LOGICAL     all disks of all generations, without holes: what whole copies
              would take
  UNIQUE      the distinct blocks among them
  COMPRESSED  these blocks as they are stored, compressed and sealed
  METADATA    the maps of the disks

A block that several VMs have counts for each of them, and once in all. Of a
generation only what no earlier one of its VM has counts as unique: its growth.
PHYSICAL is the size of all files, with blocks that nothing needs any more. The
last line says when packs were last verified by hikae check --scrub or
--read-data.

It reads all maps, and needs about 256 MiB of memory at most, for a repository of
more than 8 million distinct blocks by counting in several rounds.` +
			exitCodes(exitPassphrase, exitNotFound, exitDamaged),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeStoredVM(a),
		RunE:              func(cmd *cobra.Command, args []string) error { return runStats(cmd.Context(), a, args) },
	}
	jsonFlag(a, cmd)
	return cmd
}

// ratios are a line's ratios in JSON.
type ratios struct {
	Deduplication float64 `json:"deduplication"`
	Compression   float64 `json:"compression"`
}

func ratiosOf(s repo.SpaceStats) ratios { return ratios{s.Deduplication(), s.Compression()} }

// growthLine is one generation in JSON.
type growthLine struct {
	Generation string    `json:"generation"`
	Sequence   uint64    `json:"sequence"`
	Time       time.Time `json:"time"`
	repo.GenerationStats
}

// vmStatsLine is one VM in JSON.
type vmStatsLine struct {
	Host string `json:"host"`
	VM   string `json:"vm"`
	repo.SpaceStats
	ratios
	Unreadable  int64        `json:"unreadable"`
	Generations []growthLine `json:"generations"`
}

// totalStatsLine is the last line in JSON when all VMs are counted.
type totalStatsLine struct {
	Repository string `json:"repository"`
	VMs        int    `json:"vms"`
	repo.SpaceStats
	ratios
	Unreadable int64 `json:"unreadable"`
	repo.PhysicalStats
	Packs      int64      `json:"packs"`
	PacksNever int64      `json:"packs_never_verified"`
	Oldest     *time.Time `json:"oldest_verified,omitempty"`
}

func runStats(ctx context.Context, a *app.App, args []string) error {
	var o repo.StatsOptions
	for _, arg := range args {
		vm, err := parseVM(arg)
		if err != nil {
			return err
		}
		o.VMs = append(o.VMs, vm)
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the count; it changes nothing")
	progress := a.UI.Progress(a.Clock)
	o.Progress = func(done, total int64) { progress.Count("count", "generations", done, total) }
	s, err := r.Stats(ctx, o)
	progress.Close()
	if err != nil {
		return err
	}
	switch {
	case a.UI.JSON:
		err = statsJSON(a, r, s, o.VMs == nil)
	case o.VMs != nil:
		printGrowth(a, s.VMs[0])
	default:
		printStats(a, s)
	}
	if err != nil {
		return err
	}
	if s.Unreadable > 0 {
		return fmt.Errorf("%w: %d manifests and tree nodes could not be read; what they lead to is not in these sums", repo.ErrDamaged, s.Unreadable)
	}
	return nil
}

func statsJSON(a *app.App, r *repo.Repository, s *repo.RepositoryStats, total bool) error {
	for _, v := range s.VMs {
		line := vmStatsLine{
			Host: v.VM.Host, VM: v.VM.Name, SpaceStats: v.SpaceStats, ratios: ratiosOf(v.SpaceStats),
			Unreadable: v.Unreadable, Generations: []growthLine{},
		}
		for _, g := range v.Generations {
			line.Generations = append(line.Generations, growthLine{g.Ref.Name(), g.Ref.Sequence, g.Ref.Time.UTC(), g})
		}
		if err := a.UI.Object(line); err != nil {
			return err
		}
	}
	if !total {
		return nil
	}
	return a.UI.Object(totalStatsLine{
		r.Dir(), len(s.VMs), s.Total, ratiosOf(s.Total), s.Unreadable, s.Physical,
		s.Verified.Packs, s.Verified.PacksNever, oldestVerified(s.Verified),
	})
}

func oldestVerified(v repo.Verified) *time.Time {
	if v.Oldest.IsZero() {
		return nil
	}
	return &v.Oldest
}

func times(ratio float64) string {
	if ratio == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f×", ratio)
}

func printStats(a *app.App, s *repo.RepositoryStats) {
	tab := ui.NewTable("VM", ">GENERATIONS", ">LOGICAL", ">UNIQUE", ">COMPRESSED", ">METADATA", ">DEDUP", ">COMPRESSION")
	row := func(name string, n int, x repo.SpaceStats) {
		tab.Row(name, n, ui.Size(x.Logical), ui.Size(x.Unique), ui.Size(x.Compressed), ui.Size(x.Metadata), times(x.Deduplication()), times(x.Compression()))
	}
	n := 0
	for _, v := range s.VMs {
		row(v.VM.String(), len(v.Generations), v.SpaceStats)
		n += len(v.Generations)
	}
	row("in all", n, s.Total)
	a.UI.Print(tab)
	p := s.Physical
	a.UI.Printf("\nphysical %s in %d files: blocks %s, maps %s, index %s, parity %s, other %s\n",
		ui.Size(p.Total), p.Files, ui.Size(p.Data), ui.Size(p.Nodes), ui.Size(p.Index), ui.Size(p.Parity), ui.Size(p.Other))
	if p.Total > 0 && s.Total.Logical > 0 {
		a.UI.Printf("whole copies would take %s: %s as much\n", ui.Size(s.Total.Logical), times(float64(s.Total.Logical)/float64(p.Total)))
	}
	a.UI.Printf("%s\n", verifiedText(oldestVerified(s.Verified), s.Verified.PacksNever, s.Verified.Packs))
}

func printGrowth(a *app.App, v repo.VMStats) {
	tab := ui.NewTable("GENERATION", ">SEQ", ">LOGICAL", ">UNIQUE", ">COMPRESSED", ">METADATA")
	row := func(name string, sequence any, x repo.SpaceStats) {
		tab.Row(name, sequence, ui.Size(x.Logical), ui.Size(x.Unique), ui.Size(x.Compressed), ui.Size(x.Metadata))
	}
	for _, g := range v.Generations {
		row(g.Ref.Name(), g.Ref.Sequence, g.SpaceStats)
	}
	row("in all", "", v.SpaceStats)
	a.UI.Print(tab)
	a.UI.Printf("\ndeduplication %s, compression %s\n", times(v.Deduplication()), times(v.Compression()))
}
