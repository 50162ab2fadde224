package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
)

// delete removes packs that were condemned long enough ago. In this order: the files,
// so that they last to be gone; their records in the index; the condemned files, which
// until then tell a later run to go on.
func (p *pruner) delete(ctx context.Context, f *fate) error {
	gone := make(map[block.Handle]bool)
	names := f.gone
	for _, name := range names {
		if h, err := block.ParseHandle(name); err == nil {
			gone[h] = true
		}
	}
	dirs := make(map[string]bool)
	for n, k := range f.remove {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := k.key.handle
		if err := p.r.fs.Remove(k.key.typ.Path(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("delete pack %v: %w", h, err)
		}
		if p.sidecars {
			if err := dropParity(p.r.fs, k.key.typ.Path(h)); err != nil {
				return fmt.Errorf("delete the parity of pack %v: %w", h, err)
			}
		}
		p.r.packs.Drop(k.key) // an open file would keep the room
		dirs[k.key.typ.Subdir(h)] = true
		gone[h] = true
		names = append(names, h.String())
		p.report.PacksDeleted++
		p.report.BytesFreed += k.size
		p.progress("delete", int64(n+1), int64(len(f.remove)))
	}
	for name := range f.goneDirs() {
		dirs[name] = true
	}
	for dir := range dirs {
		if err := p.r.fs.SyncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := p.dropRecords(ctx, gone); err != nil {
		return err
	}
	// Parity that is all that is left of a pack that somebody misses stays.
	if p.sidecars && len(p.missing) == 0 {
		if err := dropOrphans(ctx, p.r.fs); err != nil {
			return fmt.Errorf("delete parity of files that are gone: %w", err)
		}
	}
	if damage := p.index.Damaged(); len(names) > 0 && len(damage) > 0 {
		p.r.log.Warn("the index cannot be read in full; what it says of deleted packs goes when it can", "error", damage[0])
		return nil
	}
	for _, name := range names {
		if err := p.r.fs.Remove(condemnedPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(p.condemned, name)
	}
	if len(names) == 0 {
		return nil
	}
	return p.r.fs.SyncDir(condemnedDir)
}

// goneDirs are where packs were that a run removed before it was killed, perhaps
// before that lasted.
func (f *fate) goneDirs() map[string]bool {
	dirs := make(map[string]bool)
	for _, name := range f.gone {
		if h, err := block.ParseHandle(name); err == nil {
			dirs[pack.Data.Subdir(h)] = true
			dirs[pack.Node.Subdir(h)] = true
		}
	}
	return dirs
}

// dropRecords takes the records of packs out of the index, and removes segments that
// nobody needs. While sessions are open, superseded ones stay: they may be reading them,
// and would store blocks again that they do not find. Readers look into the index for
// what was moved only, and look again when they do not find it. They do not count, or
// a mount that is always there would keep all that was ever superseded. When no record
// is left at all, nobody misses any.
func (p *pruner) dropRecords(ctx context.Context, gone map[block.Handle]bool) error {
	r := p.r
	files := p.index.Superseded()
	var emptied []string
	if len(gone) > 0 {
		var err error
		r.segMu.Lock()
		r.segOwner = p.session.id
		files, emptied, err = p.index.Compact(ctx, func(h block.Handle) bool { return gone[h] })
		r.segMu.Unlock()
		if err != nil {
			return fmt.Errorf("take deleted packs out of the index: %w", err)
		}
	}
	open, err := p.openSessions(false)
	if err != nil {
		return err
	}
	for id := range open {
		if !p.readers[id] && len(emptied) == 0 {
			files = nil
		}
	}
	if len(files)+len(emptied) == 0 {
		return nil
	}
	p.index.Forget(files)
	p.index.Forget(emptied)
	// What supersedes them may not last yet, if who wrote it died. Emptied ones go after
	// those that they supersede, which would be back without them.
	for _, list := range [][]string{nil, files, emptied} {
		for _, name := range list {
			if err := r.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := r.fs.SyncDir(indexDir); err != nil {
			return err
		}
	}
	return p.index.Reload(ctx)
}

// rewrite copies what is alive in packs into new ones, sealed anew, and returns those
// of which everything has another place now that the index knows and that lasts.
func (p *pruner) rewrite(ctx context.Context, list []*prunePack) ([]*prunePack, error) {
	if len(list) == 0 {
		return nil, nil
	}
	var total int64
	for _, k := range list {
		total += k.live
	}
	var done []*prunePack
	s := p.session
	before := s.Stats().BytesStored
	for _, k := range list {
		err := p.copyLive(ctx, k)
		if pack.IsDamage(err) {
			p.r.log.Warn("a pack that should be rewritten is damaged and is left alone", "pack", k.key.handle, "error", err)
			p.report.PacksUnreadable++
			continue
		}
		if err != nil {
			s.fail(err)
			return nil, fmt.Errorf("rewrite pack %v: %w", k.key.handle, err)
		}
		done = append(done, k)
		p.report.PacksRewritten++
		p.report.BytesRewritten += k.live
		p.progress("rewrite", p.report.BytesRewritten, total)
	}
	if err := s.data.Flush(ctx); err != nil {
		return nil, s.explain(err)
	}
	if err := s.node.Flush(ctx); err != nil {
		return nil, s.explain(err)
	}
	p.written = s.Stats().BytesStored - before
	if err := s.flushIndex(ctx); err != nil {
		return nil, err
	}
	if err := s.failure(); err != nil {
		return nil, err
	}
	return done, nil
}

// copyLive adds the live records of a pack to new ones.
func (p *pruner) copyLive(ctx context.Context, k *prunePack) error {
	f, err := p.r.openFile(k.key)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	records, err := f.Records()
	if err != nil {
		return err
	}
	to := p.session.data
	if k.key.typ == pack.Node {
		to = p.session.node
	}
	var scratch pack.Scratch
	var buf reader
	for _, rec := range records {
		if !k.isLive(rec, p.missing) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.r.plausible(rec); err != nil {
			return err
		}
		sealed := buf.room(int(rec.Length))
		if err := f.ReadSealed(sealed, int64(rec.Offset)); err != nil {
			return err
		}
		raw := p.r.rawSize(rec.Kind)
		payload, err := f.Unseal(&buf.Scratch, rec, raw, sealed)
		if err != nil {
			return err
		}
		if _, err := to.Add(p.session.ctx, &scratch, rec.ID, rec.Kind, raw, payload); err != nil {
			return p.session.explain(err)
		}
	}
	return nil
}
