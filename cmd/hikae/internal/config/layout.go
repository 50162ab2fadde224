package config

import (
	"strings"
)

// layout says where things stand in a TOML text that is known to parse. The
// TOML library tells what a file says but not where; errors need the line, and
// an edit needs the bytes.
type layout struct {
	headers []header
	keys    []keyAt
}

// header is a [table] or [[array of tables]] line.
type header struct {
	name  string // dotted, without quotes and spaces
	array bool
	line  int // from 1
	start int // byte offset of the line's beginning
}

type keyAt struct {
	path string // table and key, dotted
	line int
}

// scan finds headers and keys. It leans on the text being valid TOML; with
// any other it finds something else, but it always ends.
func scan(text []byte) *layout {
	s := scanner{text: text, line: 1}
	lay := &layout{}
	table := ""
	for s.pos < len(s.text) {
		lineStart := s.pos
		s.skipBlank()
		switch c := s.peek(); {
		case c == 0 && s.pos >= len(s.text):
			return lay
		case c == '\n':
			s.next()
		case c == '#':
			s.skipLine()
		case c == '[':
			h := header{line: s.line, start: lineStart}
			s.next()
			if s.peek() == '[' {
				h.array = true
				s.next()
			}
			h.name = s.dottedKey(']')
			table = h.name
			lay.headers = append(lay.headers, h)
			s.skipLine()
		default:
			line := s.line
			path := s.dottedKey('=')
			if table != "" {
				path = table + "." + path
			}
			lay.keys = append(lay.keys, keyAt{path: path, line: line})
			s.skipValue()
		}
	}
	return lay
}

type scanner struct {
	text []byte
	pos  int
	line int
}

func (s *scanner) peek() byte {
	if s.pos < len(s.text) {
		return s.text[s.pos]
	}
	return 0
}

func (s *scanner) next() {
	if s.peek() == '\n' {
		s.line++
	}
	s.pos++
}

func (s *scanner) skipBlank() {
	for c := s.peek(); c == ' ' || c == '\t' || c == '\r'; c = s.peek() {
		s.next()
	}
}

func (s *scanner) skipLine() {
	for s.pos < len(s.text) && s.peek() != '\n' {
		s.next()
	}
}

// dottedKey reads up to the given byte outside quotes, which it consumes, and
// returns the key without quotes and spaces.
func (s *scanner) dottedKey(until byte) string {
	var key strings.Builder
	quote := byte(0)
	for s.pos < len(s.text) {
		c := s.peek()
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			key.WriteByte(c)
		case c == '"' || c == '\'':
			quote = c
		case c == until:
			s.next()
			return key.String()
		case c == '\n':
			return key.String()
		case c != ' ' && c != '\t':
			key.WriteByte(c)
		}
		s.next()
	}
	return key.String()
}

// skipValue goes to the end of the line on which a value ends.
func (s *scanner) skipValue() {
	depth := 0
	for s.pos < len(s.text) {
		switch c := s.peek(); c {
		case '\n':
			if depth == 0 {
				return
			}
			s.next()
		case '#':
			s.skipLine()
		case '[', '{':
			depth++
			s.next()
		case ']', '}':
			depth--
			s.next()
		case '"', '\'':
			s.skipString(c)
		default:
			s.next()
		}
	}
}

func (s *scanner) skipString(quote byte) {
	triple := strings.Repeat(string(quote), 3)
	if rest := s.text[s.pos:]; len(rest) >= 3 && string(rest[:3]) == triple {
		s.pos += 3
		for s.pos < len(s.text) {
			if rest := s.text[s.pos:]; len(rest) >= 3 && string(rest[:3]) == triple {
				s.pos += 3
				// Up to two quotes may stand directly before the closing three.
				for s.peek() == quote {
					s.next()
				}
				return
			}
			s.skipChar(quote)
		}
		return
	}
	s.next()
	for s.pos < len(s.text) && s.peek() != '\n' {
		if s.peek() == quote {
			s.next()
			return
		}
		s.skipChar(quote)
	}
}

// skipChar passes one character of a string, with its backslash in a basic one.
func (s *scanner) skipChar(quote byte) {
	if quote == '"' && s.peek() == '\\' {
		s.next()
	}
	s.next()
}

// lineOf gives the line of a key, or of the nearest table around it.
func (l *layout) lineOf(key []string) int {
	for n := len(key); n > 0; n-- {
		path := strings.Join(key[:n], ".")
		for _, k := range l.keys {
			if k.path == path {
				return k.line
			}
		}
		for _, h := range l.headers {
			if h.name == path {
				return h.line
			}
		}
	}
	return 1
}

// headerLine gives the line of the i-th [[name]] block, or where name is
// given in another style, of its first mention.
func (l *layout) headerLine(name string, i int) int {
	for _, h := range l.headers {
		if h.array && h.name == name {
			if i == 0 {
				return h.line
			}
			i--
		}
	}
	return l.lineOf([]string{name})
}

// lineIn gives the line of a key, dotted when it is within a table, of the i-th
// [[name]] block; where it is not there, that of the nearest table around it.
func (l *layout) lineIn(name string, i int, key string) int {
	from, to := l.headerLine(name, i), int(^uint(0)>>1)
	for _, h := range l.headers {
		// The block ends where something else begins that is no table of it.
		if h.line > from && (h.array && h.name == name || h.name != name && !strings.HasPrefix(h.name, name+".")) {
			to = h.line
			break
		}
	}
	parts := strings.Split(key, ".")
	for n := len(parts); n > 0; n-- {
		path := name + "." + strings.Join(parts[:n], ".")
		for _, k := range l.keys {
			if k.path == path && k.line > from && k.line < to {
				return k.line
			}
		}
		for _, h := range l.headers {
			if h.name == path && h.line > from && h.line < to {
				return h.line
			}
		}
	}
	return from
}
