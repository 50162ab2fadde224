package config

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"hikae/repo/retention"
	"hikae/sched"
)

// Daemon is the [daemon] section: what hikae daemon is told beside its jobs.
// What is left out has a default, which the command knows.
type Daemon struct {
	// State is the directory for what the daemon remembers, its history for
	// example; as --state.
	State string `toml:"state"`
	// Socket is where the daemon listens for hikae status and its like.
	Socket string `toml:"socket"`
	// Metrics is the ADDRESS:PORT for Prometheus; empty is none.
	Metrics string `toml:"metrics"`
	// PerHost is how many VMs of one host are backed up at a time, Total how many
	// in all; 0 is the default of package sched.
	PerHost int `toml:"per_host"`
	Total   int `toml:"total"`
}

// maxAtATime bounds Daemon.PerHost and Total; more is a slip of the finger.
const maxAtATime = 1000

func (f *File) validateDaemon(lay *layout) error {
	at := func(key, format string, args ...any) error {
		return fmt.Errorf("%w: %s:%d: daemon %s: %s", ErrConfig, f.Path, lay.lineOf([]string{"daemon", key}), key, fmt.Sprintf(format, args...))
	}
	d := f.Daemon
	for _, n := range []struct {
		key   string
		value int
	}{{"per_host", d.PerHost}, {"total", d.Total}} {
		if n.value < 0 || n.value > maxAtATime {
			return at(n.key, "%d is not between 1 and %d", n.value, maxAtATime)
		}
	}
	if d.Metrics != "" {
		i := strings.LastIndexByte(d.Metrics, ':')
		port, err := strconv.ParseUint(d.Metrics[i+1:], 10, 16)
		if i < 0 || err != nil || port == 0 {
			return at("metrics", "%q must be ADDRESS:PORT, for example 127.0.0.1:9321", d.Metrics)
		}
	}
	return nil
}

// HostNames are the names of the hosts.
func (f *File) HostNames() []string {
	var names []string
	for _, h := range f.Hosts {
		names = append(names, h.Name)
	}
	return names
}

// RepositoryNames are the names of the repositories.
func (f *File) RepositoryNames() []string {
	var names []string
	for _, r := range f.Repositories {
		names = append(names, r.Name)
	}
	return names
}

// validateJobs reads the [[job]] blocks. They come as bare tables, not as
// structs, because the TOML library forgets which of several blocks a value
// stood in, and an error has to name its line.
func (f *File) validateJobs(lay *layout) error {
	var wrong []error
	at := func(i int, job, key, text string) {
		if job == "" {
			job = strconv.Itoa(i + 1)
		}
		wrong = append(wrong, fmt.Errorf("%w: %s:%d: job %s: %s: %s", ErrConfig, f.Path, lay.lineIn("job", i, key), job, key, text))
	}
	for i, table := range f.JobTables {
		job, bad := readJob(table)
		for _, b := range bad {
			at(i, job.Name, b.key, b.text)
		}
		f.Jobs = append(f.Jobs, job)
	}
	if len(wrong) > 0 {
		return errors.Join(wrong...)
	}
	err := sched.Validate(f.Jobs, f.HostNames(), f.RepositoryNames())
	if err == nil {
		return nil
	}
	list := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		list = joined.Unwrap()
	}
	for _, err := range list {
		var invalid *sched.Invalid
		if !errors.As(err, &invalid) {
			return fmt.Errorf("%w: %s: %w", ErrConfig, f.Path, err)
		}
		at(invalid.Index, invalid.Job, invalid.Key, invalid.Text)
	}
	return errors.Join(wrong...)
}

// wrongKey is a key of a job that cannot be read.
type wrongKey struct{ key, text string }

// jobReader reads a table key by key.
type jobReader struct {
	bad []wrongKey
}

func (r *jobReader) fail(key, format string, args ...any) {
	r.bad = append(r.bad, wrongKey{key, fmt.Sprintf(format, args...)})
}

// readJob turns a [[job]] block into a job; its sense is for sched.Validate to
// judge.
func readJob(table map[string]any) (sched.Job, []wrongKey) {
	var r jobReader
	var j sched.Job
	r.table("", table, map[string]func(key string, v any){
		"name":           r.text(&j.Name),
		"kind":           func(key string, v any) { var s string; r.text(&s)(key, v); j.Kind = sched.Kind(s) },
		"vms":            r.texts(&j.VMs),
		"repository":     r.text(&j.Repository),
		"schedule":       r.texts(&j.Schedules),
		"timezone":       r.text(&j.TimeZone),
		"keep":           r.keep(&j.Keep),
		"window":         r.text(&j.Window),
		"window_end":     r.text(&j.WindowEnd),
		"quiesce":        r.flag(&j.Quiesce),
		"compression":    r.text(&j.Compression),
		"rate_limit":     r.size(&j.RateLimit),
		"retries":        r.retries(&j.Retries),
		"timeout":        r.duration(&j.Timeout),
		"no_success_for": r.duration(&j.StaleAfter),
		"check":          r.check(&j.Check),
		"prune":          r.prune(&j.Prune),
	})
	return j, r.bad
}

// table hands each value to the function that reads it. Keys are read in the
// order of their names, so that the same file always gives the same errors.
func (r *jobReader) table(prefix string, table map[string]any, read map[string]func(key string, v any)) {
	keys := make([]string, 0, len(table))
	for key := range table {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		if f, ok := read[key]; ok {
			f(prefix+key, table[key])
			continue
		}
		full := append([]string{"job"}, strings.Split(prefix+key, ".")...)
		r.fail(prefix+key, "unknown key%s", didYouMean(full))
	}
}

func (r *jobReader) text(to *string) func(string, any) {
	return func(key string, v any) {
		s, ok := v.(string)
		if !ok {
			r.fail(key, "must be text in quotes")
		}
		*to = s
	}
}

// texts reads one text or a list of them.
func (r *jobReader) texts(to *[]string) func(string, any) {
	return func(key string, v any) {
		switch v := v.(type) {
		case string:
			*to = []string{v}
			return
		case []any:
			for _, one := range v {
				s, ok := one.(string)
				if !ok {
					r.fail(key, "must be text in quotes, or a list of such")
					return
				}
				*to = append(*to, s)
			}
			return
		}
		r.fail(key, "must be text in quotes, or a list of such")
	}
}

func (r *jobReader) flag(to *bool) func(string, any) {
	return func(key string, v any) {
		b, ok := v.(bool)
		if !ok {
			r.fail(key, "must be true or false")
		}
		*to = b
	}
}

// duration reads "90m", or "never" for a negative one.
func (r *jobReader) duration(to *time.Duration) func(string, any) {
	return func(key string, v any) {
		s, ok := v.(string)
		if ok && s == "never" && strings.HasPrefix(key, "no_success_for") {
			*to = -1
			return
		}
		d, err := time.ParseDuration(s)
		if !ok || err != nil || d < 0 {
			r.fail(key, `must be a duration as "90m" or "36h"`)
			return
		}
		*to = d
	}
}

// size reads bytes: a number, or a text as "20GiB".
func (r *jobReader) size(to *int64) func(string, any) {
	return func(key string, v any) {
		switch v := v.(type) {
		case int64:
			*to = v
			return
		case string:
			if n, err := parseSize(v); err == nil {
				*to = n
				return
			}
		}
		r.fail(key, `must be a number of bytes or a size as "50MiB"`)
	}
}

// parseSize reads a size; units are binary.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGTiB")
	shift, ok := map[string]uint{"": 0, "B": 0, "K": 10, "KiB": 10, "M": 20, "MiB": 20, "G": 30, "GiB": 30, "T": 40, "TiB": 40}[s[len(digits):]]
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
	if err != nil || !ok || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size", s)
	}
	return n << shift, nil
}

// retries turns 0, which a person writes for none, into what sched.Job has for it.
func (r *jobReader) retries(to *int) func(string, any) {
	return func(key string, v any) {
		n, ok := v.(int64)
		if !ok || n < 0 || n > sched.MaxRetries {
			r.fail(key, "must be a number from 0 (none) to %d", sched.MaxRetries)
			return
		}
		*to = int(n)
		if n == 0 {
			*to = -1
		}
	}
}

// sub reads a table within the job.
func (r *jobReader) sub(key string, v any, read map[string]func(string, any)) {
	t, ok := v.(map[string]any)
	if !ok {
		r.fail(key, "must be a table as { … = … }")
		return
	}
	r.table(key+".", t, read)
}

func (r *jobReader) keep(to *retention.Policy) func(string, any) {
	count := func(to *int) func(string, any) {
		return func(key string, v any) {
			n, ok := v.(int64)
			switch {
			case v == "all":
				*to = retention.Unlimited
			case !ok || n < 0 || n > math.MaxInt32:
				r.fail(key, `must be a number of generations, or "all"`)
			default:
				*to = int(n)
			}
		}
	}
	return func(key string, v any) {
		r.sub(key, v, map[string]func(string, any){
			"last": count(&to.Last), "hourly": count(&to.Hourly), "daily": count(&to.Daily),
			"weekly": count(&to.Weekly), "monthly": count(&to.Monthly), "yearly": count(&to.Yearly),
			"within": func(key string, v any) {
				s, ok := v.(string)
				span, err := retention.ParseSpan(s)
				if !ok || err != nil {
					r.fail(key, `must be a span as "30d", "1y6m", "2w" or "36h"`)
				}
				to.Within = span
			},
		})
	}
}

func (r *jobReader) check(to *sched.CheckBudget) func(string, any) {
	return func(key string, v any) {
		r.sub(key, v, map[string]func(string, any){
			"how": r.text(&to.How),
			"percent": func(key string, v any) {
				switch v := v.(type) {
				case int64:
					to.Percent = float64(v)
				case float64:
					to.Percent = v
				default:
					r.fail(key, "must be a number up to 100")
				}
			},
			"bytes": r.size(&to.Bytes),
			"time":  r.duration(&to.Time),
		})
	}
}

func (r *jobReader) prune(to *sched.PruneBudget) func(string, any) {
	return func(key string, v any) {
		r.sub(key, v, map[string]func(string, any){
			// Nothing and no time are negative in sched, where 0 is the default.
			"max_rewrite": func(key string, v any) {
				r.size(&to.MaxRewrite)(key, v)
				if to.MaxRewrite == 0 {
					to.MaxRewrite = -1
				}
			},
			"grace": func(key string, v any) {
				r.duration(&to.Grace)(key, v)
				if to.Grace == 0 {
					to.Grace = -1
				}
			},
		})
	}
}
