package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

func newShow(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show HOST/VM@GENERATION",
		Short: "show one generation: its disks, its files, how it was made",
		Long: `Shows one generation: its disks, its files, and how each disk was read.

GENERATION is a time as hikae generations prints it, the beginning of one, a
sequence number, or latest.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeGeneration(a),
		RunE:              func(cmd *cobra.Command, args []string) error { return runShow(cmd.Context(), a, args[0]) },
	}
	jsonFlag(a, cmd)
	return cmd
}

// shownGeneration is one generation in full, in JSON.
type shownGeneration struct {
	generationLine
	Tool          string         `json:"tool,omitempty"`
	BytesAudited  int64          `json:"bytes_audited"`
	HostInfo      repo.HostInfo  `json:"host_info"`
	Guest         repo.GuestInfo `json:"guest"`
	Previous      string         `json:"previous,omitempty"`
	DiskList      []shownDisk    `json:"disk_list"`
	Files         []shownFile    `json:"files"`
	RepositoryDir string         `json:"repository"`
	// of the last hikae verify that found it good
	BlocksVerified int64 `json:"blocks_verified,omitempty"`
}

type shownDisk struct {
	Key           int32  `json:"key"`
	Label         string `json:"label"`
	Name          string `json:"name"`
	Mode          string `json:"mode"`
	Reason        string `json:"reason"`
	Adapter       string `json:"adapter"`
	UUID          string `json:"uuid"`
	ChangeID      string `json:"change_id"`
	BackingPath   string `json:"backing_path"`
	BytesCapacity int64  `json:"bytes_capacity"`
	BytesData     int64  `json:"bytes_data"`
	BytesChanged  int64  `json:"bytes_changed"`
	BytesRead     int64  `json:"bytes_read"`
	BytesAudited  int64  `json:"bytes_audited"`
	BytesStored   int64  `json:"bytes_stored"`
}

type shownFile struct {
	Name      string `json:"name"`
	Size      int64  `json:"size"`
	BytesData int64  `json:"bytes_data"`
}

func runShow(ctx context.Context, a *app.App, arg string) error {
	vm, selector, err := parseGeneration(arg)
	if err != nil {
		return err
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	g, err := resolveGeneration(ctx, r, vm, selector)
	if err != nil {
		return err
	}
	s := shownGeneration{RepositoryDir: r.Dir()}
	if s.generationLine, err = describeGeneration(ctx, r, g.Ref()); err != nil {
		return err
	}
	// The list goes by the name of a file; this is what somebody with the keys wrote.
	switch v, err := r.Verification(ctx, g.Ref()); {
	case err == nil:
		s.Verified, s.BlocksVerified = v.Time.UTC().Format(time.RFC3339), v.Blocks
	case errors.Is(err, repo.ErrDamaged):
		a.UI.Warnf("%v", err)
	case !errors.Is(err, repo.ErrNotFound):
		return err
	}
	m := g.Manifest()
	s.Tool, s.HostInfo, s.Guest, s.Previous, s.BytesAudited = m.Tool, m.Host, m.Guest, m.Previous, m.Stats.BytesAudited
	s.DiskList, s.Files = []shownDisk{}, []shownFile{}
	for _, d := range m.Disks {
		s.DiskList = append(s.DiskList, shownDisk{
			Key: d.Key, Label: d.Label, Name: d.Name, Mode: d.Mode, Reason: d.Reason, Adapter: d.Adapter,
			UUID: d.UUID, ChangeID: d.ChangeID, BackingPath: d.BackingPath, BytesCapacity: d.Capacity, BytesData: d.DataBytes,
			BytesChanged: d.Stats.BytesChanged, BytesRead: d.Stats.BytesRead,
			BytesAudited: d.Stats.BytesAudited, BytesStored: d.Stats.BytesStored,
		})
	}
	files, err := g.Files(ctx)
	if err != nil {
		return err
	}
	for _, f := range files {
		s.Files = append(s.Files, shownFile{f.Name, f.Size, f.StoredBytes})
	}
	if a.UI.JSON {
		return a.UI.Object(s)
	}
	printGeneration(a, g.Ref(), s)
	return nil
}

func printGeneration(a *app.App, ref repo.Ref, s shownGeneration) {
	facts := ui.NewTable(ref.String(), "")
	fact := func(name string, value any) {
		if value != "" {
			facts.Row("  "+name, value)
		}
	}
	fact("sequence", s.Sequence)
	fact("time", s.Time.Local().Format("2006-01-02 15:04:05 MST"))
	fact("mode", withReason(s.Mode, s.Reason))
	fact("consistency", s.Consistency)
	fact("capacity", ui.Size(s.BytesCapacity))
	fact("data", ui.Size(s.BytesData))
	fact("changed", ui.Size(s.BytesChanged))
	fact("read", ui.Size(s.BytesRead)+" in "+ui.Seconds(s.Seconds)+", audited "+ui.Size(s.BytesAudited))
	fact("stored", ui.Size(s.BytesStored))
	if s.HostInfo.Product != "" {
		fact("host", s.HostInfo.Product+" "+s.HostInfo.Version+" build "+s.HostInfo.Build)
	}
	fact("guest", s.Guest.GuestID)
	fact("hardware", s.Guest.HardwareVersion)
	fact("power", s.Guest.PowerState)
	fact("made by", s.Tool)
	if at, err := time.Parse(time.RFC3339, s.Verified); err == nil {
		fact("verified", fmt.Sprintf("%s, %d blocks", at.Local().Format("2006-01-02 15:04:05 MST"), s.BlocksVerified))
	}
	a.UI.Print(facts)

	a.UI.Printf("\n")
	disks := ui.NewTable("DISK", "NAME", ">CAPACITY", ">DATA", ">CHANGED", ">READ", ">STORED", "MODE")
	for _, d := range s.DiskList {
		disks.Row(d.Label, d.Name, ui.Size(d.BytesCapacity), ui.Size(d.BytesData), ui.Size(d.BytesChanged), ui.Size(d.BytesRead),
			ui.Size(d.BytesStored), withReason(d.Mode, d.Reason))
	}
	a.UI.Print(disks)

	a.UI.Printf("\n")
	files := ui.NewTable("FILE", ">SIZE", ">DATA")
	for _, f := range s.Files {
		files.Row(f.Name, ui.Size(f.Size), ui.Size(f.BytesData))
	}
	a.UI.Print(files)
}

func withReason(mode, reason string) string {
	if reason == "" {
		return mode
	}
	return mode + " (" + reason + ")"
}
