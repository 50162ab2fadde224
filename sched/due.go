package sched

import (
	"time"

	"hikae/sched/calendar"
	"hikae/sched/history"
)

// How the scheduler takes clocks that do not run evenly.
const (
	// onTime is how late a run may begin and still be called on schedule.
	onTime = 2 * time.Minute
	// backLimit is how far a clock may be set back so that it counts as
	// corrected: what was done meanwhile is not done again, and nothing is due
	// until the clock is where it was. Set back further, it had been wrong before
	// and counts from where it is now.
	backLimit = 2 * time.Hour
	// maxMissed bounds how many missed occurrences are counted.
	maxMissed = 1000
)

// timer is one timed schedule of a job and how far it was carried out.
type timer struct {
	schedule *calendar.Schedule
	key      string // of its cursor: schedule and time zone
	cursor   history.Cursor
	next     time.Time // the first occurrence that did not become a run; zero when there is none
}

// newTimer goes on where the cursor stands. A schedule that was never seen
// before counts from now: what was due before it was written is not missed.
func newTimer(s *calendar.Schedule, key string, cursor history.Cursor, now time.Time) *timer {
	if cursor.At.IsZero() {
		cursor = history.Cursor{At: now}
	}
	t := &timer{schedule: s, key: key, cursor: cursor}
	t.find()
	return t
}

// find computes next.
func (t *timer) find() {
	t.next = t.schedule.Next(t.cursor.At).UTC()
	// The last one again can only come after the clock was set back.
	if !t.schedule.Relative && !t.next.IsZero() && t.next.Equal(t.cursor.Last) {
		t.next = t.schedule.Next(t.next).UTC()
	}
}

// look minds clocks that were set: jumped says that this one leapt forward
// since it was looked at last, or was not looked at before. It tells whether
// the cursor moved.
func (t *timer) look(now time.Time, jumped bool) bool {
	c := &t.cursor
	switch {
	case c.At.After(now.Add(backLimit)):
		// Where it stood is kept: should the clock come back there by another leap,
		// it is this setting back that was wrong, and what had been done by then
		// was done.
		if c.Ahead.Before(c.At) {
			c.Ahead = c.At
		}
		c.At = now
	case !c.Ahead.IsZero() && !now.Before(c.Ahead):
		if jumped && c.Ahead.After(c.At) {
			c.At = c.Ahead
		}
		c.Ahead = time.Time{}
	default:
		return false
	}
	t.find()
	return true
}

// due tells whether an occurrence waits for a run.
func (t *timer) due(now time.Time) bool { return !t.next.IsZero() && !t.next.After(now) }

// take makes one run of all occurrences up to now: it returns the last of them
// and how many others there are.
func (t *timer) take(now time.Time) (due time.Time, missed int) {
	due = t.next
	for {
		next := t.schedule.Next(due).UTC()
		if next.IsZero() || next.After(now) {
			break
		}
		due = next
		if missed++; missed == maxMissed {
			break
		}
	}
	t.cursor.Last, t.cursor.At = due, due
	// What repeats after so much time counts from when it really ran; all that
	// lies before is made up for.
	if missed == maxMissed || t.schedule.Relative && now.Sub(due) > onTime {
		t.cursor.At = now
	}
	t.find()
	return due, missed
}
