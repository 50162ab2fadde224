package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	sim "hikae/backup/esxisim"
	hikaefs "hikae/fs"
	"hikae/repo"
)

// TestProcesses runs this program as true processes against one repository: one backs
// up a VM of a host, one imports images, one forgets and prunes without any grace, and
// one serves a mount that is read all the time. Each is killed now and then. What was
// committed and not forgotten has to be there in the end, byte for byte.
//
// It goes on for eight seconds, or for HIKAE_TORTURE.
func TestProcesses(t *testing.T) {
	long := 8 * time.Second
	if s := os.Getenv("HIKAE_TORTURE"); s != "" {
		var err error
		if long, err = time.ParseDuration(s); err != nil || long <= 0 {
			t.Fatalf("HIKAE_TORTURE is %q: a duration such as 1m is wanted", s)
		}
	}
	w := newProcesses(t)
	type worker struct {
		name  string
		least int64 // successes without which the test would test nothing
		do    func(*rand.Rand) bool
		done  atomic.Int64
	}
	work := []*worker{
		{name: "backup", least: 2, do: w.backupOnce},
		{name: "import", least: 2, do: w.importOnce},
		{name: "prune", least: 3, do: w.pruneOnce},
		{name: "forget", least: 1, do: w.forgetOnce},
	}
	if haveFUSE(t) {
		work = append(work, &worker{name: "mount", least: 1, do: w.mountOnce})
	} else {
		t.Log("this machine cannot mount: nothing is read through a mount")
	}
	began := time.Now()
	goesOn := func() bool {
		return time.Since(began) < long || slices.ContainsFunc(work, func(x *worker) bool { return x.done.Load() < x.least })
	}
	var workers sync.WaitGroup
	for i, x := range work {
		workers.Go(func() {
			rng := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
			for goesOn() && !t.Failed() {
				if x.do(rng) {
					x.done.Add(1)
				}
			}
		})
	}
	workers.Wait()
	for _, x := range work {
		t.Logf("%s: %d times to its end", x.name, x.done.Load())
	}
	t.Logf("%v", w.counts())
	if !t.Failed() {
		w.verify()
	}
}

// processes is a repository, a host with a VM, an image, and what is known of them.
type processes struct {
	t    *testing.T
	dir  string
	sim  *sim.Host
	size int64

	mu        sync.Mutex
	committed map[string][32]byte   // by HOST/VM@GENERATION: reported, and nobody began to forget it
	touched   map[string]bool       // somebody began to forget these
	tried     map[string][][32]byte // by HOST/VM: every content that was ever backed up
	order     []string              // of committed, oldest first
	count     map[string]int
	clock     time.Time // of imports
}

const processesPass = "correct horse"

func newProcesses(t *testing.T) *processes {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	w := &processes{
		t: t, dir: dir, size: 6 << 20, committed: map[string][32]byte{}, touched: map[string]bool{}, tried: map[string][][32]byte{},
		count: map[string]int{}, clock: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	// The program as it is: the copy of it in this binary may be slowed by the race detector.
	build := exec.Command("go", "build", "-buildvcs=false", "-o", w.path("bin/hikae"), "hikae/cmd/hikae")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build hikae: %v\n%s", err, out)
	}
	w.write("passphrase", processesPass+"\n")
	w.write("password", "secret\n")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(repo.Init(t.Context(), w.path("repository"), repo.InitOptions{
		BlockSize: 64 << 10, Passphrase: []byte(processesPass), KDF: repo.KDF{Time: 1, MemoryKiB: 8, Threads: 1},
	}))
	must(os.Mkdir(w.path("datastore"), 0o700))
	w.sim, err = sim.Start(t.Context(), sim.Options{Dir: w.path("datastore"), User: "root", Password: "secret"})
	must(err)
	t.Cleanup(func() {
		if err := w.sim.Close(); err != nil {
			t.Errorf("close the simulated host: %v", err)
		}
	})
	must(os.WriteFile(w.path("image.raw"), make([]byte, w.size), 0o600))
	must(w.sim.ImportVM(t.Context(), "vm", []string{w.path("image.raw")}, sim.VMOptions{ChangeTracking: true, PowerOn: true}))
	w.write("hikae.toml", fmt.Sprintf(`
[[repository]]
name = "main"
path = %q
passphrase_file = %q

[[host]]
name = "esx"
address = %q
user = "root"
password_file = %q
thumbprint = %q
`, w.path("repository"), w.path("passphrase"), w.sim.Address(), w.path("password"), w.sim.Thumbprint()))
	t.Cleanup(func() { _ = hikaefs.Unmount(w.path("mnt"), true) })
	must(os.Mkdir(w.path("mnt"), 0o700))
	return w
}

func (w *processes) path(name string) string { return filepath.Join(w.dir, name) }

func (w *processes) write(name, content string) {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *processes) did(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count[what]++
}

func (w *processes) counts() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.count)
}

// outcome is how a process ended.
type outcome struct {
	killed         bool
	code           int
	stdout, stderr string
}

func (o outcome) ok() bool { return !o.killed && o.code == 0 }

func (w *processes) command(args ...string) *exec.Cmd {
	cmd := exec.Command(w.path("bin/hikae"), append([]string{"--config", w.path("hikae.toml"), "--state", w.path("state"), "--quiet"}, args...)...)
	cmd.Dir = w.dir
	return cmd
}

// run runs the program; a process that gets no time to end is killed. One that should
// have ended long ago is a failure: something blocks.
func (w *processes) run(kill time.Duration, args ...string) outcome {
	cmd := w.command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		w.t.Errorf("%v: %v", args, err)
		return outcome{killed: true}
	}
	stuck := kill == 0
	if stuck {
		kill = 3 * time.Minute
	}
	killer := time.AfterFunc(kill, func() {
		if stuck {
			w.t.Errorf("%v does not end", args)
		}
		_ = cmd.Process.Kill()
	})
	err := cmd.Wait()
	killer.Stop()
	o := outcome{code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status, ok := exit.Sys().(syscall.WaitStatus)
		o.killed = ok && status.Signaled() && status.Signal() == syscall.SIGKILL
	} else if err != nil {
		w.t.Errorf("%v: %v", args, err)
	}
	if o.killed {
		w.did("killed: " + args[0])
	}
	return o
}

// sometimes is a moment to kill a process at, or 0 to let it live.
func sometimes(rng *rand.Rand) time.Duration {
	if rng.IntN(3) > 0 {
		return 0
	}
	return time.Duration(1+rng.IntN(600)) * time.Millisecond
}

// judge tells whether a process did its work. An error that says to try again is none;
// any other one fails the test.
func (w *processes) judge(o outcome, excuses ...string) bool {
	if o.killed || o.ok() {
		return o.ok()
	}
	for _, e := range excuses {
		if strings.Contains(o.stderr, e) {
			w.did("told to try again: " + e)
			return false
		}
	}
	w.t.Errorf("exit code %d: %s", o.code, o.stderr)
	return false
}

// again are what a backup may say when others get into its way.
var again = []string{
	"run the backup again",            // what it meant to reuse was condemned
	"of that second",                  // two generations within one second
	"the parent was forgotten",        // between choosing it and saying so
	"another hikae is at work on it",  // the one that was killed still is, for its host
	"already being backed up",         // the same
	"has changed since it was opened", // the same
}

// keep notes a generation that was reported.
func (w *processes) keep(o outcome, sum [32]byte) {
	var res struct{ Host, VM, Generation string }
	if err := json.Unmarshal([]byte(o.stdout), &res); err != nil || res.Generation == "" {
		w.t.Errorf("no generation in %q: %v", o.stdout, err)
		return
	}
	name := res.Host + "/" + res.VM + "@" + res.Generation
	w.mu.Lock()
	defer w.mu.Unlock()
	w.committed[name] = sum
	w.order = append(w.order, name)
	w.count["committed"]++
}

// try notes a content that is about to be backed up: whoever is killed may have
// committed it.
func (w *processes) try(vm string, sum [32]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tried[vm] = append(w.tried[vm], sum)
}

// noise fills p; some of it is what was there before, elsewhere.
func noise(rng *rand.Rand, p []byte) {
	for at := 0; at < len(p); at += 64 << 10 {
		_, _ = rand.NewChaCha8([32]byte{byte(rng.IntN(60))}).Read(p[at:min(at+64<<10, len(p))])
	}
}

func (w *processes) backupOnce(rng *rand.Rand) bool {
	for range 1 + rng.IntN(3) {
		p := make([]byte, (1+rng.IntN(6))*(64<<10))
		noise(rng, p)
		if err := w.sim.WriteAt("vm", 0, p, rng.Int64N((w.size-int64(len(p)))>>16)<<16); err != nil {
			w.t.Errorf("write to the guest's disk: %v", err)
			return false
		}
	}
	content := make([]byte, w.size)
	if err := w.sim.ReadAt("vm", 0, content, 0); err != nil {
		w.t.Errorf("read the guest's disk: %v", err)
		return false
	}
	sum := sha256.Sum256(content)
	w.try("esx/vm", sum)
	o := w.run(sometimes(rng), "backup", "esx/vm", "--json")
	if !w.judge(o, again...) {
		return false
	}
	w.keep(o, sum)
	return true
}

func (w *processes) importOnce(rng *rand.Rand) bool {
	f, err := os.OpenFile(w.path("image.raw"), os.O_RDWR, 0)
	if err != nil {
		w.t.Error(err)
		return false
	}
	defer f.Close()
	for range 1 + rng.IntN(3) {
		p := make([]byte, (1+rng.IntN(8))*(64<<10))
		noise(rng, p)
		if _, err := f.WriteAt(p, rng.Int64N((w.size-int64(len(p)))>>16)<<16); err != nil {
			w.t.Error(err)
			return false
		}
	}
	content, err := io.ReadAll(io.NewSectionReader(f, 0, w.size))
	if err != nil {
		w.t.Error(err)
		return false
	}
	sum := sha256.Sum256(content)
	w.try("old/vm", sum)
	w.clock = w.clock.Add(time.Minute)
	o := w.run(sometimes(rng), "import", "old/vm", "--disk", w.path("image.raw"), "--time", w.clock.Format(time.RFC3339), "--json")
	if !w.judge(o, again...) {
		return false
	}
	w.keep(o, sum)
	return true
}

// pruneOnce frees what there is to free.
func (w *processes) pruneOnce(rng *rand.Rand) bool {
	args := []string{"prune", "--grace", "0s", "--json"}
	if rng.IntN(3) == 0 {
		args = append(args, "--max-rewrite", "1MiB")
	}
	o := w.run(sometimes(rng), args...)
	if !w.judge(o) {
		return false
	}
	var report repo.PruneReport
	if err := json.Unmarshal([]byte(o.stdout), &report); err != nil {
		w.t.Errorf("%q: %v", o.stdout, err)
	}
	if report.BlocksMissing > 0 || report.PacksUnreadable > 0 {
		w.t.Errorf("prune found damage: %s", o.stdout)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count["packs deleted"] += int(report.PacksDeleted)
	w.count["packs rewritten"] += int(report.PacksRewritten)
	w.count["packs kept for sessions"] += int(report.PacksKeptForSessions)
	return true
}

// forgetOnce forgets some of what there is when that is too much.
func (w *processes) forgetOnce(rng *rand.Rand) bool {
	var args []string
	w.mu.Lock()
	for len(w.committed) > 4 {
		name := w.order[0]
		w.order = w.order[1:]
		delete(w.committed, name)
		w.touched[name] = true
		args = append(args, name)
	}
	w.mu.Unlock()
	if len(args) == 0 {
		time.Sleep(20 * time.Millisecond)
		return false
	}
	o := w.run(sometimes(rng), append([]string{"forget"}, args...)...)
	return w.judge(o, "in use by a running backup", "newest good generation")
}

// mountOnce serves a mount, reads from it, and kills it or unmounts it.
func (w *processes) mountOnce(rng *rand.Rand) bool {
	mnt := w.path("mnt")
	cmd := w.command("mount", "--foreground", mnt)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		w.t.Error(err)
		return false
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	isUp := func() bool {
		list, err := os.ReadDir(mnt)
		return err == nil && len(list) > 0
	}
	deadline := time.Now().Add(time.Minute)
	for !isUp() {
		select {
		case <-ended:
			w.t.Errorf("the mount ended: %s", stderr.String())
			return false
		case <-time.After(10 * time.Millisecond):
		}
		if w.t.Failed() || time.Now().After(deadline) && w.something() {
			w.t.Errorf("the mount does not come up: %s", stderr.String())
			break
		}
	}
	for range 5 + rng.IntN(20) {
		w.readOnce(rng)
	}
	kill := rng.IntN(2) == 0
	if kill {
		_ = cmd.Process.Kill()
		<-ended
		w.did("killed: mount")
		if err := hikaefs.Unmount(mnt, true); err != nil {
			w.t.Errorf("unmount what a killed mount left: %v", err)
		}
		return false
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-ended:
	case <-time.After(time.Minute):
		w.t.Error("the mount does not end")
		_ = cmd.Process.Kill()
		<-ended
	}
	if strings.Contains(stderr.String(), "level=ERROR") || cmd.ProcessState.ExitCode() != 0 {
		w.t.Errorf("the mount: exit code %d: %s", cmd.ProcessState.ExitCode(), stderr.String())
	}
	return true
}

func (w *processes) something() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.committed) > 0
}
