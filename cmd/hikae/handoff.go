package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"hikae/cmd/hikae/internal/app"
)

// How a mount goes to the background: a Go program cannot fork, so it starts
// itself again, in a session of its own, with two pipes. Through one the child
// is handed the passphrase, which must stand neither in its arguments nor in
// its environment; through the other it says that the mount is up, or why not.
// Only then does the parent end, so a script can use the folder in its next
// line, and sees errors as exit codes.

// handoffFlag tells the child that it is one.
const handoffFlag = "handed-over"

// The child's ends of the pipes.
const (
	handoffPassphrase = 3
	handoffReport     = 4
)

// handoffAnswer is what the child says, once, as one line of JSON.
type handoffAnswer struct {
	Error    string `json:"error,omitempty"`
	ExitCode int    `json:"exit_code"`
	Next     string `json:"next,omitempty"`
}

// childError is an error that the child met.
type childError struct{ handoffAnswer }

func (e *childError) Error() string { return e.handoffAnswer.Error }

func runMountBackground(ctx context.Context, a *app.App, o mountOptions, dir string) error {
	place, err := a.Repository()
	if err != nil {
		return err
	}
	if err := app.NeedsRepository(place.Path); err != nil {
		return err
	}
	key, err := a.Key(ctx, place)
	if err != nil {
		return err
	}
	defer key.Wipe()
	log, err := mountLog(a, dir)
	if err != nil {
		return err
	}
	defer log.Close()
	a.Stopping("unmounting " + dir)
	args := []string{"mount", "--" + handoffFlag, "--repo", place.Path, "--config", a.Flags.Config, "--state", a.Flags.State}
	args = append(args, o.args()...)
	if a.Flags.Verbose {
		args = append(args, "--verbose")
	}
	child, err := startChild(append(args, "--", dir), key, log)
	if err != nil {
		return err
	}
	if err := child.wait(ctx, log.Name()); err != nil {
		if info, statErr := log.Stat(); statErr == nil && info.Size() == 0 {
			_ = os.Remove(log.Name())
		}
		return err
	}
	a.UI.Infof("%s is mounted on %s, served by process %d (log: %s); next: hikae umount %s", place.Path, dir, child.cmd.Process.Pid, log.Name(), dir)
	return child.cmd.Process.Release()
}

type child struct {
	cmd    *exec.Cmd
	report *os.File
}

func startChild(args []string, key app.Key, log *os.File) (*child, error) {
	fail := func(err error) (*child, error) { return nil, fmt.Errorf("go to the background: %w", err) }
	self, err := os.Executable()
	if err != nil {
		return fail(err)
	}
	secretR, secretW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer secretR.Close()
	defer secretW.Close()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer reportW.Close()
	cmd := exec.Command(self, args...)
	cmd.Args[0] = os.Args[0] // tests run this program under another name
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{secretR, reportW}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		reportR.Close()
		return fail(err)
	}
	// A passphrase (64 KiB at most) fits into the pipe, so this cannot block for
	// long whatever the child does.
	encoded := key.Encode()
	defer clear(encoded)
	if _, err := secretW.Write(encoded); err != nil {
		_ = cmd.Process.Kill()
		reportR.Close()
		return fail(err)
	}
	return &child{cmd: cmd, report: reportR}, nil
}

// wait returns when the child's mount is up, or with why it is not.
func (c *child) wait(ctx context.Context, log string) error {
	defer c.report.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	var answer handoffAnswer
	if err := json.NewDecoder(c.report).Decode(&answer); err != nil {
		_ = c.cmd.Wait() // its state is told below
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("the process that should serve the mount ended before it was up (%v); its last words are in %s", c.cmd.ProcessState, log)
	}
	if answer.Error != "" {
		_ = c.cmd.Wait()
		return &childError{answer}
	}
	if !stop() {
		// Stopped in the moment it came up: it ends itself.
		_ = c.cmd.Wait()
		return context.Cause(ctx)
	}
	return nil
}

// serveMountHandedOver is the child's side.
func serveMountHandedOver(ctx context.Context, a *app.App, o mountOptions, dir string) error {
	secret, report := os.NewFile(handoffPassphrase, "passphrase"), os.NewFile(handoffReport, "report")
	if secret == nil || report == nil {
		return app.Usagef("--%s is for hikae mount itself", handoffFlag)
	}
	defer report.Close()
	a.LogTime = true
	a.UI.Quiet = true
	answered := false
	answer := func(m handoffAnswer) {
		if !answered {
			answered = true
			_ = json.NewEncoder(report).Encode(m)
			_ = report.Close()
		}
	}
	err := func() error {
		encoded, err := io.ReadAll(io.LimitReader(secret, 1<<20))
		_ = secret.Close()
		if err != nil {
			return fmt.Errorf("passphrase pipe: %w", err)
		}
		key, err := app.DecodeKey(encoded)
		if err != nil {
			return err
		}
		place, err := a.Repository()
		if err != nil {
			return err
		}
		return serveMount(ctx, a, o, dir, place.Path, key, func() {
			// Hold on to no directory that others may want to unmount.
			_ = os.Chdir("/")
			answer(handoffAnswer{})
		})
	}()
	if err != nil && ctx.Err() != nil && !answered {
		err = errors.Join(err, errInterrupted)
	}
	if err != nil {
		answer(handoffAnswer{Error: err.Error(), ExitCode: exitCode(err), Next: nextStep(err)})
	}
	return err
}
