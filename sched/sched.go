package sched

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// Sentinel errors, for errors.Is.
var (
	// ErrStopped says that the Scheduler does not serve, or not any more.
	ErrStopped = errors.New("the scheduler is not running")
	// ErrNoJob says that no job has that name.
	ErrNoJob = errors.New("no such job")
	// ErrActive says that a run of the job is queued or under way.
	ErrActive = errors.New("already under way")
	// ErrNoRun says that no such run, or task of it, is queued or under way.
	ErrNoRun = errors.New("no such run under way")
	// ErrNoVM says that a VM was never in a job.
	ErrNoVM = errors.New("no such VM")
)

// Causes of a task's end, for context.Cause.
var (
	errCancelled = errors.New("cancelled")
	errShutdown  = errors.New("hikae was stopped")
	errWindow    = errors.New("the window closed")
	errTimeout   = errors.New("it took longer than its time-out")
	errPanic     = errors.New("a fault in hikae itself")
)

// Defaults of Options.
const (
	DefaultPerHost    = 2
	DefaultTotal      = 4
	DefaultStaleAfter = 36 * time.Hour
)

// Options of New. Work and History are required.
type Options struct {
	Work    Work
	History *history.DB
	// Jobs, and the names of hosts and repositories that they may use.
	Jobs         []Job
	Hosts        []string
	Repositories []string
	// PerHost is how many VMs of one host are backed up at a time, Total how many
	// of all hosts; 0 is the default.
	PerHost, Total int
	// StaleAfter is for how long a VM may be without a good generation, unless its
	// job says otherwise; 0 is DefaultStaleAfter, a negative number is for ever.
	StaleAfter time.Duration
	// Clock tells the wall clock's time; nil is time.Now. It may be set back and
	// forth; timers do not follow it.
	Clock  func() time.Time
	Logger *slog.Logger // nil is silence
	// LookEvery is how often the clock is looked at, at least; 0 is a minute.
	LookEvery time.Duration
}

// Scheduler runs jobs. Its methods may be called by many goroutines; all but
// New wait for Serve to begin.
type Scheduler struct {
	o    Options
	db   *history.DB
	work Work
	log  *slog.Logger
	feed feed

	calls   chan call
	results chan func()   // what became of work, to be taken in by Serve
	nudge   chan struct{} // progress has something to write down
	done    chan struct{} // closed when Serve returns

	// All below belongs to the goroutine of Serve.

	last     time.Time // when the clock was looked at last
	stopping bool
	ctx      context.Context // of tasks; it outlives that of Serve
	stop     context.CancelCauseFunc

	jobs      []*job
	byName    map[string]*job
	runs      []*run // queued or under way, oldest first
	nextID    uint64
	hosts     map[string]*hostState
	places    int                // taken by VMs
	busy      map[repo.VMID]*run // VMs that are being backed up
	upkeep    map[string]*run    // repositories that are being pruned or checked
	working   int                // goroutines that will send a result
	vms       map[repo.VMID]*vmState
	survey    surveyState
	nextStale time.Time // when a VM may become stale; zero: not before something changes
	dirty     dirty
	starting  []*task
	events    []Event
	storeErr  error             // why the history could not be written
	notes     map[string]string // warnings about what is not a VM or job, by what they are about
}

// job is a job of the configuration and where it stands.
type job struct {
	*plan
	state  history.Job
	timers []*timer
	run    *run // queued or under way
}

// hostState is what runs have in common on one host.
type hostState struct {
	taken    int  // places
	cleaning bool // snapshots of dead runs are being removed
	// notBefore is when the host is tried again after it failed, for the fails-th
	// time in a row, last at failed.
	notBefore, failed time.Time
	fails             int
	why               error
}

func (s *Scheduler) host(name string) *hostState {
	h := s.hosts[name]
	if h == nil {
		h = &hostState{}
		s.hosts[name] = h
	}
	return h
}

// New makes a Scheduler and reads from the history where everything stands.
// What is wrong with the jobs is as Validate says it.
func New(o Options) (*Scheduler, error) {
	if o.Work == nil || o.History == nil {
		return nil, errors.New("a scheduler needs work and a history")
	}
	if o.Clock == nil {
		o.Clock = time.Now //nolint:forbidigo // the one place where the real clock comes in
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.PerHost <= 0 {
		o.PerHost = DefaultPerHost
	}
	if o.Total <= 0 {
		o.Total = DefaultTotal
	}
	if o.StaleAfter == 0 {
		o.StaleAfter = DefaultStaleAfter
	}
	if o.LookEvery <= 0 {
		o.LookEvery = time.Minute
	}
	plans, err := compile(o.Jobs, o.Hosts, o.Repositories)
	if err != nil {
		return nil, err
	}
	s := &Scheduler{
		o: o, db: o.History, work: o.Work, log: o.Logger,
		calls: make(chan call), results: make(chan func()), nudge: make(chan struct{}, 1), done: make(chan struct{}),
		hosts: map[string]*hostState{}, busy: map[repo.VMID]*run{}, upkeep: map[string]*run{}, vms: map[repo.VMID]*vmState{}, notes: map[string]string{},
	}
	s.feed.log = o.Logger
	if err := s.load(plans); err != nil {
		return nil, err
	}
	return s, nil
}

// now is the wall clock's time. What is compared and kept must not depend on
// how long the process ran.
func (s *Scheduler) now() time.Time { return s.o.Clock().Round(0).UTC() }

// call is something that somebody wants done by the goroutine that decides.
type call struct {
	fn    func()
	ended chan struct{}
}

// do has fn done by the goroutine that decides, and returns when what it
// changed is in the history.
func (s *Scheduler) do(fn func()) error {
	c := call{fn, make(chan struct{})}
	select {
	case s.calls <- c:
		<-c.ended
		return nil
	case <-s.done:
		return ErrStopped
	}
}

// Run starts a run of a job and returns its number. With now it heeds no
// window. A job that is queued or under way already is ErrActive, with the
// number of that run.
func (s *Scheduler) Run(name string, now bool) (id uint64, err error) {
	derr := s.do(func() {
		j := s.byName[name]
		switch {
		case s.stopping:
			err = ErrStopped
		case j == nil:
			err = fmt.Errorf("no job is called %s: %w", name, ErrNoJob)
		case j.run != nil:
			id = j.run.rec.ID
			err = fmt.Errorf("job %s is %s (run %d): %w", name, j.run.rec.State, id, ErrActive)
		default:
			r := s.newRun(j, history.Run{Trigger: history.ByHand, Due: s.now()})
			r.anyTime = now
			id = r.rec.ID
		}
	})
	return id, errors.Join(err, derr)
}

// Cancel ends a run, or with a VM only that task of it: what waits is given up,
// what is under way is stopped and removes its snapshot. It returns at once;
// an event tells when the run has ended. What is not under way is ErrNoRun.
func (s *Scheduler) Cancel(id uint64, vm *repo.VMID) (err error) {
	derr := s.do(func() { err = s.cancel(id, vm) })
	return errors.Join(err, derr)
}

// Reload takes other jobs. Runs that are under way go on as they began; those of
// jobs that are gone, and have not begun, are cancelled. When something is wrong
// with the jobs nothing changes and the error is as Validate says it.
func (s *Scheduler) Reload(jobs []Job, hosts, repositories []string) error {
	plans, err := compile(jobs, hosts, repositories)
	if err != nil {
		return err
	}
	derr := s.do(func() {
		s.o.Hosts, s.o.Repositories = hosts, repositories
		s.adopt(plans)
		for _, h := range s.hosts {
			h.notBefore, h.why = time.Time{}, nil // its settings may be others
		}
		s.beginSurvey()
	})
	return derr
}

// Dismiss ends the warnings about a VM that is meant to have no new generations,
// until it is backed up again.
func (s *Scheduler) Dismiss(vm repo.VMID) (err error) {
	derr := s.do(func() {
		v := s.vms[vm]
		if v == nil {
			err = fmt.Errorf("%v was never in a job: %w", vm, ErrNoVM)
			return
		}
		v.rec.Dismissed, v.rec.Stale, v.rec.Unprotected = true, time.Time{}, time.Time{}
		s.dirty.vm(v)
		s.nextStale = s.now()
	})
	return errors.Join(err, derr)
}
