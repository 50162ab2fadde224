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
			wait := s.waits(t, now)
			if wait.until.After(now) {
				wake = earlier(wake, wait.until)
			}
			if wait.why == "" && t.rec.Kind != history.TaskBackup {
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
			if t.rec.Kind != history.TaskBackup || t.rec.State != history.Queued || s.waits(t, now).why != "" {
				continue
			}
			if best == nil || before(t, best, load) {
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

// waiting says why a task does not begin; until when, if that is a time.
type waiting struct {
	why   string
	until time.Time
}

// waits tells what a queued task waits for; nothing when it may begin.
func (s *Scheduler) waits(t *task, now time.Time) waiting {
	r, kind := t.run, t.rec.Kind
	if kind == history.TaskRetain {
		return waiting{}
	}
	if !r.open {
		return waiting{"the window " + r.plan.window.text, r.change}
	}
	if t.notBefore.After(now) {
		return waiting{"another try", t.notBefore}
	}
	if kind == history.TaskPrune || kind == history.TaskCheck {
		if o := s.upkeep[t.rec.Repository]; o != nil {
			return waiting{why: fmt.Sprintf("run %d (%s of %s)", o.rec.ID, o.rec.Kind, t.rec.Repository)}
		}
		return waiting{}
	}
	h := s.host(t.rec.Host)
	switch {
	case h.cleaning:
		return waiting{why: "snapshots of dead runs to be removed from " + t.rec.Host}
	case h.notBefore.After(now):
		return waiting{"host " + t.rec.Host + ", which failed", h.notBefore}
	case kind == history.TaskList:
		return waiting{}
	case s.busy[t.vm] != nil:
		return waiting{why: fmt.Sprintf("run %d, which has this VM", s.busy[t.vm].rec.ID)}
	case h.taken >= s.o.PerHost:
		return waiting{why: fmt.Sprintf("a place on %s (%d at a time)", t.rec.Host, s.o.PerHost)}
	case s.places >= s.o.Total:
		return waiting{why: fmt.Sprintf("a place (%d at a time)", s.o.Total)}
	}
	return waiting{}
}
