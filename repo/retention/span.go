package retention

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Span is a length of time on the calendar: a month is as long as that month
// is. All parts are at least zero.
type Span struct{ Years, Months, Days, Hours int }

// maxPart bounds each part so that no date arithmetic overflows.
const maxPart = 10000

// ParseSpan reads numbers with units from large to small: "30d", "1y6m",
// "2w", "36h". m is a month; w, a week, is seven days.
func ParseSpan(s string) (Span, error) {
	bad := func() (Span, error) {
		return Span{}, fmt.Errorf("%q is no span of time; write for example 30d, 1y6m, 2w or 36h (y, m for months, w, d, h, in this order)", s)
	}
	var out Span
	units := "ymwdh"
	rest := s
	for rest != "" {
		i := strings.IndexAny(rest, units)
		if i <= 0 {
			return bad()
		}
		n, err := strconv.ParseUint(rest[:i], 10, 31)
		if err != nil || n > maxPart {
			return bad()
		}
		unit := rest[i]
		switch unit {
		case 'y':
			out.Years = int(n)
		case 'm':
			out.Months = int(n)
		case 'w':
			out.Days += 7 * int(n)
		case 'd':
			out.Days += int(n)
		case 'h':
			out.Hours = int(n)
		}
		// What follows must be of a smaller unit: 1d1d is a slip of the hand.
		units = units[strings.IndexByte(units, unit)+1:]
		rest = rest[i+1:]
	}
	if out == (Span{}) {
		return bad()
	}
	return out, nil
}

// String writes the span as ParseSpan reads it.
func (s Span) String() string {
	var b strings.Builder
	for _, p := range []struct {
		n    int
		unit byte
	}{{s.Years, 'y'}, {s.Months, 'm'}, {s.Days, 'd'}, {s.Hours, 'h'}} {
		if p.n != 0 {
			b.WriteString(strconv.Itoa(p.n))
			b.WriteByte(p.unit)
		}
	}
	return b.String()
}

// Before is the moment one span before t, on the calendar of t's time zone.
func (s Span) Before(t time.Time) time.Time {
	return t.AddDate(-s.Years, -s.Months, -s.Days).Add(-time.Duration(s.Hours) * time.Hour)
}

// UnmarshalText reads the span from a configuration file.
func (s *Span) UnmarshalText(text []byte) error {
	v, err := ParseSpan(string(text))
	if err != nil {
		return err
	}
	*s = v
	return nil
}
