package esxisim

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

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

// testClock stands still until it is told.
type testClock struct{ ns atomic.Int64 }

func newTestClock() *testClock {
	c := &testClock{}
	c.ns.Store(time.Now().UnixNano())
	return c
}

func (c *testClock) now() time.Time { return time.Unix(0, c.ns.Load()) }

func (c *testClock) add(d time.Duration) { c.ns.Add(int64(d)) }

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
			if out := want(t, c, "vim-cmd vmsvc/get.tasklist 1"); !strings.HasPrefix(out, "(ManagedObjectReference) [\n   'vim.Task:haTask-1-vim.VirtualMachine.createSnapshot-1'") {
				t.Error(out)
			}
			out, _, status = sh(t, c, "vim-cmd vmsvc/get.summary 77")
			if want, _ := findEdition(edition); status != want.shell.faultStatus || !strings.HasPrefix(out, "(vim.fault.NotFound) {\n") ||
				!strings.Contains(out, `   msg = "Unable to find a VM corresponding to "77""`) {
				t.Errorf("status %d: %s", status, out)
			}
		})
	}
}

func TestSSHLogins(t *testing.T) {
	_, private, err := ed25519.GenerateKey(nil)
	must(t, err)
	signer, err := ssh.NewSignerFromKey(private)
	must(t, err)
	clock := newTestClock()
	o := Options{Password: "right", Clock: clock.now, Dir: t.TempDir(), SSH: &SSHOptions{AuthorizedKeys: ssh.MarshalAuthorizedKey(signer.PublicKey())}}
	h := start(t, o)
	pin := h.SSHFingerprint()
	if _, err := tryDial(h, ssh.Password("right")); err == nil {
		t.Error("the method password is taken")
	}
	c := dial(t, h, ssh.PublicKeys(signer))
	if out := want(t, c, "cat /etc/ssh/keys-root/authorized_keys"); out != string(o.SSH.AuthorizedKeys) {
		t.Error(out)
	}
	c.Close()
	// The count of wrong passwords is the account's: SOAP and SSH share it.
	for range 3 {
		if _, err := tryDial(h, answering("wrong")); err == nil {
			t.Error("a wrong password is taken")
		}
	}
	for range 2 {
		h.sessions.check(h.User(), "wrong", h.User(), h.Password())
	}
	if _, err := tryDial(h); err == nil {
		t.Error("the account is not locked")
	}
	clock.add(lockFor + time.Second)
	dial(t, h).Close()
	if _, err := ssh.Dial("tcp", h.SSHAddress(), &ssh.ClientConfig{
		Config: ssh.Config{Ciphers: []string{"chacha20-poly1305@openssh.com"}}, User: "root", Auth: []ssh.AuthMethod{answering("right")},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	}); err == nil {
		t.Error("a cipher other than AES is taken")
	}
	must(t, h.Close())
	o.SSH = &SSHOptions{Password: true}
	h = start(t, o)
	if h.SSHFingerprint() != pin {
		t.Error("the host key changed with a restart")
	}
	dial(t, h, ssh.Password("right"))
	if _, err := tryDial(h, ssh.PublicKeys(signer)); err == nil {
		t.Error("a key is taken that nobody authorized")
	}
}

func TestSSHLimits(t *testing.T) {
	h := sshHost(t, Options{SSH: &SSHOptions{MaxConnections: 2, MaxSessions: 3, IdleTimeout: 50 * time.Millisecond}})
	c := dial(t, h)
	var open []*ssh.Session
	for range 3 {
		s, err := c.NewSession()
		must(t, err)
		must(t, s.Start("sleep 1000"))
		open = append(open, s)
	}
	if _, err := c.NewSession(); err == nil {
		t.Error("a fourth session is open")
	}
	second := dial(t, h)
	if _, err := tryDial(h); err == nil {
		t.Error("a third connection is open")
	}
	second.Wait() // it runs nothing and is closed
	for _, s := range open {
		s.Close()
	}
	for { // the client hears of the end before the host has tidied up
		third, err := tryDial(h)
		if err == nil {
			third.Close()
			break
		}
	}
	c.Close()
}

func TestSSHFaults(t *testing.T) {
	h := sshHost(t, Options{Edition: "7.0"})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 8*mib, 1)}, VMOptions{Thin: true}))
	inject := func(f Fault) {
		t.Helper()
		_, err := h.Inject(f)
		must(t, err)
	}
	read := "dd if=/vmfs/volumes/datastore1/vm/vm-flat.vmdk bs=1M"
	c := dial(t, h)
	inject(Fault{Kind: FaultSSHDrop, After: 3 * mib, Command: "vm-flat"})
	if out, _, status := sh(t, c, read); status != -1 || len(out) > 3*mib || len(out) < 3*mib-256<<10 {
		t.Errorf("dropped: status %d, %d bytes", status, len(out))
	}
	inject(Fault{Kind: FaultSSHRefuse})
	if _, err := tryDial(h); err == nil {
		t.Error("not refused")
	}
	c = dial(t, h)
	inject(Fault{Kind: FaultSSHDrop, After: mib})
	if _, _, status := sh(t, c, "cat >/vmfs/volumes/datastore1/vm/up", string(noise(4*mib, 1))); status != -1 {
		t.Error("an upload is not dropped:", status)
	}
	c = dial(t, h)
	inject(Fault{Kind: FaultSSHCommand, Command: "snapshot.create 1", Fault: "TaskInProgress"})
	if out, _, status := sh(t, c, "vim-cmd vmsvc/snapshot.create 1 a b 0 0"); status != 255 || !strings.HasPrefix(out, "(vim.fault.TaskInProgress) {") {
		t.Errorf("%d: %s", status, out)
	}
	inject(Fault{Kind: FaultSSHCommand, Command: "dd ", Message: "dd: out of luck", Status: 3, Count: 2})
	for range 2 {
		if _, errs, status := sh(t, c, read); status != 3 || errs != "dd: out of luck\n" {
			t.Errorf("%d: %s", status, errs)
		}
	}
	inject(Fault{Kind: FaultSSHCommand, Command: "snapshot.create", Lost: true})
	if _, _, status := sh(t, c, "vim-cmd vmsvc/snapshot.create 1 lost b 0 0"); status != -1 {
		t.Error("the answer came:", status)
	}
	if names, err := h.Snapshots("vm"); err != nil || fmt.Sprint(names) != "[lost]" {
		t.Error(names, err)
	}
	c = dial(t, h)
	inject(Fault{Kind: FaultSSHHang, Command: "uname"})
	s, err := c.NewSession()
	must(t, err)
	must(t, s.Start("uname"))
	done := make(chan error)
	go func() { done <- s.Wait() }()
	select {
	case err := <-done:
		t.Error("it answered", err)
	case <-time.After(20 * time.Millisecond):
	}
	c.Close()
	<-done
	c = dial(t, h)
	inject(Fault{Kind: FaultSpace, Free: 2 * mib})
	_, errs, status := sh(t, c, "cd /vmfs/volumes/datastore1; dd if=/dev/zero of=big bs=1M count=9; echo $?; vmkfstools -c 64m -d zeroedthick vm/x.vmdk; echo $?")
	if status != 0 || !strings.Contains(errs, "dd: error writing 'big': No space left on device") || !strings.Contains(errs, "2+0 records out") ||
		!strings.Contains(errs, "Failed to create virtual disk: There is not enough space on the file system for the selected operation (13).") {
		t.Errorf("%d: %s", status, errs)
	}
	if _, err := start(t, Options{}).Inject(Fault{Kind: FaultSSHHang}); err == nil {
		t.Error("a host without SSH takes a fault of it")
	}
}

func TestSSHCountsTheWire(t *testing.T) {
	h := sshHost(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 8*mib, 1)}, VMOptions{}))
	c := dial(t, h)
	want(t, c, "true")
	h.ResetStats()
	want(t, c, "cat /vmfs/volumes/datastore1/vm/vm-flat.vmdk")
	want(t, c, "cat >/dev/null", string(noise(4*mib, 2)))
	s := h.Stats().SSH
	if s.Requests != 2 || s.BytesOut < 8*mib || s.BytesOut > 8*mib*102/100 || s.BytesIn < 4*mib || s.BytesIn > 4*mib*102/100 {
		t.Errorf("%+v", s)
	}
}
