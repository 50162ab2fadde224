package shell

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

func closeAll(files []io.Closer) {
	for _, f := range files {
		f.Close()
	}
}

// redirect opens what redirections name.
func (s *Shell) redirect(ctx context.Context, redirs []redir, io3 stdio) (_ stdio, opened []io.Closer, err error) {
	for _, r := range redirs {
		if r.body != nil {
			text, err := s.text(ctx, *r.body, io3)
			if err != nil {
				return io3, opened, err
			}
			io3.in = strings.NewReader(text)
			continue
		}
		to, err := s.text(ctx, r.to, io3)
		if err != nil {
			return io3, opened, err
		}
		if r.op == ">&" || r.op == "<&" {
			if io3, err = duplicate(io3, r.fd, to); err != nil {
				return io3, opened, err
			}
			continue
		}
		flag := map[string]int{
			"<": os.O_RDONLY, ">": os.O_WRONLY | os.O_CREATE | os.O_TRUNC, ">|": os.O_WRONLY | os.O_CREATE | os.O_TRUNC,
			">>": os.O_WRONLY | os.O_CREATE | os.O_APPEND, "<>": os.O_RDWR | os.O_CREATE,
		}[r.op]
		f, err := s.host.Open(Abs(s.dir, to), flag)
		if err != nil {
			if r.op == "<" {
				return io3, opened, fmt.Errorf("can't open %s: %s", to, told(err, "no such file"))
			}
			return io3, opened, fmt.Errorf("can't create %s: %s", to, told(err, "nonexistent directory"))
		}
		opened = append(opened, f)
		switch r.fd {
		case 0:
			io3.in = f
		case 1:
			io3.out = f
		case 2:
			io3.err = f
		}
	}
	return io3, opened, nil
}

// told is an error in ash's words.
func told(err error, missing string) string {
	if errors.Is(err, syscall.ENOENT) {
		return missing
	}
	return Strerror(err)
}

// Strerror is an error as a C library words it.
func Strerror(err error) string {
	var e syscall.Errno
	text := err.Error()
	if errors.As(err, &e) {
		text = e.Error()
	}
	switch text {
	case "":
		return text
	case "input/output error":
		return "I/O error"
	}
	return strings.ToUpper(text[:1]) + text[1:]
}

func duplicate(io3 stdio, fd int, to string) (stdio, error) {
	if to == "-" {
		switch fd {
		case 0:
			io3.in = strings.NewReader("")
		case 1:
			io3.out = io.Discard
		case 2:
			io3.err = io.Discard
		}
		return io3, nil
	}
	n, err := strconv.Atoi(to)
	if err != nil || n > 2 || n < 0 {
		return io3, fmt.Errorf("%s: bad file descriptor", to)
	}
	switch {
	case fd == 1 && n == 2:
		io3.out = io3.err
	case fd == 2 && n == 1:
		io3.err = io3.out
	}
	return io3, nil
}
