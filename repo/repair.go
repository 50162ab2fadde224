package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"sync"

	"hikae/repo/internal/block"
	"hikae/repo/internal/cache"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

// RepairOptions say what RepairPacks looks at. The zero value is good.
type RepairOptions struct {
	// Packs are the names, 16 hexadecimal digits, of those to read; none: all, which
	// is the whole repository. What the tree nodes alone show is found in any case.
	Packs []string
	// DryRun finds out what would be done and changes nothing.
	DryRun bool
	// Progress, if not nil, is told how far a phase is: "walk" counts generations,
	// "read" bytes, "save" packs. It is called from one goroutine at a time.
	Progress func(phase string, done, total int64)
}

// What became of a damaged or missing pack.
const (
	OutcomeMended = "mended" // by its parity: it is again what was written
	OutcomeSaved  = "saved"  // all that was in it is in other packs
	OutcomeLost   = "lost"   // some of it is nowhere else
	OutcomeInUse  = "in use" // a backup that is under way made it: it was left alone
)

// RepairedPack is a pack that was found damaged or missing, and what became of it.
type RepairedPack struct {
	Pack    string `json:"pack"`
	Type    string `json:"type"` // blocks or nodes
	What    string `json:"what"` // is wrong with it
	Missing bool   `json:"missing"`
	Outcome string `json:"outcome"`
	// Records are those that are known to have been in it; each is stored anew, in
	// another pack already, or lost.
	Records          int   `json:"records"`
	RecordsSaved     int   `json:"records_saved"`
	RecordsElsewhere int   `json:"records_elsewhere"`
	RecordsLost      int   `json:"records_lost"`
	BytesSaved       int64 `json:"bytes_saved"` // of records stored anew, sealed
	// File is where the damaged file was put; InPlace says that storage did not let
	// it be moved, so that it still lies among the packs.
	File    string `json:"file,omitempty"`
	InPlace bool   `json:"in_place,omitempty"`

	Generations []string `json:"generations"` // those that miss what is lost
	Areas       []Area   `json:"areas"`       // where, the first 32
	MoreAreas   bool     `json:"more_areas,omitempty"`
}

// RepairReport is what RepairPacks found and did. With DryRun it says what would have
// been done.
type RepairReport struct {
	DryRun      bool           `json:"dry_run"`
	Generations int            `json:"generations"`
	PacksRead   int64          `json:"packs_read"`
	BytesRead   int64          `json:"bytes_read"`
	Packs       []RepairedPack `json:"packs"`   // what was damaged or missing
	Cleared     []string       `json:"cleared"` // packs put aside before, of which nothing is missing any more
	// Mended are damaged manifests and the like that were mended from their parity
	// files, and Unreadable those that were not.
	Mended     []string `json:"mended"`
	Unreadable []string `json:"unreadable"`
}

// Left tells whether a generation is still hurt, or something was left alone.
func (r *RepairReport) Left() bool {
	return len(r.Unreadable) > 0 || slices.ContainsFunc(r.Packs, func(p RepairedPack) bool {
		return p.Outcome == OutcomeInUse || p.Outcome == OutcomeLost && len(p.Generations) > 0
	})
}

// RepairPacks finds damaged and missing packs. What a damaged one has that still opens
// is stored anew in other packs; when that lasts, the damaged file is put aside in
// quarantine/. Of each pack of which something is lost a mark stays there, which makes
// the next backups of the VMs concerned read again from the host what they miss. Marks and
// files are cleared by a later repair or prune that finds nothing missing.
//
// It may run beside backups, mounts and restores, and be killed at any time; the next
// run goes on. While a prune or another repair runs it is ErrLocked. Bytes of storage
// that cannot be read for another reason than damage end it with an error, before
// anything is put aside.
func (r *Repository) RepairPacks(ctx context.Context, o RepairOptions) (*RepairReport, error) {
	x := &repairer{
		r: r, o: o, damaged: make(map[packKey]*hurtPack), kept: make(map[block.ID]bool),
		report: &RepairReport{DryRun: o.DryRun, Packs: []RepairedPack{}, Cleared: []string{}, Mended: []string{}, Unreadable: []string{}},
	}
	err := x.run(ctx)
	if err == nil {
		return x.report, nil
	}
	return nil, fmt.Errorf("repair: %w", repairError(ctx, r, err))
}

func repairError(ctx context.Context, r *Repository, err error) error {
	switch {
	case errors.Is(err, fsx.ErrLocked):
		return fmt.Errorf("a prune or another repair of this repository is running, wait until it has ended: %w", ErrLocked)
	case ctx.Err() != nil:
		return err
	}
	return storageError(r.fs, err)
}

// repairer is one run of RepairPacks.
type repairer struct {
	r       *Repository
	o       RepairOptions
	report  *RepairReport
	session *Session // nil in a dry run
	packs   *pruner  // its eyes: which packs there are, who uses them
	c       *checker // walks the generations
	marks   map[packKey]*quarantined
	mu      sync.Mutex       // guards what follows while packs are read
	read    map[packKey]bool // packs that were read from front to end
	row     int              // how many in a row storage could not read
	damaged map[packKey]*hurtPack
	kept    map[block.ID]bool // in a dry run: what would have been stored
}

// hurtPack is a pack that is damaged or missing.
type hurtPack struct {
	RepairedPack
	key  packKey
	lost map[uint32]block.Record // by offset: records that are nowhere else
	all  bool                    // which records it had is not known
}

func (x *repairer) run(ctx context.Context) error {
	if !x.o.DryRun {
		end, err := x.begin(ctx)
		if err != nil {
			return err
		}
		defer end()
	}
	var err error
	if x.marks, err = x.r.readQuarantine(); err != nil {
		return err
	}
	if err := x.mendFiles(ctx); err != nil {
		return err
	}
	if err := x.look(ctx); err != nil {
		return err
	}
	if err := x.walk(ctx); err != nil {
		return err
	}
	if err := x.readAll(ctx); err != nil {
		return err
	}
	if err := x.fromWalk(); err != nil {
		return err
	}
	list := x.sorted()
	if err := x.saveAll(ctx, list); err != nil {
		return err
	}
	for _, h := range list {
		if err := x.putAside(h); err != nil {
			return err
		}
	}
	if err := x.blame(ctx, list); err != nil {
		return err
	}
	if err := x.clear(ctx); err != nil {
		return err
	}
	for _, h := range list {
		x.report.Packs = append(x.report.Packs, h.RepairedPack)
	}
	return nil
}

// begin keeps prunes and other repairs out, and starts a session under which records
// are stored.
func (x *repairer) begin(ctx context.Context) (end func(), err error) {
	lock, err := x.r.lockCondemned()
	if err != nil {
		return nil, err
	}
	if err := fsx.MakeDir(x.r.fs, quarantineDir); err != nil {
		_ = lock.Close()
		return nil, err
	}
	if x.session, err = x.r.Begin(ctx, SessionOptions{}); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return func() {
		if err := x.session.Close(); err != nil {
			// What it should have kept was flushed before it counted.
			x.r.log.Debug("end of the repair's session", "error", err)
		}
		_ = lock.Close()
	}, nil
}

// mendFiles mends manifests and the like, as far as they have parity.
func (x *repairer) mendFiles(ctx context.Context) error {
	if x.o.DryRun {
		return nil
	}
	m := &mender{
		o: MendOptions{Logger: x.r.log}, up: &upkeep{fs: x.r.fs}, id: x.r.config.id,
		prover: newProver(x.r.fs, x.r.config.id), report: &MendReport{},
	}
	err := walkStored(ctx, x.r.fs, func(f storedFile) error {
		if f.kind != storedSealed || f.parity < 0 {
			return nil
		}
		return m.file(ctx, f)
	}, nil)
	for _, f := range m.report.Mended {
		x.report.Mended = append(x.report.Mended, f.Path)
	}
	return err
}

// lockCondemned takes the lock of who takes packs away.
func (r *Repository) lockCondemned() (io.Closer, error) {
	if err := fsx.MakeDir(r.fs, condemnedDir); err != nil {
		return nil, err
	}
	return r.fs.Lock(condemnedLock, true, false)
}

func (x *repairer) progress(phase string, done, total int64) {
	if x.o.Progress != nil {
		x.o.Progress(phase, done, total)
	}
}

// look lists packs and open sessions. Sessions come after packs: whose session is not in
// the list has ended, and a manifest reaches the pack, or none ever will.
func (x *repairer) look(ctx context.Context) error {
	x.packs = &pruner{
		r: x.r, report: &PruneReport{}, session: x.session,
		table: make(map[packKey]int32), handles: make(map[string]int32), readers: make(map[string]bool),
	}
	if err := x.packs.listPacks(ctx); err != nil {
		return err
	}
	if err := x.packs.readCondemned(); err != nil {
		return err
	}
	var err error
	x.packs.open, err = x.packs.openSessions(true)
	return err
}

// walk visits all that generations reach, as a check of the structure does.
func (x *repairer) walk(ctx context.Context) error {
	x.c = &checker{
		r: x.r, report: &CheckReport{},
		o:       CheckOptions{Progress: func(done, total int64) { x.progress("walk", done, total) }},
		seen:    make(map[block.ID]bool),
		packs:   make(map[packKey]int64),
		gone:    make(map[packKey]error),
		bad:     make(map[packKey]*badPack),
		footers: cache.New[packKey, []block.Record](32<<20, 1, func(packKey) uint32 { return 0 }, nil),
	}
	if err := x.c.structure(ctx); err != nil {
		return err
	}
	x.report.Generations = x.c.report.Generations
	for _, p := range x.c.report.Problems {
		if p.Remedy == remedyManifest {
			x.report.Unreadable = append(x.report.Unreadable, p.What)
		}
	}
	return nil
}

// found notes a damaged or missing pack; the first finding counts.
func (x *repairer) found(k packKey, err error, missing bool) {
	if x.damaged[k] != nil {
		return
	}
	h := &hurtPack{key: k, lost: make(map[uint32]block.Record)}
	h.RepairedPack = RepairedPack{
		Pack: k.handle.String(), Type: "blocks", What: err.Error(), Missing: missing,
		Generations: []string{}, Areas: []Area{},
	}
	if k.typ == pack.Node {
		h.Type = "nodes"
	}
	if i, ok := x.packs.table[k]; ok && x.packs.packs[i].inUse {
		h.Outcome = OutcomeInUse
	}
	x.damaged[k] = h
}

// fromWalk adds what reading packs does not show: packs that are needed and not there.
func (x *repairer) fromWalk() error {
	for k, b := range x.c.bad {
		_, err := x.r.fs.Stat(k.typ.Path(k.handle))
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		case x.c.gone[k] != nil && err != nil:
			x.found(k, b.err, true)
		case x.c.gone[k] != nil: // somebody has just brought it back
		case x.read[k] && x.damaged[k] == nil:
			// The pack is as it was written, and does not have what a node says.
			x.report.Unreadable = append(x.report.Unreadable, b.err.Error())
		default:
			x.found(k, b.err, false)
		}
	}
	return nil
}

// sorted are the damaged packs in a fixed order.
func (x *repairer) sorted() []*hurtPack {
	var list []*hurtPack
	for _, h := range x.damaged {
		list = append(list, h)
	}
	slices.SortFunc(list, func(a, b *hurtPack) int {
		return cmp.Or(cmp.Compare(a.key.typ, b.key.typ), cmp.Compare(a.key.handle, b.key.handle))
	})
	return list
}

// blame finds the generations that miss what is lost.
func (x *repairer) blame(ctx context.Context, list []*hurtPack) error {
	clear(x.c.bad)
	problems := make(map[*badPack]*Problem)
	for _, h := range list {
		if h.Outcome == OutcomeMended || !h.all && len(h.lost) == 0 {
			continue
		}
		b := &badPack{}
		if !h.all {
			b.records = make(map[uint32]bool)
			for offset := range h.lost {
				b.records[offset] = true
			}
		}
		x.c.bad[h.key] = b
		problems[b] = &Problem{}
	}
	if err := x.c.blameOn(ctx, problems); err != nil {
		return err
	}
	for _, h := range list {
		if p := problems[x.c.bad[h.key]]; p != nil {
			h.Generations = append(h.Generations, p.Generations...)
			h.Areas, h.MoreAreas = append(h.Areas, p.Areas...), p.MoreAreas
		}
	}
	return nil
}

// quarantinePath is the path of a file in quarantine/.
func quarantinePath(name string) string { return path.Join(quarantineDir, name) }
