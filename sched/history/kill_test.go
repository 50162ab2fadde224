package history

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const childEnv = "HIKAE_HISTORY_CHILD"

// child writes runs, each a run under way, its tasks, its end, and the job's
// cursor with it, and tells of each run when Update has returned.
func child() {
	d, err := Open(os.Getenv(childEnv), Options{Keep: 200, NoSync: true}) // a kill is no power cut
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	last, err := d.LastID()
	if open, _ := d.Open(); len(open) > 0 {
		last-- // it was killed in between
	}
	for id := last + 1; err == nil; id++ {
		r, tasks := sample(id, "a", 1+int(id%7))
		err = d.Update(func(tx *Tx) error {
			open := r
			open.State = Running
			return tx.PutRun(open)
		})
		if err != nil {
			break
		}
		err = d.Update(func(tx *Tx) error {
			for _, task := range tasks {
				if err := tx.PutTask(task); err != nil {
					return err
				}
			}
			if err := tx.PutJob(Job{Name: "a", LastRun: id}); err != nil {
				return err
			}
			return tx.PutRun(r)
		})
		fmt.Println(id)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// verify reads all of a history that a kill, or a copy, cut off after the run
// that was acknowledged.
func verify(t *testing.T, path string, acknowledged uint64) uint64 {
	t.Helper()
	d, err := Open(path, Options{NoSync: true})
	must(t, err)
	defer d.Close()
	last, err := d.LastID()
	must(t, err)
	if last < acknowledged {
		t.Fatalf("run %d was acknowledged, the last is %d", acknowledged, last)
	}
	open, err := d.Open()
	must(t, err)
	ended := last
	if len(open) > 0 {
		ended--
	}
	if len(open) > 1 || len(open) == 1 && open[0].ID != last {
		t.Fatalf("open: %+v", open)
	}
	if jobs, err := d.Jobs(); err != nil || jobs["a"].LastRun != ended {
		t.Fatalf("the job stands at %d, the runs at %d (%v)", jobs["a"].LastRun, ended, err)
	}
	page, err := d.Runs(Query{Limit: 1000})
	must(t, err)
	for i, r := range page.Runs {
		if r.ID != last-uint64(i) {
			t.Fatalf("run %d at place %d from %d", r.ID, i, last)
		}
		tasks, err := d.Tasks(r.ID)
		must(t, err)
		if want := r.Tasks; r.State == OK && len(tasks) != want {
			t.Fatalf("run %d has %d tasks of %d", r.ID, len(tasks), want)
		}
	}
	if n := len(page.Runs); n > 201 {
		t.Fatalf("%d runs are kept", n)
	}
	return last
}

// TestKilled kills a process that writes, and copies its file while it stands
// still at any moment: everything it had said is there, and nothing is half.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "history.db")
	rnd := rand.New(rand.NewPCG(3, 4))
	var last uint64
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var told atomic.Uint64
		read := make(chan struct{})
		go func() {
			defer close(read)
			for lines := bufio.NewScanner(out); lines.Scan(); {
				if id, err := strconv.ParseUint(lines.Text(), 10, 64); err == nil {
					told.Store(id)
				}
			}
		}()
		for told.Load() < last+20 {
			time.Sleep(time.Millisecond)
		}
		for n := range 4 {
			time.Sleep(time.Duration(rnd.IntN(8000)) * time.Microsecond)
			must(t, cmd.Process.Signal(syscall.SIGSTOP))
			acknowledged := told.Load()
			waitStopped(t, cmd.Process.Pid)
			text, err := os.ReadFile(path)
			must(t, err)
			must(t, cmd.Process.Signal(syscall.SIGCONT))
			image := filepath.Join(dir, fmt.Sprintf("image-%d-%d", round, n))
			must(t, os.WriteFile(image, text, 0o600))
			verify(t, image, acknowledged)
			must(t, os.Remove(image))
		}
		must(t, cmd.Process.Kill())
		<-read
		_ = cmd.Wait() // it was killed
		last = verify(t, path, told.Load())
	}
	if last < 100 {
		t.Errorf("only %d runs were written", last)
	}
}

// waitStopped waits until the signal has reached all threads.
func waitStopped(t *testing.T, pid int) {
	t.Helper()
	for {
		all := true
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		must(t, err)
		for _, task := range tasks {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", pid, task.Name()))
			if err != nil {
				continue // the thread has ended
			}
			// pid (name) state: the name may hold anything but ends at the last ")".
			for i := len(text) - 1; i > 0; i-- {
				if text[i] == ')' {
					all = all && i+2 < len(text) && (text[i+2] == 'T' || text[i+2] == 't')
					break
				}
			}
		}
		if all {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
}
