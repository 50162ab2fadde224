// Package vimcmd reads what ESXi's shell commands print: vim-cmd's dumps of API
// objects, its tables and trees, esxcli's CSV, vmkfstools' maps. None of these
// formats is documented, they differ between versions, and they do not quote
// what they contain, so each parser here takes what it can prove, and says so
// when it cannot.
//
// The shapes come from outputs that operators published: ESXi 6.5 to 8.0 for
// tables and snapshot trees, older ones (with dynamicType lines) for objects.
// Exit codes are no guide: faults are looked for in the text by FindFault.
package vimcmd

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrFormat says that an output is not in a form known here.
var ErrFormat = errors.New("unknown output format")

// Limits that no real output comes near.
const (
	maxDepth = 64
	maxSize  = 64 << 20
)

// Value is one value of a dump: an object with fields, a list, a scalar, or
// nothing (null and <unset>).
type Value struct {
	Type   string // as in "(vim.vm.Summary) {"; empty where none is printed
	Text   string // a scalar without its quotes
	IsSet  bool
	Items  []Value // a list
	fields map[string]Value
	object bool
}

// Get follows a path of field names, such as "config", "name". What is not
// there is the unset value.
func (v Value) Get(path ...string) Value {
	for _, name := range path {
		v = v.fields[name]
	}
	return v
}

// IsObject tells whether the value has fields.
func (v Value) IsObject() bool { return v.object }

// Int reads the scalar as a number; ok is false when it is none.
func (v Value) Int() (n int64, ok bool) {
	n, err := strconv.ParseInt(v.Text, 10, 64)
	return n, err == nil && v.IsSet
}

// Bool reads the scalar as true or false; anything else is false.
func (v Value) Bool() bool { return v.Text == "true" }

// Walk calls fn for the value and everything below it.
func (v Value) Walk(fn func(Value)) {
	fn(v)
	for _, i := range v.Items {
		i.Walk(fn)
	}
	for _, f := range v.fields {
		f.Walk(fn)
	}
}

// ParseDump reads the first object or list of an output. What stands before it
// (headings such as "Listsummary:") is passed over.
func ParseDump(text string) (Value, error) {
	if len(text) > maxSize {
		return Value{}, fmt.Errorf("%w: %d bytes", ErrFormat, len(text))
	}
	p := &dump{lines: strings.Split(strings.ReplaceAll(text, "\r\n", "\n"), "\n")}
	for ; p.at < len(p.lines); p.at++ {
		if line := strings.TrimSpace(p.lines[p.at]); strings.HasPrefix(line, "(") && openers(line) {
			return p.value(line, 0)
		}
	}
	return Value{}, fmt.Errorf("%w: no object in %q", ErrFormat, short(text))
}

// openers tells lines that begin a value from text that happens to begin with
// a parenthesis.
func openers(line string) bool {
	_, rest, ok := typed(line)
	return ok && (rest == "{" || rest == "[" || rest == "[]" || rest == "{}" || rest == "null")
}

func short(s string) string {
	s = strings.TrimSpace(s)
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

type dump struct {
	lines []string
	at    int // the line that is being read
}

// typed splits "(vim.vm.Summary) {" into the type and the rest.
func typed(s string) (typ, rest string, ok bool) {
	if !strings.HasPrefix(s, "(") {
		return "", s, false
	}
	i := strings.IndexByte(s, ')')
	if i < 2 || strings.ContainsAny(s[1:i], " \t\"'(") {
		return "", s, false
	}
	return s[1:i], strings.TrimSuffix(strings.TrimSpace(s[i+1:]), ","), true
}

// value reads the value that begins with s on the current line, and leaves the
// parser on the value's last line.
func (p *dump) value(s string, depth int) (Value, error) {
	if depth > maxDepth {
		return Value{}, fmt.Errorf("%w: nested more than %d deep", ErrFormat, maxDepth)
	}
	typ, rest, ok := typed(s)
	if !ok {
		rest = s
	}
	bare := strings.TrimSuffix(rest, ",")
	switch {
	case bare == "null" || bare == "<unset>":
		return Value{Type: typ}, nil
	case bare == "[]" || bare == "{}":
		return Value{Type: typ, IsSet: true, object: bare == "{}"}, nil
	case bare == "{":
		return p.object(typ, depth)
	case bare == "[":
		return p.list(typ, depth)
	case strings.HasPrefix(rest, `"`):
		return p.quoted(typ, rest)
	}
	return Value{Type: typ, Text: strings.Trim(bare, "'"), IsSet: true}, nil
}

func (p *dump) object(typ string, depth int) (Value, error) {
	v := Value{Type: typ, IsSet: true, object: true, fields: map[string]Value{}}
	for p.at++; p.at < len(p.lines); p.at++ {
		line := strings.TrimSpace(p.lines[p.at])
		if line == "}" || line == "}," {
			return v, nil
		}
		name, rest, ok := strings.Cut(line, " = ")
		if !ok || !isName(name) {
			continue // an empty line, or a remark no version is known to print
		}
		f, err := p.value(strings.TrimSpace(rest), depth+1)
		if err != nil {
			return Value{}, err
		}
		if _, twice := v.fields[name]; !twice {
			v.fields[name] = f
		}
	}
	return Value{}, fmt.Errorf("%w: the output ends within an object", ErrFormat)
}

func (p *dump) list(typ string, depth int) (Value, error) {
	v := Value{Type: typ, IsSet: true}
	for p.at++; p.at < len(p.lines); p.at++ {
		line := strings.TrimSpace(p.lines[p.at])
		switch line {
		case "]", "],":
			return v, nil
		case "", ",":
			continue
		}
		item, err := p.value(line, depth+1)
		if err != nil {
			return Value{}, err
		}
		v.Items = append(v.Items, item)
	}
	return Value{}, fmt.Errorf("%w: the output ends within a list", ErrFormat)
}

// quoted reads a string. vim-cmd escapes neither quotes nor line ends in it, so
// it ends at a quote that ends its line and is followed by a line that can only
// be the dump's own.
func (p *dump) quoted(typ, s string) (Value, error) {
	var b strings.Builder
	s = s[1:]
	for {
		end := strings.TrimSuffix(strings.TrimRight(s, " \t"), ",")
		if strings.HasSuffix(end, `"`) && p.structural(p.at+1) {
			b.WriteString(end[:len(end)-1])
			return Value{Type: typ, Text: b.String(), IsSet: true}, nil
		}
		if p.at++; p.at >= len(p.lines) {
			return Value{}, fmt.Errorf("%w: the output ends within a string", ErrFormat)
		}
		b.WriteString(s)
		b.WriteByte('\n')
		s = p.lines[p.at]
	}
}

// structural tells whether a line can follow a finished value.
func (p *dump) structural(at int) bool {
	if at >= len(p.lines) {
		return true
	}
	line := strings.TrimSpace(p.lines[at])
	switch line {
	case "}", "},", "]", "],":
		return true
	case "":
		return at+1 == len(p.lines) // the end of the output
	}
	name, _, ok := strings.Cut(line, " = ")
	return ok && isName(name) || openers(line) || strings.HasPrefix(line, `"`)
}

func isName(s string) bool {
	if s == "" {
		return false
	}
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return true
}

// Fault is an error that the host reported in an output.
type Fault struct {
	Type    string // for example "vim.fault.NotFound"
	Message string // the host's own words; may be empty
}

func (f *Fault) Error() string {
	if f.Message == "" {
		return f.Type
	}
	return fmt.Sprintf("%s (%s)", f.Message, f.Type)
}

// FindFault returns the fault that an output reports, or nil. Faults are
// printed as dumps of a type that has "fault" as one of its parts, at the left
// margin; objects that merely contain a fault field are none.
func FindFault(output string) *Fault {
	lines := strings.Split(output, "\n")
	for i, line := range lines {
		typ, rest, ok := typed(strings.TrimRight(line, " \r\t"))
		if !ok || rest != "{" || !isFault(typ) {
			continue
		}
		f := &Fault{Type: typ}
		if v, err := ParseDump(strings.Join(lines[i:], "\n")); err == nil {
			f.Message = v.Get("msg").Text
			if f.Message == "" {
				f.Message = v.Get("faultMessage").Text
			}
		}
		return f
	}
	return nil
}

func isFault(typ string) bool {
	for _, part := range strings.Split(typ, ".") {
		if part == "fault" {
			return true
		}
	}
	return false
}
