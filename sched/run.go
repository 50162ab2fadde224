package sched

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hikae/repo"
	"hikae/sched/calendar"
	"hikae/sched/history"
)

// run is a run that is queued or under way.
type run struct {
	rec   history.Run
	plan  *plan // as the job was when the run began
	tasks []*task
	lastN int
	// served is when it last got or gave back a place for a VM; before that, since
	// when it waits.
	served   time.Time
	places   int
	live     int       // tasks that have not ended
	anyTime  bool      // heeds no window
	open     bool      // its window is, or it heeds none
	change   time.Time // when that changes
	wasOpen  bool      // its window was seen open
	closed   bool      // and has closed since: nothing of it begins any more
	ending   error     // why nothing of it begins any more
	retained bool      // what is to be kept was looked at, or need not be
	hosts    map[string]*runHost
	before   []repo.VMID // VMs that were done by the runs that it resumes
}

// runHost counts how often in a row a host failed while the run needed it.
type runHost struct {
	fails int
}

func (r *run) host(name string) *runHost {
	h := r.hosts[name]
	if h == nil {
		h = &runHost{}
		r.hosts[name] = h
	}
	return h
}

// record is a copy of the run's record for others.
func (r *run) record() *history.Run {
	rec := r.rec
	rec.Events, rec.Warnings = slices.Clone(rec.Events), slices.Clone(rec.Warnings)
	return &rec
}

func (r *run) event(now time.Time, level, text string) {
	r.rec.Events, r.rec.EventsDropped = history.AddEvent(r.rec.Events, r.rec.EventsDropped, history.Event{Time: now, Level: level, Text: text})
}

func (r *run) warn(now time.Time, text string) {
	if !slices.Contains(r.rec.Warnings, text) && len(r.rec.Warnings) < history.MaxEvents {
		r.rec.Warnings = append(r.rec.Warnings, text)
	}
	r.event(now, history.LevelWarning, text)
}

// newRun queues a run. proto says why; before are VMs that need not be backed up.
func (s *Scheduler) newRun(j *job, proto history.Run, before ...repo.VMID) *run {
	now := s.now()
	rec := proto
	rec.ID, rec.Job, rec.Kind, rec.Repository = s.nextID, j.Name, string(j.kind), j.repository
	rec.State, rec.Queued = history.Queued, now
	s.nextID++
	r := &run{rec: rec, plan: j.plan, served: now, hosts: map[string]*runHost{}, before: before}
	if rec.Trigger == history.ByHand {
		r.served = now.Add(-time.Hour)
	}
	j.run = r
	s.runs = append(s.runs, r)
	switch j.kind {
	case KindPrune:
		s.newTask(r, history.TaskPrune, repo.VMID{})
	case KindCheck:
		s.newTask(r, history.TaskCheck, repo.VMID{})
	default:
		for _, h := range j.hosts {
			s.newTask(r, history.TaskList, repo.VMID{Host: h})
		}
	}
	s.dirty.run(r)
	s.emit(Event{Type: EventRunQueued, Job: j.Name, Run: r.record(), Text: fmt.Sprintf("run %d of job %s is queued (%s)", rec.ID, j.Name, rec.Trigger)})
	s.log.Info("run queued", "job", j.Name, "run", rec.ID, "trigger", rec.Trigger, "due", rec.Due, "missed", rec.Missed)
	if s.stopping {
		s.end(r, errShutdown)
	}
	return r
}

// settle closes windows, ends runs that are done, and returns when a window
// opens or closes next.
func (s *Scheduler) settle(now time.Time) (wake time.Time) {
	for i := 0; i < len(s.runs); { // ending one may queue others
		r := s.runs[i]
		r.open, r.change = true, time.Time{}
		if !r.anyTime {
			r.open, r.change = r.plan.window.open(now)
		}
		if r.live > 0 && r.ending == nil && !r.closed {
			wake = earlier(wake, r.change)
			switch {
			case r.open:
				r.wasOpen = true
			case r.wasOpen:
				s.windowClosed(r, now)
			}
		}
		if r.live == 0 {
			s.retain(r)
		}
		if r.live == 0 {
			s.finish(r, now)
			continue
		}
		i++
	}
	return wake
}

// windowClosed gives up what has not begun, and stops the rest when the job
// says so.
func (s *Scheduler) windowClosed(r *run, now time.Time) {
	left := 0
	for _, t := range r.tasks {
		switch {
		case t.rec.Kind == history.TaskRetain:
		case t.rec.State == history.Queued && t.rec.Error != "":
			s.endTask(t, history.Failed) // it would have been tried again
		case t.rec.State == history.Queued:
			left++
			s.tooLate(t)
		case t.rec.State == history.Running && r.plan.WindowEnd == WindowStop:
			t.cancel(errWindow)
		}
	}
	r.closed = true // what is left to do is not for the next window
	if left > 0 {
		r.warn(now, fmt.Sprintf("the window %s closed before %s had begun; the next run begins with them", r.plan.window.text, plural(left, "task")))
		s.dirty.run(r)
	}
}

// tooLate gives up a task that had not begun when the window closed.
func (s *Scheduler) tooLate(t *task) {
	t.rec.Error = "it had not begun when the window closed"
	s.endTask(t, history.Skipped)
}

// end has a run do nothing more: why is errCancelled or errShutdown.
func (s *Scheduler) end(r *run, why error) {
	if r.ending != nil {
		return
	}
	r.ending = why
	for _, t := range r.tasks {
		s.endEarly(t, why)
	}
}

// endEarly gives up a task that waits and stops one that is under way.
func (s *Scheduler) endEarly(t *task, why error) {
	switch {
	case t.rec.State == history.Running:
		t.cancel(why)
	case t.rec.State != history.Queued:
	case errors.Is(why, errShutdown):
		t.rec.Error = "hikae was stopped before it had begun"
		s.endTask(t, history.Interrupted)
	default:
		s.endTask(t, history.Cancelled)
	}
}

// cancel is Cancel.
func (s *Scheduler) cancel(id uint64, vm *repo.VMID) error {
	for _, r := range s.runs {
		if r.rec.ID != id {
			continue
		}
		if vm == nil {
			r.event(s.now(), history.LevelInfo, "a person cancelled the run")
			s.dirty.run(r)
			s.end(r, errCancelled)
			return nil
		}
		for _, t := range r.tasks {
			if t.vm == *vm && t.rec.Kind == history.TaskBackup && !history.Ended(t.rec.State) {
				t.event(s.now(), history.LevelInfo, "a person cancelled it")
				s.dirty.task(t)
				s.endEarly(t, errCancelled)
				return nil
			}
		}
		return fmt.Errorf("run %d has no task for %v that waits or is under way: %w", id, *vm, ErrNoRun)
	}
	return fmt.Errorf("run %d is neither queued nor under way: %w", id, ErrNoRun)
}

// finish ends a run whose tasks have ended.
func (s *Scheduler) finish(r *run, now time.Time) {
	state := s.verdict(r, now)
	r.rec.State, r.rec.Ended = state, now
	if !r.rec.Started.IsZero() {
		r.rec.Seconds = max(now.Sub(r.rec.Started).Seconds(), 0)
	}
	s.dirty.run(r)
	s.runs = slices.DeleteFunc(s.runs, func(o *run) bool { return o == r })
	text := fmt.Sprintf("run %d of job %s: %s", r.rec.ID, r.rec.Job, outcome(&r.rec))
	s.emit(Event{Type: EventRunEnded, Job: r.rec.Job, Run: r.record(), Text: text})
	s.log.Info("run ended", "job", r.rec.Job, "run", r.rec.ID, "state", state, "error", r.rec.Error)
	if j := s.byName[r.rec.Job]; j != nil && j.run == r {
		j.run = nil
		s.jobEnded(j, r)
	}
	s.link(r)
}

// verdict sums up the tasks.
func (s *Scheduler) verdict(r *run, now time.Time) string {
	interrupted := false
	for _, t := range r.tasks {
		if t.rec.State == history.Interrupted {
			interrupted = true
		}
		if len(t.rec.Warnings) > 0 && t.rec.Kind != history.TaskBackup {
			for _, w := range t.rec.Warnings {
				r.warn(now, w)
			}
		}
	}
	if interrupted && r.rec.Error == "" {
		r.rec.Error = "hikae was stopped; the next start goes on"
	}
	warned := len(r.rec.Warnings) > 0 || slices.ContainsFunc(r.tasks, func(t *task) bool { return len(t.rec.Warnings) > 0 })
	switch {
	case errors.Is(r.ending, errCancelled):
		return history.Cancelled
	case interrupted:
		return history.Interrupted
	case r.rec.TasksFailed > 0:
		return history.Failed
	case r.rec.Tasks == 0 && len(r.before) == 0:
		r.warn(now, "no VM fits the job's vms")
		return history.Warning
	case warned || r.rec.TasksSkipped > 0 || r.rec.TasksCancelled > 0:
		return history.Warning
	}
	return history.OK
}

// jobEnded brings what is known of the job up to date.
func (s *Scheduler) jobEnded(j *job, r *run) {
	st := &j.state
	st.LastRun, st.LastState, st.LastEnded, st.LastStarted = r.rec.ID, r.rec.State, r.rec.Ended, r.rec.Started
	switch r.rec.State {
	case history.Failed:
		if st.FailingSince.IsZero() {
			st.FailingSince = r.rec.Ended
			s.emit(Event{Type: EventJobFailed, Job: j.Name, Run: r.record(), Text: fmt.Sprintf("job %s failed: %s", j.Name, outcome(&r.rec))})
		}
	case history.OK, history.Warning:
		st.LastOK = r.rec.Ended
		delete(s.notes, "resume "+j.Name)
		if !st.FailingSince.IsZero() {
			st.FailingSince = time.Time{}
			s.emit(Event{Type: EventJobRecovered, Job: j.Name, Run: r.record(), Text: fmt.Sprintf("job %s went well again: %s", j.Name, outcome(&r.rec))})
		}
	}
	s.dirty.job(j)
}

// link queues the jobs that come after one that has ended.
func (s *Scheduler) link(r *run) {
	good := r.rec.State == history.OK || r.rec.State == history.Warning
	if r.rec.State == history.Interrupted {
		return
	}
	for _, j := range s.jobs {
		wants := slices.ContainsFunc(j.schedules, func(c *calendar.Schedule) bool {
			return c.Kind == calendar.After && c.Job == r.rec.Job && (good || c.Always)
		})
		switch {
		case !wants:
		case j.run != nil:
			s.skip(j, r.rec.Ended, 1)
		default:
			s.newRun(j, history.Run{Trigger: history.ByAfter, AfterRun: r.rec.ID, Due: r.rec.Ended})
		}
	}
}

// outcome is how a run ended, for people.
func outcome(r *history.Run) string {
	var parts []string
	add := func(n int, what string) {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, what))
		}
	}
	add(r.TasksOK, "done")
	add(r.TasksFailed, "failed")
	add(r.TasksSkipped, "skipped")
	add(r.TasksCancelled, "cancelled")
	text := r.State
	if len(parts) > 0 {
		text += " (" + strings.Join(parts, ", ") + ")"
	}
	if r.Error != "" {
		text += ": " + r.Error
	}
	return text
}

// plural joins a count and a noun.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// oneLine keeps an error's text fit for a record.
func oneLine(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if r := []rune(text); len(r) > 2000 {
		text = string(r[:2000]) + " …"
	}
	return text
}

// isStop tells whether a cause is about the scheduler, not about the work.
func isStop(err error) bool {
	return errors.Is(err, errCancelled) || errors.Is(err, errShutdown) || errors.Is(err, errWindow)
}
