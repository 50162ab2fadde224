package calendar

import "time"

// instants returns when the clocks of loc show the given minute: once as a
// rule, twice when they are set back over it. When they are set forward over
// it, no clock ever shows it; then the answer is the moment of that jump and
// skipped is true.
func instants(y int, m time.Month, d, hour, minute int, loc *time.Location) (at []time.Time, skipped bool) {
	naive := time.Date(y, m, d, hour, minute, 0, 0, time.UTC)
	// The offsets in force half a day before and after are the only ones that
	// can apply: no place changes its clocks twice within a day. A whole day
	// can be skipped, though (Samoa, 2011-12-30), hence the second pair.
	var before int
	for i, away := range []time.Duration{-36 * time.Hour, -12 * time.Hour, 12 * time.Hour, 36 * time.Hour} {
		_, offset := naive.Add(away).In(loc).Zone()
		if i == 0 {
			before = offset
		}
		t := naive.Add(-time.Duration(offset) * time.Second).In(loc)
		if shows(t, naive) && (len(at) == 0 || !at[len(at)-1].Equal(t)) {
			at = append(at, t)
		}
	}
	if len(at) == 2 && at[1].Before(at[0]) {
		at[0], at[1] = at[1], at[0]
	}
	if len(at) > 0 {
		return at, false
	}
	// Counted with the old offset, the minute lies after the jump: the jump is
	// where the offset in force there began.
	t := naive.Add(-time.Duration(before) * time.Second).In(loc)
	start, _ := t.ZoneBounds()
	if start.IsZero() {
		start = t
	}
	return []time.Time{start}, true
}

// shows tells whether t's clock reads the same as naive's.
func shows(t, naive time.Time) bool {
	_, offset := t.Zone()
	return t.Add(time.Duration(offset) * time.Second).Equal(naive)
}
