package sched

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	"hikae/sched/calendar"
)

// Invalid is something that is wrong with a job.
type Invalid struct {
	Index int    // of the job in the list
	Job   string // its name
	Key   string // of the configuration
	Text  string // what is wrong, and what would be right
}

func (e *Invalid) Error() string {
	if e.Job == "" {
		return fmt.Sprintf("job %d: %s: %s", e.Index+1, e.Key, e.Text)
	}
	return fmt.Sprintf("job %s: %s: %s", e.Job, e.Key, e.Text)
}

// nameRule is what jobs may be called; the names of repositories and hosts
// follow the same one.
var nameRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

var compressions = []string{"", "zstd", "zstd-default", "zstd-better", "s2", "none"}

// Validate tells what is wrong with jobs: an error for each thing, of type
// *Invalid, joined; nil when nothing is. hosts and repositories are the names
// that the configuration has.
func Validate(jobs []Job, hosts, repositories []string) error {
	_, err := compile(jobs, hosts, repositories)
	return err
}

// plan is a job that was found valid.
type plan struct {
	Job
	kind       Kind
	repository string
	match      matcher
	hosts      []string // that have VMs in the job
	loc        *time.Location
	schedules  []*calendar.Schedule
	window     *window
}

// schedule is the job's schedules for people.
func (p *plan) schedule() []string {
	if len(p.schedules) == 0 {
		return []string{"manual"}
	}
	out := make([]string, len(p.schedules))
	for i, s := range p.schedules {
		out[i] = s.String()
	}
	return out
}

func compile(jobs []Job, hosts, repositories []string) ([]*plan, error) {
	var plans []*plan
	var wrong []error
	names := map[string]bool{}
	for i, job := range jobs {
		c := compiler{index: i, plan: &plan{Job: job, kind: job.kind()}}
		if names[job.Name] {
			c.bad("name", "two jobs are called so")
		}
		names[job.Name] = true
		c.compile(hosts, repositories)
		wrong = append(wrong, c.wrong...)
		plans = append(plans, c.plan)
	}
	wrong = append(wrong, links(plans, names)...)
	if len(wrong) > 0 {
		return nil, errors.Join(wrong...)
	}
	return plans, nil
}

type compiler struct {
	index int
	plan  *plan
	wrong []error
}

func (c *compiler) bad(key, format string, args ...any) {
	c.wrong = append(c.wrong, &Invalid{Index: c.index, Job: c.plan.Name, Key: key, Text: fmt.Sprintf(format, args...)})
}

func (c *compiler) compile(hosts, repositories []string) {
	p := c.plan
	if !nameRule.MatchString(p.Name) {
		c.bad("name", "%q cannot be one: letters, digits, dots, dashes and underscores, at most 63, beginning with a letter or digit", p.Name)
	}
	c.work(hosts)
	c.place(repositories)
	c.times()
	c.limits()
}

// work checks what the job does.
func (c *compiler) work(hosts []string) {
	p := c.plan
	switch p.kind {
	case KindBackup:
		var err error
		if p.match, err = parseMatcher(p.VMs); err != nil {
			c.bad("vms", "%v", err)
			return
		}
		for _, pat := range slices.Concat(p.match.include, p.match.exclude) {
			if !slices.ContainsFunc(hosts, func(h string) bool { return glob(pat.host, h) }) {
				c.bad("vms", "%s: no host is called %s (there %s)", pat.text, pat.host, list(hosts))
			}
		}
		p.hosts = p.match.hosts(hosts)
	case KindPrune, KindCheck:
		switch {
		case len(p.VMs) > 0:
			c.bad("vms", "a %s is about a repository, not about VMs; leave it out", p.kind)
		case !p.Keep.Empty():
			c.bad("keep", "a %s forgets nothing; keep belongs to the job that backs up", p.kind)
		case p.Quiesce || p.Compression != "" || p.RateLimit != 0:
			c.bad("kind", "quiesce, compression and rate_limit mean nothing to a %s; leave them out", p.kind)
		}
	case KindRehearse:
		c.bad("kind", "rehearse is reserved; jobs can be %s, %s or %s", KindBackup, KindPrune, KindCheck)
	default:
		c.bad("kind", "%q is none; jobs can be %s, %s or %s", p.kind, KindBackup, KindPrune, KindCheck)
	}
	if err := p.Keep.Validate(); err != nil {
		c.bad("keep", "%v", err)
	}
	if !slices.Contains(compressions, p.Compression) {
		c.bad("compression", "%q is none of %s", p.Compression, strings.Join(compressions[1:], ", "))
	}
}

// place checks the repository.
func (c *compiler) place(repositories []string) {
	p := c.plan
	switch {
	case p.Repository == "" && len(repositories) == 1:
		p.repository = repositories[0]
	case p.Repository == "" && len(repositories) == 0:
		c.bad("repository", "there is none yet; add a [[repository]]")
	case p.Repository == "":
		c.bad("repository", "say which: there %s", list(repositories))
	case !slices.Contains(repositories, p.Repository):
		c.bad("repository", "none is called %s (there %s)", p.Repository, list(repositories))
	default:
		p.repository = p.Repository
	}
}

// times checks time zone, schedules and window.
func (c *compiler) times() {
	p := c.plan
	p.loc = time.Local
	if p.TimeZone != "" {
		loc, err := time.LoadLocation(p.TimeZone)
		if err != nil {
			c.bad("timezone", "%q is none; write for example Europe/Berlin", p.TimeZone)
			return
		}
		p.loc = loc
	}
	for _, text := range p.Schedules {
		s, err := calendar.Parse(text, p.loc)
		if err != nil {
			c.bad("schedule", "%v", err)
			continue
		}
		if s.Kind == calendar.Manual && len(p.Schedules) > 1 {
			c.bad("schedule", "manual stands alone")
		}
		if s.Kind != calendar.Manual {
			p.schedules = append(p.schedules, s)
		}
	}
	if p.Window != "" {
		w, err := parseWindow(p.Window, p.loc)
		if err != nil {
			c.bad("window", "%v", err)
		}
		p.window = w
	}
	switch {
	case !slices.Contains([]string{"", WindowFinish, WindowStop}, p.WindowEnd):
		c.bad("window_end", "%q is neither %s nor %s", p.WindowEnd, WindowFinish, WindowStop)
	case p.WindowEnd != "" && p.Window == "":
		c.bad("window_end", "there is no window")
	}
}

// limits checks numbers.
func (c *compiler) limits() {
	p := c.plan
	if p.Retries > MaxRetries {
		c.bad("retries", "%d is more than %d", p.Retries, MaxRetries)
	}
	if p.RateLimit < 0 {
		c.bad("rate_limit", "%d is negative", p.RateLimit)
	}
	if p.Timeout < 0 || p.Timeout > 0 && p.Timeout < time.Minute {
		c.bad("timeout", "%v is under a minute", p.Timeout)
	}
	if p.StaleAfter > 0 && p.StaleAfter < time.Hour {
		c.bad("no_success_for", "%v is under an hour", p.StaleAfter)
	}
	b := p.Check
	if p.kind != KindCheck && b != (CheckBudget{}) {
		c.bad("check", "a %s checks nothing; leave it out", p.kind)
	}
	if p.kind != KindPrune && p.Prune != (PruneBudget{}) {
		c.bad("prune", "a %s prunes nothing; leave it out", p.kind)
	}
	if !slices.Contains([]string{"", CheckScrub, CheckStructure, CheckData}, b.How) {
		c.bad("check", "%q is none of %s, %s, %s", b.How, CheckScrub, CheckStructure, CheckData)
	}
	budget := b.Percent != 0 || b.Bytes != 0 || b.Time != 0
	if budget && b.How != "" && b.How != CheckScrub {
		c.bad("check", "only a scrub has a budget; %s looks at everything", b.How)
	}
	if b.Percent < 0 || b.Percent > 100 || math.IsNaN(b.Percent) || b.Bytes < 0 || b.Time < 0 {
		c.bad("check", "a budget is up to 100 per cent, and not negative")
	}
}

// links checks what jobs come after: that it exists, and that no circle closes.
func links(plans []*plan, names map[string]bool) []error {
	var wrong []error
	after := map[string][]string{}
	index := map[string]int{}
	for i, p := range plans {
		index[p.Name] = i
		for _, s := range p.schedules {
			if s.Kind != calendar.After {
				continue
			}
			if !names[s.Job] {
				wrong = append(wrong, &Invalid{i, p.Name, "schedule", fmt.Sprintf("%q: no job is called %s", s, s.Job)})
				continue
			}
			after[p.Name] = append(after[p.Name], s.Job)
		}
	}
	done := map[string]bool{}
	var path []string
	var visit func(name string) bool
	visit = func(name string) bool {
		if at := slices.Index(path, name); at >= 0 {
			circle := append(slices.Clone(path[at:]), name)
			wrong = append(wrong, &Invalid{
				index[name], name, "schedule",
				"jobs that come after each other close a circle: " + strings.Join(circle, " after ") + "; none would ever begin",
			})
			return false
		}
		if done[name] {
			return true
		}
		done[name] = true
		path = append(path, name)
		defer func() { path = path[:len(path)-1] }()
		for _, next := range after[name] {
			if !visit(next) {
				return false
			}
		}
		return true
	}
	for _, p := range plans {
		path = path[:0]
		visit(p.Name)
	}
	return wrong
}

// list is names for a sentence.
func list(names []string) string {
	switch len(names) {
	case 0:
		return "are none"
	case 1:
		return "is " + names[0]
	}
	return "are " + strings.Join(names, ", ")
}
