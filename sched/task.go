package sched

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"hikae/backup"
	"hikae/repo"
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
