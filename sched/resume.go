package sched

import (
	"context"
	"fmt"
	"slices"
	"time"

	"hikae/backup"
	"hikae/repo"
	"hikae/sched/calendar"
	"hikae/sched/history"
)

// maxResumed is how often in a row an interrupted run is resumed. What is
// interrupted more often may be what brings the machine down.
const maxResumed = 3

// cleanLimit is how long removing the snapshots of dead runs may hold a host up.
const cleanLimit = 30 * time.Minute

// load reads where everything stands.
func (s *Scheduler) load(plans []*plan) error {
	last, err := s.db.LastID()
	if err != nil {
		return err
	}
	s.nextID = last + 1
	states, err := s.db.Jobs()
	if err != nil {
		return err
	}
	vms, err := s.db.VMs()
	if err != nil {
		return err
	}
	for _, v := range vms {
		id := repo.VMID{Host: v.Host, Name: v.VM}
		s.vms[id] = &vmState{id: id, rec: v}
	}
	for name, state := range states {
		s.jobs = append(s.jobs, &job{plan: &plan{Job: Job{Name: name}}, state: state})
	}
	s.adopt(plans)
	if aside := s.db.Replaced(); aside != "" {
		s.notes["history"] = fmt.Sprintf("the history was damaged and is now %s; what ran before is not known any more", aside)
		s.log.Error("the history was damaged; a new one begins", "old", aside)
	}
	return nil
}

// adopt takes jobs of a configuration in place of those there are.
func (s *Scheduler) adopt(plans []*plan) {
	now := s.now()
	old := s.jobs
	s.jobs, s.byName = nil, map[string]*job{}
	for _, p := range plans {
		j := &job{plan: p, state: history.Job{Name: p.Name}}
		for _, o := range old {
			if o.Name == p.Name {
				j.state = o.state
			}
		}
		for _, r := range s.runs {
			if r.rec.Job == p.Name {
				j.run = r
			}
		}
		cursors := map[string]history.Cursor{}
		for _, c := range p.schedules {
			key := c.String() + " | " + p.loc.String()
			if _, twice := cursors[key]; c.Kind != calendar.Timed || twice {
				continue
			}
			t := newTimer(c, key, j.state.Cursors[key], now)
			j.timers = append(j.timers, t)
			cursors[key] = t.cursor
		}
		j.state.Cursors = cursors
		s.jobs = append(s.jobs, j)
		s.byName[p.Name] = j
		s.dirty.job(j)
		delete(s.dirty.gone, p.Name)
	}
	for _, o := range old {
		if s.byName[o.Name] != nil {
			continue
		}
		mark(&s.dirty.gone, o.Name)
		delete(s.dirty.jobs, o)
		if o.run != nil && o.run.rec.Started.IsZero() {
			o.run.event(now, history.LevelWarning, "its job is not in the configuration any more")
			s.end(o.run, errCancelled)
		}
	}
	for j := range s.dirty.jobs {
		if s.byName[j.Name] != j {
			delete(s.dirty.jobs, j)
		}
	}
	s.assign()
}

// resume sees to the runs that were interrupted: it says what happened to them
// and goes on with them, unless their job is due as a whole.
func (s *Scheduler) resume() {
	open, err := s.db.Open()
	if err != nil {
		s.log.Error("what was interrupted is not known", "error", err)
		s.notes["resume"] = "what was interrupted is not known: " + oneLine(err)
		return
	}
	again := map[string]history.Run{}
	var order []string
	for _, rec := range open {
		s.closeInterrupted(&rec)
		mark(&s.dirty.seenTo, rec.ID)
		if rec.Resumed >= maxResumed {
			s.log.Error("a run was interrupted too often and is not resumed before its job is due", "job", rec.Job, "run", rec.ID)
			s.notes["resume "+rec.Job] = fmt.Sprintf("job %s was interrupted %d times in a row; it runs again when it is due", rec.Job, rec.Resumed+1)
			continue
		}
		if _, twice := again[rec.Job]; !twice {
			order = append(order, rec.Job)
		}
		again[rec.Job] = rec
	}
	// A whole run leaves nothing to resume.
	s.look(s.now())
	for _, name := range order {
		rec := again[name]
		j := s.byName[name]
		if j == nil || j.run != nil || string(j.kind) != rec.Kind || j.repository != rec.Repository {
			continue
		}
		s.newRun(j, history.Run{
			Trigger: history.ByResume, Resumes: rec.ID, Resumed: rec.Resumed + 1, Due: rec.Due, AfterRun: rec.AfterRun,
		}, s.doneBefore(rec)...)
	}
}

// closeInterrupted ends the record of a run that a kill or a power cut ended.
func (s *Scheduler) closeInterrupted(rec *history.Run) {
	if history.Ended(rec.State) {
		return // hikae was stopped in an orderly way, and all is written down
	}
	now := s.now()
	const why = "hikae was killed, or the machine went down"
	tasks, err := s.db.Tasks(rec.ID)
	if err != nil {
		s.log.Error("the tasks of an interrupted run cannot be read", "run", rec.ID, "error", err)
	}
	for _, t := range tasks {
		if history.Ended(t.State) {
			continue
		}
		t.Error = why
		if t.State == history.Queued {
			t.Error += " before it had begun"
		}
		t.State, t.Ended = history.Interrupted, now
		s.dirty.otherTasks = append(s.dirty.otherTasks, t)
	}
	rec.State, rec.Ended, rec.Error = history.Interrupted, now, why
	rec.Events, rec.EventsDropped = history.AddEvent(rec.Events, rec.EventsDropped, history.Event{
		Time: now, Level: history.LevelError, Text: why + "; found at the next start",
	})
	s.dirty.others = append(s.dirty.others, *rec)
	s.emit(Event{Type: EventInterrupted, Job: rec.Job, Run: rec, Text: fmt.Sprintf("run %d of job %s was interrupted: %s", rec.ID, rec.Job, why)})
	s.log.Error("a run was interrupted", "job", rec.Job, "run", rec.ID, "why", why)
}

// doneBefore are the VMs that a run, and those that it resumed, had backed up.
func (s *Scheduler) doneBefore(rec history.Run) []repo.VMID {
	var vms []repo.VMID
	for range maxResumed + 1 {
		tasks, err := s.db.Tasks(rec.ID)
		if err != nil {
			s.log.Error("the tasks of an interrupted run cannot be read", "run", rec.ID, "error", err)
		}
		for _, t := range tasks {
			id := repo.VMID{Host: t.Host, Name: t.VM}
			if t.Kind == history.TaskBackup && t.State == history.OK && !slices.Contains(vms, id) {
				vms = append(vms, id)
			}
		}
		if rec.Resumes == 0 {
			break
		}
		if rec, err = s.db.Run(rec.Resumes); err != nil {
			break // it is gone by now
		}
	}
	return vms
}

// beginCleanup removes what dead runs left on the hosts, before those get work.
func (s *Scheduler) beginCleanup() {
	var hosts []string
	for _, j := range s.jobs {
		for _, h := range j.hosts {
			if !slices.Contains(hosts, h) {
				hosts = append(hosts, h)
			}
		}
	}
	for _, name := range hosts {
		h := s.host(name)
		h.cleaning = true
		s.spawn(func() func() {
			ctx, cancel := context.WithTimeout(s.ctx, cleanLimit)
			defer cancel()
			cleaned, err := s.work.Cleanup(ctx, name)
			return func() { s.cleaned(h, name, cleaned, err) }
		})
	}
}

func (s *Scheduler) cleaned(h *hostState, name string, cleaned []backup.Cleaned, err error) {
	h.cleaning = false
	for _, c := range cleaned {
		vm := repo.VMID{Host: name, Name: c.VM}
		s.emit(Event{Type: EventCleaned, VM: &vm, Text: fmt.Sprintf("%v: removed the snapshot %s that a dead run had left", vm, c.Snapshot)})
	}
	if err != nil && !s.stopping {
		// The next backup on this host tries again, and says what it comes to.
		s.log.Warn("looking for snapshots that dead runs left behind failed", "host", name, "error", err)
	}
}
