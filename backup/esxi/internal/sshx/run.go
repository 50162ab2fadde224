package sshx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// Command is one command line for the host's shell.
type Command struct {
	Line  string
	Stdin io.Reader // nil is none. Not read any more when Run has returned
	// Stdout takes the output as it comes; nil collects it in the Result.
	Stdout io.Writer
	// Limit bounds what is collected of Stdout, in bytes; 0 is 16 MiB. More is
	// ErrTooLong. Of stderr the first 64 KiB are kept.
	Limit int
	// Data runs it on a connection of its own.
	Data bool
	// Stall ends it when no byte moved for so long; 0 waits for ever.
	Stall time.Duration
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr []byte
	Status         int // exit status; 128 + the signal's number when one ended it
}

const (
	defaultLimit = 16 << 20
	stderrLimit  = 64 << 10
)

// Run runs one command to its end. An exit status other than 0 is no error.
// Connections are made when needed, with one attempt each; a connection that
// turns out to be dead before the command began is replaced once. Every failure
// after the login is a *LostError, ErrTooLong, or an error of Stdin or Stdout.
func (c *Client) Run(ctx context.Context, cmd Command) (*Result, error) {
	slots, get := c.control, c.mainConn
	if cmd.Data {
		slots, get = c.streams, c.streamConn
	}
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	case <-ctx.Done():
		return nil, &LostError{Err: context.Cause(ctx)}
	}
	for try := 1; ; try++ {
		cn, err := get(ctx)
		if err != nil {
			return nil, unreached(ctx, err)
		}
		res, err := c.exec(ctx, cn, cmd)
		if cmd.Data {
			c.giveBack(cn)
		}
		var lost *LostError
		if errors.As(err, &lost) && !lost.Started && ctx.Err() == nil && try == 1 {
			cn.kill()
			<-cn.dead
			continue
		}
		return res, err
	}
}

// exec runs a command on one connection.
func (c *Client) exec(parent context.Context, cn *conn, cmd Command) (*Result, error) {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	w := &watch{limit: cmd.Stall, cancel: cancel}
	defer w.begin()()
	limit := cmd.Limit
	if limit <= 0 {
		limit = defaultLimit
	}
	out := &collector{watch: w, to: cmd.Stdout, limit: limit, cancel: cancel}
	errs := &collector{watch: w, limit: stderrLimit}

	type outcome struct {
		started bool
		err     error
	}
	var session atomic.Pointer[ssh.Session]
	done := make(chan outcome, 1)
	if !c.enter() {
		return nil, &LostError{Err: ErrClosed}
	}
	go func() {
		defer c.running.Done()
		s, err := cn.client.NewSession()
		if err != nil {
			done <- outcome{false, err}
			return
		}
		session.Store(s)
		defer func() { _ = s.Close() }()
		if ctx.Err() != nil {
			done <- outcome{false, context.Cause(ctx)}
			return
		}
		s.Stdout, s.Stderr = out, errs
		var pipe io.WriteCloser
		if cmd.Stdin != nil {
			if pipe, err = s.StdinPipe(); err != nil {
				done <- outcome{false, err}
				return
			}
		}
		if err := s.Start(cmd.Line); err != nil {
			// Without an answer nobody knows; "no" is an answer.
			done <- outcome{network(err), err}
			return
		}
		// Not Session.Stdin: what copies that may go on reading after Wait.
		var fed sync.WaitGroup
		in := &source{r: cmd.Stdin, watch: w}
		if pipe != nil {
			fed.Go(func() {
				_, _ = io.Copy(pipe, in) // a program may end without reading all
				_ = pipe.Close()
			})
		}
		err = s.Wait()
		fed.Wait()
		if in.err != nil {
			err = &sourceError{in.err}
		}
		done <- outcome{true, err}
	}()

	var o outcome
	select {
	case o = <-done:
	case <-ctx.Done():
		if s := session.Load(); s != nil {
			go func() { _ = s.Close() }() // may block where the other end is gone, until kill
		}
		grace := time.NewTimer(c.c.Grace)
		defer grace.Stop()
		select {
		case o = <-done:
		case <-grace.C:
			cn.kill()
			o = <-done
		}
	}
	res := &Result{Stdout: out.bytes(), Stderr: errs.bytes()}
	var broken *sourceError
	var exit *ssh.ExitError
	var missing *ssh.ExitMissingError
	var full *ssh.OpenChannelError
	switch {
	case out.failed() != nil:
		return nil, out.failed()
	case errors.As(o.err, &broken):
		return nil, broken.err
	case o.err == nil:
		return res, nil
	case errors.As(o.err, &exit):
		res.Status = exit.ExitStatus()
		return res, nil
	case ctx.Err() != nil:
		return nil, &LostError{context.Cause(ctx), o.started}
	case errors.As(o.err, &full):
		return nil, fmt.Errorf("%w (%s)", ErrBusy, full.Message)
	case errors.As(o.err, &missing), network(o.err), !cn.alive():
		return nil, &LostError{fmt.Errorf("the SSH connection broke: %w", o.err), o.started}
	}
	return nil, o.err
}

// watch ends a command in which no byte moves.
type watch struct {
	limit  time.Duration
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (w *watch) begin() (end func()) {
	if w.limit <= 0 {
		return func() {}
	}
	w.timer = time.AfterFunc(w.limit, func() { w.cancel(ErrStalled) })
	return func() { w.timer.Stop() }
}

func (w *watch) alive() {
	if w.timer != nil {
		w.timer.Reset(w.limit)
	}
}

// source reads a command's standard input. The time its reader takes is its
// own.
type source struct {
	r     io.Reader
	watch *watch
	err   error
}

// sourceError is a failure of a command's standard input.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }

func (s *source) Read(p []byte) (int, error) {
	if s.watch.timer != nil {
		s.watch.timer.Stop()
	}
	n, err := s.r.Read(p)
	s.watch.alive()
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// collector takes a command's output.
type collector struct {
	watch  *watch
	to     io.Writer
	limit  int
	cancel context.CancelCauseFunc // nil: what is too long is cut

	mu  sync.Mutex
	b   bytes.Buffer
	err error
}

// Write never fails: a session whose output is not taken any more would wait
// for ever. It ends the command instead.
func (o *collector) Write(p []byte) (int, error) {
	o.watch.alive()
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.err != nil:
	case o.to != nil:
		if _, err := o.to.Write(p); err != nil {
			o.fail(err)
		}
	case o.b.Len()+len(p) <= o.limit:
		o.b.Write(p)
	case o.cancel == nil:
		o.b.Write(p[:max(0, o.limit-o.b.Len())])
	default:
		o.fail(ErrTooLong)
	}
	return len(p), nil
}

func (o *collector) fail(err error) {
	o.err = err
	o.cancel(err)
}

func (o *collector) bytes() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Bytes()
}

func (o *collector) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}
