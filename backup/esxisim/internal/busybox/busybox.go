// Package busybox is the simulated host's file and text tools, with the options
// of ESXi's busybox that scripts use. An option it does not know is an error,
// as it is there; nothing is taken and silently ignored that would change the
// outcome.
package busybox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/shell"
)

// Options of the tools.
type Options struct {
	FS       *hostfs.FS
	Clock    func() time.Time
	Hostname string
	// Uname is what "uname -a" prints after the host's name.
	Release, Version, Machine string
	// Volumes are the rows of df.
	Volumes func() []Volume
	// SHA512 adds sha256sum's bigger sisters.
	SHA512 bool
	// Processes lists, Kill ends what runs in the background.
	Processes func() []Process
	Kill      func(pid int) bool
}

// Volume is one row of df.
type Volume struct {
	Type, Mount string
	Size, Free  int64 // bytes
}

// Process is one row of ps.
type Process struct {
	PID  int
	Line string
}

// Box is the tools.
type Box struct {
	o     Options
	fs    *hostfs.FS
	tools map[string]shell.Command
}

// New makes the tools.
func New(o Options) *Box {
	b := &Box{o: o, fs: o.FS}
	b.tools = map[string]shell.Command{
		"true":  func(context.Context, *shell.Proc) int { return 0 },
		"false": func(context.Context, *shell.Proc) int { return 1 },
		"sh":    b.sh, "ash": b.sh,
		"echo": echo, "printf": printf, "seq": seq, "expr": expr, "sleep": sleep, "usleep": sleep,
		"env": env, "nohup": nohup, "xargs": xargs, "basename": basename, "dirname": dirname,
		"test": b.test, "[": b.test,
		"cat": b.cat, "dd": b.dd, "tee": b.tee, "head": b.head, "tail": b.tail, "wc": b.wc, "cmp": b.cmp,
		"grep": b.grep, "egrep": b.grep, "fgrep": b.grep, "sed": b.sed, "cut": b.cut, "sort": b.sort, "uniq": b.uniq, "tr": tr,
		"md5sum": b.sum, "sha1sum": b.sum, "sha256sum": b.sum, "gzip": b.gzip, "gunzip": b.gzip, "zcat": b.gzip, "hexdump": b.hexdump,
		"ls": b.ls, "stat": b.stat, "find": b.find, "du": b.du, "df": b.df, "readlink": b.readlink, "realpath": b.readlink,
		"mkdir": b.mkdir, "rmdir": b.rmdir, "rm": b.rm, "mv": b.mv, "cp": b.cp, "touch": b.touch, "chmod": b.chmod, "sync": sync,
		"uname": b.uname, "date": b.date, "hostname": b.hostname, "id": id, "ps": b.ps, "kill": b.kill, "which": b.which,
	}
	if o.SHA512 {
		b.tools["sha512sum"] = b.sum
	}
	return b
}

// Names are the tools' names.
func (b *Box) Names() []string {
	var names []string
	for n := range b.tools {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// Find finds a tool by name; nil when there is none.
func (b *Box) Find(name string) shell.Command { return b.tools[name] }

// flags takes a command's options apart: letters of known without a colon
// stand alone, those with one take a value. Parsing ends at the first operand
// or at "--".
func flags(p *shell.Proc, known string) (opts map[byte][]string, rest []string, ok bool) {
	opts = map[byte][]string{}
	rest = p.Args[1:]
	for len(rest) > 0 {
		a := rest[0]
		if a == "--" {
			return opts, rest[1:], true
		}
		if len(a) < 2 || a[0] != '-' {
			break
		}
		rest = rest[1:]
		for i := 1; i < len(a); i++ {
			at := strings.IndexByte(known, a[i])
			if at < 0 || a[i] == ':' {
				p.Errorf("invalid option -- '%c'", a[i])
				return nil, nil, false
			}
			if at+1 >= len(known) || known[at+1] != ':' {
				opts[a[i]] = append(opts[a[i]], "")
				continue
			}
			value := a[i+1:]
			if value == "" {
				if len(rest) == 0 {
					p.Errorf("option requires an argument -- '%c'", a[i])
					return nil, nil, false
				}
				value, rest = rest[0], rest[1:]
			}
			opts[a[i]] = append(opts[a[i]], value)
			break
		}
	}
	return opts, rest, true
}

// last is an option's last value.
func last(opts map[byte][]string, c byte) string {
	if v := opts[c]; len(v) > 0 {
		return v[len(v)-1]
	}
	return ""
}

// inputs gives each named file, or standard input, to f. Its status is 1 when
// one of them could not be opened or read.
func (b *Box) inputs(p *shell.Proc, names []string, f func(name string, r io.Reader) error) (status int) {
	if len(names) == 0 {
		names = []string{"-"}
	}
	for _, name := range names {
		if name == "-" {
			if err := f("-", p.In); err != nil && !broken(err) {
				p.Errorf("%s", shell.Strerror(err))
				status = 1
			}
			continue
		}
		file, err := b.fs.Open(p.Path(name), os.O_RDONLY)
		if err != nil {
			p.Errorf("can't open '%s': %s", name, shell.Strerror(err))
			status = 1
			continue
		}
		if err := f(name, file); err != nil {
			if broken(err) {
				file.Close()
				return 141
			}
			p.Errorf("%s: %s", name, shell.Strerror(err))
			status = 1
		}
		file.Close()
	}
	return status
}

// broken tells that nobody reads what a command writes: it ends without a word,
// as a signal would end it.
func broken(err error) bool { return errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe) }

const copyStep = 256 << 10

// copyFile copies to the end, in steps that a cancelled context ends.
func copyFile(ctx context.Context, w io.Writer, r io.Reader) error {
	buf := make([]byte, copyStep)
	for {
		if err := ctx.Err(); err != nil {
			return syscall.EINTR
		}
		n, rerr := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

// sh runs a script: of -c, of a file, or as it comes.
func (b *Box) sh(ctx context.Context, p *shell.Proc) int {
	args := p.Args[1:]
	s := p.Shell.Fresh()
	s.SetName(path.Base(p.Args[0]))
	var setup string
	for len(args) > 0 && len(args[0]) > 1 && (args[0][0] == '-' || args[0][0] == '+') {
		a := args[0]
		args = args[1:]
		switch a {
		case "-c":
			if len(args) == 0 {
				p.Errorf("-c requires an argument")
				return shell.StatusMisuse
			}
			var params []string
			if len(args) > 1 {
				s.SetName(args[1])
				params = args[2:]
			}
			return s.Run(ctx, setup+args[0], p.In, p.Out, p.Err, params...)
		case "-s":
			return s.Interactive(ctx, p.In, p.Out, p.Err, nil, args...)
		case "--", "-l", "-i":
		default:
			setup += "set " + a + ";"
		}
	}
	if len(args) == 0 {
		return s.Interactive(ctx, p.In, p.Out, p.Err, nil)
	}
	text, err := b.fs.ReadFile(p.Path(args[0]), 4<<20)
	if err != nil {
		p.Errorf("can't open '%s': %s", args[0], shell.Strerror(err))
		return shell.StatusMisuse
	}
	s.SetName(args[0])
	return s.Run(ctx, setup+string(text), p.In, p.Out, p.Err, args[1:]...)
}

func env(ctx context.Context, p *shell.Proc) int {
	args := p.Args[1:]
	s := p.Shell.Sub()
	for len(args) > 0 {
		name, value, ok := strings.Cut(args[0], "=")
		if !ok {
			return s.Exec(ctx, p, args)
		}
		s.SetEnv(name, value)
		args = args[1:]
	}
	for _, line := range s.Environment() {
		fmt.Fprintln(p.Out, line)
	}
	return 0
}

func nohup(ctx context.Context, p *shell.Proc) int {
	if len(p.Args) < 2 {
		p.Errorf("no command")
		return 1
	}
	return p.Shell.Exec(ctx, p, p.Args[1:])
}

func xargs(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "0rn:")
	if !ok {
		return 1
	}
	if len(rest) == 0 {
		rest = []string{"echo"}
	}
	text, err := io.ReadAll(io.LimitReader(p.In, 16<<20))
	if err != nil {
		return 1
	}
	var words []string
	if opts['0'] != nil {
		words = strings.FieldsFunc(string(text), func(r rune) bool { return r == 0 })
	} else {
		words = strings.Fields(string(text))
	}
	if len(words) == 0 && opts['r'] != nil {
		return 0
	}
	step := max(len(words), 1)
	if v := last(opts, 'n'); v != "" {
		if _, err := fmt.Sscan(v, &step); err != nil || step < 1 {
			p.Errorf("invalid number '%s'", v)
			return 1
		}
	}
	status := 0
	sub := *p
	sub.In = strings.NewReader("")
	for i := 0; i == 0 || i < len(words); i += step {
		if p.Shell.Exec(ctx, &sub, slices.Concat(rest, words[i:min(i+step, len(words))])) != 0 {
			status = 123
		}
	}
	return status
}

func (b *Box) which(_ context.Context, p *shell.Proc) int {
	status := 0
	for _, name := range p.Args[1:] {
		found := ""
		for _, dir := range []string{"/bin", "/sbin"} {
			if i, err := b.fs.Stat(dir + "/" + name); err == nil && !i.IsDir() && found == "" {
				found = dir + "/" + name
			}
		}
		if found == "" {
			status = 1
			continue
		}
		fmt.Fprintln(p.Out, found)
	}
	return status
}

func (b *Box) ps(_ context.Context, p *shell.Proc) int {
	fmt.Fprintf(p.Out, "%-9s %-9s %s\n", "WID", "CID", "COMMAND")
	for _, pr := range b.o.Processes() {
		fmt.Fprintf(p.Out, "%-9d %-9d %s\n", pr.PID, pr.PID, pr.Line)
	}
	return 0
}

func (b *Box) kill(_ context.Context, p *shell.Proc) int {
	status := 0
	check := false
	for _, a := range p.Args[1:] {
		if strings.HasPrefix(a, "-") {
			check = check || a == "-0"
			continue
		}
		var pid int
		if _, err := fmt.Sscan(a, &pid); err != nil {
			p.Errorf("bad pid '%s'", a)
			status = 1
			continue
		}
		alive := slices.ContainsFunc(b.o.Processes(), func(pr Process) bool { return pr.PID == pid })
		if !alive || !check && !b.o.Kill(pid) {
			p.Errorf("can't kill pid %d: No such process", pid)
			status = 1
		}
	}
	return status
}

func (b *Box) uname(_ context.Context, p *shell.Proc) int {
	opts, _, ok := flags(p, "asnrvmo")
	if !ok {
		return 1
	}
	if len(opts) == 0 {
		opts['s'] = []string{""}
	}
	var out []string
	for _, f := range []struct {
		c byte
		v string
	}{{'s', "VMkernel"}, {'n', b.o.Hostname}, {'r', b.o.Release}, {'v', b.o.Version}, {'m', b.o.Machine}, {'o', "ESXi"}} {
		if opts[f.c] != nil || opts['a'] != nil {
			out = append(out, f.v)
		}
	}
	fmt.Fprintln(p.Out, strings.Join(out, " "))
	return 0
}

func (b *Box) hostname(_ context.Context, p *shell.Proc) int {
	name := b.o.Hostname
	if len(p.Args) > 1 && p.Args[1] == "-s" {
		name, _, _ = strings.Cut(name, ".")
	}
	fmt.Fprintln(p.Out, name)
	return 0
}

func id(_ context.Context, p *shell.Proc) int {
	fmt.Fprintln(p.Out, "uid=0(root) gid=0(root)")
	return 0
}

func sync(context.Context, *shell.Proc) int { return 0 }

// date prints the time, in UTC as ESXi does whatever the zone.
func (b *Box) date(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "u")
	_ = opts
	if !ok {
		return 1
	}
	now := b.o.Clock().UTC()
	if len(rest) == 0 {
		fmt.Fprintln(p.Out, now.Format("Mon Jan _2 15:04:05 UTC 2006"))
		return 0
	}
	if !strings.HasPrefix(rest[0], "+") {
		p.Errorf("invalid date '%s'", rest[0])
		return 1
	}
	var out strings.Builder
	format := rest[0][1:]
	for i := 0; i < len(format); i++ {
		if format[i] != '%' || i+1 >= len(format) {
			out.WriteByte(format[i])
			continue
		}
		i++
		layout, known := map[byte]string{
			'Y': "2006", 'm': "01", 'd': "02", 'H': "15", 'M': "04", 'S': "05", 'F': "2006-01-02", 'T': "15:04:05", 'y': "06",
			'b': "Jan", 'a': "Mon", 'B': "January", 'A': "Monday", 'Z': "MST", 'z': "-0700", 'R': "15:04", 'j': "002", 'p': "PM", 'I': "03",
		}[format[i]]
		switch {
		case known:
			out.WriteString(now.Format(layout))
		case format[i] == 's':
			fmt.Fprint(&out, now.Unix())
		case format[i] == '%':
			out.WriteByte('%')
		default:
			out.WriteByte('%')
			out.WriteByte(format[i])
		}
	}
	fmt.Fprintln(p.Out, out.String())
	return 0
}

// SetFS gives the tools their files, when these could only be made after them.
func (b *Box) SetFS(f *hostfs.FS) { b.fs = f }
