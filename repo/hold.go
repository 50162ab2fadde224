package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"hikae/repo/internal/fsx"
)

// holdPrefix begins the names of the files that keep a generation from being
// forgotten. They are empty: the name says it all, and a hold that somebody planted
// keeps what would have gone.
const holdPrefix = "hold-"

func (r *Repository) holdPath(ref Ref) string {
	return path.Join(r.vmDir(ref.VM), fmt.Sprintf("%s%010d", holdPrefix, ref.Sequence))
}

// Held tells which of a VM's generations are held, by sequence number. A VM that
// is not there has none.
func (r *Repository) Held(ctx context.Context, vm VMID) (map[uint64]bool, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	list, err := r.fs.ReadDir(r.vmDir(vm))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the generations of %v that are held: %w", vm, err)
	}
	held := make(map[uint64]bool)
	for _, e := range list {
		if digits, ok := strings.CutPrefix(e.Name(), holdPrefix); ok {
			if n, err := strconv.ParseUint(digits, 10, 63); err == nil {
				held[n] = true
			}
		}
	}
	return held, nil
}

// Hold keeps a generation from being forgotten, by anybody, until Release. One that
// is held already is no error.
func (r *Repository) Hold(ctx context.Context, ref Ref) error {
	return r.setHold(ctx, "hold", ref, func() error {
		err := fsx.WriteFile(r.fs, forgetTmp(), r.holdPath(ref), nil)
		if errors.Is(err, fs.ErrExist) {
			err = r.fs.SyncDir(r.vmDir(ref.VM)) // who made it may have died before it lasted
		}
		return err
	})
}

// Release ends a Hold. One that is not held is no error.
func (r *Repository) Release(ctx context.Context, ref Ref) error {
	return r.setHold(ctx, "release", ref, func() error {
		if err := r.fs.Remove(r.holdPath(ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return r.fs.SyncDir(r.vmDir(ref.VM))
	})
}

// setHold does it while nobody forgets the generation.
func (r *Repository) setHold(ctx context.Context, what string, ref Ref, do func() error) error {
	err := func() error {
		lock, err := r.lockGenerations(ctx)
		if err != nil {
			return err
		}
		defer lock.Close()
		r.cleanForgetTmp()
		if _, err := r.fs.Stat(r.manifestPath(ref)); errors.Is(err, fs.ErrNotExist) {
			return ErrNotFound
		} else if err != nil {
			return err
		}
		return do()
	}()
	if err != nil {
		return fmt.Errorf("%s %v: %w", what, ref, storageError(r.fs, err))
	}
	return nil
}
