package sched

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"hikae/repo"
	"hikae/sched/calendar"
	"hikae/sched/history"
)

// Status is how things stand: one screen's worth. Times are in UTC.
type Status struct {
	Time     time.Time   `json:"time"`
	Warnings []Note      `json:"warnings"` // errors first
	VMs      []VMStatus  `json:"vms"`      // by host and name
	Running  []RunStatus `json:"running"`  // oldest first
	Queue    []Waiting   `json:"queue"`    // in no order in which they begin
	Jobs     []JobStatus `json:"jobs"`     // as configured
	Stopping bool        `json:"stopping,omitempty"`
}

// Note is something that the operator should look at.
type Note struct {
	Level string     `json:"level"` // history.LevelError or LevelWarning
	Job   string     `json:"job,omitempty"`
	VM    *repo.VMID `json:"vm,omitempty"`
	Text  string     `json:"text"`
}

// VMStatus is a VM that is, or was, in a job. One that is in none and was
// dismissed is not shown.
type VMStatus struct {
	Host string        `json:"host"`
	VM   string        `json:"vm"`
	Jobs []string      `json:"jobs"`
	Last *history.Good `json:"last_good"` // nil when there is none
	// Age is that of the last good generation, in seconds; -1 when there is none.
	Age         float64   `json:"age_seconds"`
	Next        time.Time `json:"next_run,omitzero"` // by its jobs' schedules
	LastTry     time.Time `json:"last_try,omitzero"`
	LastError   string    `json:"last_error,omitempty"`
	Stale       bool      `json:"stale"`
	Unprotected bool      `json:"unprotected"`
	Dismissed   bool      `json:"dismissed,omitempty"`
}

// RunStatus is a run that is queued or under way.
type RunStatus struct {
	history.Run
	// Active are its tasks that are under way.
	Active []TaskStatus `json:"active"`
}

// TaskStatus is a task that is under way.
type TaskStatus struct {
	Task     int       `json:"task"`
	Kind     string    `json:"kind"`
	Host     string    `json:"host,omitempty"`
	VM       string    `json:"vm,omitempty"`
	Started  time.Time `json:"started"`
	Attempts int       `json:"attempts"`
	Progress Progress  `json:"progress"`
}

// Waiting is a task that is queued.
type Waiting struct {
	Run   uint64    `json:"run"`
	Job   string    `json:"job"`
	Task  int       `json:"task"`
	Kind  string    `json:"kind"`
	Host  string    `json:"host,omitempty"`
	VM    string    `json:"vm,omitempty"`
	Since time.Time `json:"since"`
	For   string    `json:"waits_for"`      // for people
	Until time.Time `json:"until,omitzero"` // when it waits for a time
	Error string    `json:"error,omitempty"`
}

// JobStatus is a job of the configuration.
type JobStatus struct {
	Job        string   `json:"job"`
	Kind       Kind     `json:"kind"`
	VMs        []string `json:"vms,omitempty"` // its patterns
	Repository string   `json:"repository"`
	Schedules  []string `json:"schedules"`
	TimeZone   string   `json:"timezone"`
	Keep       string   `json:"keep,omitempty"`
	Window     string   `json:"window,omitempty"`
	// Next is when it runs by its schedules, or those of jobs it comes after; zero
	// when none says.
	Next         time.Time `json:"next_run,omitzero"`
	Run          uint64    `json:"run,omitempty"` // that is queued or under way
	State        string    `json:"state,omitempty"`
	LastRun      uint64    `json:"last_run,omitempty"`
	LastState    string    `json:"last_state,omitempty"`
	LastEnded    time.Time `json:"last_ended,omitzero"`
	LastOK       time.Time `json:"last_ok,omitzero"`
	FailingSince time.Time `json:"failing_since,omitzero"`
}

// Status says how things stand.
func (s *Scheduler) Status() (st Status, err error) {
	err = s.do(func() { st = s.status() })
	return st, err
}

func (s *Scheduler) status() Status {
	now := s.now()
	st := Status{
		Time: now, Warnings: []Note{}, VMs: []VMStatus{}, Running: []RunStatus{}, Queue: []Waiting{}, Jobs: []JobStatus{},
		Stopping: s.stopping,
	}
	next := map[*job]time.Time{}
	for _, j := range s.jobs {
		next[j] = s.next(j)
		st.Jobs = append(st.Jobs, jobStatus(j, next[j]))
	}
	for _, v := range s.vms {
		if !v.rec.Dismissed || len(v.jobs) > 0 {
			st.VMs = append(st.VMs, vmStatus(v, now, next))
		}
	}
	slices.SortFunc(st.VMs, func(a, b VMStatus) int { return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.VM, b.VM)) })
	for _, r := range s.runs {
		rs := RunStatus{Run: *r.record(), Active: []TaskStatus{}}
		for _, t := range r.tasks {
			switch t.rec.State {
			case history.Running:
				ts := TaskStatus{Task: t.rec.N, Kind: t.rec.Kind, Host: t.rec.Host, VM: t.rec.VM, Started: t.rec.Started, Attempts: t.rec.Attempts}
				if t.progress != nil {
					ts.Progress = t.progress.look(now)
				}
				rs.Active = append(rs.Active, ts)
			case history.Queued:
				w, until := s.waits(t, now)
				st.Queue = append(st.Queue, Waiting{
					Run: r.rec.ID, Job: r.rec.Job, Task: t.rec.N, Kind: t.rec.Kind, Host: t.rec.Host, VM: t.rec.VM,
					Since: t.rec.Queued, For: s.waitsFor(t, w), Until: until, Error: t.rec.Error,
				})
			}
		}
		st.Running = append(st.Running, rs)
	}
	s.warnings(&st, now)
	return st
}

func vmStatus(v *vmState, now time.Time, next map[*job]time.Time) VMStatus {
	out := VMStatus{
		Host: v.id.Host, VM: v.id.Name, Jobs: []string{}, Age: -1, LastTry: v.rec.LastTry, LastError: v.rec.LastError,
		Stale: !v.rec.Stale.IsZero(), Unprotected: !v.rec.Unprotected.IsZero(), Dismissed: v.rec.Dismissed,
	}
	if good, ok := v.rec.Newest(); ok {
		out.Last, out.Age = &good, max(now.Sub(good.Time).Seconds(), 0)
	}
	for _, j := range v.jobs {
		out.Jobs = append(out.Jobs, j.Name)
		out.Next = earlier(out.Next, next[j])
	}
	return out
}

// next is when a job runs next.
func (s *Scheduler) next(j *job) time.Time {
	// Where clocks were set, or something repeats, its own timers know best.
	var next time.Time
	for _, t := range j.timers {
		next = earlier(next, t.next)
	}
	for _, c := range j.schedules {
		if o := s.byName[c.Job]; c.Kind == calendar.After && o != nil {
			next = earlier(next, s.next(o)) // no circle: compile refuses them
		}
	}
	return next
}

func jobStatus(j *job, next time.Time) JobStatus {
	out := JobStatus{
		Job: j.Name, Kind: j.kind, VMs: j.VMs, Repository: j.repository, Schedules: j.schedule(), TimeZone: j.loc.String(),
		Window: j.Window, Next: next, LastRun: j.state.LastRun, LastState: j.state.LastState,
		LastEnded: j.state.LastEnded, LastOK: j.state.LastOK, FailingSince: j.state.FailingSince,
	}
	if !j.Keep.Empty() {
		out.Keep = j.Keep.String()
	}
	if j.run != nil {
		out.Run, out.State = j.run.rec.ID, j.run.rec.State
	}
	return out
}

// warnings puts on top what should be looked at.
func (s *Scheduler) warnings(st *Status, now time.Time) {
	add := func(level, job string, vm *repo.VMID, text string) {
		st.Warnings = append(st.Warnings, Note{Level: level, Job: job, VM: vm, Text: text})
	}
	if s.storeErr != nil {
		add(history.LevelError, "", nil, oneLine(s.storeErr))
	}
	for _, text := range s.notes {
		add(history.LevelError, "", nil, text)
	}
	for name, h := range s.hosts {
		if h.why != nil {
			add(history.LevelError, "", nil, fmt.Sprintf("host %s: %s", name, oneLine(h.why)))
		}
	}
	for _, j := range s.jobs {
		switch state := &j.state; {
		case !state.FailingSince.IsZero():
			add(history.LevelError, j.Name, nil, fmt.Sprintf("job %s fails since %s; hikae log %d tells why", j.Name, age(now.Sub(state.FailingSince)), state.LastRun))
		case state.LastState == history.Warning:
			add(history.LevelWarning, j.Name, nil, fmt.Sprintf("the last run of job %s has warnings; hikae log %d shows them", j.Name, state.LastRun))
		}
		if j.run != nil && j.run.rec.Skipped > 0 {
			add(history.LevelWarning, j.Name, nil, fmt.Sprintf("job %s was due %s more while its run %d was under way", j.Name, plural(j.run.rec.Skipped, "time"), j.run.rec.ID))
		}
	}
	for _, v := range s.vms {
		vm := v.id
		if !v.rec.Stale.IsZero() {
			add(history.LevelError, "", &vm, s.staleText(v, now))
		}
		if !v.rec.Unprotected.IsZero() {
			add(history.LevelWarning, "", &vm, unprotectedText(v))
		}
	}
	slices.SortStableFunc(st.Warnings, func(a, b Note) int {
		return cmp.Or(strings.Compare(a.Level, b.Level), strings.Compare(a.Text, b.Text)) // "error" before "warning"
	})
}
