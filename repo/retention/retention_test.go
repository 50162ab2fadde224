package retention

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// every makes one generation every step from first on.
func every(first string, step time.Duration, n int) []Item {
	t, err := time.Parse(time.RFC3339, first)
	if err != nil {
		panic(err)
	}
	var out []Item
	for i := range n {
		out = append(out, Item{Time: t.Add(time.Duration(i) * step), Sequence: uint64(i + 1)})
	}
	return out
}

func mustLoad(t *testing.T, zone string) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation(zone)
	if err != nil {
		t.Skipf("no time zone data for %s", zone)
	}
	return loc
}

// TestGolden writes out what each policy does to a history and compares it
// with the table an operator could check by hand. HIKAE_UPDATE=1 rewrites them.
func TestGolden(t *testing.T) {
	nightly := every("2026-01-01T02:00:00Z", 24*time.Hour, 400)
	cases := []struct {
		name   string
		zone   string
		now    string
		policy Policy
		items  []Item
	}{
		{"last", "UTC", "2027-02-05T00:00:00Z", Policy{Last: 3}, nightly},
		{"nightly-for-years", "UTC", "2027-02-05T00:00:00Z", Policy{Last: 4, Daily: 7, Weekly: 4, Monthly: 6, Yearly: 2}, nightly},
		{"weekly-at-new-year", "UTC", "2027-02-05T00:00:00Z", Policy{Weekly: 8}, nightly},
		{"all-months", "UTC", "2027-02-05T00:00:00Z", Policy{Monthly: Unlimited}, nightly},
		{"within", "UTC", "2027-02-05T00:00:00Z", Policy{Within: Span{Days: 10}}, nightly},
		{"within-and-monthly", "UTC", "2027-02-05T00:00:00Z", Policy{Within: Span{Days: 5}, Monthly: 3}, nightly},
		// 02:00 local does not exist on 2026-03-29 and comes twice on
		// 2026-10-25: each hour of the real time line is one period.
		{"hourly-over-dst-gap", "Europe/Berlin", "2026-03-29T06:00:00Z", Policy{Hourly: 6}, every("2026-03-28T22:30:00Z", 30*time.Minute, 14)},
		{"hourly-over-dst-overlap", "Europe/Berlin", "2026-10-25T06:00:00Z", Policy{Hourly: 6}, every("2026-10-24T22:30:00Z", 30*time.Minute, 14)},
		{"daily-in-tokyo", "Asia/Tokyo", "2026-03-05T00:00:00Z", Policy{Daily: 3}, every("2026-03-01T12:00:00Z", 6*time.Hour, 14)},
		{"no-policy", "UTC", "2026-01-05T00:00:00Z", Policy{}, nightly[:3]},
		{"held-and-incomplete", "UTC", "2026-01-12T00:00:00Z", Policy{Last: 2}, func() []Item {
			it := slices.Clone(nightly[:8])
			it[1].Held = true
			it[7].Incomplete = true // the newest does not count
			it[3].Incomplete = true
			return it
		}()},
		{"one-that-is-too-old-for-all", "UTC", "2030-01-01T00:00:00Z", Policy{Within: Span{Days: 1}}, nightly[:2]},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			now, err := time.Parse(time.RFC3339, c.now)
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.policy.Apply(c.items, now, mustLoad(t, c.zone))
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			fmt.Fprintf(&b, "%s, %d generations, now %s\n", c.policy, len(c.items), c.now)
			forgotten := 0
			for _, d := range got {
				if d.Keep {
					fmt.Fprintf(&b, "%s  #%d  %s\n", stamp(d.Time), d.Sequence, strings.Join(d.Reasons, ", "))
				} else {
					forgotten++
				}
			}
			fmt.Fprintf(&b, "%d forgotten\n", forgotten)
			file := filepath.Join("testdata", c.name+".txt")
			if os.Getenv("HIKAE_UPDATE") != "" {
				if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), b.String()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestClock(t *testing.T) {
	now := time.Date(2026, 2, 1, 0, 0, 0, 0, time.UTC)
	items := every("2026-01-01T02:00:00Z", 24*time.Hour, 5)
	back := slices.Clone(items)
	back[4].Time = back[1].Time.Add(time.Hour)
	if _, err := (Policy{Last: 1}).Apply(back, now, time.UTC); !errors.Is(err, ErrClock) {
		t.Errorf("a clock set back: %v", err)
	}
	back[4].Imported = true
	if _, err := (Policy{Last: 1}).Apply(back, now, time.UTC); err != nil {
		t.Errorf("an imported old copy: %v", err)
	}
	if _, err := (Policy{Last: 1}).Apply(items, items[2].Time, time.UTC); !errors.Is(err, ErrClock) {
		t.Errorf("generations of the future: %v", err)
	}
	if _, err := (Policy{Last: -2}).Apply(items, now, time.UTC); err == nil {
		t.Error("a count of -2 passed")
	}
}

// TestPromises checks what the package says of every history and policy.
func TestPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		count := rapid.IntRange(-1, 5)
		p := Policy{
			Last: count.Draw(t, "last"), Hourly: count.Draw(t, "hourly"), Daily: count.Draw(t, "daily"),
			Weekly: count.Draw(t, "weekly"), Monthly: count.Draw(t, "monthly"), Yearly: count.Draw(t, "yearly"),
		}
		if rapid.Bool().Draw(t, "within") {
			p.Within = Span{Days: rapid.IntRange(1, 90).Draw(t, "days")}
		}
		at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		var items []Item
		for i := range rapid.IntRange(0, 60).Draw(t, "n") {
			at = at.Add(time.Duration(rapid.IntRange(1, 20000).Draw(t, "minutes")) * time.Minute)
			items = append(items, Item{
				Time: at, Sequence: uint64(i + 1),
				Held: rapid.IntRange(0, 9).Draw(t, "held") == 0, Incomplete: rapid.IntRange(0, 9).Draw(t, "incomplete") == 0,
			})
		}
		got, err := p.Apply(items, at.Add(time.Hour), time.UTC)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(items) {
			t.Fatalf("%d decisions for %d generations", len(got), len(items))
		}
		sawComplete := false
		var kept []Item
		for _, d := range got {
			if d.Keep != (len(d.Reasons) > 0) {
				t.Fatalf("%+v: kept without a reason, or not kept with one", d)
			}
			if !d.Keep && (d.Held || d.Incomplete || p.Empty() || !sawComplete) {
				t.Fatalf("%+v must stay", d)
			}
			sawComplete = sawComplete || !d.Incomplete
			if d.Keep {
				kept = append(kept, d.Item)
			}
		}
		// What stays, stays: the same policy at the same time again.
		again, err := p.Apply(kept, at.Add(time.Hour), time.UTC)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range again {
			if !d.Keep {
				t.Fatalf("%+v was kept and goes the second time", d)
			}
		}
	})
}

func TestSpan(t *testing.T) {
	for in, want := range map[string]string{"30d": "30d", "1y6m": "1y6m", "2w": "14d", "1w1d": "8d", "36h": "36h", "1y2m3d4h": "1y2m3d4h"} {
		s, err := ParseSpan(in)
		if err != nil || s.String() != want {
			t.Errorf("%q: %v, %v", in, s, err)
		}
	}
	for _, in := range []string{"", "d", "0d", "30", "30x", "1d1d", "1h1d", "-3d", "99999999d", "3 d", "1m1y"} {
		if s, err := ParseSpan(in); err == nil {
			t.Errorf("%q passed as %v", in, s)
		}
	}
	at := time.Date(2026, 3, 30, 12, 0, 0, 0, time.UTC)
	if got := (Span{Days: 30}).Before(at); !got.Equal(time.Date(2026, 2, 28, 12, 0, 0, 0, time.UTC)) {
		t.Error(got)
	}
}
