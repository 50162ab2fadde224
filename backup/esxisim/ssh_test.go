package esxisim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// dial logs in as a client that answers each question with the password.
func dial(t *testing.T, h *Host, auth ...ssh.AuthMethod) *ssh.Client {
	t.Helper()
	c, err := tryDial(h, auth...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func answering(password string) ssh.AuthMethod {
	return ssh.KeyboardInteractive(func(_, _ string, questions []string, _ []bool) ([]string, error) {
		var answers []string
		for range questions {
			answers = append(answers, password)
		}
		return answers, nil
	})
}

func tryDial(h *Host, auth ...ssh.AuthMethod) (*ssh.Client, error) {
	if auth == nil {
		auth = []ssh.AuthMethod{answering(h.Password())}
	}
	return ssh.Dial("tcp", h.SSHAddress(), &ssh.ClientConfig{
		User: h.User(), Auth: auth,
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if got := ssh.FingerprintSHA256(key); got != h.SSHFingerprint() {
				return fmt.Errorf("host key %s is not %s", got, h.SSHFingerprint())
			}
			return nil
		},
	})
}

// sh runs a command line and returns what it printed and its status.
func sh(t *testing.T, c *ssh.Client, line string, in ...string) (out, errs string, status int) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var o, e bytes.Buffer
	s.Stdout, s.Stderr, s.Stdin = &o, &e, strings.NewReader(strings.Join(in, ""))
	err = s.Run(line)
	var exit *ssh.ExitError
	switch {
	case errors.As(err, &exit):
		status = exit.ExitStatus()
	case err != nil:
		status = -1
	}
	return o.String(), e.String(), status
}

// want runs a command line that must succeed and print nothing on standard
// error.
func want(t *testing.T, c *ssh.Client, line string, in ...string) string {
	t.Helper()
	out, errs, status := sh(t, c, line, in...)
	if status != 0 || errs != "" {
		t.Errorf("%s: status %d\n%s%s", line, status, out, errs)
	}
	return out
}

func sshHost(t *testing.T, o Options) *Host {
	t.Helper()
	if o.SSH == nil {
		o.SSH = &SSHOptions{}
	}
	return start(t, o)
}

func TestSSHSnapshotAndRead(t *testing.T) {
	for _, edition := range Editions() {
		t.Run(edition, func(t *testing.T) {
			h := sshHost(t, Options{Edition: edition, Free: true})
			must(t, h.ImportVM(t.Context(), "a'; rm -rf x; '", []string{image(t, 8*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
			c := dial(t, h)
			if out := want(t, c, "vim-cmd vmsvc/getallvms"); !strings.Contains(out, `1      a'; rm -rf x; '   [datastore1] a'; rm -rf x; '/a'; rm -rf x; '.vmx   debian11_64Guest   vmx-`) {
				t.Error(out)
			}
			want(t, c, `vim-cmd vmsvc/snapshot.create 1 "one" "two words" 0 0`)
			out := ""
			for range 500 {
				if out = want(t, c, "vim-cmd vmsvc/snapshot.get 1"); strings.Count(out, "\n") > 1 {
					break
				}
			}
			if !strings.Contains(out, "|-ROOT\n--Snapshot Name        : one\n--Snapshot Id        : 1\n--Snapshot Desciption  : two words\n") {
				t.Error(out)
			}
			frozen := disk(t, h, "a'; rm -rf x; '", 0)
			must(t, h.WriteAt("a'; rm -rf x; '", 0, noise(4096, 3), 0))
			dir := `'/vmfs/volumes/datastore1/a'\''; rm -rf x; '\'''`
			got, _, status := sh(t, c, `cd `+dir+` && dd if="a'; rm -rf x; '-flat.vmdk" bs=1M skip=1 count=3`)
			if status != 0 || got != string(frozen[mib:4*mib]) {
				t.Errorf("dd: status %d, %d bytes", status, len(got))
			}
			_, errs, status := sh(t, c, `cat `+dir+`/*-000001-*sesparse.vmdk`)
			if status != 1 || !strings.Contains(errs, "Device or resource busy") {
				t.Errorf("the running link: %d, %s", status, errs)
			}
			want(t, c, "vim-cmd vmsvc/snapshot.remove 1 1")
			if out := want(t, c, "vim-cmd vmsvc/snapshot.get 1"); out != "Get Snapshot:\n" {
				t.Error(out)
			}
			t.Log(want(t, c, "vim-cmd vmsvc/device.getdevices 1; vim-cmd vmsvc/get.tasklist 1; ls -la /vmfs/volumes/ "+dir+"; df -h; uname -a; vmware -vl"))
			out, _, status = sh(t, c, "vim-cmd vmsvc/get.summary 77")
			t.Log(out, status)
		})
	}
	_ = io.Discard
}
