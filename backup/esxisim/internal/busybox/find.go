package busybox

import (
	"context"
	"fmt"
	"path"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/shell"
)

// find [PATH…] [-maxdepth N] [-type f|d] [-name P] [-iname P] [-size …] [-print|-print0|-delete]
func (b *Box) find(ctx context.Context, p *shell.Proc) int {
	args := p.Args[1:]
	var roots []string
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") && args[0] != "!" && args[0] != "(" {
		roots, args = append(roots, args[0]), args[1:]
	}
	if len(roots) == 0 {
		roots = []string{"."}
	}
	q := finder{most: -1, end: "\n"}
	for i := 0; i < len(args); i++ {
		value := ""
		if i+1 < len(args) {
			value = args[i+1]
		}
		switch args[i] {
		case "-print":
		case "-print0":
			q.end = "\x00"
		case "-maxdepth", "-mindepth":
			n, err := strconv.Atoi(value)
			if err != nil {
				p.Errorf("invalid number '%s'", value)
				return 1
			}
			if args[i] == "-maxdepth" {
				q.most = n
			} else {
				q.least = n
			}
			i++
		case "-type", "-name", "-iname":
			q.tests = append(q.tests, [2]string{args[i], value})
			i++
		default:
			p.Errorf("unrecognized: %s", args[i])
			return 1
		}
	}
	status := 0
	for _, r := range roots {
		i, err := b.fs.Lstat(p.Path(r))
		if strings.HasSuffix(r, "/") {
			i, err = b.fs.Stat(p.Path(r))
		}
		if err != nil {
			p.Errorf("%s: %s", r, shell.Strerror(err))
			status = 1
			continue
		}
		b.walk(ctx, p, &q, r, i, 0)
	}
	return status
}

type finder struct {
	most, least int
	tests       [][2]string
	end         string
}

func (q *finder) matches(i hostfs.Info) bool {
	for _, t := range q.tests {
		ok := false
		switch t[0] {
		case "-type":
			ok = map[string]bool{"f": i.Mode.IsRegular(), "d": i.IsDir(), "l": i.Link != ""}[t[1]]
		case "-name":
			ok = shell.Match(t[1], path.Base(i.Name))
		case "-iname":
			ok = shell.Match(strings.ToLower(t[1]), strings.ToLower(path.Base(i.Name)))
		}
		if !ok {
			return false
		}
	}
	return true
}

func (b *Box) walk(ctx context.Context, p *shell.Proc, q *finder, name string, i hostfs.Info, depth int) {
	if ctx.Err() != nil {
		return
	}
	if depth >= q.least && q.matches(i) {
		fmt.Fprint(p.Out, name, q.end)
	}
	if !i.IsDir() || q.most >= 0 && depth >= q.most {
		return
	}
	list, err := b.fs.List(p.Path(name))
	if err != nil {
		p.Errorf("%s: %s", name, shell.Strerror(err))
		return
	}
	for _, in := range list {
		b.walk(ctx, p, q, strings.TrimSuffix(name, "/")+"/"+in.Name, in, depth+1)
	}
}

// du, in KiB
func (b *Box) du(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "sakhmc")
	if !ok {
		return 1
	}
	if len(rest) == 0 {
		rest = []string{"."}
	}
	show := func(n int64, name string) {
		size := strconv.FormatInt((n+1023)/1024, 10)
		switch {
		case opts['h'] != nil:
			size = short(n)
		case opts['m'] != nil:
			size = strconv.FormatInt((n+1<<20-1)>>20, 10)
		}
		fmt.Fprintf(p.Out, "%s\t%s\n", size, name)
	}
	status := 0
	var add func(name string, i hostfs.Info, top bool) int64
	add = func(name string, i hostfs.Info, top bool) int64 {
		sum := i.Used
		if i.IsDir() && ctx.Err() == nil {
			list, err := b.fs.List(p.Path(name))
			if err != nil {
				p.Errorf("%s: %s", name, shell.Strerror(err))
				status = 1
			}
			for _, in := range list {
				sum += add(strings.TrimSuffix(name, "/")+"/"+in.Name, in, false)
			}
		}
		if top || opts['s'] == nil && i.IsDir() || opts['a'] != nil {
			show(sum, name)
		}
		return sum
	}
	for _, name := range rest {
		i, err := b.fs.Stat(p.Path(name))
		if err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			status = 1
			continue
		}
		add(name, i, true)
	}
	return status
}

// df as ESXi's own prints it
func (b *Box) df(_ context.Context, p *shell.Proc) int {
	opts, _, ok := flags(p, "hkmi")
	if !ok {
		return 1
	}
	size := func(n int64) string {
		switch {
		case opts['h'] != nil:
			return short(n)
		case opts['k'] != nil:
			return strconv.FormatInt(n>>10, 10)
		case opts['m'] != nil:
			return strconv.FormatInt(n>>20, 10)
		}
		return strconv.FormatInt(n, 10)
	}
	fmt.Fprintf(p.Out, "%-10s %14s %14s %14s %4s %s\n", "Filesystem", "Size", "Used", "Available", "Use%", "Mounted on")
	for _, v := range b.o.Volumes() {
		used := v.Size - v.Free
		fmt.Fprintf(p.Out, "%-10s %14s %14s %14s %3d%% %s\n", v.Type, size(v.Size), size(used), size(v.Free), used*100/max(v.Size, 1), v.Mount)
	}
	return 0
}
