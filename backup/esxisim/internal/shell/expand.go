package shell

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// run of an expanded word: text, and whether it was quoted.
type span struct {
	text    string
	quoted  bool
	literal bool // it stands in the script itself: not split
	cut     bool // a new field begins before it ("$@")
}

// spans expands a word's parts, without splitting or patterns.
func (s *Shell) spans(ctx context.Context, w word, io3 stdio) (out []span, err error) {
	for i, pt := range w {
		switch pt.kind {
		case literal:
			text := pt.text
			if i == 0 && !pt.quoted && (text == "~" || strings.HasPrefix(text, "~/")) {
				text = "/" + strings.TrimPrefix(text[1:], "/") // root's home
			}
			out = append(out, span{text: text, quoted: pt.quoted, literal: true})
		case substitution:
			text, err := s.capture(ctx, pt.body, io3)
			if err != nil {
				return nil, err
			}
			out = append(out, span{text: text, quoted: pt.quoted})
		case arithmetic:
			text, err := s.text(ctx, pt.arith, io3)
			if err != nil {
				return nil, err
			}
			n, err := s.calculate(text)
			if err != nil {
				return nil, err
			}
			out = append(out, span{text: strconv.FormatInt(n, 10), quoted: pt.quoted})
		case parameter:
			list, err := s.parameter(ctx, pt, io3)
			if err != nil {
				return nil, err
			}
			out = append(out, list...)
		}
	}
	return out, nil
}

// lookup is a parameter's value.
func (s *Shell) lookup(name string) (string, bool) {
	switch name {
	case "?":
		return strconv.Itoa(s.status), true
	case "$":
		return strconv.Itoa(s.pid), true
	case "!":
		return strconv.Itoa(s.last), s.last != 0
	case "#":
		return strconv.Itoa(len(s.params)), true
	case "-":
		return "", true
	case "0":
		return s.name, true
	case "@", "*":
		return strings.Join(s.params, " "), len(s.params) > 0
	case "PWD":
		return s.dir, true
	}
	if n, err := strconv.Atoi(name); err == nil {
		if n > len(s.params) {
			return "", false
		}
		return s.params[n-1], true
	}
	v, ok := s.vars[name]
	return v, ok
}

func (s *Shell) parameter(ctx context.Context, pt part, io3 stdio) ([]span, error) {
	q := pt.param
	one := func(text string) []span { return []span{{text: text, quoted: pt.quoted}} }
	if q.name == "@" && q.op == "" && !q.length && pt.quoted {
		var out []span
		for i, v := range s.params {
			out = append(out, span{text: v, quoted: true, cut: i > 0})
		}
		if out == nil {
			out = []span{{cut: true}} // no field at all
		}
		return out, nil
	}
	value, set := s.lookup(q.name)
	if q.length {
		return one(strconv.Itoa(len([]rune(value)))), nil
	}
	if !set && s.nounset && q.op == "" && q.name != "@" && q.name != "*" {
		return nil, fmt.Errorf("%s: parameter not set", q.name)
	}
	op, colon := strings.CutPrefix(q.op, ":")
	missing := !set || colon && value == ""
	switch op {
	case "":
		return one(value), nil
	case "-", "=", "+", "?":
		if missing == (op == "+") {
			if op == "+" {
				return nil, nil
			}
			return one(value), nil
		}
		switch op {
		case "=", "?":
			text, err := s.text(ctx, q.arg, io3)
			if err != nil {
				return nil, err
			}
			if op == "?" {
				if text == "" {
					text = "parameter not set"
				}
				return nil, fmt.Errorf("%s: %s", q.name, text)
			}
			if !isName(q.name) {
				return nil, fmt.Errorf("%s: bad variable name", q.name)
			}
			s.vars[q.name] = text
			return one(text), nil
		}
		list, err := s.spans(ctx, q.arg, io3)
		for i := range list {
			list[i].quoted = list[i].quoted || pt.quoted
			list[i].literal = false
		}
		return list, err
	}
	pat, err := s.pattern(ctx, q.arg, io3)
	if err != nil {
		return nil, err
	}
	return one(trim(value, pat, op)), nil
}

// trim takes a match of a pattern off a value's beginning (#) or end (%), the
// shortest or (doubled) the longest.
func trim(value, pat, op string) string {
	r := []rune(value)
	for k := range len(r) + 1 {
		n := k
		if len(op) == 2 {
			n = len(r) - k
		}
		if op[0] == '#' && Match(pat, string(r[:n])) {
			return string(r[n:])
		}
		if op[0] == '%' && Match(pat, string(r[len(r)-n:])) {
			return string(r[:len(r)-n])
		}
	}
	return value
}

// text expands a word into one string.
func (s *Shell) text(ctx context.Context, w word, io3 stdio) (string, error) {
	list, err := s.spans(ctx, w, io3)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, sp := range list {
		if sp.cut && b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(sp.text)
	}
	return b.String(), nil
}

// pattern expands a word into a pattern, what was quoted matching itself.
func (s *Shell) pattern(ctx context.Context, w word, io3 stdio) (string, error) {
	list, err := s.spans(ctx, w, io3)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, sp := range list {
		b.WriteString(sp.pattern())
	}
	return b.String(), nil
}

func (sp span) pattern() string {
	if !sp.quoted {
		return sp.text
	}
	return escapePattern(sp.text)
}

func escapePattern(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// field is one word of a command while it is put together.
type field struct {
	text, pat strings.Builder
	magic     bool // a pattern's character stands unquoted in it
	any       bool // it is a word even when empty
}

// fields expands words, splits what was not quoted, and matches files.
func (s *Shell) fields(ctx context.Context, words []word, io3 stdio) ([]string, error) {
	var out []string
	for _, w := range words {
		list, err := s.spans(ctx, w, io3)
		if err != nil {
			return nil, err
		}
		for _, f := range s.split(list) {
			if f.magic {
				if names := s.glob(f.pat.String()); len(names) > 0 {
					out = append(out, names...)
					continue
				}
			}
			out = append(out, f.text.String())
		}
	}
	return out, nil
}

func (s *Shell) split(list []span) (fields []*field) {
	ifs, set := s.vars["IFS"]
	if !set {
		ifs = " \t\n"
	}
	cur := &field{}
	end := func() {
		if cur.any || cur.text.Len() > 0 {
			fields = append(fields, cur)
		}
		cur = &field{}
	}
	for _, sp := range list {
		if sp.cut {
			if sp.text == "" && !sp.quoted {
				continue
			}
			end()
		}
		if sp.quoted {
			cur.any = true
			cur.text.WriteString(sp.text)
			cur.pat.WriteString(escapePattern(sp.text))
			continue
		}
		for _, c := range sp.text {
			if strings.ContainsRune(ifs, c) && !sp.literal {
				if !strings.ContainsRune(" \t\n", c) {
					cur.any = true
				}
				end()
				continue
			}
			cur.magic = cur.magic || strings.ContainsRune("*?[", c)
			cur.text.WriteRune(c)
			cur.pat.WriteRune(c)
		}
	}
	end()
	return fields
}

// glob is the files that match a pattern, sorted.
func (s *Shell) glob(pat string) []string {
	found := []string{""}
	if strings.HasPrefix(pat, "/") {
		found = []string{"/"}
	}
	for _, elem := range strings.Split(strings.Trim(pat, "/"), "/") {
		var next []string
		for _, base := range found {
			if !strings.ContainsAny(elem, "*?[") {
				next = append(next, base+unescape(elem)+"/")
				continue
			}
			names, err := s.host.List(Abs(s.dir, base))
			if err != nil {
				continue
			}
			for _, n := range names {
				if strings.HasPrefix(n, ".") && !strings.HasPrefix(elem, ".") || !Match(elem, n) {
					continue
				}
				next = append(next, base+n+"/")
			}
		}
		found = next
		if len(found) > 1<<16 {
			return nil
		}
	}
	var out []string
	for _, f := range found {
		f = strings.TrimSuffix(f, "/")
		dir, name := ".", f
		if i := strings.LastIndexByte(f, '/'); i >= 0 {
			dir, name = f[:i+1], f[i+1:]
		}
		names, err := s.host.List(Abs(s.dir, dir))
		if err == nil && slices.Contains(names, name) {
			out = append(out, f)
		}
	}
	slices.Sort(out)
	return out
}

func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Match tells whether a shell pattern matches the whole of a string. Its time
// is at most the product of both lengths.
func Match(pat, s string) bool {
	p, r := []rune(pat), []rune(s)
	i, j := 0, 0
	star, mark := -1, 0
	for j < len(r) {
		if i < len(p) && p[i] == '*' {
			star, mark = i, j
			i++
			continue
		}
		if n, ok := matchOne(p[i:], r[j]); ok {
			i += n
			j++
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		i, j = star+1, mark
	}
	for i < len(p) && p[i] == '*' {
		i++
	}
	return i == len(p)
}

// matchOne matches one character with the pattern's first element.
func matchOne(p []rune, c rune) (n int, ok bool) {
	if len(p) == 0 {
		return 0, false
	}
	switch p[0] {
	case '?':
		return 1, true
	case '\\':
		if len(p) > 1 {
			return 2, p[1] == c
		}
	case '[':
		if n, ok, good := matchSet(p, c); good {
			return n, ok
		}
	}
	return 1, p[0] == c
}

// matchSet matches [a-z]; not good when there is no closing bracket.
func matchSet(p []rune, c rune) (n int, ok, good bool) {
	i := 1
	negate := i < len(p) && (p[i] == '!' || p[i] == '^')
	if negate {
		i++
	}
	for first := true; i < len(p); first = false {
		if p[i] == ']' && !first {
			return i + 1, ok != negate, true
		}
		if rest := string(p[i:min(i+12, len(p))]); strings.HasPrefix(rest, "[:") {
			if class, _, found := strings.Cut(rest[2:], ":]"); found {
				ok = ok || inClass(class, c)
				i += len(class) + 4
				continue
			}
		}
		lo := p[i]
		if lo == '\\' && i+1 < len(p) {
			i++
			lo = p[i]
		}
		hi := lo
		if i+2 < len(p) && p[i+1] == '-' && p[i+2] != ']' {
			hi = p[i+2]
			i += 2
		}
		ok = ok || lo <= c && c <= hi
		i++
	}
	return 0, false, false
}

func inClass(class string, c rune) bool {
	digit, lower, upper := c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z'
	switch class {
	case "digit":
		return digit
	case "alpha":
		return lower || upper
	case "alnum":
		return lower || upper || digit
	case "lower":
		return lower
	case "upper":
		return upper
	case "space":
		return strings.ContainsRune(" \t\n\r\v\f", c)
	}
	return false
}
