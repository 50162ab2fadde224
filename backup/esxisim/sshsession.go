package esxisim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/crypto/ssh"
)

// session serves one channel: one command, or a shell.
func (s *sshd) session(c *sshConn, nc ssh.NewChannel) {
	ch, requests, err := nc.Accept()
	if err != nil {
		return
	}
	defer ch.Close() //nolint:errcheck // the client is gone, or is to go
	env := map[string]string{}
	tty := false
	for r := range requests {
		ok := false
		switch r.Type {
		case "env":
			var kv struct{ Name, Value string }
			ok = ssh.Unmarshal(r.Payload, &kv) == nil
			if ok && (kv.Name == "LANG" || len(kv.Name) > 3 && kv.Name[:3] == "LC_") {
				env[kv.Name] = kv.Value
			}
		case "pty-req":
			ok, tty = true, true
		case "exec", "shell":
			var cmd struct{ Line string }
			if r.Type == "exec" && ssh.Unmarshal(r.Payload, &cmd) != nil {
				break
			}
			r.Reply(true, nil) //nolint:errcheck // a client that is gone shows when it is written to
			s.h.running.Go(func() {
				for r := range requests { // window changes, signals
					r.Reply(false, nil) //nolint:errcheck // as above
				}
			})
			s.execute(c, ch, r.Type == "shell", tty, cmd.Line, env)
			return
		}
		if r.WantReply {
			r.Reply(ok, nil) //nolint:errcheck // as above
		}
	}
}

// execute runs a command line, or a shell, and tells the client how it ended.
func (s *sshd) execute(c *sshConn, ch ssh.Channel, interactive, tty bool, line string, env map[string]string) {
	s.way.requests.Add(1)
	s.h.log.Debug("ssh", "command", line, "shell", interactive)
	stream := &sshStream{ch: ch, c: c}
	if f, hit := s.h.faults.ssh(FaultSSHDrop, line); hit {
		stream.left.Store(max(f.After, 0))
		stream.cut = true
	}
	ctx := context.WithValue(s.h.ctx, connKey{}, c)
	status := s.h.console.run(ctx, interactive, tty, line, env, stream, stream, stream.stderr())
	if stream.cut && stream.left.Load() <= 0 {
		c.Close() //nolint:errcheck // that is the point
		return
	}
	var exit struct{ Status uint32 }
	exit.Status = uint32(status) & 0xff
	ch.SendRequest("exit-status", false, ssh.Marshal(&exit)) //nolint:errcheck // the client is gone
}

// connKey finds, in a command's context, the connection it came by.
type connKey struct{}

// sshStream is a channel's data, with the cut that a fault makes.
type sshStream struct {
	ch   ssh.Channel
	c    *sshConn
	cut  bool
	left atomic.Int64
}

var errCut = errors.New("connection dropped by an injected fault")

// pass counts bytes and cuts the connection when enough of them have passed.
func (s *sshStream) pass(n int) (allowed int, err error) {
	if !s.cut {
		return n, nil
	}
	left := s.left.Add(-int64(n))
	if left > 0 {
		return n, nil
	}
	return max(int(left)+n, 0), errCut
}

func (s *sshStream) Read(p []byte) (int, error) {
	n, err := s.ch.Read(p)
	if n > 0 {
		if m, cut := s.pass(n); cut != nil {
			s.c.Close()      //nolint:errcheck // that is the point
			return m, io.EOF // as what is cut off looks from inside
		}
	}
	return n, err
}

func (s *sshStream) Write(p []byte) (int, error) { return s.write(s.ch, p) }

func (s *sshStream) write(w io.Writer, p []byte) (int, error) {
	n, cut := s.pass(len(p))
	m, err := w.Write(p[:n])
	if cut != nil {
		s.c.Close() //nolint:errcheck // that is the point
		return m, io.ErrClosedPipe
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", io.ErrClosedPipe, err)
	}
	return m, err
}

type sshStderr struct{ s *sshStream }

func (e sshStderr) Write(p []byte) (int, error) { return e.s.write(e.s.ch.Stderr(), p) }

func (s *sshStream) stderr() io.Writer { return sshStderr{s} }
