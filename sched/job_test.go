package sched

import (
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"hikae/repo"
	"hikae/repo/retention"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		patterns, vm string
		want         bool
	}{
		{"esx1/*", "esx1/web01", true},
		{"esx1/*", "esx2/web01", false},
		{"*/web*", "esx2/web01", true},
		{"esx?/web01", "esx2/web01", true},
		{"esx?/web01", "esx12/web01", false},
		{"esx1/*,!esx1/scratch*", "esx1/scratch2", false},
		{"!esx1/scratch*,esx1/*", "esx1/scratch2", false},
		{"esx1/*,!esx1/scratch*", "esx1/scrap", true},
		{"esx1/web [old]", "esx1/web [old]", true},
		{"esx1/web [old]", "esx1/web o", false},
		{`esx1/a\*`, `esx1/a\b`, true},
		{"esx1/*x*y*", "esx1/axbxcyd", true},
		{"esx1/*x*y*", "esx1/aybx", false},
		{"esx1/überw?chung", "esx1/überwächung", true},
		{"esx1/Web", "esx1/web", false},
	} {
		m, err := parseMatcher(strings.Split(c.patterns, ","))
		if err != nil {
			t.Fatal(err)
		}
		vm, err := repo.ParseVMID(c.vm)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.match(vm); got != c.want {
			t.Errorf("%s, %s: %v", c.patterns, c.vm, got)
		}
	}
}

func FuzzGlob(f *testing.F) {
	f.Add("*a?b*", "xxaybzz")
	f.Add("", "")
	f.Fuzz(func(t *testing.T, p, s string) {
		// Parts of letters become whole ones when they are joined.
		if strings.ContainsAny(p, "*?") || !utf8.ValidString(p) || !utf8.ValidString(s) {
			glob(p, s)
			return
		}
		if glob(p, s) != (string([]rune(p)) == string([]rune(s))) {
			t.Errorf("%q, %q", p, s)
		}
		if !glob("*"+p+"*", s+p+s) {
			t.Errorf("*%q* does not match %q", p, s+p+s)
		}
	})
}

// TestWindowTimes shows when windows are open around changes of the clock.
func TestWindowTimes(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	must(t, err)
	for _, c := range []struct {
		window, at, changes string
		open                bool
	}{
		{"22:00-06:00", "2026-05-01T21:59:59+02:00", "2026-05-01T22:00:00+02:00", false},
		{"22:00-06:00", "2026-05-01T22:00:00+02:00", "2026-05-02T06:00:00+02:00", true},
		{"22:00-06:00", "2026-05-02T05:59:59+02:00", "2026-05-02T06:00:00+02:00", true},
		{"22:00-06:00", "2026-05-02T06:00:00+02:00", "2026-05-02T22:00:00+02:00", false},
		{"08:00-09:30", "2026-05-02T09:00:00+02:00", "2026-05-02T09:30:00+02:00", true},
		// set forward over it: an hour shorter; set back: an hour longer
		{"01:00-04:00", "2026-03-29T03:30:00+02:00", "2026-03-29T04:00:00+02:00", true},
		{"01:00-04:00", "2026-10-25T02:30:00+01:00", "2026-10-25T04:00:00+01:00", true},
		// all of it skipped: it does not open that day
		{"02:10-02:50", "2026-03-29T03:00:00+02:00", "2026-03-30T02:10:00+02:00", false},
		// it closes the first time round, and opens once
		{"02:10-02:50", "2026-10-25T02:20:00+01:00", "2026-10-26T02:10:00+01:00", false},
	} {
		w, err := parseWindow(c.window, berlin)
		must(t, err)
		at, err := time.Parse(time.RFC3339, c.at)
		must(t, err)
		open, changes := w.open(at)
		if open != c.open || changes.Format(time.RFC3339) != c.changes {
			t.Errorf("%s at %s: open %v until %s", c.window, c.at, open, changes.Format(time.RFC3339))
		}
	}
	if open, changes := (*window)(nil).open(time.Now()); !open || !changes.IsZero() {
		t.Error("no window is not open")
	}
}

func TestValidate(t *testing.T) {
	ok := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "Asia/Tokyo"}
	if err := Validate([]Job{
		ok,
		{Name: "prune", Kind: KindPrune, Schedules: []string{"after nightly"}, Prune: PruneBudget{MaxRewrite: 1 << 30}},
		{Name: "scrub", Kind: KindCheck, Schedules: []string{"weekly sun 12:00"}, Check: CheckBudget{Percent: 5, Time: time.Hour}},
	}, []string{"esx1"}, []string{"main"}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		change func(*Job)
		want   string
	}{
		{func(j *Job) { j.Name = "" }, `job 1: name: "" cannot be one: letters, digits, dots, dashes and underscores, at most 63, beginning with a letter or digit`},
		{func(j *Job) { j.VMs = nil }, `job nightly: vms: it names no VM: write for example ["esx1/*"]`},
		{func(j *Job) { j.VMs = []string{"web01"} }, `job nightly: vms: "web01" names no VM: write HOST/VM, for example esx1/web01, esx1/* or !esx1/scratch*`},
		{func(j *Job) { j.VMs = []string{"esx9/*"} }, `job nightly: vms: esx9/*: no host is called esx9 (there is esx1)`},
		{func(j *Job) { j.Kind = "dance" }, `job nightly: kind: "dance" is none; jobs can be backup, prune or check`},
		{func(j *Job) { j.Kind = KindRehearse }, `job nightly: kind: rehearse is reserved; jobs can be backup, prune or check`},
		{func(j *Job) { j.Kind = KindPrune }, `job nightly: vms: a prune is about a repository, not about VMs; leave it out`},
		{func(j *Job) { j.Repository = "x" }, `job nightly: repository: none is called x (there is main)`},
		{func(j *Job) { j.TimeZone = "Mars/Base" }, `job nightly: timezone: "Mars/Base" is none; write for example Europe/Berlin`},
		{func(j *Job) { j.Schedules = []string{"after other"} }, `job nightly: schedule: "after other": no job is called other`},
		{func(j *Job) { j.Schedules = []string{"after nightly"} }, `job nightly: schedule: jobs that come after each other close a circle: nightly after nightly; none would ever begin`},
		{func(j *Job) { j.Schedules = []string{"manual", "daily 02:00"} }, `job nightly: schedule: manual stands alone`},
		{func(j *Job) { j.Window = "22-6" }, `job nightly: window: "22-6" is no time of day from and to, such as 22:00-06:00`},
		{func(j *Job) { j.Window = "22:00-22:00" }, `job nightly: window: "22:00-22:00" ends when it begins; leave it out if runs may begin at any time`},
		{func(j *Job) { j.WindowEnd = WindowStop }, `job nightly: window_end: there is no window`},
		{func(j *Job) { j.Compression = "zip" }, `job nightly: compression: "zip" is none of zstd, zstd-default, zstd-better, s2, none`},
		{func(j *Job) { j.Keep = retention.Policy{Last: -2} }, `job nightly: keep: `},
		{func(j *Job) { j.Retries = 100 }, `job nightly: retries: 100 is more than 20`},
		{func(j *Job) { j.RateLimit = -1 }, `job nightly: rate_limit: -1 is negative`},
		{func(j *Job) { j.Timeout = time.Second }, `job nightly: timeout: 1s is under a minute`},
		{func(j *Job) { j.StaleAfter = time.Minute }, `job nightly: no_success_for: 1m0s is under an hour`},
		{func(j *Job) { j.Check.Percent = 5 }, `job nightly: check: a backup checks nothing; leave it out`},
		{func(j *Job) { j.Prune.Grace = 5 }, `job nightly: prune: a backup prunes nothing; leave it out`},
	} {
		j := ok
		c.change(&j)
		err := Validate([]Job{j}, []string{"esx1"}, []string{"main"})
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("got  %v\nwant %s", err, c.want)
			continue
		}
		var one *Invalid
		if !errors.As(err, &one) || one.Key == "" || one.Index != 0 {
			t.Errorf("%v is not Invalid", err)
		}
	}
	link := func(name, after string) Job {
		return Job{Name: name, VMs: []string{"esx1/*"}, Schedules: []string{"after " + after}}
	}
	err := Validate([]Job{link("a", "b"), link("b", "c"), link("c", "a"), ok, ok}, []string{"esx1"}, []string{"main", "other"})
	for _, want := range []string{
		"job a: schedule: jobs that come after each other close a circle: a after b after c after a; none would ever begin",
		"job nightly: name: two jobs are called so", "job nightly: repository: say which: there are main, other",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nlacks %s", err, want)
		}
	}
	if n := strings.Count(err.Error(), "circle"); n != 1 {
		t.Errorf("the circle is told %d times", n)
	}
}

func TestPause(t *testing.T) {
	for n, want := range map[int]time.Duration{1: time.Minute, 2: 4 * time.Minute, 3: 16 * time.Minute, 4: 30 * time.Minute, 20: 30 * time.Minute} {
		if got := pause(n); got != want {
			t.Errorf("after %d: %v", n, got)
		}
	}
}
