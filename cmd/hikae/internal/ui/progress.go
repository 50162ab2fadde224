package ui

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/mattn/go-runewidth"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// plainInterval is how often a line is written about one item where there is
// no terminal: often enough to see life in a log, seldom enough to read it.
const plainInterval = 15 * time.Second

// Progress shows how far a verb's items (disks, files, packs) are: as bars on a
// terminal, as a line now and then elsewhere, not at all when quiet or when the
// answer is JSON. Its methods are safe for concurrent use and cheap enough to be
// called for every block. A nil Progress shows nothing.
type Progress struct {
	p     *Printer
	clock func() time.Time
	bars  *bars // nil without a terminal

	mu     sync.Mutex
	items  map[string]*item
	closed bool
}

// item is one thing under way.
type item struct {
	name        string
	phase       string
	counted     bool
	done, total int64
	began, said time.Time
	// rate is measured over the last seconds, so that it follows changes but
	// does not jump.
	mark     time.Time
	markDone int64
	rate     float64 // bytes a second
	bar      *mpb.Bar
}

// bars is the drawing part.
type bars struct {
	container *mpb.Progress
}

// write puts a line above the bars; false when they are gone.
func (b *bars) write(line string) bool {
	_, err := io.WriteString(b.container, line)
	return err == nil
}

// Progress begins to show progress; end it with Close before printing the
// answer.
func (p *Printer) Progress(clock func() time.Time) *Progress {
	if p.Quiet || p.JSON {
		return nil
	}
	g := &Progress{p: p, clock: clock, items: map[string]*item{}}
	if p.Terminal() {
		g.bars = &bars{container: mpb.New(mpb.WithOutput(p.Err), mpb.WithRefreshRate(200*time.Millisecond))}
		p.mu.Lock()
		p.bars = g.bars
		p.mu.Unlock()
	}
	return g
}

// Set says that of the item's total bytes so many are done, and in which phase
// it is (as "reading"). A total of 0 is not known yet.
func (g *Progress) Set(name, phase string, done, total int64) {
	g.set(name, phase, false, done, total)
}

// Count is Set for things that are counted rather than measured; what names
// them (as "generations").
func (g *Progress) Count(name, what string, done, total int64) {
	g.set(name, what, true, done, total)
}

func (g *Progress) set(name, phase string, counted bool, done, total int64) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return
	}
	now := g.clock()
	it := g.items[name]
	if it == nil {
		it = &item{name: name, began: now, said: now, mark: now, markDone: done}
		g.items[name] = it
		if g.bars != nil {
			it.bar = g.bars.container.New(0, mpb.BarStyle().Lbound("").Rbound("").Filler("━").Tip("━").Padding("·"),
				mpb.BarWidth(24),
				mpb.PrependDecorators(decor.Any(g.label(it), decor.WCSyncSpaceR)),
				mpb.AppendDecorators(decor.Any(g.status(it), decor.WCSyncSpaceR)),
				mpb.BarRemoveOnComplete())
		}
	}
	phaseChanged := it.phase != phase
	if phaseChanged {
		// Another phase counts other bytes.
		it.mark, it.markDone, it.rate = now, done, 0
	}
	it.phase, it.counted, it.done, it.total = phase, counted, done, total
	if d := now.Sub(it.mark); d >= 2*time.Second {
		it.rate = float64(done-it.markDone) / d.Seconds()
		it.mark, it.markDone = now, done
	}
	if it.bar != nil {
		it.bar.SetTotal(max(total, done+1), false) // completed by Close, not by reaching the total
		it.bar.SetCurrent(done)
		return
	}
	if now.Sub(it.said) >= plainInterval {
		it.said = now
		g.p.message(it.name + ": " + it.text())
	}
}

// Close ends the display.
func (g *Progress) Close() {
	if g == nil {
		return
	}
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return
	}
	g.closed = true
	g.mu.Unlock()
	if g.bars == nil {
		return
	}
	for _, it := range g.items {
		it.bar.Abort(true)
	}
	// Not under the lock: the drawing goroutine asks the decorators, which take it.
	g.bars.container.Wait()
	g.p.mu.Lock()
	g.p.bars = nil
	g.p.mu.Unlock()
}

func (g *Progress) label(it *item) decor.DecorFunc {
	return func(decor.Statistics) string {
		return runewidth.Truncate(Clean(it.name), 40, "…")
	}
}

func (g *Progress) status(it *item) decor.DecorFunc {
	return func(decor.Statistics) string {
		g.mu.Lock()
		defer g.mu.Unlock()
		return it.text()
	}
}

// text is the item's state in words.
func (it *item) text() string {
	if it.counted {
		return fmt.Sprintf("%d of %d %s", it.done, it.total, it.phase)
	}
	s := it.phase
	if s != "" {
		s += " "
	}
	switch {
	case it.total > 0:
		s += fmt.Sprintf("%s of %s (%d %%)", Size(it.done), Size(it.total), min(100, it.done*100/it.total))
	case it.done > 0:
		s += Size(it.done)
	}
	if it.rate > 0 {
		s += fmt.Sprintf(", %s/s", Size(int64(it.rate)))
		if left := it.total - it.done; left > 0 {
			s += fmt.Sprintf(", %s left", Duration(time.Duration(float64(left)/it.rate*float64(time.Second))))
		}
	}
	return s
}
