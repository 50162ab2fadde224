package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
	"hikae/repo"
	"hikae/sched/control"
)

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("any"), 1},
		{app.Usagef("no such flag"), 2},
		{fmt.Errorf("%w: line 3", config.ErrConfig), 2},
		{repo.ErrWrongPassphrase, 3},
		{app.ErrNoPassphrase, 3},
		{repo.ErrNotFound, 4},
		{repo.ErrNotRepository, 4},
		{app.ErrNoHost, 4},
		{esxi.ErrNotFound, 4},
		{&fs.PathError{Op: "open", Path: "x", Err: fs.ErrNotExist}, 4},
		{&repo.DamageError{What: "a block", Err: fs.ErrNotExist}, 5}, // a missing pack is damage, not a wrong path
		{errProblems, 5},
		{&verifyError{failed: 1, damaged: 1, unsound: 1}, 5},
		{esxi.ErrUnreachable, 6},
		{esxi.ErrLogin, 6},
		{esxi.ErrThumbprint, 6},
		{esxi.ErrRestricted, 6},
		{esxi.ErrHostKey, 6},
		{esxi.ErrRunning, 6},
		{backup.ErrNoRoom, 7},
		{esxi.ErrNoSpace, 7},
		{&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, 7},
		{fmt.Errorf("%w: 1 of 2", errSomeFailed), 8},
		{&verifyError{failed: 1}, 8},
		{&verifyError{failed: 1, unsound: 1}, 9},
		{control.ErrNoDaemon, 10},
		{&control.Error{Code: "not-found", Text: "x"}, 11},
		{interrupted{context.Canceled}, 130},
		{errors.Join(errInterrupted, esxi.ErrUnreachable), 130},
		{&childError{handoffAnswer{Error: "x", ExitCode: 3}}, 3},
	} {
		if c.err != nil {
			c.err = fmt.Errorf("wrapped: %w", c.err)
		}
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v ends with %d, want %d", c.err, got, c.want)
		}
	}
}
