package sched

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	_ "time/tzdata" // zones must not depend on the machine

	"go.uber.org/goleak"

	"hikae/backup"
	"hikae/repo"
	"hikae/sched/history"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is the work that a scheduler under test has done: hosts with VMs, and
// how long each takes and how it ends. It lives in the bubble of synctest.
type world struct {
	t       *testing.T
	path    string
	offset  time.Duration // of the wall clock, against the bubble's
	options Options
	db      *history.DB
	hopts   history.Options

	mu      sync.Mutex
	hosts   map[string][]VM
	takes   func(vm repo.VMID, n int) time.Duration // n counts the calls for this VM, from 1
	fails   func(vm repo.VMID, n int) error
	lists   func(host string, n int) error
	upkeep  func(kind string) (time.Duration, error)
	newest  []repo.Ref
	cleaned []string
	undo    time.Duration // what a stopped backup takes to clean up
	quiet   bool          // no progress is told
	dead    bool          // the process was killed: what goes on does not happen
	calls   []callOf
	count   map[string]int
	now     map[string]int // under way: by host, VM, "upkeep repo", and "" for all VMs
	most    map[string]int
	retain  []RetainOptions

	s     *Scheduler
	stop  context.CancelFunc
	ended chan error
	seen  []Event
}

// callOf is one call of Backup, Prune or Check.
type callOf struct {
	what       string
	from, to   time.Time // wall clock
	err        error
	generation string
}

// newWorld begins at a date; it is called in a bubble.
func newWorld(t *testing.T, at string) *world {
	t.Helper()
	begin, err := time.Parse(time.RFC3339, at)
	must(t, err)
	w := &world{
		t: t, path: filepath.Join(t.TempDir(), "history.db"), offset: time.Until(begin), hosts: map[string][]VM{},
		count: map[string]int{}, now: map[string]int{}, most: map[string]int{}, hopts: history.Options{NoSync: true},
	}
	w.takes = func(repo.VMID, int) time.Duration { return 10 * time.Minute }
	w.options = Options{Repositories: []string{"main"}, Work: w}
	return w
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.offset)
}

// jump sets the wall clock.
func (w *world) jump(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.offset += d
}

// until sleeps until the wall clock, as it is set now, shows a time.
func (w *world) until(at string) {
	w.t.Helper()
	to, err := time.Parse(time.RFC3339, at)
	must(w.t, err)
	time.Sleep(to.Sub(w.clock()))
	synctest.Wait()
}

func (w *world) vms(host string, names ...string) {
	if w.hosts[host] == nil {
		w.options.Hosts = append(w.options.Hosts, host)
	}
	for _, n := range names {
		w.hosts[host] = append(w.hosts[host], VM{Name: n})
	}
}

// boot starts a scheduler with jobs.
func (w *world) boot(jobs ...Job) {
	w.t.Helper()
	var err error
	w.db, err = history.Open(w.path, w.hopts)
	must(w.t, err)
	o := w.options
	o.Jobs, o.History, o.Clock = jobs, w.db, w.clock
	if testing.Verbose() {
		o.Logger = slog.New(slog.NewTextHandler(w.t.Output(), nil))
	}
	w.s, err = New(o)
	must(w.t, err)
	w.s.Subscribe(func(e Event) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !w.dead {
			w.seen = append(w.seen, e)
		}
	})
	ctx, stop := context.WithCancel(w.t.Context())
	w.stop, w.ended = stop, make(chan error, 1)
	s, ended := w.s, w.ended
	go func() { ended <- s.Serve(ctx) }()
	synctest.Wait()
}

// halt stops it in an orderly way.
func (w *world) halt() {
	w.t.Helper()
	w.stop()
	must(w.t, <-w.ended)
	must(w.t, w.db.Close())
}

func (w *world) VMs(ctx context.Context, host string) ([]VM, error) {
	w.mu.Lock()
	w.count["list "+host]++
	n, lists := w.count["list "+host], w.lists
	w.mu.Unlock()
	if lists != nil {
		if err := lists(host, n); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.hosts[host]), nil
}

// enter counts what is under way at a time.
func (w *world) enter(keys ...string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead {
		return 0
	}
	for _, k := range keys {
		w.now[k]++
		w.most[k] = max(w.most[k], w.now[k])
	}
	w.count[keys[0]]++
	return w.count[keys[0]]
}

func (w *world) leave(c callOf, keys ...string) {
	at := w.clock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead {
		return
	}
	for _, k := range keys {
		w.now[k]--
	}
	c.to = at
	w.calls = append(w.calls, c)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (w *world) Backup(ctx context.Context, o BackupOptions) (backup.Result, error) {
	keys := []string{o.VM.String(), "host " + o.VM.Host, ""}
	c := callOf{what: o.VM.String(), from: w.clock()}
	n := w.enter(keys...)
	if w.quiet {
		o.Progress = func(backup.Event) {}
	}
	o.Progress(backup.Event{Phase: backup.PhaseRead, Total: 100})
	err := sleep(ctx, w.takes(o.VM, n))
	if err != nil {
		time.Sleep(w.undo)
	}
	o.Progress(backup.Event{Phase: backup.PhaseRead, Done: 100, Total: 100})
	w.mu.Lock()
	if err == nil && w.fails != nil {
		err = w.fails(o.VM, n)
	}
	w.mu.Unlock()
	res := backup.Result{Host: o.VM.Host, VM: o.VM.Name, BytesRead: 100}
	if err == nil {
		c.generation = w.clock().UTC().Format("2006-01-02T15-04-05Z")
		res.Generation, res.Sequence = c.generation, uint64(n)
	}
	c.err = err
	w.leave(c, keys...)
	return res, err
}

func (w *world) Retain(ctx context.Context, o RetainOptions) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.dead {
		w.retain = append(w.retain, o)
	}
	return 1, nil
}

func (w *world) keepUp(ctx context.Context, kind, repository string) (Report, error) {
	keys := []string{kind + " " + repository, "upkeep " + repository}
	c := callOf{what: keys[0], from: w.clock()}
	w.enter(keys...)
	d, fail := time.Hour, error(nil)
	if w.upkeep != nil {
		d, fail = w.upkeep(kind)
	}
	c.err = sleep(ctx, d)
	if c.err == nil {
		c.err = fail
	}
	w.leave(c, keys...)
	return Report{Details: []byte(`{"packs":1}`)}, c.err
}

func (w *world) Prune(ctx context.Context, o PruneOptions) (Report, error) {
	return w.keepUp(ctx, "prune", o.Repository)
}

func (w *world) Check(ctx context.Context, o CheckOptions) (Report, error) {
	return w.keepUp(ctx, "check", o.Repository)
}

func (w *world) Cleanup(ctx context.Context, host string) ([]backup.Cleaned, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cleaned = append(w.cleaned, host)
	return nil, nil
}

func (w *world) Newest(ctx context.Context, repository string) ([]repo.Ref, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.newest), nil
}

// done returns the calls so far and forgets them.
func (w *world) done() []callOf {
	w.mu.Lock()
	defer w.mu.Unlock()
	calls := w.calls
	w.calls = nil
	return calls
}

// made lists when generations of a VM were begun, by the wall clock.
func (w *world) made(vm string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for _, c := range w.calls {
		if c.what == vm && c.err == nil {
			out = append(out, c.from.UTC().Format("2006-01-02 15:04"))
		}
	}
	return out
}

// events lists those of a type.
func (w *world) events(kind string) []Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []Event
	for _, e := range w.seen {
		if e.Type == kind {
			out = append(out, e)
		}
	}
	return out
}

// runs are all of a job, oldest first.
func (w *world) runs(job string) []history.Run {
	w.t.Helper()
	page, err := w.db.Runs(history.Query{Job: job, Limit: 1 << 30})
	must(w.t, err)
	slices.Reverse(page.Runs)
	return page.Runs
}

func (w *world) last(job string) history.Run {
	w.t.Helper()
	all := w.runs(job)
	if len(all) == 0 {
		w.t.Fatalf("job %s never ran", job)
	}
	return all[len(all)-1]
}

func (w *world) tasks(run uint64) []history.Task {
	w.t.Helper()
	list, err := w.db.Tasks(run)
	must(w.t, err)
	return list
}

func (w *world) status() Status {
	w.t.Helper()
	st, err := w.s.Status()
	must(w.t, err)
	return st
}

// same compares lists of text.
func same(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("%s:\n got %q\nwant %q", what, got, want)
	}
}

func names(host string, n int) []string {
	var out []string
	for i := range n {
		out = append(out, fmt.Sprintf("%s-vm%02d", host, i))
	}
	return out
}

var errOdd = errors.New("something odd")
