package shell

import (
	"fmt"
	"strconv"
	"strings"
)

// calculator reads an arithmetic expression by precedence climbing.
type calculator struct {
	s     *Shell
	src   string
	at    int
	depth int
}

var precedence = map[string]int{
	"||": 1, "&&": 2, "|": 3, "^": 4, "&": 5, "==": 6, "!=": 6, "<": 7, "<=": 7, ">": 7, ">=": 7,
	"<<": 8, ">>": 8, "+": 9, "-": 9, "*": 10, "/": 10, "%": 10,
}

func (s *Shell) calculate(expr string) (int64, error) {
	if strings.TrimSpace(expr) == "" {
		return 0, nil
	}
	c := &calculator{s: s, src: expr}
	n, err := c.binary(1)
	if err == nil && c.next() != "" {
		err = fmt.Errorf("arithmetic syntax error")
	}
	return n, err
}

// next is the next token without taking it.
func (c *calculator) next() string {
	for c.at < len(c.src) && strings.IndexByte(" \t\r\n", c.src[c.at]) >= 0 {
		c.at++
	}
	rest := c.src[c.at:]
	if rest == "" {
		return ""
	}
	for _, op := range []string{"||", "&&", "==", "!=", "<=", ">=", "<<", ">>"} {
		if strings.HasPrefix(rest, op) {
			return op
		}
	}
	n := 0
	for n < len(rest) && (isName("_"+rest[n:n+1]) || rest[n] == 'x') {
		n++
	}
	return rest[:max(n, 1)]
}

func (c *calculator) binary(least int) (int64, error) {
	if c.depth++; c.depth > maxNesting {
		return 0, fmt.Errorf("arithmetic expression too deep")
	}
	defer func() { c.depth-- }()
	left, err := c.unary()
	for err == nil {
		op := c.next()
		prec := precedence[op]
		if prec < least || prec == 0 {
			return left, nil
		}
		c.at += len(op)
		var right int64
		if right, err = c.binary(prec + 1); err == nil {
			left, err = apply(op, left, right)
		}
	}
	return 0, err
}

func (c *calculator) unary() (int64, error) {
	if c.depth++; c.depth > maxNesting {
		return 0, fmt.Errorf("arithmetic expression too deep")
	}
	defer func() { c.depth-- }()
	t := c.next()
	c.at += len(t)
	switch t {
	case "-", "+", "!", "~":
		n, err := c.unary()
		switch t {
		case "-":
			n = -n
		case "!":
			n = truth(n == 0)
		case "~":
			n = ^n
		}
		return n, err
	case "(":
		n, err := c.binary(1)
		if err == nil && c.next() != ")" {
			err = fmt.Errorf("arithmetic syntax error: a parenthesis is open")
		}
		c.at++
		return n, err
	case "":
		return 0, fmt.Errorf("arithmetic syntax error: it ends in the middle")
	}
	if n, err := strconv.ParseInt(t, 0, 64); err == nil {
		return n, nil
	}
	if !isName(t) {
		return 0, fmt.Errorf("arithmetic syntax error at %q", t)
	}
	v, _ := c.s.lookup(t)
	if strings.TrimSpace(v) == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(strings.TrimSpace(v), 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %q is no number", t, v)
	}
	return n, nil
}

func truth(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func apply(op string, a, b int64) (int64, error) {
	switch op {
	case "+":
		return a + b, nil
	case "-":
		return a - b, nil
	case "*":
		return a * b, nil
	case "/", "%":
		if b == 0 {
			return 0, fmt.Errorf("divide by zero")
		}
		if b == -1 { // the least number has no opposite
			if op == "%" {
				return 0, nil
			}
			return -a, nil
		}
		if op == "%" {
			return a % b, nil
		}
		return a / b, nil
	case "<<":
		return a << (uint64(b) & 63), nil
	case ">>":
		return a >> (uint64(b) & 63), nil
	case "&":
		return a & b, nil
	case "|":
		return a | b, nil
	case "^":
		return a ^ b, nil
	case "==":
		return truth(a == b), nil
	case "!=":
		return truth(a != b), nil
	case "<":
		return truth(a < b), nil
	case "<=":
		return truth(a <= b), nil
	case ">":
		return truth(a > b), nil
	case ">=":
		return truth(a >= b), nil
	case "&&":
		return truth(a != 0 && b != 0), nil
	case "||":
		return truth(a != 0 || b != 0), nil
	}
	return 0, fmt.Errorf("arithmetic syntax error at %q", op)
}
