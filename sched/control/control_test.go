package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"hikae/repo"
	"hikae/sched"
	"hikae/sched/history"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fake is a scheduler with one job and one run.
type fake struct {
	asked []string
	stop  bool
}

func (f *fake) Status() (sched.Status, error) {
	if f.stop {
		return sched.Status{}, sched.ErrStopped
	}
	return sched.Status{
		Jobs:    []sched.JobStatus{{Job: "nightly"}},
		Running: []sched.RunStatus{{Run: history.Run{ID: 2}, Active: []sched.TaskStatus{{Task: 1, VM: "web01"}}}},
	}, nil
}

func (f *fake) Run(name string, now bool) (uint64, error) {
	f.asked = append(f.asked, fmt.Sprintf("run %s %v", name, now))
	switch name {
	case "nightly":
		return 3, nil
	case "busy":
		return 2, sched.ErrActive
	}
	return 0, sched.ErrNoJob
}

func (f *fake) Cancel(id uint64, vm *repo.VMID) error {
	f.asked = append(f.asked, fmt.Sprintf("cancel %d %v", id, vm))
	if id != 2 {
		return sched.ErrNoRun
	}
	return nil
}

// serve begins a server and returns a client and what stops it.
func serve(t *testing.T, f *fake) (*Client, string, func()) {
	t.Helper()
	dir := t.TempDir()
	db, err := history.Open(filepath.Join(dir, "history.db"), history.Options{NoSync: true})
	must(t, err)
	at := time.Date(2026, 11, 22, 2, 0, 0, 0, time.UTC)
	must(t, db.Update(func(tx *history.Tx) error {
		for id := uint64(1); id <= 2; id++ {
			r := history.Run{ID: id, Job: "nightly", State: history.OK, Queued: at}
			if id == 2 {
				r.State = history.Running
			}
			if err := tx.PutRun(r); err != nil {
				return err
			}
			if err := tx.PutTask(history.Task{Run: id, N: 1, Job: "nightly", Kind: history.TaskBackup, Host: "esx1", VM: "web01", State: r.State, Queued: at}); err != nil {
				return err
			}
		}
		return nil
	}))
	path := filepath.Join(dir, "run", "s")
	l, err := Listen(t.Context(), path)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, l, NewHandler(Options{Scheduler: f, History: db, Daemon: func() Daemon { return Daemon{Version: "v"} }}))
	}()
	c := NewClient(path)
	return c, path, func() {
		c.Close()
		cancel()
		must(t, <-ended)
		must(t, db.Close())
	}
}

func TestRequests(t *testing.T) {
	f := &fake{}
	c, path, stop := serve(t, f)
	defer stop()
	ctx := t.Context()
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v", info.Mode())
	}
	st, err := c.Status(ctx)
	must(t, err)
	if st.Daemon.Version != "v" || len(st.Jobs) != 1 {
		t.Errorf("status is %+v", st)
	}
	jobs, err := c.Jobs(ctx)
	must(t, err)
	if len(jobs.Jobs) != 1 || jobs.Jobs[0].Job != "nightly" {
		t.Errorf("jobs are %+v", jobs)
	}
	page, err := c.Runs(ctx, Query{Limit: 1})
	must(t, err)
	if len(page.Runs) != 1 || page.Runs[0].ID != 2 || page.Next == 0 {
		t.Fatalf("the first page is %+v", page)
	}
	page, err = c.Runs(ctx, Query{Job: "nightly", Page: page.Next})
	must(t, err)
	if len(page.Runs) != 1 || page.Runs[0].ID != 1 || page.Next != 0 {
		t.Fatalf("the second page is %+v", page)
	}
	tasks, err := c.Tasks(ctx, Query{VM: "esx1/web01"})
	must(t, err)
	if len(tasks.Tasks) != 2 {
		t.Errorf("the tasks are %+v", tasks)
	}
	d, err := c.Run(ctx, 2)
	must(t, err)
	if d.Run.ID != 2 || len(d.Tasks) != 1 || len(d.Active) != 1 || d.Active[0].VM != "web01" {
		t.Errorf("run 2 is %+v", d)
	}
	id, err := c.Start(ctx, "nightly", true)
	must(t, err)
	if id != 3 {
		t.Errorf("run %d began", id)
	}
	id, err = c.Start(ctx, "busy", false)
	if !errors.Is(err, ErrActive) || id != 2 || err.Error() != "job busy is already under way, as run 2" {
		t.Errorf("a busy job: %d, %v", id, err)
	}
	must(t, c.Cancel(ctx, 2, ""))
	must(t, c.Cancel(ctx, 2, "esx1/web01"))
	for what, err := range map[string]error{
		`there is no job "a/b"`:                c2(c.Start(ctx, "a/b", false)),
		"there is no run 9":                    c2(c.Run(ctx, 9)),
		"run 9 is not queued or under way":     c.Cancel(ctx, 9, ""),
		"run 9 of h/v is not queued or under ": c.Cancel(ctx, 9, "h/v"),
	} {
		if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), what) {
			t.Errorf("error is %v, want %q", err, what)
		}
	}
	if got := strings.Join(f.asked[:4], "; "); got != "run nightly true; run busy false; cancel 2 <nil>; cancel 2 esx1/web01" {
		t.Errorf("asked for %s", got)
	}
}

func c2[T any](_ T, err error) error { return err }

func TestBadRequests(t *testing.T) {
	c, _, stop := serve(t, &fake{})
	defer stop()
	for _, r := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "/v1/none", "", 404, "not-found"},
		{"DELETE", "/v1/status", "", 404, "not-found"},
		{"GET", "/v1/runs/x", "", 400, "bad-request"},
		{"GET", "/v1/runs/0", "", 400, "bad-request"},
		{"GET", "/v1/history?page=-1", "", 400, "bad-request"},
		{"GET", "/v1/history?limit=1001", "", 400, "bad-request"},
		{"GET", "/v1/history?vm=web01", "", 400, "bad-request"},
		{"POST", "/v1/jobs/nightly/run", "", 200, ""},
		{"POST", "/v1/jobs/nightly/run", "{", 400, "bad-request"},
		{"POST", "/v1/jobs/nightly/run", `{"nwo":true}`, 400, "bad-request"},
		{"POST", "/v1/jobs/nightly/run", "{}{}", 400, "bad-request"},
		{"POST", "/v1/runs/2/cancel", `{"vm":"web01"}`, 400, "bad-request"},
		{"POST", "/v1/runs/2/cancel", `{"vm":"` + strings.Repeat("x", maxBody) + `"}`, 413, "too-long"},
		{"GET", "/v1/history?job=" + strings.Repeat("x", 2*maxHeader), "", 431, ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://hikae"+r.path, strings.NewReader(r.body))
		must(t, err)
		resp, err := c.http.Do(req)
		must(t, err)
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		must(t, err)
		if resp.StatusCode != r.status || r.code != "" && !strings.Contains(string(b), `"code":"`+r.code+`"`) {
			t.Errorf("%s %.40s: %d %s, want %d %s", r.method, r.path, resp.StatusCode, b, r.status, r.code)
		}
	}
}

func TestAStoppedSchedulerSaysSo(t *testing.T) {
	c, _, stop := serve(t, &fake{stop: true})
	defer stop()
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrStopping) {
		t.Errorf("error is %v", err)
	}
	if d, err := c.Run(t.Context(), 2); err != nil || d.Run.ID != 2 {
		t.Errorf("the history of run 2: %v", err)
	}
}

func TestTheSocketIsTakenOnce(t *testing.T) {
	_, path, stop := serve(t, &fake{})
	if _, err := Listen(t.Context(), path); !errors.Is(err, ErrInUse) {
		t.Errorf("the second daemon: %v", err)
	}
	stop()
	c := NewClient(path)
	defer c.Close()
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), "start it with hikae daemon") {
		t.Errorf("without a daemon: %v", err)
	}
	// What a killed daemon leaves is replaced.
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	left.SetUnlinkOnClose(false)
	must(t, left.Close())
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("with a dead daemon: %v", err)
	}
	l, err := Listen(t.Context(), path)
	must(t, err)
	must(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
	// What is no socket is nobody's to remove.
	must(t, os.WriteFile(path, []byte("mine"), 0o600))
	if _, err := Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("over a file: %v", err)
	}
	if _, err := Listen(t.Context(), "/tmp/"+strings.Repeat("x", 120)); err == nil || !strings.Contains(err.Error(), "longer than 107 bytes") {
		t.Errorf("a long path: %v", err)
	}
}
