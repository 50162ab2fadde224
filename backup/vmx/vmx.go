// Package vmx reads and rewrites a VM's configuration file (.vmx): lines of
// `key = "value"`, keys compared without case, in a file that VMware documents
// nowhere and that other programs write too.
//
// The package therefore promises to leave alone what it does not change: lines
// that are not touched come back byte for byte, comments and lines it cannot
// read among them. It knows which keys name disks, which ones bind a VM to the
// place it ran in, and which ones make its identity; it does no input or
// output.
package vmx

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"strings"
)

// MaxSize is the largest file that Parse takes, in bytes. Real ones have a few
// kilobytes; the bound keeps a wrong file from being read as one.
const MaxSize = 4 << 20

// ErrFormat says that a file is no VM configuration.
var ErrFormat = errors.New("not a vmx file")

// File is a parsed configuration. The zero value is an empty one, ready to use.
type File struct{ lines []line }

// line is one line of the file. key is empty where the line is no assignment;
// raw is what stood in the file and is empty once the value was set here.
type line struct{ raw, key, value string }

// Parse reads a configuration. Lines that are no assignment are kept as they
// are; only a file that cannot be text at all is refused, with ErrFormat.
func Parse(data []byte) (*File, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes are more than the %d such a file may have", ErrFormat, len(data), MaxSize)
	}
	if bytes.IndexByte(data, 0) >= 0 {
		return nil, fmt.Errorf("%w: it holds zero bytes", ErrFormat)
	}
	f := &File{}
	if len(data) == 0 {
		return f, nil
	}
	text := strings.TrimSuffix(string(data), "\n")
	for raw := range strings.SplitSeq(text, "\n") {
		l := line{raw: raw}
		if key, value, ok := assignment(raw); ok {
			l.key, l.value = key, value
		}
		f.lines = append(f.lines, l)
	}
	return f, nil
}

// assignment splits `key = "value"`. Quotes are usual but some tools leave them
// out; what follows the closing quote is ignored, as ESXi ignores it.
func assignment(raw string) (key, value string, ok bool) {
	key, rest, found := strings.Cut(raw, "=")
	key = strings.TrimSpace(key)
	if !found || key == "" || key[0] == '#' || strings.ContainsAny(key, "\" \t") {
		return "", "", false
	}
	rest = strings.TrimSpace(rest)
	if after, quoted := strings.CutPrefix(rest, `"`); quoted {
		value, _, found = strings.Cut(after, `"`)
		if !found {
			return "", "", false
		}
		return key, unescape(value), true
	}
	return key, unescape(rest), true
}

// escape writes the characters that cannot stand in a quoted value as |XX,
// two hexadecimal digits, the way VMware's programs do.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '|' || c < 0x20 || c == 0x7f:
			fmt.Fprintf(&b, "|%02X", c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// unescape undoes escape; a bar that no two hexadecimal digits follow stays.
func unescape(s string) string {
	if !strings.Contains(s, "|") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '|' && i+2 < len(s) {
			hi, lo := hexDigit(s[i+1]), hexDigit(s[i+2])
			if hi >= 0 && lo >= 0 {
				b.WriteByte(byte(hi<<4 | lo))
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func hexDigit(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// Get returns the value of a key, the last one when a key stands twice.
func (f *File) Get(key string) (value string, ok bool) {
	for i := len(f.lines) - 1; i >= 0; i-- {
		if f.lines[i].key != "" && strings.EqualFold(f.lines[i].key, key) {
			return f.lines[i].value, true
		}
	}
	return "", false
}

// True tells whether a key is set to TRUE.
func (f *File) True(key string) bool {
	v, _ := f.Get(key)
	return strings.EqualFold(v, "TRUE")
}

// Set gives a key a value: in its place when it is there, at the end when not.
// A key that stood twice stands once afterwards.
func (f *File) Set(key, value string) {
	at := -1
	kept := f.lines[:0]
	for _, l := range f.lines {
		if l.key != "" && strings.EqualFold(l.key, key) {
			if at >= 0 {
				continue
			}
			at = len(kept)
			if l.value != value {
				l = line{key: l.key, value: value}
			}
		}
		kept = append(kept, l)
	}
	f.lines = kept
	if at < 0 {
		f.lines = append(f.lines, line{key: key, value: value})
	}
}

// Delete removes a key.
func (f *File) Delete(key string) {
	f.DeleteFunc(func(k, _ string) bool { return strings.EqualFold(k, key) })
}

// DeleteFunc removes the keys that drop returns true for.
func (f *File) DeleteFunc(drop func(key, value string) bool) {
	kept := f.lines[:0]
	for _, l := range f.lines {
		if l.key == "" || !drop(l.key, l.value) {
			kept = append(kept, l)
		}
	}
	f.lines = kept
}

// All yields keys and values in file order.
func (f *File) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for _, l := range f.lines {
			if l.key != "" && !yield(l.key, l.value) {
				return
			}
		}
	}
}

// Bytes returns the file as text, every line ended by a newline.
func (f *File) Bytes() []byte {
	var b bytes.Buffer
	for _, l := range f.lines {
		if l.raw == "" && l.key != "" {
			fmt.Fprintf(&b, "%s = \"%s\"\n", l.key, escape(l.value))
			continue
		}
		b.WriteString(l.raw)
		b.WriteByte('\n')
	}
	return b.Bytes()
}
