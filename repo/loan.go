package repo

import (
	"context"
	"fmt"

	"hikae/repo/internal/block"
)

// Loan is a stretch of a disk as it lies in memory: the cache's own blocks, which
// are not copied and must not be changed.
type Loan struct {
	r       *Repository
	parts   [][]byte
	entries []*blockEntry
}

// Parts are the bytes, in order, good until Return. Holes are zeros.
func (l *Loan) Parts() [][]byte { return l.parts }

// Return gives the bytes back. It must be called once.
func (l *Loan) Return() {
	for _, e := range l.entries {
		if e != nil {
			e.Release()
		}
	}
	l.entries, l.parts = nil, nil
}

// Lend reads n bytes at off, which lie on the disk and are at most 8 MiB, without
// copying them. What is read stays in the cache as long as there is room, so this is
// for who reads what others, or the same reader, read again soon. Errors are those of
// ReadAtContext.
func (d *Disk) Lend(ctx context.Context, off, n int64) (*Loan, error) {
	if off < 0 || n < 0 || n > readWindow || off > d.size-n {
		return nil, fmt.Errorf("lend %d bytes at %d of a disk of %d", n, off, d.size)
	}
	l := &Loan{r: d.r}
	if n == 0 {
		return l, nil
	}
	bs := int64(d.r.config.BlockSize)
	first := off / bs
	var room [maxRun/(64<<10) + 1]block.Record
	var records []block.Record
	if count := int((off+n-1)/bs - first + 1); count <= len(room) {
		records = room[:count]
	} else {
		records = make([]block.Record, count)
	}
	if err := d.tree.Records(ctx, loader{d.r}, first, records); err != nil {
		return nil, err
	}
	if err := l.gather(ctx, records, n >= bs); err != nil {
		l.Return()
		return nil, err
	}
	l.parts = make([][]byte, 0, len(records))
	for i, rec := range records {
		begin := max(off-(first+int64(i))*bs, 0)
		end := min(off+n-(first+int64(i))*bs, bs)
		if !rec.IsHole() {
			l.parts = append(l.parts, (*l.entries[i].Value())[begin:end])
			continue
		}
		for size := end - begin; size > 0; size -= int64(len(d.r.zeros)) {
			l.parts = append(l.parts, d.r.zeros[:min(size, int64(len(d.r.zeros)))])
		}
	}
	return l, nil
}

// gather borrows the blocks, loading those that are neither there nor on their way.
// passing says that the reader goes through the disk: what it has read it will not
// need again, and the cache's room is for what lies ahead.
func (l *Loan) gather(ctx context.Context, records []block.Record, passing bool) error {
	r := l.r
	l.entries = make([]*blockEntry, len(records))
	var missing []target
	var own []*blockEntry
	for i, rec := range records {
		if rec.IsHole() {
			continue
		}
		e, mine := r.blocks.Claim(rec.ID, !passing)
		l.entries[i] = e
		if mine {
			missing = append(missing, target{rec: rec})
			own = append(own, e)
		}
	}
	if len(missing) > 0 {
		if err := r.fillAll(ctx, missing, own); err != nil {
			return err
		}
	}
	for i, e := range l.entries {
		if e == nil || e.Wait(ctx) == nil {
			continue
		}
		// Whoever was loading it failed or gave up; that need not concern us.
		var err error
		if l.entries[i], err = r.loadBlock(ctx, records[i]); err != nil {
			return err
		}
	}
	return nil
}

// fillAll loads blocks into their entries, or none of them.
func (r *Repository) fillAll(ctx context.Context, all []target, entries []*blockEntry) error {
	bufs := make([]*[]byte, len(all))
	for i := range all {
		bufs[i] = r.buffers.Get().(*[]byte)
		all[i].dst, all[i].room = *bufs[i], true
	}
	var err error
	if len(all) == 1 {
		err = r.fetchTarget(ctx, all[0])
	} else {
		err = r.fetchAll(ctx, append([]target(nil), all...)) // it sorts
	}
	for i, e := range entries {
		if err == nil {
			e.Keep(bufs[i], int64(len(*bufs[i])))
			continue
		}
		r.buffers.Put(bufs[i])
		e.Fail()
	}
	return err
}
