package busybox

import (
	"context"
	"fmt"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/shell"
)

func echo(_ context.Context, p *shell.Proc) int {
	args := p.Args[1:]
	end, escapes := "\n", false
	for len(args) > 0 && len(args[0]) > 1 && strings.Trim(args[0], "neE") == "-" && args[0][0] == '-' {
		for _, c := range args[0][1:] {
			switch c {
			case 'n':
				end = ""
			case 'e':
				escapes = true
			case 'E':
				escapes = false
			}
		}
		args = args[1:]
	}
	text := strings.Join(args, " ")
	if escapes {
		var stop bool
		if text, stop = unescape(text, false); stop {
			end = ""
		}
	}
	if _, err := fmt.Fprint(p.Out, text+end); err != nil {
		return 1
	}
	return 0
}

// unescape reads the backslash sequences of echo -e, or of printf's format. It
// stops at \c.
func unescape(s string, format bool) (text string, stop bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+1 >= len(s) {
			b.WriteByte(s[i])
			continue
		}
		i++
		if c, ok := map[byte]byte{'n': '\n', 't': '\t', 'r': '\r', '\\': '\\', 'a': 7, 'b': 8, 'f': 12, 'v': 11, '"': '"'}[s[i]]; ok {
			b.WriteByte(c)
			continue
		}
		switch {
		case s[i] == 'c':
			return b.String(), true
		case s[i] == 'x' || s[i] >= '0' && s[i] <= '7':
			base, digits, most := 8, "01234567", 3
			if s[i] == 'x' {
				base, digits, most = 16, "0123456789abcdefABCDEF", 2
				i++
			} else if s[i] == '0' && !format {
				i++
			}
			n := 0
			for n < most && i+n < len(s) && strings.IndexByte(digits, s[i+n]) >= 0 {
				n++
			}
			v, err := strconv.ParseUint("0"+s[i:i+n], base, 16)
			if err == nil {
				b.WriteByte(byte(v))
			}
			i += n - 1
		default:
			b.WriteByte('\\')
			b.WriteByte(s[i])
		}
	}
	return b.String(), false
}

var conversion = regexp.MustCompile(`^%([-+ #0]*)(\d{0,4})(\.\d{0,4})?([diouxXcsbq%])`)

func printf(_ context.Context, p *shell.Proc) int {
	if len(p.Args) < 2 {
		p.Errorf("missing format")
		return 1
	}
	format, args := p.Args[1], p.Args[2:]
	status := 0
	var out strings.Builder
	for first := true; first || len(args) > 0; first = false {
		used := false
		for rest := format; rest != ""; {
			at := strings.IndexByte(rest, '%')
			if at < 0 {
				at = len(rest)
			}
			text, stop := unescape(rest[:at], true)
			out.WriteString(text)
			if stop {
				fmt.Fprint(p.Out, out.String())
				return status
			}
			if rest = rest[at:]; rest == "" {
				break
			}
			m := conversion.FindStringSubmatch(rest)
			if m == nil {
				p.Errorf("%s: invalid format", rest)
				return 1
			}
			rest = rest[len(m[0]):]
			if m[4] == "%" {
				out.WriteByte('%')
				continue
			}
			arg := ""
			if len(args) > 0 {
				arg, args = args[0], args[1:]
			}
			used = true
			spec := "%" + m[1] + m[2] + m[3]
			switch m[4] {
			case "s":
				fmt.Fprintf(&out, spec+"s", arg)
			case "b":
				text, _ := unescape(arg, false)
				fmt.Fprintf(&out, spec+"s", text)
			case "q":
				out.WriteString(shell.Quote(arg))
			case "c":
				out.WriteString(arg[:min(1, len(arg))])
			default:
				n, err := strconv.ParseInt(arg, 0, 64)
				if err != nil && arg != "" {
					p.Errorf("invalid number '%s'", arg)
					status = 1
				}
				verb := map[string]string{"i": "d", "u": "d"}[m[4]]
				if verb == "" {
					verb = m[4]
				}
				fmt.Fprintf(&out, spec+verb, n)
			}
		}
		if !used {
			break
		}
	}
	if _, err := fmt.Fprint(p.Out, out.String()); err != nil {
		return 1
	}
	return status
}

func seq(ctx context.Context, p *shell.Proc) int {
	n := []int64{1, 1, 1} // first, step, last
	for i, a := range p.Args[1:] {
		v, err := strconv.ParseInt(a, 10, 64)
		if err != nil || i > 2 {
			p.Errorf("invalid number '%s'", a)
			return 1
		}
		switch {
		case len(p.Args) == 2:
			n[2] = v
		case len(p.Args) == 3:
			n[2*i] = v
		default:
			n[i] = v
		}
	}
	for i := n[0]; n[1] > 0 && i <= n[2] || n[1] < 0 && i >= n[2]; i += n[1] {
		if _, err := fmt.Fprintln(p.Out, i); err != nil || ctx.Err() != nil {
			return 1
		}
	}
	return 0
}

// expr knows two operands with one operator.
func expr(_ context.Context, p *shell.Proc) int {
	a := p.Args[1:]
	if len(a) == 1 {
		fmt.Fprintln(p.Out, a[0])
		return 0
	}
	if len(a) != 3 {
		p.Errorf("syntax error")
		return 2
	}
	x, err1 := strconv.ParseInt(a[0], 10, 64)
	y, err2 := strconv.ParseInt(a[2], 10, 64)
	truth := map[bool]int64{true: 1}
	var n int64
	switch a[1] {
	case "=", "!=":
		n = truth[(a[0] == a[2]) == (a[1] == "=")]
	case ":":
		re, err := regexp.Compile("^(?:" + basicRegexp(a[2]) + ")")
		if err != nil {
			p.Errorf("bad regex")
			return 2
		}
		m := re.FindStringSubmatch(a[0])
		if len(m) > 1 {
			fmt.Fprintln(p.Out, m[1])
			return 0
		}
		if m != nil {
			n = int64(len(m[0]))
		}
	default:
		if err1 != nil || err2 != nil {
			p.Errorf("non-numeric argument")
			return 2
		}
		switch a[1] {
		case "+":
			n = x + y
		case "-":
			n = x - y
		case "*":
			n = x * y
		case "/", "%":
			if y == 0 {
				p.Errorf("division by zero")
				return 2
			}
			if n = x / y; a[1] == "%" {
				n = x % y
			}
		case "<":
			n = truth[x < y]
		case "<=":
			n = truth[x <= y]
		case ">":
			n = truth[x > y]
		case ">=":
			n = truth[x >= y]
		default:
			p.Errorf("syntax error")
			return 2
		}
	}
	fmt.Fprintln(p.Out, n)
	if n == 0 {
		return 1
	}
	return 0
}

func sleep(ctx context.Context, p *shell.Proc) int {
	var total time.Duration
	for _, a := range p.Args[1:] {
		unit := time.Second
		if path.Base(p.Args[0]) == "usleep" {
			unit = time.Microsecond
		}
		for suffix, u := range map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour} {
			if rest, ok := strings.CutSuffix(a, suffix); ok {
				a, unit = rest, u
			}
		}
		n, err := strconv.ParseFloat(a, 64)
		if err != nil || n < 0 || n > 1e7 {
			p.Errorf("invalid number '%s'", a)
			return 1
		}
		total += time.Duration(n * float64(unit))
	}
	t := time.NewTimer(total)
	defer t.Stop()
	select {
	case <-t.C:
		return 0
	case <-ctx.Done():
		return shell.StatusKilled
	}
}

func basename(_ context.Context, p *shell.Proc) int {
	if len(p.Args) < 2 {
		return 1
	}
	name := path.Base(p.Args[1])
	if len(p.Args) > 2 && name != p.Args[2] {
		name = strings.TrimSuffix(name, p.Args[2])
	}
	fmt.Fprintln(p.Out, name)
	return 0
}

func dirname(_ context.Context, p *shell.Proc) int {
	if len(p.Args) < 2 {
		return 1
	}
	fmt.Fprintln(p.Out, path.Dir(strings.TrimRight(p.Args[1], "/")+map[bool]string{true: "/", false: ""}[strings.Trim(p.Args[1], "/") == ""]))
	return 0
}

// test is test and [.
func (b *Box) test(_ context.Context, p *shell.Proc) int {
	args := p.Args[1:]
	if path.Base(p.Args[0]) == "[" {
		if len(args) == 0 || args[len(args)-1] != "]" {
			p.Errorf("missing ]")
			return 2
		}
		args = args[:len(args)-1]
	}
	t := &tester{b: b, p: p, args: args}
	ok := len(args) > 0 && t.or()
	if t.err == "" && t.at < len(args) {
		t.err = args[t.at] + ": unknown operand"
	}
	switch {
	case t.err != "":
		p.Errorf("%s", t.err)
		return 2
	case ok:
		return 0
	}
	return 1
}

type tester struct {
	b    *Box
	p    *shell.Proc
	args []string
	at   int
	err  string
}

func (t *tester) peek(n int) string {
	if t.at+n < len(t.args) {
		return t.args[t.at+n]
	}
	return ""
}

func (t *tester) or() bool {
	ok := t.and()
	for t.err == "" && t.peek(0) == "-o" {
		t.at++
		right := t.and()
		ok = ok || right
	}
	return ok
}

func (t *tester) and() bool {
	ok := t.not()
	for t.err == "" && t.peek(0) == "-a" {
		t.at++
		right := t.not()
		ok = ok && right
	}
	return ok
}

var binaryTests = map[string]bool{
	"=": true, "==": true, "!=": true, "-eq": true, "-ne": true, "-lt": true, "-le": true, "-gt": true, "-ge": true, "-nt": true, "-ot": true, "-ef": true,
}

func (t *tester) not() bool {
	left := len(t.args) - t.at
	if left <= 0 {
		t.err = "argument expected"
		return false
	}
	a := t.args[t.at]
	if left >= 3 && binaryTests[t.args[t.at+1]] {
		t.at += 3
		return t.binary(a, t.args[t.at-2], t.args[t.at-1])
	}
	switch {
	case a == "!" && left > 1:
		t.at++
		return !t.not()
	case a == "(" && left > 2:
		t.at++
		ok := t.or()
		if t.err == "" && t.peek(0) != ")" {
			t.err = "closing paren expected"
		}
		t.at++
		return ok
	case len(a) == 2 && a[0] == '-' && left > 1:
		t.at += 2
		return t.unary(a[1], t.args[t.at-1])
	}
	t.at++
	return a != ""
}

func (t *tester) unary(op byte, arg string) bool {
	switch op {
	case 'n':
		return arg != ""
	case 'z':
		return arg == ""
	case 't':
		return false
	}
	name := t.p.Path(arg)
	i, err := t.b.fs.Stat(name)
	switch op {
	case 'h', 'L':
		i, err = t.b.fs.Lstat(name)
		return err == nil && i.Link != ""
	case 'e', 'r', 'w':
		return err == nil && arg != ""
	case 'f':
		return err == nil && i.Mode.IsRegular()
	case 'd':
		return err == nil && i.IsDir()
	case 's':
		return err == nil && i.Size > 0
	case 'x':
		return err == nil && (i.Mode&0o111 != 0 || i.IsDir())
	case 'c':
		return err == nil && i.Mode&os.ModeCharDevice != 0
	case 'b', 'p', 'S', 'u', 'g', 'k':
		return false
	}
	t.err = fmt.Sprintf("-%c: unknown operand", op)
	return false
}

func (t *tester) binary(a, op, b string) bool {
	switch op {
	case "=", "==":
		return a == b
	case "!=":
		return a != b
	case "-nt", "-ot", "-ef":
		x, err1 := t.b.fs.Stat(t.p.Path(a))
		y, err2 := t.b.fs.Stat(t.p.Path(b))
		switch {
		case op == "-ef":
			p, _ := t.b.fs.RealPath(t.p.Path(a))
			q, _ := t.b.fs.RealPath(t.p.Path(b))
			return err1 == nil && p == q
		case op == "-nt":
			return err1 == nil && (err2 != nil || x.ModTime.After(y.ModTime))
		}
		return err2 == nil && (err1 != nil || x.ModTime.Before(y.ModTime))
	}
	x, err := strconv.ParseInt(strings.TrimSpace(a), 10, 64)
	if err != nil {
		t.err = a + ": bad number"
		return false
	}
	y, err := strconv.ParseInt(strings.TrimSpace(b), 10, 64)
	if err != nil {
		t.err = b + ": bad number"
		return false
	}
	return map[string]bool{"-eq": x == y, "-ne": x != y, "-lt": x < y, "-le": x <= y, "-gt": x > y, "-ge": x >= y}[op]
}

// find [PATH…] [-maxdepth N] [-type f|d] [-name P] [-iname P] [-size …] [-print|-print0|-delete]
func (b *Box) find(ctx context.Context, p *shell.Proc) int {
	args := p.Args[1:]
	var roots []string
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") && args[0] != "!" && args[0] != "(" {
		roots, args = append(roots, args[0]), args[1:]
	}
	if len(roots) == 0 {
		roots = []string{"."}
	}
	q := finder{most: -1, end: "\n"}
	for i := 0; i < len(args); i++ {
		value := ""
		if i+1 < len(args) {
			value = args[i+1]
		}
		switch args[i] {
		case "-print":
		case "-print0":
			q.end = "\x00"
		case "-maxdepth", "-mindepth":
			n, err := strconv.Atoi(value)
			if err != nil {
				p.Errorf("invalid number '%s'", value)
				return 1
			}
			if args[i] == "-maxdepth" {
				q.most = n
			} else {
				q.least = n
			}
			i++
		case "-type", "-name", "-iname":
			q.tests = append(q.tests, [2]string{args[i], value})
			i++
		default:
			p.Errorf("unrecognized: %s", args[i])
			return 1
		}
	}
	status := 0
	for _, r := range roots {
		i, err := b.fs.Lstat(p.Path(r))
		if strings.HasSuffix(r, "/") {
			i, err = b.fs.Stat(p.Path(r))
		}
		if err != nil {
			p.Errorf("%s: %s", r, shell.Strerror(err))
			status = 1
			continue
		}
		b.walk(ctx, p, &q, r, i, 0)
	}
	return status
}

type finder struct {
	most, least int
	tests       [][2]string
	end         string
}

func (q *finder) matches(i hostfs.Info) bool {
	for _, t := range q.tests {
		ok := false
		switch t[0] {
		case "-type":
			ok = map[string]bool{"f": i.Mode.IsRegular(), "d": i.IsDir(), "l": i.Link != ""}[t[1]]
		case "-name":
			ok = shell.Match(t[1], path.Base(i.Name))
		case "-iname":
			ok = shell.Match(strings.ToLower(t[1]), strings.ToLower(path.Base(i.Name)))
		}
		if !ok {
			return false
		}
	}
	return true
}

func (b *Box) walk(ctx context.Context, p *shell.Proc, q *finder, name string, i hostfs.Info, depth int) {
	if ctx.Err() != nil {
		return
	}
	if depth >= q.least && q.matches(i) {
		fmt.Fprint(p.Out, name, q.end)
	}
	if !i.IsDir() || q.most >= 0 && depth >= q.most {
		return
	}
	list, err := b.fs.List(p.Path(name))
	if err != nil {
		p.Errorf("%s: %s", name, shell.Strerror(err))
		return
	}
	for _, in := range list {
		b.walk(ctx, p, q, strings.TrimSuffix(name, "/")+"/"+in.Name, in, depth+1)
	}
}

// du, in KiB
func (b *Box) du(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "sakhmc")
	if !ok {
		return 1
	}
	if len(rest) == 0 {
		rest = []string{"."}
	}
	show := func(n int64, name string) {
		size := strconv.FormatInt((n+1023)/1024, 10)
		switch {
		case opts['h'] != nil:
			size = short(n)
		case opts['m'] != nil:
			size = strconv.FormatInt((n+1<<20-1)>>20, 10)
		}
		fmt.Fprintf(p.Out, "%s\t%s\n", size, name)
	}
	status := 0
	var add func(name string, i hostfs.Info, top bool) int64
	add = func(name string, i hostfs.Info, top bool) int64 {
		sum := i.Used
		if i.IsDir() && ctx.Err() == nil {
			list, err := b.fs.List(p.Path(name))
			if err != nil {
				p.Errorf("%s: %s", name, shell.Strerror(err))
				status = 1
			}
			for _, in := range list {
				sum += add(strings.TrimSuffix(name, "/")+"/"+in.Name, in, false)
			}
		}
		if top || opts['s'] == nil && i.IsDir() || opts['a'] != nil {
			show(sum, name)
		}
		return sum
	}
	for _, name := range rest {
		i, err := b.fs.Stat(p.Path(name))
		if err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			status = 1
			continue
		}
		add(name, i, true)
	}
	return status
}

// df as ESXi's own prints it
func (b *Box) df(_ context.Context, p *shell.Proc) int {
	opts, _, ok := flags(p, "hkmi")
	if !ok {
		return 1
	}
	size := func(n int64) string {
		switch {
		case opts['h'] != nil:
			return short(n)
		case opts['k'] != nil:
			return strconv.FormatInt(n>>10, 10)
		case opts['m'] != nil:
			return strconv.FormatInt(n>>20, 10)
		}
		return strconv.FormatInt(n, 10)
	}
	fmt.Fprintf(p.Out, "%-10s %14s %14s %14s %4s %s\n", "Filesystem", "Size", "Used", "Available", "Use%", "Mounted on")
	for _, v := range b.o.Volumes() {
		used := v.Size - v.Free
		fmt.Fprintf(p.Out, "%-10s %14s %14s %14s %3d%% %s\n", v.Type, size(v.Size), size(used), size(v.Free), used*100/max(v.Size, 1), v.Mount)
	}
	return 0
}
