package busybox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/shell"
)

// maxBlock bounds dd's block size: ESXi has little memory for its shell.
const maxBlock = 256 << 20

type ddOptions struct {
	in, out           string
	ibs, obs          int64
	skip, seek, count int64
	limited           bool // count was given
	notrunc, sync     bool
	noerror, fullRead bool
	quiet             bool // status=none
	noxfer            bool // status=noxfer
}

// size reads dd's numbers: bytes, or with a unit.
func size(s string) (int64, error) {
	product := int64(1)
	for f := range strings.SplitSeq(s, "x") {
		n := 0
		for n < len(f) && f[n] >= '0' && f[n] <= '9' {
			n++
		}
		v, err := strconv.ParseInt(f[:n], 10, 64)
		unit, known := map[string]int64{
			"": 1, "c": 1, "w": 2, "b": 512, "kB": 1000, "kD": 1000, "K": 1 << 10, "k": 1 << 10, "MB": 1e6, "MD": 1e6, "M": 1 << 20, "m": 1 << 20, "GB": 1e9, "G": 1 << 30, "g": 1 << 30,
		}[f[n:]]
		if err != nil || !known || v > 1<<62/unit || product != 0 && v*unit > 1<<62/product {
			return 0, fmt.Errorf("invalid number '%s'", s)
		}
		product *= v * unit
	}
	return product, nil
}

func parseDD(args []string) (o ddOptions, err error) {
	o.ibs, o.obs = 512, 512
	for _, a := range args {
		key, value, ok := strings.Cut(a, "=")
		if !ok {
			return o, fmt.Errorf("unrecognized operand '%s'", a)
		}
		switch key {
		case "if":
			o.in = value
		case "of":
			o.out = value
		case "bs", "ibs", "obs", "skip", "seek", "count":
			n, err := size(value)
			if err != nil {
				return o, err
			}
			if strings.HasSuffix(key, "bs") && (n <= 0 || n > maxBlock) {
				return o, fmt.Errorf("number %s is not in 1..%d range", value, maxBlock)
			}
			switch key {
			case "bs":
				o.ibs, o.obs = n, n
			case "ibs":
				o.ibs = n
			case "obs":
				o.obs = n
			case "skip":
				o.skip = n
			case "seek":
				o.seek = n
			case "count":
				o.count, o.limited = n, true
			}
		case "conv":
			for c := range strings.SplitSeq(value, ",") {
				switch c {
				case "notrunc":
					o.notrunc = true
				case "sync":
					o.sync = true
				case "noerror":
					o.noerror = true
				case "fsync":
				default:
					return o, fmt.Errorf("invalid argument '%s' to 'conv'", c)
				}
			}
		case "iflag":
			if value != "fullblock" { // skip_bytes is not in the builds that ESXi ships
				return o, fmt.Errorf("invalid argument '%s' to 'iflag'", value)
			}
			o.fullRead = true
		case "status":
			switch value {
			case "none":
				o.quiet = true
			case "noxfer":
				o.noxfer = true
			default:
				return o, fmt.Errorf("invalid argument '%s' to 'status'", value)
			}
		default:
			return o, fmt.Errorf("unrecognized operand '%s'", a)
		}
	}
	return o, nil
}

func (b *Box) dd(ctx context.Context, p *shell.Proc) int {
	o, err := parseDD(p.Args[1:])
	if err != nil {
		p.Errorf("%v", err)
		return 1
	}
	begin := b.o.Clock()
	in, inName := p.In, "standard input"
	if o.in != "" {
		f, err := b.fs.Open(p.Path(o.in), os.O_RDONLY)
		if err != nil {
			p.Errorf("can't open '%s': %s", o.in, shell.Strerror(err))
			return 1
		}
		defer f.Close()
		in, inName = io.NewSectionReader(f, o.skip*o.ibs, 1<<62), o.in
		if strings.HasPrefix(o.in, "/dev/") {
			in = f
		}
	} else if o.skip > 0 {
		if _, err := io.CopyN(io.Discard, in, o.skip*o.ibs); err != nil && !errors.Is(err, io.EOF) {
			p.Errorf("%s: %s", inName, shell.Strerror(err))
			return 1
		}
	}
	w := &ddWriter{out: p.Out, name: "standard output"}
	if o.out != "" {
		// Without notrunc the file is cut at seek blocks, not at its beginning.
		f, err := b.fs.Open(p.Path(o.out), os.O_WRONLY|os.O_CREATE)
		if err == nil && !o.notrunc {
			err = f.Truncate(o.seek * o.obs)
		}
		if err != nil {
			p.Errorf("can't open '%s': %s", o.out, shell.Strerror(err))
			return 1
		}
		defer f.Close()
		w = &ddWriter{file: f, at: o.seek * o.obs, name: o.out}
	}
	c := ddCopy{o: o}
	err = c.run(ctx, in, w, inName)
	if !o.quiet {
		fmt.Fprintf(p.Err, "%d+%d records in\n%d+%d records out\n", c.inFull, c.inPart, c.outFull, c.outPart)
	}
	if err != nil {
		if broken(err) {
			return 141
		}
		p.Errorf("%s", err)
		return 1
	}
	if !o.quiet && !o.noxfer {
		taken := max(b.o.Clock().Sub(begin).Seconds(), 1e-6)
		fmt.Fprintf(p.Err, "%d bytes (%s) copied, %.6f seconds, %s/s\n", c.total, human(float64(c.total)), taken, human(float64(c.total)/taken))
	}
	return 0
}

// human is a number of bytes as busybox shortens it.
func human(n float64) string {
	unit := "B"
	for _, u := range []string{"KB", "MB", "GB", "TB"} {
		if n < 1024 {
			break
		}
		n, unit = n/1024, u
	}
	return fmt.Sprintf("%.1f%s", n, unit)
}

type ddWriter struct {
	out  io.Writer
	file hostfs.File
	at   int64
	name string
}

func (w *ddWriter) Write(p []byte) (int, error) {
	if w.file == nil {
		return w.out.Write(p)
	}
	n, err := w.file.WriteAt(p, w.at)
	w.at += int64(n)
	return n, err
}

type ddCopy struct {
	o                                ddOptions
	inFull, inPart, outFull, outPart int64
	total                            int64
}

func (c *ddCopy) run(ctx context.Context, in io.Reader, w *ddWriter, inName string) error {
	buf := make([]byte, c.o.ibs)
	var pending []byte // with ibs and obs that differ
	flush := func(p []byte) error {
		n, err := w.Write(p)
		c.total += int64(n)
		if int64(len(p)) == c.o.obs && err == nil {
			c.outFull++
		} else if n > 0 {
			c.outPart++
		}
		if err != nil && !broken(err) {
			return fmt.Errorf("error writing '%s': %s", w.name, shell.Strerror(err))
		}
		return err
	}
	for !c.o.limited || c.inFull+c.inPart < c.o.count {
		if ctx.Err() != nil {
			return fmt.Errorf("%s", shell.Strerror(syscall.EINTR))
		}
		n, err := c.read(in, buf)
		if n > 0 {
			if n == len(buf) {
				c.inFull++
			} else {
				c.inPart++
				if c.o.sync {
					clear(buf[n:])
					n = len(buf)
				}
			}
			if c.o.ibs == c.o.obs {
				if err := flush(buf[:n]); err != nil {
					return err
				}
			} else {
				pending = append(pending, buf[:n]...)
				for int64(len(pending)) >= c.o.obs {
					if err := flush(pending[:c.o.obs]); err != nil {
						return err
					}
					pending = pending[c.o.obs:]
				}
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%s: %s", inName, shell.Strerror(err))
		}
	}
	if len(pending) > 0 {
		return flush(pending)
	}
	return nil
}

// read is one read(2) of a block: a pipe gives what it has, unless full blocks
// are asked for.
func (c *ddCopy) read(in io.Reader, buf []byte) (int, error) {
	if c.o.fullRead {
		n, err := io.ReadFull(in, buf)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = io.EOF
		}
		return n, err
	}
	return in.Read(buf)
}
