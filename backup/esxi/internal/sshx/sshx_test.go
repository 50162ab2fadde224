package sshx

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"hikae/backup/esxi/internal/sshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shell knows a few commands.
func shell(c *sshtest.Call) int {
	word, rest, _ := strings.Cut(c.Line, " ")
	switch word {
	case "echo":
		fmt.Fprintln(c.Stdout, rest)
	case "cat":
		io.Copy(c.Stdout, c.Stdin)
	case "fail":
		fmt.Fprint(c.Stderr, "it failed")
		return 3
	case "spew":
		for {
			if _, err := c.Stdout.Write(make([]byte, 32<<10)); err != nil {
				return 1
			}
		}
	case "hang":
		<-c.Gone
	case "vanish":
		return -1
	default:
		return 127
	}
	return 0
}

func serve(t *testing.T, o sshtest.Options, exec sshtest.Exec) *sshtest.Server {
	t.Helper()
	s, err := sshtest.Start(o, exec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func client(t *testing.T, s *sshtest.Server, change func(*Config)) *Client {
	t.Helper()
	cfg := Config{
		Address: s.Address(), User: "root", Password: func() (string, error) { return "secret", nil }, Fingerprint: s.Fingerprints()[0],
		Grace: 50 * time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestRun(t *testing.T) {
	s := serve(t, sshtest.Options{}, shell)
	c := client(t, s, nil)
	res, err := c.Run(t.Context(), Command{Line: "echo 'a b'"})
	if err != nil || string(res.Stdout) != "'a b'\n" || res.Status != 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	res, err = c.Run(t.Context(), Command{Line: "fail"})
	if err != nil || res.Status != 3 || string(res.Stderr) != "it failed" {
		t.Errorf("%+v, %v", res, err)
	}
	big := make([]byte, 5<<20)
	rand.Read(big)
	var out bytes.Buffer
	if _, err = c.Run(t.Context(), Command{Line: "cat", Stdin: bytes.NewReader(big), Stdout: &out, Data: true}); err != nil || !bytes.Equal(out.Bytes(), big) {
		t.Errorf("%d bytes came back, %v", out.Len(), err)
	}
	if n := s.Accepted.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	if _, err := c.Run(t.Context(), Command{Line: "cat", Stdin: bytes.NewReader(big), Limit: 1000}); !errors.Is(err, ErrTooLong) {
		t.Errorf("too long: %v", err)
	}
	if _, err := c.Run(t.Context(), Command{Line: "spew", Limit: 100 << 10}); !errors.Is(err, ErrTooLong) {
		t.Errorf("too long: %v", err)
	}
	var lost *LostError
	if _, err := c.Run(t.Context(), Command{Line: "vanish"}); !errors.As(err, &lost) || !lost.Started {
		t.Errorf("no exit status: %v", err)
	}
	broken := errors.New("broken source")
	if _, err := c.Run(t.Context(), Command{Line: "cat", Stdin: io.MultiReader(strings.NewReader("x"), errReader{broken})}); !errors.Is(err, broken) {
		t.Errorf("broken source: %v", err)
	}
	if _, err := c.Run(t.Context(), Command{Line: "echo x", Stdout: errWriter{broken}}); !errors.Is(err, broken) {
		t.Errorf("broken sink: %v", err)
	}
	if _, err := c.Run(t.Context(), Command{Line: "echo x"}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

type errWriter struct{ err error }

func (w errWriter) Write([]byte) (int, error) { return 0, w.err }

// More commands than a host has sessions, and more streams than allowed.
func TestManyAtOnce(t *testing.T) {
	var now, most atomic.Int32
	s := serve(t, sshtest.Options{MaxSessions: 4}, func(c *sshtest.Call) int {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		return shell(c)
	})
	c := client(t, s, func(c *Config) { c.Streams = 3 })
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(i)}, 100_000)
			res, err := c.Run(t.Context(), Command{Line: "cat", Stdin: bytes.NewReader(p), Data: i%2 == 0})
			if err != nil || !bytes.Equal(res.Stdout, p) {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := s.Accepted.Load(); n > 4 {
		t.Errorf("%d connections", n)
	}
	if n := most.Load(); n > 7 {
		t.Errorf("%d commands at once", n)
	}
}

func TestHostKey(t *testing.T) {
	s := serve(t, sshtest.Options{TwoKeys: true}, shell)
	first, kind, err := HostKey(t.Context(), s.Address(), time.Second)
	if err != nil || kind == "" || s.Logins.Load() != 0 {
		t.Fatalf("%s %s, %v, %d logins", first, kind, err, s.Logins.Load())
	}
	// Either of the host's keys may be pinned.
	for _, pin := range s.Fingerprints() {
		c := client(t, s, func(c *Config) { c.Fingerprint = pin })
		if err := c.Connect(t.Context()); err != nil {
			t.Errorf("%s: %v", pin, err)
		}
	}
	before := s.Logins.Load()
	asked := false
	c := client(t, s, func(c *Config) {
		c.Fingerprint = "SHA256:" + strings.Repeat("A", 43)
		c.Password = func() (string, error) { asked = true; return "secret", nil }
	})
	var wrong *HostKeyError
	if err := c.Connect(t.Context()); !errors.As(err, &wrong) || wrong.Got != first {
		t.Errorf("another key: %v", err)
	}
	if asked || s.Logins.Load() != before {
		t.Error("the password was sent to a host with another key")
	}
	for _, bad := range []string{"", "SHA256:abc", "MD5:00:11", "SHA256:" + strings.Repeat("!", 43)} {
		if _, err := ParseFingerprint(bad); err == nil {
			t.Errorf("%q passed for a fingerprint", bad)
		}
	}
	if got, err := ParseFingerprint(" " + first + "= "); err != nil || got != first {
		t.Errorf("%q, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := HostKey(ctx, s.Address(), time.Second); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, _, err := HostKey(t.Context(), "127.0.0.1:1", time.Second); err == nil {
		t.Error("nobody there")
	}
}

func TestAuthentication(t *testing.T) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, sshtest.Options{Key: signer.PublicKey(), PasswordToo: true}, shell)
	c := client(t, s, func(c *Config) { c.Password, c.Signer = nil, signer })
	if err := c.Connect(t.Context()); err != nil || s.Logins.Load() != 0 {
		t.Errorf("by key: %v, %d passwords", err, s.Logins.Load())
	}
	asked := 0
	c = client(t, s, func(c *Config) { c.Password = func() (string, error) { asked++; return "wrong", nil } })
	for range 3 {
		if err := c.Connect(t.Context()); !errors.Is(err, ErrRefused) || strings.Contains(err.Error(), "wrong") {
			t.Errorf("wrong password: %v", err)
		}
		if _, err := c.Run(t.Context(), Command{Line: "echo", Data: true}); !errors.Is(err, ErrRefused) {
			t.Errorf("wrong password: %v", err)
		}
	}
	// Two ways to send it, one failure counted.
	if asked != 1 || s.Logins.Load() != 1 {
		t.Errorf("the password was read %d times and judged %d times", asked, s.Logins.Load())
	}
	// One that was right and is changed: data connections fail, once.
	c = client(t, s, nil)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.SetPassword("another")
	before := s.Logins.Load()
	for range 3 {
		if _, err := c.Run(t.Context(), Command{Line: "echo", Data: true}); !errors.Is(err, ErrRefused) {
			t.Errorf("changed password: %v", err)
		}
	}
	if n := s.Logins.Load() - before; n != 1 {
		t.Errorf("%d logins", n)
	}
	unreadable := errors.New("no such file")
	c = client(t, s, func(c *Config) { c.Password = func() (string, error) { return "", unreadable } })
	if err := c.Connect(t.Context()); !errors.Is(err, unreadable) || errors.Is(err, ErrRefused) {
		t.Errorf("unreadable password: %v", err)
	}
	if _, err := New(Config{Fingerprint: s.Fingerprints()[0]}); err == nil {
		t.Error("neither key nor password")
	}
}

func TestOnlyAES(t *testing.T) {
	s := serve(t, sshtest.Options{Ciphers: []string{ssh.CipherChaCha20Poly1305}}, shell)
	c := client(t, s, nil)
	if err := c.Connect(t.Context()); err == nil || errors.Is(err, ErrRefused) || s.Logins.Load() != 0 {
		t.Errorf("a cipher that is not AES: %v", err)
	}
}

func TestBrokenNetwork(t *testing.T) {
	started := make(chan struct{}, 1)
	s := serve(t, sshtest.Options{}, func(c *sshtest.Call) int {
		if c.Line == "hang" {
			started <- struct{}{}
		}
		return shell(c)
	})
	c := client(t, s, nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		<-started
		s.Cut()
	})
	var lost *LostError
	if _, err := c.Run(t.Context(), Command{Line: "hang"}); !errors.As(err, &lost) || !lost.Started {
		t.Errorf("cut: %v", err)
	}
	wg.Wait()
	// A dead connection is replaced before a command begins.
	for range 2 {
		if _, err := c.Run(t.Context(), Command{Line: "echo x"}); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		c.mu.Lock()
		main := c.main
		c.mu.Unlock()
		s.Cut()
		<-main.dead
	}
	s.Close()
	if _, err := c.Run(t.Context(), Command{Line: "echo x"}); !errors.As(err, &lost) || lost.Started {
		t.Errorf("nobody there: %v", err)
	}
}

func TestCancel(t *testing.T) {
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	s := serve(t, sshtest.Options{}, func(c *sshtest.Call) int {
		if c.Line == "hang" {
			cancel(why)
		}
		return shell(c)
	})
	c := client(t, s, nil)
	var lost *LostError
	if _, err := c.Run(ctx, Command{Line: "hang"}); !errors.Is(err, why) || !errors.As(err, &lost) || !lost.Started {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := c.Run(ctx, Command{Line: "echo"}); !errors.Is(err, why) || !errors.As(err, &lost) || lost.Started {
		t.Errorf("cancelled before: %v", err)
	}
	if _, err := c.Run(t.Context(), Command{Line: "hang", Stall: 30 * time.Millisecond}); !errors.Is(err, ErrStalled) {
		t.Errorf("stalled: %v", err)
	}
	if _, err := c.Run(t.Context(), Command{Line: "echo x"}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	c.Close()
	if _, err := c.Run(t.Context(), Command{Line: "echo x"}); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// A host that does not answer signs of life any more is given up.
func TestKeepalive(t *testing.T) {
	s := serve(t, sshtest.Options{Deaf: true}, shell)
	c := client(t, s, func(c *Config) { c.Keepalive = 20 * time.Millisecond })
	var lost *LostError
	if _, err := c.Run(t.Context(), Command{Line: "hang"}); !errors.As(err, &lost) || !lost.Started {
		t.Errorf("deaf: %v", err)
	}
}

func TestTooManySessions(t *testing.T) {
	s := serve(t, sshtest.Options{MaxSessions: 1}, shell)
	c := client(t, s, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx, Command{Line: "hang"}) })
	for s.Commands.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := c.Run(t.Context(), Command{Line: "echo"}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second session: %v", err)
	}
	cancel()
	wg.Wait()
}

func FuzzFingerprint(f *testing.F) {
	f.Add("SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=")
	f.Add("SHA256:")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseFingerprint(s)
		if err != nil {
			return
		}
		if again, err := ParseFingerprint(got); err != nil || again != got {
			t.Errorf("%q is %q is %q, %v", s, got, again, err)
		}
	})
}
