package busybox

import (
	"context"
	"fmt"
	"io"
	"path"
	"regexp"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/shell"
)

// basicRegexp turns a basic regular expression into Go's.
func basicRegexp(s string) string {
	var b strings.Builder
	inSet := false
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case inSet:
			inSet = c != ']' || strings.HasSuffix(b.String(), "[") || strings.HasSuffix(b.String(), "[^")
			if c == '\\' || c == '[' && (i+1 >= len(s) || s[i+1] != ':') {
				b.WriteByte('\\')
			}
			if c == '[' && i+1 < len(s) && s[i+1] == ':' {
				if class, _, ok := strings.Cut(s[i:], ":]"); ok {
					b.WriteString(class + ":]")
					i += len(class) + 1
					continue
				}
			}
			b.WriteByte(c)
		case c == '[':
			inSet = true
			b.WriteByte(c)
		case c == '\\' && i+1 < len(s):
			i++
			if !strings.ContainsRune("(){}|+?", rune(s[i])) {
				b.WriteByte('\\')
			}
			b.WriteByte(s[i])
		case strings.ContainsRune("(){}|+?", rune(c)), c == '*' && (i == 0 || s[:i] == "^"):
			b.WriteByte('\\')
			b.WriteByte(c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

func (b *Box) grep(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "EFivqclnohHswxre:m:A:B:")
	if !ok {
		return 2
	}
	if opts['r'] != nil {
		p.Errorf("-r is not there")
		return 2
	}
	patterns := opts['e']
	if patterns == nil {
		if len(rest) == 0 {
			p.Errorf("no pattern")
			return 2
		}
		patterns, rest = rest[:1], rest[1:]
	}
	var alternatives []string
	for _, pat := range patterns {
		for one := range strings.SplitSeq(pat, "\n") {
			switch {
			case opts['F'] != nil || path.Base(p.Args[0]) == "fgrep":
				one = regexp.QuoteMeta(one)
			case opts['E'] == nil && path.Base(p.Args[0]) != "egrep":
				one = basicRegexp(one)
			}
			if opts['w'] != nil {
				one = `\b(?:` + one + `)\b`
			}
			if opts['x'] != nil {
				one = "^(?:" + one + ")$"
			}
			alternatives = append(alternatives, "(?:"+one+")")
		}
	}
	flagText := "(?m)"
	if opts['i'] != nil {
		flagText = "(?mi)"
	}
	re, err := regexp.Compile(flagText + strings.Join(alternatives, "|"))
	if err != nil {
		p.Errorf("bad regex '%s'", patterns[0])
		return 2
	}
	number := func(c byte, otherwise int) int {
		if n, err := strconv.Atoi(last(opts, c)); err == nil {
			return n
		}
		return otherwise
	}
	most, after, before := number('m', -1), number('A', 0), number('B', 0)
	found := false
	bad := b.inputs(p, rest, func(name string, r io.Reader) error {
		prefix := ""
		if (len(rest) > 1 || opts['H'] != nil) && opts['h'] == nil {
			prefix = name + ":"
		}
		n, count, follow := 0, 0, 0
		var past []string
		err := lines(r, func(line string) bool {
			line = strings.TrimSuffix(line, "\n")
			n++
			hit := re.MatchString(line) != (opts['v'] != nil)
			if !hit {
				if follow > 0 {
					follow--
					fmt.Fprintln(p.Out, line)
				} else if past = append(past, line); len(past) > before {
					past = past[1:]
				}
				return true
			}
			found = true
			count++
			switch {
			case opts['q'] != nil, opts['l'] != nil:
				return false
			case opts['c'] != nil:
			case opts['o'] != nil:
				for _, m := range re.FindAllString(line, -1) {
					fmt.Fprintln(p.Out, prefix+m)
				}
			default:
				for _, l := range past {
					fmt.Fprintln(p.Out, l)
				}
				past, follow = nil, after
				if opts['n'] != nil {
					fmt.Fprintf(p.Out, "%s%d:%s\n", prefix, n, line)
				} else if _, err := fmt.Fprintln(p.Out, prefix+line); err != nil {
					return false
				}
			}
			return most < 0 || count < most
		})
		if opts['c'] != nil {
			fmt.Fprintf(p.Out, "%s%d\n", prefix, count)
		}
		if opts['l'] != nil && count > 0 {
			fmt.Fprintln(p.Out, name)
		}
		return err
	})
	switch {
	case found && opts['q'] != nil:
		return 0
	case bad != 0:
		return 2
	case found:
		return 0
	}
	return 1
}

// sedCommand is one command of a script: s, p, d or q, for lines that an address
// selects.
type sedCommand struct {
	from, to  string // addresses: "", a number, "$", or /re/
	negate    bool
	op        byte
	re        *regexp.Regexp
	with      string
	all, show bool
	active    bool // within from,to
}

// sed [-n] [-r|-E] [-e SCRIPT]… [SCRIPT] [FILE…] with s///, p, d, q
func (b *Box) sed(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "nrEe:")
	if !ok {
		return 1
	}
	scripts := opts['e']
	if scripts == nil {
		if len(rest) == 0 {
			p.Errorf("no script")
			return 1
		}
		scripts, rest = rest[:1], rest[1:]
	}
	var cmds []*sedCommand
	for _, s := range scripts {
		more, err := parseSed(s, opts['r'] != nil || opts['E'] != nil)
		if err != nil {
			p.Errorf("%v", err)
			return 1
		}
		cmds = append(cmds, more...)
	}
	n := 0
	var held string // one line behind, to know the last one
	have, stop := false, false
	run := func(line string, last bool) {
		n++
		end := ""
		if t, ok := strings.CutSuffix(line, "\n"); ok {
			line, end = t, "\n"
		}
		for _, c := range cmds {
			if c.selects(n, line, last) == c.negate {
				continue
			}
			switch c.op {
			case 'd':
				return
			case 'p':
				fmt.Fprint(p.Out, line, "\n")
			case 'q':
				stop = true
			case 's':
				changed := c.substitute(line)
				if changed != line && c.show {
					fmt.Fprint(p.Out, changed, "\n")
				}
				line = changed
			}
			if stop {
				break
			}
		}
		if opts['n'] == nil {
			fmt.Fprint(p.Out, line, end)
		}
	}
	status := b.inputs(p, rest, func(_ string, r io.Reader) error {
		return lines(r, func(line string) bool {
			if have {
				run(held, false)
			}
			held, have = line, true
			return !stop
		})
	})
	if have && !stop {
		run(held, true)
	}
	return status
}

func (c *sedCommand) substitute(line string) string {
	limit := 1
	if c.all {
		limit = -1
	}
	var out strings.Builder
	at := 0
	for _, m := range c.re.FindAllStringSubmatchIndex(line, limit) {
		out.WriteString(line[at:m[0]])
		for i := 0; i < len(c.with); i++ {
			switch ch := c.with[i]; {
			case ch == '&':
				out.WriteString(line[m[0]:m[1]])
			case ch == '\\' && i+1 < len(c.with):
				i++
				if d := int(c.with[i] - '0'); d >= 0 && d <= 9 {
					if 2*d+1 < len(m) && m[2*d] >= 0 {
						out.WriteString(line[m[2*d]:m[2*d+1]])
					}
				} else if c.with[i] == 'n' {
					out.WriteByte('\n')
				} else {
					out.WriteByte(c.with[i])
				}
			default:
				out.WriteByte(ch)
			}
		}
		at = m[1]
	}
	out.WriteString(line[at:])
	return out.String()
}

func (c *sedCommand) selects(n int, line string, last bool) bool {
	at := func(a string) bool {
		if strings.HasPrefix(a, "/") {
			ok, err := regexp.MatchString(a[1:], line)
			return err == nil && ok
		}
		return a == "$" && last || a == strconv.Itoa(n)
	}
	switch {
	case c.from == "":
		return true
	case c.to == "":
		return at(c.from)
	case c.active:
		c.active = !at(c.to)
		return true
	case at(c.from):
		c.active = !at(c.to)
		return true
	}
	return false
}

func parseSed(s string, extended bool) (cmds []*sedCommand, err error) {
	regex := func(t string) string {
		if extended {
			return t
		}
		return basicRegexp(t)
	}
	// until takes text up to a delimiter that is not escaped.
	until := func(d byte) (string, bool) {
		var b strings.Builder
		for i := 0; i < len(s); i++ {
			switch {
			case s[i] == '\\' && i+1 < len(s):
				if s[i+1] != d {
					b.WriteByte('\\')
				}
				i++
				b.WriteByte(s[i])
			case s[i] == d:
				s = s[i+1:]
				return b.String(), true
			default:
				b.WriteByte(s[i])
			}
		}
		return "", false
	}
	address := func() (string, error) {
		if strings.HasPrefix(s, "$") {
			s = s[1:]
			return "$", nil
		}
		if strings.HasPrefix(s, "/") {
			s = s[1:]
			text, ok := until('/')
			if !ok {
				return "", fmt.Errorf("unterminated address")
			}
			_, err := regexp.Compile(regex(text))
			return "/" + regex(text), err
		}
		n := 0
		for n < len(s) && s[n] >= '0' && s[n] <= '9' {
			n++
		}
		a := s[:n]
		s = s[n:]
		return a, nil
	}
	for {
		if s = strings.TrimLeft(s, " \t\n;"); s == "" {
			return cmds, nil
		}
		c := &sedCommand{}
		if c.from, err = address(); err != nil {
			return nil, err
		}
		if c.from != "" && strings.HasPrefix(s, ",") {
			s = s[1:]
			if c.to, err = address(); err != nil {
				return nil, err
			}
		}
		if s = strings.TrimLeft(s, " "); strings.HasPrefix(s, "!") {
			c.negate, s = true, s[1:]
		}
		if s == "" {
			return nil, fmt.Errorf("missing command")
		}
		c.op, s = s[0], s[1:]
		switch c.op {
		case 'p', 'd', 'q':
		case 's':
			if len(s) < 2 {
				return nil, fmt.Errorf("unmatched '/'")
			}
			d := s[0]
			s = s[1:]
			pat, ok1 := until(d)
			with, ok2 := until(d)
			if !ok1 || !ok2 {
				return nil, fmt.Errorf("unmatched '%c'", d)
			}
			c.with = with
			fold := ""
			for s != "" && strings.IndexByte("gpiI", s[0]) >= 0 {
				c.all, c.show = c.all || s[0] == 'g', c.show || s[0] == 'p'
				if s[0] == 'i' || s[0] == 'I' {
					fold = "(?i)"
				}
				s = s[1:]
			}
			if c.re, err = regexp.Compile(fold + regex(pat)); err != nil {
				return nil, fmt.Errorf("bad regex '%s'", pat)
			}
		default:
			return nil, fmt.Errorf("unsupported command %c", c.op)
		}
		cmds = append(cmds, c)
	}
}
