package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"hikae/backup/esxi/internal/shell"
	"hikae/backup/esxi/internal/sshx"
)

// shellFiles is a host's files through its shell: stat, dd and cat of busybox.
type shellFiles struct{ sh *shellConn }

// hostPath is where the shell finds "[datastore1] web01/web01.vmx".
func hostPath(dsPath string) (string, error) {
	ds, file, err := splitPath(dsPath)
	if err != nil {
		return "", err
	}
	if ds == "." || ds == ".." || strings.Contains(ds, "/") {
		return "", fmt.Errorf("%q names no datastore", dsPath)
	}
	return strings.TrimSuffix("/vmfs/volumes/"+ds+"/"+file, "/"), nil
}

// fail says what a request came to. Like those of the file server, errors are
// whole sentences when they leave here.
func (f *shellFiles) fail(ctx context.Context, what string, err error) error {
	return f.sh.h.explain(ctx, what, err)
}

func (f *shellFiles) head(ctx context.Context, dsPath string) (int64, error) {
	what := "look at " + dsPath
	path, err := hostPath(dsPath)
	if err != nil {
		return 0, err
	}
	ctx, cancel := f.sh.h.shellCall(ctx)
	defer cancel()
	out, err := f.sh.words(ctx, true, "stat", "-c", "%s", path)
	if err != nil {
		return 0, f.fail(ctx, what, err)
	}
	size, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil || size < 0 {
		return 0, fmt.Errorf("%s: %s: the host does not tell its size (%q)", f.sh.h.name, what, strings.TrimSpace(out))
	}
	return size, nil
}

// Alignment of dd's blocks. Its skip= counts blocks, and what counts bytes is not
// in every release's busybox; large blocks are what makes it fast.
const (
	leastBlock = 4 << 10
	mostBlock  = 1 << 20
)

// blocks cuts the request for n bytes from off into whole blocks: dd's bs=,
// skip= and count=, and how many bytes come before off.
func blocks(off, n int64) (bs, skip, count, lead int64) {
	for bs = mostBlock; bs > leastBlock; bs /= 2 {
		if start, end := off/bs*bs, (off+n+bs-1)/bs*bs; end-start-n <= n/8 {
			break // exact, or an eighth too much at most
		}
	}
	skip = off / bs
	return bs, skip, (off+n+bs-1)/bs - skip, off - skip*bs
}

func (f *shellFiles) read(ctx context.Context, dsPath string, p []byte, off, total int64, count func(right, wire int)) error {
	for len(p) > 0 {
		part := p[:min(len(p), f.sh.h.t.request)]
		if err := f.part(ctx, dsPath, part, off, total, count); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// part reads one request's worth; what breaks off goes on where it broke.
func (f *shellFiles) part(ctx context.Context, dsPath string, p []byte, off, total int64, count func(right, wire int)) error {
	what := fmt.Sprintf("read %s at %d", dsPath, off)
	path, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	h := f.sh.h
	tries, locked := 0, 0
	for {
		n, err := f.dd(ctx, path, p, off, total, count)
		if err == nil {
			return nil
		}
		p, off = p[n:], off+int64(n)
		if n >= 64<<10 {
			tries = 0
		}
		tries++
		var failed *commandError
		var broke *sshx.LostError
		again := errors.As(err, &broke) || errors.Is(err, sshx.ErrBusy)
		if errors.As(err, &failed) && errors.Is(h.explainCommand(what, failed), ErrLocked) {
			locked++
			again = locked < h.t.lockTries
		}
		if ctx.Err() != nil || !again || tries >= h.t.tries || f.sh.hopeless(err) {
			return f.fail(ctx, what, err)
		}
		h.log.Debug("reading over SSH failed, trying again", "host", h.name, "request", what, "try", tries, "error", err)
		if err := sleep(ctx, jitter(h.t.pause, h.t.longest, tries)); err != nil {
			return f.fail(ctx, what, err)
		}
	}
}

// dd fills p from off, once. n is how much of p is right, also after an error.
func (f *shellFiles) dd(ctx context.Context, path string, p []byte, off, total int64, count func(right, wire int)) (n int, err error) {
	bs, skip, blocks, lead := blocks(off, int64(len(p)))
	line, err := shell.Command("dd", "if="+path, fmt.Sprintf("bs=%d", bs), fmt.Sprintf("skip=%d", skip), fmt.Sprintf("count=%d", blocks))
	if err != nil {
		return 0, err
	}
	most := min(bs*blocks, max(0, total-skip*bs))
	sink := &sink{p: p, lead: lead, most: most, count: count}
	res, err := f.sh.client.Run(ctx, sshx.Command{Line: line, Stdout: sink, Data: true, Stall: f.sh.h.t.stall})
	switch {
	case err != nil:
		return sink.n, err
	case res.Status != 0:
		return sink.n, &commandError{"dd", &reply{"", string(res.Stderr), res.Status}}
	case sink.seen != most:
		return sink.n, fmt.Errorf("%s: the file is shorter than its %d bytes: it is not the frozen one", path, total)
	}
	return sink.n, nil
}

// sink takes the part of an output that was asked for.
type sink struct {
	p          []byte
	lead, most int64 // bytes before p's first, and all that may come
	seen       int64
	n          int
	count      func(right, wire int)
}

func (s *sink) Write(b []byte) (int, error) {
	all := len(b)
	if s.seen+int64(all) > s.most {
		return 0, errors.New("the file is longer than it was: it is not the frozen one")
	}
	if skip := s.lead - s.seen; skip > 0 {
		b = b[min(skip, int64(len(b))):]
	}
	s.seen += int64(all)
	right := copy(s.p[s.n:], b)
	s.n += right
	s.count(right, all)
	return all, nil
}

func (f *shellFiles) readHead(ctx context.Context, dsPath string, limit int64) ([]byte, int64, error) {
	size, err := f.head(ctx, dsPath)
	if err != nil {
		return nil, 0, err
	}
	b := make([]byte, min(limit, size))
	return b, size, f.read(ctx, dsPath, b, 0, size, func(int, int) {})
}

// readFile takes what cat prints, so that a file which is written meanwhile is
// read as it is, not as long as it was.
func (f *shellFiles) readFile(ctx context.Context, dsPath string, limit int64) ([]byte, error) {
	what := "read " + dsPath
	path, err := hostPath(dsPath)
	if err != nil {
		return nil, err
	}
	ctx, cancel := f.sh.h.shellCall(ctx)
	defer cancel()
	line, err := shell.Command("cat", path)
	if err != nil {
		return nil, err
	}
	r, err := f.sh.run(ctx, true, sshx.Command{Line: line, Limit: int(min(limit, 1<<30))})
	if errors.Is(err, sshx.ErrTooLong) {
		return nil, fmt.Errorf("%s: %s is longer than the %d bytes that such a file may have", f.sh.h.name, dsPath, limit)
	}
	if err == nil && r.status != 0 {
		err = &commandError{"cat", &reply{"", r.err, r.status}}
	}
	if err != nil {
		return nil, f.fail(ctx, what, err)
	}
	return []byte(r.out), nil
}

// temporary is what a file is called while it is written. The name is always the
// same, so that what a killed run leaves behind is replaced by the next.
const temporary = ".hikae-new"

// upload writes beside the file and renames: whoever reads it meanwhile sees the
// old one or the new one.
func (f *shellFiles) upload(ctx context.Context, dsPath string, r io.Reader, size int64) (err error) {
	what := "upload " + dsPath
	path, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	h := f.sh.h
	sent := &counted{r: io.LimitReader(r, size)}
	line, err := shell.Command("dd", "of="+path+temporary, "bs=1048576")
	if err != nil {
		return err
	}
	res, err := f.sh.client.Run(ctx, sshx.Command{Line: line, Stdin: sent, Data: true, Stall: h.t.call})
	defer func() {
		if err != nil && ctx.Err() == nil {
			_, _ = f.sh.words(ctx, true, "rm", "-f", path+temporary) // it would be replaced by the next
		}
	}()
	switch {
	case sent.err != nil:
		return fmt.Errorf("%s: %s: %w: %w", h.name, what, errSource, sent.err)
	case err != nil:
		return fmt.Errorf("after %d of %d bytes: %w", sent.n, size, f.fail(ctx, what, err))
	case res.Status != 0:
		return f.fail(ctx, what, &commandError{"dd", &reply{"", string(res.Stderr), res.Status}})
	case sent.n < size:
		return fmt.Errorf("%s: %s: %w: it ended after %d of %d bytes", h.name, what, errSource, sent.n, size)
	}
	stored, err := f.head(ctx, dsPath+temporary)
	if err != nil {
		return err
	}
	if stored != size {
		return fmt.Errorf("%s: %s: the host stored %d of %d bytes", h.name, what, stored, size)
	}
	return f.fail(ctx, what, f.rename(ctx, path+temporary, path))
}

// rename moves a file over another. When its answer is lost, that the old name
// is gone shows that it happened.
func (f *shellFiles) rename(ctx context.Context, from, to string) error {
	_, err := f.sh.words(ctx, false, "mv", "-f", from, to)
	for try := 1; isLost(err) && ctx.Err() == nil && try <= 2; try++ {
		_, serr := f.sh.words(ctx, true, "stat", "-c", "%s", from)
		var failed *commandError
		if errors.As(serr, &failed) && failed.says("No such file") {
			return nil
		}
		if serr != nil {
			return serr
		}
		_, err = f.sh.words(ctx, false, "mv", "-f", from, to)
	}
	return err
}

// counted is a reader whose bytes and error are known afterwards.
type counted struct {
	r   io.Reader
	n   int64
	err error
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}
