package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/backup/esxisim"
)

type serveOptions struct {
	host         esxisim.Options
	space        string
	passwordFile string
	control      string
	vms          []string
	vm           esxisim.VMOptions
	thick        bool
	ssh          esxisim.SSHOptions
	keys         string
	verbose      bool
}

func serveCommand() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve --datastore DIR [--vm NAME=disk0.raw[,disk1.raw…]]…",
		Short: "Run a host until SIGTERM or SIGINT",
		Long: `Run a host until SIGTERM or SIGINT.

--vm imports raw images as the disks of a VM, holes kept; a VM that the directory
has already is left as it is. When all is ready one line of JSON is printed:
address, thumbprint, user, password_file, control, datastore, edition, vms, and
with --ssh also ssh and ssh_fingerprint.

Without --password-file a random password is made and kept in a file beside the
control socket, readable for its owner only.`,
		Args: exactArgs(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return runServe(cmd, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.host.Dir, "datastore", "", "directory that plays the VMFS volume (required)")
	f.StringVar(&o.host.Listen, "listen", "127.0.0.1:0", "address to serve HTTPS on")
	f.StringVar(&o.host.Edition, "edition", "8.0", "release of ESXi to play: "+strings.Join(esxisim.Editions(), ", "))
	f.StringVar(&o.ssh.Listen, "ssh", "", "address to serve SSH on, as 127.0.0.1:0 (default: no SSH)")
	f.BoolVar(&o.ssh.Password, "ssh-password", false, "let SSH take the method \"password\" beside keyboard-interactive")
	f.StringVar(&o.keys, "ssh-authorized-keys", "", "file of public keys that SSH takes")
	f.BoolVar(&o.host.Free, "free", false, "the licence that allows no changes through the API")
	f.StringVar(&o.host.User, "user", "root", "name of the one account")
	f.StringVar(&o.passwordFile, "password-file", "", "file with the account's password in its first line")
	f.StringVar(&o.control, "control", "", "control socket (default DIR/"+esxisim.PrivateDir+"/control)")
	f.StringArrayVar(&o.vms, "vm", nil, "NAME=disk0.raw[,disk1.raw…]: a VM to import; repeatable")
	f.IntVar(&o.host.VMFS, "vmfs", 6, "version of the volume, 5 or 6: decides the format of snapshot links")
	f.BoolVar(&o.vm.ChangeTracking, "cbt", true, "change tracking on imported VMs")
	f.BoolVar(&o.vm.PowerOn, "power-on", true, "start imported VMs")
	f.BoolVar(&o.thick, "thick", false, "import thick disks: they take their whole size")
	f.StringVar(&o.space, "space", "1T", "capacity of the datastore: bytes, or with K, M, G, T")
	f.IntVar(&o.host.MaxInFlight, "max-in-flight", 8, "transfers at once before /folder answers 503")
	f.DurationVar(&o.host.SessionTimeout, "session-timeout", 30*time.Minute, "idle time after which a session ends")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "log every request to standard error")
	return cmd
}

func runServe(cmd *cobra.Command, o serveOptions) (err error) {
	ctx := cmd.Context()
	if o.host.Dir == "" {
		return usage("--datastore DIR is required")
	}
	if o.host.DatastoreBytes, err = parseSize(o.space); err != nil || o.host.DatastoreBytes == 0 {
		return usage("--space %q is no size", o.space)
	}
	vms, err := parseVMs(o.vms)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(o.host.Dir, esxisim.PrivateDir), 0o700); err != nil {
		return err
	}
	if o.control == "" {
		o.control = filepath.Join(o.host.Dir, esxisim.PrivateDir, "control")
	}
	if o.control, err = filepath.Abs(o.control); err != nil {
		return err
	}
	if o.passwordFile == "" {
		o.passwordFile = o.control + ".password"
		err = makePassword(o.passwordFile)
	}
	if err == nil {
		o.host.Password, err = readPassword(o.passwordFile)
	}
	if err != nil {
		return err
	}
	level := slog.LevelWarn
	if o.verbose {
		level = slog.LevelDebug
	}
	o.host.Logger = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
	o.vm.Thin = !o.thick
	if o.ssh.Listen != "" {
		if o.keys != "" {
			if o.ssh.AuthorizedKeys, err = os.ReadFile(o.keys); err != nil {
				return err
			}
		}
		o.host.SSH = &o.ssh
	} else if o.keys != "" || o.ssh.Password {
		return usage("--ssh-password and --ssh-authorized-keys need --ssh ADDRESS")
	}

	h, err := esxisim.Start(ctx, o.host)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	for _, vm := range vms {
		if slices.Contains(h.VMs(), vm.name) {
			o.host.Logger.Warn("the datastore has this VM already; its images were not imported", "vm", vm.name)
			continue
		}
		if err := h.ImportVM(ctx, vm.name, vm.images, o.vm); err != nil {
			return err
		}
	}
	c, err := listenControl(h, o.control)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	ready := map[string]any{
		"address": h.Address(), "thumbprint": h.Thumbprint(), "user": h.User(), "password_file": o.passwordFile,
		"control": o.control, "datastore": "datastore1", "edition": h.Edition(), "vms": h.VMs(),
	}
	if a := h.SSHAddress(); a != "" {
		ready["ssh"], ready["ssh_fingerprint"] = a, h.SSHFingerprint()
	}
	if err := json.NewEncoder(cmd.OutOrStdout()).Encode(ready); err != nil {
		return err
	}
	<-ctx.Done()
	if cause := context.Cause(ctx); cause != nil {
		o.host.Logger.Debug("stopping", "cause", cause)
	}
	return nil
}

type vmSpec struct {
	name   string
	images []string
}

func parseVMs(specs []string) ([]vmSpec, error) {
	var vms []vmSpec
	for _, s := range specs {
		name, images, ok := strings.Cut(s, "=")
		if !ok || name == "" || images == "" {
			return nil, usage("--vm %q is not NAME=disk0.raw[,disk1.raw…]", s)
		}
		if slices.ContainsFunc(vms, func(vm vmSpec) bool { return vm.name == name }) {
			return nil, usage("--vm %s is given twice", name)
		}
		vms = append(vms, vmSpec{name, strings.Split(images, ",")})
	}
	return vms, nil
}

// makePassword makes a file with a random password unless it is there.
func makePassword(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, rand.Text())
	return errors.Join(err, f.Close())
}

func readPassword(name string) (string, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	if line = strings.TrimSuffix(line, "\r"); line == "" {
		return "", fmt.Errorf("the first line of %s is empty: it must be the password", name)
	}
	return line, nil
}

// parseSize reads bytes, or with a suffix K, M, G, T (or KiB, …) binary multiples.
func parseSize(s string) (int64, error) {
	num := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(s)), "B"), "I")
	shift := 0
	if i := strings.IndexAny(num, "KMGT"); i >= 0 && i == len(num)-1 {
		shift = 10 * (strings.IndexByte("KMGT", num[i]) + 1)
		num = num[:i]
	}
	var n int64
	if _, err := fmt.Sscanf(num+"\n", "%d\n", &n); err != nil || n < 0 || n > 1<<62>>shift || fmt.Sprint(n) != num {
		return 0, usage("%q is no size: bytes, or with K, M, G, T", s)
	}
	return n << shift, nil
}
