package shell

import (
	"errors"
	"strings"
)

// compound reads what begins with a reserved word or parenthesis; nil when
// nothing does.
func (p *parser) compound() (node, error) {
	if ok, err := p.takeOp("("); ok || err != nil {
		l, err := p.list()
		if err != nil {
			return nil, err
		}
		if ok, err := p.takeOp(")"); !ok {
			return nil, errors.Join(err, p.unexpected())
		}
		return subshell{l}, nil
	}
	w := p.peekWord()
	if p.quotedAfter(w) {
		return nil, nil
	}
	switch w {
	case "{":
		p.at++
		l, err := p.list()
		if err != nil {
			return nil, err
		}
		return group{l}, p.need("}")
	case "if":
		return p.ifNode()
	case "while", "until":
		p.at += len(w)
		cond, err := p.list()
		if err == nil {
			err = p.need("do")
		}
		if err != nil {
			return nil, err
		}
		body, err := p.list()
		if err != nil {
			return nil, err
		}
		return loop{cond, body, w == "until"}, p.need("done")
	case "for":
		return p.forNode()
	case "case":
		return p.caseNode()
	case "then", "else", "elif", "fi", "do", "done", "esac", "}":
		return nil, p.unexpected()
	}
	if isName(w) { // name ( ) body
		rest := strings.TrimLeft(p.src[p.at+len(w):], " \t")
		if strings.HasPrefix(rest, "(") {
			after := strings.TrimLeft(rest[1:], " \t")
			if strings.HasPrefix(after, ")") {
				p.at = len(p.src) - len(after) + 1
				if err := p.newlines(); err != nil {
					return nil, err
				}
				body, err := p.command()
				return funcNode{w, body}, err
			}
		}
	}
	return nil, nil
}

func (p *parser) ifNode() (node, error) {
	n := ifNode{}
	p.at += len("if")
	for {
		cond, err := p.list()
		if err == nil {
			err = p.need("then")
		}
		if err != nil {
			return nil, err
		}
		body, err := p.list()
		if err != nil {
			return nil, err
		}
		n.conds, n.bodies = append(n.conds, cond), append(n.bodies, body)
		if p.takeWord("elif") {
			continue
		}
		if p.takeWord("else") {
			if n.otherwise, err = p.list(); err != nil {
				return nil, err
			}
		}
		return n, p.need("fi")
	}
}

func (p *parser) forNode() (node, error) {
	p.at += len("for")
	n := forNode{name: p.peekWord(), args: true}
	if !isName(n.name) {
		return nil, p.unexpected()
	}
	p.at += len(n.name)
	if err := p.newlines(); err != nil {
		return nil, err
	}
	if p.takeWord("in") {
		n.args = false
		for {
			if op := p.peekOp(); op == ";" || op == "\n" {
				break
			}
			w, err := p.word()
			if err != nil {
				return nil, err
			}
			if w == nil {
				return nil, p.unexpected()
			}
			n.words = append(n.words, w)
		}
	}
	if p.peekOp() == ";" {
		p.at++
	}
	if err := p.need("do"); err != nil {
		return nil, err
	}
	var err error
	if n.body, err = p.list(); err != nil {
		return nil, err
	}
	return n, p.need("done")
}

func (p *parser) caseNode() (node, error) {
	p.at += len("case")
	subject, err := p.word()
	if err != nil {
		return nil, err
	}
	if subject == nil {
		return nil, p.unexpected()
	}
	n := caseNode{subject: subject}
	if err := p.need("in"); err != nil {
		return nil, err
	}
	for {
		if err := p.newlines(); err != nil {
			return nil, err
		}
		if p.takeWord("esac") {
			return n, nil
		}
		if p.peekOp() == "(" {
			p.at++
		}
		arm := caseArm{}
		for {
			w, err := p.word()
			if err != nil {
				return nil, err
			}
			if w == nil {
				return nil, p.unexpected()
			}
			arm.patterns = append(arm.patterns, w)
			if p.peekOp() != "|" {
				break
			}
			p.at++
		}
		if ok, err := p.takeOp(")"); !ok {
			return nil, errors.Join(err, p.unexpected())
		}
		if arm.body, err = p.list(); err != nil {
			return nil, err
		}
		n.arms = append(n.arms, arm)
		if p.peekOp() == ";;" {
			p.at += 2
			continue
		}
		return n, p.need("esac")
	}
}
