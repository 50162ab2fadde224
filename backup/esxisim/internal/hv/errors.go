package hv

import (
	"errors"
	"fmt"
)

// What can go wrong. A way in turns these into its own faults.
var (
	ErrNotFound    = errors.New("file not found")
	ErrExists      = errors.New("file already exists")
	ErrGone        = errors.New("no such VM or snapshot")
	ErrRegistered  = errors.New("already registered")
	ErrNoSpace     = errors.New("no space left on the datastore")
	ErrLocked      = errors.New("failed to lock the file")
	ErrPower       = errors.New("the attempted operation cannot be performed in the current state")
	ErrInvalid     = errors.New("a specified parameter was not correct")
	ErrUnsupported = errors.New("the operation is not supported on the object")
	ErrPath        = errors.New("invalid datastore path")
	ErrNotEmpty    = errors.New("directory not empty")
	ErrCancelled   = errors.New("the operation was cancelled")
	ErrBusy        = errors.New("another task is already in progress")
	// ErrTracking means that nothing can be said about changes: tracking is
	// off, or was at the point asked about.
	ErrTracking = errors.New("change tracking is not active")
	// ErrChangeID means a change id that tracking cannot start from.
	ErrChangeID = errors.New("change id is not valid")
)

// Error is a failure of one thing. Kind is one of the values above.
type Error struct {
	Kind error
	Name string // a file, a VM, a parameter
	Text string
}

func (e *Error) Error() string { return e.Text }

func (e *Error) Unwrap() error { return e.Kind }

func fail(kind error, name, format string, args ...any) error {
	return &Error{Kind: kind, Name: name, Text: fmt.Sprintf(format, args...)}
}
