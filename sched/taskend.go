package sched

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// taskEnded takes in what came of a task.
func (s *Scheduler) taskEnded(t *task, out done) {
	now := s.now()
	s.release(t)
	t.rec.Seconds = out.took.Seconds()
	for _, e := range t.progress.drain() {
		t.event(e.Time, e.Level, e.Text)
	}
	t.take(out)
	if t.counts() {
		s.dirty.task(t)
	}
	switch {
	case out.err == nil || out.result.Generation != "":
		s.succeeded(t, out, now)
	case errors.Is(out.stopped, errCancelled):
		t.rec.Error = "cancelled"
		s.endTask(t, history.Cancelled)
	case errors.Is(out.stopped, errWindow):
		t.rec.Error = "it was stopped when the window closed"
		s.endTask(t, history.Skipped)
	case errors.Is(out.stopped, errShutdown):
		t.rec.Error = "hikae was stopped"
		s.endTask(t, history.Interrupted)
	default:
		s.failed(t, out.err, now)
	}
}

// release gives back what begin took.
func (s *Scheduler) release(t *task) {
	switch t.rec.Kind {
	case history.TaskBackup:
		s.host(t.rec.Host).taken--
		s.places--
		t.run.places--
		t.run.served = s.now()
		delete(s.busy, t.vm)
	case history.TaskPrune, history.TaskCheck:
		delete(s.upkeep, t.rec.Repository)
	}
}

// take fills the record.
func (t *task) take(out done) {
	res := out.result
	if res.Generation != "" {
		t.rec.Generation, t.rec.Sequence, t.rec.Mode, t.rec.Reason, t.rec.Consistency = res.Generation, res.Sequence, res.Mode, res.Reason, res.Consistency
	}
	t.rec.Numbers = history.Numbers{
		BytesCapacity: res.BytesCapacity, BytesChanged: res.BytesChanged, BytesRead: res.BytesRead + out.report.BytesRead,
		BytesHealed: res.BytesHealed, BytesAudited: res.BytesAudited, BytesStored: res.BytesStored, BytesFreed: out.report.Freed, Forgotten: out.forgot,
	}
	t.rec.Disks = nil
	for _, d := range res.Disks {
		t.rec.Disks = append(t.rec.Disks, history.Disk{
			Label: d.Label, Name: d.Name, Mode: d.Mode, Reason: d.Reason, BytesCapacity: d.BytesCapacity,
			BytesChanged: d.BytesChanged, BytesRead: d.BytesRead, BytesHealed: d.BytesHealed, BytesAudited: d.BytesAudited, BytesNew: d.BytesNew,
		})
	}
	t.rec.Report = out.report.Details
	t.rec.Warnings = slices.Concat(res.Warnings, out.report.Warnings, out.warned)
}

func (s *Scheduler) succeeded(t *task, out done, now time.Time) {
	r := t.run
	t.rec.Error, t.rec.ErrorKind = "", ""
	if out.err != nil { // after the generation was made
		t.rec.Warnings = append(t.rec.Warnings, oneLine(out.err))
	}
	if t.rec.Host != "" {
		h := s.host(t.rec.Host)
		h.fails, h.notBefore, h.why = 0, time.Time{}, nil
		for _, o := range s.runs {
			delete(o.hosts, t.rec.Host)
		}
	}
	switch t.rec.Kind {
	case history.TaskList:
		s.listed(t, out.vms, now)
	case history.TaskRetain:
		for _, n := range out.notes {
			r.event(now, history.LevelInfo, n)
		}
	case history.TaskBackup:
		s.backedUp(t, now)
	}
	s.endTask(t, history.OK)
}

// listed makes a task for each VM of a host that the job names.
func (s *Scheduler) listed(t *task, vms []VM, now time.Time) {
	r := t.run
	if r.ending != nil {
		return
	}
	there := map[string]bool{}
	vms = slices.Clone(vms)
	slices.SortFunc(vms, func(a, b VM) int { return strings.Compare(a.Name, b.Name) })
	for _, v := range vms {
		id := repo.VMID{Host: t.rec.Host, Name: v.Name}
		if there[v.Name] || !r.plan.match.match(id) {
			continue
		}
		there[v.Name] = true
		if slices.Contains(r.before, id) {
			continue
		}
		state := s.know(id, now)
		n := s.newTask(r, history.TaskBackup, id)
		n.estimate = state.rec.Seconds
		if n.estimate == 0 {
			// No more than an order: a minute, and a gigabit a second.
			n.estimate = 60 + float64(v.BytesCapacity)/(120<<20)
		}
		if j := s.byName[r.rec.Job]; j != nil && !j.state.LastStarted.IsZero() {
			n.late = state.rec.Good[r.rec.Job].Time.Before(j.state.LastStarted)
		}
		if r.closed {
			s.tooLate(n)
		}
	}
	for _, id := range r.plan.match.literals() {
		if id.Host != t.rec.Host || there[id.Name] || slices.Contains(r.before, id) {
			continue
		}
		s.know(id, now)
		n := s.newTask(r, history.TaskBackup, id)
		n.rec.Error = fmt.Sprintf("%v is not on its host; was it renamed or removed? the job's vms name it", id)
		n.rec.ErrorKind = "not-found"
		s.endTask(n, history.Failed)
	}
}

// failed tries a task again, or ends it.
func (s *Scheduler) failed(t *task, err error, now time.Time) {
	r := t.run
	c := classify(err)
	t.rec.Error, t.rec.ErrorKind = oneLine(err), c.kind
	if c.host && t.rec.Host != "" {
		s.hostFailed(t, c, err, now)
	}
	if !history.Ended(t.rec.State) && (!c.passes || t.rec.Attempts > r.plan.retries() || r.ending != nil || r.closed) {
		s.endTask(t, history.Failed)
	}
	if history.Ended(t.rec.State) {
		return
	}
	t.rec.State = history.Queued
	t.notBefore = now.Add(pause(t.rec.Attempts))
	text := fmt.Sprintf("try %d failed and is repeated in %v: %s", t.rec.Attempts, pause(t.rec.Attempts), t.rec.Error)
	t.event(now, history.LevelWarning, text)
	s.emit(Event{Type: EventTaskRetry, Job: r.rec.Job, VM: t.vmID(), Task: t.record(), Text: t.name() + ": " + text})
	s.log.Warn("a task failed and is repeated", "job", r.rec.Job, "run", r.rec.ID, "what", t.name(), "try", t.rec.Attempts, "error", err)
}

// hostFailed makes the host's other VMs wait, or gives them up, in all runs.
func (s *Scheduler) hostFailed(t *task, c class, err error, now time.Time) {
	h := s.host(t.rec.Host)
	counted := c.passes && !t.rec.Started.Before(h.failed)
	if counted {
		h.fails++
		h.failed, h.why = now, err
		h.notBefore = now.Add(pause(h.fails))
	}
	for _, r := range s.runs {
		if !c.passes && r != t.run {
			continue // they find out by themselves; perhaps its settings change before
		}
		if counted {
			r.host(t.rec.Host).fails++
		}
		if c.passes && r.host(t.rec.Host).fails <= r.plan.retries() {
			continue
		}
		for _, o := range r.tasks {
			if o.rec.Host == t.rec.Host && (o.rec.State == history.Queued || o == t) {
				o.rec.Error, o.rec.ErrorKind = t.rec.Error, t.rec.ErrorKind
				s.endTask(o, history.Failed)
			}
		}
	}
}

// endTask ends a task in a state.
func (s *Scheduler) endTask(t *task, state string) {
	now := s.now()
	r := t.run
	t.rec.State, t.rec.Ended = state, now
	r.live--
	counts := t.counts()
	if t.rec.Kind == history.TaskList && state != history.OK && state != history.Cancelled {
		counts = true // a host of which nothing is known is something that failed
		r.rec.Tasks++
	}
	if t.rec.Kind != history.TaskList || counts {
		s.dirty.task(t)
	}
	s.dirty.run(r)
	r.rec.Add(t.rec.Numbers)
	if counts {
		switch state {
		case history.OK:
			r.rec.TasksOK++
		case history.Failed:
			r.rec.TasksFailed++
		case history.Skipped:
			r.rec.TasksSkipped++
		case history.Cancelled:
			r.rec.TasksCancelled++
		}
	}
	if state == history.Failed {
		if r.rec.Error == "" {
			r.rec.Error = fmt.Sprintf("%s: %s", t.name(), t.rec.Error)
		}
		t.event(now, history.LevelError, t.rec.Error)
		s.log.Error("a task failed", "job", r.rec.Job, "run", r.rec.ID, "what", t.name(), "error", t.rec.Error)
	}
	if t.rec.Kind == history.TaskBackup && state != history.OK {
		s.notBackedUp(t, now)
	}
	if counts {
		text := fmt.Sprintf("%s: %s", t.name(), state)
		if t.rec.Error != "" {
			text += ": " + t.rec.Error
		}
		s.emit(Event{Type: EventTaskEnded, Job: r.rec.Job, VM: t.vmID(), Task: t.record(), Text: text})
	}
}
