package work

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/repo"
	"hikae/repo/retention"
	"hikae/sched"
	"hikae/sched/history"
)

const mib = 1 << 20

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var passphrase = []byte("correct horse")

// place is a simulated host, a repository and a state directory.
type place struct {
	Address, User, Password, Thumbprint, Repo, State string
}

func (p place) work(log *slog.Logger) *Work {
	return New(Options{
		State: p.State, Logger: log,
		Connect: func(ctx context.Context, host string) (*esxi.Host, error) {
			return esxi.Connect(ctx, esxi.Config{
				Name: host, Address: p.Address, User: p.User, Thumbprint: p.Thumbprint,
				Password: func() (string, error) { return p.Password, nil }, Logger: log,
			})
		},
		Open: func(ctx context.Context, name string) (*repo.Repository, error) {
			return repo.Open(ctx, p.Repo, repo.Passphrase(passphrase), repo.Options{Logger: log})
		},
		Dir: func(string) (string, error) { return p.Repo, nil },
	})
}

func newPlace(t *testing.T, vms ...string) (place, *esxisim.Host) {
	t.Helper()
	sim, err := esxisim.Start(t.Context(), esxisim.Options{Dir: t.TempDir()})
	must(t, err)
	t.Cleanup(func() { must(t, sim.Close()) })
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, vm := range vms {
		raw := filepath.Join(t.TempDir(), "raw")
		data := make([]byte, 4*mib)
		for i := range data {
			data[i] = byte(rnd.Uint32())
		}
		must(t, os.WriteFile(raw, data, 0o600))
		must(t, sim.ImportVM(t.Context(), vm, []string{raw}, esxisim.VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
	}
	p := place{sim.Address(), sim.User(), sim.Password(), sim.Thumbprint(), filepath.Join(t.TempDir(), "repo"), t.TempDir()}
	must(t, repo.Init(t.Context(), p.Repo, repo.InitOptions{Passphrase: passphrase, KDF: repo.KDF{Time: 1, MemoryKiB: 64, Threads: 1}}))
	return p, sim
}

func logger(t *testing.T) *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

// serving is a scheduler over a place.
type serving struct {
	*sched.Scheduler
	db     *history.DB
	ended  chan history.Run
	stop   func()
	events sync.Map // type → number
}

func serve(t *testing.T, p place, jobs ...sched.Job) *serving {
	t.Helper()
	db, err := history.Open(filepath.Join(p.State, "history.db"), history.Options{NoSync: true})
	must(t, err)
	w := p.work(logger(t))
	s, err := sched.New(sched.Options{
		Work: w, History: db, Jobs: jobs, Hosts: []string{"esx1"}, Repositories: []string{"main"}, Logger: logger(t), LookEvery: 50 * time.Millisecond,
	})
	must(t, err)
	v := &serving{Scheduler: s, db: db, ended: make(chan history.Run, 1000)}
	s.Subscribe(func(e sched.Event) {
		n, _ := v.events.LoadOrStore(e.Type, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		if e.Type == sched.EventRunEnded {
			v.ended <- *e.Run
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	v.stop = sync.OnceFunc(func() {
		cancel()
		must(t, <-served)
		w.Close()
		must(t, db.Close())
	})
	t.Cleanup(v.stop)
	return v
}

// run starts a job and waits for it.
func (v *serving) run(t *testing.T, job string) history.Run {
	t.Helper()
	id, err := v.Run(job, true)
	must(t, err)
	for r := range v.ended {
		if r.ID == id {
			return r
		}
	}
	return history.Run{}
}

func (p place) open(t *testing.T) *repo.Repository {
	t.Helper()
	r, err := repo.Open(t.Context(), p.Repo, repo.Passphrase(passphrase), repo.Options{})
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

// TestNights backs up, keeps, prunes and checks a simulated host's VMs.
func TestNights(t *testing.T) {
	p, sim := newPlace(t, "web01", "db01")
	v := serve(t, p,
		sched.Job{Name: "nightly", VMs: []string{"esx1/*"}, Keep: retention.Policy{Last: 2}},
		sched.Job{Name: "prune", Kind: sched.KindPrune, Prune: sched.PruneBudget{Grace: -1, MaxRewrite: -1}},
		sched.Job{Name: "scrub", Kind: sched.KindCheck},
		sched.Job{Name: "check", Kind: sched.KindCheck, Check: sched.CheckBudget{How: sched.CheckData}},
	)
	for night := range 3 {
		must(t, sim.WriteAt("web01", 0, bytes.Repeat([]byte{byte(night)}, 3000), mib))
		r := v.run(t, "nightly")
		if r.State != history.OK || r.TasksOK != 2 || r.BytesRead == 0 {
			t.Fatalf("night %d: %+v", night, r)
		}
		if want := max(0, 2*(night-1)); r.Forgotten != want {
			t.Errorf("night %d: %d forgotten, want %d", night, r.Forgotten, want)
		}
		tasks, err := v.db.Tasks(r.ID)
		must(t, err)
		if len(tasks) != 3 || tasks[2].Kind != history.TaskRetain || tasks[0].VM == "" || len(tasks[0].Disks) != 1 || tasks[0].Mode == "" || len(tasks[0].Events) < 4 {
			t.Errorf("night %d: %+v", night, tasks)
		}
	}
	r := p.open(t)
	for _, vm := range []string{"web01", "db01"} {
		if refs, err := r.Refs(t.Context(), repo.VMID{Host: "esx1", Name: vm}); err != nil || len(refs) != 2 {
			t.Errorf("%s has %d generations (%v)", vm, len(refs), err)
		}
	}
	for _, job := range []string{"prune", "prune", "scrub", "check"} {
		got := v.run(t, job)
		tasks, err := v.db.Tasks(got.ID)
		must(t, err)
		if got.State != history.OK || len(tasks) != 1 || len(tasks[0].Report) < 50 {
			t.Errorf("%s: %+v %+v", job, got, tasks)
		}
		if (job == "scrub" || job == "check") && got.BytesRead == 0 {
			t.Errorf("%s read nothing", job)
		}
	}
	st, err := v.Status()
	must(t, err)
	if len(st.VMs) != 2 || st.VMs[0].Last == nil || st.VMs[0].Last.Job != "nightly" || len(st.Warnings) != 0 {
		t.Errorf("status: %+v", st)
	}
	// Damage is found, told, and not tried again.
	packs, err := filepath.Glob(filepath.Join(p.Repo, "packs", "*", "*"))
	must(t, err)
	f, err := os.OpenFile(packs[0], os.O_RDWR, 0)
	if errors.Is(err, os.ErrPermission) {
		must(t, os.Chmod(packs[0], 0o600))
		f, err = os.OpenFile(packs[0], os.O_RDWR, 0)
	}
	must(t, err)
	_, err = f.WriteAt([]byte("bent"), 1000)
	must(t, err)
	must(t, f.Close())
	for _, job := range []string{"scrub", "check"} {
		got := v.run(t, job)
		tasks, err := v.db.Tasks(got.ID)
		must(t, err)
		if got.State != history.Failed || tasks[0].ErrorKind != "damaged" || tasks[0].Attempts != 1 || !strings.Contains(string(tasks[0].Report), `"problems":[{`) {
			t.Errorf("%s of a damaged repository: %+v %+v", job, got, tasks)
		}
	}
	v.stop()
}

// TestStop: a stop in the middle of a slow backup removes the snapshot; the next
// start goes on.
func TestStop(t *testing.T) {
	p, sim := newPlace(t, "web01")
	slow := sched.Job{Name: "nightly", VMs: []string{"esx1/*"}, RateLimit: 1000} // more than an hour
	v := serve(t, p, slow)
	id, err := v.Run("nightly", true)
	must(t, err)
	for {
		st, err := v.Status()
		must(t, err)
		if len(st.Running) == 1 && len(st.Running[0].Active) == 1 && st.Running[0].Active[0].Progress.Phase == backup.PhaseRead {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if names, err := sim.Snapshots("web01"); err != nil || len(names) != 1 {
		t.Fatalf("snapshots while it reads: %v, %v", names, err)
	}
	v.stop()
	if names, err := sim.Snapshots("web01"); err != nil || len(names) != 0 {
		t.Errorf("snapshots after the stop: %v, %v", names, err)
	}
	slow.RateLimit = 0
	v = serve(t, p, slow)
	r := <-v.ended
	if r.Resumes != id || r.State != history.OK || r.TasksOK != 1 {
		t.Errorf("after the next start: %+v", r)
	}
	v.stop()
}

// TestRefusedLogin: whatever asks, a host is not asked again for an hour.
func TestRefusedLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logins := 0
		w := New(Options{Connect: func(context.Context, string) (*esxi.Host, error) { logins++; return nil, esxi.ErrLogin }})
		defer w.Close()
		try := func(want int) {
			t.Helper()
			if _, err := w.VMs(t.Context(), "esx1"); !errors.Is(err, esxi.ErrLogin) {
				t.Errorf("%v", err)
			}
			if _, err := w.Cleanup(t.Context(), "esx1"); !errors.Is(err, esxi.ErrLogin) {
				t.Errorf("%v", err)
			}
			if logins != want {
				t.Errorf("%d logins, want %d", logins, want)
			}
		}
		try(1)
		time.Sleep(59 * time.Minute)
		try(1)
		time.Sleep(2 * time.Minute)
		try(2)
		w.Reset()
		try(3)
	})
}

// TestPool: one opening serves all who come; what is idle is closed, what is
// spoilt is not shared, and a failure is everybody's own.
func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var opened, closed atomic.Int64
		var fail atomic.Bool
		p := newPool(time.Minute, func(ctx context.Context, name string) (int64, error) {
			time.Sleep(10 * time.Second)
			if fail.Load() {
				return 0, errors.New("no")
			}
			return opened.Add(1), nil
		}, func(string, int64) { closed.Add(1) })
		check := func(what string, o, c int64) {
			t.Helper()
			synctest.Wait()
			if opened.Load() != o || closed.Load() != c {
				t.Errorf("%s: %d opened, %d closed; want %d, %d", what, opened.Load(), closed.Load(), o, c)
			}
		}
		var g sync.WaitGroup
		for range 20 {
			g.Go(func() {
				it, err := p.get(t.Context(), "a")
				must(t, err)
				time.Sleep(5 * time.Second)
				p.put(it, false)
			})
		}
		g.Wait()
		check("together", 1, 0)
		time.Sleep(50 * time.Second)
		it, err := p.get(t.Context(), "a")
		must(t, err)
		time.Sleep(5 * time.Minute)
		check("in use", 1, 0)
		other, err := p.get(t.Context(), "a")
		must(t, err)
		p.put(other, true)
		check("spoilt, in use", 1, 0)
		fresh, err := p.get(t.Context(), "a")
		must(t, err)
		p.put(it, false)
		check("spoilt", 2, 1)
		p.put(fresh, false)
		time.Sleep(2 * time.Minute)
		check("idle", 2, 2)
		fail.Store(true)
		for range 3 {
			g.Go(func() {
				if _, err := p.get(t.Context(), "a"); err == nil {
					t.Error("it opened")
				}
			})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if _, err := p.get(ctx, "a"); err == nil {
			t.Error("it opened")
		}
		cancel()
		g.Wait()
		fail.Store(false)
		it, err = p.get(t.Context(), "b")
		must(t, err)
		p.reset()
		check("reset in use", 3, 2)
		p.put(it, false)
		check("reset", 3, 3)
		it, err = p.get(t.Context(), "b")
		must(t, err)
		p.put(it, false)
		p.end()
		check("the end", 4, 4)
	})
}

// TestRate: so many bytes take so long, whatever the pieces; what is not read
// costs nothing, and a stop does not wait.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &limiter{rate: 1 * mib, clock: time.Now}
		began := time.Now()
		for n := int64(4); n <= 400; n += 4 {
			l.pause(t.Context(), backup.Event{Phase: backup.PhaseRead, Done: n * mib})
		}
		if took := time.Since(began); took != 400*time.Second {
			t.Errorf("400 MiB took %v", took)
		}
		time.Sleep(time.Hour) // is not made up for
		began = time.Now()
		l.pause(t.Context(), backup.Event{Phase: backup.PhaseCommit, Done: 100 * mib})
		l.pause(t.Context(), backup.Event{Phase: backup.PhaseRead, Done: 10 * mib})
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("10 MiB took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		l.pause(ctx, backup.Event{Phase: backup.PhaseRead, Done: 1000 * mib})
		if took := time.Since(began); took != time.Second {
			t.Errorf("a stop took %v", took)
		}
	})
}

// TestRetain keeps what any policy keeps.
func TestRetain(t *testing.T) {
	p, _ := newPlace(t, "web01")
	w := p.work(nil)
	defer w.Close()
	vm := repo.VMID{Host: "esx1", Name: "web01"}
	for range 4 {
		_, err := w.Backup(t.Context(), sched.BackupOptions{Repository: "main", VM: vm, Progress: func(backup.Event) {}})
		must(t, err)
	}
	o := sched.RetainOptions{Repository: "main", VM: vm, Policies: []retention.Policy{{Last: 1}, {Last: 3}}, Location: time.UTC}
	for i, want := range []int{1, 0} {
		// Generations of one second are given the seconds after it, which must not lie ahead.
		for {
			n, err := w.Retain(t.Context(), o)
			if errors.Is(err, retention.ErrClock) {
				time.Sleep(100 * time.Millisecond)
				continue
			}
			if n != want || err != nil {
				t.Errorf("call %d: %d forgotten, %v", i, n, err)
			}
			break
		}
	}
	newest, err := w.Newest(t.Context(), "main")
	if err != nil || len(newest) != 1 || newest[0].VM != vm {
		t.Errorf("newest: %v, %v", newest, err)
	}
	o.Policies = nil
	if n, err := w.Retain(t.Context(), o); n != 0 || err == nil {
		t.Errorf("without a policy: %d, %v", n, err)
	}
}
