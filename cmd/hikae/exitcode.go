package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
	"hikae/sched/control"
)

// The exit codes. They are a promise to scripts: a code never changes its
// meaning, new ones may be added.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitPassphrase  = 3
	exitNotFound    = 4
	exitDamaged     = 5
	exitHost        = 6
	exitNoRoom      = 7
	exitSomeFailed  = 8
	exitUnsound     = 9
	exitNoDaemon    = 10
	exitNoJob       = 11
	exitInterrupted = 130
)

// exitMeanings is what help prints, in order.
var exitMeanings = []struct {
	code int
	what string
}{
	{exitOK, "all went well"},
	{exitFailure, "it failed, for a reason that has no code of its own"},
	{exitUsage, "the command line or the configuration file is wrong"},
	{exitPassphrase, "wrong passphrase, or none"},
	{exitNotFound, "no such repository, host, VM or generation"},
	{exitDamaged, "the repository is damaged"},
	{exitHost, "the host cannot be reached or refuses (login, certificate, licence, permission)"},
	{exitNoRoom, "no room left, in the repository or on the datastore"},
	{exitSomeFailed, "of several VMs or hosts, at least one failed; the others were done"},
	{exitUnsound, "a generation's blocks are whole, but what they hold is not (hikae verify)"},
	{exitNoDaemon, "no daemon answers"},
	{exitNoJob, "the daemon knows no such job or run"},
	{exitInterrupted, "interrupted (Ctrl-C, SIGTERM)"},
}

// errSomeFailed ends a verb that did several things and reported each failure
// when it happened.
var errSomeFailed = errors.New("some failed")

// kinds maps errors to exit codes and to what to do next. The first match
// counts: an interrupted run that also failed was interrupted.
var kinds = []struct {
	is   error
	code int
	next string
}{
	{errInterrupted, exitInterrupted, ""},
	{errSomeFailed, exitSomeFailed, ""},
	{app.ErrUsage, exitUsage, ""},
	{config.ErrConfig, exitUsage, ""},
	{app.ErrNoRepository, exitUsage, ""},
	{app.ErrNoPassphrase, exitPassphrase, ""},
	{repo.ErrWrongPassphrase, exitPassphrase, "give the passphrase this repository was made with (--passphrase-file FILE)"},
	{repo.ErrSecret, exitPassphrase, ""},
	{app.ErrNoHost, exitNotFound, "hikae host list, or hikae host add NAME --address ADDRESS --user USER --password-file FILE"},
	{repo.ErrNotRepository, exitNotFound, "hikae init --repo DIR makes a new repository; a share that should be mounted there may not be"},
	{errProblems, exitDamaged, ""},
	{errUnsound, exitUnsound, ""},
	{repo.ErrDamaged, exitDamaged, "hikae check --read-data shows what is hurt"},
	{repo.ErrAmbiguous, exitUsage, ""},
	{repo.ErrNotFound, exitNotFound, "hikae generations lists what there is"},
	{control.ErrNoDaemon, exitNoDaemon, ""},
	{control.ErrNotFound, exitNoJob, "hikae jobs and hikae history list what there is"},
	{syscall.ENOSPC, exitNoRoom, ""},
	{syscall.EDQUOT, exitNoRoom, ""},
	{esxi.ErrNoSpace, exitNoRoom, ""},
	{backup.ErrNoRoom, exitNoRoom, ""},
	{esxi.ErrUnreachable, exitHost, ""},
	{esxi.ErrLogin, exitHost, ""},
	{esxi.ErrThumbprint, exitHost, ""},
	{esxi.ErrHostKey, exitHost, ""},
	{esxi.ErrRestricted, exitHost, ""},
	{esxi.ErrNoShell, exitHost, ""},
	{esxi.ErrSnapshots, exitHost, ""},
	{esxi.ErrRunning, exitHost, ""},
	{esxi.ErrDenied, exitHost, ""},
	{esxi.ErrBusy, exitHost, ""},
	{esxi.ErrNotFound, exitNotFound, ""},
}

// exitCode is the code for an error.
func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	var child *childError
	if errors.As(err, &child) {
		return child.ExitCode
	}
	for _, k := range kinds {
		if errors.Is(err, k.is) {
			return k.code
		}
	}
	var pathError *fs.PathError
	if errors.As(err, &pathError) && errors.Is(err, fs.ErrNotExist) {
		return exitNotFound
	}
	return exitFailure
}

// nextStep is what to type after an error; empty when its text says it.
func nextStep(err error) string {
	var child *childError
	if errors.As(err, &child) {
		return child.Next
	}
	for _, k := range kinds {
		if errors.Is(err, k.is) {
			return k.next
		}
	}
	return ""
}

// report tells what went wrong and returns the exit code.
func report(ctx context.Context, out *ui.Printer, cmd *cobra.Command, err error) int {
	if err == nil {
		return exitOK
	}
	if errors.Is(err, context.Canceled) && errors.Is(context.Cause(ctx), errInterrupted) {
		err = interrupted{err}
	}
	switch {
	case errors.Is(err, errSomeFailed):
		// Each failure was reported when it happened.
		out.Errorf("%v", err)
	case errors.Is(err, errInterrupted):
		out.Errorf("interrupted")
	default:
		out.Errorf("%v", err)
		if next := nextStep(err); next != "" {
			out.Errorf("next: %s", next)
		}
		if errors.Is(err, app.ErrUsage) && cmd != nil {
			out.Errorf("next: %s --help", cmd.CommandPath())
		}
	}
	return exitCode(err)
}

// interrupted is the cancelled context of a run that Ctrl-C ended.
type interrupted struct{ error }

func (interrupted) Is(target error) bool { return target == errInterrupted }

// exitCodes is the paragraph of a verb's help about the codes it can end with,
// beside 0, 1 and 2.
func exitCodes(codes ...int) string {
	var b strings.Builder
	b.WriteString("\n\nExit codes:\n")
	for _, m := range exitMeanings {
		mine := m.code <= exitUsage || m.code == exitInterrupted
		for _, c := range codes {
			mine = mine || c == m.code
		}
		if mine {
			fmt.Fprintf(&b, "  %3d  %s\n", m.code, m.what)
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
}
