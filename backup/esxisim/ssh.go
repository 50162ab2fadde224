package esxisim

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"hikae/backup/esxisim/internal/hv"
)

// The SSH server is as narrow as ESXi's: keyboard-interactive unless options
// open more, AES only, few sessions a connection, no SFTP subsystem and no scp
// (its binary is not among the tools; a client's "scp" finds no such command).

// sshd is the host's SSH server.
type sshd struct {
	h        *Host
	o        SSHOptions
	listener net.Listener
	config   *ssh.ServerConfig
	pin      string
	way      way

	mu    sync.Mutex
	conns map[*sshConn]bool
}

var sshCiphers = []string{"aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr"}

// defaultSessions a connection, as sshd has it.
const defaultSessions = 10

// SSHOptions of the SSH server. The zero value is that of a fresh host.
type SSHOptions struct {
	// Listen is the address to serve on; "" is "127.0.0.1:0".
	Listen string
	// Password allows the method "password" beside keyboard-interactive.
	Password bool
	// AuthorizedKeys allows public keys, in the format of
	// /etc/ssh/keys-root/authorized_keys.
	AuthorizedKeys []byte
	// HostKey is the host's private key as PEM; nil is one made at the first
	// start over the directory and kept there.
	HostKey []byte
	// MaxConnections is how many connections are served at once; one more is
	// closed before it says anything. 0 is 20.
	MaxConnections int
	// MaxSessions is how many sessions one connection may have open; 0 is 10, as
	// sshd has it.
	MaxSessions int
	// IdleTimeout ends a connection that runs nothing for so long; 0 is 15
	// minutes.
	IdleTimeout time.Duration
}

func (h *Host) startSSH() (err error) {
	o := *h.o.SSH
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	if o.MaxConnections <= 0 {
		o.MaxConnections = 20
	}
	if o.MaxSessions <= 0 {
		o.MaxSessions = defaultSessions
	}
	if o.IdleTimeout <= 0 {
		o.IdleTimeout = 15 * time.Minute
	}
	s := &sshd{h: h, o: o, conns: map[*sshConn]bool{}}
	signers, err := s.hostKeys()
	if err != nil {
		return fmt.Errorf("ssh host key: %w", err)
	}
	if err := s.configure(signers); err != nil {
		return err
	}
	if h.console, err = newConsole(h); err != nil {
		return err
	}
	s.pin = ssh.FingerprintSHA256(signers[0].PublicKey())
	if s.listener, err = net.Listen("tcp", o.Listen); err != nil {
		return err
	}
	h.ssh = s
	h.running.Go(s.accept)
	return nil
}

// hostKeys are the host's keys, the pinned one first.
func (s *sshd) hostKeys() ([]ssh.Signer, error) {
	text := s.o.HostKey
	if text == nil {
		name := s.h.hv.Private("ssh_host_keys.pem")
		var err error
		text, err = os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			if text, err = newHostKeys(s.h.edition); err == nil {
				err = hv.WriteFile(name, text)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	var signers []ssh.Signer
	for len(text) > 0 {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		signer, err := ssh.ParsePrivateKey(pem.EncodeToMemory(block))
		if err != nil {
			return nil, err
		}
		signers = append(signers, signer)
		text = rest
	}
	if len(signers) == 0 {
		return nil, errors.New("there is no private key in the PEM text")
	}
	return signers, nil
}

// newHostKeys makes what an installation makes, of which the first is pinned:
// RSA on 6.x; ECDSA on newer ones, which have RSA too, but no client asks for it.
func newHostKeys(e edition) ([]byte, error) {
	if e.name < "7.0" {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func (s *sshd) configure(signers []ssh.Signer) error {
	c := &ssh.ServerConfig{
		Config: ssh.Config{
			Ciphers: sshCiphers,
			MACs:    []string{"hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512"},
		},
		MaxAuthTries:  6,
		ServerVersion: "SSH-2.0-" + s.h.edition.ssh,
	}
	c.KeyboardInteractiveCallback = func(conn ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
		answers, err := ask("", "", []string{"Password: "}, []bool{false})
		if err != nil {
			return nil, err
		}
		if len(answers) != 1 {
			return nil, errors.New("one question, one answer")
		}
		return nil, s.login(conn, answers[0])
	}
	if s.o.Password {
		c.PasswordCallback = func(conn ssh.ConnMetadata, password []byte) (*ssh.Permissions, error) {
			return nil, s.login(conn, string(password))
		}
	}
	if s.o.AuthorizedKeys != nil {
		keys, err := authorizedKeys(s.o.AuthorizedKeys)
		if err != nil {
			return err
		}
		c.PublicKeyCallback = func(conn ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if conn.User() != s.h.o.User || !slices.Contains(keys, string(key.Marshal())) {
				return nil, errors.New("this key is not authorized")
			}
			return nil, nil
		}
	}
	for _, signer := range signers {
		c.AddHostKey(signer)
	}
	s.config = c
	return nil
}

func authorizedKeys(text []byte) (keys []string, err error) {
	for len(strings.TrimSpace(string(text))) > 0 {
		key, _, _, rest, err := ssh.ParseAuthorizedKey(text)
		if err != nil {
			return nil, fmt.Errorf("authorized keys: %w", err)
		}
		keys, text = append(keys, string(key.Marshal())), rest
	}
	return keys, nil
}

// login compares a password, with the count of failures that SOAP has too: the
// account is the same.
func (s *sshd) login(conn ssh.ConnMetadata, password string) error {
	if s.h.sessions.check(conn.User(), password, s.h.o.User, s.h.o.Password) {
		return nil
	}
	s.h.log.Info("ssh login refused", "user", conn.User(), "from", conn.RemoteAddr())
	return errors.New("permission denied")
}

func (s *sshd) accept() {
	for {
		nc, err := s.listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.h.log.Error("ssh: accept", "err", err)
			}
			return
		}
		if _, hit := s.h.faults.ssh(FaultSSHRefuse, ""); hit {
			s.h.log.Info("injected fault: ssh connection refused")
			nc.Close() //nolint:errcheck // that is the point
			continue
		}
		c := &sshConn{Conn: nc, s: s, gone: make(chan struct{})}
		if !s.add(c) {
			nc.Close() //nolint:errcheck // that is the point
			continue
		}
		s.h.running.Go(func() {
			defer s.remove(c)
			s.serve(c)
		})
	}
}

func (s *sshd) add(c *sshConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= s.o.MaxConnections || s.h.ctx.Err() != nil {
		return false
	}
	s.conns[c] = true
	return true
}

func (s *sshd) remove(c *sshConn) {
	c.Close() //nolint:errcheck // it is over
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// close stops serving; what runs notices by its connection's end.
func (s *sshd) close() error {
	err := s.listener.Close()
	s.cut()
	return err
}

// cut ends every connection at once.
func (s *sshd) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close() //nolint:errcheck // that is the point
	}
}

// sshConn is a connection that counts what crosses the wire, encryption and
// framing included: an SSH client cannot save those.
type sshConn struct {
	net.Conn
	s     *sshd
	once  sync.Once
	gone  chan struct{}
	busy  atomic.Int64 // sessions that run something
	alive atomic.Int64 // unix nanoseconds of the last session's end
}

func (c *sshConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.s.way.in.Add(int64(n))
	return n, err
}

func (c *sshConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.s.way.out.Add(int64(n))
	return n, err
}

func (c *sshConn) Close() error {
	c.once.Do(func() { close(c.gone) })
	return c.Conn.Close()
}

const sshLoginTime = 2 * time.Minute

func (s *sshd) serve(c *sshConn) {
	// The host's clock may be a test's: how long a client may take to log in is
	// real time.
	late := time.AfterFunc(sshLoginTime, func() { c.Close() }) //nolint:errcheck // that is the point
	conn, channels, requests, err := ssh.NewServerConn(c, s.config)
	if late.Stop(); err != nil {
		s.h.log.Debug("ssh: handshake", "err", err)
		return
	}
	s.h.running.Go(func() { ssh.DiscardRequests(requests) })
	s.h.running.Go(func() { s.idle(c) })
	var sessions sync.WaitGroup
	var open atomic.Int64
	for nc := range channels {
		if nc.ChannelType() != "session" {
			nc.Reject(ssh.Prohibited, "open failed") //nolint:errcheck // the client hears of it or is gone
			continue
		}
		if open.Load() >= int64(s.o.MaxSessions) {
			nc.Reject(ssh.ConnectionFailed, "open failed") //nolint:errcheck // as above
			continue
		}
		open.Add(1)
		c.busy.Add(1)
		sessions.Go(func() {
			defer func() {
				c.alive.Store(s.h.o.Clock().UnixNano())
				c.busy.Add(-1)
				open.Add(-1)
			}()
			s.session(c, nc)
		})
	}
	conn.Close() //nolint:errcheck // it is over
	s.remove(c)  // what it started may go on
	sessions.Wait()
}

// idle ends a connection that runs nothing for too long.
func (s *sshd) idle(c *sshConn) {
	c.alive.Store(s.h.o.Clock().UnixNano())
	t := time.NewTimer(s.o.IdleTimeout)
	defer t.Stop()
	for {
		select {
		case <-c.gone:
			return
		case <-t.C:
		}
		left := s.o.IdleTimeout
		if c.busy.Load() == 0 {
			left -= s.h.o.Clock().Sub(time.Unix(0, c.alive.Load()))
		}
		if left <= 0 {
			s.h.log.Info("ssh: idle connection closed", "from", c.RemoteAddr())
			c.Close() //nolint:errcheck // that is the point
			return
		}
		t.Reset(left)
	}
}

// SSHAddress is where the SSH server listens; "" without one.
func (h *Host) SSHAddress() string {
	if h.ssh == nil {
		return ""
	}
	return h.ssh.listener.Addr().String()
}

// SSHFingerprint is the SSH host key's as OpenSSH shows it: "SHA256:…". It is
// the same for every host started over the same directory.
func (h *Host) SSHFingerprint() string {
	if h.ssh == nil {
		return ""
	}
	return h.ssh.pin
}
