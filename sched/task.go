package sched

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"hikae/backup"
	"hikae/repo"
	"hikae/repo/retention"
	"hikae/sched/history"
)

// task is a piece of a run: one VM, or all of a prune.
type task struct {
	run       *run
	rec       history.Task
	vm        repo.VMID // only the host for TaskList
	notBefore time.Time
	estimate  float64 // seconds
	late      bool    // the run before did not back this VM up
	progress  *progress
	cancel    context.CancelCauseFunc
	keep      []RetainOptions // of TaskRetain
}

// record is a copy of the task's record for others.
func (t *task) record() *history.Task {
	rec := t.rec
	rec.Events, rec.Warnings = slices.Clone(rec.Events), slices.Clone(rec.Warnings)
	return &rec
}

func (t *task) event(now time.Time, level, text string) {
	t.rec.Events, t.rec.EventsDropped = history.AddEvent(t.rec.Events, t.rec.EventsDropped, history.Event{Time: now, Level: level, Text: text})
}

// counts tells whether the task is one that a run counts.
func (t *task) counts() bool {
	return t.rec.Kind != history.TaskList && t.rec.Kind != history.TaskRetain
}

// name is what the task is about, for people.
func (t *task) name() string {
	switch {
	case t.rec.VM != "":
		return t.vm.String()
	case t.rec.Host != "":
		return "the VMs of " + t.rec.Host
	}
	return t.rec.Kind + " of " + t.rec.Repository
}

func (s *Scheduler) newTask(r *run, kind string, vm repo.VMID) *task {
	r.lastN++
	t := &task{run: r, vm: vm, rec: history.Task{
		Run: r.rec.ID, N: r.lastN, Job: r.rec.Job, Kind: kind, Repository: r.rec.Repository,
		Host: vm.Host, VM: vm.Name, State: history.Queued, Queued: s.now(),
	}}
	r.tasks = append(r.tasks, t)
	r.live++
	if t.counts() {
		r.rec.Tasks++
		s.dirty.task(t)
		s.dirty.run(r)
	}
	return t
}

// begin takes a task out of the queue; it is launched when that is written down.
func (s *Scheduler) begin(t *task, now time.Time) {
	r := t.run
	t.rec.State, t.rec.Started = history.Running, now
	t.rec.Attempts++
	if r.rec.Started.IsZero() {
		r.rec.Started, r.rec.State = now, history.Running
		s.dirty.run(r)
		s.emit(Event{Type: EventRunStarted, Job: r.rec.Job, Run: r.record(), Text: fmt.Sprintf("run %d of job %s began", r.rec.ID, r.rec.Job)})
	}
	switch t.rec.Kind {
	case history.TaskBackup:
		s.host(t.rec.Host).taken++
		s.places++
		s.busy[t.vm] = r
		r.places++
		r.served = now
	case history.TaskPrune, history.TaskCheck:
		s.upkeep[t.rec.Repository] = r
	}
	if t.counts() {
		s.dirty.task(t)
		s.emit(Event{Type: EventTaskStarted, Job: r.rec.Job, VM: t.vmID(), Task: t.record(), Text: fmt.Sprintf("%s began", t.name())})
	}
	s.starting = append(s.starting, t)
}

func (t *task) vmID() *repo.VMID {
	if t.rec.VM == "" {
		return nil
	}
	vm := t.vm
	return &vm
}

// listLimit is how long a host may take to list its VMs.
const listLimit = 5 * time.Minute

// launch does a task by a goroutine of its own.
func (s *Scheduler) launch(t *task) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	t.cancel = cancel
	t.progress = newProgress(s.o.Clock, s.nudge)
	limit := t.run.plan.Timeout
	if t.rec.Kind == history.TaskList {
		limit = listLimit
	}
	// What the goroutine needs: it must not touch what the other one owns.
	o, plan, rec, keep, began := t.progress, t.run.plan, t.rec, t.keep, s.o.Clock()
	s.spawn(func() func() {
		defer cancel(nil)
		inner := ctx
		if limit > 0 && rec.Kind != history.TaskRetain {
			var stop context.CancelFunc
			inner, stop = context.WithTimeoutCause(ctx, limit, errTimeout)
			defer stop()
		}
		out := s.perform(inner, plan, rec, keep, o)
		if cause := context.Cause(inner); out.err != nil && cause != nil {
			switch {
			case isStop(cause):
				out.stopped = cause
			case errors.Is(cause, errTimeout) && rec.Kind != history.TaskList:
				out.err = fmt.Errorf("%w of %v: %w", errTimeout, limit, out.err)
			}
		}
		out.took = s.o.Clock().Sub(began)
		return func() { s.taskEnded(t, out) }
	})
}

// done is what came of a task.
type done struct {
	err     error
	stopped error // the cause, when it was stopped
	took    time.Duration
	vms     []VM
	result  backup.Result
	report  Report
	forgot  int
	warned  []string
	notes   []string
}

// perform does the work. A panic is an error of this task: others go on.
func (s *Scheduler) perform(ctx context.Context, p *plan, rec history.Task, keep []RetainOptions, o *progress) (out done) {
	defer func() {
		if v := recover(); v != nil {
			s.log.Error("a task panicked", "job", rec.Job, "host", rec.Host, "vm", rec.VM, "panic", v, "stack", string(debug.Stack()))
			out.err = fmt.Errorf("%w: %v", errPanic, v)
		}
	}()
	switch rec.Kind {
	case history.TaskList:
		out.vms, out.err = s.work.VMs(ctx, rec.Host)
	case history.TaskBackup:
		out.result, out.err = s.work.Backup(ctx, BackupOptions{
			Repository: rec.Repository, VM: repo.VMID{Host: rec.Host, Name: rec.VM}, Quiesce: p.Quiesce,
			Compression: p.Compression, RateLimit: p.RateLimit, Progress: o.set,
		})
	case history.TaskPrune:
		out.report, out.err = s.work.Prune(ctx, PruneOptions{Repository: rec.Repository, Budget: p.Prune, Progress: o.count})
	case history.TaskCheck:
		out.report, out.err = s.work.Check(ctx, CheckOptions{Repository: rec.Repository, Budget: p.Check, Progress: o.count})
	case history.TaskRetain:
		for _, k := range keep {
			n, err := s.work.Retain(ctx, k)
			out.forgot += n
			if ctx.Err() != nil && err != nil {
				out.err = err
				return out
			}
			if err != nil {
				out.warned = append(out.warned, fmt.Sprintf("what is to be kept of %v could not be applied: %s", k.VM, oneLine(err)))
			} else if n > 0 {
				out.notes = append(out.notes, fmt.Sprintf("%v: %s forgotten", k.VM, plural(n, "generation")))
			}
		}
	}
	return out
}

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

// retain queues what comes after the backups of a run: forgetting what none of
// the VMs' jobs keeps.
func (s *Scheduler) retain(r *run) {
	if r.retained || r.ending != nil || r.plan.kind != KindBackup {
		return
	}
	r.retained = true
	vms := slices.Clone(r.before)
	for _, t := range r.tasks {
		if t.rec.Kind == history.TaskBackup && t.rec.State == history.OK {
			vms = append(vms, t.vm)
		}
	}
	var keep []RetainOptions
	for _, vm := range vms {
		if policies := s.policies(r.rec.Repository, vm); len(policies) > 0 {
			keep = append(keep, RetainOptions{Repository: r.rec.Repository, VM: vm, Policies: policies, Location: r.plan.loc})
		}
	}
	if len(keep) > 0 {
		s.newTask(r, history.TaskRetain, repo.VMID{}).keep = keep
	}
}

// policies are those of all jobs that back a VM up into a repository; none when
// one of them keeps everything.
func (s *Scheduler) policies(repository string, vm repo.VMID) []retention.Policy {
	var out []retention.Policy
	for _, j := range s.jobs {
		if j.kind != KindBackup || j.repository != repository || !j.match.match(vm) {
			continue
		}
		if j.Keep.Empty() {
			return nil
		}
		if !slices.Contains(out, j.Keep) {
			out = append(out, j.Keep)
		}
	}
	return out
}

// collect takes in what running tasks have to say.
func (s *Scheduler) collect() {
	for _, r := range s.runs {
		for _, t := range r.tasks {
			if t.rec.State != history.Running || t.progress == nil {
				continue
			}
			if events := t.progress.drain(); len(events) > 0 {
				for _, e := range events {
					t.event(e.Time, e.Level, e.Text)
				}
				s.dirty.task(t)
			}
		}
	}
}
