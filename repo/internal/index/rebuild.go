package index

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// runRecords is how many records Rebuild sorts at a time: 48 MiB of them.
const runRecords = 1 << 20

// RebuildOptions of Rebuild. The zero value is good.
type RebuildOptions struct {
	// TempName is as in Options; nil: that of the index.
	TempName func() string
	// RunRecords is how many records are held and sorted in memory, 48 bytes
	// each; 0 is 1,048,576.
	RunRecords int
	// Progress, if not nil, is told of records merged.
	Progress func(done, total int64)
}

// RebuildInfo is what Rebuild made.
type RebuildInfo struct {
	Records  int64 // none twice
	Segments int
	Bytes    int64
	// Replaced are the files that were there before. They may be deleted.
	Replaced []string
}

// Rebuild writes the whole index anew out of the records that each hands to add, and
// supersedes every segment that was there when it began, damaged ones included.
// Segments that others publish meanwhile stay in use, so what each brings has to
// include only what was published before it is called. Memory is bounded: records are
// sorted in runs, which are segments like any other (a rebuild that is cut off leaves
// them, and they are in use), and the runs are merged. It deletes nothing. It waits while another process is
// merging, and keeps others from it until it is done.
//
// Without any record there is nothing that could supersede: then Segments is 0, and
// the caller deletes what was replaced.
func (x *Index) Rebuild(ctx context.Context, o RebuildOptions, each func(ctx context.Context, add func(block.Record) error) error) (RebuildInfo, error) {
	if o.TempName == nil {
		o.TempName = x.opt.TempName
	}
	if o.RunRecords <= 0 {
		o.RunRecords = runRecords
	}
	// Copies of a repository may lack the directory.
	if err := fsx.MakeDir(x.fsys, x.dir); err != nil {
		return RebuildInfo{}, fmt.Errorf("make the index's directory: %w", err)
	}
	lock, err := x.lockForMerging(ctx)
	if err != nil {
		return RebuildInfo{}, err
	}
	defer lock.Close()
	if err := x.Reload(ctx); err != nil {
		return RebuildInfo{}, err
	}
	b := &rebuild{x: x, o: o}
	x.mu.RLock()
	b.old = slices.Clone(x.names)
	b.sequence = x.nextSequence()
	x.mu.RUnlock()
	if err := each(ctx, func(r block.Record) error { return b.add(ctx, r) }); err != nil {
		return RebuildInfo{}, err
	}
	if err := b.finish(ctx); err != nil {
		return RebuildInfo{}, err
	}
	for _, n := range b.old {
		b.info.Replaced = append(b.info.Replaced, path.Join(x.dir, n.String()))
	}
	return b.info, x.Reload(ctx)
}

// rebuild is a Rebuild at work.
type rebuild struct {
	x        *Index
	o        RebuildOptions
	old      []name
	sequence uint64
	run      [][block.Size]byte
	runs     []*segment
	info     RebuildInfo
}

func (b *rebuild) add(ctx context.Context, r block.Record) error {
	if r.IsHole() {
		return nil
	}
	if len(b.run) == b.o.RunRecords {
		s, err := b.write(ctx, b.sorted(), nil)
		if err != nil {
			return err
		}
		b.runs = append(b.runs, s)
		b.run = b.run[:0]
	}
	b.run = append(b.run, [block.Size]byte{})
	r.Append(b.run[len(b.run)-1][:0])
	return nil
}

// sorted yields the run in memory. Which of several places of an id is the newest
// nobody can tell any more; any order will do.
func (b *rebuild) sorted() source {
	slices.SortFunc(b.run, func(p, q [block.Size]byte) int { return bytes.Compare(p[:], q[:]) })
	return &rows{list: b.run}
}

func (b *rebuild) write(ctx context.Context, src source, dead []name) (*segment, error) {
	slices.SortFunc(dead, func(a, b name) int { return bytes.Compare(a[:], b[:]) })
	dead = slices.Compact(dead)
	if len(dead) > maxSuperseded {
		return nil, fmt.Errorf("the new index would supersede %d segments, at most %d can be named; delete superseded ones (prune)", len(dead), maxSuperseded)
	}
	return b.x.writeAs(ctx, b.o.TempName(), src, b.sequence, dead)
}

// finish merges the runs. The segment that is written last supersedes what was there
// before: until it lasts, nothing is missing.
func (b *rebuild) finish(ctx context.Context) error {
	if len(b.runs) == 0 {
		if len(b.run) == 0 {
			return nil
		}
		s, err := b.write(ctx, b.sorted(), b.old)
		return b.made(s, err)
	}
	if len(b.run) > 0 {
		s, err := b.write(ctx, b.sorted(), nil)
		if err != nil {
			return err
		}
		b.runs = append(b.runs, s)
	}
	b.run = nil
	var total, done int64
	for _, s := range b.runs {
		total += s.entries
	}
	for left := b.runs; len(left) > 0; {
		n, sum := 0, int64(0)
		for n < len(left) && n < mergeMost && sum+left[n].entries <= maxEntries {
			sum += left[n].entries
			n++
		}
		var dead []name
		for _, s := range left[:n] {
			dead = append(dead, s.name)
		}
		src, err := b.x.mergeOf(left[:n])
		if err != nil {
			return err
		}
		if left = left[n:]; len(left) == 0 {
			dead = append(dead, b.old...)
		}
		s, err := b.write(ctx, &counted{source: src, told: func() {
			if done++; b.o.Progress != nil && (done%4096 == 0 || done == total) {
				b.o.Progress(done, total)
			}
		}}, dead)
		if err := b.made(s, err); err != nil {
			return err
		}
	}
	for _, s := range b.runs {
		b.x.files.drop(s.file)
	}
	return nil
}

func (b *rebuild) made(s *segment, err error) error {
	if err != nil {
		return err
	}
	b.info.Segments++
	b.info.Records += s.entries
	b.info.Bytes += s.bytes
	return nil
}

// rows is a source out of memory, as records are stored.
type rows struct{ list [][block.Size]byte }

func (r *rows) next() ([]byte, error) {
	if len(r.list) == 0 {
		return nil, io.EOF
	}
	b := r.list[0][:]
	r.list = r.list[1:]
	return b, nil
}

// counted tells of each record.
type counted struct {
	source
	told func()
}

func (c *counted) next() ([]byte, error) {
	b, err := c.source.next()
	if err == nil {
		c.told()
	}
	return b, err
}

// Scan calls fn for every record that can be read in the segments in use, in no
// particular order, for some perhaps more than once. What cannot be read is passed
// over and reported as in Lookup. It does not see what is not flushed.
func (x *Index) Scan(ctx context.Context, fn func(block.Record) error) error {
	x.mu.RLock()
	live := x.live
	x.mu.RUnlock()
	buf := make([]byte, pageSize)
	for _, s := range live {
		for p := range s.pages() {
			if err := ctx.Err(); err != nil {
				return err
			}
			off, size := s.page(p)
			plain, err := s.load(&x.files, buf, off, size, sealRecords)
			if err != nil {
				x.report(s, err)
				continue
			}
			for ; len(plain) >= block.Size; plain = plain[block.Size:] {
				r, err := decodeRecord(plain)
				if err != nil {
					x.report(s, fmt.Errorf("the page at %d: %w", off, errors.Join(ErrDamaged, err)))
					break
				}
				if err := fn(r); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
