package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

type initOptions struct {
	blockSize string
	parity    string
}

func newInit(a *app.App) *cobra.Command {
	var o initOptions
	cmd := &cobra.Command{
		Use:   "init",
		Short: "make a new repository",
		Long: `Makes a new repository in a directory that does not exist yet or is empty.

The passphrase comes from --passphrase-file, or is asked for twice. It is the
only key: whoever loses it loses every copy in the repository. hikae key add
--recovery makes a second one to print and put away.` +
			exitCodes(exitPassphrase, exitNoRoom),
		Example: "  hikae init --repo /mnt/nas/hikae --passphrase-file /etc/hikae/passphrase",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runInit(cmd.Context(), a, o) },
	}
	cmd.Flags().StringVar(&o.blockSize, "block-size", "128KiB", "size of a block: 64KiB, 128KiB or 256KiB; fixed for good")
	cmd.Flags().StringVar(&o.parity, "parity", "", "make parity files of PERCENT (1% to 50%, such as 3%) of what is stored, which mend bit rot (default none)")
	jsonFlag(a, cmd)
	return cmd
}

// parsePercent reads 3% or 3.
func parsePercent(s string) (int, error) {
	n, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(s, "%")))
	if err != nil || n < 1 || n > repo.MaxParity {
		return 0, fmt.Errorf("%q is not a percentage from 1%% to %d%%", s, repo.MaxParity)
	}
	return n, nil
}

func runInit(ctx context.Context, a *app.App, o initOptions) error {
	size, err := ui.ParseSize(o.blockSize)
	if err != nil || (size != 64<<10 && size != 128<<10 && size != 256<<10) {
		return app.Usagef("--block-size is 64KiB, 128KiB or 256KiB, not %q", o.blockSize)
	}
	parity := 0
	if o.parity != "" {
		if parity, err = parsePercent(o.parity); err != nil {
			return app.Usagef("--parity: %w", err)
		}
	}
	place, err := a.Repository()
	if err != nil {
		return err
	}
	if app.NeedsRepository(place.Path) == nil {
		return fmt.Errorf("there is a repository in %s already: %w", place.Path, repo.ErrExists)
	}
	if a.Flags.KeyFile != "" {
		return app.Usagef("a new repository begins with a passphrase; add the key file afterwards: hikae key add --new-key-file FILE")
	}
	pass, err := a.NewPassphrase(ctx, place)
	if err != nil {
		return err
	}
	defer clear(pass)
	if err := repo.Init(ctx, place.Path, repo.InitOptions{BlockSize: int(size), Parity: parity, Passphrase: pass, KDF: a.KDF, Clock: a.Clock}); err != nil {
		return fmt.Errorf("make a repository in %s: %w", place.Path, err)
	}
	// Opening it proves that what was written can be read with this passphrase.
	r, _, err := a.OpenRepositoryWith(ctx, place.Path, app.Key{Text: pass})
	if err != nil {
		return err
	}
	id := r.ID()
	if err := r.Close(); err != nil {
		return err
	}
	if a.UI.JSON {
		return a.UI.Object(map[string]any{"repository": place.Path, "id": id, "block_size": size, "parity": parity})
	}
	with := ""
	if parity > 0 {
		with = fmt.Sprintf(", with %d %% of parity", parity)
	}
	a.UI.Printf("repository %s made, id %s, blocks of %s%s\n", place.Path, id, ui.Size(size), with)
	if place.Name == "" {
		path, err := a.ConfigPath()
		if err != nil {
			return nil
		}
		place.Name = "main"
		a.UI.Infof("To use it without --repo, put this into %s:\n\n%s", path, config.RepositoryBlock(place))
	}
	return nil
}
