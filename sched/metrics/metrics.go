// Package metrics shows Prometheus how a scheduler stands, and monitors of any
// kind whether it lives.
//
// How things stand is asked of the scheduler at each scrape, so it is never
// older than that. What was read and stored is counted from the scheduler's events
// since the process began; a restart begins at zero, as counters may. Times are Unix
// seconds, sizes bytes. A VM that was never backed up has no last success; its
// hikae_vm_stale tells that it should have.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"hikae/sched"
	"hikae/sched/history"
)

// Metrics counts and shows.
type Metrics struct {
	status func() (sched.Status, error)
	reg    *prometheus.Registry

	read, stored, changed *prometheus.CounterVec
	backups               *prometheus.CounterVec
	runs                  *prometheus.CounterVec
	runSeconds            *prometheus.HistogramVec
}

var (
	vmLabels  = []string{"host", "vm"}
	jobLabels = []string{"job"}
)

// New makes the metrics of a scheduler whose state status tells.
func New(status func() (sched.Status, error), version string) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hikae_" + name, Help: help}, labels)
	}
	m := &Metrics{
		status: status, reg: prometheus.NewRegistry(),
		read:    counter("backup_read_bytes_total", "Bytes read from hosts.", vmLabels...),
		stored:  counter("backup_stored_bytes_total", "Bytes stored in repositories, compressed.", vmLabels...),
		changed: counter("backup_changed_bytes_total", "Bytes that differed from the generation before.", vmLabels...),
		backups: counter("backups_total", "Backups of VMs that ended, by state.", "host", "vm", "state"),
		runs:    counter("runs_total", "Runs of jobs that ended, by state.", "job", "state"),
		runSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hikae_run_duration_seconds", Help: "How long runs of jobs took.",
			Buckets: []float64{10, 60, 300, 900, 1800, 3600, 7200, 14400, 28800, 57600, 86400},
		}, jobLabels),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "hikae_build_info", Help: "The version that runs.", ConstLabels: prometheus.Labels{"version": version},
	})
	info.Set(1)
	m.reg.MustRegister(
		m.read, m.stored, m.changed, m.backups, m.runs, m.runSeconds, info, standing{m},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

// Observe counts what an event tells. It is meant for sched.Scheduler.Subscribe.
func (m *Metrics) Observe(e sched.Event) {
	switch {
	case e.Type == sched.EventTaskEnded && e.Task != nil && e.Task.Kind == history.TaskBackup:
		t := e.Task
		m.backups.WithLabelValues(t.Host, t.VM, t.State).Inc()
		m.read.WithLabelValues(t.Host, t.VM).Add(float64(max(t.BytesRead, 0)))
		m.stored.WithLabelValues(t.Host, t.VM).Add(float64(max(t.BytesStored, 0)))
		m.changed.WithLabelValues(t.Host, t.VM).Add(float64(max(t.BytesChanged, 0)))
	case e.Type == sched.EventRunEnded && e.Run != nil:
		m.runs.WithLabelValues(e.Run.Job, e.Run.State).Inc()
		m.runSeconds.WithLabelValues(e.Run.Job).Observe(e.Run.Seconds)
	}
}

// Handler answers /metrics, and /healthz: 200 while the scheduler runs, 503 when
// it stops or has stopped.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		st, err := m.status()
		if err == nil && st.Stopping {
			err = errors.New("stopping")
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// Serve answers on l until ctx ends. It closes l.
func (m *Metrics) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler: m.Handler(), MaxHeaderBytes: 16 << 10,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // of clients that went away
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("metrics on %s: %w", l.Addr(), err)
	case <-ctx.Done():
		_ = srv.Close() // a scrape can be repeated
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}
}

// standing is how things stand at a scrape.
type standing struct{ m *Metrics }

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("hikae_"+name, help, labels, nil)
}

var (
	vmSuccess     = describe("vm_last_success_timestamp_seconds", "When the VM's newest good generation was made.", vmLabels...)
	vmAge         = describe("vm_last_success_age_seconds", "The age of the VM's newest good generation.", vmLabels...)
	vmStale       = describe("vm_stale", "1 when the VM has had no good generation for too long.", vmLabels...)
	vmUnprotected = describe("vm_unprotected", "1 when the VM was backed up and is in no job any more.", vmLabels...)
	jobSuccess    = describe("job_last_success_timestamp_seconds", "When the job's last good run ended.", jobLabels...)
	jobNext       = describe("job_next_run_timestamp_seconds", "When the job is due next.", jobLabels...)
	jobFailing    = describe("job_failing", "1 when the job's last run failed.", jobLabels...)
	runsActive    = describe("runs_active", "Runs that are queued or under way.")
	tasksActive   = describe("tasks_active", "Tasks that are under way.")
	tasksQueued   = describe("tasks_queued", "Tasks that wait.")
	staleVMs      = describe("stale_vms", "How many VMs have had no good generation for too long.")
	warnings      = describe("warnings", "Warnings of hikae status.", "level")
	up            = describe("scheduler_up", "1 while the scheduler runs.")
)

// Describe is of prometheus.Collector.
func (standing) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		vmSuccess, vmAge, vmStale, vmUnprotected, jobSuccess, jobNext, jobFailing,
		runsActive, tasksActive, tasksQueued, staleVMs, warnings, up,
	} {
		ch <- d
	}
}

// Collect is of prometheus.Collector.
func (s standing) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	flag := func(d *prometheus.Desc, on bool, labels ...string) {
		v := 0.0
		if on {
			v = 1
		}
		gauge(d, v, labels...)
	}
	st, err := s.m.status()
	flag(up, err == nil)
	if err != nil {
		return
	}
	stale := 0
	for _, v := range st.VMs {
		if v.Last != nil {
			gauge(vmSuccess, float64(v.Last.Time.Unix()), v.Host, v.VM)
			gauge(vmAge, v.Age, v.Host, v.VM)
		}
		flag(vmStale, v.Stale, v.Host, v.VM)
		flag(vmUnprotected, v.Unprotected, v.Host, v.VM)
		if v.Stale {
			stale++
		}
	}
	gauge(staleVMs, float64(stale))
	for _, j := range st.Jobs {
		if !j.LastOK.IsZero() {
			gauge(jobSuccess, float64(j.LastOK.Unix()), j.Job)
		}
		if !j.Next.IsZero() {
			gauge(jobNext, float64(j.Next.Unix()), j.Job)
		}
		flag(jobFailing, !j.FailingSince.IsZero(), j.Job)
	}
	active := 0
	for _, r := range st.Running {
		active += len(r.Active)
	}
	gauge(runsActive, float64(len(st.Running)))
	gauge(tasksActive, float64(active))
	gauge(tasksQueued, float64(len(st.Queue)))
	levels := map[string]int{history.LevelError: 0, history.LevelWarning: 0}
	for _, w := range st.Warnings {
		levels[w.Level]++
	}
	for level, n := range levels {
		gauge(warnings, float64(n), level)
	}
}
