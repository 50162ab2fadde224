package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

func newGenerations(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "generations [HOST/VM]",
		Short: "list what the repository holds",
		Long: `Lists the generations of one VM, or of all VMs in the repository.

Every generation is complete in itself. MODE only says how its bytes were
found: full (all that was allocated), incremental (what the host said had
changed), scan (all, compared with the generation before) or import (from
local files). STORED is what it added to the repository. VERIFIED is the day of
the last hikae verify that found it good.` +
			exitCodes(exitPassphrase, exitNotFound, exitDamaged),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeStoredVM(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runGenerations(cmd.Context(), a, args)
		},
	}
	jsonFlag(a, cmd)
	return cmd
}

// generationLine is one generation in JSON.
type generationLine struct {
	Host          string    `json:"host"`
	VM            string    `json:"vm"`
	Generation    string    `json:"generation"`
	Sequence      uint64    `json:"sequence"`
	Time          time.Time `json:"time"`
	Mode          string    `json:"mode"`
	Reason        string    `json:"reason"`
	Consistency   string    `json:"consistency"`
	Disks         int       `json:"disks"`
	BytesCapacity int64     `json:"bytes_capacity"`
	BytesData     int64     `json:"bytes_data"`
	BytesChanged  int64     `json:"bytes_changed"`
	BytesRead     int64     `json:"bytes_read"`
	BytesStored   int64     `json:"bytes_stored"`
	Seconds       float64   `json:"seconds"`
	Held          bool      `json:"held"`
	Verified      string    `json:"verified,omitempty"` // when hikae verify found it good, RFC 3339
	Error         string    `json:"error,omitempty"`
}

func runGenerations(ctx context.Context, a *app.App, args []string) error {
	var vms []repo.VMID
	for _, arg := range args {
		vm, err := parseVM(arg)
		if err != nil {
			return err
		}
		vms = append(vms, vm)
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	if vms == nil {
		if vms, err = r.VMs(ctx); err != nil {
			return err
		}
	}
	tab := ui.NewTable("VM", "GENERATION", ">SEQ", "MODE", "CONSISTENCY", ">CAPACITY", ">DATA", ">STORED", ">AGE", "VERIFIED", "HELD")
	var damaged error
	for _, vm := range vms {
		refs, err := r.Refs(ctx, vm)
		if err != nil {
			return err
		}
		held, err := r.Held(ctx, vm)
		if err != nil {
			return err
		}
		verified, err := r.Verifications(ctx, vm)
		if err != nil {
			return err
		}
		for _, ref := range refs {
			line, err := describeGeneration(ctx, r, ref)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			line.Held = held[ref.Sequence]
			day := ""
			if at, ok := verified[ref.Sequence]; ok {
				line.Verified, day = at.Format(time.RFC3339), at.Local().Format(time.DateOnly)
			}
			mark := ""
			if line.Held {
				mark = "held"
			}
			if err != nil {
				// One unreadable generation must not hide the others.
				a.UI.Errorf("%v: %v", ref, err)
				damaged = err
				line.Error = err.Error()
			}
			if a.UI.JSON {
				if err := a.UI.Object(line); err != nil {
					return err
				}
				continue
			}
			if err != nil {
				tab.Row(vm, line.Generation, line.Sequence, "unreadable", "", "", "", "", ui.Duration(a.Clock().Sub(ref.Time)), day, mark)
				continue
			}
			tab.Row(vm, line.Generation, line.Sequence, line.Mode, line.Consistency,
				ui.Size(line.BytesCapacity), ui.Size(line.BytesData), ui.Size(line.BytesStored), ui.Duration(a.Clock().Sub(ref.Time)), day, mark)
		}
	}
	if tab.Len() > 0 {
		a.UI.Print(tab)
	} else if len(vms) == 0 {
		a.UI.Infof("The repository holds nothing yet; next: hikae backup HOST/VM")
	}
	return damaged
}

func describeGeneration(ctx context.Context, r *repo.Repository, ref repo.Ref) (generationLine, error) {
	line := generationLine{
		Host: ref.VM.Host, VM: ref.VM.Name, Generation: ref.Name(), Sequence: ref.Sequence, Time: ref.Time.UTC(),
	}
	g, err := r.Generation(ctx, ref)
	if err != nil {
		return line, err
	}
	m := g.Manifest()
	line.Mode, line.Reason, line.Consistency, line.Disks = m.Mode, m.Reason, m.Consistency, len(m.Disks)
	line.BytesCapacity, line.BytesChanged, line.BytesRead = m.Stats.BytesCapacity, m.Stats.BytesChanged, m.Stats.BytesRead
	line.BytesStored, line.Seconds = m.Stats.BytesStored, m.Stats.Seconds
	for _, d := range m.Disks {
		line.BytesData += d.DataBytes
	}
	return line, nil
}

// parseVM reads HOST/VM from the command line.
func parseVM(arg string) (repo.VMID, error) {
	vm, err := repo.ParseVMID(arg)
	if err != nil {
		return vm, app.Usagef("%w", err)
	}
	return vm, nil
}

// resolveGeneration reads HOST/VM@GENERATION and opens what it names.
func resolveGeneration(ctx context.Context, r *repo.Repository, vm repo.VMID, selector string) (*repo.Generation, error) {
	ref, err := r.Resolve(ctx, vm, selector)
	if err != nil {
		return nil, err
	}
	return r.Generation(ctx, ref)
}

// parseGeneration reads HOST/VM@GENERATION from the command line.
func parseGeneration(arg string) (repo.VMID, string, error) {
	vm, selector, err := repo.ParseSelector(arg)
	if err != nil {
		return vm, "", app.Usagef("%w", err)
	}
	return vm, selector, nil
}
