package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/config"
	"hikae/cmd/hikae/internal/ui"
)

func newHost(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "host",
		Short: "add, list, test and remove ESXi hosts",
		Long: `Hosts stand in the configuration file, one [[host]] block each. These verbs
edit that file; what else is written in it stays as it is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newHostAdd(a), newHostList(a), newHostTest(a), newHostRemove(a))
	return cmd
}

type hostAddOptions struct {
	address         string
	user            string
	passwordFile    string
	thumbprint      string
	ssh             string
	sshFingerprint  string
	sshKeyFile      string
	trustOnFirstUse bool
	noCheck         bool
}

func newHostAdd(a *app.App) *cobra.Command {
	var o hostAddOptions
	cmd := &cobra.Command{
		Use:   "add NAME --address HOST[:PORT] --user USER --password-file FILE",
		Short: "add a host to the configuration",
		Long: `Adds a host to the configuration, after logging in to it once.

The host's certificate is pinned: from then on hikae talks to this certificate
and to no other. On a terminal its SHA-256 thumbprint is shown and you are asked;
compare it with what the host's own console shows (Troubleshooting, or
openssl x509 -in /etc/vmware/ssl/rui.crt -noout -fingerprint -sha256 on it).
Where nobody can be asked, say --thumbprint with the one you expect, or
--trust-on-first-use to believe the first one seen.

The free edition of ESXi allows no changes through its API, and backups need a
snapshot: with --ssh hikae makes it by commands over SSH (switch SSH on in the host's
client: Manage, Services, TSM-SSH). The key of the host's SSH service is pinned in the
same way; its fingerprint is what ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub prints
there. --ssh also makes restores quicker and leaves thin disks thin. hikae host test
says what a host needs.` + exitCodes(exitHost),
		Example: "  hikae host add esx1 --address 192.0.2.7 --user root --password-file /etc/hikae/esx1.password",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runHostAdd(cmd.Context(), a, args[0], o)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&o.address, "address", "", "name or IP address of the host, with :port unless it is 443")
	f.StringVar(&o.user, "user", "", "user to log in as, usually root")
	f.StringVar(&o.passwordFile, "password-file", "", "file with the user's password, readable by its owner only")
	f.StringVar(&o.thumbprint, "thumbprint", "", "the certificate's SHA-256 thumbprint, when you know it")
	f.StringVar(&o.ssh, "ssh", "", "name or IP address of the host's SSH service, with :port unless it is 22")
	f.StringVar(&o.sshFingerprint, "ssh-fingerprint", "", "the SSH key's fingerprint, SHA256:…, when you know it")
	f.StringVar(&o.sshKeyFile, "ssh-key-file", "", "private key to log in to SSH with, instead of the password")
	f.BoolVar(&o.trustOnFirstUse, "trust-on-first-use", false, "pin whatever certificate and SSH key the host shows now")
	f.BoolVar(&o.noCheck, "no-check", false, "do not log in; with --thumbprint the host is not contacted at all")
	for _, name := range []string{"user", "password-file"} {
		must(cmd.MarkFlagRequired(name))
	}
	cmd.MarkFlagsOneRequired("address", "ssh")
	cmd.MarkFlagsMutuallyExclusive("thumbprint", "trust-on-first-use")
	cmd.MarkFlagsMutuallyExclusive("ssh-fingerprint", "trust-on-first-use")
	jsonFlag(a, cmd)
	return cmd
}

// must is for calls that fail only when this program is written wrongly.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func runHostAdd(ctx context.Context, a *app.App, name string, o hostAddOptions) error {
	path, err := a.ConfigPath()
	if err != nil {
		return err
	}
	file, err := a.Config()
	if err != nil {
		if config.Exists(path) {
			return err
		}
		// --config names a file that is yet to be made.
	} else if _, taken := file.Host(name); taken {
		return app.Usagef("%s has a host called %s already; hikae host remove %s, or take another name", path, name, name)
	}
	h := config.Host{
		Name: name, Address: o.address, User: o.user, Thumbprint: o.thumbprint, SSH: o.ssh, SSHFingerprint: o.sshFingerprint,
	}
	if h.PasswordFile, err = filepath.Abs(o.passwordFile); err != nil {
		return fmt.Errorf("password file: %w", err)
	}
	if o.sshKeyFile != "" {
		if h.SSHKeyFile, err = filepath.Abs(o.sshKeyFile); err != nil {
			return fmt.Errorf("SSH key file: %w", err)
		}
	}
	if h.Address != "" && h.Thumbprint == "" {
		if h.Thumbprint, err = firstCertificate(ctx, a, o); err != nil {
			return err
		}
	}
	if h.SSH != "" && h.SSHFingerprint == "" {
		if h.SSHFingerprint, err = firstKey(ctx, a, o); err != nil {
			return err
		}
	}
	if err := h.Check(); err != nil {
		return app.Usagef("%w", err)
	}
	var about esxi.About
	var ways esxi.Ways
	if !o.noCheck {
		host, err := a.ConnectTo(ctx, h)
		if err == nil {
			about = host.About()
			if ways, err = host.Ways(ctx); err == nil && h.SSH != "" && ways.SSH.Err != nil {
				err = ways.SSH.Err
			}
			closeHost(ctx, a, host)
		}
		if err != nil {
			return fmt.Errorf("%w\nnothing was written to %s", err, path)
		}
	}
	if err := config.AddHost(path, h); err != nil {
		return err
	}
	if a.UI.JSON {
		return a.UI.Object(hostLineOf(h))
	}
	if o.noCheck {
		a.UI.Printf("host %s added to %s, not tried\n", name, path)
		return nil
	}
	a.UI.Printf("host %s added to %s: %s %s build %s\n", name, path, ui.Clean(about.Product), ui.Clean(about.Version), ui.Clean(about.Build))
	if ways.Control == "" {
		a.UI.Warnf("nothing can be backed up from %s yet: %s", name, ui.Clean(ways.ControlWhy))
	}
	return nil
}

// firstCertificate looks at the host's certificate and has somebody believe it.
func firstCertificate(ctx context.Context, a *app.App, o hostAddOptions) (string, error) {
	cert, err := esxi.Certificate(ctx, o.address)
	if err != nil {
		return "", err
	}
	return believe(ctx, a, o, found{
		where: o.address, what: "certificate", flag: "--thumbprint", print: cert.Thumbprint,
		shown: fmt.Sprintf("  subject  %s\n  expires  %s\n  SHA-256  %s\n", ui.Clean(cert.Subject), cert.NotAfter.Local().Format(time.DateTime), cert.Thumbprint),
	})
}

// firstKey looks at the key of the host's SSH service and has somebody believe it.
func firstKey(ctx context.Context, a *app.App, o hostAddOptions) (string, error) {
	key, err := esxi.HostKey(ctx, o.ssh)
	if err != nil {
		return "", err
	}
	return believe(ctx, a, o, found{
		where: o.ssh, what: "SSH key", flag: "--ssh-fingerprint", print: key.Fingerprint,
		shown: fmt.Sprintf("  type  %s\n  %s\n", ui.Clean(key.Type), key.Fingerprint),
	})
}

// found is what a host shows when it is seen for the first time.
type found struct{ where, what, flag, print, shown string }

// believe has somebody believe what a host shows.
func believe(ctx context.Context, a *app.App, o hostAddOptions, f found) (string, error) {
	if o.trustOnFirstUse {
		a.UI.Infof("pinned the %s that %s shows now: %s", f.what, ui.Clean(f.where), f.print)
		return f.print, nil
	}
	if a.Stdin == nil || !term.IsTerminal(int(a.Stdin.Fd())) {
		return "", app.Usagef("%s shows the %s %s; if that is right, add %s %s (or --trust-on-first-use to believe the first one seen)",
			f.where, f.what, f.print, f.flag, f.print)
	}
	say, done := a.Prompt()
	defer done()
	fmt.Fprintf(say, "%s shows this %s:\n%sIs it the host's own? Type yes: ", ui.Clean(f.where), f.what, f.shown)
	answer, err := readLine(ctx, a.Stdin)
	if err != nil {
		return "", err
	}
	if answer = strings.ToLower(strings.TrimSpace(answer)); answer != "yes" && answer != "y" {
		return "", app.Usagef("the %s was not accepted; nothing was written", f.what)
	}
	return f.print, nil
}

// readLine reads one line until ctx ends.
func readLine(ctx context.Context, f *os.File) (string, error) {
	type answer struct {
		line string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(f).ReadString('\n')
		got <- answer{line, err}
	}()
	select {
	case <-ctx.Done():
		return "", context.Cause(ctx)
	case r := <-got:
		if r.err != nil && r.line == "" {
			return "", fmt.Errorf("read the answer: %w", r.err)
		}
		return r.line, nil
	}
}

// closeHost logs out, even when the context has ended. What goes wrong then
// hurts nobody: the host ends idle sessions itself.
func closeHost(ctx context.Context, a *app.App, h *esxi.Host) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := h.Close(ctx); err != nil {
		a.Logger().Debug("logging out failed", "error", err)
	}
}

// hostLine is a configured host in JSON.
type hostLine struct {
	Host         string `json:"host"`
	Address      string `json:"address"`
	User         string `json:"user"`
	PasswordFile string `json:"password_file"`
	Thumbprint   string `json:"thumbprint"`

	SSH            string `json:"ssh,omitempty"`
	SSHFingerprint string `json:"ssh_fingerprint,omitempty"`
	SSHKeyFile     string `json:"ssh_key_file,omitempty"`
}

func hostLineOf(h config.Host) hostLine {
	return hostLine{h.Name, h.Address, h.User, h.PasswordFile, h.Thumbprint, h.SSH, h.SSHFingerprint, h.SSHKeyFile}
}

func newHostList(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list the hosts of the configuration",
		Long:  `Lists the hosts that stand in the configuration file, without contacting them.`,
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return runHostList(a) },
	}
	jsonFlag(a, cmd)
	return cmd
}

func runHostList(a *app.App) error {
	hosts, err := a.Hosts()
	if err != nil {
		return err
	}
	tab := ui.NewTable("HOST", "ADDRESS", "SSH", "USER", "THUMBPRINT")
	for _, h := range hosts {
		if a.UI.JSON {
			if err := a.UI.Object(hostLineOf(h)); err != nil {
				return err
			}
			continue
		}
		tab.Row(h.Name, h.Address, h.SSH, h.User, h.Thumbprint)
	}
	if tab.Len() > 0 {
		a.UI.Print(tab)
	} else if len(hosts) == 0 {
		a.UI.Infof("No hosts yet; next: hikae host add NAME --address ADDRESS --user USER --password-file FILE")
	}
	return nil
}

func newHostRemove(a *app.App) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "remove a host from the configuration",
		Long: `Cuts the host's block out of the configuration file. Its VMs' generations stay
in the repository.` + exitCodes(exitNotFound),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeHost(a),
		RunE: func(_ *cobra.Command, args []string) error {
			return runHostRemove(a, args[0])
		},
	}
}

func runHostRemove(a *app.App, name string) error {
	path, err := a.ConfigPath()
	if err != nil {
		return err
	}
	if _, err := a.Host(name); err != nil {
		return err
	}
	found, err := config.RemoveHost(path, name)
	if err != nil {
		return err
	}
	if !found {
		return errors.New("the configuration changed meanwhile: there is no host " + name + " any more")
	}
	a.UI.Printf("host %s removed from %s\n", name, path)
	return nil
}
