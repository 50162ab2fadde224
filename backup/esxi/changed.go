package esxi

import (
	"context"
	"fmt"
	"slices"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// ChangedAreas says which areas of a disk changed between changeID (of an
// earlier snapshot's disk) and snap; "*" asks for the allocated areas. They come
// sorted, merged, and within the disk.
//
// ErrNotProvable means that the host cannot or will not tell (tracking is off,
// the id is of another epoch, the answer contradicts itself): everything may
// have changed. Any other error says nothing about the disk.
func (h *Host) ChangedAreas(ctx context.Context, snap *Snapshot, diskKey int32, changeID string) ([]Extent, error) {
	i := slices.IndexFunc(snap.Disks, func(d Disk) bool { return d.Key == diskKey })
	if i < 0 {
		return nil, errf(ErrNotFound, nil, "%s: snapshot %s has no disk %d", h.name, snap.Name, diskKey)
	}
	disk := snap.Disks[i]
	what := fmt.Sprintf("changed areas of %s, %s", snap.VM.Name, disk.Label)
	doubt := func(cause error, format string, args ...any) error {
		return errf(ErrNotProvable, cause, "%s: %s: %s", h.name, what, fmt.Sprintf(format, args...))
	}
	if changeID == "" {
		return nil, doubt(nil, "there is no change id to start from")
	}
	if disk.ChangeID == "" {
		return nil, doubt(nil, "change tracking is not on")
	}
	if h.session == nil {
		return nil, doubt(nil, "only the host's API tells, and port 443 is not used")
	}
	var areas []Extent
	for at := int64(0); at < disk.Capacity; {
		ref := snapshotRef(snap.ID)
		res, err := methods.QueryChangedDiskAreas(ctx, h.session.vc, &types.QueryChangedDiskAreas{
			This: vmRef(snap.VM.ID), Snapshot: &ref, DeviceKey: diskKey, StartOffset: at, ChangeId: changeID,
		})
		switch {
		case err == nil:
		case ctx.Err() != nil || transient(err) || said(err):
			return nil, h.explain(ctx, what, err)
		default:
			return nil, doubt(h.explain(ctx, what, err), "the host does not tell (%s)", faultText(err))
		}
		page := res.Returnval
		end := page.StartOffset + page.Length
		if page.StartOffset > at || page.Length < 0 || end <= at {
			return nil, doubt(nil, "the host answers for %d+%d when asked from %d on", page.StartOffset, page.Length, at)
		}
		for _, a := range page.ChangedArea {
			// The last area may be rounded up past the end of the disk.
			if a.Start < 0 || a.Length <= 0 || a.Start >= disk.Capacity || a.Start > a.Start+a.Length {
				return nil, doubt(nil, "the host names an area outside of the disk (%d+%d)", a.Start, a.Length)
			}
			areas = append(areas, Extent{a.Start, min(a.Length, disk.Capacity-a.Start)})
		}
		at = end
	}
	return merge(areas), nil
}

// merge sorts areas and joins those that touch or overlap.
func merge(areas []Extent) []Extent {
	slices.SortFunc(areas, func(a, b Extent) int {
		switch {
		case a.Offset < b.Offset:
			return -1
		case a.Offset > b.Offset:
			return 1
		}
		return 0
	})
	out := areas[:0]
	for _, a := range areas {
		if n := len(out); n > 0 && a.Offset <= out[n-1].Offset+out[n-1].Length {
			out[n-1].Length = max(out[n-1].Length, a.Offset+a.Length-out[n-1].Offset)
			continue
		}
		out = append(out, a)
	}
	return out
}
