package sched

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/repo"
	"hikae/repo/retention"
	"hikae/sched/history"
)

var nightly = Job{Name: "nightly", VMs: []string{"*/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}

// TestRetry: what may pass is tried again after a while, what cannot is not.
func TestRetry(t *testing.T) {
	for _, c := range []struct {
		err   error
		kind  string
		tries int
		ok    bool
	}{
		{fmt.Errorf("reading: %w", esxi.ErrUnreachable), "unreachable", 3, true},
		{esxi.ErrBusy, "busy", 3, true},
		{repo.ErrLocked, "locked", 3, true},
		{backup.ErrRunning, "running", 3, true},
		{repo.ErrNotRepository, "no-repository", 3, true},
		{syscall.ESTALE, "storage", 3, true},
		{errOdd, "other", 3, true},
		{esxi.ErrLogin, "login", 1, false},
		{esxi.ErrThumbprint, "thumbprint", 1, false},
		{esxi.ErrRestricted, "restricted", 1, false},
		{backup.ErrUnsupported, "unsupported", 1, false},
		{backup.ErrNoRoom, "no-room", 1, false},
		{fmt.Errorf("write: %w", syscall.ENOSPC), "no-room", 1, false},
		{repo.ErrWrongPassphrase, "passphrase", 1, false},
		{repo.ErrDamaged, "damaged", 1, false},
		// What cannot pass counts, whatever else went wrong.
		{errors.Join(backup.ErrSnapshotLeft, esxi.ErrUnreachable, esxi.ErrNoSpace), "no-room", 1, false},
	} {
		t.Run(c.kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "2026-05-01T00:00:00Z")
				w.vms("esx1", "a")
				w.takes = func(repo.VMID, int) time.Duration { return 0 }
				w.fails = func(_ repo.VMID, n int) error {
					if n < 3 {
						return c.err
					}
					return nil
				}
				w.boot(nightly)
				w.until("2026-05-01T12:00:00Z")
				r := w.last("nightly")
				task := w.tasks(r.ID)[0]
				if task.Attempts != c.tries || (task.State == history.OK) != c.ok || (r.State == history.OK) != c.ok {
					t.Fatalf("run %s, task %+v", r.State, task)
				}
				if c.ok {
					if at := task.Started.Format("15:04"); at != "02:05" { // after 1 and 4 minutes
						t.Errorf("the third try began at %s", at)
					}
				} else if task.ErrorKind != c.kind || r.Error == "" {
					t.Errorf("kind %q, run's error %q", task.ErrorKind, r.Error)
				}
				w.halt()
			})
		})
	}
}

// TestRetriesEnd: what does not pass is given up, and the next run that goes
// well says so.
func TestRetriesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b")
		w.fails = func(vm repo.VMID, n int) error {
			if vm.Name == "a" && n <= 8 {
				return errOdd
			}
			return nil
		}
		w.boot(nightly)
		w.until("2026-05-02T12:00:00Z")
		if st := w.status(); len(st.Warnings) == 0 || st.Warnings[0].Job != "nightly" || st.Jobs[0].FailingSince.IsZero() {
			t.Errorf("status: %+v", st)
		}
		w.until("2026-05-03T12:00:00Z")
		all := w.runs("nightly")
		if all[0].State != history.Failed || all[0].TasksOK != 1 || all[0].TasksFailed != 1 || all[1].State != history.Failed || all[2].State != history.OK {
			t.Errorf("runs: %+v", all)
		}
		if f, r := w.events(EventJobFailed), w.events(EventJobRecovered); len(f) != 1 || len(r) != 1 || f[0].Run.ID != all[0].ID || r[0].Run.ID != all[2].ID {
			t.Errorf("events: %v, %v", f, r)
		}
		if n := len(w.events(EventTaskRetry)); n != 6 {
			t.Errorf("%d retries told", n)
		}
		w.halt()
	})
}

// TestHostDown: one host that cannot be reached is tried four times, not four
// times a VM; the other host's VMs are backed up meanwhile.
func TestHostDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", names("esx1", 20)...)
		w.vms("esx2", names("esx2", 5)...)
		w.takes = func(repo.VMID, int) time.Duration { return time.Minute }
		w.fails = func(vm repo.VMID, n int) error {
			if vm.Host == "esx1" {
				return fmt.Errorf("esx1: %w", esxi.ErrUnreachable)
			}
			return nil
		}
		w.boot(nightly)
		w.until("2026-05-01T02:02:30Z")
		if st := w.status(); len(st.Warnings) == 0 || !strings.Contains(st.Warnings[0].Text, "esx1") {
			t.Errorf("status: %+v", st.Warnings)
		}
		w.until("2026-05-01T12:00:00Z")
		r := w.last("nightly")
		if r.State != history.Failed || r.TasksOK != 5 || r.TasksFailed != 20 {
			t.Errorf("run: %+v", r)
		}
		tried := 0
		for _, c := range w.calls {
			if c.err != nil {
				tried++
			}
		}
		if tried > 4*2 { // two at a time
			t.Errorf("esx1 was asked %d times", tried)
		}
		if r.Seconds < 21*60 || r.Seconds > 30*60 { // after 1, 4 and 16 minutes
			t.Errorf("it took %v s to give up", r.Seconds)
		}
		w.halt()
	})
}

// TestHostLogin: a refused login is not repeated for every VM, for hosts lock
// accounts; a host that cannot list its VMs is something that failed.
func TestHostLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", names("esx1", 9)...)
		w.vms("esx2", "a")
		w.options.PerHost = 1
		w.fails = func(vm repo.VMID, n int) error {
			if vm.Host == "esx1" {
				return esxi.ErrLogin
			}
			return nil
		}
		w.boot(nightly)
		w.until("2026-05-01T12:00:00Z")
		if r := w.last("nightly"); r.TasksOK != 1 || r.TasksFailed != 9 || w.most["host esx1"] != 1 || len(w.calls) != 2 {
			t.Errorf("run: %+v, %d calls", r, len(w.calls))
		}
		w.mu.Lock()
		w.fails = nil
		w.lists = func(host string, n int) error {
			if host == "esx1" {
				return esxi.ErrThumbprint
			}
			return nil
		}
		w.mu.Unlock()
		w.until("2026-05-02T12:00:00Z")
		r := w.last("nightly")
		if r.State != history.Failed || r.TasksOK != 1 || r.TasksFailed != 1 {
			t.Errorf("run: %+v", r)
		}
		if task := w.tasks(r.ID)[0]; task.Kind != history.TaskList || task.Host != "esx1" || task.ErrorKind != "thumbprint" {
			t.Errorf("task: %+v", task)
		}
		w.halt()
	})
}

// TestTimeout stops what takes too long, and a fault in one VM's backup ends
// that one only.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b", "c")
		w.takes = func(vm repo.VMID, n int) time.Duration {
			switch vm.Name {
			case "a":
				return 10 * time.Hour
			case "b":
				panic("a fault")
			}
			return time.Minute
		}
		j := nightly
		j.Timeout = 2 * time.Hour
		w.boot(j)
		w.until("2026-05-01T12:00:00Z")
		r := w.last("nightly")
		if r.TasksOK != 1 || r.TasksFailed != 2 {
			t.Errorf("run: %+v", r)
		}
		for _, task := range w.tasks(r.ID) {
			if want := map[string]string{"a": "timeout", "b": "bug"}[task.VM]; task.ErrorKind != want || task.Attempts > 1 {
				t.Errorf("%s: %q %q after %d tries", task.VM, task.ErrorKind, task.Error, task.Attempts)
			}
		}
		w.halt()
	})
}

// TestWindow: nothing begins outside; what is left over comes first next time;
// what has begun ends, or is stopped.
func TestWindow(t *testing.T) {
	for _, end := range []string{WindowFinish, WindowStop} {
		t.Run(end, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "2026-05-01T12:00:00Z")
				w.options.PerHost = 1
				w.vms("esx1", names("esx1", 6)...)
				w.takes = func(repo.VMID, int) time.Duration { return 25 * time.Minute }
				j := nightly
				j.Schedules, j.Window, j.WindowEnd = []string{"daily 20:00"}, "22:00-23:30", end
				w.boot(j)
				w.until("2026-05-02T12:00:00Z")
				r := w.last("nightly")
				want := map[string][2]int{WindowFinish: {4, 2}, WindowStop: {3, 3}}[end]
				if r.State != history.Warning || r.TasksOK != want[0] || r.TasksSkipped != want[1] || r.Started.Format("15:04") != "22:00" {
					t.Errorf("first night: %+v", r)
				}
				ended := map[string]string{WindowFinish: "23:40", WindowStop: "23:30"}[end]
				if at := r.Ended.Format("15:04"); at != ended {
					t.Errorf("it ended at %s", at)
				}
				w.until("2026-05-03T12:00:00Z")
				for _, vm := range names("esx1", 6) {
					if len(w.made("esx1/"+vm)) == 0 {
						t.Errorf("%s has no generation after two nights", vm)
					}
				}
				w.halt()
			})
		})
	}
}

// TestKeep: what is to be kept is applied to the VMs that went well, and a VM
// that several jobs have keeps what any of them keeps.
func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b", "c", "d")
		w.fails = func(vm repo.VMID, n int) error {
			if vm.Name == "b" {
				return repo.ErrDamaged
			}
			return nil
		}
		four, yearly := retention.Policy{Last: 4}, retention.Policy{Yearly: 7}
		j := nightly
		j.Keep = four
		w.boot(j,
			Job{Name: "yearly", VMs: []string{"esx1/c"}, Keep: yearly},
			Job{Name: "all", VMs: []string{"esx1/d"}},
		)
		w.until("2026-05-01T12:00:00Z")
		got := map[string]int{}
		for _, k := range w.retain {
			got[k.VM.Name] = len(k.Policies)
			if k.Policies[0] != four || k.Location != time.UTC {
				t.Errorf("%+v", k)
			}
		}
		if len(got) != 2 || got["a"] != 1 || got["c"] != 2 {
			t.Errorf("applied to %v", got)
		}
		if r := w.last("nightly"); r.Forgotten != 2 || len(r.Events) != 2 {
			t.Errorf("run: %+v", r)
		}
		w.halt()
	})
}

// TestNames: VMs that are named and not there fail; new ones that fit join.
func TestNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "web01", "web02", "scratch1")
		j := nightly
		j.VMs = []string{"esx1/web*", "esx1/db01", "!esx1/scratch*"}
		w.boot(j, Job{Name: "none", VMs: []string{"esx1/x*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"})
		w.until("2026-05-01T12:00:00Z")
		if r := w.last("nightly"); r.TasksOK != 2 || r.TasksFailed != 1 || !strings.Contains(r.Error, "esx1/db01 is not on its host") {
			t.Errorf("run: %+v", r)
		}
		if r := w.last("none"); r.State != history.Warning || r.Tasks != 0 {
			t.Errorf("no VM: %+v", r)
		}
		w.mu.Lock()
		w.hosts["esx1"] = append(w.hosts["esx1"], VM{Name: "web03"}, VM{Name: "db01"})
		w.mu.Unlock()
		w.until("2026-05-02T12:00:00Z")
		if r := w.last("nightly"); r.State != history.OK || r.TasksOK != 4 {
			t.Errorf("run: %+v", r)
		}
		w.halt()
	})
}

// TestHostComesBack: a host that answers again is as good as new: pauses and
// tries are counted from there.
func TestHostComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.options.PerHost = 1
		w.vms("esx1", names("esx1", 12)...)
		w.takes = func(repo.VMID, int) time.Duration { return time.Second }
		w.fails = func(_ repo.VMID, n int) error {
			if n == 1 {
				return esxi.ErrUnreachable
			}
			return nil
		}
		w.boot(nightly)
		w.until("2026-05-01T12:00:00Z")
		if r := w.last("nightly"); r.State != history.OK || r.TasksOK != 12 || r.Seconds > 12*70 {
			t.Errorf("%+v", r)
		}
		w.halt()
	})
}

// TestRetrySetBack: a retry does not wait for as long as the clock was set back.
func TestRetrySetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a")
		w.takes = func(repo.VMID, int) time.Duration { return 0 }
		w.fails = func(_ repo.VMID, n int) error {
			if n == 1 {
				return esxi.ErrUnreachable
			}
			return nil
		}
		w.boot(nightly)
		w.until("2026-05-01T02:00:10Z")
		w.jump(-365 * 24 * time.Hour)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if r := w.last("nightly"); r.State != history.OK {
			t.Errorf("%+v", r)
		}
		w.halt()
	})
}

// TestWindowAndSlowHost: VMs that a host names after the window has closed are
// left for the next run.
func TestWindowAndSlowHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T12:00:00Z")
		w.vms("esx1", "a", "b")
		w.lists = func(string, int) error { time.Sleep(3 * time.Minute); return nil }
		j := nightly
		j.Schedules, j.Window = []string{"daily 22:00"}, "22:00-22:02"
		w.boot(j)
		w.until("2026-05-02T12:00:00Z")
		if r := w.last("nightly"); r.State != history.Warning || r.TasksSkipped != 2 || len(w.calls) != 0 {
			t.Errorf("%+v, %d calls", r, len(w.calls))
		}
		w.halt()
	})
}
