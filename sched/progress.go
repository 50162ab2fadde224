package sched

import (
	"sync"
	"time"

	"hikae/backup"
	"hikae/sched/history"
)

// progress is how far a task under way is. The goroutine that works writes it,
// the one that decides reads it.
type progress struct {
	clock func() time.Time
	nudge chan<- struct{}

	mu      sync.Mutex
	phase   string
	disk    string
	message string
	done    int64
	total   int64
	rate    float64   // units a second, smoothed
	from    time.Time // since when the phase, and of what, the rate is measured
	fromN   int64
	events  []history.Event // to be written down
}

func newProgress(clock func() time.Time, nudge chan<- struct{}) *progress {
	return &progress{clock: clock, nudge: nudge}
}

// set takes an event of a backup.
func (p *progress) set(e backup.Event) {
	p.mu.Lock()
	told := p.at(e.Phase, e.Done, e.Total)
	if e.Disk != "" {
		p.disk = e.Disk
	}
	if e.Message != "" && e.Message != p.message {
		p.message = e.Message
		p.tell(e.Message)
		told = true
	}
	p.mu.Unlock()
	if told {
		p.wake()
	}
}

// count takes how far a phase of a prune or a check is.
func (p *progress) count(phase string, done, total int64) {
	p.mu.Lock()
	told := p.at(phase, done, total)
	p.mu.Unlock()
	if told {
		p.wake()
	}
}

// at tells whether another phase began.
func (p *progress) at(phase string, done, total int64) bool {
	now := p.clock()
	fresh := phase != p.phase
	if fresh {
		p.phase, p.disk, p.rate, p.from, p.fromN = phase, "", 0, now, done
		p.tell(phase)
	}
	p.done, p.total = done, total
	// Over at least two seconds, so that buffers do not make it jump.
	if took := now.Sub(p.from).Seconds(); took >= 2 {
		r := float64(done-p.fromN) / took
		if p.rate > 0 {
			r = 0.7*p.rate + 0.3*r
		}
		p.rate, p.from, p.fromN = r, now, done
	}
	return fresh
}

func (p *progress) tell(text string) {
	if len(p.events) < history.MaxEvents {
		p.events = append(p.events, history.Event{Time: p.clock().Round(0).UTC(), Level: history.LevelInfo, Text: text})
	}
}

func (p *progress) wake() {
	select {
	case p.nudge <- struct{}{}:
	default: // it is awake
	}
}

// drain returns what is to be written down.
func (p *progress) drain() []history.Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	events := p.events
	p.events = nil
	return events
}

// Progress is how far a task is.
type Progress struct {
	Phase string  `json:"phase"`
	Disk  string  `json:"disk,omitempty"`
	Done  int64   `json:"done"`  // bytes; for some phases of a prune and check packs or generations
	Total int64   `json:"total"` // 0 when not known
	Rate  float64 `json:"rate"`  // of Done, a second; 0 when not known
	// ETA is when the phase may end; zero when not known.
	ETA time.Time `json:"eta,omitzero"`
}

func (p *progress) look(now time.Time) Progress {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := Progress{Phase: p.phase, Disk: p.disk, Done: p.done, Total: p.total, Rate: p.rate}
	if p.rate > 0 && p.total > p.done {
		out.ETA = now.Add(time.Duration(float64(p.total-p.done) / p.rate * float64(time.Second))).Truncate(time.Second)
	}
	return out
}
