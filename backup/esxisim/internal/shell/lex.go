package shell

import (
	"fmt"
	"strings"
)

// word is a word's parts, one after the other.
type word []part

type part struct {
	text   string
	quoted bool // neither split nor a pattern
	kind   kind
	param  *param // of a parameter
	body   list   // of a command substitution
	arith  word   // of $(( ))
}

type kind int

const (
	literal kind = iota
	parameter
	substitution
	arithmetic
)

// param is ${name op word}.
type param struct {
	name   string
	length bool
	op     string // "", - = + ? with or without a colon before, # ## % %%
	arg    word
}

func isName(s string) bool {
	for i, c := range s {
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}

// word reads the next word; nil when there is an operator or the end.
func (p *parser) word() (word, error) {
	p.blanks()
	if p.at >= len(p.src) || strings.ContainsRune(";&|<>()\n", rune(p.src[p.at])) {
		return nil, nil
	}
	return p.wordHere()
}

// wordHere reads a word that begins right here, and may be empty.
func (p *parser) wordHere() (word, error) { return p.until(" \t\r\n;&|<>()", false) }

// until reads parts up to one of the characters, outside of quotes.
func (p *parser) until(stop string, inQuotes bool) (w word, err error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	w = word{}
	add := func(text string, quoted bool) {
		if n := len(w); n > 0 && w[n-1].kind == literal && w[n-1].quoted == quoted {
			w[n-1].text += text
			return
		}
		w = append(w, part{text: text, quoted: quoted})
	}
	for p.at < len(p.src) {
		c := p.src[p.at]
		if strings.IndexByte(stop, c) >= 0 {
			return w, nil
		}
		switch {
		case c == '\\':
			switch {
			case p.at+1 >= len(p.src):
				return nil, errIncomplete
			case p.src[p.at+1] == '\n':
			case inQuotes && !strings.ContainsRune("$`\"\\", rune(p.src[p.at+1])):
				add(p.src[p.at:p.at+2], true)
			default:
				add(p.src[p.at+1:p.at+2], true)
			}
			p.at += 2
		case c == '\'' && !inQuotes:
			end := strings.IndexByte(p.src[p.at+1:], '\'')
			if end < 0 {
				return nil, errIncomplete
			}
			add(p.src[p.at+1:p.at+1+end], true)
			p.at += end + 2
		case c == '"' && !inQuotes:
			p.at++
			inner, err := p.until("\"", true)
			if err != nil {
				return nil, err
			}
			if p.at >= len(p.src) {
				return nil, errIncomplete
			}
			p.at++
			if len(inner) == 0 {
				add("", true) // "" is a word too
			}
			w = append(w, inner...)
		case c == '$':
			pt, err := p.dollar()
			if err != nil {
				return nil, err
			}
			if pt.kind == literal {
				add(pt.text, inQuotes)
				continue
			}
			pt.quoted = inQuotes
			w = append(w, pt)
		case c == '`':
			pt, err := p.backquote()
			if err != nil {
				return nil, err
			}
			pt.quoted = inQuotes
			w = append(w, pt)
		default:
			add(p.src[p.at:p.at+1], inQuotes)
			p.at++
		}
	}
	if inQuotes || stop == "}" || stop == ")" {
		return nil, errIncomplete
	}
	return w, nil
}

// dollar reads what a dollar sign begins.
func (p *parser) dollar() (part, error) {
	rest := p.src[p.at+1:]
	switch {
	case strings.HasPrefix(rest, "(("):
		if pt, ok, err := p.arithmetic(); ok || err != nil {
			return pt, err
		}
		fallthrough
	case strings.HasPrefix(rest, "("):
		p.at += 2
		l, err := p.list()
		if err != nil {
			return part{}, err
		}
		if ok, err := p.takeOp(")"); !ok {
			if err != nil {
				return part{}, err
			}
			return part{}, p.unexpected()
		}
		return part{kind: substitution, body: l}, nil
	case strings.HasPrefix(rest, "{"):
		return p.braced()
	case rest == "":
		p.at++
		return part{text: "$"}, nil
	}
	if strings.ContainsRune("?$!#@*-0123456789", rune(rest[0])) {
		p.at += 2
		return part{kind: parameter, param: &param{name: rest[:1]}}, nil
	}
	n := 0
	for n < len(rest) && isName(rest[:n+1]) {
		n++
	}
	p.at += 1 + n
	if n == 0 {
		return part{text: "$"}, nil
	}
	return part{kind: parameter, param: &param{name: rest[:n]}}, nil
}

// arithmetic reads $(( … )); not ok when the parentheses do not close so.
func (p *parser) arithmetic() (pt part, ok bool, err error) {
	depth, at := 0, p.at+3
	for ; at < len(p.src); at++ {
		switch p.src[at] {
		case '(':
			depth++
			continue
		case ')':
			if depth > 0 {
				depth--
				continue
			}
			if !strings.HasPrefix(p.src[at:], "))") {
				return part{}, false, nil
			}
		default:
			continue
		}
		w, err := (&parser{src: p.src[p.at+3:at] + "\x00", depth: p.depth}).until("\x00", true)
		p.at = at + 2
		return part{kind: arithmetic, arith: w}, true, err
	}
	return part{}, false, errIncomplete
}

// braced reads ${ … }.
func (p *parser) braced() (part, error) {
	p.at += 2
	q := &param{}
	if strings.HasPrefix(p.src[p.at:], "#") && !strings.HasPrefix(p.src[p.at:], "#}") {
		q.length = true
		p.at++
	}
	n := 0
	for p.at+n < len(p.src) && isName(p.src[p.at:p.at+n+1]) {
		n++
	}
	if n == 0 {
		for p.at+n < len(p.src) && p.src[p.at+n] >= '0' && p.src[p.at+n] <= '9' {
			n++
		}
	}
	if n == 0 && p.at < len(p.src) && strings.ContainsRune("?$!#@*-", rune(p.src[p.at])) {
		n = 1
	}
	q.name = p.src[p.at : p.at+n]
	p.at += n
	if p.at >= len(p.src) {
		return part{}, errIncomplete
	}
	for _, op := range []string{":-", ":=", ":+", ":?", "##", "%%", "-", "=", "+", "?", "#", "%"} {
		if strings.HasPrefix(p.src[p.at:], op) {
			p.at += len(op)
			q.op = op
			arg, err := p.until("}", false)
			if err != nil {
				return part{}, err
			}
			q.arg = arg
			break
		}
	}
	if p.at >= len(p.src) {
		return part{}, errIncomplete
	}
	if q.name == "" || p.src[p.at] != '}' || q.length && q.op != "" {
		return part{}, fmt.Errorf("%w: bad substitution", errSyntax)
	}
	p.at++
	return part{kind: parameter, param: q}, nil
}

// backquote reads ` … `.
func (p *parser) backquote() (part, error) {
	var text strings.Builder
	for at := p.at + 1; at < len(p.src); at++ {
		switch c := p.src[at]; {
		case c == '`':
			p.at = at + 1
			inner := &parser{src: text.String(), depth: p.depth}
			l, err := inner.list()
			if err == nil && inner.at < len(inner.src) {
				err = inner.unexpected()
			}
			return part{kind: substitution, body: l}, err
		case c == '\\' && at+1 < len(p.src) && strings.ContainsRune("$`\\", rune(p.src[at+1])):
			at++
			text.WriteByte(p.src[at])
		default:
			text.WriteByte(c)
		}
	}
	return part{}, errIncomplete
}

// redir reads a redirection; nil when there is none.
func (p *parser) redir() (*redir, error) {
	p.blanks()
	n := 0
	for p.at+n < len(p.src) && p.src[p.at+n] >= '0' && p.src[p.at+n] <= '9' {
		n++
	}
	if n > 1 || p.at+n >= len(p.src) || p.src[p.at+n] != '<' && p.src[p.at+n] != '>' {
		return nil, nil
	}
	r := &redir{fd: -1}
	if n == 1 {
		r.fd = int(p.src[p.at] - '0')
		p.at++
	}
	r.op = p.peekOp()
	p.at += len(r.op)
	if r.fd < 0 {
		r.fd = 1
		if r.op[0] == '<' {
			r.fd = 0
		}
	}
	var err error
	if r.to, err = p.word(); err != nil {
		return nil, err
	}
	if r.to == nil {
		return nil, p.unexpected()
	}
	if strings.HasPrefix(r.op, "<<") {
		r.body = &word{}
		p.here = append(p.here, r)
	}
	return r, nil
}

// rehere keeps a pending here-document's place: the redirection was copied. The
// body is shared by all copies.
func (p *parser) rehere(r *redir) {
	for i, h := range p.here {
		if h.body == r.body && r.body != nil {
			p.here[i] = r
		}
	}
}

// hereBodies reads the here-documents of the line that has just ended.
func (p *parser) hereBodies() error {
	pending := p.here
	p.here = nil
	for _, r := range pending {
		end, quoted := "", false
		for _, pt := range r.to {
			end += pt.text
			quoted = quoted || pt.quoted
		}
		var text strings.Builder
		for {
			if p.at >= len(p.src) {
				return errIncomplete
			}
			line, _, whole := strings.Cut(p.src[p.at:], "\n")
			if r.op == "<<-" {
				p.at += len(line) - len(strings.TrimLeft(line, "\t"))
				line = strings.TrimLeft(line, "\t")
			}
			p.at += len(line)
			if whole {
				p.at++
			}
			if line == end {
				break
			}
			if !whole {
				return errIncomplete
			}
			text.WriteString(line + "\n")
		}
		if quoted {
			*r.body = word{{text: text.String(), quoted: true}}
			continue
		}
		w, err := (&parser{src: text.String() + "\x00", depth: p.depth}).until("\x00", true)
		if err != nil {
			return err
		}
		*r.body = w
	}
	return nil
}
