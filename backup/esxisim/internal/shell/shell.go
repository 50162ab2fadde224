// Package shell is the command language of the simulated host: as much of
// busybox ash as scripts for ESXi use. It knows no commands but its own
// builtins, and no files: both come from its Host.
//
// What it understands: words with all three kinds of quotes, parameters with
// their defaults and trims, command and arithmetic substitution, patterns,
// lists, pipelines, redirections, here-documents, functions, if, while, until,
// for, case, groups and subshells, background jobs. As on ESXi there is no
// "command" builtin.
//
// What it does not: job control, aliases, history, read-only variables, traps
// other than that they can be set.
package shell

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
)

// File is what a redirection opens.
type File interface {
	io.Reader
	io.Writer
	io.Closer
}

// Host gives a shell its commands and files. Paths are absolute and clean.
type Host interface {
	// Find finds a command by its name, or by its path when there is a slash in
	// it; nil when there is none.
	Find(path string) Command
	// Open opens a file with flags of os.OpenFile.
	Open(path string, flag int) (File, error)
	// List is the names in a directory.
	List(path string) ([]string, error)
	// IsDir tells whether a path is a directory.
	IsDir(path string) bool
	// Background is the life of a command that runs on behind its shell. pid is
	// shown as $!; done is to be called when it ended.
	Background(line string) (ctx context.Context, pid int, done func())
}

// Command is a program. It returns its exit status.
type Command func(ctx context.Context, p *Proc) int

// Proc is one running command.
type Proc struct {
	Args     []string // the name first
	In       io.Reader
	Out, Err io.Writer
	Dir      string // working directory
	Shell    *Shell // that runs it; a command that runs others asks it
}

// Getenv is a variable's value, "" when it is not set.
func (p *Proc) Getenv(name string) string { return p.Shell.vars[name] }

// Path makes a name absolute.
func (p *Proc) Path(name string) string { return Abs(p.Dir, name) }

// Errorf writes a line to standard error, after the command's name.
func (p *Proc) Errorf(format string, args ...any) {
	fmt.Fprintf(p.Err, "%s: %s\n", path.Base(p.Args[0]), fmt.Sprintf(format, args...))
}

// Abs makes a path absolute and clean.
func Abs(dir, name string) string {
	if strings.HasPrefix(name, "/") {
		return path.Clean(name)
	}
	return path.Join("/", dir, name)
}

// Status values of the shell itself.
const (
	StatusMisuse   = 2
	StatusNoExec   = 126
	StatusNotFound = 127
	StatusKilled   = 137
)

// Shell runs scripts. It is not safe for concurrent use; its subshells are
// shells of their own.
type Shell struct {
	host     Host
	name     string // $0
	dir      string
	vars     map[string]string
	exported map[string]bool
	funcs    map[string]node
	params   []string
	status   int
	pid      int
	last     int // $!
	depth    int
	errexit  bool
	nounset  bool
	xtrace   bool
	local    []map[string]*string // saved variables, by function call
	jobs     *sync.WaitGroup
}

// maxDepth bounds functions, subshells and substitutions within each other.
const maxDepth = 100

// New makes a shell in a directory with an environment.
func New(h Host, dir string, env map[string]string) *Shell {
	s := &Shell{
		host: h, name: "sh", dir: dir, pid: 1, vars: map[string]string{}, exported: map[string]bool{}, funcs: map[string]node{}, jobs: &sync.WaitGroup{},
	}
	for k, v := range env {
		s.vars[k], s.exported[k] = v, true
	}
	return s
}

// SetPID sets $$.
func (s *Shell) SetPID(pid int) { s.pid = pid }

// stdio are a command's three files.
type stdio struct {
	in       io.Reader
	out, err io.Writer
}

// control is how a command tells more than a status: that the list it is in
// ends.
type control int

const (
	goOn control = iota
	leave
	breakLoop
	continueLoop
	returnFunc
)

// result of a command.
type result struct {
	status int
	flow   control
	loops  int // to break or continue, with those kinds of flow
}

// Run runs a script to its end and returns its exit status.
func (s *Shell) Run(ctx context.Context, script string, in io.Reader, out, errs io.Writer, args ...string) int {
	s.params = args
	list, err := parse(script)
	if err != nil {
		fmt.Fprintf(errs, "%s: %v\n", s.name, err)
		return StatusMisuse
	}
	return s.list(ctx, list, stdio{in, out, errs}).status
}

// Interactive reads commands from in as they come and runs each when it is
// whole; what a command reads comes from in too. prompt, when not nil, is told
// before each line.
func (s *Shell) Interactive(ctx context.Context, in io.Reader, out, errs io.Writer, prompt func(), args ...string) int {
	s.params = args
	io3 := stdio{in, out, errs}
	var text strings.Builder
	for {
		if prompt != nil && text.Len() == 0 {
			prompt()
		}
		line, err := readLine(in)
		text.WriteString(line)
		list, perr := parse(text.String())
		if errors.Is(perr, errIncomplete) && err == nil && text.Len() < maxScript {
			continue
		}
		if perr != nil {
			fmt.Fprintf(errs, "%s: %v\n", s.name, perr)
			if s.status = StatusMisuse; prompt == nil {
				return s.status
			}
		} else if r := s.list(ctx, list, io3); r.flow == leave {
			return r.status
		}
		text.Reset()
		if err != nil || ctx.Err() != nil {
			return s.status
		}
	}
}

// readLine reads to a line's end and not a byte further: the rest belongs to
// the command on that line.
func readLine(r io.Reader) (string, error) {
	var b [1]byte
	var line strings.Builder
	for {
		n, err := r.Read(b[:])
		if n > 0 {
			line.WriteByte(b[0])
			if b[0] == '\n' || line.Len() >= maxScript {
				return line.String(), nil
			}
		}
		if err != nil {
			return line.String(), err
		}
	}
}

// Exec runs a command with its arguments as a script's line would, without
// functions. The status is that of the command, or 127.
func (s *Shell) Exec(ctx context.Context, p *Proc, args []string) int {
	if len(args) == 0 {
		return 0
	}
	return s.command(ctx, args, stdio{p.In, p.Out, p.Err})
}

// Sub is a shell with a copy of everything: what it changes stays in it.
func (s *Shell) Sub() *Shell {
	c := *s
	c.vars, c.exported, c.funcs = maps.Clone(s.vars), maps.Clone(s.exported), maps.Clone(s.funcs)
	c.params, c.local = slices.Clone(s.params), nil
	c.jobs = &sync.WaitGroup{}
	c.depth++
	return &c
}

// Fresh is a shell for a script of its own: with the exported variables only.
func (s *Shell) Fresh() *Shell {
	c := s.Sub()
	c.funcs, c.params, c.status = map[string]node{}, nil, 0
	c.errexit, c.nounset, c.xtrace = false, false, false
	maps.DeleteFunc(c.vars, func(k, _ string) bool { return !s.exported[k] })
	return c
}

// Environment lists the exported variables as NAME=value.
func (s *Shell) Environment() []string {
	var list []string
	for name := range s.exported {
		if v, ok := s.vars[name]; ok {
			list = append(list, name+"="+v)
		}
	}
	slices.Sort(list)
	return list
}

// SetEnv sets and exports a variable.
func (s *Shell) SetEnv(name, value string) { s.vars[name], s.exported[name] = value, true }

// SetName sets $0, and what the shell's own errors begin with.
func (s *Shell) SetName(name string) { s.name = name }

// Find finds a command that is no builtin and no function.
func (s *Shell) Find(name string) Command {
	if strings.Contains(name, "/") {
		name = Abs(s.dir, name)
	}
	return s.host.Find(name)
}
