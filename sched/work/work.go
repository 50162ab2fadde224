// Package work does what a scheduler decides: it backs up by package backup and
// keeps repositories by package repo. Logins and open repositories are shared by
// those who work at the same time, and kept for a minute.
//
// A login that was refused is not tried again for an hour, whoever asks, for
// hosts lock accounts after a few; Reset forgets that.
package work

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/repo"
	"hikae/sched"
)

// Options of New. All but Logger and Clock are required.
type Options struct {
	// State is the directory of the journal of snapshots; the same for all of hikae
	// on this machine.
	State string
	// Connect logs in to a host of the configuration, Open opens a repository of it,
	// Dir is the directory of one.
	Connect func(ctx context.Context, host string) (*esxi.Host, error)
	Open    func(ctx context.Context, repository string) (*repo.Repository, error)
	Dir     func(repository string) (string, error)
	Logger  *slog.Logger     // nil is silence
	Clock   func() time.Time // nil is time.Now
}

// linger is how long a login or a repository stays open without use.
const linger = time.Minute

// refusedFor is how long a refused login is not tried again.
const refusedFor = time.Hour

// Work is a sched.Work.
type Work struct {
	o     Options
	hosts *pool[*esxi.Host]
	repos *pool[*repo.Repository]

	mu      sync.Mutex
	refused map[string]refusal
}

type refusal struct {
	err error
	at  time.Time
}

var _ sched.Work = (*Work)(nil)

// New makes one. It opens nothing yet.
func New(o Options) *Work {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = time.Now //nolint:forbidigo // the one place where the real clock comes in
	}
	w := &Work{o: o, refused: map[string]refusal{}}
	w.hosts = newPool(linger, w.connect, func(name string, h *esxi.Host) {
		if err := h.Close(context.Background()); err != nil {
			o.Logger.Warn("logging out failed", "host", name, "error", err)
		}
	})
	w.repos = newPool(linger, o.Open, func(name string, r *repo.Repository) {
		if err := r.Close(); err != nil {
			o.Logger.Warn("closing a repository failed", "repository", name, "error", err)
		}
	})
	return w
}

// Close logs out of hosts and closes repositories. Nothing may be under way.
func (w *Work) Close() {
	w.hosts.end()
	w.repos.end()
}

// Reset makes the next use of hosts and repositories connect and open anew, for
// when the configuration changed. What is under way goes on.
func (w *Work) Reset() {
	w.mu.Lock()
	clear(w.refused)
	w.mu.Unlock()
	w.hosts.reset()
	w.repos.reset()
}

// connect logs in, unless the host refused that lately.
func (w *Work) connect(ctx context.Context, name string) (*esxi.Host, error) {
	w.mu.Lock()
	no, ok := w.refused[name]
	w.mu.Unlock()
	if ok {
		if ago := w.o.Clock().Sub(no.at); ago >= 0 && ago < refusedFor {
			return nil, fmt.Errorf("%w (that was %v ago; it is not tried again for %v after a refusal, lest the host lock the account)",
				no.err, ago.Round(time.Second), refusedFor)
		}
	}
	h, err := w.o.Connect(ctx, name)
	w.remember(name, err)
	return h, err
}

func (w *Work) remember(name string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if errors.Is(err, esxi.ErrLogin) {
		w.refused[name] = refusal{err, w.o.Clock()}
	} else {
		delete(w.refused, name)
	}
}

// onHost does something on a host.
func (w *Work) onHost(ctx context.Context, name string, do func(*esxi.Host) error) error {
	it, err := w.hosts.get(ctx, name)
	if err != nil {
		return err
	}
	err = do(it.value)
	if errors.Is(err, esxi.ErrLogin) { // when the session was renewed
		w.remember(name, err)
	}
	w.hosts.put(it, errors.Is(err, esxi.ErrLogin) || errors.Is(err, esxi.ErrThumbprint) || errors.Is(err, esxi.ErrUnreachable))
	return err
}

// inRepository does something in a repository.
func (w *Work) inRepository(ctx context.Context, name string, do func(*repo.Repository) error) error {
	it, err := w.repos.get(ctx, name)
	if err != nil {
		return err
	}
	err = do(it.value)
	w.repos.put(it, spoilt(err))
	return err
}

// spoilt tells whether a repository has to be opened anew after an error.
func spoilt(err error) bool {
	return errors.Is(err, repo.ErrKeysChanged) || errors.Is(err, repo.ErrNotRepository) || errors.Is(err, repo.ErrClosed)
}

// VMs lists the VMs of a host.
func (w *Work) VMs(ctx context.Context, host string) (list []sched.VM, err error) {
	err = w.onHost(ctx, host, func(h *esxi.Host) error {
		vms, err := h.VMs(ctx)
		for _, v := range vms {
			if (repo.VMID{Host: host, Name: v.Name}).Validate() != nil {
				w.o.Logger.Warn("a VM's name cannot be used; it is passed over", "host", host, "vm", v.Name, "path", v.ConfigPath)
				continue
			}
			vm := sched.VM{Name: v.Name}
			for _, d := range v.Disks {
				vm.BytesCapacity += d.Capacity
			}
			list = append(list, vm)
		}
		return err
	})
	return list, err
}

// Backup backs up one VM.
func (w *Work) Backup(ctx context.Context, o sched.BackupOptions) (res backup.Result, err error) {
	progress := o.Progress
	if o.RateLimit > 0 {
		slow := &limiter{rate: float64(o.RateLimit), clock: w.o.Clock}
		progress = func(e backup.Event) {
			o.Progress(e)
			slow.pause(ctx, e)
		}
	}
	err = w.inRepository(ctx, o.Repository, func(r *repo.Repository) error {
		return w.onHost(ctx, o.VM.Host, func(h *esxi.Host) error {
			res, err = backup.Run(ctx, backup.Options{
				Repo: r, Host: h, HostName: o.VM.Host, VM: o.VM.Name, State: w.o.State, Quiesce: o.Quiesce,
				Compression: o.Compression, Progress: progress, Logger: w.o.Logger, Clock: w.o.Clock,
			})
			return err
		})
	})
	return res, err
}

// Cleanup removes the snapshots that dead runs of this machine left on a host.
func (w *Work) Cleanup(ctx context.Context, host string) (cleaned []backup.Cleaned, err error) {
	err = w.onHost(ctx, host, func(h *esxi.Host) error {
		cleaned, err = backup.Cleanup(ctx, h, host, w.o.State, w.o.Logger)
		return err
	})
	return cleaned, err
}

// Newest returns the newest generation of each VM in a repository.
func (w *Work) Newest(ctx context.Context, repository string) (newest []repo.Ref, err error) {
	err = w.inRepository(ctx, repository, func(r *repo.Repository) error {
		vms, failed := r.VMs(ctx)
		for _, vm := range vms {
			refs, err := r.Refs(ctx, vm)
			switch {
			case errors.Is(err, repo.ErrNotFound): // forgotten meanwhile
			case err != nil:
				failed = errors.Join(failed, err)
			case len(refs) > 0:
				newest = append(newest, repo.Latest(refs))
			}
		}
		return failed
	})
	return newest, err
}

// Prune frees what no generation of a repository needs.
func (w *Work) Prune(ctx context.Context, o sched.PruneOptions) (out sched.Report, err error) {
	po := repo.PruneOptions{MaxRewrite: o.Budget.MaxRewrite, Grace: o.Budget.Grace, Progress: o.Progress}
	switch {
	case po.Grace == 0:
		po.Grace = repo.DefaultGrace
	case po.Grace < 0:
		po.Grace = 0
	}
	err = w.inRepository(ctx, o.Repository, func(r *repo.Repository) error {
		report, err := r.Prune(ctx, po)
		if report == nil {
			return err
		}
		out.Freed = report.BytesFreed
		if n := report.PacksUnreadable; n > 0 {
			out.Warnings = append(out.Warnings, fmt.Sprintf("%d packs cannot be read and were left alone", n))
		}
		if n := report.BlocksMissing; n > 0 {
			out.Warnings = append(out.Warnings, fmt.Sprintf("%d blocks that generations need are missing", n))
		}
		return fill(&out, report, err)
	})
	return out, err
}

// Check proves what is stored.
func (w *Work) Check(ctx context.Context, o sched.CheckOptions) (out sched.Report, err error) {
	b := o.Budget
	if b.How == "" || b.How == sched.CheckScrub {
		return w.scrub(ctx, o)
	}
	err = w.inRepository(ctx, o.Repository, func(r *repo.Repository) error {
		report, err := r.Check(ctx, repo.CheckOptions{
			ReadData: b.How == sched.CheckData, Progress: func(done, total int64) { o.Progress("check", done, total) },
		})
		if report == nil {
			return err
		}
		out.BytesRead = report.BytesRead
		found := problems(report.Problems)
		report.Problems = report.Problems[:min(len(report.Problems), maxProblems)]
		return errors.Join(fill(&out, report, err), found)
	})
	return out, err
}

// maxProblems is how many of the problems that a check found are kept in the
// history.
const maxProblems = 100

// scrub needs no keys, so none are asked for.
func (w *Work) scrub(ctx context.Context, o sched.CheckOptions) (out sched.Report, err error) {
	dir, err := w.o.Dir(o.Repository)
	if err != nil {
		return out, err
	}
	report, err := repo.Scrub(ctx, dir, repo.ScrubOptions{
		Budget: repo.ScrubBudget{Percent: o.Budget.Percent, Bytes: o.Budget.Bytes, Time: o.Budget.Time},
		Clock:  w.o.Clock, Logger: w.o.Logger, Progress: func(done, total int64) { o.Progress("scrub", done, total) },
	})
	if report == nil {
		return out, err
	}
	out.BytesRead = report.BytesRead
	if !report.Remembered && report.FilesVerified > 0 {
		out.Warnings = append(out.Warnings, "the storage takes no writes, so what was verified is not remembered")
	}
	found := problems(report.Problems)
	report.Problems = report.Problems[:min(len(report.Problems), maxProblems)]
	return out, errors.Join(fill(&out, report, err), found)
}

// fill puts the repository's own report into ours.
func fill(out *sched.Report, report any, err error) error {
	text, jerr := json.Marshal(report)
	out.Details = text
	return errors.Join(err, jerr)
}

// problems are sched.ErrProblems, with the first of them.
func problems(list []repo.Problem) error {
	if len(list) == 0 {
		return nil
	}
	return fmt.Errorf("%w (%d): %s", sched.ErrProblems, len(list), list[0].What)
}
