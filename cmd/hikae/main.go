// Command hikae backs up virtual machines of VMware ESXi hosts into an
// encrypted, deduplicated repository, and gives them back: as a folder of
// ordinary files, as copies, as VMs on a host.
//
// One verb is one file here: its flags, what it prints, and one call into the
// package that does the work. What all verbs share stands in internal/app (which
// repository, host, secret is meant), internal/config (the configuration file)
// and internal/ui (tables, JSON, progress). Exit codes are a promise, kept in
// exitcode.go.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"
	_ "time/tzdata" // jobs have time zones, and a NAS may have none installed

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

// errInterrupted is why a context ends after Ctrl-C or SIGTERM.
var errInterrupted = errors.New("interrupted")

func main() { os.Exit(run(os.Args[1:], repo.KDF{})) }

// run carries one command line out and returns its exit code. kdf is what new
// passphrases cost; tests pay less than the default.
func run(args []string, kdf repo.KDF) int {
	a := &app.App{
		UI:      &ui.Printer{Out: os.Stdout, Err: os.Stderr},
		Stdin:   os.Stdin,
		Getenv:  os.Getenv,
		Clock:   time.Now, //nolint:forbidigo // the one place where the clock comes from
		Version: toolVersion(),
		KDF:     kdf,
	}
	ctx, stop := stopOnSignal(a)
	defer stop()
	root := newRoot(a)
	root.SetArgs(args)
	begun := false
	onRun(root, func() { begun = true })
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil && !begun {
		err = app.Usagef("%w", err)
	}
	return report(ctx, a.UI, cmd, err)
}

// stopOnSignal gives a context that the first Ctrl-C (or SIGTERM) ends, so that
// a verb can bring what it began to a clean end; the second one ends the
// program. What is left behind then, the next run of the verb cleans up.
func stopOnSignal(a *app.App) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case <-signals:
		case <-done:
			return
		}
		a.UI.Errorf("stopping: %s (once more to stop at once)", a.WhenStopped())
		cancel(errInterrupted)
		select {
		case <-signals:
			a.UI.Errorf("stopped at once; what is left behind is cleaned up by the next run")
			os.Exit(exitInterrupted)
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}
