package sched

import (
	"fmt"
	"strings"
	"time"

	"hikae/sched/calendar"
)

// window is the time of day at which runs may begin. It opens and closes when
// the clocks of its time zone show it, by the rules of package calendar: once a
// day each, also when clocks are set forward over it or back.
type window struct {
	text        string
	opens, ends *calendar.Schedule
}

// parseWindow reads "22:00-06:00".
func parseWindow(text string, loc *time.Location) (*window, error) {
	bad := fmt.Errorf("%q is no time of day from and to, such as 22:00-06:00", text)
	from, to, ok := strings.Cut(text, "-")
	if !ok {
		return nil, bad
	}
	from, to = strings.TrimSpace(from), strings.TrimSpace(to)
	for _, s := range []string{from, to} {
		if _, err := time.Parse("15:04", s); err != nil {
			return nil, bad
		}
	}
	opens, err := calendar.Parse("daily "+from, loc)
	if err != nil {
		return nil, bad
	}
	ends, err := calendar.Parse("daily "+to, loc)
	if err != nil {
		return nil, bad
	}
	if opens.String() == ends.String() {
		return nil, fmt.Errorf("%q ends when it begins; leave it out if runs may begin at any time", text)
	}
	return &window{text, opens, ends}, nil
}

// open tells whether the window is open, and when that changes. No window is
// always open and never changes.
func (w *window) open(now time.Time) (bool, time.Time) {
	if w == nil {
		return true, time.Time{}
	}
	opens, ends := w.opens.Next(now), w.ends.Next(now)
	if ends.Before(opens) {
		return true, ends
	}
	return false, opens
}
