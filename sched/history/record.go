package history

import (
	"encoding/json"
	"time"
)

// States of runs and tasks.
const (
	Queued      = "queued"      // waits: for its turn, its window, a retry
	Running     = "running"     //
	OK          = "ok"          // done
	Warning     = "warning"     // of runs: done, and something should be looked at
	Failed      = "failed"      // of runs: a task failed
	Cancelled   = "cancelled"   // by a person
	Interrupted = "interrupted" // hikae stopped, was killed, or the machine went down
	Skipped     = "skipped"     // of tasks: the window closed before they ended
)

// Ended tells whether a state is one that does not change any more.
func Ended(state string) bool { return state != Queued && state != Running }

// What caused a run.
const (
	BySchedule = "schedule" // it was due
	ByCatchUp  = "catch-up" // it was due while nothing ran: the machine was off, asleep, or its clock jumped
	ByAfter    = "after"    // the job it is linked to ended
	ByHand     = "manual"   // a person
	ByResume   = "resume"   // it goes on with an interrupted run
)

// Event is something that happened during a run.
type Event struct {
	Time time.Time `json:"time"`
	// Level is "info", "warning" or "error".
	Level string `json:"level"`
	Text  string `json:"text"`
}

// Levels of events.
const (
	LevelInfo    = "info"
	LevelWarning = "warning"
	LevelError   = "error"
)

// Numbers are what tasks came to, and runs in sum. Sizes are in bytes.
type Numbers struct {
	BytesCapacity int64 `json:"bytes_capacity"`
	BytesChanged  int64 `json:"bytes_changed"`
	BytesRead     int64 `json:"bytes_read"`
	BytesHealed   int64 `json:"bytes_healed"`
	BytesAudited  int64 `json:"bytes_audited"`
	BytesStored   int64 `json:"bytes_stored"`
	BytesFreed    int64 `json:"bytes_freed"`
	Forgotten     int   `json:"forgotten"` // generations
}

// Add sums up.
func (n *Numbers) Add(m Numbers) {
	n.BytesCapacity += m.BytesCapacity
	n.BytesChanged += m.BytesChanged
	n.BytesRead += m.BytesRead
	n.BytesHealed += m.BytesHealed
	n.BytesAudited += m.BytesAudited
	n.BytesStored += m.BytesStored
	n.BytesFreed += m.BytesFreed
	n.Forgotten += m.Forgotten
}

// Run is one run of a job.
type Run struct {
	ID         uint64 `json:"run"`
	Job        string `json:"job"`
	Kind       string `json:"kind"`
	Repository string `json:"repository"`
	State      string `json:"state"`
	Trigger    string `json:"trigger"`
	AfterRun   uint64 `json:"after_run,omitempty"` // the run that this one is linked to
	Resumes    uint64 `json:"resumes,omitempty"`   // the interrupted run that this one goes on with
	Resumed    int    `json:"resumed,omitempty"`   // how many times in a row it was interrupted
	// Due is when the schedule wanted it; of several that were missed, the last.
	Due    time.Time `json:"due,omitzero"`
	Missed int       `json:"missed,omitempty"` // further occurrences that this run makes up for
	// Skipped counts the occurrences that came while this run was under way.
	Skipped     int       `json:"skipped,omitempty"`
	SkippedLast time.Time `json:"skipped_last,omitzero"`

	Queued  time.Time `json:"queued"`
	Started time.Time `json:"started,omitzero"` // of its first task
	Ended   time.Time `json:"ended,omitzero"`
	Seconds float64   `json:"seconds"` // from Started to Ended

	Tasks          int `json:"tasks"` // VMs, for a backup
	TasksOK        int `json:"tasks_ok"`
	TasksFailed    int `json:"tasks_failed"`
	TasksSkipped   int `json:"tasks_skipped"`
	TasksCancelled int `json:"tasks_cancelled"`

	Numbers
	Error         string   `json:"error,omitempty"` // of the first task that failed
	Warnings      []string `json:"warnings,omitempty"`
	Events        []Event  `json:"events,omitempty"`
	EventsDropped int      `json:"events_dropped,omitempty"`
}

// Kinds of tasks.
const (
	TaskList   = "list" // asks a host for its VMs; kept when it failed
	TaskBackup = "backup"
	TaskRetain = "retain" // applies the job's keep
	TaskPrune  = "prune"
	TaskCheck  = "check"
)

// Task is one piece of a run's work.
type Task struct {
	Run        uint64 `json:"run"`
	N          int    `json:"task"` // within the run, from 1
	Job        string `json:"job"`
	Kind       string `json:"kind"`
	Repository string `json:"repository"`
	Host       string `json:"host,omitempty"`
	VM         string `json:"vm,omitempty"`
	State      string `json:"state"`
	Attempts   int    `json:"attempts"`

	Queued  time.Time `json:"queued"`
	Started time.Time `json:"started,omitzero"` // of the last attempt
	Ended   time.Time `json:"ended,omitzero"`
	Seconds float64   `json:"seconds"` // of the last attempt

	Generation  string `json:"generation,omitempty"`
	Sequence    uint64 `json:"sequence,omitempty"`
	Mode        string `json:"mode,omitempty"`
	Reason      string `json:"reason,omitempty"`
	Consistency string `json:"consistency,omitempty"`
	Numbers
	Disks []Disk `json:"disks,omitempty"`

	Error string `json:"error,omitempty"`
	// ErrorKind is a word for programs: login, unreachable, no-room, … ("other").
	ErrorKind string          `json:"error_kind,omitempty"`
	Warnings  []string        `json:"warnings,omitempty"`
	Report    json.RawMessage `json:"report,omitempty"` // of a prune or check, as the repository gives it

	Events        []Event `json:"events,omitempty"`
	EventsDropped int     `json:"events_dropped,omitempty"`
}

// Disk is what a backup of one disk came to. Sizes are in bytes.
type Disk struct {
	Label         string `json:"label"`
	Name          string `json:"name"`
	Mode          string `json:"mode"`
	Reason        string `json:"reason,omitempty"`
	BytesCapacity int64  `json:"bytes_capacity"`
	BytesChanged  int64  `json:"bytes_changed"`
	BytesRead     int64  `json:"bytes_read"`
	BytesHealed   int64  `json:"bytes_healed"`
	BytesAudited  int64  `json:"bytes_audited"`
	BytesNew      int64  `json:"bytes_new"`
}

// Good is a generation that was made and is whole.
type Good struct {
	Job        string    `json:"job"` // empty when none of the daemon's made it
	Repository string    `json:"repository"`
	Generation string    `json:"generation"`
	Sequence   uint64    `json:"sequence"`
	Time       time.Time `json:"time"`
}

// VM is what is known of a VM that is, or was, in a job.
type VM struct {
	Host      string    `json:"host"`
	VM        string    `json:"vm"`
	FirstSeen time.Time `json:"first_seen"`
	// Good holds the newest good generation of each job.
	Good      map[string]Good `json:"good,omitempty"`
	LastTry   time.Time       `json:"last_try,omitzero"`
	LastError string          `json:"last_error,omitempty"` // of the last try; empty when it went well
	Seconds   float64         `json:"seconds,omitempty"`    // how long the last backup took
	// Stale and Unprotected are since when the operator has been told that there
	// is no good generation, or no job.
	Stale       time.Time `json:"stale,omitzero"`
	Unprotected time.Time `json:"unprotected,omitzero"`
	Dismissed   bool      `json:"dismissed,omitempty"` // an operator said that it need not be watched
}

// Newest is the newest of the good generations; false when there is none.
func (v *VM) Newest() (Good, bool) {
	var best Good
	for _, g := range v.Good {
		if best.Time.IsZero() || g.Time.After(best.Time) {
			best = g
		}
	}
	return best, !best.Time.IsZero()
}

// Cursor says how far one schedule of a job has been carried out.
type Cursor struct {
	// At is the moment up to which all that was due has become runs.
	At time.Time `json:"at"`
	// Last is the last occurrence that became a run.
	Last time.Time `json:"last,omitzero"`
	// Ahead is where At stood when the clock was set back.
	Ahead time.Time `json:"ahead,omitzero"`
}

// Job is what has to be known of a job after a restart.
type Job struct {
	Name string `json:"job"`
	// Cursors are by schedule and time zone.
	Cursors map[string]Cursor `json:"cursors"`
	// FailingSince is when the first of the failures in a row ended.
	FailingSince time.Time `json:"failing_since,omitzero"`
	LastRun      uint64    `json:"last_run,omitempty"` // that ended
	LastState    string    `json:"last_state,omitempty"`
	LastEnded    time.Time `json:"last_ended,omitzero"`
	LastStarted  time.Time `json:"last_started,omitzero"`
	LastOK       time.Time `json:"last_ok,omitzero"` // when the last one that went well ended
}

// MaxEvents is how many events a run or task keeps: the first few and the last.
const MaxEvents = 100

const firstEvents = 20

// AddEvent appends an event. When there are too many, those after the first
// ones go; dropped counts them.
func AddEvent(list []Event, dropped int, e Event) ([]Event, int) {
	if len(list) < MaxEvents {
		return append(list, e), dropped
	}
	copy(list[firstEvents:], list[firstEvents+1:])
	list[len(list)-1] = e
	return list, dropped + 1
}
