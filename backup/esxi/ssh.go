package esxi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"syscall"

	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/types"
	"golang.org/x/crypto/ssh"

	"hikae/backup/esxi/internal/shell"
	"hikae/backup/esxi/internal/sshx"
	"hikae/backup/esxi/internal/vimcmd"
)

const sshPort = "22"

// Key is what a host's SSH service shows before anything is believed of it.
type Key struct {
	Fingerprint string // "SHA256:…", as ssh-keygen -l prints it
	Type        string // e.g. "ssh-ed25519"
}

// HostKey shows the SSH key at address (host or host:port, 22 unless given) by a
// key exchange alone: no name and no password is sent, and nothing is verified.
// It is what an operator compares with the host's own console before pinning it
// (ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub on the host). ErrUnreachable,
// and ErrSSHDisabled when nobody listens there.
func HostKey(ctx context.Context, address string) (Key, error) {
	addr, err := withPort(address, sshPort)
	if err != nil {
		return Key{}, err
	}
	fingerprint, kind, err := sshx.HostKey(ctx, addr, probeTimeout)
	if err == nil {
		return Key{fingerprint, kind}, nil
	}
	if ctx.Err() != nil {
		return Key{}, context.Cause(ctx)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return Key{}, errf(errors.Join(ErrUnreachable, ErrSSHDisabled), err, "%s takes no SSH connection: %s", addr, enableSSH)
	}
	return Key{}, errf(ErrUnreachable, err, "%s cannot be reached over SSH: %s", addr, root(err))
}

const enableSSH = "start the SSH service in the host's own interface (Host, Actions, Services, Enable Secure Shell)"

// shellConn is the way to the host's shell.
type shellConn struct {
	h      *Host
	client *sshx.Client
	addr   string
	user   string
}

func newShell(h *Host, c Config) (*shellConn, error) {
	o := *c.SSH
	if o.Address == "" {
		host, _, err := net.SplitHostPort(h.addr)
		if err != nil {
			return nil, err
		}
		o.Address = host
	}
	addr, err := withPort(o.Address, sshPort)
	if err != nil {
		return nil, err
	}
	if o.Fingerprint == "" {
		return nil, errf(ErrHostKey, nil, "%s (%s) has no SSH fingerprint configured: look at its key, compare it with the host's console, and pin it",
			h.name, addr)
	}
	if o.User == "" {
		o.User = c.User
	}
	if o.Password == nil && len(o.Key) == 0 {
		o.Password = c.Password
	}
	if o.User == "" || o.Password == nil && len(o.Key) == 0 {
		return nil, errf(ErrLogin, nil, "%s (%s) needs a user, and a password file or a private key, for SSH", h.name, addr)
	}
	signer, err := signer(o)
	if err != nil {
		return nil, errf(ErrLogin, err, "%s (%s): the private key for SSH cannot be used: %v", h.name, addr, err)
	}
	client, err := sshx.New(sshx.Config{
		Address: addr, User: o.User, Password: o.Password, Signer: signer, Fingerprint: o.Fingerprint, Logger: c.Logger,
		Dial: probeTimeout, Keepalive: h.t.stall / 3, Streams: h.t.inFlight,
	})
	if err != nil {
		return nil, errf(ErrHostKey, err, "%s (%s): %v", h.name, addr, err)
	}
	return &shellConn{h: h, client: client, addr: addr, user: o.User}, nil
}

func signer(o SSHConfig) (ssh.Signer, error) {
	if len(o.Key) == 0 {
		return nil, nil
	}
	s, err := ssh.ParsePrivateKey(o.Key)
	var locked *ssh.PassphraseMissingError
	if !errors.As(err, &locked) || o.Passphrase == nil {
		return s, err
	}
	pass, err := o.Passphrase()
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	return ssh.ParsePrivateKeyWithPassphrase(o.Key, []byte(pass))
}

// reply is what a command printed, and how it ended.
type reply struct {
	out, err string
	status   int
}

// text is what a person would read of it first.
func (r *reply) text() string {
	for _, s := range []string{r.err, r.out} {
		if s = strings.TrimSpace(s); s != "" {
			if i := strings.IndexAny(s, "\r\n"); i > 0 {
				s = s[:i]
			}
			return s[:min(len(s), 200)]
		}
	}
	return fmt.Sprintf("exit status %d", r.status)
}

// commandError is a command that failed on the host.
type commandError struct {
	program string
	reply   *reply
}

func (e *commandError) Error() string { return e.program + ": " + e.reply.text() }

// says tells whether the command's messages contain one of the texts.
func (e *commandError) says(texts ...string) bool {
	all := strings.ToLower(e.reply.err + "\n" + e.reply.out)
	for _, t := range texts {
		if strings.Contains(all, strings.ToLower(t)) {
			return true
		}
	}
	return false
}

// run runs one command line. What certainly did not begin is tried again with
// back-off, and what may have begun only if again says that it changes nothing,
// or nothing but what was asked when it happens twice. Otherwise its loss is
// *lost.
func (s *shellConn) run(ctx context.Context, again bool, cmd sshx.Command) (*reply, error) {
	for try := 1; ; try++ {
		res, err := s.client.Run(ctx, cmd)
		if err == nil {
			return &reply{string(res.Stdout), string(res.Stderr), res.Status}, nil
		}
		var broke *sshx.LostError
		safe := errors.Is(err, sshx.ErrBusy)
		if errors.As(err, &broke) {
			safe = !broke.Started || again
		}
		if ctx.Err() != nil || !safe || try >= s.h.t.tries || cmd.Stdin != nil || s.hopeless(err) {
			if broke != nil && broke.Started && !again {
				err = &lost{err}
			}
			return nil, err
		}
		s.h.log.Debug("SSH failed, trying again", "host", s.h.name, "try", try, "error", err)
		if err := sleep(ctx, jitter(s.h.t.pause, s.h.t.longest, try)); err != nil {
			return nil, err
		}
	}
}

// hopeless tells a service that is not there from one that is gone for a
// moment: before the first login, trying again only delays the message.
func (s *shellConn) hopeless(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) && !s.h.shellWorked()
}

// words runs a program with arguments; a status other than 0 is a
// *commandError.
func (s *shellConn) words(ctx context.Context, again bool, words ...string) (string, error) {
	line, err := shell.Command(words...)
	if err != nil {
		return "", err
	}
	r, err := s.run(ctx, again, sshx.Command{Line: line})
	if err != nil {
		return "", err
	}
	if r.status != 0 {
		return "", &commandError{words[0], r}
	}
	return r.out, nil
}

// vim runs vim-cmd. Its exit status is no guide and its output may hold text
// that VMs' owners wrote, so what it means is for the caller to find out.
func (s *shellConn) vim(ctx context.Context, again bool, words ...string) (*reply, error) {
	line, err := shell.Command(append([]string{"vim-cmd"}, words...)...)
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		r, err := s.ask(ctx, again, line)
		if err != nil {
			return nil, err
		}
		if r.status == 127 {
			return nil, errf(nil, &commandError{"vim-cmd", r}, "%s (%s) has no vim-cmd: it is no ESXi host", s.h.name, s.addr)
		}
		unbegun, unknown := stumbled(r)
		if !unbegun && !unknown {
			return r, nil
		}
		fail := &commandError{"vim-cmd", r}
		switch {
		case unknown && !again:
			return nil, &lost{fail}
		case try >= s.h.t.tries:
			return nil, errf(ErrBusy, fail, "%s: the host's management agent does not answer its own shell (%s); restart it (/etc/init.d/hostd restart)",
				s.h.name, r.text())
		}
		if err := sleep(ctx, jitter(s.h.t.pause, s.h.t.longest, try)); err != nil {
			return nil, err
		}
	}
}

// ask runs a line of vim-cmd: one that only looks within a limit, for the agent
// it talks to may hang.
func (s *shellConn) ask(ctx context.Context, again bool, line string) (*reply, error) {
	if !again {
		return s.run(ctx, false, sshx.Command{Line: line})
	}
	bounded, cancel := s.h.shellCall(ctx)
	defer cancel()
	r, err := s.run(bounded, true, sshx.Command{Line: line})
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return nil, errf(ErrBusy, err, "%s: the host's management agent does not answer its own shell within %s; restart it (/etc/init.d/hostd restart)",
			s.h.name, s.h.t.call)
	}
	return r, err
}

// stumbled tells whether vim-cmd did not get to the host's agent, which is worth
// another try, or died on the way, after which nobody knows.
func stumbled(r *reply) (unbegun, unknown bool) {
	for _, out := range []string{r.out, r.err} {
		out = strings.TrimSpace(out)
		if strings.HasPrefix(out, "Failed to login") || strings.HasPrefix(out, "Connect to localhost failed") {
			return true, false
		}
		if strings.HasPrefix(out, "terminate called") || strings.Contains(out, "std::bad_alloc") && r.status != 0 {
			unknown = true
		}
	}
	return false, unknown
}

// fault is the fault that an output reports, or whatever else says that the
// command failed; nil when nothing does.
func (r *reply) fault() error {
	for _, out := range []string{r.out, r.err} {
		if f := vimcmd.FindFault(out); f != nil {
			return asFault(f)
		}
	}
	if r.status != 0 {
		return &commandError{"vim-cmd", r}
	}
	return nil
}

// dump runs a vim-cmd that prints an object, and reads it.
func (s *shellConn) dump(ctx context.Context, words ...string) (vimcmd.Value, error) {
	r, err := s.vim(ctx, true, words...)
	if err != nil {
		return vimcmd.Value{}, err
	}
	// The object first: text in it may look like a fault.
	v, perr := vimcmd.ParseDump(r.out)
	if perr == nil && !strings.Contains(v.Type, ".fault.") {
		return v, nil
	}
	if err := r.fault(); err != nil {
		return vimcmd.Value{}, err
	}
	if perr == nil {
		perr = fmt.Errorf("it prints %s", v.Type)
	}
	return vimcmd.Value{}, fmt.Errorf("what vim-cmd %s prints cannot be read: %w", words[0], perr)
}

// asFault makes an error of the API's own types out of a printed fault, so that
// one explanation serves both ways.
func asFault(f *vimcmd.Fault) error {
	name := f.Type[strings.LastIndexByte(f.Type, '.')+1:]
	if name == "NotFound" && strings.Contains(f.Message, "Unable to find a VM") {
		name = "ManagedObjectNotFound" // what the API says of it
	}
	l := &types.LocalizedMethodFault{LocalizedMessage: f.Message}
	if l.LocalizedMessage == "" {
		l.LocalizedMessage = name
	}
	if typ, ok := types.TypeFunc()(name); ok {
		if fault, ok := reflect.New(typ).Interface().(types.BaseMethodFault); ok {
			l.Fault = fault
			return task.Error{LocalizedMethodFault: l}
		}
	}
	return fmt.Errorf("%s (%s)", l.LocalizedMessage, name)
}

// explainShell says what went wrong on the way to the shell or in it; nil for
// what is none of that.
func (h *Host) explainShell(what string, err error) error {
	if h.shell == nil {
		return nil
	}
	s := h.shell
	say := func(kind error, format string, args ...any) error {
		return errf(kind, err, "%s (%s): %s: "+format, append([]any{h.name, s.addr, what}, args...)...)
	}
	var key *sshx.HostKeyError
	var broke *sshx.LostError
	var failed *commandError
	switch {
	case errors.As(err, &key):
		return say(ErrHostKey, "the host shows SSH key %s but %s is pinned: either the host has a new key or something stands between; "+
			"compare with the host's console (ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub), and if it is right pin it", key.Got, key.Want)
	case errors.Is(err, sshx.ErrRefused):
		return say(ErrLogin, "SSH refuses the login of user %s: the name, password or key is wrong, or the account is locked; "+
			"it is not tried again because ESXi locks accounts after a few failures", s.user)
	case errors.Is(err, sshx.ErrBusy):
		return say(ErrBusy, "the host opens no further SSH session; try again when fewer programs use it")
	case errors.Is(err, sshx.ErrTooLong):
		return say(nil, "a command printed far more than it can have to say")
	case errors.As(err, &broke) && errors.Is(err, syscall.ECONNREFUSED):
		return say(errors.Join(ErrUnreachable, ErrSSHDisabled), "nobody takes SSH connections there%s: %s", h.needsShell(), enableSSH)
	case errors.As(err, &broke):
		return say(ErrUnreachable, "the host cannot be reached over SSH%s: %s", h.needsShell(), root(broke.Err))
	case errors.As(err, &failed):
		return h.explainCommand(what, failed)
	}
	return nil
}

// needsShell is why SSH is tried at all, where that is not obvious.
func (h *Host) needsShell() string {
	if h.session != nil {
		return " (which is needed because the licence forbids changes through the API)"
	}
	return ""
}

// explainCommand sorts what busybox, vmkfstools and the kernel below them say.
func (h *Host) explainCommand(what string, e *commandError) error {
	say := func(kind error, format string, args ...any) error {
		return errf(kind, e, "%s: %s: "+format, append([]any{h.name, what}, args...)...)
	}
	switch {
	case e.says("No space left on device", "not enough space", "Disk quota exceeded"):
		return say(ErrNoSpace, "the datastore is full (%s); free some room and run it again", e)
	case e.says("No such file or directory", "cannot find the file", "does not exist"):
		return say(ErrNotFound, "it is not there, or not any more (%s)", e)
	case e.says("File exists", "already exists"):
		return say(ErrExists, "it exists already (%s)", e)
	case e.says("Device or resource busy", "Failed to lock", "is locked", "Text file busy", "Resource temporarily unavailable"):
		return say(ErrLocked, "a file is locked by a running VM or another program (%s)", e)
	case e.says("Permission denied", "Operation not permitted", "Read-only file system"):
		return say(ErrDenied, "the host does not permit it to user %s (%s)", h.shell.user, e)
	}
	return say(nil, "%v", e)
}
