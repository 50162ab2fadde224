package shell

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
)

func (s *Shell) list(ctx context.Context, l list, io3 stdio) (r result) {
	for _, it := range l {
		if ctx.Err() != nil {
			return result{status: StatusKilled, flow: leave}
		}
		if it.background {
			s.background(it, io3)
			s.status = 0
			r = result{}
			continue
		}
		r = s.node(ctx, it.node, io3)
		s.status = r.status
		if r.flow != goOn {
			return r
		}
		if s.errexit && r.status != 0 {
			switch it.node.(type) {
			case *simple, subshell, compound:
				return result{status: r.status, flow: leave}
			}
		}
	}
	return r
}

// background runs a command behind the shell. It outlives the shell, as what
// nohup starts does on a host.
func (s *Shell) background(it item, io3 stdio) {
	ctx, pid, done := s.host.Background(it.text)
	s.last = pid
	sub := s.Sub()
	io3.in = strings.NewReader("") // a background command reads /dev/null
	s.jobs.Go(func() {
		defer done()
		sub.node(ctx, it.node, io3)
		sub.jobs.Wait()
	})
}

// Wait waits for the commands that run behind this shell.
func (s *Shell) Wait() { s.jobs.Wait() }

func (s *Shell) node(ctx context.Context, n node, io3 stdio) result {
	switch n := n.(type) {
	case *simple:
		return s.simple(ctx, n, io3)
	case andOr:
		r := s.node(ctx, n.left, io3)
		s.status = r.status
		if r.flow != goOn || (r.status == 0) == n.or {
			return r
		}
		return s.node(ctx, n.right, io3)
	case pipeline:
		r := s.pipeline(ctx, n.cmds, io3)
		if n.negate {
			r.status = map[bool]int{true: 1, false: 0}[r.status == 0]
		}
		return r
	case list:
		return s.list(ctx, n, io3)
	case group:
		return s.list(ctx, n.body, io3)
	case subshell:
		if s.depth > maxDepth {
			return s.fail(io3, StatusMisuse, "too many subshells")
		}
		r := s.Sub().list(ctx, n.body, io3)
		return result{status: r.status}
	case compound:
		sub, closers, err := s.redirect(ctx, n.redirs, io3)
		defer closeAll(closers)
		if err != nil {
			return s.fail(io3, 1, "%v", err)
		}
		return s.node(ctx, n.body, sub)
	case ifNode:
		for i, cond := range n.conds {
			r := s.condition(ctx, cond, io3)
			if r.flow != goOn {
				return r
			}
			if r.status == 0 {
				return s.list(ctx, n.bodies[i], io3)
			}
		}
		return s.list(ctx, n.otherwise, io3)
	case loop:
		return s.loop(ctx, n, io3)
	case forNode:
		return s.forLoop(ctx, n, io3)
	case caseNode:
		return s.choose(ctx, n, io3)
	case funcNode:
		s.funcs[n.name] = n.body
		return result{}
	}
	return s.fail(io3, StatusMisuse, "internal: %T", n)
}

func (s *Shell) fail(io3 stdio, status int, format string, args ...any) result {
	fmt.Fprintf(io3.err, "%s: %s\n", s.name, fmt.Sprintf(format, args...))
	return result{status: status}
}

// condition runs a list whose failure ends nothing.
func (s *Shell) condition(ctx context.Context, l list, io3 stdio) result {
	was := s.errexit
	s.errexit = false
	defer func() { s.errexit = was }()
	return s.list(ctx, l, io3)
}

// looped says whether a loop goes on after a round.
func looped(r *result) (done bool) {
	switch {
	case r.flow == goOn:
		return false
	case (r.flow == breakLoop || r.flow == continueLoop) && r.loops > 1:
		r.loops--
		return true
	case r.flow == breakLoop:
		r.flow = goOn
		return true
	case r.flow == continueLoop:
		r.flow = goOn
		return false
	}
	return true
}

func (s *Shell) loop(ctx context.Context, n loop, io3 stdio) (r result) {
	for ctx.Err() == nil {
		c := s.condition(ctx, n.cond, io3)
		if c.flow != goOn && looped(&c) {
			return c
		}
		if (c.status == 0) == n.until {
			return r
		}
		r = s.list(ctx, n.body, io3)
		if looped(&r) {
			return r
		}
	}
	return result{status: StatusKilled, flow: leave}
}

func (s *Shell) forLoop(ctx context.Context, n forNode, io3 stdio) (r result) {
	words := s.params
	if !n.args {
		var err error
		if words, err = s.fields(ctx, n.words, io3); err != nil {
			return s.fail(io3, 1, "%v", err)
		}
	}
	for _, w := range words {
		if ctx.Err() != nil {
			return result{status: StatusKilled, flow: leave}
		}
		s.vars[n.name] = w
		r = s.list(ctx, n.body, io3)
		if looped(&r) {
			return r
		}
	}
	return r
}

func (s *Shell) choose(ctx context.Context, n caseNode, io3 stdio) result {
	subject, err := s.text(ctx, n.subject, io3)
	if err != nil {
		return s.fail(io3, 1, "%v", err)
	}
	for _, arm := range n.arms {
		for _, w := range arm.patterns {
			pat, err := s.pattern(ctx, w, io3)
			if err != nil {
				return s.fail(io3, 1, "%v", err)
			}
			if Match(pat, subject) {
				return s.list(ctx, arm.body, io3)
			}
		}
	}
	return result{}
}

// pipeline runs commands side by side, each in a shell of its own.
func (s *Shell) pipeline(ctx context.Context, cmds []node, io3 stdio) result {
	if len(cmds) == 1 {
		return s.node(ctx, cmds[0], io3)
	}
	if s.depth > maxDepth {
		return s.fail(io3, StatusMisuse, "too many subshells")
	}
	status := make(chan int, 1)
	done := make(chan struct{})
	in := io3.in
	for i, n := range cmds {
		each := stdio{in, io3.out, io3.err}
		var w *io.PipeWriter
		r, _ := in.(*io.PipeReader)
		if i == 0 {
			r = nil // not ours to close
		}
		if i < len(cmds)-1 {
			var next *io.PipeReader
			next, w = io.Pipe()
			each.out, in = &pipeOut{w: w}, next
		}
		sub := s.Sub()
		go func() {
			res := sub.node(ctx, n, each)
			if w != nil {
				w.Close() //nolint:errcheck // never fails
			}
			if r != nil {
				r.CloseWithError(syscall.EPIPE)
			}
			if i == len(cmds)-1 {
				status <- res.status
			}
			done <- struct{}{}
		}()
	}
	for range cmds {
		<-done
	}
	return result{status: <-status}
}

// pipeOut is a pipe's writing end. Who writes to one that nobody reads any more
// dies of it.
type pipeOut struct {
	w      *io.PipeWriter
	broken atomic.Bool
}

func (p *pipeOut) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if err != nil {
		p.broken.Store(true)
	}
	return n, err
}

func (s *Shell) simple(ctx context.Context, n *simple, io3 stdio) result {
	r := s.run(ctx, n, io3)
	if p, ok := io3.out.(*pipeOut); ok && p.broken.Load() {
		return result{status: 141, flow: leave}
	}
	return r
}

func (s *Shell) run(ctx context.Context, n *simple, io3 stdio) result {
	args, err := s.fields(ctx, n.words, io3)
	if err != nil {
		return s.fatal(io3, err)
	}
	sub, closers, err := s.redirect(ctx, n.redirs, io3)
	defer closeAll(closers)
	if err != nil {
		return s.fail(io3, 1, "%v", err)
	}
	values := map[string]string{}
	for _, a := range n.assigns {
		v, err := s.text(ctx, a.value, io3)
		if err != nil {
			return s.fatal(io3, err)
		}
		values[a.name] = v
		if len(args) == 0 {
			s.vars[a.name] = v
		}
	}
	if len(args) == 0 {
		if len(n.assigns) > 0 && substitutes(n.assigns) {
			return result{status: s.status} // of the last command substitution
		}
		return result{}
	}
	if s.xtrace {
		fmt.Fprintf(io3.err, "+ %s\n", strings.Join(args, " "))
	}
	if body, ok := s.funcs[args[0]]; ok {
		return s.call(ctx, body, args, values, sub)
	}
	if b, ok := builtins[args[0]]; ok {
		for k, v := range values {
			s.vars[k] = v
		}
		return b(s, ctx, args, sub)
	}
	if len(values) > 0 {
		with := s.Sub()
		with.depth--
		for k, v := range values {
			with.SetEnv(k, v)
		}
		return result{status: with.command(ctx, args, sub)}
	}
	return result{status: s.command(ctx, args, sub)}
}

func substitutes(assigns []assign) bool {
	for _, a := range assigns {
		for _, pt := range a.value {
			if pt.kind == substitution {
				return true
			}
		}
	}
	return false
}

// fatal is an error of an expansion, which ends the script.
func (s *Shell) fatal(io3 stdio, err error) result {
	r := s.fail(io3, StatusMisuse, "%v", err)
	r.flow = leave
	return r
}

// command runs a program.
func (s *Shell) command(ctx context.Context, args []string, io3 stdio) int {
	name := args[0]
	c := s.Find(name)
	switch {
	case c != nil:
	case strings.Contains(name, "/") && s.host.IsDir(Abs(s.dir, name)):
		fmt.Fprintf(io3.err, "%s: %s: Permission denied\n", s.name, name)
		return StatusNoExec
	default:
		fmt.Fprintf(io3.err, "%s: %s: not found\n", s.name, name)
		return StatusNotFound
	}
	return c(ctx, &Proc{Args: args, In: io3.in, Out: io3.out, Err: io3.err, Dir: s.dir, Shell: s})
}

// call runs a function.
func (s *Shell) call(ctx context.Context, body node, args []string, values map[string]string, io3 stdio) result {
	if s.depth > maxDepth {
		return s.fail(io3, StatusMisuse, "%s: functions too deep", args[0])
	}
	params := s.params
	s.params = args[1:]
	s.local = append(s.local, map[string]*string{})
	s.depth++
	for k, v := range values {
		s.makeLocal(k)
		s.vars[k] = v
	}
	r := s.node(ctx, body, io3)
	s.depth--
	for name, old := range s.local[len(s.local)-1] {
		if old == nil {
			delete(s.vars, name)
		} else {
			s.vars[name] = *old
		}
	}
	s.local = s.local[:len(s.local)-1]
	s.params = params
	if r.flow == returnFunc {
		r.flow = goOn
	}
	return r
}

func (s *Shell) makeLocal(name string) {
	if len(s.local) == 0 {
		return
	}
	saved := s.local[len(s.local)-1]
	if _, ok := saved[name]; ok {
		return
	}
	if v, ok := s.vars[name]; ok {
		saved[name] = &v
	} else {
		saved[name] = nil
	}
}

// capture runs a list in a subshell and returns what it wrote.
func (s *Shell) capture(ctx context.Context, l list, io3 stdio) (string, error) {
	if s.depth > maxDepth {
		return "", fmt.Errorf("command substitutions too deep")
	}
	out := &limited{}
	sub := s.Sub()
	r := sub.list(ctx, l, stdio{io3.in, out, io3.err})
	s.status = r.status
	return strings.TrimRight(strings.ReplaceAll(out.String(), "\x00", ""), "\n"), nil
}

// maxCapture bounds what a command substitution takes, in bytes.
const maxCapture = 16 << 20

type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxCapture {
		return 0, syscall.ENOMEM
	}
	return l.Buffer.Write(p)
}
