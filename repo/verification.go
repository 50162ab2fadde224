package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/sealed"
)

// Verification is what is remembered of a generation all of whose blocks were opened
// and hashed, and found good.
type Verification struct {
	Manifest string    `json:"manifest"` // SHA-256 of the manifest file, hexadecimal
	Time     time.Time `json:"time"`     // UTC, whole seconds
	Blocks   int64     `json:"blocks"`   // of all disks
	Bytes    int64     `json:"bytes"`    // of these blocks
}

// verificationPrefix begins the names of the files that remember verifications.
const verificationPrefix = "verified-"

// verificationFile is such a file, by its name.
type verificationFile struct {
	name     string
	sequence uint64
	time     time.Time
}

func verificationName(sequence uint64, at time.Time) string {
	return fmt.Sprintf("%s%010d-%s", verificationPrefix, sequence, at.UTC().Format(nameTime))
}

// verificationFiles lists the verifications in a VM's directory, ascending by
// sequence number and time.
func (r *Repository) verificationFiles(dir string) ([]verificationFile, error) {
	list, err := r.fs.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []verificationFile
	for _, e := range list {
		rest, ok := strings.CutPrefix(e.Name(), verificationPrefix)
		if !ok || e.IsDir() {
			continue
		}
		digits, stamp, _ := strings.Cut(rest, "-")
		n, err := strconv.ParseUint(digits, 10, 63)
		at, terr := time.Parse(nameTime, stamp)
		if err == nil && terr == nil && verificationName(n, at) == e.Name() {
			found = append(found, verificationFile{e.Name(), n, at})
		}
	}
	slices.SortFunc(found, func(a, b verificationFile) int {
		return cmp.Or(cmp.Compare(a.sequence, b.sequence), a.time.Compare(b.time))
	})
	return found, nil
}

// Verifications tells when generations of a VM were last verified, by sequence
// number. It goes by the names of files, which whoever can write to the storage can
// make; Verification proves one. A VM that is not there has none.
func (r *Repository) Verifications(ctx context.Context, vm VMID) (map[uint64]time.Time, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	list, err := r.verificationFiles(r.vmDir(vm))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list what of %v was verified: %w", vm, err)
	}
	found := make(map[uint64]time.Time)
	for _, f := range list {
		found[f.sequence] = f.time // the last one is the newest
	}
	return found, nil
}

// Verification returns the newest verification of a generation that somebody with
// the keys made; one that was never verified is ErrNotFound. Files that do not open
// are passed over: when there are no others the error matches ErrDamaged.
func (r *Repository) Verification(ctx context.Context, ref Ref) (Verification, error) {
	v, err := r.verification(ctx, ref)
	if err != nil {
		return Verification{}, fmt.Errorf("when %v was verified: %w", ref, err)
	}
	return v, nil
}

func (r *Repository) verification(ctx context.Context, ref Ref) (Verification, error) {
	if err := ctx.Err(); err != nil {
		return Verification{}, err
	}
	dir := r.vmDir(ref.VM)
	list, err := r.verificationFiles(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Verification{}, err
	}
	list = slices.DeleteFunc(list, func(f verificationFile) bool { return f.sequence != ref.Sequence })
	if len(list) == 0 {
		return Verification{}, ErrNotFound
	}
	sum, err := r.manifestSum(ref)
	if err != nil {
		return Verification{}, err
	}
	var bad error
	for _, f := range slices.Backward(list) {
		name := path.Join(dir, f.name)
		var v Verification
		err := r.readSealed(sealed.Verification, name, &v)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // a newer one has taken its place
		case err == nil && (v.Manifest != sum || !v.Time.Equal(f.time)):
			err = &DamageError{What: name, Err: errors.New("it speaks of another manifest")}
		case err == nil:
			return v, nil
		case !errors.Is(err, ErrDamaged):
			return Verification{}, err
		}
		bad = cmp.Or(bad, err)
	}
	if bad == nil {
		bad = ErrNotFound
	}
	return Verification{}, bad
}

// Remember keeps that all blocks of the generation were found good at v.Time, which
// DiskVerifier proves disk by disk. It fills v.Manifest. Older ones of the same
// generation are removed where storage lets us.
func (g *Generation) Remember(ctx context.Context, v Verification) error {
	r := g.r
	v.Time = v.Time.UTC().Truncate(time.Second)
	return r.setHold(ctx, "remember the verification of", g.ref, func() error {
		var err error
		if v.Manifest, err = r.manifestSum(g.ref); err != nil {
			return err
		}
		// What was proved is what this manifest says, not what may have been put in
		// its place since.
		var now Manifest
		if err := r.readSealed(sealed.Manifest, r.manifestPath(g.ref), &now); err != nil {
			return err
		}
		if len(now.Disks) != len(g.manifest.Disks) {
			return &DamageError{What: r.manifestPath(g.ref), Err: errors.New("it has changed")}
		}
		for i := range now.Disks {
			if a, b := &now.Disks[i], &g.manifest.Disks[i]; string(a.Root) != string(b.Root) || a.Capacity != b.Capacity {
				return &DamageError{What: r.manifestPath(g.ref), Err: errors.New("it has changed")}
			}
		}
		dir := r.vmDir(g.ref.VM)
		name := path.Join(dir, verificationName(g.ref.Sequence, v.Time))
		b, err := r.sealedFile(sealed.Verification, name, v)
		if err != nil {
			return err
		}
		before, err := r.verificationFiles(dir)
		if err != nil {
			return err
		}
		err = fsx.WriteFile(r.fs, forgetTmp(), name, b)
		if errors.Is(err, fs.ErrExist) {
			return r.fs.SyncDir(dir) // twice within a second
		}
		if err != nil {
			return err
		}
		for _, f := range before {
			if f.sequence == g.ref.Sequence {
				_ = r.fs.Remove(path.Join(dir, f.name)) // the newest counts, the others do no harm
			}
		}
		return nil
	})
}

// dropVerifications removes the verifications of generations that are not there any
// more. What cannot be removed does no harm: no number is given twice.
func (r *Repository) dropVerifications(dir string) {
	refs, err := r.entries(dir, VMID{})
	if err != nil {
		return
	}
	list, err := r.verificationFiles(dir)
	if err != nil {
		return
	}
	for _, f := range list {
		if !slices.ContainsFunc(refs, func(ref Ref) bool { return ref.Sequence == f.sequence }) {
			_ = r.fs.Remove(path.Join(dir, f.name))
		}
	}
}
