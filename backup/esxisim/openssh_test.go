package esxisim

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// openSSH runs OpenSSH's own client, which asks a program for the password.
type openSSH struct {
	t    *testing.T
	path string
	args []string
	env  []string
}

func newOpenSSH(t *testing.T, h *Host) *openSSH {
	t.Helper()
	path, scan := judge(t, "ssh"), judge(t, "ssh-keyscan")
	dir := t.TempDir()
	host, port, err := net.SplitHostPort(h.SSHAddress())
	must(t, err)
	ask := filepath.Join(dir, "askpass")
	must(t, os.WriteFile(ask, []byte("#!/bin/sh\ncat '"+filepath.Join(dir, "password")+"'\n"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "password"), []byte(h.Password()+"\n"), 0o600))
	keys, err := exec.CommandContext(t.Context(), scan, "-p", port, host).Output()
	must(t, err)
	known := filepath.Join(dir, "known_hosts")
	must(t, os.WriteFile(known, keys, 0o600))
	keygen := judge(t, "ssh-keygen")
	prints, err := exec.CommandContext(t.Context(), keygen, "-l", "-f", known).Output()
	must(t, err)
	if !strings.Contains(string(prints), h.SSHFingerprint()) {
		t.Errorf("ssh-keyscan's keys\n%slack %s", prints, h.SSHFingerprint())
	}
	return &openSSH{
		t: t, path: path,
		args: []string{"-F", "none", "-p", port, "-o", "UserKnownHostsFile=" + known, "-o", "StrictHostKeyChecking=yes", "-o", "NumberOfPasswordPrompts=1", "-o", "LogLevel=ERROR", h.User() + "@" + host},
		env:  append(os.Environ(), "SSH_ASKPASS="+ask, "SSH_ASKPASS_REQUIRE=force", "DISPLAY=none"),
	}
}

func (o *openSSH) run(stdin string, command ...string) (out, errs string, status int) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, o.path, append(o.args, command...)...)
	var so, se bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = o.env, strings.NewReader(stdin), &so, &se
	_ = cmd.Run() // its status tells
	return so.String(), se.String(), cmd.ProcessState.ExitCode()
}

// TestOpenSSHRunsTheHost: what an operator's client and an operator's scripts do.
func TestOpenSSHRunsTheHost(t *testing.T) {
	for _, edition := range Editions() {
		h := sshHost(t, Options{Edition: edition, Free: true})
		must(t, h.ImportVM(t.Context(), "web 01", []string{image(t, 8*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
		o := newOpenSSH(t, h)
		for _, step := range []struct {
			command, stdin, out, errs string
			status                    int
		}{
			{command: "vmware -v", out: h.edition.full()},
			{command: "esxcli system version get", out: "   Build: Releasebuild-" + h.edition.build},
			{command: "vim-cmd vmsvc/getallvms", out: "[datastore1] web 01/web 01.vmx"},
			{command: "vim-cmd vimsvc/license --show", out: "name: vSphere " + edition[:1] + " Hypervisor"},
			{command: "vim-cmd vmsvc/power.getstate 1", out: "Retrieved runtime info\nPowered on\n"},
			{command: "command -v dd", errs: "sh: command: not found", status: 127},
			{command: "nosuch --version", errs: "sh: nosuch: not found", status: 127},
			{command: "grep ^PasswordAuth /etc/ssh/sshd_config", out: "PasswordAuthentication no\n"},
			{command: "exit 42", status: 42},
			{command: "which dd vim-cmd", out: "/bin/dd\n/bin/vim-cmd\n"},
			{command: "sh -s one 'two  three'", stdin: "echo \"[$2]\"; cat\nthe rest\n", out: "[two  three]\nthe rest\n"},
			{command: "", stdin: "cd /vmfs/volumes/datastore1\nfor f in */*.vmx; do\n  echo \"$f\"\ndone\nexit 3\n", out: "web 01/web 01.vmx\n", status: 3},
			{command: "scp -f x", errs: "not found", status: 127},
			{command: "dd if='/vmfs/volumes/datastore1/web 01/web 01-flat.vmdk' bs=1M count=1 of=/dev/null", errs: "Device or resource busy", status: 1},
		} {
			if edition > "6.5" && edition < "8.0" && step.stdin == "" && step.command != "vmware -v" {
				continue // a login costs time: the editions between do less
			}
			args := []string{step.command}
			if step.command == "" {
				args = []string{"-T"}
			}
			out, errs, status := o.run(step.stdin, args...)
			if status != step.status || !strings.Contains(out, step.out) || !strings.Contains(errs, step.errs) {
				t.Errorf("%s: %q: status %d\n%s%s", edition, step.command, status, out, errs)
			}
		}
		must(t, h.Snapshot("web 01", "mine"))
		out, _, status := o.run("", "dd if='/vmfs/volumes/datastore1/web 01/web 01-flat.vmdk' bs=1M")
		if status != 0 || out != string(disk(t, h, "web 01", 0)) {
			t.Errorf("%s: the frozen disk: status %d, %d bytes", edition, status, len(out))
		}
		if _, errs, status := o.run("", "-s", "sftp"); status == 0 {
			t.Errorf("there is SFTP: %s", errs)
		}
	}
}

// TestOpenSSHRefusesAnotherHost: the pin is the host's, not the address's.
func TestOpenSSHRefusesAnotherHost(t *testing.T) {
	h := sshHost(t, Options{})
	o := newOpenSSH(t, h)
	address := h.SSHAddress()
	must(t, h.Close())
	other := sshHost(t, Options{SSH: &SSHOptions{Listen: address}})
	if _, errs, status := o.run("", "true"); status != 255 || !strings.Contains(errs, "verification failed") {
		t.Errorf("%s: %d %s", fmt.Sprint(other.SSHFingerprint()), status, errs)
	}
}
