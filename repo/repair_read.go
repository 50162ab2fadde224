package repo

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
)

// chosen are the packs to read.
func (x *repairer) chosen() ([]*prunePack, error) {
	wanted := make(map[string]bool)
	for _, name := range x.o.Packs {
		wanted[name] = true
	}
	var list []*prunePack
	for _, k := range x.packs.packs {
		_, needed := x.c.packs[k.key]
		_, marked := x.marks[k.key]
		switch {
		case len(x.o.Packs) > 0 && !wanted[k.key.handle.String()] && !marked:
		case k.condemned && !needed && x.c.bad[k.key] == nil:
			// Prune deletes it, whatever is in it.
		default:
			list = append(list, k)
		}
		delete(wanted, k.key.handle.String())
	}
	for k := range x.c.bad {
		delete(wanted, k.handle.String())
	}
	for k := range x.marks {
		delete(wanted, k.handle.String())
	}
	for _, name := range x.o.Packs {
		if wanted[name] {
			return nil, fmt.Errorf("pack %s is not there, and no generation needs it: %w", name, ErrNotFound)
		}
	}
	return list, nil
}

// readAll reads packs from front to end.
func (x *repairer) readAll(ctx context.Context) error {
	list, err := x.chosen()
	if err != nil {
		return err
	}
	var total int64
	for _, k := range list {
		total += k.size
	}
	x.read = make(map[packKey]bool)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan *prunePack)
	var wg sync.WaitGroup
	for range x.r.opt.Workers {
		wg.Go(func() {
			var s pack.Scrubber
			v := x.r.newVerifier()
			for k := range work {
				err := x.readPack(ctx, &s, v, k)
				x.mu.Lock()
				if err != nil {
					cancel(err)
				}
				x.report.PacksRead++
				x.report.BytesRead += k.size
				if ctx.Err() == nil {
					x.progress("read", x.report.BytesRead, total)
				}
				x.mu.Unlock()
			}
		})
	}
feed:
	for _, k := range list {
		select {
		case work <- k:
		case <-ctx.Done():
			break feed
		}
	}
	close(work)
	wg.Wait()
	return context.Cause(ctx)
}

// readPack proves one pack: its sum, and every record.
func (x *repairer) readPack(ctx context.Context, s *pack.Scrubber, v *verifier, k *prunePack) error {
	prove := func() error {
		p, err := x.openRaw(k.key)
		if err != nil {
			return err
		}
		defer func() { _ = p.Close() }()
		_, err = s.Scrub(p, func(rec block.Record, sealed []byte) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			_, err := v.payload(p, rec, sealed)
			return err
		})
		return err
	}
	err := twice(prove)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil && !hurts(err):
		return fmt.Errorf("read pack %v: %w", k.key.handle, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.read[k.key] = true
	if x.row++; !unreadable(err) {
		x.row = 0
	}
	if x.row == maxUnreadable {
		return fmt.Errorf("%d packs in a row cannot be read, is the storage gone? Nothing was changed: %w", maxUnreadable, err)
	}
	if err != nil {
		x.found(k.key, firstLine(err), false)
	}
	return nil
}

// hurts tells whether an error is about stored bytes that are missing, wrong, or on a
// part of the disk that cannot be read.
func hurts(err error) bool { return pack.IsDamage(err) || unreadable(err) }

// openRaw opens a pack past the cache, whose files may be those of a minute ago.
func (x *repairer) openRaw(k packKey) (p *pack.Pack, err error) {
	err = twice(func() error {
		p, err = x.r.openFile(k)
		return err
	})
	return p, err
}

// twice tries again what storage could not read: a disk says so again, a share may only
// have had a bad moment.
func twice(read func() error) error {
	err := read()
	if unreadable(err) {
		err = read()
	}
	return err
}

// firstLine is the first of several errors that were joined.
func firstLine(err error) error {
	var many interface{ Unwrap() []error }
	for errors.As(err, &many) {
		list := many.Unwrap()
		if len(list) == 0 || fmt.Sprint(errors.Join(list...)) != err.Error() {
			break // not joined but described by several
		}
		err = list[0]
	}
	return err
}
