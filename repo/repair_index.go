package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"hikae/repo/internal/block"
	"hikae/repo/internal/index"
	"hikae/repo/internal/pack"
)

// RepairIndexOptions of RepairIndex. The zero value is good.
type RepairIndexOptions struct {
	// Progress, if not nil, is told how far a phase is: "read" counts packs, "merge"
	// records. It is called from one goroutine.
	Progress func(phase string, done, total int64)

	runRecords int // for tests
}

// RepairIndexReport is what RepairIndex did.
type RepairIndexReport struct {
	Packs           int64    `json:"packs"`            // whose records are in the new index
	PacksUnreadable []string `json:"packs_unreadable"` // of which only what the old index knew is in the new one
	Damaged         int      `json:"damaged"`          // segments of the old index that were damaged
	Segments        int      `json:"segments"`         // of the new index
	SegmentsBefore  int      `json:"segments_before"`
	SegmentsRemoved int      `json:"segments_removed"` // of the old one; the others are removed by a prune when no backup is under way
	Records         int64    `json:"records"`
	Bytes           int64    `json:"bytes"` // of the new index
}

// RepairIndex makes the index anew from the footers of all packs. It may run beside
// backups, mounts and restores, and be killed at any time; until it is done the old
// index stays in use. A prune waits for it, and while one is taking packs away it is
// ErrLocked. Its memory does not depend on the size of the repository.
func (r *Repository) RepairIndex(ctx context.Context, o RepairIndexOptions) (*RepairIndexReport, error) {
	report, err := r.repairIndex(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("repair the index: %w", repairError(ctx, r, err))
	}
	return report, nil
}

func (r *Repository) repairIndex(ctx context.Context, o RepairIndexOptions) (*RepairIndexReport, error) {
	lock, err := r.lockCondemned()
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	// The session owns unfinished files, and takes over the packs of dead ones.
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err := s.Close(); err != nil {
			r.log.Debug("end of the repair's session", "error", err)
		}
	}()
	report := &RepairIndexReport{PacksUnreadable: []string{}, Damaged: len(s.index.Damaged())}
	info, err := s.index.Rebuild(ctx, index.RebuildOptions{
		TempName:   func() string { return tmpName(s.id, "index-"+randomName()) },
		RunRecords: o.runRecords,
		Progress: func(done, total int64) {
			if o.Progress != nil {
				o.Progress("merge", done, total)
			}
		},
	}, func(ctx context.Context, add func(block.Record) error) error {
		return r.eachPacked(ctx, s, o, report, add)
	})
	if err != nil {
		return nil, err
	}
	report.Segments, report.Records, report.Bytes = info.Segments, info.Records, info.Bytes
	report.SegmentsBefore = len(info.Replaced)
	return report, r.dropSegments(ctx, s, info, report)
}

// eachPacked hands on the records of all packs. What the index alone knows of a pack
// whose footer cannot be read stays in it: with that, records can be saved.
func (r *Repository) eachPacked(ctx context.Context, s *Session, o RepairIndexOptions, report *RepairIndexReport, add func(block.Record) error) error {
	p := &pruner{r: r, report: &PruneReport{}, session: s, table: make(map[packKey]int32), handles: make(map[string]int32)}
	if err := p.listPacks(ctx); err != nil {
		return err
	}
	// A pack's name may not last yet, and backups will point to what the index has.
	dirs := make(map[string]bool)
	for _, k := range p.packs {
		dirs[k.key.typ.Subdir(k.key.handle)] = true
	}
	for dir := range dirs {
		if err := r.fs.SyncDir(dir); err != nil {
			return err
		}
	}
	unreadable := make(map[packKey]bool)
	for i, k := range p.packs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if o.Progress != nil {
			o.Progress("read", int64(i+1), int64(len(p.packs)))
		}
		records, err := p.records(k.key)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil && hurts(err):
			unreadable[k.key] = true
			report.PacksUnreadable = append(report.PacksUnreadable, k.key.handle.String())
			continue
		case err != nil:
			return fmt.Errorf("read the footer of pack %v: %w", k.key.handle, err)
		}
		report.Packs++
		for _, rec := range records {
			if err := add(rec); err != nil {
				return err
			}
		}
	}
	if len(unreadable) == 0 {
		return nil
	}
	return s.index.Scan(ctx, func(rec block.Record) error {
		if !unreadable[packKey{pack.TypeOf(rec.Kind), rec.Pack}] {
			return nil
		}
		return add(rec)
	})
}

// dropSegments removes the old index, if no session may be reading it.
func (r *Repository) dropSegments(ctx context.Context, s *Session, info index.RebuildInfo, report *RepairIndexReport) error {
	p := &pruner{r: r, session: s, table: make(map[packKey]int32), readers: make(map[string]bool)}
	open, err := p.openSessions(true)
	if err != nil {
		return err
	}
	for id := range open {
		if !p.readers[id] {
			return nil
		}
	}
	files := info.Replaced
	if info.Segments > 0 {
		files = s.index.Superseded()
	}
	if len(files) == 0 {
		return nil
	}
	s.index.Forget(files)
	for _, name := range files {
		if err := r.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			if refusedToRemove(err) {
				return nil // superseded they are, and do no harm
			}
			return err
		}
	}
	for _, name := range info.Replaced {
		if _, err := r.fs.Stat(name); errors.Is(err, fs.ErrNotExist) {
			report.SegmentsRemoved++
		}
	}
	if err := r.fs.SyncDir(path.Dir(files[0])); err != nil {
		return err
	}
	return s.index.Reload(ctx)
}
