package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"hikae/repo/internal/block"
	"hikae/repo/internal/cache"
	"hikae/repo/internal/keys"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// CheckOptions say how deep Check looks.
type CheckOptions struct {
	// ReadData reads every pack that a generation needs, from front to end:
	// proves its SHA-256, opens every record and hashes it again. Without it
	// only structure is proved.
	ReadData bool
	// Remember notes in the repository, for Verified and for scrubs, when ReadData
	// found what whole. Without it nothing is written.
	Remember bool
	// Progress, if not nil, is told of bytes of packs read with ReadData, of
	// generations without. It is called from one goroutine at a time.
	Progress func(done, total int64)
}

// Area is a stretch of a disk, in bytes.
type Area struct {
	Generation string `json:"generation"`
	Disk       string `json:"disk"`
	Offset     int64  `json:"offset"`
	Length     int64  `json:"length"`
}

// maxAreas is how many areas a problem lists.
const maxAreas = 32

// Problem is one finding of Check.
type Problem struct {
	What        string   `json:"what"`
	Pack        string   `json:"pack,omitempty"`        // the pack's name
	Offset      int64    `json:"offset"`                // of the first bad record in the pack
	Records     int      `json:"records,omitempty"`     // how many are bad; 0 is all
	Generations []string `json:"generations,omitempty"` // those that it hurts
	Areas       []Area   `json:"areas,omitempty"`       // where it hurts them, the first 32
	MoreAreas   bool     `json:"more_areas,omitempty"`
	Remedy      string   `json:"remedy"`
}

// CheckReport is what Check found.
type CheckReport struct {
	VMs         int       `json:"vms"`
	Generations int       `json:"generations"`
	Disks       int       `json:"disks"`
	Nodes       int64     `json:"nodes"`      // tree nodes read
	Packs       int64     `json:"packs"`      // that a generation needs
	PackBytes   int64     `json:"pack_bytes"` // their sizes
	Records     int64     `json:"records"`    // opened and hashed, with ReadData
	BytesRead   int64     `json:"bytes_read"` // with ReadData
	Problems    []Problem `json:"problems"`
}

const (
	remedyPack     = "hikae repair packs %v saves what can be saved of it, and makes the next backups of these VMs read again from their hosts what is lost; or copy the file back from another copy of the repository"
	remedyLost     = "back these VMs up: what they still have there is read again from their hosts, and older generations that have the same are whole again; what stays lost, because the VM has changed there, goes with the generations: hikae forget; or copy the pack back from another copy of the repository and run hikae repair packs"
	remedyManifest = "copy the file back from another copy of the repository; otherwise this generation is lost, the others are not concerned"
	remedyChain    = "if nobody removed generations on purpose, look for who can write to the repository"
	remedyIndex    = "hikae repair index makes it anew from the packs; no data is hurt, but until then blocks stored before may be stored once more"
)

// Check proves that every generation can be read: every manifest opens and follows
// its predecessor, every tree node reads, and every pack that they need is there,
// is what it should be, and contains the record. With ReadData every byte of it is
// read. Problems are in the report; the error is only about the check itself. Memory
// is bounded, whatever the size of the repository.
func (r *Repository) Check(ctx context.Context, o CheckOptions) (*CheckReport, error) {
	c := &checker{
		r: r, o: o, report: &CheckReport{Problems: []Problem{}},
		seen:  make(map[block.ID]bool),
		packs: make(map[packKey]int64),
		gone:  make(map[packKey]error),
		bad:   make(map[packKey]*badPack),
		footers: cache.New[packKey, []block.Record](32<<20, 1, func(packKey) uint32 {
			return 0
		}, nil),
	}
	if o.ReadData && o.Remember {
		c.keeper = newDateKeeper(r.fs, r.config.id, r.opt.Clock)
		defer c.remember(ctx)
	}
	if err := c.structure(ctx); err != nil {
		return nil, fmt.Errorf("check: %w", err)
	}
	if o.ReadData {
		if err := c.readData(ctx); err != nil {
			return nil, fmt.Errorf("check: %w", err)
		}
	}
	if err := c.indexFiles(ctx); err != nil {
		return nil, fmt.Errorf("check: %w", err)
	}
	if err := c.blame(ctx); err != nil {
		return nil, fmt.Errorf("check: %w", err)
	}
	return c.report, nil
}

type checker struct {
	r      *Repository
	o      CheckOptions
	report *CheckReport

	gens    []*Generation
	seen    map[block.ID]bool // nodes that were walked
	packs   map[packKey]int64 // that generations need, and their sizes
	footers *cache.Cache[packKey, []block.Record]

	keeper *dateKeeper // nil: nobody wants to know

	gone map[packKey]error // packs that are not there; no harm if their records lie elsewhere

	mu  sync.Mutex
	bad map[packKey]*badPack
}

// badPack is what is wrong with a pack.
type badPack struct {
	err     error           // the first
	records map[uint32]bool // offsets of bad records; nil: all
}

// maxSeen bounds the set of nodes walked; who is forgotten is walked again.
const maxSeen = 2 << 20

func (c *checker) problem(p Problem) { c.report.Problems = append(c.report.Problems, p) }

// spoiled notes that a pack, or one record of it, is bad.
func (c *checker) spoiled(k packKey, rec *block.Record, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.bad[k]
	if b == nil {
		b = &badPack{err: err, records: map[uint32]bool{}}
		c.bad[k] = b
	}
	switch {
	case rec == nil:
		b.records = nil
	case b.records != nil:
		b.records[rec.Offset] = true
	}
}

func (c *checker) isBad(rec block.Record) *badPack {
	b := c.bad[packKey{pack.TypeOf(rec.Kind), rec.Pack}]
	if b == nil || b.records != nil && !b.records[rec.Offset] {
		return nil
	}
	return b
}

// structure walks all generations.
func (c *checker) structure(ctx context.Context) error {
	if _, err := keys.Slots(c.r.fs); err != nil {
		c.problem(Problem{What: err.Error(), Remedy: "make a new key slot and remove this one"})
	}
	dirs, err := c.r.vmDirs()
	if err != nil {
		return err
	}
	type vmRefs struct {
		vm   VMID
		refs []Ref
	}
	var all []vmRefs
	total := 0
	for _, dir := range dirs {
		vm, ok, err := c.r.vmOf(dir)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				return err
			}
			c.problem(Problem{What: err.Error(), Remedy: remedyManifest})
			continue
		}
		if !ok {
			continue
		}
		refs, err := c.r.entries(dir, vm)
		if err != nil {
			return err
		}
		var who identity
		if err := c.r.readIdentity(dir, &who); err != nil {
			c.problem(Problem{What: err.Error(), Remedy: "the name is in the manifests as well; remove the file, and the next backup writes it again"})
		}
		all = append(all, vmRefs{vm, refs})
		total += len(refs)
	}
	c.report.VMs = len(all)
	done := 0
	for _, v := range all {
		if err := c.chain(ctx, v.refs); err != nil {
			return err
		}
		for _, ref := range v.refs {
			if err := c.generation(ctx, ref); err != nil {
				return err
			}
			done++
			if c.o.Progress != nil && !c.o.ReadData {
				c.o.Progress(int64(done), int64(total))
			}
		}
	}
	return nil
}

// chain proves that each manifest names the one before, or one that was forgotten
// by who has the keys. refs ascend by sequence.
func (c *checker) chain(ctx context.Context, refs []Ref) error {
	var before string
	var over bridges
	if len(refs) > 0 {
		var err error
		over, err = c.r.readBridges(refs[0].VM)
		if errors.Is(err, ErrDamaged) || errors.Is(err, ErrVersion) {
			c.problem(Problem{What: err.Error(), Remedy: "copy the file back from another copy of the repository; it says which generations were forgotten on purpose"})
		} else if err != nil {
			return err
		}
	}
	broken := false // the one before could not be read
	for i, ref := range refs {
		if err := ctx.Err(); err != nil {
			return err
		}
		g, err := c.r.Generation(ctx, ref)
		if err == nil && !broken && !over.lead(g.manifest.Previous, before) {
			what := fmt.Sprintf("%v does not follow %v: a generation between them is gone, or one was changed", ref, refs[max(i-1, 0)])
			if i == 0 {
				what = fmt.Sprintf("%v had a generation before it that is gone", ref)
			}
			c.problem(Problem{What: what, Generations: []string{ref.String()}, Remedy: remedyChain})
		}
		if before, err = c.r.manifestSum(ref); err != nil {
			broken = true
			continue
		}
		broken = false
	}
	return nil
}

// generation checks one generation.
func (c *checker) generation(ctx context.Context, ref Ref) error {
	g, err := c.r.Generation(ctx, ref)
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrVersion) {
		c.problem(Problem{What: err.Error(), Generations: []string{ref.String()}, Remedy: remedyManifest})
		return nil
	}
	if errors.Is(err, ErrNotFound) {
		return nil // it was removed meanwhile
	}
	if err != nil {
		return err
	}
	c.report.Generations++
	c.gens = append(c.gens, g)
	for i := range g.manifest.Disks {
		c.report.Disks++
		d, err := g.OpenDisk(i)
		if err != nil {
			return err
		}
		if err := c.walk(ctx, d.tree.Root, d.tree.Levels); err != nil {
			return err
		}
	}
	return nil
}

// walk checks the record rec and, if it is a node, all below; level is that of the
// node, 0 for a block.
func (c *checker) walk(ctx context.Context, rec block.Record, level int) error {
	if rec.IsHole() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if ok, err := c.locate(ctx, rec); !ok || err != nil || level == 0 {
		return err
	}
	if c.seen[rec.ID] {
		return nil
	}
	if len(c.seen) >= maxSeen {
		clear(c.seen)
	}
	c.seen[rec.ID] = true
	node, err := c.r.readNode(ctx, rec)
	if errors.Is(err, ErrDamaged) {
		c.spoiled(packKey{pack.Node, rec.Pack}, &rec, err)
		return nil
	}
	if err != nil {
		return err
	}
	c.report.Nodes++
	for i := range tree.Fan {
		e, err := tree.Entry(node, level, i)
		if err != nil {
			c.spoiled(packKey{pack.Node, rec.Pack}, &rec, err)
			return nil
		}
		if err := c.walk(ctx, e, level-1); err != nil {
			return err
		}
	}
	return nil
}

// locate proves that some pack contains the record: the one it names, or one the
// index knows. ok is false when none does, which is noted.
func (c *checker) locate(ctx context.Context, rec block.Record) (ok bool, err error) {
	fault, err := c.contains(ctx, rec)
	if err != nil || fault == nil {
		return err == nil, err
	}
	x, err := c.r.idx(ctx)
	if err != nil {
		return false, err
	}
	found, err := x.Lookup(ctx, rec.ID, func(l block.Location) bool {
		if l == rec.Location || l.Kind.IsNode() != rec.Kind.IsNode() {
			return false
		}
		fault, err := c.contains(ctx, block.Record{ID: rec.ID, Location: l})
		return err == nil && fault == nil
	})
	if err != nil || found {
		return found, err
	}
	k := packKey{pack.TypeOf(rec.Kind), rec.Pack}
	if c.gone[k] != nil {
		c.spoiled(k, nil, fault)
	} else {
		c.spoiled(k, &rec, fault)
	}
	return false, nil
}

// contains proves that the pack a record names lists it. fault says why not; err
// is about the storage.
func (c *checker) contains(ctx context.Context, rec block.Record) (fault, err error) {
	k := packKey{pack.TypeOf(rec.Kind), rec.Pack}
	if err := c.gone[k]; err != nil {
		return err, nil
	}
	c.mu.Lock()
	b := c.bad[k]
	c.mu.Unlock()
	if b != nil && b.records == nil {
		return b.err, nil
	}
	e, err := c.footers.Get(ctx, k, func(ctx context.Context) ([]block.Record, int64, error) {
		p, err := c.r.openPack(ctx, k.typ, k.handle)
		if err != nil {
			return nil, 0, err
		}
		defer p.Release()
		list, err := p.Value().Records()
		if err != nil {
			return nil, 0, err
		}
		if _, ok := c.packs[k]; !ok {
			size, err := p.Value().Size()
			if err != nil {
				return nil, 0, err
			}
			c.packs[k] = size
			c.report.Packs++
			c.report.PackBytes += size
		}
		return list, int64(len(list))*56 + 200, nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		c.gone[k] = c.r.readError(rec, err)
		return c.gone[k], nil
	}
	if pack.IsDamage(err) || unreadable(err) {
		c.spoiled(k, nil, c.r.readError(rec, err))
		return err, nil
	}
	if err != nil {
		return nil, c.r.readError(rec, err)
	}
	defer e.Release()
	list := e.Value()
	i, ok := slices.BinarySearchFunc(list, rec.Offset, func(r block.Record, off uint32) int { return cmp.Compare(r.Offset, off) })
	if !ok || list[i] != rec {
		return fmt.Errorf("%w: its footer does not list the %v %v at %d", pack.ErrFormat, rec.Kind, rec.ID, rec.Offset), nil
	}
	return nil, nil
}

// indexFiles reports damage to the index.
func (c *checker) indexFiles(ctx context.Context) error {
	x, err := c.r.idx(ctx)
	if err != nil {
		return err
	}
	if err := x.Reload(ctx); err != nil {
		return err
	}
	damage := x.Damaged()
	if c.o.ReadData {
		for _, s := range x.Segments() {
			if err := x.Verify(ctx, s.File); ctx.Err() != nil {
				return ctx.Err()
			} else if err != nil {
				damage = append(damage, err)
			} else {
				c.proved(ctx, s.File)
			}
		}
	}
	for _, err := range damage {
		c.problem(Problem{What: err.Error(), Remedy: remedyIndex})
	}
	return nil
}
