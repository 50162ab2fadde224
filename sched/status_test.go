package sched

import (
	"encoding/json"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// TestStale: a VM without a good generation is told of once, also when it fell
// out of every job, and when that ends; over restarts.
func TestStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b", "c")
		broken := true
		w.fails = func(vm repo.VMID, n int) error {
			if vm.Name == "a" && broken && n > 1 {
				return repo.ErrDamaged
			}
			return nil
		}
		weekly := Job{Name: "weekly", VMs: []string{"esx1/c"}, Schedules: []string{"weekly fri 03:00"}, TimeZone: "UTC"}
		daily := nightly
		daily.VMs = []string{"esx1/a", "esx1/b"}
		w.boot(daily, weekly)
		w.until("2026-05-02T14:30:00Z") // a: 02:10 of the first day, and 36 hours
		if got := w.events(EventVMStale); len(got) != 1 || got[0].VM.Name != "a" || got[0].Time.Format("15:04") != "14:10" {
			t.Fatalf("stale: %+v", got)
		}
		w.halt()
		w.boot(daily, weekly)
		w.until("2026-05-04T00:00:00Z")
		st := w.status()
		if n := len(w.events(EventVMStale)); n != 1 || !st.VMs[0].Stale || st.VMs[1].Stale || st.VMs[0].Age < 60*3600 || st.VMs[0].LastError == "" {
			t.Fatalf("%d events; %+v", n, st.VMs)
		}
		// c is due again on the 8th, and has 12 hours from then; never before.
		if c := st.VMs[2]; c.Stale || c.Next.Format(time.DateOnly) != "2026-05-08" {
			t.Errorf("c: %+v", c)
		}
		w.mu.Lock()
		broken = false
		w.mu.Unlock()
		w.until("2026-05-04T12:00:00Z")
		if got := w.events(EventVMRecovered); len(got) != 1 || got[0].VM.Name != "a" {
			t.Errorf("recovered: %+v", got)
		}
		// b falls out of every job; a generation that somebody else made counts.
		daily.VMs = []string{"esx1/a"}
		must(t, w.s.Reload([]Job{daily}, []string{"esx1"}, []string{"main"}))
		synctest.Wait()
		if got := w.events(EventVMUnprotected); len(got) != 2 {
			t.Errorf("unprotected: %+v", got)
		}
		must(t, w.s.Dismiss(repo.VMID{Host: "esx1", Name: "c"}))
		st = w.status()
		if len(st.VMs) != 2 || !st.VMs[1].Unprotected || len(st.Warnings) != 1 || st.Warnings[0].VM.Name != "b" {
			t.Errorf("status: %+v", st)
		}
		w.mu.Lock()
		w.fails = func(repo.VMID, int) error { return repo.ErrDamaged }
		w.newest = []repo.Ref{{VM: repo.VMID{Host: "esx1", Name: "a"}, Sequence: 99, Time: time.Date(2026, 5, 5, 20, 0, 0, 0, time.UTC)}}
		w.mu.Unlock()
		w.until("2026-05-06T12:00:00Z")
		if n := len(w.events(EventVMStale)); n != 1 {
			t.Errorf("stale although there is a generation: %d", n)
		}
		w.until("2026-05-07T09:00:00Z") // 36 hours after that
		if n := len(w.events(EventVMStale)); n != 2 {
			t.Errorf("not stale after 36 hours: %d", n)
		}
		w.halt()
	})
}

// TestReload keeps runs that are under way, refuses what is wrong, and forgets
// schedules that go.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a")
		w.takes = func(repo.VMID, int) time.Duration { return time.Hour }
		w.boot(nightly, Job{Name: "late", VMs: []string{"esx1/a"}, Schedules: []string{"daily 02:10"}, TimeZone: "UTC", Window: "12:00-13:00"})
		w.until("2026-05-01T02:30:00Z")
		if err := w.s.Reload([]Job{{Name: "bad"}}, []string{"esx1"}, []string{"main"}); err == nil {
			t.Error("a job without VMs was taken")
		}
		if st := w.status(); len(st.Jobs) != 2 || len(st.Running) != 2 {
			t.Fatalf("status: %+v", st)
		}
		// nightly moves to an hour that has passed, late goes.
		moved := nightly
		moved.Schedules = []string{"daily 01:00"}
		must(t, w.s.Reload([]Job{moved}, []string{"esx1"}, []string{"main"}))
		if st := w.status(); len(st.Running) != 1 || st.Jobs[0].Run == 0 || st.Jobs[0].Next.Format(time.DateTime) != "2026-05-02 01:00:00" {
			t.Errorf("status: %+v", st)
		}
		w.until("2026-05-02T12:00:00Z")
		same(t, "generations", w.made("esx1/a"), []string{"2026-05-01 02:00", "2026-05-02 01:00"})
		if r := w.last("late"); r.State != history.Cancelled || len(r.Events) == 0 {
			t.Errorf("late: %+v", r)
		}
		// It comes back: what it missed meanwhile was not wanted.
		must(t, w.s.Reload([]Job{moved, {Name: "late", VMs: []string{"esx1/a"}, Schedules: []string{"daily 02:10"}, TimeZone: "UTC"}}, []string{"esx1"}, []string{"main"}))
		w.until("2026-05-02T20:00:00Z")
		if n := len(w.runs("late")); n != 1 {
			t.Errorf("late ran %d times", n)
		}
		w.halt()
	})
}

// TestProgress: rate and end are told while a VM is read.
func TestProgress(t *testing.T) {
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	nudge := make(chan struct{}, 1)
	p := newProgress(func() time.Time { return now }, nudge)
	p.count("read", 0, 1000)
	for n := range int64(10) {
		now = now.Add(time.Second)
		p.count("read", (n+1)*10, 1000)
	}
	got := p.look(now)
	if got.Rate != 10 || !got.ETA.Equal(now.Add(90*time.Second)) || got.Done != 100 {
		t.Errorf("%+v", got)
	}
	if e := p.drain(); len(e) != 1 || e[0].Text != "read" || len(nudge) != 1 {
		t.Errorf("events %v", e)
	}
}

// TestConcurrent calls everything at once; it is for the race detector.
func TestConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", names("esx1", 5)...)
		w.takes = func(_ repo.VMID, n int) time.Duration { return time.Duration(n%3) * time.Minute }
		hourly := nightly
		hourly.Schedules = []string{"0 * * * *"}
		w.boot(hourly, Job{Name: "hand", VMs: []string{"*/*"}})
		var g sync.WaitGroup
		for i := range 8 {
			g.Go(func() {
				cancel := w.s.Subscribe(func(e Event) {
					if _, err := json.Marshal(e); err != nil {
						t.Error(err)
					}
				})
				defer cancel()
				for n := range 24 {
					time.Sleep(time.Duration(i+1) * time.Minute)
					switch n % 4 {
					case 0:
						_, _ = w.s.Run("hand", true) // it may be under way
					case 1:
						st, err := w.s.Status()
						if err != nil {
							t.Error(err)
						}
						if _, err := json.Marshal(st); err != nil {
							t.Error(err)
						}
						for _, r := range st.Running {
							if i == 0 {
								_ = w.s.Cancel(r.ID, nil)
							}
						}
					case 2:
						if err := w.s.Reload([]Job{hourly, {Name: "hand", VMs: []string{"*/*"}}}, []string{"esx1"}, []string{"main"}); err != nil {
							t.Error(err)
						}
					case 3:
						if _, err := w.db.Runs(history.Query{Job: "hand"}); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		g.Wait()
		w.halt()
		if w.most[""] > DefaultTotal {
			t.Errorf("%d at once", w.most[""])
		}
	})
}
