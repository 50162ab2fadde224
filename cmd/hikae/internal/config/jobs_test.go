package config

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hikae/repo/retention"
	"hikae/sched"
)

const oneRepository = "[[repository]]\nname = \"main\"\npath = \"/r\"\n"

func TestJobsAreRead(t *testing.T) {
	text := oneRepository + hostBlock(host("esx1")) + `
[daemon]
state = "/var/lib/x"
socket = "run/s"
metrics = "127.0.0.1:9321"
per_host = 3
total = 6

[[job]]
name = "nightly"
vms = ["esx1/*", "!esx1/scratch*"]
repository = "main"
schedule = ["daily 02:00", "weekly sun 12:00"]
timezone = "Asia/Tokyo"
keep = { last = 4, weekly = 4, monthly = "all", within = "30d" }
window = "22:00-06:00"
window_end = "stop"
quiesce = true
compression = "s2"
rate_limit = "50MiB"
retries = 0
timeout = "12h"
no_success_for = "never"

[[job]]
name = "tidy"
kind = "prune"
schedule = "after nightly always"
prune = { max_rewrite = 0, grace = "48h" }

[[job]]
name = "prove"
kind = "check"
schedule = "weekly sun 12:00"
[job.check]
percent = 10
time = "2h"
bytes = 1000
`
	f, err := Parse("f.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Daemon{State: "/var/lib/x", Socket: "run/s", Metrics: "127.0.0.1:9321", PerHost: 3, Total: 6}, f.Daemon); d != "" {
		t.Error(d)
	}
	want := []sched.Job{
		{
			Name: "nightly", VMs: []string{"esx1/*", "!esx1/scratch*"}, Repository: "main",
			Schedules: []string{"daily 02:00", "weekly sun 12:00"}, TimeZone: "Asia/Tokyo",
			Keep:   retention.Policy{Last: 4, Weekly: 4, Monthly: retention.Unlimited, Within: retention.Span{Days: 30}},
			Window: "22:00-06:00", WindowEnd: "stop", Quiesce: true, Compression: "s2", RateLimit: 50 << 20,
			Retries: -1, Timeout: 12 * time.Hour, StaleAfter: -1,
		},
		{Name: "tidy", Kind: sched.KindPrune, Schedules: []string{"after nightly always"}, Prune: sched.PruneBudget{MaxRewrite: -1, Grace: 48 * time.Hour}},
		{Name: "prove", Kind: sched.KindCheck, Schedules: []string{"weekly sun 12:00"}, Check: sched.CheckBudget{Percent: 10, Bytes: 1000, Time: 2 * time.Hour}},
	}
	if d := cmp.Diff(want, f.Jobs); d != "" {
		t.Error(d)
	}
	f.Path = "/etc/hikae/f.toml"
	f.resolvePaths()
	if f.Daemon.Socket != "/etc/hikae/run/s" {
		t.Errorf("the socket is %s", f.Daemon.Socket)
	}
}

func TestJobErrorsNameTheLine(t *testing.T) {
	// The second job begins on line 14.
	begin := oneRepository + hostBlock(host("esx1")) + "[[job]]\nname = \"a\"\nvms = [\"esx1/*\"]\nkeep = { last = 1 }\n"
	n := strings.Count(begin, "\n")
	if n != 13 {
		t.Fatalf("the second job begins on line %d", n+1)
	}
	second := "[[job]]\nname = \"b\"\nvms = [\n  \"esx1/*\", # all\n]\n" // lines 14 to 18
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", second + "shedule = \"manual\"\n", "f.toml:19: job b: shedule: unknown key (did you mean schedule?)"},
		{"unknown key within", second + "keep = { lsat = 1 }\n", "f.toml:19: job b: keep.lsat: unknown key (did you mean last?)"},
		{"unknown key in a table", second + "[job.keep]\nlast = 1\nweakly = 2\n", "f.toml:21: job b: keep.weakly: unknown key (did you mean weekly?)"},
		{"schedule", second + "schedule = [\"daily 02:00\", \"dayly\"]\n", "f.toml:19: job b: schedule: "},
		{"keep", second + "keep = { last = -1 }\n", "f.toml:19: job b: keep.last: must be a number of generations"},
		{"type", second + "quiesce = \"yes\"\n", "f.toml:19: job b: quiesce: must be true or false"},
		{"list", second + "schedule = [1]\n", "f.toml:19: job b: schedule: must be text"},
		{"duration", second + "timeout = \"soon\"\n", "f.toml:19: job b: timeout: must be a duration"},
		{"size", second + "rate_limit = \"fast\"\n", "f.toml:19: job b: rate_limit: must be a number of bytes"},
		{"retries", second + "retries = 21\n", "f.toml:19: job b: retries: must be a number from 0"},
		{"zone", second + "timezone = \"Mars\"\n", "f.toml:19: job b: timezone: "},
		{"no host", "[[job]]\nname = \"b\"\nvms = \"esx2/*\"\n", "f.toml:16: job b: vms: esx2/*: no host"},
		{"no name", "[[job]]\nvms = \"esx1/*\"\n", "f.toml:14: job 2: name: "},
		{"name twice", "[[job]]\nvms = \"esx1/*\"\nname = \"a\"\n", "f.toml:16: job a: name: two jobs"},
		{"no table", second + "check = 5\n", "f.toml:19: job b: check: must be a table"},
		{"circle", second + "schedule = \"after b\"\n", "f.toml:19: job b: schedule: "},
		{"window", second + "window = \"late\"\n[daemon]\n", "f.toml:19: job b: window: "},
		{"metrics", second + "[daemon]\n\nmetrics = \"9321\"\n", "f.toml:21: daemon metrics: "},
		{"limit", second + "[daemon]\ntotal = -1\n", "f.toml:20: daemon total: -1"},
		{"unknown daemon key", second + "[daemon]\nmetric = \"9321\"\n", "f.toml:20: unknown key daemon.metric (did you mean metrics?)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f.toml", []byte(begin+c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error is %v, want one that says %q", err, c.want)
			}
			if !errors.Is(err, ErrConfig) {
				t.Errorf("%v is not ErrConfig", err)
			}
		})
	}
	// All that is wrong is said at once.
	_, err := Parse("f.toml", []byte(begin+second+"timezone = \"Mars\"\ncompression = \"zip\"\n"))
	if err == nil || !strings.Contains(err.Error(), "f.toml:19: ") || !strings.Contains(err.Error(), "f.toml:20: ") {
		t.Errorf("of two errors only: %v", err)
	}
}
