package calendar

import (
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the tables below must not depend on the machine's zones

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func zone(t interface{ Fatal(...any) }, name string) *time.Location {
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

// TestTables shows what runs when around the changes that real zones make.
func TestTables(t *testing.T) {
	for _, c := range []struct{ schedule, zone, from, want string }{
		{"daily 02:00", "Asia/Tokyo", "2026-03-01T00:00:00Z", `
2026-03-01T17:00:00Z 02:00 JST
2026-03-02T17:00:00Z 02:00 JST
2026-03-03T17:00:00Z 02:00 JST`},
		// set forward from 02:00 to 03:00: due at the jump
		{"daily 02:30", "Europe/Berlin", "2026-03-28T00:00:00Z", `
2026-03-28T01:30:00Z 02:30 CET
2026-03-29T01:00:00Z 03:00 CEST
2026-03-30T00:30:00Z 02:30 CEST`},
		// set back from 03:00 to 02:00: due the first time round only
		{"daily 02:30", "Europe/Berlin", "2026-10-24T12:00:00Z", `
2026-10-25T00:30:00Z 02:30 CEST
2026-10-26T01:30:00Z 02:30 CET
2026-10-27T01:30:00Z 02:30 CET`},
		{"30 2 * * *", "America/New_York", "2026-03-07T12:00:00Z", `
2026-03-08T07:00:00Z 03:00 EDT
2026-03-09T06:30:00Z 02:30 EDT`},
		{"30 * * * *", "America/New_York", "2026-11-01T04:00:00Z", `
2026-11-01T04:30:00Z 00:30 EDT
2026-11-01T05:30:00Z 01:30 EDT
2026-11-01T06:30:00Z 01:30 EST
2026-11-01T07:30:00Z 02:30 EST`},
		{"30 * * * *", "America/New_York", "2026-03-08T06:00:00Z", `
2026-03-08T06:30:00Z 01:30 EST
2026-03-08T07:30:00Z 03:30 EDT
2026-03-08T08:30:00Z 04:30 EDT`},
		{"15 1,2 * * *", "America/New_York", "2026-11-01T04:00:00Z", `
2026-11-01T05:15:00Z 01:15 EDT
2026-11-01T07:15:00Z 02:15 EST
2026-11-02T06:15:00Z 01:15 EST`},
		// half an hour, and a jump at midnight
		{"daily 02:10", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", `
2026-10-03T15:30:00Z 02:30 +11
2026-10-04T15:10:00Z 02:10 +11`},
		{"daily 00:00", "America/Santiago", "2026-09-05T12:00:00Z", `
2026-09-06T04:00:00Z 01:00 -03
2026-09-07T03:00:00Z 00:00 -03`},
		// a day that never was: the 30th of December 2011
		{"daily 12:00", "Pacific/Apia", "2011-12-29T00:00:00Z", `
2011-12-29T22:00:00Z 12:00 -10
2011-12-30T10:00:00Z 00:00 +14
2011-12-30T22:00:00Z 12:00 +14`},
		{"weekly sun,wed 03:00", "UTC", "2026-01-01T00:00:00Z", `
2026-01-04T03:00:00Z 03:00 UTC
2026-01-07T03:00:00Z 03:00 UTC
2026-01-11T03:00:00Z 03:00 UTC`},
		{"monthly 31 03:00", "UTC", "2026-01-01T00:00:00Z", `
2026-01-31T03:00:00Z 03:00 UTC
2026-03-31T03:00:00Z 03:00 UTC
2026-05-31T03:00:00Z 03:00 UTC`},
		{"monthly last 03:00", "UTC", "2028-01-01T00:00:00Z", `
2028-01-31T03:00:00Z 03:00 UTC
2028-02-29T03:00:00Z 03:00 UTC
2028-03-31T03:00:00Z 03:00 UTC`},
		{"monthly last sun 03:00", "UTC", "2026-01-01T00:00:00Z", `
2026-01-25T03:00:00Z 03:00 UTC
2026-02-22T03:00:00Z 03:00 UTC
2026-03-29T03:00:00Z 03:00 UTC`},
		{"monthly 2nd tue 03:00", "UTC", "2026-09-01T00:00:00Z", `
2026-09-08T03:00:00Z 03:00 UTC
2026-10-13T03:00:00Z 03:00 UTC`},
		{"daily 02:00,14:00", "UTC", "2026-01-01T02:00:00Z", `
2026-01-01T14:00:00Z 14:00 UTC
2026-01-02T02:00:00Z 02:00 UTC`},
		{"every 6h", "Europe/Berlin", "2026-03-28T22:00:00Z", `
2026-03-29T04:00:00Z 06:00 CEST
2026-03-29T10:00:00Z 12:00 CEST`},
		{"once 2026-12-01 02:00", "Asia/Tokyo", "2026-11-22T00:00:00Z", `
2026-11-30T17:00:00Z 02:00 JST
never`},
		{"0 2 29 2 *", "UTC", "2026-01-01T00:00:00Z", `
2028-02-29T02:00:00Z 02:00 UTC
2032-02-29T02:00:00Z 02:00 UTC`},
		{"0 2 30 2 *", "UTC", "2026-01-01T00:00:00Z", "\nnever"},
		{"0 2 13 * fri", "UTC", "2026-11-07T00:00:00Z", `
2026-11-13T02:00:00Z 02:00 UTC
2026-11-20T02:00:00Z 02:00 UTC`},
	} {
		t.Run(c.schedule+" "+c.zone, func(t *testing.T) {
			loc := zone(t, c.zone)
			s, err := Parse(c.schedule, loc)
			if err != nil {
				t.Fatal(err)
			}
			at, err := time.Parse(time.RFC3339, c.from)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for range strings.Count(c.want, "\n") {
				at = s.Next(at)
				if at.IsZero() {
					got.WriteString("\nnever")
					break
				}
				got.WriteString("\n" + at.UTC().Format(time.RFC3339) + at.In(loc).Format(" 15:04 MST"))
			}
			if d := cmp.Diff(c.want, got.String()); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestOnceADay walks through years of zones that change their clocks: a daily
// schedule runs once for every date there is, and never goes back.
func TestOnceADay(t *testing.T) {
	for _, name := range []string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago", "Asia/Tokyo", "Africa/Casablanca", "Pacific/Apia", "Asia/Tehran"} {
		loc := zone(t, name)
		for _, clock := range []string{"00:00", "00:30", "01:59", "02:00", "02:30", "03:00", "23:59"} {
			s, err := Parse("daily "+clock, loc)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Date(2009, 12, 31, 23, 59, 30, 0, loc)
			at, runs := start, 0
			for at.Year() < 2031 {
				next := s.Next(at)
				if !next.After(at) || next.Sub(at) > 49*time.Hour {
					t.Fatalf("%s %s: %v follows %v", name, clock, next, at)
				}
				at = next
				runs++
			}
			want := 0
			for d := time.Date(2010, 1, 1, 0, 0, 0, 0, time.UTC); d.Year() < 2031; d = d.AddDate(0, 0, 1) {
				want++
			}
			// Midnight of the day that Samoa skipped is the next midnight: the
			// two are one moment and one run.
			if name == "Pacific/Apia" && clock == "00:00" {
				want--
			}
			// runs counts the one that ended the loop, in 2031.
			if got := runs - 1; got != want {
				t.Errorf("%s, daily %s: %d runs on %d dates", name, clock, got, want)
			}
		}
	}
}

// TestNextIsSteady: asking from any moment before the next run gives that run.
func TestNextIsSteady(t *testing.T) {
	schedules := []string{"daily 02:30", "weekly mon 01:00", "monthly last 23:30", "*/20 * * * *", "0 */6 * * *", "30 1-3 * * *"}
	rapid.Check(t, func(t *rapid.T) {
		loc := zone(t, rapid.SampledFrom([]string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago"}).Draw(t, "zone"))
		s, err := Parse(rapid.SampledFrom(schedules).Draw(t, "schedule"), loc)
		if err != nil {
			t.Fatal(err)
		}
		at := time.Unix(rapid.Int64Range(1.5e9, 2e9).Draw(t, "at"), 0)
		next := s.Next(at)
		between := at.Add(time.Duration(rapid.Int64Range(0, int64(next.Sub(at))-1).Draw(t, "between")))
		if again := s.Next(between); !again.Equal(next) {
			t.Fatalf("from %v: %v; from %v: %v", at, next, between, again)
		}
	})
}

func TestOther(t *testing.T) {
	s, err := Parse("after  Nightly always", time.UTC)
	if err != nil || s.Kind != After || s.Job != "Nightly" || !s.Always || s.String() != "after Nightly always" {
		t.Error(s, err)
	}
	if s, err = Parse("manual", time.UTC); err != nil || s.Kind != Manual || !s.Next(time.Unix(0, 0)).IsZero() {
		t.Error(s, err)
	}
	for _, bad := range []string{
		"", "daily", "daily 25:00", "daily 2", "weekly 03:00", "weekly someday 03:00", "monthly 32 03:00", "monthly 6th sun 03:00",
		"monthly last sun", "every", "every 6", "every 10s", "every -1h", "once tomorrow", "once 2026-13-01 02:00", "after", "after a b", "manual now",
		"* * * *", "60 * * * *", "TZ=UTC 0 0 * * *", "CRON_TZ=UTC 0 0 * * *", "@every 5s", "@reboot", "hello",
	} {
		if s, err := Parse(bad, time.UTC); err == nil {
			t.Errorf("%q passed as %v", bad, s)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"daily 02:00", "0 */6 * * *", "@hourly", "monthly 2nd tue 03:00", "*", "@", "0 0 * * * *"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text, time.UTC)
		if err != nil {
			return
		}
		at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		if next := s.Next(at); !next.IsZero() && !next.After(at) {
			t.Fatalf("%q: %v is not after %v", text, next, at)
		}
	})
}
