// Package retention decides which generations of one VM stay. It is a pure
// function of the generations' times and a policy: it reads no clock and
// touches no repository, so that what it says can be written down in tables and
// shown to an operator before anything is forgotten.
//
// Promises: the newest complete generation always stays; a held generation
// always stays; a generation that is not complete neither counts nor is
// forgotten here; a policy that says nothing forgets nothing; and when the
// times contradict the order in which the generations were made, nothing is
// decided at all.
package retention

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Policy says how many generations to keep. A count keeps the newest
// generation of each of the last N hours, days, ISO weeks (Monday to Sunday),
// months or years that have one; periods without a generation do not count.
// Unlimited keeps one for every such period. Zero says nothing.
type Policy struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly int
	Within                                       Span // everything this young stays
}

// Unlimited as a count keeps one generation of every period there is.
const Unlimited = -1

// Empty tells whether the policy says nothing.
func (p Policy) Empty() bool { return p == Policy{} }

// Validate refuses counts that mean nothing.
func (p Policy) Validate() error {
	for _, r := range p.rules() {
		if r.count < Unlimited {
			return fmt.Errorf("keep %s %d: a count is at least 0, or -1 for all", r.name, r.count)
		}
	}
	return nil
}

// String writes the policy as the command line and the configuration do.
func (p Policy) String() string {
	var parts []string
	for _, r := range p.rules() {
		if r.count != 0 {
			parts = append(parts, fmt.Sprintf("%s %d", r.name, r.count))
		}
	}
	if p.Within != (Span{}) {
		parts = append(parts, "within "+p.Within.String())
	}
	if len(parts) == 0 {
		return "keep all"
	}
	return "keep " + strings.Join(parts, ", ")
}

type rule struct {
	name   string
	count  int
	period func(time.Time) string // generations of one period share its name
}

func (p Policy) rules() []rule {
	return []rule{
		{"last", p.Last, nil},
		{"hourly", p.Hourly, func(t time.Time) string { return t.Format("2006-01-02T15-0700") }},
		{"daily", p.Daily, func(t time.Time) string { return t.Format("2006-01-02") }},
		{"weekly", p.Weekly, func(t time.Time) string { y, w := t.ISOWeek(); return fmt.Sprintf("%d-W%02d", y, w) }},
		{"monthly", p.Monthly, func(t time.Time) string { return t.Format("2006-01") }},
		{"yearly", p.Yearly, func(t time.Time) string { return t.Format("2006") }},
	}
}

// Item is what the decision needs to know of a generation.
type Item struct {
	Time       time.Time
	Sequence   uint64
	Incomplete bool // damaged, or a disk is missing: never counts
	Held       bool // an operator said it stays
	Imported   bool // its time was given by hand, so it may be older than its sequence says
}

// Decision is what becomes of an item, and why it stays.
type Decision struct {
	Item
	Keep    bool
	Reasons []string // empty when Keep is false
}

// ErrClock says that the times contradict the order of the sequence numbers,
// or lie in the future: a clock was set back, and counting periods would throw
// away the wrong generations.
var ErrClock = errors.New("the clock ran backwards")

// skew is how far a generation's time may lie ahead of now: clocks of hosts
// and backup machines differ a little without anybody having set one back.
const skew = 10 * time.Minute

// Apply decides for all generations of one VM, newest first. Periods are those
// of loc, the operator's time zone. The items may come in any order.
//
// It fails with ErrClock when a generation made later bears an earlier time
// than one made before it, or when one bears a time after now; imported
// generations are free of that check. With an empty policy all stay.
func (p Policy) Apply(items []Item, now time.Time, loc *time.Location) ([]Decision, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if err := checkClock(items, now); err != nil {
		return nil, err
	}
	out := make([]Decision, len(items))
	for i, it := range items {
		out[i] = Decision{Item: it}
	}
	slices.SortFunc(out, func(a, b Decision) int {
		if c := b.Time.Compare(a.Time); c != 0 {
			return c
		}
		if a.Sequence < b.Sequence {
			return 1
		}
		return -1
	})
	keep := func(d *Decision, why string) {
		d.Keep = true
		d.Reasons = append(d.Reasons, why)
	}
	newest := true
	for i := range out {
		d := &out[i]
		switch {
		case d.Incomplete:
			keep(d, "not complete: neither counted nor forgotten")
			continue
		case p.Empty():
			keep(d, "no policy")
		case newest:
			keep(d, "newest")
		}
		newest = false
		if d.Held {
			keep(d, "held")
		}
		if p.Within != (Span{}) && !d.Time.Before(p.Within.Before(now.In(loc))) {
			keep(d, "within "+p.Within.String())
		}
	}
	for _, r := range p.rules() {
		kept, last := 0, ""
		for i := range out {
			d := &out[i]
			if r.count == 0 || (r.count != Unlimited && kept == r.count) {
				break
			}
			if d.Incomplete {
				continue
			}
			why := r.name
			if r.period != nil {
				period := r.period(d.Time.In(loc))
				if period == last {
					continue
				}
				last = period
				why += " " + period
			}
			kept++
			keep(d, fmt.Sprintf("%s (%d)", why, kept))
		}
	}
	return out, nil
}

func checkClock(items []Item, now time.Time) error {
	bySequence := slices.DeleteFunc(slices.Clone(items), func(it Item) bool { return it.Imported })
	slices.SortFunc(bySequence, func(a, b Item) int {
		if a.Sequence < b.Sequence {
			return -1
		}
		return 1
	})
	for i, it := range bySequence {
		if it.Time.After(now.Add(skew)) {
			return fmt.Errorf("%w: generation %d is of %s, which is still to come (it is %s now); set the clock right and try again",
				ErrClock, it.Sequence, stamp(it.Time), stamp(now))
		}
		if i == 0 {
			continue
		}
		if before := bySequence[i-1]; it.Time.Before(before.Time) {
			return fmt.Errorf("%w: generation %d is of %s, but generation %d, made before it, is of %s; forget the one with the wrong time by name first",
				ErrClock, it.Sequence, stamp(it.Time), before.Sequence, stamp(before.Time))
		}
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
