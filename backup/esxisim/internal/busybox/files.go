package busybox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/shell"
)

func (b *Box) ls(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "l1aAhdtrinR")
	if !ok {
		return 1
	}
	if len(rest) == 0 {
		rest = []string{"."}
	}
	status := 0
	var files, dirs []hostfs.Info
	var dirNames []string
	for _, name := range rest {
		stat := b.fs.Stat
		if opts['d'] != nil || opts['l'] != nil && !strings.HasSuffix(name, "/") {
			stat = b.fs.Lstat
		}
		i, err := stat(p.Path(name))
		if err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			status = 1
			continue
		}
		i.Name = name
		if i.IsDir() && opts['d'] == nil {
			dirs, dirNames = append(dirs, i), append(dirNames, name)
		} else {
			files = append(files, i)
		}
	}
	for _, i := range files {
		b.lsLine(p, i, opts)
	}
	for n, name := range dirNames {
		list, err := b.fs.List(p.Path(name))
		if err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			status = 1
			continue
		}
		if len(rest) > 1 {
			if n > 0 || len(files) > 0 {
				fmt.Fprintln(p.Out)
			}
			fmt.Fprintf(p.Out, "%s:\n", name)
		}
		if opts['l'] != nil {
			var used int64
			for _, i := range list {
				used += i.Used
			}
			fmt.Fprintf(p.Out, "total %d\n", used/1024)
		}
		if opts['a'] != nil {
			for _, dot := range []string{".", ".."} {
				i := dirs[n]
				i.Name = dot
				b.lsLine(p, i, opts)
			}
		}
		for _, i := range list {
			if !strings.HasPrefix(i.Name, ".") || opts['a'] != nil || opts['A'] != nil {
				b.lsLine(p, i, opts)
			}
		}
	}
	return status
}

func (b *Box) lsLine(p *shell.Proc, i hostfs.Info, opts map[byte][]string) {
	if opts['l'] == nil {
		fmt.Fprintln(p.Out, i.Name)
		return
	}
	size := strconv.FormatInt(i.Size, 10)
	if opts['h'] != nil {
		size = short(i.Size)
	}
	name := i.Name
	if i.Link != "" {
		name += " -> " + i.Link
	}
	fmt.Fprintf(p.Out, "%s %4d %-8s %-8s %9s %s %s\n", modeString(i.Mode), 1, "root", "root", size, i.ModTime.UTC().Format("Jan _2 15:04"), name)
}

func modeString(m fs.FileMode) string {
	kind := "-"
	switch {
	case m.IsDir():
		kind = "d"
	case m&fs.ModeSymlink != 0:
		kind = "l"
	case m&fs.ModeDevice != 0:
		kind = "c"
	}
	return kind + m.Perm().String()[1:]
}

// short is a size as ls -h and df -h write it.
func short(n int64) string {
	v, unit := float64(n), ""
	for _, u := range []string{"K", "M", "G", "T"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	if unit == "" {
		return strconv.FormatInt(n, 10)
	}
	return fmt.Sprintf("%.1f%s", v, unit)
}

// stat -c FORMAT
func (b *Box) stat(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "Lc:tf")
	if !ok {
		return 1
	}
	if opts['f'] != nil || opts['t'] != nil {
		p.Errorf("only -c FORMAT is there")
		return 1
	}
	status := 0
	for _, name := range rest {
		stat := b.fs.Lstat
		if opts['L'] != nil {
			stat = b.fs.Stat
		}
		i, err := stat(p.Path(name))
		if err != nil {
			p.Errorf("can't stat '%s': %s", name, shell.Strerror(err))
			status = 1
			continue
		}
		format := last(opts, 'c')
		if format == "" {
			format = "  File: %n\n  Size: %s\tBlocks: %b\tIO Block: 131072 %F\nAccess: (%a/%A)  Uid: (    0/    root)   Gid: (    0/    root)\nModify: %y"
		}
		kind := "regular file"
		switch {
		case i.IsDir():
			kind = "directory"
		case i.Link != "":
			kind = "symbolic link"
		case i.Size == 0 && i.Mode.IsRegular():
			kind = "regular empty file"
		}
		fmt.Fprintln(p.Out, strings.NewReplacer(
			"%n", name, "%s", strconv.FormatInt(i.Size, 10), "%b", strconv.FormatInt(i.Used/512, 10), "%B", "512",
			"%Y", strconv.FormatInt(i.ModTime.Unix(), 10), "%y", i.ModTime.UTC().Format("2006-01-02 15:04:05.000000000 -0700"),
			"%F", kind, "%a", strconv.FormatInt(int64(i.Mode.Perm()), 8), "%A", modeString(i.Mode), "%U", "root", "%u", "0", "%%", "%",
		).Replace(format))
	}
	return status
}

func (b *Box) readlink(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "fn")
	if !ok || len(rest) == 0 {
		return 1
	}
	for _, name := range rest {
		if opts['f'] == nil && path.Base(p.Args[0]) == "readlink" {
			i, err := b.fs.Lstat(p.Path(name))
			if err != nil || i.Link == "" {
				return 1
			}
			fmt.Fprintln(p.Out, i.Link)
			continue
		}
		real, err := b.fs.RealPath(p.Path(name))
		if errors.Is(err, syscall.ENOENT) { // the last part may be missing
			var dir string
			if dir, err = b.fs.RealPath(path.Dir(p.Path(name))); err == nil {
				real = path.Join(dir, path.Base(name))
			}
		}
		if err != nil {
			return 1
		}
		fmt.Fprintln(p.Out, real)
	}
	return 0
}

func (b *Box) mkdir(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "pm:")
	if !ok {
		return 1
	}
	status := 0
	for _, name := range rest {
		if err := b.makeDir(p.Path(name), opts['p'] != nil); err != nil {
			p.Errorf("can't create directory '%s': %s", name, shell.Strerror(err))
			status = 1
		}
	}
	return status
}

func (b *Box) makeDir(name string, parents bool) error {
	if !parents {
		return b.fs.Mkdir(name)
	}
	if i, err := b.fs.Stat(name); err == nil {
		if i.IsDir() {
			return nil
		}
		return syscall.EEXIST
	}
	if up := path.Dir(name); up != name {
		if err := b.makeDir(up, true); err != nil {
			return err
		}
	}
	return b.fs.Mkdir(name)
}

func (b *Box) rmdir(_ context.Context, p *shell.Proc) int {
	status := 0
	for _, name := range p.Args[1:] {
		i, err := b.fs.Stat(p.Path(name))
		if err == nil && !i.IsDir() {
			err = syscall.ENOTDIR
		}
		if err == nil {
			err = b.fs.Remove(p.Path(name))
		}
		if err != nil {
			p.Errorf("'%s': %s", name, shell.Strerror(err))
			status = 1
		}
	}
	return status
}

func (b *Box) rm(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "rRfi")
	if !ok {
		return 1
	}
	deep, force := opts['r'] != nil || opts['R'] != nil, opts['f'] != nil
	status := 0
	for _, name := range rest {
		i, err := b.fs.Lstat(p.Path(name))
		switch {
		case err != nil && force && errors.Is(err, syscall.ENOENT):
			continue
		case err == nil && i.IsDir() && !deep:
			p.Errorf("'%s' is a directory", name)
			status = 1
			continue
		case err == nil:
			err = b.remove(ctx, p.Path(name), i)
		}
		if err != nil {
			p.Errorf("can't remove '%s': %s", name, shell.Strerror(err))
			status = 1
		}
	}
	return status
}

// remove deletes file by file, as rm does: what cannot go stays, and the rest
// is gone.
func (b *Box) remove(ctx context.Context, name string, i hostfs.Info) error {
	if ctx.Err() != nil {
		return syscall.EINTR
	}
	var failed error
	if i.IsDir() {
		list, err := b.fs.List(name)
		if err != nil {
			return err
		}
		for _, in := range list {
			if err := b.remove(ctx, path.Join(name, in.Name), in); err != nil && failed == nil {
				failed = err
			}
		}
	}
	if failed != nil {
		return failed
	}
	return b.fs.Remove(name)
}

// target is where an operand goes: into a directory, or to a name.
func (b *Box) target(to, from string) string {
	if i, err := b.fs.Stat(to); err == nil && i.IsDir() {
		return path.Join(to, path.Base(from))
	}
	return to
}

func (b *Box) mv(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "fn")
	if !ok || len(rest) < 2 {
		p.Errorf("missing operand")
		return 1
	}
	to := p.Path(rest[len(rest)-1])
	if i, err := b.fs.Stat(to); len(rest) > 2 && (err != nil || !i.IsDir()) {
		p.Errorf("target '%s' is not a directory", rest[len(rest)-1])
		return 1
	}
	status := 0
	for _, name := range rest[:len(rest)-1] {
		from, dst := p.Path(name), b.target(to, p.Path(name))
		if _, err := b.fs.Stat(dst); err == nil && opts['n'] != nil {
			continue
		}
		err := b.fs.Rename(from, dst)
		if errors.Is(err, syscall.EXDEV) {
			if err = b.copyTree(ctx, from, dst, true); err == nil {
				var i hostfs.Info
				if i, err = b.fs.Lstat(from); err == nil {
					err = b.remove(ctx, from, i)
				}
			}
		}
		if err != nil {
			p.Errorf("can't rename '%s': %s", name, shell.Strerror(err))
			status = 1
		}
	}
	return status
}

func (b *Box) cp(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "rRpafn")
	if !ok || len(rest) < 2 {
		p.Errorf("missing operand")
		return 1
	}
	deep := opts['r'] != nil || opts['R'] != nil || opts['a'] != nil
	to := p.Path(rest[len(rest)-1])
	status := 0
	for _, name := range rest[:len(rest)-1] {
		if err := b.copyTree(ctx, p.Path(name), b.target(to, p.Path(name)), deep); err != nil {
			p.Errorf("can't copy '%s': %s", name, shell.Strerror(err))
			status = 1
		}
	}
	return status
}

func (b *Box) copyTree(ctx context.Context, from, to string, deep bool) error {
	i, err := b.fs.Stat(from)
	if err != nil {
		return err
	}
	if i.IsDir() {
		if !deep {
			return syscall.EISDIR
		}
		if strings.HasPrefix(to+"/", from+"/") {
			return syscall.EINVAL
		}
		if err := b.makeDir(to, true); err != nil {
			return err
		}
		list, err := b.fs.List(from)
		if err != nil {
			return err
		}
		for _, in := range list {
			if err := b.copyTree(ctx, path.Join(from, in.Name), path.Join(to, in.Name), true); err != nil {
				return err
			}
		}
		return nil
	}
	src, err := b.fs.Open(from, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := b.fs.Open(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	return errors.Join(copyFile(ctx, dst, src), dst.Close())
}

func (b *Box) touch(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "cm")
	if !ok {
		return 1
	}
	status := 0
	for _, name := range rest {
		flag := os.O_WRONLY | os.O_CREATE
		if opts['c'] != nil {
			flag = os.O_WRONLY
		}
		if i, err := b.fs.Stat(p.Path(name)); err == nil && i.IsDir() {
			continue
		}
		f, err := b.fs.Open(p.Path(name), flag)
		if err != nil {
			if opts['c'] == nil {
				p.Errorf("%s: %s", name, shell.Strerror(err))
				status = 1
			}
			continue
		}
		f.Close()
	}
	return status
}

func (b *Box) chmod(_ context.Context, p *shell.Proc) int {
	_, rest, ok := flags(p, "R")
	if !ok || len(rest) < 2 {
		return 1
	}
	mode, err := strconv.ParseUint(rest[0], 8, 12)
	if err != nil && rest[0] != "+x" && rest[0] != "a+x" && rest[0] != "u+x" {
		p.Errorf("invalid mode '%s'", rest[0])
		return 1
	}
	if err != nil {
		mode = 0o755
	}
	status := 0
	for _, name := range rest[1:] {
		if err := b.fs.Chmod(p.Path(name), fs.FileMode(mode)); err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			status = 1
		}
	}
	return status
}

func (b *Box) tee(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "a")
	if !ok {
		return 1
	}
	flag := os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	if opts['a'] != nil {
		flag = os.O_WRONLY | os.O_CREATE | os.O_APPEND
	}
	w := []io.Writer{p.Out}
	for _, name := range rest {
		f, err := b.fs.Open(p.Path(name), flag)
		if err != nil {
			p.Errorf("%s: %s", name, shell.Strerror(err))
			return 1
		}
		defer f.Close()
		w = append(w, f)
	}
	if err := copyFile(ctx, io.MultiWriter(w...), p.In); err != nil {
		p.Errorf("%s", shell.Strerror(err))
		return 1
	}
	return 0
}
