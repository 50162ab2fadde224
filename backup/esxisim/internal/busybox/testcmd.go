package busybox

import (
	"context"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/shell"
)

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
		switch op {
		case "-ef":
			p, _ := t.b.fs.RealPath(t.p.Path(a))
			q, _ := t.b.fs.RealPath(t.p.Path(b))
			return err1 == nil && p == q
		case "-nt":
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
