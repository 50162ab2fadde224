package shell

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

type builtin func(s *Shell, ctx context.Context, args []string, io3 stdio) result

// builtins that need the shell itself. There is no "command": ESXi's ash has
// none. It is filled in init, because eval and the dot run what may call them.
var builtins map[string]builtin

func init() {
	builtins = map[string]builtin{
		":":        func(*Shell, context.Context, []string, stdio) result { return result{} },
		"break":    flow(breakLoop),
		"continue": flow(continueLoop),
		"return":   flow(returnFunc),
		"exit":     flow(leave),
		"cd":       (*Shell).cd,
		"pwd": func(s *Shell, _ context.Context, _ []string, io3 stdio) result {
			fmt.Fprintln(io3.out, s.dir)
			return result{}
		},
		"export": (*Shell).export,
		"local":  (*Shell).localVar,
		"unset":  (*Shell).unset,
		"set":    (*Shell).set,
		"shift":  (*Shell).shift,
		"eval": func(s *Shell, ctx context.Context, args []string, io3 stdio) result {
			return s.source(ctx, strings.Join(args[1:], " "), io3)
		},
		".":      (*Shell).dot,
		"source": (*Shell).dot,
		"exec":   (*Shell).exec,
		"read":   (*Shell).read,
		"type":   (*Shell).typeOf,
		"wait": func(s *Shell, _ context.Context, _ []string, _ stdio) result {
			s.jobs.Wait()
			return result{}
		},
		"trap":  func(*Shell, context.Context, []string, stdio) result { return result{} },
		"umask": func(*Shell, context.Context, []string, stdio) result { return result{} },
	}
}

// IsBuiltin tells whether the shell itself knows a command.
func IsBuiltin(name string) bool { _, ok := builtins[name]; return ok }

// flow makes a builtin that leaves what it is in, with a number: a status, or
// how many loops.
func flow(kind control) builtin {
	return func(s *Shell, _ context.Context, args []string, io3 stdio) result {
		r := result{status: s.status, flow: kind, loops: 1}
		if len(args) > 1 {
			n, err := strconv.Atoi(args[1])
			if err != nil || n < 0 {
				return s.fail(io3, StatusMisuse, "%s: Illegal number: %s", args[0], args[1])
			}
			if kind == leave || kind == returnFunc {
				r.status = n & 0xff
			} else {
				r.loops = max(n, 1)
			}
		}
		if kind == breakLoop || kind == continueLoop {
			r.status = 0
		}
		return r
	}
}

func (s *Shell) cd(_ context.Context, args []string, io3 stdio) result {
	to := "/"
	if len(args) > 1 {
		to = args[1]
	}
	if to == "-" {
		to = s.vars["OLDPWD"]
	}
	dir := Abs(s.dir, to)
	if !s.host.IsDir(dir) {
		return s.fail(io3, StatusMisuse, "cd: can't cd to %s", to)
	}
	s.vars["OLDPWD"] = s.dir
	s.dir = dir
	return result{}
}

func (s *Shell) export(_ context.Context, args []string, io3 stdio) result {
	if len(args) == 1 || args[1] == "-p" {
		for _, line := range s.Environment() {
			name, value, _ := strings.Cut(line, "=")
			fmt.Fprintf(io3.out, "export %s=%s\n", name, Quote(value))
		}
		return result{}
	}
	for _, a := range args[1:] {
		name, value, has := strings.Cut(a, "=")
		if !isName(name) {
			return s.fail(io3, StatusMisuse, "export: %s: bad variable name", name)
		}
		if has {
			s.vars[name] = value
		}
		s.exported[name] = true
	}
	return result{}
}

// Quote makes a word that a shell reads as the string.
func Quote(v string) string { return "'" + strings.ReplaceAll(v, "'", `'\''`) + "'" }

func (s *Shell) localVar(_ context.Context, args []string, io3 stdio) result {
	if len(s.local) == 0 {
		return s.fail(io3, StatusMisuse, "local: not in a function")
	}
	for _, a := range args[1:] {
		name, value, has := strings.Cut(a, "=")
		if !isName(name) {
			return s.fail(io3, StatusMisuse, "local: %s: bad variable name", name)
		}
		s.makeLocal(name)
		if has {
			s.vars[name] = value
		}
	}
	return result{}
}

func (s *Shell) unset(_ context.Context, args []string, _ stdio) result {
	for _, name := range args[1:] {
		switch {
		case name == "-v" || name == "-f":
		case slices.Contains(args, "-f"):
			delete(s.funcs, name)
		default:
			delete(s.vars, name)
			delete(s.exported, name)
		}
	}
	return result{}
}

func (s *Shell) set(_ context.Context, args []string, io3 stdio) result {
	args = args[1:]
	for len(args) > 0 {
		a := args[0]
		if a == "--" {
			s.params = slices.Clone(args[1:])
			return result{}
		}
		if len(a) < 2 || a[0] != '-' && a[0] != '+' {
			s.params = slices.Clone(args)
			return result{}
		}
		on := a[0] == '-'
		for _, c := range a[1:] {
			switch c {
			case 'e':
				s.errexit = on
			case 'u':
				s.nounset = on
			case 'x':
				s.xtrace = on
			case 'o':
				if len(args) > 1 && args[1] == "pipefail" {
					return s.fail(io3, StatusMisuse, "set: illegal option -o pipefail")
				}
				args = args[min(1, len(args)-1):]
			case 'f', 'm', 'h', 'a', 'b', 'C', 'v', 'n':
			default:
				return s.fail(io3, StatusMisuse, "set: illegal option -%c", c)
			}
		}
		args = args[1:]
	}
	return result{}
}

func (s *Shell) shift(_ context.Context, args []string, io3 stdio) result {
	n := 1
	if len(args) > 1 {
		var err error
		if n, err = strconv.Atoi(args[1]); err != nil || n < 0 {
			return s.fail(io3, StatusMisuse, "shift: Illegal number: %s", args[1])
		}
	}
	if n > len(s.params) {
		return s.fail(io3, StatusMisuse, "shift: can't shift that many")
	}
	s.params = s.params[n:]
	return result{}
}

// source runs a script in this shell.
func (s *Shell) source(ctx context.Context, script string, io3 stdio) result {
	if s.depth > maxDepth {
		return s.fail(io3, StatusMisuse, "scripts too deep")
	}
	l, err := parse(script)
	if err != nil {
		return s.fail(io3, StatusMisuse, "%v", err)
	}
	s.depth++
	defer func() { s.depth-- }()
	return s.list(ctx, l, io3)
}

func (s *Shell) dot(ctx context.Context, args []string, io3 stdio) result {
	if len(args) < 2 {
		return s.fail(io3, StatusMisuse, ".: filename argument required")
	}
	text, err := ReadFile(s.host, Abs(s.dir, args[1]))
	if err != nil {
		return s.fail(io3, 1, ".: can't open '%s': %s", args[1], Strerror(err))
	}
	r := s.source(ctx, text, io3)
	if r.flow == returnFunc {
		r.flow = goOn
	}
	return r
}

// exec runs a command in the shell's place.
func (s *Shell) exec(ctx context.Context, args []string, io3 stdio) result {
	if len(args) == 1 {
		return result{} // redirections of the shell itself: they end with the command here
	}
	return result{status: s.command(ctx, args[1:], io3), flow: leave}
}

func (s *Shell) read(_ context.Context, args []string, io3 stdio) result {
	raw := false
	names := args[1:]
	for len(names) > 0 && strings.HasPrefix(names[0], "-") {
		raw = raw || strings.Contains(names[0], "r")
		names = names[1:]
	}
	var line string
	for {
		part, err := readLine(io3.in)
		whole := strings.HasSuffix(part, "\n")
		part = strings.TrimSuffix(part, "\n")
		if !raw && whole && strings.HasSuffix(part, `\`) {
			line += part[:len(part)-1]
			continue
		}
		line += part
		if err != nil && line == "" {
			for _, n := range names {
				s.vars[n] = ""
			}
			return result{status: 1}
		}
		s.assignFields(line, names, raw)
		return result{status: map[bool]int{true: 0, false: 1}[whole]}
	}
}

// assignFields gives each name a field and the last one the rest.
func (s *Shell) assignFields(line string, names []string, raw bool) {
	ifs, set := s.vars["IFS"]
	if !set {
		ifs = " \t\n"
	}
	blank := func(c byte) bool { return strings.IndexByte(ifs, c) >= 0 && strings.IndexByte(" \t\n", c) >= 0 }
	if !raw {
		line = unescape(line)
	}
	if len(names) == 0 {
		names = []string{"REPLY"}
	}
	for i, name := range names {
		for line != "" && blank(line[0]) {
			line = line[1:]
		}
		if i == len(names)-1 {
			for line != "" && blank(line[len(line)-1]) {
				line = line[:len(line)-1]
			}
			s.vars[name] = line
			return
		}
		end := strings.IndexAny(line, ifs)
		if end < 0 || ifs == "" {
			s.vars[name], line = line, ""
			continue
		}
		s.vars[name] = line[:end]
		line = line[end:]
		for line != "" && blank(line[0]) {
			line = line[1:]
		}
		if line != "" && strings.IndexByte(ifs, line[0]) >= 0 {
			line = line[1:]
		}
	}
}

func (s *Shell) typeOf(_ context.Context, args []string, io3 stdio) (r result) {
	for _, name := range args[1:] {
		switch {
		case s.funcs[name] != nil:
			fmt.Fprintf(io3.out, "%s is a function\n", name)
		case IsBuiltin(name):
			fmt.Fprintf(io3.out, "%s is a shell builtin\n", name)
		case s.Find(name) != nil:
			fmt.Fprintf(io3.out, "%s is %s\n", name, s.where(name))
		default:
			fmt.Fprintf(io3.err, "%s: not found\n", name)
			r.status = StatusNotFound
		}
	}
	return r
}

// where is a command's path.
func (s *Shell) where(name string) string {
	for _, dir := range []string{"/bin", "/sbin", "/usr/lib/vmware/bin"} {
		names, err := s.host.List(dir)
		if err == nil && slices.Contains(names, name) {
			return dir + "/" + name
		}
	}
	return name
}

// ReadFile reads a script's file.
func ReadFile(h Host, name string) (string, error) {
	f, err := h.Open(name, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var b strings.Builder
	buf := make([]byte, 32<<10)
	for b.Len() <= maxScript {
		n, err := f.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			break
		}
	}
	return b.String(), nil
}
