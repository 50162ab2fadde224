package backup

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/repo"
)

// childEnv carries what a child process needs to run one backup: the test binary
// runs itself, so that a real process can be killed.
const childEnv = "HIKAE_TEST_CHILD"

type childJob struct {
	Address, User, Password, Thumbprint string
	Repo, State                         string
	Time                                time.Time
	Restore                             *childRestore // instead of a backup
}

// child is the process that gets killed. It prints a line per event, and waits
// nowhere.
func child() {
	var job childJob
	if err := json.Unmarshal([]byte(os.Getenv(childEnv)), &job); err != nil {
		panic(err)
	}
	ctx := context.Background()
	if job.Restore != nil {
		restoreChild(ctx, job)
		return
	}
	host, err := esxi.Connect(ctx, esxi.Config{
		Name: "esx1", Address: job.Address, User: job.User, Thumbprint: job.Thumbprint,
		Password: func() (string, error) { return job.Password, nil },
	})
	if err != nil {
		panic(err)
	}
	r, err := repo.Open(ctx, job.Repo, repo.Passphrase(passphrase), repo.Options{})
	if err != nil {
		panic(err)
	}
	n := 0
	_, err = Run(ctx, Options{
		Repo: r, Host: host, HostName: "esx1", VM: "web01", State: job.State, Clock: func() time.Time { return job.Time },
		Progress: func(e Event) {
			n++
			fmt.Println(e.Phase, n)
		},
	})
	fmt.Println("end", err)
}

// A process killed at any moment leaves nothing that the next run does not put
// right.
func TestKilled(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 8*mib)), image(t, 4*mib, 2, area0(0, mib)))
	vm, err := w.host.VM(t.Context(), "web01")
	must(t, err)
	if _, err := w.host.CreateSnapshot(t.Context(), vm, "hikae-00000000deadbeef", "made by another machine", false); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	must(t, err)
	left := 0
	for i, phase := range []string{PhaseCheck, PhaseSnapshot, PhaseSnapshot, PhaseRead, PhaseRead, PhaseAudit, PhaseCommit, PhaseCommit, PhaseRemove, "end"} {
		w.write(0, rand.Int64N(13)*mib, 3*mib, uint64(100+i))
		w.write(1, rand.Int64N(3)*mib, 100000, uint64(200+i))
		job, err := json.Marshal(childJob{
			Address: w.sim.Address(), User: w.sim.User(), Password: w.sim.Password(), Thumbprint: w.sim.Thumbprint(),
			Repo: w.dir, State: w.state, Time: w.now(),
		})
		must(t, err)
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), childEnv+"="+string(job))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		after := rand.IntN(8) // events of the phase
		wait := time.Duration(rand.IntN(20000)) * time.Microsecond
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), phase) {
				if after--; phase != PhaseRead || after < 0 {
					break
				}
			}
		}
		time.Sleep(wait)
		_ = cmd.Process.Kill()
		for lines.Scan() { // until the pipe is closed, so until it is dead
		}
		_ = cmd.Wait()

		now, err := w.host.VM(t.Context(), "web01")
		must(t, err)
		left += len(now.Snapshots) - 1
		w.open()
		res := w.backup()
		w.sameAsGuest(res.Ref)
		w.noSnapshotsBut("hikae-00000000deadbeef")
		report, err := w.repo.Check(t.Context(), repo.CheckOptions{})
		must(t, err)
		if len(report.Problems) > 0 {
			t.Errorf("killed in phase %s: %+v", phase, report.Problems)
		}
	}
	if left == 0 {
		t.Error("no kill left a snapshot behind: the test tests nothing")
	}
	w.checkRepo()
}

// noSnapshotsBut is noSnapshots with one of another machine's that must be there.
func (w *world) noSnapshotsBut(name string) {
	w.t.Helper()
	vm, err := w.host.VM(w.t.Context(), "web01")
	must(w.t, err)
	if len(vm.Snapshots) != 1 || vm.Snapshots[0].Name != name {
		w.t.Errorf("snapshots: %+v", vm.Snapshots)
	}
	if dead, err := deadEntries(w.state, "esx1"); err != nil || len(dead) > 0 {
		w.t.Errorf("journal: %v %v", dead, err)
	}
}
