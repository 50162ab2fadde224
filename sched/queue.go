package sched

import (
	"fmt"
	"slices"
	"time"

	"hikae/sched/history"
)

// dispatch begins what may begin, and returns when something that waits for a
// time may.
func (s *Scheduler) dispatch(now time.Time) (wake time.Time) {
	if s.stopping {
		return time.Time{}
	}
	for _, r := range s.runs {
		if r.ending != nil {
			continue
		}
		for _, t := range r.tasks {
			if t.rec.State != history.Queued {
				continue
			}
			w, until := s.waits(t, now)
			if until.After(now) {
				wake = earlier(wake, until)
			}
			if w == ready && t.rec.Kind != history.TaskBackup {
				s.begin(t, now)
			}
		}
	}
	if s.places == s.o.Total {
		return wake
	}
	load := s.queuedLoad()
	for s.places < s.o.Total {
		t := s.pick(load, now)
		if t == nil {
			break
		}
		load[t.rec.Host] -= t.estimate
		s.begin(t, now)
	}
	return wake
}

// queuedLoad is how much work waits for each host, in seconds.
func (s *Scheduler) queuedLoad() map[string]float64 {
	load := map[string]float64{}
	for _, r := range s.runs {
		for _, t := range r.tasks {
			if t.rec.Kind == history.TaskBackup && t.rec.State == history.Queued {
				load[t.rec.Host] += t.estimate
			}
		}
	}
	return load
}

// pick chooses the VM that gets the next place; nil when none can. The run with
// the fewest places comes first, then the one that has waited the longest.
func (s *Scheduler) pick(load map[string]float64, now time.Time) *task {
	var runs []*run
	for _, r := range s.runs {
		if r.ending == nil && r.live > 0 {
			runs = append(runs, r)
		}
	}
	slices.SortStableFunc(runs, func(a, b *run) int {
		if a.places != b.places {
			return a.places - b.places
		}
		return a.served.Compare(b.served)
	})
	for _, r := range runs {
		var best *task
		for _, t := range r.tasks {
			if t.rec.Kind != history.TaskBackup || t.rec.State != history.Queued {
				continue
			}
			if w, _ := s.waits(t, now); w == ready && (best == nil || before(t, best, load)) {
				best = t
			}
		}
		if best != nil {
			return best
		}
	}
	return nil
}

// before tells whether a goes before b, both of one run: what the run before
// left over; then the host with the most work, and of its VMs the one that takes
// longest, so that none is still at work when all others have ended.
func before(a, b *task, load map[string]float64) bool {
	switch la, lb := load[a.rec.Host], load[b.rec.Host]; {
	case a.late != b.late:
		return a.late
	case la != lb:
		return la > lb
	}
	return a.estimate > b.estimate
}

// waiting says why a task does not begin.
type waiting int

const (
	ready        waiting = iota
	forWindow            // to open
	forRetry             // it failed
	forUpkeep            // another prune or check of the repository
	forCleanup           // of the host, after a start
	forHost              // it failed
	forVM                // another run has it
	forHostPlace         // as many of the host are under way as may be
	forPlace             // as many of all
)

// waits tells what a queued task waits for, and until when, if that is a time.
func (s *Scheduler) waits(t *task, now time.Time) (waiting, time.Time) {
	r, kind := t.run, t.rec.Kind
	switch {
	case kind == history.TaskRetain:
		return ready, time.Time{}
	case !r.open:
		return forWindow, r.change
	case t.notBefore.After(now):
		return forRetry, t.notBefore
	case kind == history.TaskPrune || kind == history.TaskCheck:
		if s.upkeep[t.rec.Repository] != nil {
			return forUpkeep, time.Time{}
		}
		return ready, time.Time{}
	}
	h := s.host(t.rec.Host)
	switch {
	case h.cleaning:
		return forCleanup, time.Time{}
	case h.notBefore.After(now):
		return forHost, h.notBefore
	case kind == history.TaskList:
		return ready, time.Time{}
	case s.busy[t.vm] != nil:
		return forVM, time.Time{}
	case h.taken >= s.o.PerHost:
		return forHostPlace, time.Time{}
	case s.places >= s.o.Total:
		return forPlace, time.Time{}
	}
	return ready, time.Time{}
}

// waitsFor says it for people.
func (s *Scheduler) waitsFor(t *task, w waiting) string {
	switch w {
	case forWindow:
		return "the window " + t.run.plan.window.text
	case forRetry:
		return "another try"
	case forUpkeep:
		o := s.upkeep[t.rec.Repository]
		return fmt.Sprintf("run %d (%s of %s)", o.rec.ID, o.rec.Kind, t.rec.Repository)
	case forCleanup:
		return "snapshots of dead runs to be removed from " + t.rec.Host
	case forHost:
		return "host " + t.rec.Host + ", which failed"
	case forVM:
		return fmt.Sprintf("run %d, which has this VM", s.busy[t.vm].rec.ID)
	case forHostPlace:
		return fmt.Sprintf("a place on %s (%d at a time)", t.rec.Host, s.o.PerHost)
	case forPlace:
		return fmt.Sprintf("a place (%d at a time)", s.o.Total)
	}
	return ""
}
