package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/fs"
)

// mountMemory is what the Go runtime of a mount may use, in bytes, before it collects
// garbage more eagerly. With the program itself a mount stays below 200 MiB.
const mountMemory = 150 << 20

// maxMountProcs bounds how many goroutines of a mount run at a time, where the machine
// has fewer processors than that. There may be twice as many as processors: whoever
// comes back from the kernel with a request would otherwise wait until one that
// decompresses is done, which the system, unlike the Go runtime, does not ask for.
const maxMountProcs = 16

func newMount(a *app.App) *cobra.Command {
	var o mountOptions
	cmd := &cobra.Command{
		Use:   "mount DIR",
		Short: "show the repository as a folder",
		Long: `Shows the repository as a folder, read-only:

  DIR/HOST/VM/2026-11-22T02-00-00Z/   one folder for each generation, with
                                      its disks as flat VMDK files, the VM's
                                      configuration, and generation.json
  DIR/HOST/VM/latest                  leads to the newest one
  .../partitions/NAME-p1.img          each partition of each disk

New generations appear while it is mounted. To read files of a guest, as root:

  mount -o ro,loop DIR/HOST/VM/latest/partitions/NAME-p1.img /mnt

hikae returns when the folder is ready, and serves it in the background until
hikae umount DIR. With --foreground it stays, until Ctrl-C or SIGTERM, and
tells systemd (Type=notify) when the folder is ready. For /etc/fstab there is
contrib/mount.fuse.hikae.` +
			exitCodes(exitPassphrase, exitNotFound, exitDamaged),
		Example: `  hikae mount /srv/hikae
  hikae mount /srv/hikae --vm esx1/web01 --since 30d
  hikae mount /srv/hikae --allow-other --gid backup --umask 027`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := o.options(a); err != nil {
				return err
			}
			switch {
			case o.handoff:
				return serveMountHandedOver(cmd.Context(), a, o, args[0])
			case o.foreground:
				return runMountForeground(cmd.Context(), a, o, args[0])
			}
			return runMountBackground(cmd.Context(), a, o, args[0])
		},
	}
	f := cmd.Flags()
	o.register(f)
	must(cmd.RegisterFlagCompletionFunc("host", completeHost(a)))
	f.BoolVar(&o.handoff, handoffFlag, false, "used by hikae mount itself")
	must(f.MarkHidden(handoffFlag))
	return cmd
}

func runMountForeground(ctx context.Context, a *app.App, o mountOptions, dir string) error {
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
	return serveMount(ctx, a, o, dir, place.Path, key, func() {
		a.UI.Infof("%s is mounted on %s; Ctrl-C ends it", place.Path, dir)
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			a.UI.Warnf("systemd was not told that the mount is ready: %v", err)
		}
	})
}

// serveMount mounts, tells by ready, and serves until the mount is taken away
// or ctx ends. It clears the key.
func serveMount(ctx context.Context, a *app.App, o mountOptions, dir, path string, key app.Key, ready func()) error {
	a.Stopping("unmounting " + dir)
	if a.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(mountMemory)
	}
	if a.Getenv("GOMAXPROCS") == "" {
		n := runtime.GOMAXPROCS(0)
		runtime.GOMAXPROCS(max(n, min(2*n, maxMountProcs)))
	}
	options, err := o.options(a)
	if err != nil {
		return err
	}
	r, _, err := a.OpenRepositoryWith(ctx, path, key)
	key.Wipe()
	if err != nil {
		return err
	}
	defer r.Close()
	server, err := fs.Mount(ctx, r, dir, options)
	if err != nil {
		return err
	}
	ready()
	select {
	case <-server.Done():
		return nil
	case <-ctx.Done():
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping) // it sees the end anyway
	// Being asked to end is how a mount in the foreground ends: no failure.
	err = server.Unmount()
	if errors.Is(err, fs.ErrBusy) {
		a.UI.Warnf("%s is in use; it is taken away all the same, and who reads from it gets errors", dir)
		return server.Detach()
	}
	return err
}

func newUmount(a *app.App) *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:     "umount DIR",
		Aliases: []string{"unmount"},
		Short:   "end a mount",
		Long:    `Ends a mount made by hikae mount. One that is in use is left alone, unless --lazy.` + exitCodes(),
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if err := fs.Unmount(args[0], lazy); err != nil {
				return err
			}
			a.UI.Infof("%s is unmounted", args[0])
			return nil
		},
	}
	cmd.Flags().BoolVar(&lazy, "lazy", false, "take it away at once, even in use; it ends when nobody uses it any more")
	return cmd
}

// mountLog is the file into which a mount in the background writes what goes
// wrong, one for each mountpoint.
func mountLog(a *app.App, dir string) (*os.File, error) {
	state, err := a.StateDir()
	if err != nil {
		return nil, err
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("mount log: %w", err)
	}
	logs := filepath.Join(state, "log")
	if err := os.MkdirAll(logs, 0o700); err != nil {
		return nil, fmt.Errorf("mount log: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(logs, "mount"+logName(abs)+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("mount log: %w", err)
	}
	// Lines are rare; a file that has grown all the same begins anew.
	if end, err := f.Seek(0, io.SeekEnd); err == nil && end > 4<<20 {
		if err := f.Truncate(0); err != nil {
			return nil, errors.Join(fmt.Errorf("mount log: %w", err), f.Close())
		}
	}
	return f, nil
}

// logName turns a path into a part of a file name.
func logName(path string) string {
	out := []rune(path)
	for i, r := range out {
		if r == '/' || r < 0x20 {
			out[i] = '-'
		}
	}
	if s := string(out); len(s) <= 200 {
		return s
	}
	return string(out[len(out)-50:])
}
