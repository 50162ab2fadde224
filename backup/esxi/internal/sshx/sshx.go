// Package sshx runs commands on one host over SSH.
//
// Promises:
//
//   - The host's key is compared with a pinned SHA-256 fingerprint in every
//     handshake, before user name or password are sent.
//   - A refused login is never tried again by the same Client: hosts lock
//     accounts after a few failures. Each login sends the password once, though a
//     host may offer two ways to send it.
//   - Commands that control the host share one connection; commands that move
//     data have a connection each, up to a bound.
//   - A connection whose other end is gone is noticed within two keepalive
//     intervals, and every command on it ends then.
//   - Whether a command that broke off may have begun is part of the error
//     (LostError). Run repeats none that may have.
//
// The package knows nothing of what the commands mean.
package sshx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// What can go wrong, besides LostError.
var (
	// ErrRefused: the host does not accept the user's key or password. Final for
	// the Client.
	ErrRefused = errors.New("login refused")
	ErrClosed  = errors.New("the connection was closed")
	// ErrTooLong: a command printed more than was allowed.
	ErrTooLong = errors.New("the output is longer than any that is expected")
	// ErrStalled: no byte moved for longer than the command's Stall.
	ErrStalled = errors.New("no byte came for too long")
	// ErrBusy: the host opens no further session.
	ErrBusy = errors.New("the host opens no further SSH session")
)

// HostKeyError is a host whose key is not the pinned one.
type HostKeyError struct {
	Got, Want string // fingerprints
}

func (e *HostKeyError) Error() string {
	return fmt.Sprintf("the host shows SSH key %s but %s is pinned", e.Got, e.Want)
}

// LostError is a command that ended without its exit status: the way to the
// host failed, or the caller's context ended.
type LostError struct {
	Err     error
	Started bool // it may have begun; otherwise it certainly has not
}

func (e *LostError) Error() string { return e.Err.Error() }
func (e *LostError) Unwrap() error { return e.Err }

// Config says how to reach a host. Address, User, Fingerprint and at least one
// of Password and Signer are required.
type Config struct {
	Address string // host:port
	User    string
	// Password is asked at every login; nil is none. It answers both password
	// and keyboard-interactive authentication.
	Password func() (string, error)
	// Signer is a private key to log in with; nil is none. It is offered first.
	Signer ssh.Signer
	// Fingerprint is "SHA256:" and the base64 of the SHA-256 of the host's key.
	Fingerprint string
	Logger      *slog.Logger // nil discards

	Dial      time.Duration // limit of TCP connect and handshake, each; 0 is 15 s
	Keepalive time.Duration // between signs of life; 0 is 20 s
	Grace     time.Duration // how long the end of a cancelled command is waited for; 0 is 3 s
	Sessions  int           // commands at once on the control connection; 0 is 4 (hosts allow 10)
	Streams   int           // connections for data at once; 0 is 4
}

// Client is one host. Its methods are safe for concurrent use.
type Client struct {
	c       Config
	pin     string
	control chan struct{} // slots for commands on the control connection
	streams chan struct{} // slots for data connections
	dialing chan struct{} // held while logging in: hosts limit logins under way

	mu      sync.Mutex
	main    *conn
	idle    []*conn
	all     map[*conn]struct{}
	refused error
	proved  bool // a login succeeded
	unheard int  // logins in a row whose answer never came
	algos   []string
	closed  bool
	running sync.WaitGroup
}

// New checks the configuration; it does not connect.
func New(c Config) (*Client, error) {
	pin, err := ParseFingerprint(c.Fingerprint)
	if err != nil {
		return nil, err
	}
	if c.Password == nil && c.Signer == nil {
		return nil, errors.New("SSH needs a password or a private key")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	for d, v := range map[*time.Duration]time.Duration{&c.Dial: 15 * time.Second, &c.Keepalive: 20 * time.Second, &c.Grace: 3 * time.Second} {
		if *d <= 0 {
			*d = v
		}
	}
	for n, v := range map[*int]int{&c.Sessions: 4, &c.Streams: 4} {
		if *n <= 0 {
			*n = v
		}
	}
	return &Client{
		c: c, pin: pin, control: make(chan struct{}, c.Sessions), streams: make(chan struct{}, c.Streams),
		dialing: make(chan struct{}, 1), all: map[*conn]struct{}{},
	}, nil
}

// Streams is how many data commands run at once.
func (c *Client) Streams() int { return cap(c.streams) }

// Connect logs in, once, unless the control connection stands already. A failure
// on the way to the host is a *LostError.
func (c *Client) Connect(ctx context.Context) error {
	_, err := c.mainConn(ctx)
	return unreached(ctx, err)
}

// unreached marks a login that failed on the way.
func unreached(ctx context.Context, err error) error {
	if err != nil && (ctx.Err() != nil || network(err) || errors.Is(err, context.DeadlineExceeded)) && !errors.Is(err, ErrRefused) {
		return &LostError{Err: err}
	}
	return err
}

// Close ends every connection and waits for all commands to notice.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	var open []*conn
	for cn := range c.all {
		open = append(open, cn)
	}
	c.mu.Unlock()
	for _, cn := range open {
		cn.kill()
	}
	c.running.Wait()
}

// enter counts one more goroutine for Close to wait for.
func (c *Client) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.running.Add(1)
	}
	return !c.closed
}

// conn is one connection.
type conn struct {
	client *ssh.Client
	raw    net.Conn
	dead   chan struct{} // closed when the connection is gone
}

func (cn *conn) kill() { _ = cn.raw.Close() }

func (cn *conn) alive() bool {
	select {
	case <-cn.dead:
		return false
	default:
		return true
	}
}

// mainConn is the control connection, made when there is none.
func (c *Client) mainConn(ctx context.Context) (*conn, error) {
	have := func() *conn {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.main != nil && c.main.alive() {
			return c.main
		}
		return nil
	}
	if cn := have(); cn != nil {
		return cn, nil
	}
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if cn := have(); cn != nil { // another caller was faster
		return cn, nil
	}
	cn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.main = cn
	c.mu.Unlock()
	return cn, nil
}

// streamConn is a connection of the caller's own until it is given back.
func (c *Client) streamConn(ctx context.Context) (*conn, error) {
	c.mu.Lock()
	for len(c.idle) > 0 {
		cn := c.idle[len(c.idle)-1]
		c.idle = c.idle[:len(c.idle)-1]
		if cn.alive() {
			c.mu.Unlock()
			return cn, nil
		}
	}
	c.mu.Unlock()
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return c.dial(ctx)
}

func (c *Client) giveBack(cn *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cn.alive() {
		c.idle = append(c.idle, cn)
	}
}

// adopt starts looking after a connection that has logged in.
func (c *Client) adopt(client *ssh.Client, raw net.Conn) (*conn, error) {
	cn := &conn{client: client, raw: raw, dead: make(chan struct{})}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		_ = client.Close()
		return nil, ErrClosed
	}
	c.all[cn] = struct{}{}
	c.proved, c.unheard = true, 0
	c.running.Add(2)
	c.mu.Unlock()
	go func() {
		defer c.running.Done()
		err := client.Wait()
		close(cn.dead)
		_ = client.Close()
		c.mu.Lock()
		delete(c.all, cn)
		c.mu.Unlock()
		c.c.Logger.Debug("SSH connection ended", "address", c.c.Address, "error", err)
	}()
	go func() {
		defer c.running.Done()
		c.keep(cn)
	}()
	return cn, nil
}

// keep sends signs of life; one that is not answered within the interval ends
// the connection, and with it whoever waits on it.
func (c *Client) keep(cn *conn) {
	tick := time.NewTicker(c.c.Keepalive)
	defer tick.Stop()
	for {
		select {
		case <-cn.dead:
			return
		case <-tick.C:
			limit := time.AfterFunc(c.c.Keepalive, cn.kill)
			// Hosts answer that they do not know it, which is an answer.
			_, _, err := cn.client.SendRequest("keepalive@openssh.com", true, nil)
			limit.Stop()
			if err != nil {
				cn.kill()
				return
			}
		}
	}
}

// network tells a failure on the way from an answer of the host.
func network(err error) bool {
	var op net.Error
	return errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed)
}
