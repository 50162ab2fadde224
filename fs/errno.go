package fs

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"syscall"
	"time"
)

var (
	// errGone says that a name or a generation is not there, or not any more.
	errGone = errors.New("gone")
	// errStale says that an inode the kernel still knows means nothing any
	// more. The kernel then looks the path up again.
	errStale = errors.New("stale")
	// errDamaged marks errors of a source whose stored bytes are lost.
	errDamaged = errors.New("damaged")
	// errMissing marks what should be there and is not: a part of a disk. It is
	// no ENOENT, which says that a name is not there.
	errMissing = errors.New("missing")
	// errStuck says that the storage did not answer in time.
	errStuck = errors.New("the repository's storage does not answer")
)

// toErrno turns errors into what a reader gets to see. Everything not known
// here is EIO: a reader must never take a failure for an end of file.
func toErrno(err error) syscall.Errno {
	if errno, ok := err.(syscall.Errno); ok { //nolint:errorlint // bare ones are this package's own answers; a source's are wrapped and mean something about its storage
		return errno
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errMissing):
		return syscall.EIO
	case errors.Is(err, errStale):
		return syscall.ESTALE
	case errors.Is(err, errGone), errors.Is(err, fs.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.Is(err, errDamaged), errors.Is(err, errStuck):
		return syscall.EIO
	case errors.Is(err, fs.ErrPermission):
		return syscall.EACCES
	case errors.Is(err, syscall.ENOMEM):
		return syscall.ENOMEM
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return syscall.ENFILE
	}
	return syscall.EIO
}

// complaints logs failures, each once in a while: a reader that tries again, or
// the kernel reading a damaged area page by page, must not fill the log.
type complaints struct {
	log *slog.Logger
	now func() time.Time

	mu   sync.Mutex
	seen map[string]time.Time
}

const (
	complaintEvery = 10 * time.Minute
	maxComplaints  = 1000
)

// about logs err, unless it is part of normal life or was logged a short while
// ago for the same subject.
func (c *complaints) about(err error, what string, args ...any) {
	switch toErrno(err) {
	case 0, syscall.ENOENT, syscall.ESTALE, syscall.EINTR, syscall.ENXIO, syscall.EISDIR, syscall.ENOTDIR:
		return
	}
	if errors.Is(err, errStuck) { // concerns everybody alike
		what, args, err = "requests were given up", nil, errStuck
	}
	key := what + "\x00" + err.Error()
	now := c.now()
	c.mu.Lock()
	last, known := c.seen[key]
	if known && now.Sub(last) < complaintEvery {
		c.mu.Unlock()
		return
	}
	if len(c.seen) >= maxComplaints {
		clear(c.seen)
	}
	if c.seen == nil {
		c.seen = map[string]time.Time{}
	}
	c.seen[key] = now
	c.mu.Unlock()
	c.log.Error(what, append(args, "error", err)...)
}
