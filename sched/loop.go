package sched

import (
	"context"
	"fmt"
	"slices"
	"time"

	"hikae/sched/history"
)

// Serve runs jobs until ctx ends, and then until all that was under way has
// stopped. It may be called once.
func (s *Scheduler) Serve(ctx context.Context) error {
	s.ctx, s.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	defer s.stop(nil)
	// Subscribers may be calling while they are waited for.
	defer s.feed.close()
	defer close(s.done)
	s.resume()
	s.beginCleanup()
	s.beginSurvey()
	timer := time.NewTimer(0)
	defer timer.Stop()
	ended := ctx.Done()
	for {
		timer.Reset(s.step())
		if s.stopping && len(s.runs) == 0 && s.working == 0 {
			return nil
		}
		select {
		case <-timer.C:
		case c := <-s.calls:
			c.fn()
			s.step()
			close(c.ended)
		case take := <-s.results:
			s.working--
			take()
		case <-s.nudge:
			s.collect()
		case <-ended:
			ended = nil
			s.shutdown()
		}
	}
}

// spawn has work done by a goroutine; what it returns is then carried out by
// the one that decides.
func (s *Scheduler) spawn(work func() func()) {
	s.working++
	go func() { s.results <- work() }()
}

// step decides what is to be done now, writes it down, has it done, and returns
// how long nothing more will be to decide.
func (s *Scheduler) step() time.Duration {
	now := s.now()
	s.look(now)
	wake := s.settle(now)
	wake = earlier(wake, s.dispatch(now))
	wake = earlier(wake, s.watch(now))
	s.flush()
	for _, t := range s.starting {
		s.launch(t)
	}
	s.starting = s.starting[:0]
	for _, e := range s.events {
		s.feed.send(e)
	}
	s.events = s.events[:0]
	for _, j := range s.jobs {
		for _, t := range j.timers {
			wake = earlier(wake, t.next)
		}
	}
	wait := s.o.LookEvery
	if !wake.IsZero() && !s.stopping {
		wait = min(wait, max(wake.Sub(now), 0))
	}
	return wait
}

// earlier is the earlier of two times, of which zero means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// look minds the clock and makes runs of what is due.
func (s *Scheduler) look(now time.Time) {
	jumped := s.last.IsZero() || now.Sub(s.last) > backLimit
	if now.Before(s.last) {
		s.setBack(now)
	}
	s.last = now
	if s.stopping {
		return // it is still due at the next start
	}
	for _, j := range s.jobs {
		moved := false
		for _, t := range j.timers {
			if t.look(now, jumped) {
				moved = true
			}
		}
		if s.fire(j, now) || moved {
			for _, t := range j.timers {
				j.state.Cursors[t.key] = t.cursor
			}
			s.dirty.job(j)
		}
	}
}

// setBack keeps what waits from waiting as long as the clock was set back.
func (s *Scheduler) setBack(now time.Time) {
	limit := now.Add(longestPause)
	for _, h := range s.hosts {
		if h.notBefore.After(limit) {
			h.notBefore = now
		}
		if h.failed.After(now) {
			h.failed = now
		}
	}
	for _, r := range s.runs {
		for _, t := range r.tasks {
			if t.notBefore.After(limit) {
				t.notBefore = now
			}
		}
		if r.served.After(now) {
			r.served = now
		}
	}
	if s.survey.at.After(now) {
		s.survey.at = time.Time{}
	}
	s.nextStale = now
}

// fire makes a run of a job that is due, however many of its occurrences are.
func (s *Scheduler) fire(j *job, now time.Time) bool {
	var due time.Time
	n := 0
	var seen []time.Time
	for _, t := range j.timers {
		if !t.due(now) {
			continue
		}
		at, missed := t.take(now)
		if !slices.Contains(seen, at) {
			n++
			seen = append(seen, at)
		}
		n += missed
		if at.After(due) {
			due = at
		}
	}
	if n == 0 {
		return false
	}
	if j.run != nil {
		s.skip(j, due, n)
		return true
	}
	trigger := history.BySchedule
	if now.Sub(due) > onTime || n > 1 {
		trigger = history.ByCatchUp
	}
	s.newRun(j, history.Run{Trigger: trigger, Due: due, Missed: n - 1})
	return true
}

// skip counts occurrences that came while a run of the job was under way.
func (s *Scheduler) skip(j *job, due time.Time, n int) {
	r := j.run
	r.rec.Skipped += n
	r.rec.SkippedLast = due
	s.dirty.run(r)
	text := fmt.Sprintf("job %s was due again while its run %d was %s: skipped", j.Name, r.rec.ID, r.rec.State)
	s.emit(Event{Type: EventSkipped, Job: j.Name, Run: r.record(), Text: text})
	s.log.Warn(text)
}

// emit keeps an event until what it tells of is in the history.
func (s *Scheduler) emit(e Event) {
	e.Time = s.now()
	s.events = append(s.events, e)
}

// shutdown stops everything.
func (s *Scheduler) shutdown() {
	s.stopping = true
	for _, r := range s.runs {
		s.end(r, errShutdown)
	}
	s.stop(errShutdown)
}
