package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// files is the host's file server, /folder: every data request goes through
// its gate and is repeated, where that is safe, by its rules.
type files struct {
	session    *session
	gate       *throttle
	name, addr string
	datacenter string
	t          tuning
	log        *slog.Logger
}

// again says that one attempt failed in a way worth another.
type again struct {
	err    error
	locked bool // the host answered 500: busy for a moment, or the file is locked
}

func (e *again) Error() string { return e.err.Error() }
func (e *again) Unwrap() error { return e.err }

var (
	errExpired = errors.New("the session has expired")
	errStalled = errors.New("no byte came for too long")
)

// attempts runs once until it succeeds, fails for good, or has failed too often:
// tries in a row without progress, or a few when the host says 500. once
// returns the bytes it moved, which count as progress from 64 KiB on.
func (f *files) attempts(ctx context.Context, what string, once func(context.Context) (int, error)) error {
	renewals, tries, locked := 0, 0, 0
	for {
		round, err := f.gate.enter(ctx)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", f.name, what, err)
		}
		epoch := f.session.current()
		n, err := once(ctx)
		f.gate.leave()

		var retry *again
		switch {
		case err == nil:
			f.gate.good(round)
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%s: %s: %w", f.name, what, context.Cause(ctx))
		case errors.Is(err, errExpired):
			if renewals++; renewals > 3 {
				return errf(ErrLogin, err, "%s: %s: the host does not accept its own session on /folder", f.name, what)
			}
			if err := f.session.renewPatiently(ctx, epoch); err != nil {
				return f.explain(what, err)
			}
			continue
		case !errors.As(err, &retry):
			return err
		}
		f.gate.bad(round)
		if n >= 64<<10 {
			tries, renewals = 0, 0
		}
		tries++
		if retry.locked {
			locked++
		}
		f.log.Debug("data request failed, trying again", "host", f.name, "request", what, "try", tries, "error", err)
		if tries >= f.t.tries || locked >= f.t.lockTries {
			return f.explain(what, err)
		}
		// Besides the common pause, each request has its own: others that
		// succeed meanwhile end the common one.
		if err := sleep(ctx, jitter(f.t.pause, f.t.longest, tries)); err != nil {
			return fmt.Errorf("%s: %s: %w", f.name, what, err)
		}
	}
}

// explain says what a request that failed for good came to.
func (f *files) explain(what string, err error) error {
	var retry *again
	var status *httpStatus
	switch {
	case said(err):
		return fmt.Errorf("%s: %w", what, err)
	case errors.As(err, &retry) && retry.locked:
		return errf(ErrLocked, err, "%s: %s: the host cannot open the file (HTTP 500): a running VM, a backup or a migration holds it locked; "+
			"try again when that is over", f.name, what)
	case errors.As(err, &status) && status.busy():
		return errf(ErrBusy, err, "%s: %s: the host stays busy (HTTP %s) after %d tries; try again when fewer programs use it",
			f.name, what, status.status, f.t.tries)
	case transient(err) || errors.As(err, &retry):
		return errf(ErrUnreachable, err, "%s (%s): %s: the host cannot be reached: %s", f.name, f.addr, what, root(err))
	}
	return fmt.Errorf("%s: %s: %w", f.name, what, err)
}

// watchdog cuts a transfer that has not moved a byte for limit.
type watchdog struct {
	timer  *time.Timer
	limit  time.Duration
	cancel context.CancelCauseFunc
}

func watch(ctx context.Context, limit time.Duration) (context.Context, *watchdog) {
	ctx, cancel := context.WithCancelCause(ctx)
	return ctx, &watchdog{time.AfterFunc(limit, func() { cancel(errStalled) }), limit, cancel}
}

func (w *watchdog) alive() { w.timer.Reset(w.limit) }
func (w *watchdog) rest()  { w.timer.Stop() }
func (w *watchdog) end()   { w.timer.Stop(); w.cancel(nil) }

// send makes one request, under a watched context.
func (f *files) send(ctx context.Context, method, dsPath string, header http.Header, body io.Reader, size int64) (*http.Response, error) {
	ds, file, err := splitPath(dsPath)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "", body)
	if err != nil {
		return nil, err
	}
	req.URL = folderURL(f.addr, f.datacenter, ds, file)
	req.Host = f.addr
	req.Header = header
	req.Header.Set("User-Agent", "hikae")
	req.Header.Set("Accept-Encoding", "identity") // a range is one of bytes as stored
	if body != nil {
		req.ContentLength = size
	}
	for _, c := range f.session.jar.Cookies(req.URL) {
		req.AddCookie(c)
	}
	// The transport itself: no redirects to follow, no body to replay.
	res, err := f.session.transport.RoundTrip(req)
	switch {
	case err == nil:
		return res, nil
	case errors.Is(context.Cause(ctx), errStalled):
		return nil, &again{err: errStalled}
	case said(err): // the certificate changed
		return nil, err
	}
	return nil, &again{err: err}
}

// refuse turns an answer without data into an error.
func (f *files) refuse(what, dsPath string, res *http.Response) error {
	status := &httpStatus{res.StatusCode, res.Status}
	switch {
	case res.StatusCode == http.StatusUnauthorized:
		return errExpired
	case res.StatusCode == http.StatusForbidden:
		return errf(ErrDenied, status, "%s: %s: the host forbids it (HTTP 403); user %s needs the Administrator role", f.name, what, f.session.user)
	case res.StatusCode == http.StatusNotFound:
		return errf(ErrNotFound, status, "%s: %s: there is no such file: it was deleted or moved, or its datastore is away", f.name, what)
	case res.StatusCode == http.StatusInternalServerError:
		return &again{err: status, locked: true}
	case res.StatusCode == http.StatusInsufficientStorage:
		return errf(ErrNoSpace, status, "%s: %s: the datastore is full", f.name, what)
	case status.busy():
		return &again{err: status}
	}
	return fmt.Errorf("%s: %s: %w", f.name, what, status)
}

func discard(res *http.Response) {
	io.Copy(io.Discard, io.LimitReader(res.Body, 16<<10)) //nolint:errcheck // only to keep the connection
	res.Body.Close()
}

// head gives a file's size.
func (f *files) head(ctx context.Context, dsPath string) (size int64, err error) {
	what := "look at " + dsPath
	err = f.attempts(ctx, what, func(ctx context.Context) (int, error) {
		ctx, w := watch(ctx, f.t.stall)
		defer w.end()
		res, err := f.send(ctx, http.MethodHead, dsPath, http.Header{}, nil, 0)
		if err != nil {
			return 0, err
		}
		defer discard(res)
		switch res.StatusCode {
		case http.StatusOK:
			size = res.ContentLength
			return 0, nil
		case http.StatusMovedPermanently, http.StatusFound:
			size = -1 // a folder, asked for without its slash
			return 0, nil
		}
		return 0, f.refuse(what, dsPath, res)
	})
	return size, err
}

// read fills p from off. The file has to be total bytes long (-1: not known).
// Requests are cut to the size hosts like, and what is broken off goes on
// where it broke.
func (f *files) read(ctx context.Context, dsPath string, p []byte, off, total int64, count func(right, wire int)) error {
	for len(p) > 0 {
		part := p[:min(len(p), f.t.request)]
		what := fmt.Sprintf("read %s at %d", dsPath, off)
		err := f.attempts(ctx, what, func(ctx context.Context) (int, error) {
			n, _, err := f.get(ctx, what, dsPath, part, off, total)
			count(n, n)
			part, p, off = part[n:], p[n:], off+int64(n)
			if err == nil && len(part) > 0 {
				err = fmt.Errorf("%s: %s: the file ends early", f.name, what)
			}
			return n, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// get is one ranged request: as many bytes of p as the file has from off on,
// which may be fewer when total is not known. It also returns the file's size.
func (f *files) get(ctx context.Context, what, dsPath string, p []byte, off, total int64) (n int, size int64, err error) {
	header := http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1)}}
	ctx, w := watch(ctx, f.t.stall)
	defer w.end()
	res, err := f.send(ctx, http.MethodGet, dsPath, header, nil, 0)
	if err != nil {
		return 0, 0, err
	}
	want, size, err := f.check(what, dsPath, res, off, len(p), total)
	if err != nil {
		discard(res)
		return 0, 0, err
	}
	for n < want && err == nil {
		var m int
		m, err = res.Body.Read(p[n:want])
		n += m
		if m > 0 {
			w.alive()
		}
	}
	// The body has no more than was asked for; reading its end gives the
	// connection back.
	discard(res)
	if n < want {
		if err == nil || err == io.EOF { //nolint:errorlint // io.Reader returns it bare
			err = io.ErrUnexpectedEOF
		}
		return n, size, &again{err: err}
	}
	return n, size, nil
}

// check believes an answer to a ranged request only when status, range, size
// and type all say that it is the one asked for. A directory or a login page
// answers 200 with HTML; a proxy or an old server may ignore the range.
func (f *files) check(what, dsPath string, res *http.Response, off int64, want int, total int64) (n int, size int64, err error) {
	if res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		if s, ok := strings.CutPrefix(res.Header.Get("Content-Range"), "bytes */"); ok && total < 0 && off == 0 && s == "0" {
			return 0, 0, nil
		}
		return 0, 0, fmt.Errorf("%s: %s: the file is shorter than it was (range refused: %s)", f.name, what, res.Header.Get("Content-Range"))
	}
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusPartialContent {
		return 0, 0, f.refuse(what, dsPath, res)
	}
	if kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")); kind == "text/html" || kind == "application/xhtml+xml" {
		return 0, 0, fmt.Errorf("%s: %s: the host answers with a web page: it is a folder, or something between answers for the host", f.name, what)
	}
	if res.StatusCode == http.StatusOK {
		// A file that fits whole is as good as its range.
		if total < 0 && off == 0 && res.ContentLength >= 0 && res.ContentLength <= int64(want) {
			return int(res.ContentLength), res.ContentLength, nil
		}
		return 0, 0, fmt.Errorf("%s: %s: the host ignores ranges (HTTP 200 for a part of a file); its disks cannot be read over /folder, "+
			"but over SSH (hikae host add --ssh): %w", f.name, what, errNoRanges)
	}
	first, last, size, ok := parseContentRange(res.Header.Get("Content-Range"))
	if !ok {
		return 0, 0, fmt.Errorf("%s: %s: the host answers without a sound Content-Range (%q)", f.name, what, res.Header.Get("Content-Range"))
	}
	if total >= 0 && size != total {
		return 0, 0, fmt.Errorf("%s: %s: the file is %d bytes long and should be %d; it is not the frozen one", f.name, what, size, total)
	}
	if first != off || last != min(off+int64(want), size)-1 {
		return 0, 0, fmt.Errorf("%s: %s: the host answers bytes %d-%d instead of %d-%d", f.name, what, first, last, off, off+int64(want)-1)
	}
	n = int(last - first + 1)
	if res.ContentLength >= 0 && res.ContentLength != int64(n) {
		return 0, 0, fmt.Errorf("%s: %s: the host announces %d bytes for a range of %d", f.name, what, res.ContentLength, n)
	}
	return n, size, nil
}

// ranges makes sure that a part of a file is answered with a part of it.
func (f *files) ranges(ctx context.Context, dsPath string) error {
	size, err := f.head(ctx, dsPath)
	if err != nil || size < 2 { // too short to tell
		return err
	}
	what := "read one byte of " + dsPath
	return f.attempts(ctx, what, func(ctx context.Context) (int, error) {
		n, _, err := f.get(ctx, what, dsPath, make([]byte, 1), 0, size)
		return n, err
	})
}

// parseContentRange reads "bytes 0-99/1000" (RFC 9110, 14.4).
func parseContentRange(s string) (first, last, size int64, ok bool) {
	s, ok = strings.CutPrefix(s, "bytes ")
	span, total, ok2 := strings.Cut(s, "/")
	a, b, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, 0, false
	}
	var v [3]int64
	for i, s := range []string{a, b, total} {
		u, err := strconv.ParseUint(s, 10, 63)
		if err != nil {
			return 0, 0, 0, false
		}
		v[i] = int64(u)
	}
	return v[0], v[1], v[2], v[0] <= v[1] && v[1] < v[2]
}

// readHead reads the beginning of a file: limit bytes, or the whole when it is
// shorter. size is that of the file.
func (f *files) readHead(ctx context.Context, dsPath string, limit int64) (b []byte, size int64, err error) {
	b = make([]byte, limit)
	what := "read " + dsPath
	n := 0
	total := int64(-1)
	err = f.attempts(ctx, what, func(ctx context.Context) (int, error) {
		if total >= 0 && int64(n) >= min(total, limit) {
			return 0, nil
		}
		m, s, err := f.get(ctx, what, dsPath, b[n:], int64(n), total)
		n += m
		if m > 0 {
			total = s
		}
		if err == nil {
			size = s
		}
		return m, err
	})
	return b[:n], size, err
}

// readFile reads a file of at most limit bytes.
func (f *files) readFile(ctx context.Context, dsPath string, limit int64) ([]byte, error) {
	// Not limit bytes at once: limits are generous, files are small.
	b, size, err := f.readHead(ctx, dsPath, min(limit+1, 64<<10))
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s: %s is %d bytes long, more than the %d that such a file may have", f.name, dsPath, size, limit)
	}
	if int64(len(b)) < size {
		rest := make([]byte, size)
		n := copy(rest, b)
		if err := f.read(ctx, dsPath, rest[n:], int64(n), size, func(int, int) {}); err != nil {
			return nil, err
		}
		return rest, nil
	}
	return b, nil
}
