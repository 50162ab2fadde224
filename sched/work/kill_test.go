package work

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxisim"
	"hikae/repo"
	"hikae/sched"
	"hikae/sched/history"
)

const childEnv = "HIKAE_WORK_CHILD"

// killJob takes seconds a VM, so that there is time to be killed.
var killJob = sched.Job{Name: "nightly", VMs: []string{"esx1/*"}, RateLimit: mib}

// child is a scheduler that gets killed. It starts a run unless one goes on, and
// prints a line per event.
func child() {
	var p place
	if err := json.Unmarshal([]byte(os.Getenv(childEnv)), &p); err != nil {
		panic(err)
	}
	db, err := history.Open(filepath.Join(p.State, "history.db"), history.Options{NoSync: true})
	if err != nil {
		panic(err)
	}
	s, err := sched.New(sched.Options{
		Work: p.work(slog.New(slog.DiscardHandler)), History: db, Jobs: []sched.Job{killJob}, Hosts: []string{"esx1"}, Repositories: []string{"main"},
	})
	if err != nil {
		panic(err)
	}
	s.Subscribe(func(e sched.Event) { fmt.Println(e.Type) })
	go func() { fmt.Println(s.Serve(context.Background())) }()
	for {
		// One that is under way is refused.
		if _, err := s.Run("nightly", true); err == nil {
			fmt.Println("started")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// snapshots counts those of all VMs.
func snapshots(t *testing.T, sim *esxisim.Host) (n int) {
	t.Helper()
	for _, vm := range sim.VMs() {
		names, err := sim.Snapshots(vm)
		must(t, err)
		n += len(names)
	}
	return n
}

// TestKilled kills real schedulers at any moment. Each start says what was
// interrupted, goes on with it, and leaves no snapshot behind.
func TestKilled(t *testing.T) {
	p, sim := newPlace(t, "a", "b", "c", "d", "e")
	text, err := json.Marshal(p)
	must(t, err)
	left := 0
	for i := range 8 {
		for _, vm := range sim.VMs() {
			must(t, sim.WriteAt(vm, 0, []byte(strings.Repeat(fmt.Sprint(i), 200_000)), rand.Int64N(3*mib)))
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+string(text))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for n := rand.IntN(6); n > 0 && lines.Scan(); n-- {
		}
		if i%2 == 0 { // while a VM is in hand
			for snapshots(t, sim) == 0 {
				time.Sleep(time.Millisecond)
			}
		} else {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
		}
		must(t, cmd.Process.Kill())
		for lines.Scan() { // until it is dead
		}
		_ = cmd.Wait() // it was killed
		left += snapshots(t, sim)
	}
	if left == 0 {
		t.Error("no kill left a snapshot behind: the test tests nothing")
	}
	fast := killJob
	fast.RateLimit = 0
	v := serve(t, p, fast)
	for {
		st, err := v.Status()
		must(t, err)
		if len(st.Running) == 0 {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if r := v.run(t, "nightly"); r.State != history.OK || r.TasksOK != 5 {
		t.Errorf("the last run: %+v", r)
	}
	page, err := v.db.Runs(history.Query{Limit: 10000})
	must(t, err)
	interrupted, resumed := 0, 0
	for _, r := range page.Runs {
		tasks, err := v.db.Tasks(r.ID)
		must(t, err)
		for _, task := range tasks {
			if !history.Ended(task.State) {
				t.Errorf("run %d: a task was left %s", r.ID, task.State)
			}
		}
		switch {
		case r.State == history.Interrupted:
			interrupted++
		case r.State != history.OK && r.State != history.Warning: // of removed snapshots
			t.Errorf("run %d: %s: %s", r.ID, r.State, r.Error)
		}
		if r.Trigger == history.ByResume {
			resumed++
		}
	}
	if interrupted == 0 || resumed == 0 {
		t.Errorf("%d interrupted, %d resumed", interrupted, resumed)
	}
	if n := snapshots(t, sim); n > 0 {
		t.Errorf("%d snapshots are left", n)
	}
	v.stop()
	report, err := p.open(t).Check(t.Context(), repo.CheckOptions{ReadData: true})
	must(t, err)
	if len(report.Problems) > 0 {
		t.Errorf("the repository: %+v", report.Problems)
	}
}
