package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// row is one measurement. What does not apply is zero and left out.
type row struct {
	Step    string  `json:"step"`
	Tool    string  `json:"tool"`
	Seconds float64 `json:"seconds,omitempty"`
	Bytes   int64   `json:"bytes,omitempty"` // that the step had to deal with
	MBps    float64 `json:"mb_per_second,omitempty"`
	IOPS    float64 `json:"iops,omitempty"`
	P50     float64 `json:"p50_us,omitempty"`
	P99     float64 `json:"p99_us,omitempty"`
	Stored  int64   `json:"bytes_stored,omitempty"`   // the repository grew by this
	Meta    int64   `json:"bytes_metadata,omitempty"` // of this: tree nodes, index, manifests
	Wire    int64   `json:"bytes_wire,omitempty"`     // that left the host
	RSS     int64   `json:"peak_rss,omitempty"`       // of the largest process
	Ratio   float64 `json:"ratio,omitempty"`          // hikae's speed over this tool's in the same step
	Note    string  `json:"note,omitempty"`
}

type table struct {
	json bool
	rows []row
}

// add keeps a row and prints it at once as JSON or, short, for whoever waits.
func (t *table) add(r row) {
	if r.Seconds > 0 && r.Bytes > 0 {
		r.MBps = float64(r.Bytes) / r.Seconds / 1e6
	}
	if r.Tool != "hikae" {
		for _, h := range t.rows {
			if h.Tool != "hikae" || h.Step != r.Step {
				continue
			}
			switch {
			case h.IOPS > 0 && r.IOPS > 0:
				r.Ratio = h.IOPS / r.IOPS
			case h.Seconds > 0 && r.Seconds > 0:
				r.Ratio = r.Seconds / h.Seconds
			}
		}
	}
	t.rows = append(t.rows, r)
	if t.json {
		b, _ := json.Marshal(r) // a flat struct of numbers and strings
		fmt.Println(string(b))
		return
	}
	say("%s, %s: %s", r.Step, r.Tool, strings.Join(slices.DeleteFunc(r.figures(), func(s string) bool { return s == "" }), ", "))
}

// headings are those of figures.
var headings = []string{"time", "rate", "IOPS", "p50", "p99", "stored", "metadata", "wire", "peak memory", "hikae is", ""}

func (r row) figures() []string {
	f := func(show bool, format string, v float64) string {
		if !show {
			return ""
		}
		return fmt.Sprintf(format, v)
	}
	return []string{
		f(r.Seconds > 0, "%.2f s", r.Seconds),
		f(r.MBps > 0, "%.0f MB/s", r.MBps),
		f(r.IOPS > 0, "%.0f /s", r.IOPS),
		f(r.P50 > 0, "%.0f µs", r.P50),
		f(r.P99 > 0, "%.0f µs", r.P99),
		f(r.Stored > 0, "%.1f MiB", float64(r.Stored)/mib),
		f(r.Meta > 0 && r.Bytes > 0, "%.2f %%", 100*float64(r.Meta)/float64(r.Bytes)),
		f(r.Wire > 0, "%.1f MiB", float64(r.Wire)/mib),
		f(r.RSS > 0, "%.0f MiB", float64(r.RSS)/mib),
		f(r.Ratio > 0, "%.2f ×", r.Ratio),
		r.Note,
	}
}

func (t *table) flush() {
	if t.json {
		return
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "step\ttool\t"+strings.Join(headings, "\t"))
	for _, r := range t.rows {
		fmt.Fprintln(w, r.Step+"\t"+r.Tool+"\t"+strings.Join(r.figures(), "\t"))
	}
	if err := w.Flush(); err != nil {
		fmt.Fprintln(os.Stderr, "hikaebench:", err)
	}
}
