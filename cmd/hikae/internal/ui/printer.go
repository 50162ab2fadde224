// Package ui is what hikae says and how.
//
// Two rules hold for every verb. Standard output carries the answer and nothing
// else: a table or sentences for people, or with --json one object per line.
// Standard error carries everything on the way to it: progress, messages,
// warnings and errors. So `hikae backup --json … > log` is always clean.
//
// Text from outside (VM names, paths, messages of hosts) is shown without its
// control characters, so that a VM's name cannot rewrite the terminal.
package ui

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"unicode"

	"github.com/mattn/go-runewidth"
	"golang.org/x/term"
)

// Printer writes a verb's answer and its messages. It is safe for concurrent
// use.
type Printer struct {
	Out   io.Writer
	Err   io.Writer
	JSON  bool // the answer as JSON lines
	Quiet bool // no messages and no progress; warnings and errors stay

	mu   sync.Mutex
	bars *bars // draws on Err while not nil; messages go above it
}

// Object writes v as one line of JSON.
func (p *Printer) Object(v any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := json.NewEncoder(p.Out)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}

// Printf writes a part of the answer for people; nothing with JSON.
func (p *Printer) Printf(format string, args ...any) {
	if p.JSON {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.Out, format, args...)
}

// Infof writes a message on the way, one line.
func (p *Printer) Infof(format string, args ...any) {
	if p.Quiet {
		return
	}
	p.message(fmt.Sprintf(format, args...))
}

// Warnf writes a message that matters even when quiet.
func (p *Printer) Warnf(format string, args ...any) {
	p.message("warning: " + fmt.Sprintf(format, args...))
}

// Errorf writes what went wrong.
func (p *Printer) Errorf(format string, args ...any) {
	p.message("hikae: " + fmt.Sprintf(format, args...))
}

// message writes one line to Err, above the progress bars when there are any.
func (p *Printer) message(line string) {
	line = Clean(line) + "\n"
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bars != nil && p.bars.write(line) {
		return
	}
	fmt.Fprint(p.Err, line)
}

// Writer returns where a logger may write: lines appear above the bars.
func (p *Printer) Writer() io.Writer { return lineWriter{p} }

type lineWriter struct{ p *Printer }

func (w lineWriter) Write(b []byte) (int, error) {
	w.p.message(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

// Terminal tells whether messages go to a terminal.
func (p *Printer) Terminal() bool {
	f, ok := p.Err.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Clean replaces control characters, which a terminal would obey, by visible
// escapes. Line breaks stay: messages of several lines are ours.
func Clean(s string) string {
	hidden := func(r rune) bool {
		return r != '\n' && (unicode.IsControl(r) || r == '\u2028' || r == '\u2029' ||
			(r >= '\u202a' && r <= '\u202e') || (r >= '\u2066' && r <= '\u2069')) // overrides of the writing direction
	}
	if strings.IndexFunc(s, hidden) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case !hidden(r):
			b.WriteRune(r)
		case r < 0x100:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// Table is aligned text. A column whose title begins with ">" is aligned to
// the right.
type Table struct {
	titles []string
	rows   [][]string
}

// NewTable begins a table with the titles of its columns.
func NewTable(titles ...string) *Table { return &Table{titles: titles} }

// Row adds a row; each cell is printed as %v would.
func (t *Table) Row(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = strings.ReplaceAll(Clean(fmt.Sprint(c)), "\n", `\n`)
	}
	t.rows = append(t.rows, row)
}

// Len is the number of rows.
func (t *Table) Len() int { return len(t.rows) }

// Print writes the table to the answer.
func (p *Printer) Print(t *Table) {
	width := make([]int, len(t.titles))
	right := make([]bool, len(t.titles))
	titles := make([]string, len(t.titles))
	for i, title := range t.titles {
		titles[i], right[i] = strings.CutPrefix(title, ">")
	}
	lines := append([][]string{titles}, t.rows...)
	for _, row := range lines {
		for i, c := range row {
			width[i] = max(width[i], runewidth.StringWidth(c))
		}
	}
	var b strings.Builder
	for _, row := range lines {
		var line strings.Builder
		for i, c := range row {
			pad := strings.Repeat(" ", width[i]-runewidth.StringWidth(c))
			if i > 0 {
				line.WriteString("  ")
			}
			if right[i] {
				line.WriteString(pad + c)
			} else {
				line.WriteString(c + pad)
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " "))
		b.WriteByte('\n')
	}
	p.Printf("%s", b.String())
}
