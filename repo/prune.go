package repo

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/index"
	"hikae/repo/internal/keys"
)

// ErrLocked says that somebody else is doing what only one may do at a time.
var ErrLocked = errors.New("locked")

// DefaultGrace is how long a pack stays after it was condemned, unless
// PruneOptions say otherwise.
const DefaultGrace = 24 * time.Hour

// minRewrite is the least that Prune rewrites without being told how much, in bytes.
const minRewrite = 256 << 20

// PruneOptions say how Prune goes about it. The zero value deletes at once what was
// condemned before and is still not needed: set Grace to DefaultGrace unless the
// operator wants that.
type PruneOptions struct {
	// MaxRewrite is how many bytes of live records may be written anew, to get
	// at the room in packs that are mostly dead. 0 is a tenth of the repository,
	// but at least 256 MiB; a negative number is none.
	MaxRewrite int64
	// DryRun finds out what would be done and changes nothing.
	DryRun bool
	// Grace is how long a pack must have been condemned before it is deleted.
	Grace time.Duration
	// Progress, if not nil, is told how far a phase is: "mark" counts
	// generations, "measure" and "delete" packs, "rewrite" bytes.
	Progress func(phase string, done, total int64)
}

// PruneReport is what Prune found and did. Sizes are in bytes. With DryRun it says
// what would have been done.
type PruneReport struct {
	DryRun      bool  `json:"dry_run"`
	Generations int64 `json:"generations"`
	Packs       int64 `json:"packs"`       // that were there
	BytesTotal  int64 `json:"bytes_total"` // their sizes
	BytesLive   int64 `json:"bytes_live"`  // of these: what a generation or an open session needs
	BytesDead   int64 `json:"bytes_dead"`  // the rest

	PacksCondemned       int64 `json:"packs_condemned"` // by this run
	BytesCondemned       int64 `json:"bytes_condemned"`
	PacksReleased        int64 `json:"packs_released"` // condemned before, needed again
	PacksRewritten       int64 `json:"packs_rewritten"`
	BytesRewritten       int64 `json:"bytes_rewritten"` // live records that were written anew
	PacksDeleted         int64 `json:"packs_deleted"`
	BytesFreed           int64 `json:"bytes_freed"`
	PacksKeptForGrace    int64 `json:"packs_kept_for_grace"`    // condemned, but not for long enough
	PacksKeptForSessions int64 `json:"packs_kept_for_sessions"` // condemned; a session or reader that was open then still is
	BytesKept            int64 `json:"bytes_kept"`              // of both

	PacksCleared    int64 `json:"packs_cleared"`    // were in quarantine, and nothing is missing of them any more
	PacksUnreadable int64 `json:"packs_unreadable"` // left alone
	BlocksMissing   int64 `json:"blocks_missing"`   // that a generation needs and no pack has
	BytesRemaining  int64 `json:"bytes_remaining"`  // sizes of all packs after this run
}

// condemnedLock keeps a second prune out while one runs.
const condemnedLock = condemnedDir + "/lock"

// Prune frees the room of what no generation needs any more, alongside whatever else
// goes on in the repository, in this process or others. It marks what the generations
// and the open sessions reach. Packs that nothing reaches it condemns; those that
// were condemned by an earlier run it deletes, if they are still not reached, the
// grace has passed, and no session or reader that was open then is open now. What is
// alive in packs that are mostly dead is written anew, and they are condemned as well.
//
// A manifest or node that cannot be read ends it before anything is deleted, and so does
// it when others rotated the keys since the repository was opened (ErrKeysChanged). It may be
// killed at any time; the next run goes on. While another prune runs it is ErrLocked.
//
// Its memory is four bytes for each block that is reached, with room to grow into at
// most six; sixteen for each tree node; and about 150 for each pack: 32 million blocks
// in 10,000 generations that share most of their nodes take less than 300 MiB, besides
// the caches of the repository.
func (r *Repository) Prune(ctx context.Context, o PruneOptions) (_ *PruneReport, err error) {
	p := &pruner{
		r: r, o: o, report: &PruneReport{DryRun: o.DryRun}, sidecars: r.config.parity() > 0,
		table:   make(map[packKey]int32),
		handles: make(map[string]int32),
		walked:  make(map[uint64]struct{}),
		strange: make(map[block.ID]bool),
		missing: make(map[block.ID]bool),
		short:   make(map[packKey]bool),
		spoilt:  make(map[block.ID]error),
		readers: make(map[string]bool),
	}
	err = p.run(ctx)
	if err == nil {
		return p.report, nil
	}
	switch {
	case errors.Is(err, fsx.ErrLocked):
		err = fmt.Errorf("another prune of this repository, or a repair, is running, wait until it has ended: %w", ErrLocked)
	case ctx.Err() != nil:
	default:
		err = storageError(r.fs, err)
	}
	return nil, fmt.Errorf("prune: %w", err)
}

// pruner is one run. The order in which it looks at things matters: packs, then the
// logs of open sessions, then manifests. So a pack whose session is open is found in
// its log, and one whose session has ended is reached by its manifest, or never will be.
type pruner struct {
	r       *Repository
	o       PruneOptions
	report  *PruneReport
	session *Session // nil in a dry run
	index   *index.Index

	packs   []*prunePack
	table   map[packKey]int32 // places in packs
	handles map[string]int32  // the same, by what files in condemned/ are called

	sidecars bool // there are parity files

	condemned map[string]*condemnation
	runs      map[string]*pruneRun
	open      map[string]bool // sessions, at the time their logs were read
	readers   map[string]bool // of these: those that only read
	parents   []string        // manifests they build on

	walked  map[uint64]struct{} // nodes of packs in the table: place in packs, offset
	strange map[block.ID]bool   // nodes of newer packs
	missing map[block.ID]bool   // blocks for which neither hint nor index knows a pack
	short   map[packKey]bool    // packs that should have had them
	spoilt  map[block.ID]error  // nodes that cannot be read, and those above them
	hurt    []string            // generations that have such nodes
	cause   error               // the first of these
	written int64               // bytes of packs that were made by rewriting
}

// prunePack is a pack as prune sees it.
type prunePack struct {
	key       packKey
	size      int64
	condemned bool
	inUse     bool     // an open session made it: everything in it counts
	reached   []uint32 // offsets, while sorted is false with repetitions
	sorted    bool
	damaged   bool
	live      int64 // bytes of records that are needed
	records   int64 // bytes of all records; 0 where nobody had to look
}

// fate is what is to become of the packs.
type fate struct {
	release []string     // condemned files
	remove  []*prunePack // condemned before, may go
	gone    []string     // condemned files whose pack went before
	dead    []*prunePack
	rewrite []*prunePack
}

func (p *pruner) run(ctx context.Context) error {
	if !p.o.DryRun {
		end, err := p.begin(ctx)
		if err != nil {
			return err
		}
		defer end()
	}
	// Whoever cannot read all that there is cannot know what is needed, and would leave
	// records of what it deleted in segments that it cannot read.
	err := p.r.ring.Fresh(p.r.fs)
	if err != nil {
		return err
	}
	if p.index, err = p.r.idx(ctx); err != nil {
		return err
	}
	if err := p.index.Reload(ctx); err != nil {
		return err
	}
	if err := p.listPacks(ctx); err != nil {
		return err
	}
	if err := p.readCondemned(); err != nil {
		return err
	}
	if p.open, err = p.openSessions(true); err != nil {
		return err
	}
	if err := p.mark(ctx); err != nil {
		return err
	}
	if err := p.measure(ctx); err != nil {
		return err
	}
	f := p.decide()
	aside, err := p.healed(f)
	if err != nil {
		return err
	}
	if p.o.DryRun {
		p.foretell(f)
		return nil
	}
	if err := p.adopt(); err != nil {
		return err
	}
	if err := p.release(f.release); err != nil {
		return err
	}
	if err := p.delete(ctx, f); err != nil {
		return err
	}
	if err := p.r.dropQuarantine(aside); err != nil {
		return err
	}
	if err := p.condemn(ctx, f); err != nil {
		return err
	}
	p.report.BytesRemaining = p.report.BytesTotal - p.report.BytesFreed + p.written
	return nil
}

// begin keeps other prunes out and starts a session, which first takes over what dead
// ones left, and under which packs are rewritten.
func (p *pruner) begin(ctx context.Context) (end func(), err error) {
	if err := p.r.keepEpoch(); err != nil { // what is rewritten must last
		return nil, err
	}
	if err := fsx.MakeDir(p.r.fs, condemnedDir); err != nil {
		return nil, err
	}
	lock, err := p.r.fs.Lock(condemnedLock, true, false)
	if err != nil {
		return nil, err
	}
	if p.session, err = p.r.Begin(ctx, SessionOptions{}); err != nil {
		_ = lock.Close()
		return nil, err
	}
	end = func() {
		if err := p.session.Close(); err != nil {
			// What it should have kept was flushed before it counted.
			p.r.log.Debug("end of prune's session", "error", err)
		}
		_ = lock.Close()
	}
	// Whoever may not delete must not condemn: backups would store again what is condemned.
	if err := p.mayRemove(); err != nil {
		end()
		return nil, err
	}
	p.sweepTmp()
	return end, nil
}

// mayRemove tries to remove a file.
func (p *pruner) mayRemove() error {
	name := p.tmp()
	f, err := p.r.fs.Create(name)
	if err != nil {
		return err
	}
	_ = f.Close() // it is empty
	return p.r.fs.Remove(name)
}

// sweepTmp removes the unfinished files of others than sessions, whose own go when the
// next one begins. Where that fails they do no harm.
func (p *pruner) sweepTmp() {
	lock, err := p.r.fs.Lock(path.Join(generationsDir, "lock"), true, false)
	if err == nil {
		p.r.cleanForgetTmp()
		_ = lock.Close()
	}
	if err := keys.Sweep(p.r.fs); err != nil {
		p.r.log.Debug("unfinished key files were not looked for", "error", err)
	}
}

func (p *pruner) progress(phase string, done, total int64) {
	if p.o.Progress != nil {
		p.o.Progress(phase, done, total)
	}
}

// foretell fills in the report of a dry run.
func (p *pruner) foretell(f *fate) {
	r := p.report
	r.PacksReleased = int64(len(f.release))
	for _, k := range f.remove {
		r.PacksDeleted++
		r.BytesFreed += k.size
	}
	for _, k := range f.rewrite {
		r.PacksRewritten++
		r.BytesRewritten += k.live
	}
	for _, list := range [][]*prunePack{f.dead, f.rewrite} {
		for _, k := range list {
			r.PacksCondemned++
			r.BytesCondemned += k.size
		}
	}
	r.BytesRemaining = r.BytesTotal - r.BytesFreed + r.BytesRewritten
}

func condemnedPath(name string) string { return path.Join(condemnedDir, name) }
