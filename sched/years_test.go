package sched

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// model says what a scheduler has to do, without its code: occurrences are found
// by walking over all minutes and looking at the clock on the wall, runs by
// going through them in order.
type model struct {
	job      string
	loc      *time.Location
	wants    func(local time.Time) (day int, due bool) // is it due on this day, at or after this minute of it
	every    time.Duration
	duration func(n int) time.Duration // of the n-th call of its one VM
}

// expected is a run as the model wants it.
type expected struct {
	trigger    string
	due, begin time.Time
	missed     int
	skipped    int
	state      string
}

func (e expected) String() string {
	return fmt.Sprintf("%s due %s begins %s missed %d skipped %d %s", e.trigger, e.due.Format(time.DateTime), e.begin.Format(time.DateTime), e.missed, e.skipped, e.state)
}

// occurrences walks over time. A day's occurrence is in the first minute
// in which the clock on the wall has reached its time.
func (m *model) occurrences(from, to time.Time) []time.Time {
	var out []time.Time
	done := map[int]bool{}
	if day, due := m.wants(from.In(m.loc)); due {
		done[day] = true // before the beginning
	}
	// All times here, and changes of clocks, are multiples of five minutes.
	for t := from.Add(5 * time.Minute); !t.After(to); t = t.Add(5 * time.Minute) {
		if day, due := m.wants(t.In(m.loc)); due && !done[day] {
			done[day] = true
			out = append(out, t)
		}
	}
	return out
}

// span is when the machine was on, and awake.
type span struct{ from, to time.Time }

// runs goes through time: what is due begins a run, or is missed, or skipped.
func (m *model) runs(begin, end time.Time, on []span) []expected {
	var out []expected
	dues := []time.Time{}
	if m.every == 0 {
		dues = m.occurrences(begin, end)
	}
	calls := 0
	next := func(last time.Time) time.Time { // the next occurrence
		if m.every > 0 {
			return last.Add(m.every)
		}
		i, _ := slices.BinarySearchFunc(dues, last, func(d, l time.Time) int {
			if d.After(l) {
				return 1
			}
			return -1
		})
		if i == len(dues) {
			return end.Add(time.Hour)
		}
		return dues[i]
	}
	cursor, interrupted := begin, -1
	for _, s := range on {
		at := s.from
		var until time.Time // the run under way ends
		start := func(trigger string, due time.Time, missed int) {
			calls++
			until = at.Add(m.duration(calls))
			state := history.OK
			if until.After(s.to) {
				state = history.Interrupted
			}
			out = append(out, expected{trigger: trigger, due: due, begin: at, missed: missed, state: state})
			interrupted = -1
			if state == history.Interrupted {
				interrupted = len(out) - 1
			}
		}
		// What was missed, or else what was interrupted.
		due, missed := time.Time{}, -1
		for n := next(cursor); !n.After(at); n = next(n) {
			due = n
			missed++
		}
		if missed >= 0 {
			cursor = due
			if m.every > 0 && at.Sub(due) > onTime {
				cursor = at
			}
			trigger := history.ByCatchUp
			if missed == 0 && at.Sub(due) <= onTime {
				trigger = history.BySchedule
			}
			start(trigger, due, missed)
		} else if interrupted >= 0 {
			start(history.ByResume, out[interrupted].due, 0)
		}
		for {
			n := next(cursor)
			if !n.Before(s.to) {
				break
			}
			cursor, at = n, n
			if at.Before(until) {
				out[len(out)-1].skipped++
				continue
			}
			start(history.BySchedule, n, 0)
		}
	}
	return out
}

func hash(s string, n int) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %d", s, n)
	return h.Sum64()
}

// at is due once a day that fits, at or after a time of day.
func at(hour, minute int, fits func(time.Time) bool) func(time.Time) (int, bool) {
	return func(l time.Time) (int, bool) {
		return l.Year()*1000 + l.YearDay(), fits(l) && l.Hour()*60+l.Minute() >= hour*60+minute
	}
}

func anyDay(time.Time) bool { return true }

// TestYears has real zones, their clock changes, a machine that is off for hours
// or days at any moment, and runs that take longer than their interval: every
// due run happens once, and nothing else does.
func TestYears(t *testing.T) {
	cases := []struct {
		name, schedule, zone string
		wants                func(time.Time) (int, bool)
		every                time.Duration
	}{
		{"berlin", "daily 02:30", "Europe/Berlin", at(2, 30, anyDay), 0},
		{"newyork", "weekly sun,wed 02:15", "America/New_York", at(2, 15, func(l time.Time) bool {
			return l.Weekday() == time.Sunday || l.Weekday() == time.Wednesday
		}), 0},
		{"lordhowe", "daily 02:10", "Australia/Lord_Howe", at(2, 10, anyDay), 0},
		{"tokyo", "monthly last 23:00", "Asia/Tokyo", at(23, 0, func(l time.Time) bool { return l.AddDate(0, 0, 1).Day() == 1 }), 0},
		{"chatham", "30 3 * * 1-5", "Pacific/Chatham", at(3, 30, func(l time.Time) bool {
			return l.Weekday() != time.Saturday && l.Weekday() != time.Sunday
		}), 0},
		{"every", "every 31h", "Europe/Berlin", nil, 31 * time.Hour},
	}
	for seed := range uint64(2) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "2026-01-15T10:00:00Z")
				w.quiet = true
				w.options.PerHost, w.options.Total, w.options.LookEvery, w.options.StaleAfter = 10, 100, 6*time.Hour, -1
				w.hopts.Keep, w.hopts.KeepFor = 1<<20, 100*365*24*time.Hour
				var jobs []Job
				models := map[string]*model{}
				for _, c := range cases {
					w.vms(c.name, "vm")
					jobs = append(jobs, Job{Name: c.name, VMs: []string{c.name + "/*"}, Schedules: []string{c.schedule}, TimeZone: c.zone})
					loc, err := time.LoadLocation(c.zone)
					must(t, err)
					models[c.name] = &model{job: c.name, loc: loc, wants: c.wants, every: c.every, duration: func(n int) time.Duration {
						// Mostly minutes, now and then more than a day. Never whole minutes, so that no
						// run ends just when another is due.
						h := hash(c.name, n)
						d := time.Duration(h%120)*time.Minute + 17*time.Second
						if h>>32%9 == 0 {
							d += time.Duration(h>>40%40) * time.Hour
						}
						return d
					}}
				}
				w.takes = func(vm repo.VMID, n int) time.Duration { return models[vm.Host].duration(n) }
				rnd := rand.New(rand.NewPCG(seed, 6))
				begin := w.clock().UTC()
				end := begin.AddDate(2-int(seed), 0, 0)
				var on []span
				for w.clock().Before(end) {
					// Whole minutes and some seconds: a start and an occurrence never fall together.
					from := w.clock().UTC()
					w.boot(jobs...)
					time.Sleep(time.Duration(rnd.IntN(20*24*60))*time.Minute + 43*time.Second)
					w.halt()
					on = append(on, span{from, w.clock().UTC()})
					off := time.Duration(rnd.IntN(600))*time.Minute + 17*time.Second
					if rnd.IntN(4) == 0 {
						off += time.Duration(rnd.IntN(15*24)) * time.Hour
					}
					time.Sleep(off)
				}
				end = on[len(on)-1].to
				var err error
				w.db, err = history.Open(w.path, w.hopts)
				must(t, err)
				defer w.db.Close()
				for _, c := range cases {
					m := models[c.name]
					want := m.runs(begin, end, on)
					got := w.runs(c.name)
					for i := range max(len(got), len(want)) {
						g, e := "nothing", "nothing"
						if i < len(got) {
							r := got[i]
							g = expected{r.Trigger, r.Due, r.Started, r.Missed, r.Skipped, r.State}.String()
						}
						if i < len(want) {
							e = want[i].String()
						}
						if g != e {
							t.Fatalf("%s, run %d:\n got %s\nwant %s", c.name, i, g, e)
						}
					}
					if len(want) < 12 {
						t.Errorf("%s: only %d runs", c.name, len(want))
					}
				}
			})
		})
	}
}
