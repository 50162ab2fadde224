package esxi

import "errors"

// What can go wrong with a host, in kinds that a program can act on. Every
// error of this package that belongs to a kind wraps it.
var (
	ErrUnreachable = errors.New("host cannot be reached")
	ErrLogin       = errors.New("login refused")
	ErrThumbprint  = errors.New("certificate is not the pinned one")
	ErrRestricted  = errors.New("the host's licence forbids changes through its API")
	ErrDenied      = errors.New("the user lacks a permission")
	ErrNotFound    = errors.New("not found")
	ErrExists      = errors.New("exists already")
	ErrNotProvable = errors.New("changed areas cannot be proved")
	ErrBusy        = errors.New("host is busy")
	ErrLocked      = errors.New("file is locked")
	ErrNoSpace     = errors.New("datastore is full")
	ErrUnsupported = errors.New("cannot be backed up")
)
