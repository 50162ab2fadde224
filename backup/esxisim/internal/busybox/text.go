package busybox

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/shell"
)

func (b *Box) cat(ctx context.Context, p *shell.Proc) int {
	_, rest, ok := flags(p, "uv")
	if !ok {
		return 1
	}
	return b.inputs(p, rest, func(_ string, r io.Reader) error { return copyFile(ctx, p.Out, r) })
}

// lines gives each line with its end to f until that says stop.
func lines(r io.Reader, f func(line string) (goOn bool)) error {
	br := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := br.ReadString('\n')
		if line != "" && !f(line) {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// amount reads the number of head and tail: "-n 5", "-5", "-c 10".
func (b *Box) amount(p *shell.Proc) (n int64, byBytes, fromStart bool, rest []string, ok bool) {
	args := slices.Clone(p.Args)
	if len(args) > 1 && len(args[1]) > 1 && args[1][0] == '-' && args[1][1] >= '0' && args[1][1] <= '9' {
		args = slices.Concat(args[:1], []string{"-n", args[1][1:]}, args[2:])
	}
	sub := *p
	sub.Args = args
	opts, rest, ok := flags(&sub, "n:c:qv")
	if !ok {
		return 0, false, false, nil, false
	}
	value := "10"
	if v := last(opts, 'n'); v != "" {
		value = v
	}
	if v := last(opts, 'c'); v != "" {
		value, byBytes = v, true
	}
	value, fromStart = strings.CutPrefix(value, "+")
	n, err := size(value)
	if err != nil {
		p.Errorf("%v", err)
		return 0, false, false, nil, false
	}
	return n, byBytes, fromStart, rest, true
}

func (b *Box) head(_ context.Context, p *shell.Proc) int {
	n, byBytes, _, rest, ok := b.amount(p)
	if !ok {
		return 1
	}
	return b.inputs(p, rest, func(_ string, r io.Reader) error {
		if byBytes {
			_, err := io.Copy(p.Out, io.LimitReader(r, n))
			return err
		}
		left := n
		var werr error
		err := lines(r, func(line string) bool {
			if left--; left >= 0 {
				_, werr = io.WriteString(p.Out, line)
			}
			return left > 0 && werr == nil
		})
		if err == nil {
			err = werr
		}
		return err
	})
}

// maxTail bounds what tail keeps, in bytes.
const maxTail = 64 << 20

func (b *Box) tail(_ context.Context, p *shell.Proc) int {
	n, byBytes, fromStart, rest, ok := b.amount(p)
	if !ok {
		return 1
	}
	return b.inputs(p, rest, func(_ string, r io.Reader) error {
		if fromStart {
			skip := max(n-1, 0)
			if byBytes {
				if _, err := io.CopyN(io.Discard, r, skip); err != nil {
					return nil // shorter
				}
				_, err := io.Copy(p.Out, r)
				return err
			}
			var werr error
			err := lines(r, func(line string) bool {
				if skip--; skip < 0 {
					_, werr = io.WriteString(p.Out, line)
				}
				return werr == nil
			})
			if err == nil {
				err = werr
			}
			return err
		}
		if byBytes {
			text, err := lastBytes(r, min(n, maxTail))
			if err == nil {
				_, err = p.Out.Write(text)
			}
			return err
		}
		var kept []string
		if err := lines(r, func(line string) bool {
			if kept = append(kept, line); int64(len(kept)) > n {
				kept = kept[1:]
			}
			return true
		}); err != nil {
			return err
		}
		_, err := io.WriteString(p.Out, strings.Join(kept, ""))
		return err
	})
}

// lastBytes reads to the end and keeps the last n.
func lastBytes(r io.Reader, n int64) ([]byte, error) {
	var kept []byte
	buf := make([]byte, copyStep)
	for {
		m, err := r.Read(buf)
		kept = append(kept, buf[:m]...)
		if int64(len(kept)) > n {
			kept = kept[int64(len(kept))-n:]
		}
		if errors.Is(err, io.EOF) {
			return kept, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func (b *Box) wc(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "lwcm")
	if !ok {
		return 1
	}
	if len(opts) == 0 {
		opts = map[byte][]string{'l': {}, 'w': {}, 'c': {}}
	}
	return b.inputs(p, rest, func(name string, r io.Reader) error {
		var n struct{ lines, words, chars int64 }
		err := lines(r, func(line string) bool {
			n.lines += int64(strings.Count(line, "\n"))
			n.words += int64(len(strings.Fields(line)))
			n.chars += int64(len(line))
			return true
		})
		var cols []string
		for _, c := range []struct {
			opt byte
			n   int64
		}{{'l', n.lines}, {'w', n.words}, {'c', n.chars}} {
			if _, ok := opts[c.opt]; ok {
				width := 9
				if len(opts) == 1 {
					width = 0
				}
				cols = append(cols, fmt.Sprintf("%*d", width, c.n))
			}
		}
		if name != "-" {
			cols = append(cols, name)
		}
		fmt.Fprintln(p.Out, strings.Join(cols, " "))
		return err
	})
}

func (b *Box) cmp(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "sl")
	if !ok || len(rest) != 2 {
		return 2
	}
	var r [2]*bufio.Reader
	for i, name := range rest {
		if name == "-" {
			r[i] = bufio.NewReader(p.In)
			continue
		}
		f, err := b.fs.Open(p.Path(name), os.O_RDONLY)
		if err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			return 2
		}
		defer f.Close()
		r[i] = bufio.NewReaderSize(f, copyStep)
	}
	line := 1
	for n := int64(1); ; n++ {
		x, err1 := r[0].ReadByte()
		y, err2 := r[1].ReadByte()
		switch {
		case err1 != nil && err2 != nil:
			return 0
		case err1 != nil || err2 != nil:
			short := rest[0]
			if err1 == nil {
				short = rest[1]
			}
			if opts['s'] == nil {
				p.Errorf("EOF on %s", short)
			}
			return 1
		case x != y:
			if opts['s'] == nil {
				fmt.Fprintf(p.Out, "%s %s differ: char %d, line %d\n", rest[0], rest[1], n, line)
			}
			return 1
		case x == '\n':
			line++
		}
	}
}

func (b *Box) cut(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "d:f:c:s")
	if !ok {
		return 1
	}
	list := last(opts, 'f') + last(opts, 'c')
	want := func(n int) bool {
		for r := range strings.SplitSeq(list, ",") {
			lo, hi, ranged := strings.Cut(r, "-")
			a, err1 := strconv.Atoi(lo)
			z, err2 := strconv.Atoi(hi)
			if err1 != nil {
				a = 1
			}
			if !ranged {
				z = a
			} else if err2 != nil {
				z = 1 << 30
			}
			if n >= a && n <= z {
				return true
			}
		}
		return false
	}
	delim := last(opts, 'd')
	if delim == "" {
		delim = "\t"
	}
	return b.inputs(p, rest, func(_ string, r io.Reader) error {
		return lines(r, func(line string) bool {
			line = strings.TrimSuffix(line, "\n")
			parts, glue := strings.Split(line, delim), delim
			if opts['c'] != nil {
				parts, glue = strings.Split(line, ""), ""
			} else if len(parts) == 1 {
				if opts['s'] == nil {
					fmt.Fprintln(p.Out, line)
				}
				return true
			}
			var kept []string
			for i, f := range parts {
				if want(i + 1) {
					kept = append(kept, f)
				}
			}
			fmt.Fprintln(p.Out, strings.Join(kept, glue))
			return true
		})
	})
}

func (b *Box) sort(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "nruk:t:")
	if !ok {
		return 1
	}
	if opts['k'] != nil || opts['t'] != nil {
		p.Errorf("keys are not there")
		return 2
	}
	var all []string
	status := b.inputs(p, rest, func(_ string, r io.Reader) error {
		return lines(r, func(line string) bool {
			all = append(all, strings.TrimSuffix(line, "\n"))
			return true
		})
	})
	number := func(s string) int64 {
		s = strings.TrimSpace(s)
		n := 0
		for n < len(s) && (s[n] >= '0' && s[n] <= '9' || n == 0 && s[n] == '-') {
			n++
		}
		v, _ := strconv.ParseInt(s[:n], 10, 64)
		return v
	}
	slices.SortStableFunc(all, func(x, y string) int {
		c := strings.Compare(x, y)
		if opts['n'] != nil {
			if a, z := number(x), number(y); a != z {
				c = 1
				if a < z {
					c = -1
				}
			}
		}
		if opts['r'] != nil {
			c = -c
		}
		return c
	})
	if opts['u'] != nil {
		all = slices.Compact(all)
	}
	for _, line := range all {
		fmt.Fprintln(p.Out, line)
	}
	return status
}

func (b *Box) uniq(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "cdu")
	if !ok {
		return 1
	}
	var prev string
	n := 0
	end := func() {
		if n == 0 || opts['d'] != nil && n < 2 || opts['u'] != nil && n > 1 {
			return
		}
		if opts['c'] != nil {
			fmt.Fprintf(p.Out, "%7d ", n)
		}
		fmt.Fprintln(p.Out, prev)
	}
	status := b.inputs(p, rest, func(_ string, r io.Reader) error {
		return lines(r, func(line string) bool {
			line = strings.TrimSuffix(line, "\n")
			if n == 0 || line != prev {
				end()
				prev, n = line, 0
			}
			n++
			return true
		})
	})
	end()
	return status
}

// tr SET1 SET2, tr -d SET1, tr -s SET1
func tr(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "dsc")
	if !ok || len(rest) == 0 {
		p.Errorf("missing operand")
		return 1
	}
	from := trSet(rest[0])
	in := func(c byte) int { return bytes.LastIndexByte(from, c) }
	if opts['c'] != nil {
		given := from
		from = nil
		for c := range 256 {
			if bytes.IndexByte(given, byte(c)) < 0 {
				from = append(from, byte(c))
			}
		}
	}
	var to []byte
	if len(rest) > 1 {
		to = trSet(rest[1])
	}
	r, w := bufio.NewReader(p.In), bufio.NewWriter(p.Out)
	previous := -1
	for {
		c, err := r.ReadByte()
		if err != nil {
			break
		}
		at := in(c)
		if at >= 0 && opts['d'] != nil {
			continue
		}
		if at >= 0 && len(to) > 0 {
			c = to[min(at, len(to)-1)]
		}
		if at >= 0 && opts['s'] != nil && previous == int(c) {
			continue
		}
		previous = int(c)
		if w.WriteByte(c) != nil {
			return 141
		}
	}
	if w.Flush() != nil {
		return 141
	}
	return 0
}

func trSet(s string) []byte {
	s, _ = unescape(s, true)
	for class, chars := range map[string]string{"[:upper:]": "A-Z", "[:lower:]": "a-z", "[:digit:]": "0-9", "[:space:]": " \t\n\r\v\f"} {
		s = strings.ReplaceAll(s, class, chars)
	}
	var out []byte
	for i := 0; i < len(s); i++ {
		if i+2 < len(s) && s[i+1] == '-' && s[i+2] >= s[i] {
			for c := int(s[i]); c <= int(s[i+2]); c++ {
				out = append(out, byte(c))
			}
			i += 2
			continue
		}
		out = append(out, s[i])
	}
	return out
}
