package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
)

// errSource marks a failure of the reader that an upload was given.
var errSource = errors.New("reading what is to be uploaded failed")

// upload sends one PUT and looks afterwards at what came of it.
func (f *files) upload(ctx context.Context, dsPath string, r io.Reader, size int64) error {
	what := "upload " + dsPath
	if err := f.put(ctx, what, dsPath, r, size); err != nil {
		return err
	}
	stored, err := f.head(ctx, dsPath)
	if err != nil {
		return err
	}
	if stored != size {
		return fmt.Errorf("%s: %s: the host stored %d of %d bytes; delete the file and upload it again", f.name, what, stored, size)
	}
	return nil
}

func (f *files) put(ctx context.Context, what, dsPath string, r io.Reader, size int64) error {
	if _, err := f.gate.enter(ctx); err != nil {
		return fmt.Errorf("%s: %s: %w", f.name, what, err)
	}
	defer f.gate.leave()

	// Not the stall time: a host may take long to allocate and to flush.
	ctx, w := watch(ctx, f.t.call)
	defer w.end()
	source := &source{r: io.LimitReader(r, size), dog: w}
	var body io.Reader = source
	if size == 0 {
		body = http.NoBody
	}
	// The connection may go on reading after it has failed.
	defer source.Close() //nolint:errcheck // it only waits
	res, err := f.send(ctx, http.MethodPut, dsPath, http.Header{"Content-Type": {"application/octet-stream"}}, body, size)
	sent, ended, failed := source.state()
	switch {
	case failed != nil:
		err = fmt.Errorf("%s: %s: %w: %w", f.name, what, errSource, failed)
	case err != nil && ended && sent < size:
		err = fmt.Errorf("%s: %s: %w: it ended after %d of %d bytes", f.name, what, errSource, sent, size)
	case err != nil && context.Cause(ctx) != nil && !errors.Is(context.Cause(ctx), errStalled):
		err = fmt.Errorf("%s: %s: %w", f.name, what, context.Cause(ctx))
	case err != nil:
		err = fmt.Errorf("after %d of %d bytes: %w", sent, size, f.explain(what, err))
	}
	if err != nil {
		if res != nil {
			discard(res)
		}
		return err
	}
	defer discard(res)
	switch res.StatusCode {
	case http.StatusOK, http.StatusCreated, http.StatusNoContent:
		return nil
	}
	err = f.refuse(what, dsPath, res)
	if errors.Is(err, errExpired) {
		return errf(ErrLogin, err, "%s: %s: the session expired as the upload began; start it again", f.name, what)
	}
	var retry *again
	if errors.As(err, &retry) && retry.locked {
		return fmt.Errorf("%s: %s: the host could not write the file (HTTP 500): its datastore is full, or the file is in use", f.name, what)
	}
	return f.explain(what, err)
}

// source is the body of an upload. After Close the reader is not touched any
// more, whatever the connection still wants of it.
type source struct {
	dog *watchdog

	mu     sync.Mutex
	r      io.Reader
	sent   int64
	ended  bool
	err    error
	closed bool
}

func (s *source) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, errors.New("the upload is over")
	}
	s.dog.rest() // the reader's pace is its own
	n, err := s.r.Read(p)
	s.dog.alive()
	s.sent += int64(n)
	switch {
	case err == io.EOF:
		s.ended = true
	case err != nil:
		s.err = err
	}
	return n, err
}

// Close waits for a read under way.
func (s *source) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

// state is the bytes that the reader gave, whether it ended, and its own error.
func (s *source) state() (sent int64, ended bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent, s.ended, s.err
}
