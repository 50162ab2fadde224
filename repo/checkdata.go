package repo

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// readData reads every pack that is needed.
func (c *checker) readData(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	list := make([]packKey, 0, len(c.packs))
	for k := range c.packs {
		list = append(list, k)
	}
	slices.SortFunc(list, func(a, b packKey) int {
		return cmp.Or(cmp.Compare(a.typ, b.typ), cmp.Compare(a.handle, b.handle))
	})
	work := make(chan packKey)
	var wg sync.WaitGroup
	var first error
	for range c.r.opt.Workers {
		wg.Go(func() {
			s := c.newScrub()
			for k := range work {
				n, err := s.pack(ctx, k)
				c.mu.Lock()
				c.report.BytesRead += n
				c.report.Records += s.records
				if s.whole {
					c.proved(ctx, k.typ.Path(k.handle))
				}
				if err != nil && first == nil {
					first = err
					cancel()
				}
				if c.o.Progress != nil && first == nil {
					c.o.Progress(c.report.BytesRead, c.report.PackBytes)
				}
				c.mu.Unlock()
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
	if first != nil {
		return first
	}
	return ctx.Err()
}

// proved notes that a file is whole.
func (c *checker) proved(ctx context.Context, path string) {
	if c.keeper != nil {
		c.keeper.proved(ctx, path)
	}
}

// remember writes down what was proved, however the check ended.
func (c *checker) remember(ctx context.Context) {
	for _, g := range c.gens {
		c.proved(ctx, c.r.manifestPath(g.ref))
	}
	if err := c.keeper.end(ctx, nil); err != nil {
		c.r.log.Warn("the repository takes no notes of what was verified when", "error", err)
	}
}

// scrub is one goroutine's means to read packs.
type scrub struct {
	c       *checker
	reader  pack.Scrubber
	scratch pack.Scratch
	plain   []byte
	hash    *hasher
	records int64 // of the last pack
	whole   bool  // the last pack is
}

func (c *checker) newScrub() *scrub {
	return &scrub{c: c, plain: make([]byte, max(c.r.config.BlockSize, tree.NodeSize)), hash: newHasher(c.r.ring)}
}

func (s *scrub) pack(ctx context.Context, k packKey) (int64, error) {
	s.records, s.whole = 0, false
	e, err := s.c.r.openPack(ctx, k.typ, k.handle)
	var n int64
	bad := 0
	if err == nil {
		defer e.Release()
		p := e.Value()
		n, err = s.reader.Scrub(p, func(rec block.Record, sealed []byte) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := s.record(p, rec, sealed); err != nil {
				bad++
				s.c.spoiled(k, &rec, s.c.r.readError(rec, err))
			}
			s.records++
			return nil
		})
	}
	switch {
	case ctx.Err() != nil:
		return n, ctx.Err()
	case err == nil:
		s.whole = true
		return n, nil
	case !hurts(err):
		return n, fmt.Errorf("read pack %v: %w", k.handle, err)
	case bad == 0:
		// Its records are good, or there was no getting at them.
		s.c.spoiled(k, nil, &DamageError{Pack: k.handle, What: "the whole file", Err: err})
	}
	return n, nil
}

func (s *scrub) record(p *pack.Pack, rec block.Record, sealed []byte) error {
	if err := s.c.r.plausible(rec); err != nil {
		return err
	}
	dst := s.plain[:s.c.r.rawSize(rec.Kind)]
	payload, err := p.Unseal(&s.scratch, rec, len(dst), sealed)
	if err != nil {
		return err
	}
	if err := s.c.r.codec.Decompress(dst, rec.Kind, payload); err != nil {
		return err
	}
	id := s.hash.block
	if rec.Kind.IsNode() {
		id = s.hash.node
	}
	if id(dst) != rec.ID {
		return fmt.Errorf("%w: its content has another id", pack.ErrFormat)
	}
	return nil
}
