package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"hikae/repo"
)

// Mount shows a repository on dir, which is an empty directory outside of it.
// It returns when the directory is ready to use; the repository must stay open
// until the Server is done.
//
// An unusable directory is ErrMountpoint and nothing has been mounted. The end
// of ctx has no effect on a mount that has been made.
func Mount(ctx context.Context, r *repo.Repository, dir string, o Options) (*Server, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	return mount(ctx, repository{r, &complaints{log: o.Logger, now: o.Clock}}, r.Dir(), dir, o)
}

// repository is a repo.Repository as a source.
type repository struct {
	r          *repo.Repository
	complaints *complaints
}

var (
	_ source = repository{}
	_ disk   = stored{}
)

func (s repository) ID() string { return s.r.ID() }

// known translates the errors that the tree tells apart.
func known(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, repo.ErrNotFound):
		return fmt.Errorf("%w: %w", errGone, err)
	case errors.Is(err, repo.ErrDamaged):
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

func (s repository) VMs(ctx context.Context) ([]vmID, error) {
	vms, err := s.r.VMs(ctx)
	if err != nil && len(vms) > 0 && errors.Is(err, repo.ErrDamaged) {
		// One VM whose name is lost must not hide the others.
		s.complaints.about(err, "some VMs are not shown")
	} else if err != nil {
		return nil, known(err)
	}
	ids := make([]vmID, len(vms))
	for i, vm := range vms {
		ids[i] = vmID{vm.Host, vm.Name}
	}
	return ids, nil
}

func (s repository) Refs(ctx context.Context, vm vmID) ([]ref, error) {
	refs, err := s.r.Refs(ctx, repo.VMID{Host: vm.host, Name: vm.name})
	if err != nil {
		return nil, known(err)
	}
	all := make([]ref, len(refs))
	for i, r := range refs {
		all[i] = ref{vm, r.Sequence, r.Time, r.Name(), r.Imported}
	}
	return all, nil
}

// repo is the reference as the repository knows it.
func (r ref) repo() repo.Ref {
	return repo.Ref{VM: repo.VMID{Host: r.vm.host, Name: r.vm.name}, Sequence: r.sequence, Time: r.time, Imported: r.imported}
}

func (s repository) Open(ctx context.Context, r ref) (*snapshot, error) {
	g, err := s.r.Generation(ctx, r.repo())
	if err != nil {
		return nil, known(err)
	}
	files, err := g.Files(ctx)
	if err != nil {
		return nil, known(err)
	}
	m := g.Manifest()
	snap := &snapshot{attrs: filled(
		xattr{"generation", r.String()},
		xattr{"sequence", strconv.FormatUint(m.Sequence, 10)},
		xattr{"time", m.Time.UTC().Format(time.RFC3339)},
		xattr{"mode", m.Mode},
		xattr{"reason", m.Reason},
		xattr{"consistency", m.Consistency},
		xattr{"tool", m.Tool},
	)}
	for _, f := range files {
		x := file{name: f.Name, data: f.Data, stored: f.StoredBytes}
		if f.Disk != nil {
			x.disk = stored{f.Disk}
		}
		for i := range m.Disks {
			if d := &m.Disks[i]; f.Name == d.Name+".vmdk" || f.Name == d.Name+flatSuffix {
				x.attrs = diskAttrs(d)
			}
		}
		snap.files = append(snap.files, x)
	}
	return snap, nil
}

func (s repository) Verified(ctx context.Context, r ref) (time.Time, error) {
	v, err := s.r.Verification(ctx, r.repo())
	switch {
	case errors.Is(err, repo.ErrNotFound):
		return time.Time{}, nil
	case errors.Is(err, repo.ErrDamaged):
		// That it cannot be told keeps nobody from the other attributes.
		s.complaints.about(known(err), "when a generation was verified cannot be told")
		return time.Time{}, nil
	}
	return v.Time, known(err)
}

// stored is a repo.Disk as a disk.
type stored struct{ *repo.Disk }

func (d stored) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := d.Disk.ReadAtContext(ctx, p, off)
	return n, known(err)
}

func (d stored) Lend(ctx context.Context, off, n int64) (loan, error) {
	l, err := d.Disk.Lend(ctx, off, n)
	if err != nil {
		return nil, known(err)
	}
	return l, nil
}

func (d stored) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	start, end, err = d.Disk.NextData(ctx, off)
	return start, end, known(err)
}

func diskAttrs(d *repo.DiskManifest) []xattr {
	return filled(
		xattr{"disk.key", strconv.Itoa(int(d.Key))},
		xattr{"disk.label", d.Label},
		xattr{"disk.uuid", d.UUID},
		xattr{"disk.change_id", d.ChangeID},
		xattr{"disk.path", d.BackingPath},
		xattr{"disk.mode", d.Mode},
		xattr{"disk.reason", d.Reason},
	)
}

// filled leaves out what is not known.
func filled(all ...xattr) []xattr {
	var some []xattr
	for _, a := range all {
		if a.value != "" {
			some = append(some, xattr{a.name, strings.ToValidUTF8(a.value, "?")})
		}
	}
	return some
}

func (s repository) Pin(ctx context.Context) (io.Closer, error) { return s.r.Pin(ctx) }

func (s repository) Space(context.Context) (total, free uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.r.Dir(), &st); err != nil {
		return 0, 0, fmt.Errorf("room left at %s: %w", s.r.Dir(), err)
	}
	return st.Blocks * uint64(st.Frsize), st.Bavail * uint64(st.Frsize), nil
}
