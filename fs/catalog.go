package fs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"hikae/repo"
)

// catalog knows which hosts, VMs and generations there are. It asks the source
// again when what it knows is older than ttl: so new generations appear and
// forgotten ones go while mounted. It reads names only, and only of the
// directories someone looks into.
type catalog struct {
	src  source
	show Filter
	ttl  time.Duration
	now  func() time.Time
	log  *slog.Logger

	asking *shared // one question of a kind at a time

	mu    sync.Mutex
	at    time.Time // when hosts was read
	hosts []*hostDir
	// by inode number; generations by sequence number
	hostOf map[uint64]*hostDir
	vmOf   map[uint64]*vmDir
	genOf  map[uint64]*genDir
}

type hostDir struct {
	name  string // as shown
	ino   uint64
	ident uint64
	vms   []*vmDir // by name
}

type vmDir struct {
	id    vmID
	name  string // as shown
	ino   uint64
	ident uint64
	host  string // as shown

	// guarded by catalog.mu
	at   time.Time
	gens []*genDir // by name; never changed in place
}

type genDir struct {
	ref   ref
	vm    *vmDir
	ident uint64
}

func newCatalog(asking *shared, src source, show Filter, ttl time.Duration, now func() time.Time, log *slog.Logger) *catalog {
	return &catalog{
		src: src, show: show, ttl: ttl, now: now, log: log, asking: asking,
		hostOf: map[uint64]*hostDir{}, vmOf: map[uint64]*vmDir{}, genOf: map[uint64]*genDir{},
	}
}

// list returns the hosts by name.
func (c *catalog) list(ctx context.Context) ([]*hostDir, error) { return c.listAged(ctx, c.ttl) }

// listAged is list with names that may be as old as age.
func (c *catalog) listAged(ctx context.Context, age time.Duration) ([]*hostDir, error) {
	c.mu.Lock()
	hosts, fresh := c.hosts, !c.at.IsZero() && c.now().Sub(c.at) < age
	c.mu.Unlock()
	if fresh {
		return hosts, nil
	}
	return once(ctx, c.asking, "vms", func(ctx context.Context) ([]*hostDir, error) {
		ids, err := c.src.VMs(ctx)
		if err != nil {
			return nil, fmt.Errorf("list VMs: %w", err)
		}
		return c.setVMs(ids), nil
	})
}

func (c *catalog) setVMs(ids []vmID) []*hostDir {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.vmOf
	c.hosts, c.hostOf, c.vmOf = nil, map[uint64]*hostDir{}, map[uint64]*vmDir{}
	for _, id := range ids {
		if !c.show.vm(id) {
			continue
		}
		hino, vino := inoOfHost(id.host), inoOfVM(id)
		h := c.hostOf[hino]
		if h == nil {
			h = &hostDir{name: escapeName(id.host), ino: hino, ident: identity(c.src.ID(), id.host)}
			c.hostOf[hino] = h
			c.hosts = append(c.hosts, h)
		}
		vm := old[vino]
		if vm == nil || vm.id != id {
			vm = &vmDir{id: id, name: escapeName(id.name), ino: vino, ident: identity(c.src.ID(), id.host, id.name), host: h.name}
		}
		if c.vmOf[vino] != nil || h.name != vm.host { // listed twice, or one in 2^60
			continue
		}
		c.vmOf[vino] = vm
		h.vms = append(h.vms, vm)
	}
	for ino, vm := range old {
		if c.vmOf[ino] != vm {
			c.dropGens(vm.gens)
		}
	}
	slices.SortFunc(c.hosts, func(a, b *hostDir) int { return strings.Compare(a.name, b.name) })
	for _, h := range c.hosts {
		slices.SortFunc(h.vms, func(a, b *vmDir) int { return strings.Compare(a.name, b.name) })
	}
	c.at = c.now()
	return c.hosts
}

func (c *catalog) dropGens(gens []*genDir) {
	for _, g := range gens {
		if c.genOf[g.ref.sequence&sequenceMask] == g {
			delete(c.genOf, g.ref.sequence&sequenceMask)
		}
	}
}

// Listing all VMs reads a file for each, and every path begins with a host and a
// VM. A name known already is therefore believed longer than one that is not:
// should the VM be gone, its folder is empty until it goes as well.
const knownAge = 10

// find returns what known finds, asking the repository first when that is due,
// and again when it finds nothing.
func find[T any](ctx context.Context, c *catalog, known func() *T) (*T, error) {
	for _, age := range []time.Duration{knownAge * c.ttl, c.ttl} {
		if _, err := c.listAged(ctx, age); err != nil {
			return nil, err
		}
		c.mu.Lock()
		x := known()
		c.mu.Unlock()
		if x != nil {
			return x, nil
		}
	}
	return nil, errGone
}

func (c *catalog) host(ctx context.Context, ino uint64) (*hostDir, error) {
	return find(ctx, c, func() *hostDir { return c.hostOf[ino] })
}

func (c *catalog) vm(ctx context.Context, ino uint64) (*vmDir, error) {
	return find(ctx, c, func() *vmDir { return c.vmOf[ino] })
}

// hostNamed and vmNamed are for find.
func (c *catalog) hostNamed(name string) *hostDir {
	i, ok := slices.BinarySearchFunc(c.hosts, name, func(h *hostDir, s string) int { return strings.Compare(h.name, s) })
	if !ok {
		return nil
	}
	return c.hosts[i]
}

func (c *catalog) vmNamed(host uint64, name string) *vmDir {
	h := c.hostOf[host]
	if h == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(h.vms, name, func(vm *vmDir, s string) int { return strings.Compare(vm.name, s) })
	if !ok {
		return nil
	}
	return h.vms[i]
}

// generations returns the generations of a VM by name.
func (c *catalog) generations(ctx context.Context, vm *vmDir) ([]*genDir, error) {
	c.mu.Lock()
	gens, fresh := vm.gens, !vm.at.IsZero() && c.now().Sub(vm.at) < c.ttl
	c.mu.Unlock()
	if fresh {
		return gens, nil
	}
	return once(ctx, c.asking, "refs\x00"+vm.id.String(), func(ctx context.Context) ([]*genDir, error) {
		refs, err := c.src.Refs(ctx, vm.id)
		if err != nil && !errors.Is(err, errGone) { // a VM that lost its last generation is an empty folder for a moment
			return nil, fmt.Errorf("list generations of %v: %w", vm.id, err)
		}
		return c.setRefs(vm, refs), nil
	})
}

func (c *catalog) setRefs(vm *vmDir, refs []ref) []*genDir {
	refs = slices.DeleteFunc(slices.Clone(refs), func(r ref) bool { return !c.show.generation(r) })
	slices.SortFunc(refs, func(a, b ref) int {
		if d := strings.Compare(a.name, b.name); d != 0 {
			return d
		}
		return cmpUint(b.sequence, a.sequence) // of two with one name the newer one is shown
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	vm.at = c.now()
	if slices.EqualFunc(vm.gens, refs, func(g *genDir, r ref) bool { return g.ref == r }) {
		return vm.gens
	}
	gens := make([]*genDir, 0, len(refs))
	for _, r := range refs {
		if len(gens) > 0 && gens[len(gens)-1].ref.name == r.name {
			continue
		}
		// A sequence number is in one place only. Whoever shows it again has put
		// a manifest where it does not belong; the first one known stays.
		if g := c.genOf[r.sequence&sequenceMask]; g != nil && g.ref != r && g.vm != vm {
			c.log.Error("two generations with one sequence number; the second one is not shown", "sequence", r.sequence, "first", g.ref.String(), "second", r.String())
			continue
		}
		i, ok := slices.BinarySearchFunc(vm.gens, r.name, byGenName)
		if ok && vm.gens[i].ref == r {
			gens = append(gens, vm.gens[i])
			continue
		}
		gens = append(gens, &genDir{ref: r, vm: vm, ident: identity(c.src.ID(), r.vm.host, r.vm.name, r.name)})
	}
	c.dropGens(vm.gens)
	for _, g := range gens {
		c.genOf[g.ref.sequence&sequenceMask] = g
	}
	vm.gens = gens
	return gens
}

func byGenName(g *genDir, name string) int { return strings.Compare(g.ref.name, name) }

func cmpUint(a, b uint64) int {
	if a < b {
		return -1
	}
	if a > b {
		return 1
	}
	return 0
}

// generation finds a generation by its sequence number. Numbers nobody has
// listed yet come from NFS clients that knew an earlier mount: those need one
// look at every VM.
func (c *catalog) generation(ctx context.Context, sequence uint64) (*genDir, error) {
	known := func() *genDir {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.genOf[sequence]
	}
	if g := known(); g != nil {
		return g, nil
	}
	hosts, err := c.list(ctx)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		for _, vm := range h.vms {
			if _, err := c.generations(ctx, vm); err != nil {
				return nil, err
			}
			if g := known(); g != nil {
				return g, nil
			}
		}
	}
	return nil, errGone
}

// latest is the generation made last, as the repository counts.
func latest(gens []*genDir) *genDir {
	if len(gens) == 0 {
		return nil
	}
	refs := make([]repo.Ref, len(gens))
	for i, g := range gens {
		refs[i] = g.ref.repo()
	}
	return gens[slices.Index(refs, repo.Latest(refs))]
}
