package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
	"hikae/repo"
	"hikae/sched"
	"hikae/sched/control"
	"hikae/sched/history"
	"hikae/sched/metrics"
	"hikae/sched/work"
)

func newDaemon(a *app.App) *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "run the jobs of the configuration when they are due",
		Long: `Runs in the foreground, for systemd or a container: backs up, forgets, prunes and
checks when the [[job]] blocks of the configuration say so, and answers hikae
status, jobs, run, cancel, history and log. hikae config check says what it would
do.

Its log goes to standard error: text on a terminal, JSON elsewhere.

SIGTERM and Ctrl-C end it once what is under way was stopped and its snapshots
are removed; the runs go on at the next start. A second one ends it at once.
SIGHUP reads the configuration again; when something is wrong with it, the old
one stays. What [daemon] says counts from the next start.

It has nobody to ask: every repository that a job uses needs a passphrase_file, a
passphrase_command or a key_file, or --passphrase-file or --key-file is given.` +
			exitCodes(exitPassphrase),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemon(cmd.Context(), a, socket) },
	}
	socketFlag(cmd, &socket)
	return cmd
}

// daemonState is what the parts of the daemon share.
type daemonState struct {
	app     *app.App
	log     *slog.Logger
	path    string // of the configuration
	config  atomic.Pointer[config.File]
	wrong   atomic.Pointer[string] // with the configuration, when it was last read
	started time.Time
}

func runDaemon(ctx context.Context, a *app.App, socket string) (err error) {
	// The daemon ends on signals in its own way, and says so in its log.
	signals := make(chan os.Signal, 4)
	signal.Reset(syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)

	f, err := a.Config()
	if err != nil {
		return err
	}
	if f.Path == "" {
		return fmt.Errorf("%w: there is no file; use --config FILE", config.ErrConfig)
	}
	d := &daemonState{app: a, log: daemonLog(a), path: f.Path, started: a.Clock().UTC()}
	if err := d.secrets(f); err != nil {
		return err
	}
	d.config.Store(f)
	a.Log = d.log
	a.Stdin = nil // nobody is there to be asked
	if a.Flags.State == "" {
		a.Flags.State = f.Daemon.State
	}
	state, err := a.StateDir()
	if err != nil {
		return err
	}
	if socket, err = socketPath(a, socket); err != nil {
		return err
	}
	listener, err := control.Listen(ctx, socket)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // again, for the ways out before it serves
	db, err := history.Open(filepath.Join(state, "history.db"), history.Options{SetAside: true})
	if errors.Is(err, history.ErrInUse) {
		return fmt.Errorf("%w; another daemon runs with this state directory", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if old := db.Replaced(); old != "" {
		d.log.Error("the history was damaged and begins anew", "kept_as", old)
	}
	return d.serve(ctx, state, listener, db, signals)
}

// serve runs the scheduler and what shows it until a signal comes.
func (d *daemonState) serve(ctx context.Context, state string, listener *control.Listener, db *history.DB, signals <-chan os.Signal) (err error) {
	f := d.config.Load()
	w := work.New(work.Options{
		State: state, Logger: d.log, Clock: d.app.Clock,
		Connect: d.connect, Open: d.open,
		Dir: func(name string) (string, error) {
			r, err := d.repository(name)
			return r.Path, err
		},
	})
	defer w.Close()
	s, err := sched.New(sched.Options{
		Work: w, History: db, Jobs: f.Jobs, Hosts: f.HostNames(), Repositories: f.RepositoryNames(),
		PerHost: f.Daemon.PerHost, Total: f.Daemon.Total, Clock: d.app.Clock, Logger: d.log,
	})
	if err != nil {
		return err
	}
	s.Subscribe(d.tell)
	var shown *metrics.Metrics
	var port net.Listener
	if f.Daemon.Metrics != "" {
		shown = metrics.New(s.Status, d.app.Version)
		s.Subscribe(shown.Observe)
		if port, err = (&net.ListenConfig{}).Listen(ctx, "tcp", f.Daemon.Metrics); err != nil {
			return fmt.Errorf("metrics: %w; choose another address in [daemon]", err)
		}
	}

	// The scheduler ends first; the others answer until it has.
	jobs, stopJobs := context.WithCancel(ctx)
	defer stopJobs()
	rest, stopRest := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRest()
	var group sync.WaitGroup
	failed := make(chan error, 3)
	begin := func(f func() error) {
		group.Go(func() {
			if err := f(); err != nil {
				failed <- err
				stopJobs()
			}
		})
	}
	schedEnded := make(chan struct{})
	begin(func() error {
		defer close(schedEnded)
		return s.Serve(jobs)
	})
	begin(func() error {
		return control.Serve(rest, listener, control.NewHandler(control.Options{Scheduler: s, History: db, Daemon: d.self, Logger: d.log}))
	})
	if port != nil {
		begin(func() error { return shown.Serve(rest, port) })
	}
	d.log.Info("hikae is ready", "version", d.app.Version, "config", d.path, "jobs", len(f.Jobs), "socket", listener.Path(), "metrics", f.Daemon.Metrics)
	if len(f.Jobs) == 0 {
		d.log.Warn("there are no jobs; add [[job]] blocks and send SIGHUP", "config", d.path)
	}
	d.notify(sd.SdNotifyReady)
	d.wait(signals, schedEnded, stopJobs, func() { d.reload(s, w) })
	stopRest()
	group.Wait()
	close(failed)
	for e := range failed {
		err = errors.Join(err, e)
	}
	d.log.Info("hikae has stopped")
	return err
}

// wait heeds signals until the scheduler has ended.
func (d *daemonState) wait(signals <-chan os.Signal, ended <-chan struct{}, stop, reload func()) {
	stopping := false
	for {
		select {
		case <-ended:
			return
		case sig := <-signals:
			switch {
			case sig == syscall.SIGHUP && !stopping:
				reload()
			case sig == syscall.SIGHUP:
			case stopping:
				d.log.Error("stopped at once; what is left behind is cleaned up at the next start")
				os.Exit(exitInterrupted)
			default:
				stopping = true
				d.log.Info("stopping: ending what is under way and removing its snapshots", "signal", sig.String())
				d.notify(sd.SdNotifyStopping)
				stop()
			}
		}
	}
}

// reload reads the configuration again; when it is wrong the old one stays.
func (d *daemonState) reload(s *sched.Scheduler, w *work.Work) {
	old := d.config.Load()
	f, err := config.Load(d.path)
	if err == nil {
		err = d.secrets(f)
	}
	if err == nil {
		d.config.Store(f)
		if err = s.Reload(f.Jobs, f.HostNames(), f.RepositoryNames()); err != nil {
			d.config.Store(old)
		}
	}
	if err != nil {
		text := err.Error()
		d.wrong.Store(&text)
		d.log.Error("the configuration is wrong; the old one stays", "error", err)
		return
	}
	w.Reset()
	d.wrong.Store(nil)
	d.log.Info("the configuration was read again", "jobs", len(f.Jobs))
	if f.Daemon != old.Daemon {
		d.log.Warn("what [daemon] says has changed; it counts from the next start")
	}
}

// notify tells systemd, when it asked to be told.
func (d *daemonState) notify(state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		d.log.Warn("systemd cannot be told", "error", err)
	}
}

// self says which daemon this is.
func (d *daemonState) self() control.Daemon {
	c := control.Daemon{Version: d.app.Version, PID: os.Getpid(), Started: d.started, Config: d.path}
	if wrong := d.wrong.Load(); wrong != nil {
		c.ConfigError = *wrong
	}
	return c
}

// tell logs an event.
func (d *daemonState) tell(e sched.Event) {
	level := slog.LevelInfo
	switch e.Type {
	case sched.EventRunQueued, sched.EventRunEnded:
		return // the scheduler's own log has these, with more
	case sched.EventJobFailed, sched.EventVMStale:
		level = slog.LevelError
	case sched.EventSkipped, sched.EventTaskRetry, sched.EventVMUnprotected, sched.EventInterrupted, sched.EventCleaned:
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.String("event", e.Type)}
	if e.Job != "" {
		attrs = append(attrs, slog.String("job", e.Job))
	}
	if e.VM != nil {
		attrs = append(attrs, slog.String("vm", e.VM.String()))
	}
	if e.Run != nil {
		attrs = append(attrs, slog.Uint64("run", e.Run.ID))
	}
	d.log.LogAttrs(context.Background(), level, e.Text, attrs...)
}

func (d *daemonState) connect(ctx context.Context, name string) (*esxi.Host, error) {
	h, ok := d.config.Load().Host(name)
	if !ok {
		return nil, fmt.Errorf("%w: %s is not in %s any more", app.ErrNoHost, name, d.path)
	}
	return d.app.ConnectTo(ctx, h)
}

// repository finds a repository of the configuration, and what opens it.
func (d *daemonState) repository(name string) (config.Repository, error) {
	r, ok := d.config.Load().Repository(name)
	if !ok {
		return r, fmt.Errorf("%w: %s is not in %s any more", app.ErrNoRepository, name, d.path)
	}
	return withSecret(d.app, r), nil
}

func (d *daemonState) open(ctx context.Context, name string) (*repo.Repository, error) {
	place, err := d.repository(name)
	if err != nil {
		return nil, err
	}
	if err := app.NeedsRepository(place.Path); err != nil {
		return nil, err
	}
	key, err := d.app.Key(ctx, place)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	r, _, err := d.app.OpenRepositoryWith(ctx, place.Path, key)
	return r, err
}

func (d *daemonState) secrets(f *config.File) error { return daemonSecrets(d.app, f) }

// daemonSecrets complains about a repository that only a person could open.
func daemonSecrets(a *app.App, f *config.File) error {
	for _, j := range f.Jobs {
		for _, r := range f.Repositories {
			if j.Repository != "" && j.Repository != r.Name || hasSecret(withSecret(a, r)) {
				continue
			}
			return fmt.Errorf("%w: %s: job %s uses repository %s, which has no passphrase_file, passphrase_command or key_file; the daemon has nobody to ask",
				config.ErrConfig, f.Path, j.Name, r.Name)
		}
	}
	return nil
}

func hasSecret(r config.Repository) bool {
	return r.PassphraseFile != "" || r.PassphraseCommand != "" || r.KeyFile != ""
}

// withSecret gives a repository that has no secret of its own the one of the
// command line or the environment.
func withSecret(a *app.App, r config.Repository) config.Repository {
	if hasSecret(r) {
		return r
	}
	r.PassphraseFile, r.KeyFile = a.Flags.PassphraseFile, a.Flags.KeyFile
	if !hasSecret(r) {
		r.PassphraseFile, r.KeyFile = a.Getenv("HIKAE_PASSPHRASE_FILE"), a.Getenv("HIKAE_KEY_FILE")
	}
	return r
}

// daemonLog is the daemon's log: text for a person, JSON for whatever else reads it.
func daemonLog(a *app.App) *slog.Logger {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	switch {
	case a.Flags.Verbose:
		o.Level = slog.LevelDebug
	case a.UI.Quiet:
		o.Level = slog.LevelWarn
	}
	if a.UI.Terminal() {
		return slog.New(slog.NewTextHandler(a.UI.Writer(), o))
	}
	return slog.New(slog.NewJSONHandler(a.UI.Err, o))
}
