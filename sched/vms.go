package sched

import (
	"context"
	"fmt"
	"slices"
	"time"

	"hikae/repo"
	"hikae/sched/calendar"
	"hikae/sched/history"
)

// surveyEvery is how often repositories are asked at most what they have, when a
// VM seems to be without a good generation.
const surveyEvery = time.Hour

// surveyLimit is how long their answers are waited for: storage that hangs must
// not keep anybody from being told.
const surveyLimit = 10 * time.Minute

// vmState is what is known of a VM.
type vmState struct {
	id       repo.VMID
	rec      history.VM
	jobs     []*job    // that back it up
	deadline time.Time // when it becomes stale; zero: never
}

// surveyState is about asking repositories for their newest generations: others
// than the daemon make generations as well.
type surveyState struct {
	running int       // repositories that have not answered
	at      time.Time // when they were asked last
}

// know returns what is known of a VM that is in a job.
func (s *Scheduler) know(id repo.VMID, now time.Time) *vmState {
	v := s.vms[id]
	if v == nil {
		v = &vmState{id: id, rec: history.VM{Host: id.Host, VM: id.Name, FirstSeen: now}}
		s.vms[id] = v
		s.assignOne(v)
		s.dirty.vm(v)
		s.nextStale = now
	}
	return v
}

// assign finds the jobs of all VMs anew.
func (s *Scheduler) assign() {
	for _, v := range s.vms {
		s.assignOne(v)
	}
	s.nextStale = s.now()
}

func (s *Scheduler) assignOne(v *vmState) {
	v.jobs = nil
	for _, j := range s.jobs {
		if j.kind == KindBackup && slices.Contains(j.hosts, v.id.Host) && j.match.match(v.id) {
			v.jobs = append(v.jobs, j)
		}
	}
	s.setDeadline(v)
}

// setDeadline computes when a VM becomes stale.
func (s *Scheduler) setDeadline(v *vmState) {
	from := v.rec.FirstSeen
	if good, ok := v.rec.Newest(); ok {
		from = good.Time
	}
	v.deadline = time.Time{}
	for _, j := range v.jobs {
		v.deadline = earlier(v.deadline, s.staleAt(j, from))
	}
}

// staleAt is when a VM that was last backed up at a time is stale for a job.
func (s *Scheduler) staleAt(j *job, from time.Time) time.Time {
	limit := j.StaleAfter
	switch {
	case limit < 0:
		return time.Time{}
	case limit > 0:
		return from.Add(limit)
	}
	if limit = s.o.StaleAfter; limit < 0 {
		return time.Time{}
	}
	next := s.nextRun(j, from)
	if next.IsZero() {
		return time.Time{} // only people start it
	}
	if at := next.Add(limit / 3); at.After(from.Add(limit)) {
		return at
	}
	return from.Add(limit)
}

// nextRun is when a job runs by its schedules, or by those of the jobs that it
// comes after, after a time; zero when none says.
func (s *Scheduler) nextRun(j *job, from time.Time) time.Time {
	var next time.Time
	for _, c := range j.schedules {
		switch c.Kind {
		case calendar.Timed:
			next = earlier(next, c.Next(from))
		case calendar.After:
			if o := s.byName[c.Job]; o != nil {
				next = earlier(next, s.nextRun(o, from))
			}
		}
	}
	return next
}

// backedUp takes in a generation that a task made.
func (s *Scheduler) backedUp(t *task, now time.Time) {
	v := s.know(t.vm, now)
	at, err := time.Parse("2006-01-02T15-04-05Z", t.rec.Generation)
	if err != nil {
		at = t.rec.Started
	}
	v.rec.LastTry, v.rec.LastError, v.rec.Dismissed = now, "", false
	v.rec.Seconds = t.rec.Seconds
	s.good(v, history.Good{Job: t.rec.Job, Repository: t.rec.Repository, Generation: t.rec.Generation, Sequence: t.rec.Sequence, Time: at})
}

// good notes a good generation.
func (s *Scheduler) good(v *vmState, g history.Good) {
	if v.rec.Good == nil {
		v.rec.Good = map[string]history.Good{}
	}
	v.rec.Good[g.Job] = g
	s.setDeadline(v)
	s.dirty.vm(v)
	s.nextStale = s.now()
}

// notBackedUp notes that a task made none.
func (s *Scheduler) notBackedUp(t *task, now time.Time) {
	v := s.know(t.vm, now)
	v.rec.LastTry, v.rec.LastError = now, t.rec.Error
	if t.rec.State == history.Cancelled {
		v.rec.LastError = "cancelled"
	}
	s.dirty.vm(v)
}

// watch tells of VMs that are stale or in no job any more, once, and when that
// ends. It returns when it has to look again.
func (s *Scheduler) watch(now time.Time) time.Time {
	if s.nextStale.After(now) || s.nextStale.IsZero() {
		return s.nextStale
	}
	s.nextStale = time.Time{}
	ask := false
	for _, v := range s.vms {
		if v.rec.Dismissed {
			continue
		}
		_, ever := v.rec.Newest()
		unprotected := len(v.jobs) == 0 && ever
		stale := !v.deadline.IsZero() && !v.deadline.After(now)
		if stale && v.rec.Stale.IsZero() && s.mayAsk(now) {
			ask = true
			continue
		}
		if !stale {
			s.nextStale = earlier(s.nextStale, v.deadline)
		}
		s.tell(v, now, stale, unprotected)
	}
	if ask {
		s.beginSurvey()
		s.nextStale = earlier(s.nextStale, s.survey.at.Add(surveyLimit))
	}
	return s.nextStale
}

// mayAsk tells whether repositories should be asked before a VM is called stale.
func (s *Scheduler) mayAsk(now time.Time) bool {
	switch {
	case s.stopping:
		return false
	case s.survey.running > 0:
		return now.Sub(s.survey.at) < surveyLimit
	}
	return s.survey.at.IsZero() || now.Sub(s.survey.at) >= surveyEvery
}

// tell sends the events of a change, and keeps what was told.
func (s *Scheduler) tell(v *vmState, now time.Time, stale, unprotected bool) {
	rec := &v.rec
	wasStale, wasUnprotected := !rec.Stale.IsZero(), !rec.Unprotected.IsZero()
	if stale == wasStale && unprotected == wasUnprotected {
		return
	}
	s.dirty.vm(v)
	vm := v.id
	if stale && !wasStale {
		rec.Stale = now
		s.emit(Event{Type: EventVMStale, VM: &vm, Text: s.staleText(v, now)})
	}
	if unprotected && !wasUnprotected {
		rec.Unprotected = now
		s.emit(Event{Type: EventVMUnprotected, VM: &vm, Text: unprotectedText(v)})
	}
	if !stale {
		rec.Stale = time.Time{}
	}
	if !unprotected {
		rec.Unprotected = time.Time{}
	}
	if !stale && !unprotected {
		s.emit(Event{Type: EventVMRecovered, VM: &vm, Text: fmt.Sprintf("%v is backed up again", vm)})
	}
}

func (s *Scheduler) staleText(v *vmState, now time.Time) string {
	text := fmt.Sprintf("%v has no good generation since it was first seen %s ago", v.id, age(now.Sub(v.rec.FirstSeen)))
	if good, ok := v.rec.Newest(); ok {
		text = fmt.Sprintf("%v has no good generation for %s: the newest is %s", v.id, age(now.Sub(good.Time)), good.Generation)
	}
	if v.rec.LastError != "" {
		text += "; the last try: " + v.rec.LastError
	}
	return text
}

func unprotectedText(v *vmState) string {
	good, _ := v.rec.Newest()
	return fmt.Sprintf("%v is in no job any more: its newest generation is %s", v.id, good.Generation)
}

// age writes a length of time for people.
func age(d time.Duration) string {
	switch h := int(d.Hours()); {
	case h >= 72:
		return fmt.Sprintf("%d days", h/24)
	case h >= 2:
		return fmt.Sprintf("%d hours", h)
	}
	return fmt.Sprintf("%d minutes", int(d.Minutes()))
}

// beginSurvey asks repositories for their newest generations.
func (s *Scheduler) beginSurvey() {
	if s.survey.running > 0 || s.stopping {
		return
	}
	s.survey.at = s.now()
	var names []string
	for _, j := range s.jobs {
		if j.kind == KindBackup && !slices.Contains(names, j.repository) {
			names = append(names, j.repository)
		}
	}
	for _, name := range names {
		s.survey.running++
		s.spawn(func() func() {
			ctx, cancel := context.WithTimeout(s.ctx, surveyLimit)
			defer cancel()
			refs, err := s.work.Newest(ctx, name)
			return func() { s.surveyed(name, refs, err) }
		})
	}
}

func (s *Scheduler) surveyed(name string, refs []repo.Ref, err error) {
	s.survey.running--
	s.nextStale = s.now()
	key := "repository " + name
	delete(s.notes, key)
	if err != nil && !s.stopping {
		s.notes[key] = fmt.Sprintf("repository %s cannot be read: %s", name, oneLine(err))
		s.log.Error("a repository cannot be read", "repository", name, "error", err)
	}
	for _, ref := range refs {
		v := s.vms[ref.VM]
		if v == nil {
			continue // it never was in a job: nobody waits for it
		}
		if best, ok := v.rec.Newest(); !ok || ref.Time.After(best.Time) {
			s.good(v, history.Good{Repository: name, Generation: ref.Name(), Sequence: ref.Sequence, Time: ref.Time})
		}
	}
}
