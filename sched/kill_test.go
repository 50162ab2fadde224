package sched

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// TestInterrupted: an orderly stop waits for what is under way, and the next
// start goes on with the VMs that were not done.
func TestInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b", "c", "d")
		w.options.PerHost = 1
		job := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}
		after := Job{Name: "prune", Kind: KindPrune, Schedules: []string{"after nightly"}}
		always := Job{Name: "check", Kind: KindCheck, Schedules: []string{"after nightly always"}}
		w.boot(job, after, always)
		w.until("2026-05-01T02:25:00Z") // a and b are done, c is under way
		w.halt()
		if n := len(w.calls); n != 3 || w.calls[2].err == nil || w.now[""] != 0 {
			t.Fatalf("calls at the end: %+v, %d under way", w.calls, w.now[""])
		}
		time.Sleep(time.Hour)
		w.boot(job, after, always)
		w.until("2026-05-01T12:00:00Z")
		first, second := w.runs("nightly")[0], w.runs("nightly")[1]
		if first.State != history.Interrupted || second.State != history.OK || second.Resumes != first.ID || second.Trigger != history.ByResume || second.Tasks != 2 {
			t.Errorf("runs:\n%+v\n%+v", first, second)
		}
		for _, vm := range []string{"a", "b", "c", "d"} {
			if n := len(w.made("esx1/" + vm)); n != 1 {
				t.Errorf("%s has %d generations", vm, n)
			}
		}
		// The linked job comes after the whole.
		if r := w.last("prune"); len(w.runs("prune")) != 1 || r.AfterRun != second.ID {
			t.Errorf("prune: %+v", r)
		}
		if n := len(w.runs("check")); n != 1 {
			t.Errorf("what always comes after it came %d times", n)
		}
		same(t, "hosts cleaned", w.cleaned, []string{"esx1", "esx1"})
		w.halt()
	})
}

// TestInterruptedAndDue: what was due meanwhile is one whole run, not two.
func TestInterruptedAndDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b")
		w.options.PerHost = 1
		job := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}
		w.boot(job)
		w.until("2026-05-01T02:15:00Z")
		w.halt()
		w.until("2026-05-02T09:00:00Z")
		w.boot(job)
		w.until("2026-05-02T12:00:00Z")
		if all := w.runs("nightly"); len(all) != 2 || all[1].Trigger != history.ByCatchUp || all[1].TasksOK != 2 {
			t.Errorf("runs: %+v", all)
		}
		w.halt()
	})
}

// TestDueWhileStopping: what falls due while a stop waits for snapshots to be
// removed is due at the next start.
func TestDueWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a")
		w.vms("esx2", "b")
		w.undo = time.Hour
		jobs := []Job{
			{Name: "first", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"},
			{Name: "second", VMs: []string{"esx2/*"}, Schedules: []string{"daily 02:30"}, TimeZone: "UTC"},
		}
		w.boot(jobs...)
		w.until("2026-05-01T02:05:00Z")
		w.halt()
		if at := w.clock().UTC().Format("15:04"); at != "03:05" {
			t.Errorf("it stopped at %s", at)
		}
		w.boot(jobs...)
		w.until("2026-05-01T12:00:00Z")
		if all := w.runs("second"); len(all) != 1 || all[0].Trigger != history.ByCatchUp || all[0].State != history.OK {
			t.Errorf("second: %+v", all)
		}
		w.halt()
	})
}

// TestGone: a job that was out of the configuration for a while has missed
// nothing.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a")
		job := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}
		w.boot(job)
		w.until("2026-05-01T12:00:00Z")
		w.halt()
		w.boot()
		w.halt()
		w.until("2026-05-04T12:00:00Z")
		w.boot(job)
		w.until("2026-05-05T12:00:00Z")
		same(t, "generations", w.made("esx1/a"), []string{"2026-05-01 02:00", "2026-05-05 02:00"})
		w.halt()
	})
}

// TestInterruptedForEver: what brings the machine down each time is not resumed
// without end.
func TestInterruptedForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a")
		job := Job{Name: "nightly", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"}
		w.boot(job)
		w.until("2026-05-01T02:05:00Z")
		for range 6 {
			w.halt()
			w.boot(job)
			time.Sleep(5 * time.Minute)
			synctest.Wait()
		}
		all := w.runs("nightly")
		if n := len(all); n != 1+maxResumed {
			t.Fatalf("%d runs", n)
		}
		w.until("2026-05-02T03:00:00Z")
		if r := w.last("nightly"); r.State != history.OK || r.Resumed != 0 || r.Trigger != history.BySchedule {
			t.Errorf("the next night: %+v", r)
		}
		w.halt()
	})
}

// TestKill cuts the power after any transaction, and sometimes again soon after
// the next start. Every night every VM gets a generation, exactly one run of a
// night ends, and nothing stays open.
func TestKill(t *testing.T) {
	const nights = 12
	jobs := []Job{
		{Name: "nightly", VMs: []string{"*/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "Europe/Berlin"},
		{Name: "prune", Kind: KindPrune, Schedules: []string{"after nightly"}},
	}
	allKills := 0
	for seed := range uint64(12) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			w := newWorld(t, "2026-10-18T12:00:00Z") // clocks are set back within
			w.vms("esx1", names("esx1", 3)...)
			w.vms("esx2", names("esx2", 2)...)
			w.options.StaleAfter = -1
			w.takes = func(vm repo.VMID, n int) time.Duration { return time.Duration(5+hash(vm.Name, n)%20) * time.Minute }
			w.hopts.Keep = 1 << 20
			begin := w.clock()
			left, image := -1, ""
			w.hopts.Committed = func() {
				if left--; left != 0 {
					return
				}
				// The power goes: what is on disk stays, what goes on does not happen.
				image = filepath.Join(t.TempDir(), fmt.Sprintf("history-%d.db", w.clock().Unix()))
				text, err := os.ReadFile(w.path)
				if err == nil {
					err = os.WriteFile(image, text, 0o600)
				}
				w.mu.Lock()
				w.dead = err == nil
				w.mu.Unlock()
			}
			kills := 0
			for w.clock().Before(begin.Add(nights * 24 * time.Hour)) {
				left = 1 + rnd.IntN(25)
				w.boot(jobs...)
				for range 40 {
					time.Sleep(time.Duration(1+rnd.IntN(60)) * time.Minute)
					synctest.Wait()
					w.mu.Lock()
					dead := w.dead
					w.mu.Unlock()
					if dead {
						break
					}
				}
				left = -1
				w.halt() // the ghost, if it was killed
				if w.dead {
					kills++
					w.path, w.dead = image, false
					clear(w.now)
				}
				time.Sleep(time.Duration(rnd.IntN(30)) * time.Minute)
			}
			w.hopts.Committed = nil
			w.boot(jobs...)
			for time.Sleep(8 * time.Hour); len(w.status().Running) > 0; {
				time.Sleep(10 * time.Minute)
			}
			synctest.Wait()
			allKills += kills
			open, err := w.db.Open()
			must(t, err)
			if len(open) > 0 {
				t.Errorf("left open: %+v", open)
			}
			// What became of each night.
			byDue := map[time.Time][]history.Run{}
			var dues []time.Time
			for _, r := range w.runs("nightly") {
				if byDue[r.Due] == nil {
					dues = append(dues, r.Due)
				}
				byDue[r.Due] = append(byDue[r.Due], r)
			}
			total := 0
			for i, due := range dues {
				all := byDue[due]
				total += 1 + all[0].Missed
				if i > 0 {
					if apart := due.Sub(dues[i-1]); all[0].Missed == 0 && (apart < 23*time.Hour || apart > 25*time.Hour) {
						t.Errorf("seed %d: due %v after %v", seed, due, dues[i-1])
					}
				}
				ok := map[string]int{}
				for n, r := range all {
					if last := n == len(all)-1; last != (r.State != history.Interrupted) && (!last || r.Resumed < maxResumed) {
						t.Errorf("seed %d, due %v: run %d of %d is %s", seed, due, n+1, len(all), r.State)
					}
					for _, task := range w.tasks(r.ID) {
						if !history.Ended(task.State) {
							t.Errorf("task left %s: %+v", task.State, task)
						}
						if task.State == history.OK {
							ok[task.VM]++
						}
					}
				}
				if gaveUp := all[len(all)-1].State == history.Interrupted; gaveUp {
					continue
				}
				for _, vm := range append(names("esx1", 3), names("esx2", 2)...) {
					if ok[vm] != 1 {
						t.Errorf("seed %d, due %v: %s was done %d times", seed, due, vm, ok[vm])
					}
				}
			}
			berlin, err := time.LoadLocation("Europe/Berlin")
			must(t, err)
			m := model{loc: berlin, wants: at(2, 0, anyDay)}
			if n := len(m.occurrences(begin.UTC(), w.clock().UTC())); total != n || n < nights {
				t.Errorf("seed %d: %d occurrences in %d nights", seed, total, n)
			}
			// Each run that ended well, and no other, had its prune.
			var want, got []uint64
			for _, r := range w.runs("nightly") {
				if r.State == history.OK {
					want = append(want, r.ID)
				}
			}
			skipped := 0
			for _, r := range w.runs("prune") {
				skipped += r.Skipped
				if r.Trigger == history.ByAfter {
					got = append(got, r.AfterRun)
				}
			}
			if skipped == 0 && !slices.Equal(got, want) {
				t.Errorf("seed %d: prunes came after %v, want %v", seed, got, want)
			}
			w.halt()
		})
	}
	if allKills < 50 {
		t.Errorf("only %d kills", allKills)
	}
}
