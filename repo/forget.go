package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/sealed"
)

// Errors of Forget, for errors.Is.
var (
	// ErrHeld says that an operator said the generation stays.
	ErrHeld = errors.New("held")
	// ErrNewest says that the generation is the newest good one of its VM.
	ErrNewest = errors.New("the newest good generation")
	// ErrInUse says that a running backup builds on the generation.
	ErrInUse = errors.New("in use by a running backup")
)

// forgottenPrefix begins the names of the files that bridge the gaps in the chain
// of manifests.
const forgottenPrefix = "forgotten-"

// maxBridges bounds what a forgotten file may hold.
const maxBridges = 1 << 20

// bridges lead over manifests that were forgotten: from the SHA-256 of one to the
// SHA-256 that it named as the one before, or an older one still; "" is the
// beginning.
type bridges map[string]string

// forgottenFile is the content of generations/<vm>/forgotten-<number>.
type forgottenFile struct {
	VM      VMID    `json:"vm"`
	Bridges bridges `json:"bridges"`
}

// lead tells whether the chain leads from one SHA-256 to another, over forgotten
// manifests only.
func (b bridges) lead(from, to string) bool {
	for range len(b) + 1 {
		if from == to {
			return true
		}
		next, ok := b[from]
		if !ok {
			return false
		}
		from = next
	}
	return false // they go in a circle
}

// follow walks over what is forgotten, to the first SHA-256 that is in there or
// cannot be led on from.
func (b bridges) follow(from string, there map[string]bool) string {
	for range len(b) + 1 {
		next, ok := b[from]
		if !ok || there[from] {
			break
		}
		from = next
	}
	return from
}

func forgottenName(dir string, n uint64) string {
	return path.Join(dir, fmt.Sprintf("%s%010d", forgottenPrefix, n))
}

// forgottenFiles lists the numbers of a VM's forgotten files, ascending.
func (r *Repository) forgottenFiles(dir string) ([]uint64, error) {
	list, err := r.fs.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []uint64
	for _, e := range list {
		digits, ok := strings.CutPrefix(e.Name(), forgottenPrefix)
		if n, err := strconv.ParseUint(digits, 10, 63); ok && err == nil && path.Join(dir, e.Name()) == forgottenName(dir, n) {
			found = append(found, n)
		}
	}
	slices.Sort(found)
	return found, nil
}

// readBridges reads the newest of a VM's forgotten files. One that was removed
// meanwhile has a successor.
func (r *Repository) readBridges(vm VMID) (bridges, error) {
	dir := r.vmDir(vm)
	for {
		list, err := r.forgottenFiles(dir)
		if err != nil || len(list) == 0 {
			return nil, err
		}
		last := list[len(list)-1]
		var f forgottenFile
		err = r.readSealed(sealed.Forgotten, forgottenName(dir, last), &f)
		if errors.Is(err, fs.ErrNotExist) {
			again, err := r.forgottenFiles(dir)
			if err != nil {
				return nil, err
			}
			if len(again) > 0 && again[len(again)-1] > last {
				continue
			}
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if f.VM != vm || len(f.Bridges) > maxBridges {
			return nil, &DamageError{What: forgottenName(dir, last), Err: fmt.Errorf("it is of %v, with %d bridges", f.VM, len(f.Bridges))}
		}
		return f.Bridges, nil
	}
}

// ForgetOptions say what Forget may do beyond the ordinary.
type ForgetOptions struct {
	// Force forgets the newest good generation of a VM, too.
	Force bool
}

// Forget removes generations: their manifests, and thereby what makes them
// generations. Their blocks stay until somebody collects them. Nothing is removed
// unless all may be: one that is held (ErrHeld), on which a running backup builds
// (ErrInUse), that is not there (ErrNotFound), or that is the newest good one of its
// VM (ErrNewest, unless forced) ends it before.
//
// When Forget fails later, or is killed, some are forgotten and the others are as
// they were; the repository is whole at every moment.
func (r *Repository) Forget(ctx context.Context, refs []Ref, o ForgetOptions) error {
	if len(refs) == 0 {
		return nil
	}
	lock, err := r.lockGenerations(ctx)
	if err != nil {
		return fmt.Errorf("forget: %w", storageError(r.fs, err))
	}
	defer lock.Close()
	if err := r.forget(ctx, refs, o); err != nil {
		return fmt.Errorf("forget: %w", storageError(r.fs, err))
	}
	return nil
}

func (r *Repository) forget(ctx context.Context, refs []Ref, o ForgetOptions) error {
	r.cleanForgetTmp()
	gone := map[VMID]map[string]Ref{} // by file name
	var vms []VMID
	for _, ref := range refs {
		if gone[ref.VM] == nil {
			gone[ref.VM] = map[string]Ref{}
			vms = append(vms, ref.VM)
		}
		gone[ref.VM][ref.fileName()] = ref
	}
	parents, err := r.sessionParents()
	if err != nil {
		return err
	}
	plans := make([]*forgetting, len(vms))
	for i, vm := range vms {
		if plans[i], err = r.planForget(ctx, vm, gone[vm], parents, o); err != nil {
			return err
		}
	}
	if err := r.raiseFloor(refs); err != nil {
		return err
	}
	for _, p := range plans {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.carryOut(p); err != nil {
			return err
		}
	}
	return nil
}

// forgetting is what will happen to one VM.
type forgetting struct {
	vm      VMID
	gone    []Ref // ascending by sequence
	bridges bridges
}

// link is a manifest as the chain sees it.
type link struct {
	ref           Ref
	sum, previous string
	good          bool // it opens, so previous is known
}

// planForget sees to it that a VM's generations may go, and builds the bridges.
func (r *Repository) planForget(ctx context.Context, vm VMID, gone map[string]Ref, parents map[string]bool, o ForgetOptions) (*forgetting, error) {
	siblings, err := r.entries(r.vmDir(vm), vm)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	held, err := r.Held(ctx, vm)
	if err != nil {
		return nil, err
	}
	p := &forgetting{vm: vm}
	there := make(map[string]bool, len(siblings))
	chain := make([]link, 0, len(siblings))
	newest := -1
	for _, ref := range siblings {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		l := link{ref: ref}
		g, err := r.Generation(ctx, ref)
		switch {
		case err == nil:
			l.good, l.previous = true, g.manifest.Previous
			newest = len(chain)
		case !errors.Is(err, ErrDamaged):
			return nil, err // of a newer version or epoch, or the storage fails
		}
		if l.sum, err = r.manifestSum(ref); err != nil && !errors.Is(err, fs.ErrNotExist) && l.good {
			return nil, err
		}
		if l.sum != "" {
			there[l.sum] = true
		}
		chain = append(chain, l)
		if _, goes := gone[ref.fileName()]; !goes {
			continue
		}
		delete(gone, ref.fileName())
		p.gone = append(p.gone, ref)
		switch {
		case held[ref.Sequence]:
			return nil, fmt.Errorf("%v is %w; hikae release %v first", ref, ErrHeld, ref)
		case parents[r.manifestPath(ref)]:
			return nil, fmt.Errorf("%v is %w; try again when it has ended", ref, ErrInUse)
		}
	}
	for _, ref := range gone {
		return nil, fmt.Errorf("%v: %w", ref, ErrNotFound)
	}
	if newest >= 0 && !o.Force && slices.Contains(p.gone, chain[newest].ref) {
		return nil, fmt.Errorf("%v is %w of its VM; force it if it should go all the same", chain[newest].ref, ErrNewest)
	}
	old, err := r.readBridges(vm)
	if err != nil {
		return nil, err
	}
	p.bridges = buildBridges(chain, p.gone, old, there)
	return p, nil
}

// buildBridges makes the bridges that serve whichever of the manifests in gone are
// removed, for a crash may leave some: one over each of them, and over what was
// forgotten before one that goes over all of a gap.
func buildBridges(chain []link, gone []Ref, old bridges, there map[string]bool) bridges {
	b := bridges{}
	for i, l := range chain {
		before := ""
		if i > 0 {
			before = chain[i-1].sum
		}
		goes := slices.Contains(gone, l.ref)
		if l.good {
			if end := old.follow(l.previous, there); end != l.previous {
				b[l.previous] = end
			}
			if goes {
				b[l.sum] = l.previous
			}
		} else if goes && i+1 < len(chain) && chain[i+1].good {
			// What a damaged manifest named is not known, nor is the sum that it once
			// had. Who forgets it says that the gap is in order.
			if next := old.follow(chain[i+1].previous, there); next != "" && !there[next] {
				b[next] = before
			}
			b[l.sum] = before
		} else if !goes {
			// Which bridge it needs is not known until somebody brings it back.
			for from, to := range old {
				if _, ok := b[from]; !ok {
					b[from] = to
				}
			}
		}
	}
	return b
}

// raiseFloor sees to it that no sequence number is given twice.
func (r *Repository) raiseFloor(refs []Ref) error {
	next, err := r.nextSequence()
	if err != nil {
		return err
	}
	highest := next - 1
	if !slices.ContainsFunc(refs, func(ref Ref) bool { return ref.Sequence == highest }) {
		return nil
	}
	name := path.Join(generationsDir, fmt.Sprintf("%s%010d", floorPrefix, highest))
	err = fsx.WriteFile(r.fs, forgetTmp(), name, nil)
	if errors.Is(err, fs.ErrExist) {
		err = r.fs.SyncDir(generationsDir) // who made it may have died before it lasted
	}
	if err != nil {
		return err
	}
	// Lower floors say nothing any more. Where they cannot be removed they do no harm.
	list, err := r.fs.ReadDir(generationsDir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if rest, ok := strings.CutPrefix(e.Name(), floorPrefix); ok {
			if n, err := strconv.ParseUint(rest, 10, 63); err == nil && n < highest {
				_ = r.fs.Remove(path.Join(generationsDir, e.Name()))
			}
		}
	}
	return nil
}

// carryOut removes a VM's manifests, once the bridges last.
func (r *Repository) carryOut(p *forgetting) error {
	dir := r.vmDir(p.vm)
	before, err := r.forgottenFiles(dir)
	if err != nil {
		return err
	}
	number := uint64(1)
	if n := len(before); n > 0 {
		number = before[n-1] + 1
	}
	name := forgottenName(dir, number)
	b, err := r.sealedFile(sealed.Forgotten, name, forgottenFile{VM: p.vm, Bridges: p.bridges})
	if err != nil {
		return err
	}
	if err := fsx.WriteFile(r.fs, forgetTmp(), name, b); err != nil {
		return err
	}
	for _, ref := range p.gone {
		if err := r.fs.Remove(r.manifestPath(ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%v: %w", ref, err)
		}
	}
	r.dropVerifications(dir)
	if err := r.fs.SyncDir(dir); err != nil {
		return err
	}
	for _, n := range before {
		_ = r.fs.Remove(forgottenName(dir, n)) // the highest counts, the others do no harm
	}
	return nil
}

// InUse tells on which of the generations running backups build, by sequence
// number: those that Forget refuses for the time being.
func (r *Repository) InUse(ctx context.Context, refs []Ref) (map[uint64]bool, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	parents, err := r.sessionParents()
	if err != nil {
		return nil, fmt.Errorf("look for running backups: %w", storageError(r.fs, err))
	}
	used := make(map[uint64]bool)
	for _, ref := range refs {
		if parents[r.manifestPath(ref)] {
			used[ref.Sequence] = true
		}
	}
	return used, nil
}

const forgetOwner = "forget"

func forgetTmp() string { return tmpName(forgetOwner, randomName()) }

// cleanForgetTmp removes unfinished files. Only who holds the lock on generations
// makes such, so those that are there were left behind.
func (r *Repository) cleanForgetTmp() {
	list, err := r.fs.ReadDir(tmpDir)
	if err != nil {
		return
	}
	for _, e := range list {
		if strings.HasPrefix(e.Name(), forgetOwner+"-") {
			_ = r.fs.Remove(path.Join(tmpDir, e.Name()))
		}
	}
}

// sessionParents are the paths of manifests on which living sessions build.
func (r *Repository) sessionParents() (map[string]bool, error) {
	list, err := r.fs.ReadDir(sessionsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	locks := make(map[string]bool)
	for _, e := range list {
		if id, ok := strings.CutSuffix(e.Name(), lockSuffix); ok {
			locks[id] = true
		}
	}
	found := make(map[string]bool)
	for _, e := range list {
		id := e.Name()
		if _, err := block.ParseHandle(id); err != nil || !locks[id] {
			continue
		}
		name := path.Join(sessionsDir, id)
		lock, err := r.fs.Lock(name+lockSuffix, true, false)
		if err == nil {
			// Nobody holds it: the session is dead. Only its own lock file was opened,
			// so what remains is for the next session to take over.
			_ = lock.Close()
			continue
		}
		if !errors.Is(err, fsx.ErrLocked) {
			return nil, err
		}
		b, err := fsx.ReadFile(r.fs, name, maxSessionLog)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		for line := range strings.SplitSeq(string(b), "\n") {
			if parent, ok := strings.CutPrefix(line, "parent "); ok {
				found[parent] = true
			}
		}
	}
	return found, nil
}
