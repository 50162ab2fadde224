// Command esxisim is a simulated ESXi host: it serves the vSphere API and
// /folder over a directory of real disk files, and lets its caller play the
// guests. Package hikae/backup/esxisim says what it is faithful in and where it
// is stricter than a real host.
//
// "esxisim serve" runs the host. The other commands talk to it through its
// control socket, which only the user who started it can open. Exit codes: 0
// done, 1 failed, 2 wrong usage.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// errUsage marks errors that are the command line's fault.
var errUsage = errors.New("usage")

// usage says what is wrong with a command line.
func usage(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, args...))
}

func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	root := &cobra.Command{
		Use:   "esxisim",
		Short: "A simulated ESXi host over a directory of real disk files",
		Long: `A simulated ESXi host over a directory of real disk files.

"esxisim serve" runs it; the other commands play the guests of its VMs, read its
counters and make things go wrong, through its control socket (--control, or the
environment variable ESXISIM_CONTROL).

Exit codes: 0 done, 1 failed, 2 wrong usage.`,
		SilenceErrors: true, SilenceUsage: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("there is no command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage("%v", err) })
	root.AddCommand(serveCommand(), writeCommand(), becomeCommand(), readCommand(), statsCommand(), faultCommand(), vmCommand(), crashCommand())
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errUsage):
		fmt.Fprintf(errs, "esxisim: %v\n", err)
		return 2
	}
	fmt.Fprintf(errs, "esxisim: %v\n", err)
	return 1
}

// exactArgs is cobra.ExactArgs with an exit code of its own.
func exactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(n)(cmd, args); err != nil {
			return usage("%v", err)
		}
		return nil
	}
}
