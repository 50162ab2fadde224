package shell

import (
	"errors"
	"fmt"
	"strings"
)

// maxScript bounds a script, in bytes.
const maxScript = 4 << 20

// maxNesting bounds constructs within each other.
const maxNesting = 200

var (
	// errSyntax means a script that is wrong.
	errSyntax = errors.New("syntax error")
	// errIncomplete means a script that ends in the middle.
	errIncomplete = errors.New("syntax error: unexpected end of file")
)

// node is a command that can be run.
type node any

type (
	// list runs one after the other.
	list []item
	item struct {
		node       node
		background bool
		text       string // of a background command, for ps
	}
	// andOr runs the right one depending on the left one's status.
	andOr struct {
		left, right node
		or          bool
	}
	pipeline struct {
		cmds   []node
		negate bool
	}
	simple struct {
		assigns []assign
		words   []word
		redirs  []redir
		line    int
	}
	assign struct {
		name  string
		value word
	}
	redir struct {
		fd   int
		op   string // < > >> >& <& <> <<
		to   word
		body *word // of a here-document
	}
	compound struct { // any of the following with redirections
		body   node
		redirs []redir
	}
	subshell struct{ body list }
	group    struct{ body list }
	ifNode   struct {
		conds, bodies []list
		otherwise     list
	}
	loop struct {
		cond, body list
		until      bool
	}
	forNode struct {
		name  string
		words []word
		args  bool // no "in": over the parameters
		body  list
	}
	caseNode struct {
		subject word
		arms    []caseArm
	}
	caseArm struct {
		patterns []word
		body     list
	}
	funcNode struct {
		name string
		body node
	}
)

type parser struct {
	src   string
	at    int
	depth int
	here  []*redir // here-documents whose bodies follow the line's end
}

// parse reads a whole script.
func parse(src string) (l list, err error) {
	if len(src) > maxScript {
		return nil, fmt.Errorf("%w: the script has %d bytes", errSyntax, len(src))
	}
	p := &parser{src: src}
	l, err = p.list()
	if err != nil {
		return nil, err
	}
	if len(p.here) > 0 {
		return nil, errIncomplete
	}
	if p.at < len(p.src) {
		return nil, p.unexpected()
	}
	return l, nil
}

func (p *parser) unexpected() error {
	p.blanks()
	if p.at >= len(p.src) {
		return errIncomplete
	}
	if op := p.peekOp(); op != "" {
		if op == "\n" {
			op = "newline"
		}
		return fmt.Errorf("%w: unexpected %q", errSyntax, op)
	}
	w := p.peekWord()
	if w == "" {
		w = p.src[p.at : p.at+1]
	}
	return fmt.Errorf("%w: unexpected %q", errSyntax, w)
}

func (p *parser) enter() error {
	if p.depth++; p.depth > maxNesting {
		return fmt.Errorf("%w: nested too deep", errSyntax)
	}
	return nil
}

func (p *parser) leave() { p.depth-- }

// blanks skips blanks, comments and continued lines.
func (p *parser) blanks() {
	for p.at < len(p.src) {
		switch c := p.src[p.at]; {
		case c == ' ' || c == '\t' || c == '\r':
			p.at++
		case c == '\\' && strings.HasPrefix(p.src[p.at:], "\\\n"):
			p.at += 2
		case c == '#':
			for p.at < len(p.src) && p.src[p.at] != '\n' {
				p.at++
			}
		default:
			return
		}
	}
}

// ops, longest first.
var ops = []string{"&&", "||", ";;", "<<-", "<<", ">>", ">&", "<&", "<>", ">|", "&", "|", ";", "<", ">", "(", ")", "\n"}

func (p *parser) peekOp() string {
	p.blanks()
	for _, op := range ops {
		if strings.HasPrefix(p.src[p.at:], op) {
			return op
		}
	}
	return ""
}

func (p *parser) takeOp(op string) (bool, error) {
	if p.peekOp() != op {
		return false, nil
	}
	p.at += len(op)
	if op == "\n" {
		return true, p.hereBodies()
	}
	return true, nil
}

// newlines skips empty lines.
func (p *parser) newlines() error {
	for {
		ok, err := p.takeOp("\n")
		if !ok || err != nil {
			return err
		}
	}
}

// peekWord is the next word as it is written, when it has no quotes.
func (p *parser) peekWord() string {
	p.blanks()
	end := p.at
	for end < len(p.src) && !strings.ContainsRune(" \t\r\n;&|<>()'\"\\$`", rune(p.src[end])) {
		end++
	}
	return p.src[p.at:end]
}

// takeWord takes a reserved word.
func (p *parser) takeWord(want string) bool {
	if p.peekWord() != want || p.quotedAfter(want) {
		return false
	}
	p.at += len(want)
	return true
}

// quotedAfter tells whether the word goes on with something quoted, which makes
// it no reserved word.
func (p *parser) quotedAfter(w string) bool {
	at := p.at + len(w)
	return at < len(p.src) && strings.ContainsRune("'\"\\$`", rune(p.src[at])) && !strings.HasPrefix(p.src[at:], "\\\n")
}

func (p *parser) need(want string) error {
	if err := p.newlines(); err != nil {
		return err
	}
	if !p.takeWord(want) {
		return p.unexpected()
	}
	return nil
}

var closers = map[string]bool{
	"then": true, "else": true, "elif": true, "fi": true, "do": true, "done": true, "esac": true, "}": true,
}

// list reads commands up to a closing word or parenthesis, or the end.
func (p *parser) list() (l list, err error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	for {
		if err := p.newlines(); err != nil {
			return nil, err
		}
		if op := p.peekOp(); p.at >= len(p.src) || op == ")" || op == ";;" || closers[p.peekWord()] && !p.quotedAfter(p.peekWord()) {
			return l, nil
		}
		start := p.at
		n, err := p.andOr()
		if err != nil {
			return nil, err
		}
		it := item{node: n}
		switch p.peekOp() {
		case "&":
			p.at++
			it.background, it.text = true, strings.TrimSpace(p.src[start:p.at-1])
		case ";":
			p.at++
		case "\n", ")", ";;":
		case "":
			if p.at < len(p.src) {
				return nil, p.unexpected()
			}
		default:
			return nil, p.unexpected()
		}
		l = append(l, it)
	}
}

func (p *parser) andOr() (node, error) {
	left, err := p.pipeline()
	for err == nil {
		op := p.peekOp()
		if op != "&&" && op != "||" {
			return left, nil
		}
		p.at += 2
		if err := p.newlines(); err != nil {
			return nil, err
		}
		var right node
		if right, err = p.pipeline(); err == nil {
			left = andOr{left, right, op == "||"}
		}
	}
	return nil, err
}

func (p *parser) pipeline() (node, error) {
	pl := pipeline{}
	for p.takeWord("!") {
		pl.negate = !pl.negate
	}
	for {
		n, err := p.command()
		if err != nil {
			return nil, err
		}
		pl.cmds = append(pl.cmds, n)
		if p.peekOp() != "|" {
			break
		}
		p.at++
		if err := p.newlines(); err != nil {
			return nil, err
		}
	}
	if len(pl.cmds) == 1 && !pl.negate {
		return pl.cmds[0], nil
	}
	return pl, nil
}

func (p *parser) command() (node, error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	body, err := p.compound()
	if err != nil {
		return nil, err
	}
	if body == nil {
		return p.simple()
	}
	c := compound{body: body}
	for {
		r, err := p.redir()
		if err != nil {
			return nil, err
		}
		if r == nil {
			break
		}
		c.redirs = append(c.redirs, *r)
		p.rehere(&c.redirs[len(c.redirs)-1])
	}
	if len(c.redirs) == 0 {
		return body, nil
	}
	return c, nil
}

// simple reads assignments, words and redirections.
func (p *parser) simple() (node, error) {
	s := &simple{line: strings.Count(p.src[:p.at], "\n") + 1}
	for {
		r, err := p.redir()
		if err != nil {
			return nil, err
		}
		if r != nil {
			s.redirs = append(s.redirs, *r)
			p.rehere(&s.redirs[len(s.redirs)-1])
			continue
		}
		if len(s.words) == 0 {
			if name, _, ok := strings.Cut(p.peekWord(), "="); ok && isName(name) {
				p.at += len(name) + 1
				value, err := p.wordHere()
				if err != nil {
					return nil, err
				}
				s.assigns = append(s.assigns, assign{name, value})
				continue
			}
		}
		w, err := p.word()
		if err != nil {
			return nil, err
		}
		if w == nil {
			break
		}
		s.words = append(s.words, w)
	}
	if len(s.words)+len(s.assigns)+len(s.redirs) == 0 {
		return nil, p.unexpected()
	}
	// The slice has its final place now: pending here-documents point into it.
	for i := range s.redirs {
		p.rehere(&s.redirs[i])
	}
	return s, nil
}
