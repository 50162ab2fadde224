package sshx

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// ciphers are the ones that ESXi's hardened SSH service speaks: AES alone, the
// fast authenticated modes first.
var ciphers = []string{
	ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR,
}

// families are the kinds of host keys, for a host that has several while the
// pinned one is not the kind both ends like best.
var families = [][]string{
	{ssh.KeyAlgoED25519},
	{ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521},
	{ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512},
}

// maxUnheard bounds logins whose answer is lost on the way before any
// succeeded: the host may have counted each as a failure.
const maxUnheard = 3

// ParseFingerprint accepts "SHA256:…" as ssh-keygen -l prints it, with or
// without the base64's padding, and gives it as ssh-keygen does.
func ParseFingerprint(s string) (string, error) {
	text, ok := strings.CutPrefix(strings.TrimSpace(s), "SHA256:")
	raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(text, "="))
	if !ok || err != nil || len(raw) != sha256.Size {
		return "", fmt.Errorf("%q is not the SHA-256 fingerprint of an SSH key (SHA256: and 43 characters, as ssh-keygen -l prints it)", s)
	}
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(raw), nil
}

// errSeen ends a handshake that was only for looking at the host's key.
var errSeen = errors.New("the key was seen")

// HostKey shows the key at address (host:port): nothing is sent after the key
// exchange, and nothing is verified. kind is as in "ssh-ed25519".
func HostKey(ctx context.Context, address string, limit time.Duration) (fingerprint, kind string, err error) {
	raw, err := connectTCP(ctx, address, limit)
	if err != nil {
		return "", "", err
	}
	_, err = handshake(ctx, raw, address, limit, &ssh.ClientConfig{
		Config: ssh.Config{Ciphers: ciphers},
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			fingerprint, kind = ssh.FingerprintSHA256(key), key.Type()
			return errSeen
		},
	})
	if fingerprint != "" {
		return fingerprint, kind, nil
	}
	return "", "", err
}

func connectTCP(ctx context.Context, address string, limit time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: limit, KeepAlive: 15 * time.Second}
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return raw, err
}

// handshake logs in on raw within limit. raw is closed when it fails.
func handshake(ctx context.Context, raw net.Conn, address string, limit time.Duration, cfg *ssh.ClientConfig) (*ssh.Client, error) {
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stop := context.AfterFunc(bounded, func() { _ = raw.Close() })
	c, channels, requests, err := ssh.NewClientConn(raw, address, cfg)
	if !stop() && err == nil { // the limit passed in the last moment and closed raw
		_ = c.Close()
		err = net.ErrClosed
	}
	if err != nil {
		_ = raw.Close()
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case bounded.Err() != nil:
			return nil, fmt.Errorf("the SSH handshake took longer than %s: %w", limit, context.DeadlineExceeded)
		}
		return nil, err
	}
	return ssh.NewClient(c, channels, requests), nil
}

// dial makes one connection and logs in on it, with one attempt.
func (c *Client) dial(ctx context.Context) (*conn, error) {
	c.mu.Lock()
	refused, closed, algos := c.refused, c.closed, c.algos
	c.mu.Unlock()
	switch {
	case closed:
		return nil, ErrClosed
	case refused != nil:
		return nil, refused
	}
	cn, err := c.login(ctx, algos)
	var wrong *HostKeyError
	if algos != nil || !errors.As(err, &wrong) {
		return cn, err
	}
	// The host may have the pinned key too, only of another kind. Nothing is
	// sent to a host that does not prove to have it.
	for _, family := range families {
		cn, ferr := c.login(ctx, family)
		if ferr == nil || errors.Is(ferr, ErrRefused) || ctx.Err() != nil {
			c.mu.Lock()
			c.algos = family
			c.mu.Unlock()
			return cn, ferr
		}
	}
	return nil, err
}

func (c *Client) login(ctx context.Context, algos []string) (*conn, error) {
	raw, err := connectTCP(ctx, c.c.Address, c.c.Dial)
	if err != nil {
		return nil, err
	}
	a := &attempt{c: c}
	client, err := handshake(ctx, raw, c.c.Address, c.c.Dial, &ssh.ClientConfig{
		Config:            ssh.Config{Ciphers: ciphers},
		User:              c.c.User,
		Auth:              a.methods(),
		HostKeyAlgorithms: algos,
		ClientVersion:     "SSH-2.0-hikae",
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if got := ssh.FingerprintSHA256(key); got != c.pin {
				return &HostKeyError{Got: got, Want: c.pin}
			}
			a.believed.Store(true)
			return nil
		},
	})
	if err == nil {
		return c.adopt(client, raw)
	}
	return nil, c.judge(ctx, a, err)
}

// judge says what a handshake that failed came to.
func (c *Client) judge(ctx context.Context, a *attempt, err error) error {
	var wrong *HostKeyError
	switch {
	case errors.As(err, &wrong):
		return wrong
	case a.failure != nil: // the password could not be had; nothing was sent
		return a.failure
	case !a.believed.Load():
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() != nil || network(err) || errors.Is(err, context.DeadlineExceeded) {
		if a.sent.Load() && !c.proved {
			if c.unheard++; c.unheard >= maxUnheard {
				c.refused = fmt.Errorf("%w: the host broke off %d logins without an answer: %w", ErrRefused, c.unheard, err)
				return c.refused
			}
		}
		return err
	}
	c.refused = fmt.Errorf("%w: %w", ErrRefused, err)
	return c.refused
}

// attempt is one login: it sees to it that the password is sent once.
type attempt struct {
	c        *Client
	believed atomic.Bool // the host's key is the pinned one
	sent     atomic.Bool // the password was, or the key's signature
	failure  error       // of reading the password
}

var errSentAlready = errors.New("the password was sent once already")

func (a *attempt) methods() (all []ssh.AuthMethod) {
	if a.c.c.Signer != nil {
		all = append(all, ssh.PublicKeys(a.c.c.Signer))
	}
	if a.c.c.Password != nil {
		all = append(all, ssh.KeyboardInteractive(a.answer), ssh.PasswordCallback(a.password))
	}
	return all
}

func (a *attempt) password() (string, error) {
	if a.sent.Load() {
		return "", errSentAlready
	}
	pw, err := a.c.c.Password()
	if err != nil {
		a.failure = err
		return "", err
	}
	a.sent.Store(true)
	return pw, nil
}

// answer gives the password to every prompt of one round. A second round with
// prompts means that it was wrong.
func (a *attempt) answer(_, _ string, prompts []string, _ []bool) ([]string, error) {
	if len(prompts) == 0 {
		return nil, nil
	}
	pw, err := a.password()
	if err != nil {
		return nil, err
	}
	answers := make([]string, len(prompts))
	for i := range answers {
		answers[i] = pw
	}
	return answers, nil
}
