package repo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// StatsOptions say what Stats counts, and with how much memory.
type StatsOptions struct {
	VMs []VMID // nil: all
	// MemoryBytes is about how much is used to tell blocks that were counted, beside
	// 32 bytes for each tree node; 0 is 256 MiB, enough for 8 million distinct
	// blocks (1 TiB in blocks of 128 KiB). When there are more, the trees are walked
	// several times, and each time some of the blocks are counted.
	MemoryBytes int64
	// Progress, if not nil, is told of generations walked. It is called from one
	// goroutine at a time.
	Progress func(done, total int64)
}

// SpaceStats counts bytes. Distinct blocks and nodes are counted once.
type SpaceStats struct {
	Capacity   int64 `json:"bytes_capacity"`   // of all disks
	Logical    int64 `json:"bytes_logical"`    // of all disks, without holes
	Unique     int64 `json:"bytes_unique"`     // of distinct blocks, as they are read
	Compressed int64 `json:"bytes_compressed"` // of distinct blocks, as they are stored: compressed and sealed
	Metadata   int64 `json:"bytes_metadata"`   // of distinct tree nodes, as they are stored
}

func (s *SpaceStats) add(o SpaceStats) {
	s.Capacity += o.Capacity
	s.Logical += o.Logical
	s.Unique += o.Unique
	s.Compressed += o.Compressed
	s.Metadata += o.Metadata
}

// Deduplication is Logical to Unique; 0 when there is nothing.
func (s SpaceStats) Deduplication() float64 { return ratio(s.Logical, s.Unique) }

// Compression is Unique to Compressed; 0 when there is nothing.
func (s SpaceStats) Compression() float64 { return ratio(s.Unique, s.Compressed) }

func ratio(a, b int64) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}

// GenerationStats are one generation's: Unique, Compressed and Metadata count only
// what no earlier generation of the VM, of those that are there, has.
type GenerationStats struct {
	Ref Ref `json:"-"`
	SpaceStats
	Unreadable int64 `json:"unreadable"` // tree nodes that could not be read, or 1 for the manifest
}

// VMStats are one VM's; its blocks count once, whatever other VMs share them.
type VMStats struct {
	VM VMID `json:"-"`
	SpaceStats
	Unreadable  int64             `json:"unreadable"`
	Generations []GenerationStats `json:"generations"` // ascending by sequence
}

// PhysicalStats are sizes of files, whatever needs them.
type PhysicalStats struct {
	Files int64 `json:"files"`
	Total int64 `json:"bytes_physical"`
	Data  int64 `json:"bytes_data_packs"`
	Nodes int64 `json:"bytes_node_packs"`
	Index int64 `json:"bytes_index"`
	// Parity is of all parity files; they count nowhere else.
	Parity int64 `json:"bytes_parity"`
	Other  int64 `json:"bytes_other"` // manifests, keys, unfinished files
}

// RepositoryStats is what Stats found.
type RepositoryStats struct {
	VMs []VMStats
	// Total is of all VMs that were counted: blocks that several share count once.
	Total      SpaceStats
	Unreadable int64
	Physical   PhysicalStats // of the whole repository
	Verified   Verified      // likewise
}

// Stats counts what the repository holds and what that takes. It reads all tree
// nodes, each once for a VM and pass, and no blocks. What cannot be read is
// counted, and missing in the sums.
func (r *Repository) Stats(ctx context.Context, o StatsOptions) (*RepositoryStats, error) {
	out, err := r.stats(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("count what is stored: %w", err)
	}
	return out, nil
}

func (r *Repository) stats(ctx context.Context, o StatsOptions) (*RepositoryStats, error) {
	if o.MemoryBytes <= 0 {
		o.MemoryBytes = 256 << 20
	}
	vms := o.VMs
	if vms == nil {
		var err error
		if vms, err = r.VMs(ctx); err != nil {
			return nil, err
		}
	}
	passes, err := r.statsPasses(ctx, o.MemoryBytes)
	if err != nil {
		return nil, err
	}
	out := &RepositoryStats{VMs: make([]VMStats, len(vms))}
	total := 0
	for i, vm := range vms {
		v := &out.VMs[i]
		v.VM = vm
		refs, err := r.entries(r.vmDir(vm), vm)
		if err == nil && len(refs) == 0 {
			err = fs.ErrNotExist
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%v has no generations in this repository: %w", vm, ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		for _, ref := range refs {
			v.Generations = append(v.Generations, GenerationStats{Ref: ref})
		}
		total += len(refs)
	}
	done := 0
	for pass := range passes {
		c := &counter{r: r, pass: pass, passes: passes, total: &out.Total}
		for i := range out.VMs {
			c.who = uint32(i + 1)
			for j := range out.VMs[i].Generations {
				c.g = &out.VMs[i].Generations[j]
				if err := c.generation(ctx); err != nil {
					return nil, err
				}
				done++
				if o.Progress != nil {
					o.Progress(int64(done), int64(total)*int64(passes))
				}
			}
		}
	}
	for i := range out.VMs {
		v := &out.VMs[i]
		for _, g := range v.Generations {
			v.add(g.SpaceStats)
			v.Unreadable += g.Unreadable
		}
		out.Total.Capacity += v.Capacity
		out.Total.Logical += v.Logical
		out.Unreadable += v.Unreadable
	}
	if out.Physical, err = r.physical(ctx); err != nil {
		return nil, err
	}
	out.Verified, err = r.Verified(ctx)
	return out, err
}

// statsPasses is how often the trees have to be walked. The index knows about how
// many blocks there are; one that lacks some costs memory, not truth.
func (r *Repository) statsPasses(ctx context.Context, memory int64) (int, error) {
	x, err := r.idx(ctx)
	if err != nil {
		return 0, err
	}
	if err := x.Reload(ctx); err != nil {
		return 0, err
	}
	var records int64
	for _, s := range x.Segments() {
		records += s.Entries
	}
	return int(max(1, (records*idSetEntry+memory-1)/memory)), nil
}

// counter counts one pass.
type counter struct {
	r            *Repository
	pass, passes int
	total        *SpaceStats
	nodes        idSet
	blocks       idSet
	who          uint32 // the VM
	g            *GenerationStats
}

// generation counts one generation. Only the first pass counts what is not blocks.
func (c *counter) generation(ctx context.Context) error {
	g, err := c.r.Generation(ctx, c.g.Ref)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil // it was forgotten meanwhile
	case errors.Is(err, ErrDamaged):
		if c.pass == 0 {
			c.g.Unreadable++
		}
		return nil
	case err != nil:
		return err
	}
	for i := range g.manifest.Disks {
		d, err := g.OpenDisk(i)
		if err != nil {
			return err
		}
		if c.pass == 0 {
			c.g.Capacity += d.size
			c.g.Logical += d.data
		}
		if err := c.walk(ctx, d.tree.Root, d.tree.Levels); err != nil {
			return err
		}
	}
	return nil
}

// walk counts the record and, if it is a node, all below; level is that of the
// node, 0 for a block.
func (c *counter) walk(ctx context.Context, rec block.Record, level int) error {
	if rec.IsHole() {
		return nil
	}
	if level == 0 {
		if c.passes > 1 && int(binary.LittleEndian.Uint32(rec.ID[8:])%uint32(c.passes)) != c.pass {
			return nil
		}
		size := SpaceStats{Unique: int64(c.r.config.BlockSize), Compressed: int64(rec.Length)}
		ever, mine := c.blocks.mark(rec.ID, c.who)
		if ever {
			c.total.add(size)
		}
		if mine {
			c.g.add(size)
		}
		return nil
	}
	ever, mine := c.nodes.mark(rec.ID, c.who)
	if !mine {
		return nil
	}
	if c.pass == 0 {
		size := SpaceStats{Metadata: int64(rec.Length)}
		c.g.add(size)
		if ever {
			c.total.add(size)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	node, err := c.r.readNode(ctx, rec)
	for i := 0; err == nil && i < tree.Fan; i++ {
		var e block.Record
		if e, err = tree.Entry(node, level, i); err == nil {
			if err := c.walk(ctx, e, level-1); err != nil {
				return err
			}
		}
	}
	if errors.Is(err, ErrDamaged) || errors.Is(err, tree.ErrNode) {
		if c.pass == 0 {
			c.g.Unreadable++
		}
		return nil
	}
	return err
}

// physical adds up the files.
func (r *Repository) physical(ctx context.Context) (PhysicalStats, error) {
	var p PhysicalStats
	var add func(dir string, sum *int64) error
	add = func(dir string, sum *int64) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		list, err := r.fs.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // copies of a repository may lack empty directories
		}
		if err != nil {
			return err
		}
		for _, e := range list {
			if e.IsDir() {
				if err := add(path.Join(dir, e.Name()), sum); err != nil {
					return err
				}
				continue
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			p.Files++
			p.Total += info.Size()
			if strings.HasSuffix(e.Name(), paritySuffix) {
				p.Parity += info.Size()
			} else {
				*sum += info.Size()
			}
		}
		return nil
	}
	sums := map[string]*int64{pack.Data.Dir(): &p.Data, pack.Node.Dir(): &p.Nodes, "index": &p.Index}
	for _, dir := range layout {
		sum := sums[dir]
		if sum == nil {
			sum = &p.Other
		}
		if err := add(dir, sum); err != nil {
			return p, err
		}
	}
	info, err := r.fs.Stat(configName)
	if err != nil {
		return p, err
	}
	p.Files++
	p.Total += info.Size()
	p.Other += info.Size()
	return p, nil
}

// idSetEntry is the most memory that an idSet takes for an id: 12 bytes in a table
// that is three eighths full.
const idSetEntry = 32

// idSet remembers ids, and who saw each last. It keeps 63 bits of an id; two of
// 32 million would be taken for one with a chance of 1 in 18,000. The shards grow
// one by one, so growing needs little beside them.
type idSet struct {
	shards [256]idShard
}

type idShard struct {
	ids []uint64 // 0 is free
	who []uint32
	n   int
}

// mark notes that who saw id. ever says that nobody had, mine that who was not the
// last to see it. Who comes in one go: nobody marks again after another did.
func (s *idSet) mark(id block.ID, who uint32) (ever, mine bool) {
	key := binary.LittleEndian.Uint64(id[:]) | 1
	return s.shards[id[12]].mark(key, who)
}

func (s *idShard) mark(key uint64, who uint32) (ever, mine bool) {
	if 4*(s.n+1) > 3*len(s.ids) {
		s.grow()
	}
	i := s.find(key)
	if s.ids[i] == 0 {
		s.ids[i], s.who[i] = key, who
		s.n++
		return true, true
	}
	mine = s.who[i] != who
	s.who[i] = who
	return false, mine
}

// find is where key is, or belongs.
func (s *idShard) find(key uint64) int {
	mask := len(s.ids) - 1
	i := int(key>>8) & mask
	for s.ids[i] != 0 && s.ids[i] != key {
		i = (i + 1) & mask
	}
	return i
}

func (s *idShard) grow() {
	ids, who := s.ids, s.who
	n := max(16, 2*len(ids))
	s.ids, s.who = make([]uint64, n), make([]uint32, n)
	for i, key := range ids {
		if key != 0 {
			j := s.find(key)
			s.ids[j], s.who[j] = key, who[i]
		}
	}
}
