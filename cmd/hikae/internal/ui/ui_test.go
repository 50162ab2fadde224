package ui

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 10: "10 KiB", 1<<20 - 1: "1 MiB",
		8 << 30: "8 GiB", 1234567890: "1.15 GiB", 1<<40 + 1<<39: "1.5 TiB", -2048: "-2 KiB", 1<<63 - 1: "8 EiB",
	} {
		if got := Size(n); got != want {
			t.Errorf("Size(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"128KiB": 128 << 10, "64k": 64 << 10, "131072": 131072, "20GiB": 20 << 30, "1 MiB": 1 << 20} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "KiB", "12Q", "-1", "1.5G", "99999999999T"} {
		if got, err := ParseSize(s); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", s, got)
		}
	}
}

func TestDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		1500 * time.Millisecond: "1.5 s", 42 * time.Second: "42 s", 62 * time.Second: "1 min 02 s",
		3*time.Hour + 5*time.Minute: "3 h 05 min", 100 * time.Hour: "4 days",
	} {
		if got := Duration(d); got != want {
			t.Errorf("Duration(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestTableAlignsWhatTheTerminalShows(t *testing.T) {
	var out bytes.Buffer
	p := &Printer{Out: &out, Err: &out}
	tab := NewTable("VM", ">SIZE", "NOTE")
	tab.Row("web01", "8 GiB", "")
	tab.Row("控え", "100 MiB", "a\x1b[31mred\nline")
	p.Print(tab)
	want := "VM        SIZE  NOTE\nweb01    8 GiB\n控え   100 MiB  a\\x1b[31mred\\nline\n"
	if out.String() != want {
		t.Errorf("got:\n%swant:\n%s", out.String(), want)
	}
}

func TestJSONKeepsStandardOutputClean(t *testing.T) {
	var out, err bytes.Buffer
	p := &Printer{Out: &out, Err: &err, JSON: true}
	p.Printf("for people\n")
	p.Print(NewTable("A"))
	p.Infof("on the way")
	if e := p.Object(map[string]string{"vm": "<a>&b"}); e != nil {
		t.Fatal(e)
	}
	if got := out.String(); got != `{"vm":"<a>&b"}`+"\n" {
		t.Errorf("standard output has %q", got)
	}
	if got := err.String(); got != "on the way\n" {
		t.Errorf("standard error has %q", got)
	}
}

func TestProgressWithoutTerminalWritesLinesNowAndThen(t *testing.T) {
	var out, err bytes.Buffer
	now := time.Unix(0, 0)
	p := &Printer{Out: &out, Err: &err}
	g := p.Progress(func() time.Time { return now })
	for i := range 41 {
		g.Set("esx1/web01 disk 1", "reading", int64(i)*100<<20, 8<<30)
		now = now.Add(time.Second)
	}
	g.Close()
	g.Set("esx1/web01 disk 1", "reading", 1, 1) // after the end: nothing
	lines := strings.Split(strings.TrimSpace(err.String()), "\n")
	want := []string{
		"esx1/web01 disk 1: reading 1.46 GiB of 8 GiB (18 %), 100 MiB/s, 1 min 07 s left",
		"esx1/web01 disk 1: reading 2.93 GiB of 8 GiB (36 %), 100 MiB/s, 52 s left",
	}
	if len(lines) != 2 || lines[0] != want[0] || lines[1] != want[1] {
		t.Errorf("got %q, want %q", lines, want)
	}
	if out.Len() != 0 {
		t.Errorf("standard output has %q", out.String())
	}
	p.Quiet = true
	p.Progress(nil).Set("x", "", 1, 2)
	p.Progress(nil).Close()
}
