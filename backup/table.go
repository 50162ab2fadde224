package backup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"hikae/backup/esxi"
	"hikae/backup/vmdk"
	"hikae/repo"
)

// Where a host cannot be asked which areas of a disk changed (SSH is the only way to it,
// or its API refuses), the file in which it notes them can still be read: for each block a
// number that is replaced whenever the block is written. A backup keeps the file, and the
// next one compares. The file's layout is nowhere documented beyond its first fields, so
// its word is believed only after it held in full reads: tablesProved of them in a row,
// and one more every tablesAgain backups. The sample that tests every host's word (see
// auditAll) comes on top.

const (
	tablesProved = 3
	tablesAgain  = 20
	// A larger file is not used: two of them are in memory at once.
	maxTable = 48 << 20
	// A file that does not compress to this is not kept.
	maxTableKept = 4 << 20
)

// tracking is what a run knows of a disk's change tracking file.
type tracking struct {
	now    *esxi.TrackingFile // as it is; nil: not read, or not to be had
	proved int                // what becomes of repo.TrackingCopy.Proved
	// quiet is, in a full read, what the files say has not changed and was not seen yet:
	// it has to be as it was.
	quiet []area
	wrong string // where it was not
}

// epochOf is the change id of the disk's running link, which over SSH is the only one
// shown. Its epoch is that of the frozen link, its number is not; "" without tracking.
func (r *run) epochOf(p *diskPlan) string {
	if p.disk.ChangeID != "" {
		return p.disk.ChangeID
	}
	if r.snap != nil {
		if d := diskByKey(r.snap.VM.Disks, p.disk.Key); d != nil {
			return d.ChangeID
		}
	}
	return ""
}

// readTable reads the disk's change tracking file, once.
func (r *run) readTable(ctx context.Context, p *diskPlan) error {
	if p.tracking.now != nil || r.epochOf(p) == "" {
		return nil
	}
	t, err := r.Host.TrackingFile(ctx, p.disk)
	if errors.Is(err, esxi.ErrNotProvable) {
		r.log.Debug("the change tracking file cannot be used", "disk", p.disk.Label, "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	if len(t.Data) <= maxTable {
		p.tracking.now = t
	}
	return nil
}

// planByTable plans with the change tracking file. done says that this is the plan;
// otherwise everything is to be read, and what the file says is watched.
func (r *run) planByTable(ctx context.Context, p *diskPlan) (done bool, err error) {
	if err := r.readTable(ctx, p); err != nil || p.tracking.now == nil {
		return false, err
	}
	kept := p.before.Tracking
	if kept == nil || p.parent.Size() != p.disk.Capacity {
		return false, nil
	}
	then, err := unpackTable(kept.Table)
	if err != nil {
		r.log.Warn("the change tracking file that the previous generation kept cannot be read", "disk", p.disk.Label, "error", err)
		return false, nil
	}
	areas, why := compareTables(then, p.tracking.now.Data, r.epochOf(p))
	if why != "" {
		r.log.Info("the change tracking file proves nothing", "disk", p.disk.Label, "why", why)
		p.because("its change tracking file proves nothing: " + why)
		return false, nil
	}
	areas = tidy(areas, p.disk.Capacity)
	n := kept.Proved
	if about := r.Host.About(); about.Build != r.parent.manifest.Host.Build {
		n = 0 // another release may keep another file
	}
	if n < tablesProved || n%tablesAgain == 0 {
		p.tracking.quiet, p.tracking.proved = invert(roundOut(areas, p.block, p.disk.Capacity), p.disk.Capacity), n+1
		return false, nil
	}
	p.mode, p.reason = repo.ModeIncremental, "by the host's change tracking file, compared with the one of the previous generation"
	p.tracking.proved = n + 1
	p.take(areas)
	return true, nil
}

// compareTables tells which areas were written between two states of a change tracking
// file, or why they prove nothing. id is a change id of the disk's epoch.
func compareTables(then, now []byte, id string) (areas []area, why string) {
	a, err := vmdk.ParseTracking(then, int64(len(then)))
	if err != nil {
		return nil, "the one kept cannot be read"
	}
	b, err := vmdk.ParseTracking(now, int64(len(now)))
	if err != nil {
		return nil, "it cannot be read"
	}
	uuid, number, err := vmdk.ParseChangeID(id)
	if err != nil {
		return nil, "the change id cannot be read"
	}
	switch {
	case a.Capacity != b.Capacity || a.Granularity != b.Granularity:
		return nil, "it has another size than before"
	case a.UUID != b.UUID || b.UUID != uuid:
		return nil, "it belongs to another epoch of change tracking"
	case b.Number < a.Number || number < b.Number:
		return nil, "its numbers went back"
	}
	le := binary.LittleEndian
	var highest uint32
	var first, at area
	flush := func() {
		if at.Length > 0 {
			areas = append(areas, at)
		}
		at = first
	}
	for i := range b.Blocks() {
		off := vmdk.TrackingHeaderSize + 4*i
		x, y := le.Uint32(then[off:]), le.Uint32(now[off:])
		if y < x {
			return nil, fmt.Sprintf("the number of block %d went back", i)
		}
		highest = max(highest, y)
		if x == y && y <= a.Number {
			flush()
			continue
		}
		start := i * b.Granularity
		if at.Length == 0 {
			at.Offset = start
		}
		at.Length = min(start+b.Granularity, b.Capacity) - at.Offset
	}
	flush()
	// A table of nothing but zeros, or with numbers that are yet to come, is not what it
	// is taken for.
	if highest == 0 {
		return nil, "it notes nothing"
	}
	if highest > number {
		return nil, "its numbers are not those of the change id"
	}
	return areas, ""
}

// watch compares a stretch that was read with the parent, where the change tracking file
// says that nothing changed. data is nil for zeros. Stretches come in ascending order.
func (p *diskPlan) watch(ctx context.Context, s step, data []byte) error {
	t := &p.tracking
	for len(t.quiet) > 0 && t.wrong == "" {
		quiet := intersect(t.quiet[:1], []area{s.area})
		if len(quiet) > 0 {
			same, err := p.unchanged(ctx, s, quiet[0], data)
			if err != nil {
				return err
			}
			if !same {
				t.wrong = fmt.Sprintf("bytes %d to %d changed and its change tracking file does not say so", quiet[0].Offset, quiet[0].End())
			}
		}
		if t.quiet[0].End() > s.End() {
			return nil // the rest of it comes later
		}
		t.quiet = t.quiet[1:]
	}
	return nil
}

// unchanged tells whether a part of a step is what the parent has there.
func (p *diskPlan) unchanged(ctx context.Context, s step, part area, data []byte) (bool, error) {
	if data != nil {
		from := part.Offset - s.Offset
		return p.parent.Matches(ctx, part.Offset, data[from:from+part.Length])
	}
	start, _, err := p.parent.NextData(ctx, part.Offset)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return start >= part.End(), err
}

// keepTable is what the next backup needs of the file; nil when it cannot use it.
func (p *diskPlan) keepTable() *repo.TrackingCopy {
	if p.tracking.now == nil {
		return nil
	}
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil
	}
	defer func() { _ = e.Close() }() // nothing is buffered
	packed := e.EncodeAll(p.tracking.now.Data, nil)
	if len(packed) > maxTableKept {
		return nil
	}
	c := &repo.TrackingCopy{Table: packed, Proved: p.tracking.proved}
	if p.tracking.wrong != "" {
		c.Proved = 0
	}
	return c
}

func unpackTable(packed []byte) ([]byte, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxTable+1<<20))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.DecodeAll(packed, nil)
}
