package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/sealed"
	"hikae/repo/internal/tree"
)

const (
	generationsDir = "generations"
	identityName   = "identity"
)

// identity says whose generations a directory holds.
type identity struct {
	VM VMID `json:"vm"`
}

// entries lists what fileName wrote in a VM's directory, ascending by sequence.
func (r *Repository) entries(dir string, vm VMID) ([]Ref, error) {
	list, err := r.fs.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var refs []Ref
	for _, e := range list {
		if ref, ok := parseRefFile(e.Name()); ok && !e.IsDir() {
			ref.VM = vm
			refs = append(refs, ref)
		}
	}
	slices.SortFunc(refs, func(a, b Ref) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return refs, nil
}

// vmDirs lists the directories of VMs.
func (r *Repository) vmDirs() ([]string, error) {
	list, err := r.fs.ReadDir(generationsDir)
	if err != nil {
		return nil, fmt.Errorf("list the VMs: %w", err)
	}
	var dirs []string
	for _, e := range list {
		if e.IsDir() && len(e.Name()) == 32 && strings.Trim(e.Name(), "0123456789abcdef") == "" {
			dirs = append(dirs, path.Join(generationsDir, e.Name()))
		}
	}
	return dirs, nil
}

// VMs lists the VMs that have a generation, sorted. A VM whose name cannot be
// read is an error that names its directory, besides the list of the others.
func (r *Repository) VMs(ctx context.Context) ([]VMID, error) {
	dirs, err := r.vmDirs()
	if err != nil {
		return nil, err
	}
	var vms []VMID
	var faults []error
	for _, dir := range dirs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		vm, ok, err := r.vmOf(dir)
		if err != nil {
			faults = append(faults, err)
		} else if ok {
			vms = append(vms, vm)
		}
	}
	slices.SortFunc(vms, func(a, b VMID) int { return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Name, b.Name)) })
	return vms, errors.Join(faults...)
}

// vmOf tells whose directory it is; ok is false while it has no generation.
func (r *Repository) vmOf(dir string) (vm VMID, ok bool, err error) {
	refs, err := r.entries(dir, VMID{})
	if err != nil {
		return VMID{}, false, fmt.Errorf("list the generations in %s: %w", dir, err)
	}
	if len(refs) == 0 {
		return VMID{}, false, nil
	}
	var who identity
	err = r.readIdentity(dir, &who)
	if err != nil {
		// Any generation knows the name as well.
		var m Manifest
		if r.readSealed(sealed.Manifest, path.Join(dir, refs[len(refs)-1].fileName()), &m) != nil {
			return VMID{}, false, err
		}
		who.VM = m.VM
	}
	if r.vmDir(who.VM) != dir {
		return VMID{}, false, &DamageError{What: dir, Err: fmt.Errorf("it says it belongs to %v, whose directory is another", who.VM)}
	}
	return who.VM, true, nil
}

// readSealed reads and decodes a small sealed file.
func (r *Repository) readSealed(t sealed.Type, name string, v any) error {
	b, err := fsx.ReadFile(r.fs, name, sealed.MaxFile)
	if err != nil {
		if errors.Is(err, fsx.ErrTooLarge) {
			return &DamageError{What: name, Err: err}
		}
		return err
	}
	plain, err := r.box.Open(t, name, b)
	switch {
	case errors.Is(err, sealed.ErrVersion):
		return fmt.Errorf("%w: %w", ErrVersion, err)
	case errors.Is(err, sealed.ErrDamaged):
		return &DamageError{What: name, Err: err}
	case err != nil:
		return err
	}
	if err := json.Unmarshal(plain, v); err != nil {
		return &DamageError{What: name, Err: err}
	}
	return nil
}

// sealedFile encodes and seals v for the file called name.
func (r *Repository) sealedFile(t sealed.Type, name string, v any) ([]byte, error) {
	plain, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r.box.Seal(t, name, plain)
}

// Refs lists a VM's generations, ascending by time, then sequence. It reads one
// directory and no file. A VM without generations is ErrNotFound.
func (r *Repository) Refs(ctx context.Context, vm VMID) ([]Ref, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	refs, err := r.entries(r.vmDir(vm), vm)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the generations of %v: %w", vm, err)
	}
	if len(refs) == 0 {
		return nil, fmt.Errorf("%v has no generations in this repository: %w", vm, ErrNotFound)
	}
	slices.SortStableFunc(refs, func(a, b Ref) int { return a.Time.Compare(b.Time) })
	return refs, nil
}

// Resolve finds the generation that a selector names: "latest" (as Latest says), a
// time as Ref.Name shows it (colons will do for its dashes), the beginning of one
// such time, or a sequence number. It is ErrNotFound or ErrAmbiguous otherwise.
func (r *Repository) Resolve(ctx context.Context, vm VMID, selector string) (Ref, error) {
	refs, err := r.Refs(ctx, vm)
	if err != nil {
		return Ref{}, err
	}
	return resolve(vm, refs, selector)
}

// Generation is one VM at one time. It never changes, so it may be used by many
// goroutines.
type Generation struct {
	r        *Repository
	ref      Ref
	manifest Manifest
}

// Generation opens a generation: it reads its manifest and nothing else.
func (r *Repository) Generation(ctx context.Context, ref Ref) (*Generation, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	g := &Generation{r: r, ref: ref}
	name := r.manifestPath(ref)
	err := r.readSealed(sealed.Manifest, name, &g.manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%v: %w", ref, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w", ref, err)
	}
	m := &g.manifest
	if m.Format > FormatVersion {
		return nil, fmt.Errorf("%v: %w (manifest version %d); upgrade hikae", ref, ErrVersion, m.Format)
	}
	if m.VM != ref.VM || m.Sequence != ref.Sequence || !m.Time.Equal(ref.Time) {
		return nil, &DamageError{What: name, Err: fmt.Errorf("it holds %v, sequence %d", Ref{VM: m.VM, Time: m.Time}, m.Sequence)}
	}
	if err := m.validate(r.config.BlockSize); err != nil {
		return nil, &DamageError{What: name, Err: err}
	}
	return g, nil
}

func (r *Repository) manifestPath(ref Ref) string {
	return path.Join(r.vmDir(ref.VM), ref.fileName())
}

// Ref names the generation.
func (g *Generation) Ref() Ref { return g.ref }

// Manifest returns what the generation says about itself. It must not be changed.
func (g *Generation) Manifest() *Manifest { return &g.manifest }

// OpenDisk opens the disk that Manifest().Disks[i] describes. It reads nothing.
func (g *Generation) OpenDisk(i int) (*Disk, error) {
	if i < 0 || i >= len(g.manifest.Disks) {
		return nil, fmt.Errorf("%v has no disk %d: %w", g.ref, i, ErrNotFound)
	}
	m := &g.manifest.Disks[i]
	root, err := m.root()
	if err != nil {
		return nil, &DamageError{What: g.r.manifestPath(g.ref), Err: err}
	}
	bs := g.r.config.BlockSize
	return &Disk{
		r:    g.r,
		from: g.r.manifestPath(g.ref),
		size: m.Capacity,
		data: m.DataBytes,
		tree: tree.Tree{Root: root, Levels: m.Levels, Blocks: tree.Blocks(m.Capacity, bs)},
	}, nil
}

// readIdentity reads whose directory it is.
func (r *Repository) readIdentity(dir string, who *identity) error {
	return r.readSealed(sealed.Identity, path.Join(dir, identityName), who)
}
