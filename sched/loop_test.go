package sched

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// TestCatchUp: the machine was off, slept, or its clock leapt: one run makes up
// for all that was missed.
func TestCatchUp(t *testing.T) {
	for _, how := range []string{"off", "asleep"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "2026-05-01T00:00:00Z")
				w.vms("esx1", "web01")
				job := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}
				w.boot(job)
				w.until("2026-05-02T12:00:00Z")
				if how == "off" {
					w.halt()
					time.Sleep(4 * 24 * time.Hour)
					w.boot(job)
				} else {
					w.jump(4 * 24 * time.Hour)
				}
				w.until("2026-05-07T12:00:00Z")
				same(t, "generations", w.made("esx1/web01")[:2], []string{"2026-05-01 02:00", "2026-05-02 02:00"})
				r := w.runs("nightly")[2]
				if r.Trigger != history.ByCatchUp || r.Missed != 3 || r.Due != time.Date(2026, 5, 6, 2, 0, 0, 0, time.UTC) {
					t.Errorf("the run that makes up: %+v", r)
				}
				if late := r.Started.Sub(time.Date(2026, 5, 6, 12, 0, 0, 0, time.UTC)); late < 0 || late > time.Minute {
					t.Errorf("it began %v late", late)
				}
				if n := len(w.runs("nightly")); n != 4 { // and the 7th
					t.Errorf("%d runs, want 4", n)
				}
				w.halt()
			})
		})
	}
}

// TestClockSetBack: a correction brings nothing twice; a clock that had been
// wrong by years does not keep jobs from running; one that was wrong for a while
// does not make them run again.
func TestClockSetBack(t *testing.T) {
	job := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}
	begin := func(t *testing.T) *world {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "web01")
		w.boot(job)
		w.until("2026-05-02T02:30:00Z") // two runs
		return w
	}
	t.Run("an hour", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := begin(t)
			w.jump(-time.Hour)
			w.until("2026-05-03T12:00:00Z")
			same(t, "generations", w.made("esx1/web01"), []string{"2026-05-01 02:00", "2026-05-02 02:00", "2026-05-03 02:00"})
			w.halt()
		})
	})
	t.Run("from years ahead", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := begin(t)
			w.jump(3 * 365 * 24 * time.Hour)
			time.Sleep(2 * time.Minute)
			w.jump(-3 * 365 * 24 * time.Hour)
			w.until("2026-05-04T12:00:00Z")
			// One catch-up while it was wrong, then every night.
			same(t, "generations", w.made("esx1/web01"), []string{
				"2026-05-01 02:00", "2026-05-02 02:00", "2029-05-01 02:31", "2026-05-03 02:00", "2026-05-04 02:00",
			})
			w.halt()
		})
	})
	t.Run("and forth", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := begin(t)
			w.halt()
			w.jump(-5 * 365 * 24 * time.Hour) // no battery
			w.boot(job)
			time.Sleep(2 * time.Minute)
			w.jump(5 * 365 * 24 * time.Hour) // the network's time
			w.until("2026-05-03T12:00:00Z")
			same(t, "generations", w.made("esx1/web01"), []string{"2026-05-01 02:00", "2026-05-02 02:00", "2026-05-03 02:00"})
			w.halt()
		})
	})
	t.Run("once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, "2026-05-01T00:00:00Z")
			w.vms("esx1", "web01")
			w.boot(Job{Name: "move", VMs: []string{"esx1/*"}, Schedules: []string{"once 2026-05-02 02:00"}, TimeZone: "UTC"})
			w.until("2026-05-02T03:00:00Z")
			w.jump(-24 * time.Hour)
			w.until("2026-05-04T03:00:00Z")
			same(t, "generations", w.made("esx1/web01"), []string{"2026-05-02 02:00"})
			w.halt()
		})
	})
}

// TestOverrun: what comes while a run is under way is skipped and counted.
func TestOverrun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:30:00Z")
		w.vms("esx1", "web01")
		w.takes = func(_ repo.VMID, n int) time.Duration {
			if n == 1 {
				return 150 * time.Minute
			}
			return time.Minute
		}
		w.boot(Job{Name: "hourly", VMs: []string{"esx1/*"}, Schedules: []string{"0 * * * *"}, TimeZone: "UTC"})
		w.until("2026-05-01T03:15:00Z")
		if st := w.status(); len(st.Warnings) != 1 || st.Warnings[0].Job != "hourly" {
			t.Errorf("warnings: %+v", st.Warnings)
		}
		w.until("2026-05-01T05:30:00Z")
		same(t, "generations", w.made("esx1/web01"), []string{"2026-05-01 01:00", "2026-05-01 04:00", "2026-05-01 05:00"})
		r := w.runs("hourly")[0]
		if r.Skipped != 2 || r.SkippedLast != time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC) {
			t.Errorf("skipped: %+v", r)
		}
		if n := len(w.events(EventSkipped)); n != 2 {
			t.Errorf("%d events, want 2", n)
		}
		w.halt()
	})
}

// TestEvery counts from the run that was made, also when that was late.
func TestEvery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "web01")
		job := Job{Name: "often", VMs: []string{"esx1/*"}, Schedules: []string{"every 6h"}, TimeZone: "Europe/Berlin"}
		w.boot(job)
		w.until("2026-05-01T13:00:00Z")
		w.halt()
		w.until("2026-05-01T19:30:00Z")
		w.boot(job)
		w.until("2026-05-02T02:00:00Z")
		same(t, "generations", w.made("esx1/web01"), []string{"2026-05-01 06:00", "2026-05-01 12:00", "2026-05-01 19:30", "2026-05-02 01:30"})
		w.halt()
	})
}

// TestAfter: jobs that come after others, and when they do not.
func TestAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "web01")
		w.fails = func(_ repo.VMID, n int) error {
			if n == 2 {
				return repo.ErrDamaged
			}
			return nil
		}
		w.boot(
			Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"},
			Job{Name: "prune", Kind: KindPrune, Schedules: []string{"after nightly"}},
			Job{Name: "check", Kind: KindCheck, Schedules: []string{"after nightly always"}},
			Job{Name: "last", Kind: KindCheck, Schedules: []string{"after prune"}},
		)
		w.until("2026-05-01T12:00:00Z")
		if st := w.status(); !st.Jobs[3].Next.Equal(time.Date(2026, 5, 2, 2, 0, 0, 0, time.UTC)) {
			t.Errorf("next run of a linked job: %v", st.Jobs[3].Next)
		}
		w.until("2026-05-02T12:00:00Z")
		for job, want := range map[string]int{"nightly": 2, "prune": 1, "check": 2, "last": 1} {
			if n := len(w.runs(job)); n != want {
				t.Errorf("%s ran %d times, want %d", job, n, want)
			}
		}
		if r := w.last("prune"); r.Trigger != history.ByAfter || r.AfterRun != w.runs("nightly")[0].ID || !r.Queued.Equal(w.runs("nightly")[0].Ended) {
			t.Errorf("prune: %+v", r)
		}
		if w.most["upkeep main"] != 1 {
			t.Errorf("%d of prune and check at once", w.most["upkeep main"])
		}
		w.halt()
	})
}

// TestByHand starts runs, refuses second ones, and cancels.
func TestByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T12:00:00Z")
		w.vms("esx1", "a", "b", "c")
		w.options.PerHost = 1
		w.boot(Job{Name: "hand", VMs: []string{"esx1/*"}, Schedules: []string{"manual"}, Window: "22:00-06:00", TimeZone: "UTC"})
		if _, err := w.s.Run("nothing", true); !errors.Is(err, ErrNoJob) {
			t.Errorf("a job that is not there: %v", err)
		}
		id, err := w.s.Run("hand", true)
		must(t, err)
		if again, err := w.s.Run("hand", true); !errors.Is(err, ErrActive) || again != id {
			t.Errorf("a second run: %d, %v", again, err)
		}
		time.Sleep(15 * time.Minute) // a is done, b is under way
		synctest.Wait()
		st := w.status()
		if len(st.Running) != 1 || len(st.Running[0].Active) != 1 || st.Running[0].Active[0].VM != "b" || len(st.Queue) != 1 {
			t.Errorf("status: %+v", st)
		}
		must(t, w.s.Cancel(id, &repo.VMID{Host: "esx1", Name: "b"}))
		time.Sleep(5 * time.Minute) // c is under way
		must(t, w.s.Cancel(id, nil))
		synctest.Wait()
		r := w.last("hand")
		if r.State != history.Cancelled || r.TasksOK != 1 || r.TasksCancelled != 2 || r.Trigger != history.ByHand {
			t.Errorf("the run: %+v", r)
		}
		if err := w.s.Cancel(id, nil); !errors.Is(err, ErrNoRun) {
			t.Errorf("cancelled twice: %v", err)
		}
		// Not now: when its window opens.
		_, err = w.s.Run("hand", false)
		must(t, err)
		w.until("2026-05-01T21:59:00Z")
		if st := w.status(); len(st.Queue) != 1 || !st.Queue[0].Until.Equal(time.Date(2026, 5, 1, 22, 0, 0, 0, time.UTC)) {
			t.Errorf("queue: %+v", st.Queue)
		}
		w.until("2026-05-01T23:00:00Z")
		same(t, "a", w.made("esx1/a"), []string{"2026-05-01 12:00", "2026-05-01 22:20"}) // after those that were not done
		if r := w.last("hand"); r.State != history.OK || r.TasksOK != 3 {
			t.Errorf("the second run: %+v", r)
		}
		w.halt()
		if _, err := w.s.Run("hand", true); !errors.Is(err, ErrStopped) {
			t.Errorf("after the end: %v", err)
		}
	})
}

// TestTogether: schedules of a job that are due at one time make one run.
func TestTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z") // a Friday
		w.vms("esx1", "web01")
		w.boot(Job{Name: "both", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00", "weekly sun 02:00", "0 14 * * sun"}, TimeZone: "UTC"})
		w.until("2026-05-04T12:00:00Z")
		same(t, "generations", w.made("esx1/web01"), []string{
			"2026-05-01 02:00", "2026-05-02 02:00", "2026-05-03 02:00", "2026-05-03 14:00", "2026-05-04 02:00",
		})
		for _, r := range w.runs("both") {
			if r.Missed != 0 || r.Trigger != history.BySchedule {
				t.Errorf("%+v", r)
			}
		}
		w.halt()
	})
}

// TestAfterSlow: a job that is still under way when the one before it ends again
// skips that.
func TestAfterSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:30:00Z")
		w.vms("esx1", "web01")
		w.upkeep = func(string) (time.Duration, error) { return 150 * time.Minute, nil }
		w.boot(
			Job{Name: "hourly", VMs: []string{"esx1/*"}, Schedules: []string{"0 * * * *"}, TimeZone: "UTC"},
			Job{Name: "prune", Kind: KindPrune, Schedules: []string{"after hourly"}},
		)
		w.until("2026-05-01T04:30:00Z")
		all := w.runs("prune") // after 01:10; 02:10 and 03:10 are skipped; after 04:10
		if len(all) != 2 || all[0].Skipped != 2 || all[1].Queued.Format("15:04") != "04:10" {
			t.Errorf("%+v", all)
		}
		w.halt()
	})
}
