package sched

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"syscall"
	"time"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/repo"
)

// class says what to do about an error.
type class struct {
	kind string // a word for programs
	// passes: it may go away by itself, so it is tried again.
	passes bool
	// host: it is about the host, not the VM, so other VMs of it need not be tried
	// before this one went well.
	host bool
}

// classes sorts errors. The first match counts; what does not pass comes first,
// for a run that failed for such a reason may have failed to clean up for
// another. Errors that are not here may pass.
var classes = []struct {
	is error
	class
}{
	{esxi.ErrLogin, class{kind: "login", host: true}},
	{esxi.ErrThumbprint, class{kind: "thumbprint", host: true}},
	{esxi.ErrRestricted, class{kind: "restricted", host: true}},
	{esxi.ErrDenied, class{kind: "denied"}},
	{backup.ErrNoRoom, class{kind: "no-room"}},
	{esxi.ErrNoSpace, class{kind: "no-room"}},
	{syscall.ENOSPC, class{kind: "no-room"}},
	{syscall.EDQUOT, class{kind: "no-room"}},
	{backup.ErrUnsupported, class{kind: "unsupported"}},
	{esxi.ErrUnsupported, class{kind: "unsupported"}},
	{backup.ErrRefused, class{kind: "refused"}},
	{esxi.ErrNotFound, class{kind: "not-found"}},
	{repo.ErrWrongPassphrase, class{kind: "passphrase"}},
	{repo.ErrSecret, class{kind: "passphrase"}},
	{repo.ErrVersion, class{kind: "version"}},
	{repo.ErrReadOnly, class{kind: "read-only"}},
	{repo.ErrDamaged, class{kind: "damaged"}},
	{ErrProblems, class{kind: "damaged"}},
	{errPanic, class{kind: "bug"}},
	{errTimeout, class{kind: "timeout"}},
	{fs.ErrPermission, class{kind: "permission"}},

	{backup.ErrRunning, class{kind: "running", passes: true}},
	{repo.ErrLocked, class{kind: "locked", passes: true}},
	{repo.ErrInUse, class{kind: "locked", passes: true}},
	{repo.ErrKeysChanged, class{kind: "keys-changed", passes: true}},
	// As a rule a share that is not mounted, or not yet.
	{repo.ErrNotRepository, class{kind: "no-repository", passes: true}},
	{esxi.ErrLocked, class{kind: "locked", passes: true}},
	{esxi.ErrBusy, class{kind: "busy", passes: true, host: true}},
	{esxi.ErrUnreachable, class{kind: "unreachable", passes: true, host: true}},
	{backup.ErrSnapshotLeft, class{kind: "snapshot-left", passes: true}},
	{syscall.EIO, class{kind: "storage", passes: true}},
	{syscall.ESTALE, class{kind: "storage", passes: true}},
	{syscall.EHOSTDOWN, class{kind: "network", passes: true}},
	{syscall.ETIMEDOUT, class{kind: "network", passes: true}},
	{syscall.ECONNRESET, class{kind: "network", passes: true}},
	{net.ErrClosed, class{kind: "network", passes: true}},
	{io.ErrUnexpectedEOF, class{kind: "network", passes: true}},
	{context.DeadlineExceeded, class{kind: "network", passes: true}},
}

func classify(err error) class {
	for _, c := range classes {
		if errors.Is(err, c.is) {
			return c.class
		}
	}
	return class{kind: "other", passes: true}
}

// Pauses before something is tried again.
const (
	firstPause   = time.Minute
	longestPause = 30 * time.Minute
)

// pause is how long to wait after the n-th failure in a row: 1, 4, 16, 30
// minutes.
func pause(n int) time.Duration {
	d := firstPause
	for range n - 1 {
		if d *= 4; d >= longestPause {
			return longestPause
		}
	}
	return d
}
