package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmdk"
)

// TrackingFile is a change tracking file as it is on the datastore: header and
// table.
type TrackingFile struct {
	vmdk.Tracking
	Path string // "[datastore1] web01/web01-ctk.vmdk"
	Data []byte // the whole file
}

// maxTrackingFile is more than the largest table (2 Mi entries) has.
const maxTrackingFile = 16 << 20

// TrackingFile reads the change tracking file of a frozen disk's top link: what
// was written up to the snapshot. ErrNotProvable: the link has none, or one of a
// layout that is not known. What the table says has to be proved by the caller;
// the layout beyond the first fields is nowhere documented.
func (h *Host) TrackingFile(ctx context.Context, d Disk) (*TrackingFile, error) {
	what := "read the change tracking file of " + d.Label
	doubt := func(cause error, format string, args ...any) error {
		return errf(ErrNotProvable, cause, "%s: %s: %s", h.name, what, fmt.Sprintf(format, args...))
	}
	if !d.frozen || len(d.Chain) == 0 {
		return nil, fmt.Errorf("%s: %s: it is not frozen: only disks of a snapshot are read", h.name, what)
	}
	store, top := h.store(), d.Chain[len(d.Chain)-1]
	text, err := h.descriptor(ctx, store, top)
	if err != nil {
		return nil, err
	}
	desc, err := vmdk.ParseDescriptor(text)
	if err != nil {
		return nil, doubt(err, "its descriptor cannot be read: %v", err)
	}
	if desc.ChangeTrackPath == "" {
		return nil, doubt(nil, "change tracking was not at work when the snapshot was made")
	}
	var stores map[string]string
	if strings.HasPrefix(desc.ChangeTrackPath, "/") {
		if stores, err = h.volumes(ctx); err != nil {
			return nil, err
		}
	}
	name, err := beside(top, desc.ChangeTrackPath, stores)
	if err != nil {
		return nil, doubt(err, "%v", err)
	}
	data, err := store.readFile(ctx, name, maxTrackingFile)
	if errors.Is(err, ErrNotFound) {
		return nil, doubt(err, "%s is missing", name)
	}
	if err != nil {
		return nil, err
	}
	t, err := vmdk.ParseTracking(data, int64(len(data)))
	if err != nil {
		return nil, doubt(err, "%s has a layout that is not known: %v", name, err)
	}
	if t.Capacity != d.Capacity {
		return nil, doubt(nil, "%s is for a disk of %d bytes, not %d", name, t.Capacity, d.Capacity)
	}
	return &TrackingFile{Tracking: *t, Path: name, Data: data}, nil
}

// AllocatedAreas tells which areas of a frozen disk may hold data, in order and
// within the disk: what lies between reads as zeros. It asks the host for the
// map of the base's file (vmkfstools -t0) and reads the tables of the links
// above. Ask before the disk is read: a host may refuse one of its services what
// another has open. ErrNotProvable: SSH is not there, or what the host prints is not a map
// that accounts for every byte; then everything may hold data.
func (h *Host) AllocatedAreas(ctx context.Context, d Disk) ([]vmdk.Area, error) {
	what := "allocated areas of " + d.Label
	doubt := func(cause error, format string, args ...any) error {
		return errf(ErrNotProvable, cause, "%s: %s: %s", h.name, what, fmt.Sprintf(format, args...))
	}
	if !d.frozen || len(d.Chain) == 0 {
		return nil, fmt.Errorf("%s: %s: it is not frozen: only disks of a snapshot are read", h.name, what)
	}
	if h.shell == nil {
		return nil, doubt(nil, "only the host's shell tells, and SSH is not configured (hikae host add --ssh)")
	}
	if err := h.tryShell(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, doubt(err, "only the host's shell tells: %v", err)
	}
	areas, err := h.baseMap(ctx, d)
	if err != nil {
		if ctx.Err() != nil {
			return nil, h.explain(ctx, what, err)
		}
		return nil, doubt(err, "the host does not tell in a form that can be read (%v)", err)
	}
	if len(d.Chain) == 1 {
		return areas, nil
	}
	r, err := h.OpenDisk(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }() // only read
	for link := 1; link < len(d.Chain); link++ {
		for off := int64(0); off < d.Capacity; {
			// Zeros held by a link cover data below, but listing what is below all
			// the same is only less exact.
			a, zeros, err := r.chain.Held(ctx, link, off)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", h.name, what, err)
			}
			if off = a.End(); !zeros {
				areas = append(areas, a)
			}
		}
	}
	return vmdk.MergeAreas(areas), nil
}

// baseMap asks vmkfstools for the map of the base link's file.
func (h *Host) baseMap(ctx context.Context, d Disk) ([]vmdk.Area, error) {
	file, err := hostPath(d.Chain[0])
	if err != nil {
		return nil, err
	}
	ctx, cancel := h.shellCall(ctx)
	defer cancel()
	out, err := h.shell.words(ctx, true, "vmkfstools", "-t0", file)
	if err != nil {
		return nil, err
	}
	regions, err := vimcmd.ParseMapping(out, d.Capacity)
	if err != nil {
		return nil, err
	}
	var areas []vmdk.Area
	for _, r := range regions {
		if !r.Hole && !r.Lazy {
			areas = append(areas, vmdk.Area{Offset: r.Offset, Length: r.Length})
		}
	}
	return vmdk.MergeAreas(areas), nil
}
