package sched

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// fleet is 200 VMs on 4 hosts, very uneven ones, and how long each takes.
func fleet(w *world, rnd *rand.Rand) func(vm repo.VMID) time.Duration {
	took := map[string]time.Duration{}
	for h, n := range []int{90, 60, 35, 15} {
		host := fmt.Sprintf("esx%d", h+1)
		w.vms(host, names(host, n)...)
		for _, vm := range names(host, n) {
			d := time.Duration(60+rnd.IntN(600)) * time.Second
			if rnd.IntN(15) == 0 {
				d *= 12 // a file server
			}
			took[vm] = d
		}
	}
	return func(vm repo.VMID) time.Duration { return took[vm.Name] }
}

// ideal is a bound below which no order of the work comes: all places busy all
// the time, all places of the fullest host, or the longest VM.
func ideal(calls []callOf, perHost, total int) time.Duration {
	var all, longest time.Duration
	hosts := map[string]time.Duration{}
	for _, c := range calls {
		id, _ := repo.ParseVMID(c.what)
		d := c.to.Sub(c.from)
		all += d
		hosts[id.Host] += d
		longest = max(longest, d)
	}
	best := max(all/time.Duration(total), longest)
	for _, d := range hosts {
		best = max(best, d/time.Duration(perHost))
	}
	return best
}

// TestPacking backs 200 VMs up, some nights: limits hold, and it takes little
// longer than the best order could.
func TestPacking(t *testing.T) {
	for _, c := range []struct {
		name           string
		perHost, total int
		limit          float64 // of the second night
		jobs           []Job
	}{
		{"one job", 3, 8, 1.01, []Job{{Name: "all", VMs: []string{"*/*"}}}},
		{"tight", 2, 4, 1.01, []Job{{Name: "all", VMs: []string{"*/*"}}}},
		{"loose", 4, 16, 1.01, []Job{{Name: "all", VMs: []string{"*/*"}}}},
		{"a job a host", 3, 8, 1.15, []Job{
			{Name: "h1", VMs: []string{"esx1/*"}},
			{Name: "h2", VMs: []string{"esx2/*"}},
			{Name: "h3", VMs: []string{"esx3/*"}},
			{Name: "h4", VMs: []string{"esx4/*"}},
		}},
		{"mixed", 3, 8, 1.01, []Job{
			{Name: "even", VMs: []string{"*/*0", "*/*2", "*/*4", "*/*6", "*/*8"}}, {Name: "some", VMs: []string{"*/*1", "*/*3"}}, {Name: "rest", VMs: []string{"*/*5", "*/*7", "*/*9"}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(7, 7))
				w := newWorld(t, "2026-05-01T12:00:00Z")
				w.options.PerHost, w.options.Total = c.perHost, c.total
				w.quiet = true
				took := fleet(w, rnd)
				w.takes = func(vm repo.VMID, n int) time.Duration {
					// Nights differ by a tenth.
					return took(vm) * time.Duration(90+hash(vm.Name, n)%21) / 100
				}
				for i := range c.jobs {
					c.jobs[i].Schedules, c.jobs[i].TimeZone = []string{"daily 20:00"}, "UTC"
				}
				w.boot(c.jobs...)
				begin := time.Date(2026, 5, 1, 20, 0, 0, 0, time.UTC)
				for night := range 2 {
					time.Sleep(24 * time.Hour)
					synctest.Wait()
					calls := w.done()
					if len(calls) != 200 {
						t.Fatalf("%d backups in a night", len(calls))
					}
					var end time.Time
					for _, c := range calls {
						if c.to.After(end) {
							end = c.to
						}
					}
					best := ideal(calls, c.perHost, c.total)
					ratio := float64(end.Sub(begin)) / float64(best)
					t.Logf("night %d: %v, at best %v: %.3f", night+1, end.Sub(begin), best, ratio)
					// The first night it is not known how long any of them takes.
					if limit := []float64{1.4, c.limit}[night]; ratio > limit {
						t.Errorf("night %d took %.3f of the ideal", night+1, ratio)
					}
					begin = begin.Add(24 * time.Hour)
				}
				if w.most[""] != c.total {
					t.Errorf("%d at once, limit %d", w.most[""], c.total)
				}
				for h := range w.hosts {
					if w.most["host "+h] > c.perHost {
						t.Errorf("%d at once on %s", w.most["host "+h], h)
					}
				}
				w.halt()
			})
		})
	}
}

// TestFair: a job with one VM does not wait for one with many, and one VM is
// never in two hands.
func TestFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.options.PerHost, w.options.Total = 1, 1
		w.vms("esx1", names("esx1", 40)...)
		w.vms("esx1", "small")
		w.boot(
			Job{Name: "big", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"},
			Job{Name: "second", VMs: []string{"esx1/*vm0*"}, Schedules: []string{"daily 02:01"}, TimeZone: "UTC"},
			Job{Name: "small", VMs: []string{"esx1/small"}, Schedules: []string{"daily 02:02"}, TimeZone: "UTC"},
			Job{Name: "hand", VMs: []string{"esx1/*vm39"}},
		)
		w.until("2026-05-01T02:25:00Z")
		id, err := w.s.Run("hand", true)
		must(t, err)
		w.until("2026-05-02T00:00:00Z")
		order := []string{}
		for _, c := range w.calls[:5] {
			order = append(order, c.what)
		}
		// One of big; then second and small, which wait longer; the person's goes
		// before what big has left.
		if order[2] != "esx1/small" || order[3] != "esx1/esx1-vm39" {
			t.Errorf("order %v", order)
		}
		if r, err := w.db.Run(id); err != nil || r.Ended.IsZero() {
			t.Errorf("the person's run: %+v, %v", r, err)
		}
		for key, n := range w.most {
			if n > 1 {
				t.Errorf("%d of %q at once", n, key)
			}
		}
		for _, name := range []string{"big", "second", "small"} {
			if r := w.last(name); r.State != history.OK {
				t.Errorf("%s: %+v", name, r)
			}
		}
		w.halt()
	})
}

// TestNoStarvation has many small jobs come all the time: a large one that
// waits for the same places goes on at an even pace.
func TestNoStarvation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.options.PerHost, w.options.Total, w.options.StaleAfter = 2, 2, -1
		w.vms("esx1", names("esx1", 30)...)
		var jobs []Job
		for i := range 6 {
			// Each asks for a third of the places: together three times what there is.
			w.vms("esx1", fmt.Sprintf("busy%d", i))
			jobs = append(jobs, Job{Name: fmt.Sprintf("busy%d", i), VMs: []string{fmt.Sprintf("esx1/busy%d", i)}, Schedules: []string{"*/10 * * * *"}, TimeZone: "UTC"})
		}
		jobs = append(jobs, Job{Name: "large", VMs: []string{"esx1/*vm*"}, Schedules: []string{"daily 01:00"}, TimeZone: "UTC"})
		w.boot(jobs...)
		w.until("2026-05-01T23:00:00Z")
		r := w.runs("large")[0]
		// 7 jobs share 2 places and a VM takes 10 minutes: one in 35 minutes is fair.
		if r.Ended.IsZero() || r.Seconds > 30*35*60*1.1 {
			t.Errorf("the large job: %+v", r)
		}
		var last time.Time
		for _, c := range w.calls {
			if len(c.what) > 9 && c.what[5:9] == "esx1" {
				if !last.IsZero() && c.from.Sub(last) > 50*time.Minute {
					t.Errorf("nothing of it began between %v and %v", last, c.from)
				}
				last = c.from
			}
		}
		w.halt()
	})
}

// TestUpkeepBeside: backups go on beside a prune, and the checks of another
// repository, too.
func TestUpkeepBeside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.options.Repositories = []string{"main", "offsite"}
		w.vms("esx1", "a")
		at := []string{"daily 02:00"}
		w.boot(
			Job{Name: "backup", Repository: "main", VMs: []string{"esx1/*"}, Schedules: at, TimeZone: "UTC"},
			Job{Name: "prune", Kind: KindPrune, Repository: "main", Schedules: at, TimeZone: "UTC"},
			Job{Name: "check", Kind: KindCheck, Repository: "main", Schedules: at, TimeZone: "UTC"},
			Job{Name: "other", Kind: KindPrune, Repository: "offsite", Schedules: at, TimeZone: "UTC"},
		)
		w.until("2026-05-01T12:00:00Z")
		var got []string
		for _, c := range w.calls {
			got = append(got, c.what+" "+c.from.UTC().Format("15:04"))
		}
		slices.Sort(got)
		same(t, "work", got, []string{"check main 03:00", "esx1/a 02:00", "prune main 02:00", "prune offsite 02:00"})
		if task := w.tasks(w.last("prune").ID)[0]; string(task.Report) != `{"packs":1}` || task.State != history.OK {
			t.Errorf("the prune's task: %+v", task)
		}
		w.halt()
	})
}

// TestSameVM: a VM that two jobs have is in one hand at a time; what waits for
// it keeps no other from its place.
func TestSameVM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.vms("esx1", "a", "b")
		w.options.Repositories = []string{"main", "offsite"}
		at := []string{"daily 02:00"}
		w.boot(
			Job{Name: "one", Repository: "main", VMs: []string{"esx1/a"}, Schedules: at, TimeZone: "UTC"},
			Job{Name: "two", Repository: "offsite", VMs: []string{"esx1/*"}, Schedules: at, TimeZone: "UTC"},
		)
		w.until("2026-05-01T12:00:00Z")
		same(t, "a", w.made("esx1/a"), []string{"2026-05-01 02:00", "2026-05-01 02:10"})
		same(t, "b", w.made("esx1/b"), []string{"2026-05-01 02:00"})
		st := w.status()
		if g := st.VMs[0]; len(g.Jobs) != 2 || g.Last.Job != "two" || g.Last.Repository != "offsite" {
			t.Errorf("a: %+v", g)
		}
		w.halt()
	})
}

// TestShare: two runs that want all places have half of them each, however long
// their VMs take.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "2026-05-01T00:00:00Z")
		w.options.PerHost, w.options.Total = 4, 4
		w.vms("esx1", names("esx1", 100)...)
		w.vms("esx2", names("esx2", 6)...)
		w.takes = func(vm repo.VMID, n int) time.Duration {
			if vm.Host == "esx2" {
				return 2 * time.Hour
			}
			return 10 * time.Minute
		}
		w.boot(
			Job{Name: "short", VMs: []string{"esx1/*"}, Schedules: []string{"daily 02:00"}, TimeZone: "UTC"},
			Job{Name: "long", VMs: []string{"esx2/*"}, Schedules: []string{"daily 02:05"}, TimeZone: "UTC"},
		)
		w.until("2026-05-01T23:00:00Z")
		if w.most["host esx1"] != 4 || w.most["host esx2"] != 2 {
			t.Errorf("at once: %v", w.most)
		}
		w.halt()
	})
}
