package backup

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/repo"
)

// childRestore says which restore a child process makes, and when it dies.
type childRestore struct {
	SSH, Fingerprint string
	Only             bool // port 443 closed
	VM               repo.VMID
	Sequence         uint64
	Die              string // the beginning of the log message at which it kills itself
	After            int    // so many such messages before
}

// dying is a log handler that kills its own process at a message: nothing of the
// process runs after that, no undoing either.
type dying struct {
	slog.Handler
	at    string
	after int
}

func (d *dying) Enabled(context.Context, slog.Level) bool { return true }

func (d *dying) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, d.at) {
		if d.after--; d.after < 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	return nil
}

func restoreChild(ctx context.Context, job childJob) {
	c := shellConfig(job.Address, job.Thumbprint, job.Restore.SSH, job.Restore.Fingerprint, job.User, job.Password, job.Restore.Only)
	if c.SSH.Address == "" {
		c.SSH = nil
	}
	host, err := esxi.Connect(ctx, c)
	if err != nil {
		panic(err)
	}
	r, err := repo.Open(ctx, job.Repo, repo.Passphrase(passphrase), repo.Options{})
	if err != nil {
		panic(err)
	}
	all, err := r.Refs(ctx, job.Restore.VM)
	if err != nil {
		panic(err)
	}
	i := slices.IndexFunc(all, func(ref repo.Ref) bool { return ref.Sequence == job.Restore.Sequence })
	g, err := r.Generation(ctx, all[i])
	if err != nil {
		panic(err)
	}
	_, err = Restore(ctx, RestoreOptions{
		Generation: g, Host: host, HostName: "esx1", Datastore: "datastore1", Name: "copy", State: job.State,
		Clock: func() time.Time { return job.Time }, Logger: slog.New(&dying{at: job.Restore.Die, after: job.Restore.After}),
	})
	fmt.Println("end", err)
}

// killRestore runs a restore in a process of its own that dies at a message. It
// tells whether it did.
func (w *world) killRestore(only bool, ref repo.Ref, die string, after int) bool {
	w.t.Helper()
	job, err := json.Marshal(childJob{
		Address: w.sim.Address(), User: w.sim.User(), Password: w.sim.Password(), Thumbprint: w.sim.Thumbprint(), Repo: w.dir, State: w.state, Time: w.now(),
		Restore: &childRestore{SSH: w.sim.SSHAddress(), Fingerprint: w.sim.SSHFingerprint(), Only: only, VM: ref.VM, Sequence: ref.Sequence, Die: die, After: after},
	})
	must(w.t, err)
	exe, err := os.Executable()
	must(w.t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+string(job))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		w.t.Logf("the child lived: %s", out)
		return false
	}
	if state, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || state.Signal() != syscall.SIGKILL {
		w.t.Fatalf("the child ended by itself: %v", err)
	}
	return true
}

// A restore that is killed between any two steps is taken away by the next run,
// with nothing else; one that was finished stays.
func TestRestoreKilled(t *testing.T) {
	type moment struct {
		die   string
		after int
	}
	begin := []moment{{"journalled", 0}, {"made the folder", 0}, {"marked", 0}}
	end := []moment{{"sent a small file", 3}, {"registered", 0}, {"finished", 0}}
	for name, c := range map[string]struct {
		o       esxisim.Options
		only    bool
		moments []moment
	}{
		"SSH": {esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}, false, slices.Concat(begin,
			[]moment{{"made a disk", 1}, {"wrote", 1}, {"the host has checked", 0}}, end)},
		"SSH alone": {esxisim.Options{Free: true, Edition: "6.5", SSH: &esxisim.SSHOptions{}}, true, []moment{{"made the folder", 0}, {"registered", 0}}},
		"SOAP":      {esxisim.Options{}, false, []moment{{"made the folder", 0}, {"sent a small file", 0}, {"registered", 0}, {"finished", 0}}},
	} {
		t.Run(name, func(t *testing.T) {
			var w *world
			if c.o.SSH == nil {
				w = newWorld(t, c.o)
			} else {
				w = newShellWorld(t, c.o, c.only)
			}
			w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 12*mib, 1, area0(0, 9*mib)), image(t, 2*mib, 2, area0(0, mib)))
			ref := w.backup().Ref
			// Somebody's folder of the same name is skipped, and nothing happens to it.
			must(t, os.MkdirAll(filepath.Join(w.store, "copy"), 0o755))
			stranger := filepath.Join(w.store, "copy", "letter.txt")
			must(t, os.WriteFile(stranger, []byte("mine"), 0o644))
			for _, m := range c.moments {
				if !w.killRestore(c.only, ref, m.die, m.after) {
					t.Errorf("%v never came", m)
				}
				what := fmt.Sprint(m)
				there := w.folderExists("copy-1")
				if there != (m.die != "journalled") {
					t.Errorf("%s: the folder is there: %v; the test tests nothing", what, there)
				}
				if m.die == "finished" {
					if _, err := Cleanup(t.Context(), w.host, "esx1", w.state, nil); err != nil {
						t.Error(err)
					}
					w.same(ref, "copy")
					vm, err := w.host.VM(t.Context(), "copy")
					must(t, err)
					must(t, w.host.UnregisterVM(t.Context(), vm))
					must(t, w.host.Delete(t.Context(), "[datastore1] copy-1"))
				} else if cleaned, err := CleanupRestores(t.Context(), w.host, "esx1", w.state, nil); err != nil || there != (len(cleaned) == 1) {
					t.Errorf("%s: cleaned %+v, %v", what, cleaned, err)
				}
				w.empty("copy-1")
				if slices.Contains(w.sim.VMs(), "copy") || len(w.sim.VMs()) != 1 {
					t.Errorf("%s: the host has the VMs %q", what, w.sim.VMs())
				}
			}
			if text, err := os.ReadFile(stranger); string(text) != "mine" {
				t.Errorf("somebody's file: %q, %v", text, err)
			}
			w.same(ref, "web01")
			// The next restore cleans up by itself, and tells.
			w.killRestore(c.only, ref, "registered", 0)
			o := w.restoreOptions(ref)
			o.Name = "copy"
			res, err := Restore(t.Context(), o)
			must(t, err)
			if res.Folder != "[datastore1] copy-1" || !strings.Contains(strings.Join(res.Warnings, "\n"), `the folder "[datastore1] copy-1" that it had made was removed`) {
				t.Errorf("%+v", res)
			}
			w.same(ref, "copy")
		})
	}
}

// What somebody took over, or has nothing to do with a restore any more, stays.
func TestRestoreLeftAlone(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 3*mib, 1, area0(0, mib)))
	ref := w.backup().Ref
	clean := func(what string, removed int) {
		t.Helper()
		cleaned, err := CleanupRestores(t.Context(), w.host, "esx1", w.state, nil)
		if err != nil || len(cleaned) != removed {
			t.Errorf("%s: %+v, %v", what, cleaned, err)
		}
		w.empty("none")
	}
	// Started by its owner, who found it complete enough.
	w.killRestore(false, ref, "registered", 0)
	must(t, w.sim.PowerOn("copy"))
	clean("started", 0)
	w.same(ref, "copy")
	must(t, w.sim.PowerOff("copy"))
	vm, err := w.host.VM(t.Context(), "copy")
	must(t, err)
	must(t, w.host.UnregisterVM(t.Context(), vm))
	must(t, w.host.Delete(t.Context(), "[datastore1] copy"))

	// Removed by hand, and another VM of that name came into its place.
	w.killRestore(false, ref, "made a disk", 0)
	must(t, w.host.Delete(t.Context(), "[datastore1] copy"))
	w.addVM("copy", esxisim.VMOptions{}, image(t, mib, 9, area0(0, mib)))
	clean("another VM", 0)
	if !w.folderExists("copy") || !slices.Contains(w.sim.VMs(), "copy") {
		t.Error("somebody's VM is gone")
	}

	vm, err = w.host.VM(t.Context(), "copy")
	must(t, err)
	must(t, w.host.UnregisterVM(t.Context(), vm))

	// At work still, in this process.
	o := w.restoreOptions(ref)
	o.Name = "live"
	done := false
	o.Progress = func(e Event) {
		if e.Phase == PhaseVerify && !done {
			done = true
			if cleaned, err := CleanupRestores(t.Context(), w.host, "esx1", w.state, nil); err != nil || len(cleaned) > 0 {
				t.Errorf("%+v, %v", cleaned, err)
			}
		}
	}
	_, err = Restore(t.Context(), o)
	must(t, err)
	w.same(ref, "live")

	// A host that cannot be asked keeps its entry, and so does another host's.
	w.killRestore(false, ref, "made a disk", 0)
	if cleaned, err := CleanupRestores(t.Context(), w.host, "esx2", w.state, nil); err != nil || len(cleaned) > 0 {
		t.Errorf("%+v, %v", cleaned, err)
	}
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "rm -rf", Message: "rm: Input/output error", Status: 1, Count: -1}); err != nil {
		t.Fatal(err)
	}
	if _, err := CleanupRestores(t.Context(), w.host, "esx1", w.state, nil); err == nil || !strings.Contains(err.Error(), "[datastore1] copy-1") {
		t.Errorf("%v", err)
	}
	w.sim.ClearFaults()
	clean("at last", 1)

	// An entry that somebody has damaged is told of.
	must(t, os.WriteFile(filepath.Join(journalDir(w.state), "esx1-0123456789abcdef.restore"), []byte("{"), 0o600))
	if _, err := CleanupRestores(t.Context(), w.host, "esx1", w.state, nil); err == nil || !strings.Contains(err.Error(), "hikae-restore-unfinished-0123456789abcdef") {
		t.Errorf("%v", err)
	}
}
