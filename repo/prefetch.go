package repo

import (
	"context"
	"runtime"
	"sync"

	"hikae/repo/internal/block"
)

// prefetchStep is how much of a disk one goroutine of the prefetcher takes on at a
// time, in bytes: a few blocks, which mostly lie next to each other in one pack and
// are read at once.
const prefetchStep = 1 << 20

// prefetcher loads what will be needed soon: as many goroutines as there are
// workers, which end when there is nothing left to do. What they take on is not
// claimed before its turn comes, so that a reader that is quicker does not wait.
type prefetcher struct {
	mu      sync.Mutex
	queue   []stretch // in the order in which they were asked for
	bytes   int64     // in queue
	workers int
}

// stretch is a part of a disk.
type stretch struct {
	d        *Disk
	off, end int64
}

// Prefetch loads a stretch into the cache in the background. It is a hint: what is
// more than half of the cache is dropped. It never fails and never waits.
func (d *Disk) Prefetch(off, n int64) {
	r, p := d.r, &d.r.ahead
	n = min(n, d.size-off, r.opt.BlockCacheBytes/2, readWindow)
	if off < 0 || n <= 0 || r.life.Err() != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bytes+n > r.opt.BlockCacheBytes/2 {
		return
	}
	p.queue = append(p.queue, stretch{d, off, off + n})
	p.bytes += n
	for want := p.bytes / prefetchStep; p.workers < r.opt.Workers && int64(p.workers) <= want; {
		p.workers++
		r.background.Add(1)
		go r.prefetch()
	}
}

// next takes the next step out of the queue; ok is false when there is none, and the
// goroutine that asked must end.
func (p *prefetcher) next(stop bool) (s stretch, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if stop {
		p.queue, p.bytes = nil, 0
	}
	if len(p.queue) == 0 {
		p.workers--
		return s, false
	}
	head := &p.queue[0]
	s = *head
	s.end = min(s.end, (s.off/prefetchStep+1)*prefetchStep)
	p.bytes -= s.end - s.off
	if head.off = s.end; head.off == head.end {
		*head = stretch{}
		p.queue = p.queue[1:]
	}
	return s, true
}

func (r *Repository) prefetch() {
	defer r.background.Done()
	for {
		s, ok := r.ahead.next(r.life.Err() != nil)
		if !ok {
			return
		}
		s.d.load(r.life, s.off, s.end)
	}
}

// load brings into the cache what of a stretch is neither there nor on its way. What
// fails is left to readers, who know what to say.
func (d *Disk) load(ctx context.Context, off, end int64) {
	r := d.r
	bs := int64(r.config.BlockSize)
	first := off / bs
	var room [prefetchStep/(64<<10) + 1]block.Record
	records := room[:(end-1)/bs-first+1]
	if d.tree.Records(ctx, loader{r}, first, records) != nil {
		return
	}
	var all []target
	var entries []*blockEntry
	for _, rec := range records {
		if rec.IsHole() {
			continue
		}
		if e := r.blocks.Reserve(rec.ID); e != nil {
			all = append(all, target{rec: rec})
			entries = append(entries, e)
		}
	}
	if len(all) == 0 {
		return
	}
	of := make(map[block.ID]*blockEntry, len(all)) // runs sorts
	for i, t := range all {
		of[t.rec.ID] = entries[i]
	}
	for _, part := range runs(all, maxRun) {
		bufs := make([]*[]byte, len(part))
		for i := range part {
			bufs[i] = r.buffers.Get().(*[]byte)
			part[i].dst, part[i].room = *bufs[i], true
		}
		r.tryRun(ctx, part, func(i int) {
			of[part[i].rec.ID].Fill(bufs[i], bs)
			bufs[i] = nil
			// Whoever answers readers has been waiting for a processor long enough.
			runtime.Gosched()
		})
		for i, b := range bufs {
			if b != nil {
				r.buffers.Put(b)
				of[part[i].rec.ID].Fail()
			}
		}
	}
}
