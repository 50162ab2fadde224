package busybox

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

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
