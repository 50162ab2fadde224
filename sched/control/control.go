// Package control is how the command hikae talks to the daemon: HTTP with JSON
// over a Unix socket that only its owner can use (mode 0600).
//
// # Interface
//
// Paths begin with /v1; within it fields may be added, none changes its meaning.
// Times are RFC 3339 in UTC, sizes bytes, durations seconds.
//
//	GET  /v1/status                  Status: the daemon, and how things stand
//	GET  /v1/jobs                    {"jobs": [sched.JobStatus, …]}
//	GET  /v1/history?job=&state=     history.RunPage, newest first
//	GET  /v1/history?vm=HOST/VM      history.TaskPage: what was done with a VM
//	       &page=N                   the next page: the "next" of the one before
//	       &limit=N                  entries of a page, 1 to 1000; 100 without
//	GET  /v1/runs/ID                 RunDetail: a run, its tasks, what is under way
//	POST /v1/jobs/NAME/run           {"now": false}: starts a run; {"run": ID}.
//	                                 With now it heeds no window
//	POST /v1/runs/ID/cancel          {"vm": ""}: ends a run, or one VM of it; {}
//
// The body of a POST may be empty. What fails is an Error with a status of 400
// (bad request), 404 (no such job or run), 409 (the job is under way), 413 (the
// request is too long), 503 (the daemon is stopping) or 500.
//
// # The socket
//
// Whoever listens holds an advisory lock on the file SOCKET.lock. A socket that
// is found with its lock free was left by a dead process and is replaced; nobody
// has to guess by whether it answers.
package control

import (
	"errors"
	"fmt"
	"time"

	"hikae/repo"
	"hikae/sched"
	"hikae/sched/history"
)

// Bounds of what is sent and read.
const (
	maxHeader = 16 << 10
	maxBody   = 64 << 10
	maxAnswer = 256 << 20 // a client gives up there
	maxPage   = 1000
)

// Sentinel errors, for errors.Is.
var (
	// ErrInUse says that another daemon listens on the socket.
	ErrInUse = errors.New("another daemon listens there")
	// ErrNoDaemon says that no daemon listens on the socket.
	ErrNoDaemon = errors.New("no daemon is running")
	// ErrNotFound says that the daemon knows no such job or run.
	ErrNotFound = errors.New("not found")
	// ErrActive says that a run of the job is queued or under way.
	ErrActive = errors.New("already under way")
	// ErrStopping says that the daemon is stopping.
	ErrStopping = errors.New("the daemon is stopping")
)

// Scheduler is what a Server asks of a *sched.Scheduler.
type Scheduler interface {
	Status() (sched.Status, error)
	Run(name string, now bool) (uint64, error)
	Cancel(id uint64, vm *repo.VMID) error
}

// Daemon says which daemon answers.
type Daemon struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Config  string    `json:"config"` // the file's path
	// ConfigError is what was wrong with the file when it was last read again; the
	// daemon goes on with what it said before.
	ConfigError string `json:"config_error,omitempty"`
}

// Status is the answer of /v1/status.
type Status struct {
	Daemon Daemon `json:"daemon"`
	sched.Status
}

// Jobs is the answer of /v1/jobs.
type Jobs struct {
	Jobs []sched.JobStatus `json:"jobs"`
}

// RunDetail is the answer of /v1/runs/ID.
type RunDetail struct {
	Run    history.Run        `json:"run"`
	Tasks  []history.Task     `json:"tasks"`
	Active []sched.TaskStatus `json:"active"`
}

// Query says which part of the history is wanted; VM is HOST/VM.
type Query struct {
	Job, VM, State string
	Page           uint64
	Limit          int // 0 is 100
}

// runRequest and cancelRequest are bodies of requests, started is an answer.
type runRequest struct {
	Now bool `json:"now"`
}

type cancelRequest struct {
	VM string `json:"vm"`
}

type started struct {
	Run uint64 `json:"run"`
}

// Error is an answer that says what went wrong.
type Error struct {
	// Code is a word for programs: bad-request, not-found, active, too-long,
	// stopping or internal.
	Code string `json:"code"`
	Text string `json:"error"`         // a sentence
	Run  uint64 `json:"run,omitempty"` // that is under way, when Code is active
}

func (e *Error) Error() string { return e.Text }

// Is makes an answer one of the sentinel errors.
func (e *Error) Is(target error) bool {
	switch e.Code {
	case codeNotFound:
		return target == ErrNotFound
	case codeActive:
		return target == ErrActive
	case codeStopping:
		return target == ErrStopping
	}
	return false
}

const (
	codeBad      = "bad-request"
	codeNotFound = "not-found"
	codeActive   = "active"
	codeTooLong  = "too-long"
	codeStopping = "stopping"
	codeInternal = "internal"
)

// maxSocket is how long the path of a Unix socket may be (sun_path, unix(7)).
const maxSocket = 107

func checkPath(path string) error {
	if len(path) > maxSocket {
		return fmt.Errorf("the path of the socket %s is longer than %d bytes; choose a shorter one with --socket", path, maxSocket)
	}
	return nil
}
