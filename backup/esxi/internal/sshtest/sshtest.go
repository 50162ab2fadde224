// Package sshtest is a small SSH server for tests: it takes connections on the
// loopback interface and hands every command line to a function.
package sshtest

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/crypto/ssh"
)

// Call is one command.
type Call struct {
	Line           string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Gone           <-chan struct{} // closed when the client ends the session
}

// Exec runs one command and returns its exit status. A status below zero closes
// the session without one.
type Exec func(*Call) int

// Options of a Server; the zero value takes user root with password secret by
// keyboard-interactive alone, as ESXi does.
type Options struct {
	Password    string // "" is secret
	Key         ssh.PublicKey
	PasswordToo bool // offers the method "password" as well
	TwoKeys     bool // has an ECDSA host key beside the Ed25519 one
	MaxSessions int  // per connection; 0 is 10
	Ciphers     []string
	Deaf        bool // does not answer global requests
}

// Server is a running server.
type Server struct {
	o        Options
	exec     Exec
	listener net.Listener
	config   *ssh.ServerConfig
	signers  []ssh.Signer

	Logins   atomic.Int32 // passwords and signatures that were judged
	Accepted atomic.Int32 // TCP connections
	Commands atomic.Int32

	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	lines   []string
	running sync.WaitGroup
}

// Start serves until Close.
func Start(o Options, exec Exec) (*Server, error) {
	if o.Password == "" {
		o.Password = "secret"
	}
	if o.MaxSessions == 0 {
		o.MaxSessions = 10
	}
	s := &Server{o: o, exec: exec, conns: map[net.Conn]struct{}{}}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	keys := []any{ed}
	if o.TwoKeys {
		ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		keys = append(keys, ec)
	}
	s.config = &ssh.ServerConfig{
		Config: ssh.Config{Ciphers: o.Ciphers}, MaxAuthTries: 10,
		KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
			answers, err := ask("", "", []string{"Password: "}, []bool{false})
			if err != nil || len(answers) != 1 {
				return nil, errors.New("no answer")
			}
			return nil, s.check(answers[0])
		},
	}
	if o.PasswordToo {
		s.config.PasswordCallback = func(_ ssh.ConnMetadata, pw []byte) (*ssh.Permissions, error) {
			return nil, s.check(string(pw))
		}
	}
	if o.Key != nil {
		s.config.PublicKeyCallback = func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if string(key.Marshal()) != string(o.Key.Marshal()) {
				return nil, errors.New("unknown key")
			}
			return nil, nil
		}
	}
	for _, k := range keys {
		signer, err := ssh.NewSignerFromKey(k)
		if err != nil {
			return nil, err
		}
		s.signers = append(s.signers, signer)
		s.config.AddHostKey(signer)
	}
	if s.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	s.running.Go(s.accept)
	return s, nil
}

func (s *Server) check(password string) error {
	s.Logins.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if password != s.o.Password {
		return errors.New("wrong password")
	}
	return nil
}

// SetPassword changes the password for later logins.
func (s *Server) SetPassword(p string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.o.Password = p
}

// Address is host:port.
func (s *Server) Address() string { return s.listener.Addr().String() }

// Fingerprints of the host keys.
func (s *Server) Fingerprints() (all []string) {
	for _, k := range s.signers {
		all = append(all, ssh.FingerprintSHA256(k.PublicKey()))
	}
	return all
}

// Lines are the command lines so far.
func (s *Server) Lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.lines...)
}

// Cut closes every connection, as a failing network does.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
}

// Close stops serving and waits for all commands.
func (s *Server) Close() {
	_ = s.listener.Close()
	s.Cut()
	s.running.Wait()
}

func (s *Server) accept() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.Accepted.Add(1)
		s.mu.Lock()
		s.conns[c] = struct{}{}
		s.mu.Unlock()
		s.running.Go(func() {
			s.serve(c)
			_ = c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		})
	}
}

func (s *Server) serve(c net.Conn) {
	conn, channels, requests, err := ssh.NewServerConn(c, s.config)
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	s.running.Go(func() {
		for r := range requests {
			if r.WantReply && !s.o.Deaf {
				r.Reply(false, nil) //nolint:errcheck // a client that is gone needs none
			}
		}
	})
	var open atomic.Int32
	for ch := range channels {
		if ch.ChannelType() != "session" || int(open.Add(1)) > s.o.MaxSessions {
			open.Add(-1)
			ch.Reject(ssh.ResourceShortage, "open failed") //nolint:errcheck // a client that is gone needs none
			continue
		}
		c, reqs, err := ch.Accept()
		if err != nil {
			continue
		}
		s.running.Go(func() {
			defer open.Add(-1)
			s.session(c, reqs)
		})
	}
}

func (s *Server) session(c ssh.Channel, reqs <-chan *ssh.Request) {
	defer func() { _ = c.Close() }()
	for r := range reqs {
		if r.Type != "exec" || len(r.Payload) < 4 || int(binary.BigEndian.Uint32(r.Payload)) != len(r.Payload)-4 {
			r.Reply(false, nil) //nolint:errcheck // a client that is gone needs none
			continue
		}
		r.Reply(true, nil) //nolint:errcheck // a client that is gone needs none
		line := string(r.Payload[4:])
		s.Commands.Add(1)
		s.mu.Lock()
		s.lines = append(s.lines, line)
		s.mu.Unlock()
		gone := make(chan struct{})
		s.running.Go(func() {
			defer close(gone)
			for r := range reqs {
				r.Reply(false, nil) //nolint:errcheck // as above
			}
		})
		status := s.exec(&Call{Line: line, Stdin: c, Stdout: c, Stderr: c.Stderr(), Gone: gone})
		if status >= 0 {
			c.SendRequest("exit-status", false, binary.BigEndian.AppendUint32(nil, uint32(status))) //nolint:errcheck // as above
		}
		return
	}
}
