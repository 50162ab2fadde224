package metrics

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"hikae/sched"
	"hikae/sched/history"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMetricsAndHealth(t *testing.T) {
	at := time.Unix(1000, 0)
	st := sched.Status{
		VMs: []sched.VMStatus{
			{Host: "esx1", VM: `we"b`, Last: &history.Good{Time: at}, Age: 60},
			{Host: "esx1", VM: "new", Age: -1, Stale: true},
			{Host: "esx2", VM: "gone", Age: -1, Unprotected: true},
		},
		Jobs:     []sched.JobStatus{{Job: "nightly", LastOK: at, Next: at.Add(time.Hour), FailingSince: at}, {Job: "idle"}},
		Running:  []sched.RunStatus{{Active: make([]sched.TaskStatus, 2)}},
		Queue:    make([]sched.Waiting, 5),
		Warnings: []sched.Note{{Level: history.LevelError}},
	}
	var failure error
	m := New(func() (sched.Status, error) { return st, failure }, "1.2")
	task := history.Task{
		Kind: history.TaskBackup, Host: "esx1", VM: "w", State: history.OK,
		Numbers: history.Numbers{BytesRead: 3, BytesStored: 2, BytesChanged: 1},
	}
	m.Observe(sched.Event{Type: sched.EventTaskEnded, Task: &task})
	m.Observe(sched.Event{Type: sched.EventTaskEnded, Task: &task})
	m.Observe(sched.Event{Type: sched.EventTaskEnded, Task: &history.Task{Kind: history.TaskList, Host: "esx1"}})
	m.Observe(sched.Event{Type: sched.EventRunEnded, Run: &history.Run{Job: "nightly", State: history.OK, Seconds: 90}})
	if problems, err := testutil.GatherAndLint(m.reg); err != nil || len(problems) > 0 {
		t.Errorf("promtool would say %v, %v", problems, err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Serve(ctx, l) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string, status int) string {
		t.Helper()
		resp, err := client.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != status {
			t.Fatalf("%s: %d, %v", path, resp.StatusCode, err)
		}
		return string(b)
	}
	text := get("/metrics", 200)
	for _, want := range []string{
		`hikae_build_info{version="1.2"} 1`,
		`hikae_vm_last_success_timestamp_seconds{host="esx1",vm="we\"b"} 1000`,
		`hikae_vm_last_success_age_seconds{host="esx1",vm="we\"b"} 60`,
		`hikae_vm_stale{host="esx1",vm="new"} 1`,
		`hikae_vm_stale{host="esx1",vm="we\"b"} 0`,
		`hikae_vm_unprotected{host="esx2",vm="gone"} 1`,
		`hikae_stale_vms 1`,
		`hikae_job_last_success_timestamp_seconds{job="nightly"} 1000`,
		`hikae_job_next_run_timestamp_seconds{job="nightly"} 4600`,
		`hikae_job_failing{job="nightly"} 1`,
		`hikae_job_failing{job="idle"} 0`,
		`hikae_runs_active 1`, `hikae_tasks_active 2`, `hikae_tasks_queued 5`,
		`hikae_warnings{level="error"} 1`, `hikae_warnings{level="warning"} 0`,
		`hikae_backup_read_bytes_total{host="esx1",vm="w"} 6`,
		`hikae_backup_stored_bytes_total{host="esx1",vm="w"} 4`,
		`hikae_backup_changed_bytes_total{host="esx1",vm="w"} 2`,
		`hikae_backups_total{host="esx1",state="ok",vm="w"} 2`,
		`hikae_runs_total{job="nightly",state="ok"} 1`,
		`hikae_run_duration_seconds_sum{job="nightly"} 90`,
		`hikae_scheduler_up 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("there is no %s", want)
		}
	}
	for _, unwanted := range []string{`vm_last_success_timestamp_seconds{host="esx1",vm="new"}`, `next_run_timestamp_seconds{job="idle"}`} {
		if strings.Contains(text, unwanted) {
			t.Errorf("there is %s", unwanted)
		}
	}
	get("/healthz", 200)
	st.Stopping = true
	get("/healthz", 503)
	failure = sched.ErrStopped
	get("/healthz", 503)
	if text := get("/metrics", 200); !strings.Contains(text, "hikae_scheduler_up 0\n") || strings.Contains(text, "hikae_vm_stale{") {
		t.Error("a stopped scheduler shows VMs")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
