package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

const quarantineMagic = "hikae quarantine 1"

// putAside marks a pack as damaged or missing, and moves a damaged file out of the way.
// The mark comes first: from then on nobody points to the pack, and what is lost of it
// is looked for, even where storage does not let the file be moved.
func (x *repairer) putAside(h *hurtPack) error {
	if h.Outcome == OutcomeMended || h.Outcome == OutcomeInUse {
		return nil
	}
	if x.o.DryRun {
		if !h.Missing {
			h.File = quarantinePath(markName(h.key) + damagedSuffix)
		}
		return nil
	}
	if err := x.mark(h); err != nil {
		return fmt.Errorf("mark pack %v: %w", h.key.handle, err)
	}
	if h.Missing {
		return nil
	}
	if err := x.move(h); err != nil {
		return fmt.Errorf("put pack %v aside: %w", h.key.handle, err)
	}
	return nil
}

func (x *repairer) mark(h *hurtPack) error {
	if q := x.marks[h.key]; q != nil && q.marked {
		return nil
	}
	what := "damaged"
	if h.Missing {
		what = "missing"
	}
	text := fmt.Appendf(nil, "%s\n%s\ntime %s\n", quarantineMagic, what, x.r.opt.Clock().UTC().Format(time.RFC3339))
	err := fsx.WriteFile(x.r.fs, tmpName(x.session.id, "quarantine-"+randomName()), quarantinePath(markName(h.key)), text)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// move puts a damaged file into quarantine/, under a name that is free.
func (x *repairer) move(h *hurtPack) error {
	from := h.key.typ.Path(h.key.handle)
	name := markName(h.key) + damagedSuffix
	var err error
	for n := 2; ; n++ {
		err = x.r.fs.Publish(from, quarantinePath(name))
		if !errors.Is(err, fs.ErrExist) {
			break
		}
		name = fmt.Sprintf("%s%s-%d", markName(h.key), damagedSuffix, n)
	}
	x.r.packs.Drop(h.key) // the open file is the one that was moved
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // taken away by hand
	case refusedToRemove(err):
		h.InPlace = true
		return nil
	case err != nil:
		return err
	}
	h.File = quarantinePath(name)
	if _, err := x.r.fs.Stat(from); err == nil {
		h.InPlace = true // append-only storage: it has both names now
	}
	if err := x.r.fs.SyncDir(quarantineDir); err != nil {
		return err
	}
	return x.r.fs.SyncDir(h.key.typ.Subdir(h.key.handle))
}

// clear removes marks of packs of which nothing is missing, and what earlier runs put
// aside of them; the index forgets them before. Backups that are under way may be about
// to commit what is in such a pack: then all stays.
func (x *repairer) clear(ctx context.Context) error {
	if len(x.report.Unreadable) > 0 {
		return nil // what these generations need is not known
	}
	for id := range x.packs.open {
		if !x.packs.readers[id] {
			return nil
		}
	}
	var names []string
	for _, h := range x.damaged {
		if (h.Outcome == OutcomeSaved || h.Outcome == OutcomeLost) && len(h.Generations) == 0 && !h.InPlace {
			names = append(names, markName(h.key))
		}
	}
	gone := make(map[block.Handle]bool)
	for k, q := range x.marks {
		if h := x.damaged[k]; h != nil && h.Outcome != OutcomeMended {
			continue
		}
		names = append(names, q.names(k)...)
		x.report.Cleared = append(x.report.Cleared, k.handle.String())
		if _, there := x.packs.table[k]; !there {
			gone[k.handle] = true
		}
	}
	slices.Sort(x.report.Cleared)
	if x.o.DryRun {
		return nil
	}
	if len(gone) > 0 {
		x.packs.index = x.session.index
		if err := x.packs.dropRecords(ctx, gone); err != nil {
			return err
		}
	}
	return x.r.dropQuarantine(names)
}

// names are the names of all that is in quarantine/ of a pack, the mark last.
func (q *quarantined) names(k packKey) []string {
	names := q.files
	if q.marked {
		names = append(names, markName(k))
	}
	return names
}

// healed finds packs in quarantine of which no generation misses anything any more, so
// that the index forgets them with those that prune deletes. It returns the names of what
// is to be removed then. A pack that is still in its place is left to a repair.
func (p *pruner) healed(f *fate) ([]string, error) {
	marks, err := p.r.readQuarantine()
	if err != nil {
		return nil, err
	}
	for id := range p.open {
		if !p.readers[id] {
			return nil, nil // it may be about to commit what is in one of them
		}
	}
	var names []string
	for k, q := range marks {
		if _, there := p.table[k]; there || p.short[k] {
			continue
		}
		names = append(names, q.names(k)...)
		f.gone = append(f.gone, k.handle.String())
		p.report.PacksCleared++
	}
	return names, nil
}

// dropQuarantine removes files of quarantine/. Where nothing can be removed they stay,
// which costs later backups a look at their parents' trees.
func (r *Repository) dropQuarantine(names []string) error {
	if len(names) == 0 {
		return nil
	}
	for _, name := range names {
		err := r.fs.Remove(quarantinePath(name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case refusedToRemove(err):
			r.log.Warn("the storage does not let go of a file of quarantine", "file", quarantinePath(name), "error", err)
		case err != nil:
			return err
		}
	}
	return r.fs.SyncDir(quarantineDir)
}

// refusedToRemove tells whether storage takes files and lets go of none.
func refusedToRemove(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)
}
