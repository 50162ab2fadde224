// Package calendar reads schedules as people write them and says when they are
// due. It reads no clock.
//
// What is due at a time of day is due when the clocks of the job's time zone
// show it, exactly once: when they are set forward over that time, at the
// moment they are; when they are set back over it, the first time round. Cron
// lines whose hour is * or */n mean the passing of hours instead, so theirs
// also run in the hour that comes again, and nothing runs for the hour that
// never was. "every" counts real time from the last run and knows no clocks.
package calendar

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

// Kind says what makes a schedule due.
type Kind int

// Kinds of schedules.
const (
	Timed  Kind = iota // Next says when
	After              // another job's end
	Manual             // a person
)

// Schedule is one parsed schedule.
type Schedule struct {
	Kind Kind
	// Job is what an After schedule waits for; Always tells whether its
	// failing counts too.
	Job    string
	Always bool

	// Relative tells that Next counts from the moment given, whatever clocks
	// show ("every").
	Relative bool

	text string
	next func(after time.Time) time.Time
}

// String returns the schedule as it was written.
func (s *Schedule) String() string { return s.text }

// Next returns the first moment after the given one at which the schedule is
// due, or the zero time when it never will be. For "every" the given moment is
// that of the last run.
func (s *Schedule) Next(after time.Time) time.Time {
	if s.next == nil {
		return time.Time{}
	}
	return s.next(after)
}

// forms is what errors show.
const forms = `write for example "daily 02:00", "weekly sun,wed 03:00", "monthly 1 03:00", "monthly last sun 03:00", "every 6h", "once 2026-12-01 02:00", "after JOB", "after JOB always", "manual", or a cron line such as "30 2 * * 1-5"`

// Parse reads a schedule for a time zone:
//
//	once 2026-12-01 02:00       every 6h (any Go duration of at least a minute)
//	daily 02:00[,14:00]         weekly sun,wed 03:00
//	monthly 1 03:00             monthly last 03:00 (the month's last day)
//	monthly last sun 03:00      monthly 2nd tue 03:00 (1st to 5th)
//	after JOB [always]          manual
//	30 2 * * 1-5                five cron fields, or @hourly, @daily, …
//
// A month without the day named (the 31st, a 5th Sunday) is left out.
func Parse(text string, loc *time.Location) (*Schedule, error) {
	s := &Schedule{text: strings.Join(strings.Fields(text), " ")}
	words := strings.Fields(strings.ToLower(text))
	bad := func(why string) (*Schedule, error) {
		return nil, fmt.Errorf("schedule %q: %s; %s", text, why, forms)
	}
	if len(words) == 0 {
		return bad("it is empty")
	}
	var err error
	switch args := words[1:]; words[0] {
	case "manual":
		if len(args) != 0 {
			return bad("manual stands alone")
		}
		s.Kind = Manual
	case "after":
		s.Kind = After
		s.Always = len(args) == 2 && args[1] == "always"
		if len(args) != 1 && !s.Always {
			return bad("after takes a job's name")
		}
		s.Job = strings.Fields(text)[1] // names keep their case
	case "every":
		s.Relative = true
		s.next, err = every(args)
	case "once":
		s.next, err = once(args, loc)
	case "daily", "weekly", "monthly":
		s.next, err = days(words[0], args, loc)
	default:
		s.next, err = cronLine(words[0], strings.TrimSpace(text), loc)
	}
	if err != nil {
		return bad(err.Error())
	}
	return s, nil
}

func every(args []string) (func(time.Time) time.Time, error) {
	if len(args) != 1 {
		return nil, fmt.Errorf("every takes one duration")
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return nil, fmt.Errorf("%q is no duration", args[0])
	}
	if d < time.Minute {
		return nil, fmt.Errorf("%v is under a minute", d)
	}
	return func(after time.Time) time.Time { return after.Add(d) }, nil
}

func once(args []string, loc *time.Location) (func(time.Time) time.Time, error) {
	t, err := time.ParseInLocation("2006-01-02 15:04", strings.Join(args, " "), time.UTC)
	if err != nil {
		return nil, fmt.Errorf("%q is no time such as 2026-12-01 02:00", strings.Join(args, " "))
	}
	at, _ := instants(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), loc)
	return func(after time.Time) time.Time {
		if at[0].After(after) {
			return at[0]
		}
		return time.Time{}
	}, nil
}

// clock is a time of day.
type clock struct{ hour, minute int }

func parseClocks(s string) ([]clock, error) {
	var out []clock
	for _, part := range strings.Split(s, ",") {
		t, err := time.Parse("15:04", part)
		if err != nil {
			return nil, fmt.Errorf("%q is no time of day such as 02:00", part)
		}
		out = append(out, clock{t.Hour(), t.Minute()})
	}
	return out, nil
}

var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

func parseWeekday(s string) (time.Weekday, error) {
	for i, name := range weekdays {
		full := strings.ToLower(time.Weekday(i).String())
		if s == name || s == full {
			return time.Weekday(i), nil
		}
	}
	return 0, fmt.Errorf("%q is no day of the week", s)
}

// days reads daily, weekly and monthly: which days, and the times on them.
func days(word string, args []string, loc *time.Location) (func(time.Time) time.Time, error) {
	if len(args) == 0 {
		return nil, fmt.Errorf("%s needs a time of day", word)
	}
	clocks, err := parseClocks(args[len(args)-1])
	if err != nil {
		return nil, err
	}
	var match func(civil time.Time) bool
	which := args[:len(args)-1]
	switch {
	case word == "daily" && len(which) == 0:
		match = func(time.Time) bool { return true }
	case word == "weekly" && len(which) == 1:
		var set [7]bool
		for _, name := range strings.Split(which[0], ",") {
			d, err := parseWeekday(name)
			if err != nil {
				return nil, err
			}
			set[d] = true
		}
		match = func(civil time.Time) bool { return set[civil.Weekday()] }
	case word == "monthly" && len(which) == 1 && which[0] == "last":
		match = func(civil time.Time) bool { return civil.AddDate(0, 0, 1).Day() == 1 }
	case word == "monthly" && len(which) == 1:
		var set [32]bool
		for _, s := range strings.Split(which[0], ",") {
			n, err := strconv.Atoi(s)
			if err != nil || n < 1 || n > 31 {
				return nil, fmt.Errorf("%q is no day of the month", s)
			}
			set[n] = true
		}
		match = func(civil time.Time) bool { return set[civil.Day()] }
	case word == "monthly" && len(which) == 2:
		d, err := parseWeekday(which[1])
		if err != nil {
			return nil, err
		}
		n := slices.Index([]string{"last", "1st", "2nd", "3rd", "4th", "5th"}, which[0])
		if n < 0 {
			return nil, fmt.Errorf("%q is neither last nor 1st to 5th", which[0])
		}
		match = func(civil time.Time) bool {
			if civil.Weekday() != d {
				return false
			}
			if n == 0 {
				return civil.AddDate(0, 0, 7).Month() != civil.Month()
			}
			return (civil.Day()-1)/7+1 == n
		}
	default:
		return nil, fmt.Errorf("%s does not take %q", word, strings.Join(which, " "))
	}
	return func(after time.Time) time.Time {
		return search(after, loc, match, clocks, false)
	}, nil
}

// cronStar is the bit that robfig/cron sets in a field written as *.
const cronStar = 1 << 63

func cronLine(first, text string, loc *time.Location) (func(time.Time) time.Time, error) {
	if strings.HasPrefix(first, "tz=") || strings.HasPrefix(first, "cron_tz=") {
		return nil, fmt.Errorf("the time zone is a setting of the job")
	}
	if first == "@every" {
		return nil, fmt.Errorf("write every")
	}
	parsed, err := cron.ParseStandard(text)
	if err != nil {
		return nil, fmt.Errorf("neither a schedule nor a cron line")
	}
	spec, ok := parsed.(*cron.SpecSchedule)
	if !ok {
		return nil, fmt.Errorf("not a cron line with fields")
	}
	var clocks []clock
	for h := range 24 {
		for m := range 60 {
			if spec.Hour>>h&1 == 1 && spec.Minute>>m&1 == 1 {
				clocks = append(clocks, clock{h, m})
			}
		}
	}
	match := func(civil time.Time) bool {
		if spec.Month>>uint(civil.Month())&1 == 0 {
			return false
		}
		dom, dow := spec.Dom>>uint(civil.Day())&1 == 1, spec.Dow>>uint(civil.Weekday())&1 == 1
		// As every cron does: of two fields that are given, either is enough.
		if spec.Dom&cronStar != 0 || spec.Dow&cronStar != 0 {
			return dom && dow
		}
		return dom || dow
	}
	// The parser forgets the star of */n, so look at the line itself.
	hourly := first == "@hourly" || strings.HasPrefix(strings.Fields(text + " -")[1], "*")
	return func(after time.Time) time.Time { return search(after, loc, match, clocks, hourly) }, nil
}

// horizon is how far ahead a due day is looked for: February 29th on a given
// day of the week comes at most 40 years later (over a century without a leap
// year).
const horizon = 366 * 41

// search finds the first due moment after the given one. hourly means that the
// passing of hours counts, not what clocks show.
func search(after time.Time, loc *time.Location, match func(civil time.Time) bool, clocks []clock, hourly bool) time.Time {
	y, m, d := after.In(loc).Date()
	// A day early: a minute that was skipped at midnight is due on the next
	// day, and with clocks set back over midnight yesterday comes again.
	day := time.Date(y, m, d-1, 0, 0, 0, 0, time.UTC)
	for range horizon {
		var best time.Time
		if match(day) {
			for _, c := range clocks {
				at, skipped := instants(day.Year(), day.Month(), day.Day(), c.hour, c.minute, loc)
				switch {
				case skipped && hourly:
					continue
				case !hourly:
					at = at[:1]
				}
				for _, t := range at {
					if t.After(after) && (best.IsZero() || t.Before(best)) {
						best = t
					}
				}
			}
		}
		if !best.IsZero() {
			return best
		}
		day = day.AddDate(0, 0, 1)
	}
	return time.Time{}
}
