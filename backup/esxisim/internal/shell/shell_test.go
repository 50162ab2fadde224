package shell

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a host with files in a map and a handful of commands.
type fake struct {
	mu    sync.Mutex
	files map[string]string
	wg    sync.WaitGroup
	ctx   context.Context // of what runs in the background
}

func newFake() *fake {
	return &fake{files: map[string]string{"/d/a.vmx": "", "/d/b.vmx": "", "/d/c d.txt": "", "/d/.hidden": "", "/lib.sh": "fromlib() { echo lib $1; }\n"}}
}

type fakeFile struct {
	f    *fake
	name string
	r    io.Reader
}

func (f *fakeFile) Read(p []byte) (int, error) { return f.r.Read(p) }

func (f *fakeFile) Write(p []byte) (int, error) {
	f.f.mu.Lock()
	defer f.f.mu.Unlock()
	f.f.files[f.name] += string(p)
	return len(p), nil
}

func (f *fakeFile) Close() error { return nil }

func (f *fake) Open(name string, flag int) (File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	text, ok := f.files[name]
	if !ok && flag&os.O_CREATE == 0 || strings.HasPrefix(name, "/none/") {
		return nil, syscall.ENOENT
	}
	if name == "/full" {
		return nil, syscall.ENOSPC
	}
	if flag&os.O_TRUNC != 0 || !ok {
		f.files[name] = ""
	}
	return &fakeFile{f, name, strings.NewReader(text)}, nil
}

func (f *fake) List(dir string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for name := range f.files {
		rest, ok := strings.CutPrefix(name, strings.TrimSuffix(dir, "/")+"/")
		if first, _, _ := strings.Cut(rest, "/"); ok && !slices.Contains(names, first) {
			names = append(names, first)
		}
	}
	if names == nil {
		return nil, fs.ErrNotExist
	}
	return names, nil
}

func (f *fake) IsDir(dir string) bool { _, err := f.List(dir); return err == nil }

func (f *fake) Background(string) (context.Context, int, func()) {
	f.wg.Add(1)
	if f.ctx != nil {
		return f.ctx, 77, f.wg.Done
	}
	return context.Background(), 77, f.wg.Done
}

func (f *fake) Find(name string) Command {
	switch path.Base(name) {
	case "echo":
		return func(_ context.Context, p *Proc) int {
			fmt.Fprintln(p.Out, strings.Join(p.Args[1:], " "))
			return 0
		}
	case "args":
		return func(_ context.Context, p *Proc) int {
			fmt.Fprintf(p.Out, "%q\n", p.Args[1:])
			return 0
		}
	case "env":
		return func(_ context.Context, p *Proc) int {
			fmt.Fprintln(p.Out, strings.Join(p.Shell.Environment(), " "))
			return 0
		}
	case "true":
		return func(context.Context, *Proc) int { return 0 }
	case "false":
		return func(context.Context, *Proc) int { return 1 }
	case "status":
		return func(_ context.Context, p *Proc) int { return len(p.Args[1]) }
	case "cat":
		return func(_ context.Context, p *Proc) int { _, err := io.Copy(p.Out, p.In); return len(fmt.Sprint(err)) - 5 }
	case "yes":
		return func(_ context.Context, p *Proc) int {
			for {
				if _, err := fmt.Fprintln(p.Out, "y"); err != nil {
					return 141
				}
			}
		}
	case "first":
		return func(_ context.Context, p *Proc) int {
			line, _ := readLine(p.In)
			io.WriteString(p.Out, line)
			return 0
		}
	case "warn":
		return func(_ context.Context, p *Proc) int { fmt.Fprintln(p.Err, "warning"); return 0 }
	}
	return nil
}

func TestScripts(t *testing.T) {
	for _, c := range []struct{ script, out, errs string }{
		{`args a "b c" 'd  $x' e\ f "" ''`, `["a" "b c" "d  $x" "e f" "" ""]`, ""},
		{`args 'a'\''; rm -rf x; '\'''`, `["a'; rm -rf x; '"]`, ""},
		{"args 'two\nlines' \"$(echo x)\" `echo \\`echo y\\``", `["two\nlines" "x" "y"]`, ""},
		{`x="1 2"; args $x "$x" '$x' ${x}3 "${x}3"`, `["1" "2" "1 2" "$x" "1" "23" "1 23"]`, ""},
		{`x=; args $x "$x" a$x`, `["" "a"]`, ""},
		{`args ${u:-d e} "${u:-d e}" ${u-z} ${u:+no} [${x:=5}] $x`, `["d" "e" "d e" "z" "[5]" "5"]`, ""},
		{`f=/a/b/c.tar.gz; args ${f##*/} ${f#*/} ${f%.*} ${f%%.*} ${#f}`, `["c.tar.gz" "a/b/c.tar.gz" "/a/b/c.tar" "/a/b/c" "13"]`, ""},
		{`set -- a "b c"; args $# "$@" $* "$*" x"$@"y; shift; args "$@"`, `["2" "a" "b c" "a" "b" "c" "a b c" "xa" "b cy"]` + "\n" + `["b c"]`, ""},
		{`set --; args "$@" z`, `["z"]`, ""},
		{`args $((1+2*3)) $(( (1+2)*3 )) $((7/2)) $((-7%3)) $((1<<20)) $((3>2&&0)) $((0x10))`, `["7" "9" "3" "-1" "1048576" "0" "16"]`, ""},
		{`i=3; while [ $i -gt 0 ]; do :; i=0; done`, "", "sh: [: not found"},
		{`cd /d; args *.vmx *.none "*.vmx" c*; args /d/?.v[a-m]x`, `["a.vmx" "b.vmx" "*.none" "*.vmx" "c d.txt"]` + "\n" + `["/d/a.vmx" "/d/b.vmx"]`, ""},
		{`true && echo a || echo b; false && echo c || echo d; ! false && echo e`, "a\nd\ne", ""},
		{`false; echo $?; (exit 7); echo $?; status xyz; echo $?`, "1\n7\n3", ""},
		{`none; echo $?; /none/x; echo $?; /d; echo $?`, "127\n127\n126", "sh: none: not found\nsh: /none/x: not found\nsh: /d: Permission denied"},
		{`command -v echo`, "", "sh: command: not found"},
		{`if false; then echo 1; elif true; then echo 2; else echo 3; fi`, "2", ""},
		{`for x in a b c; do if status $x; then echo; fi; case $x in b) continue;; esac; echo $x; done`, "a\nc", ""},
		{`for x in 1 2; do for y in 1 2; do break 2; done; echo no; done; echo end`, "end", ""},
		{`n=0; until false; do n=$((n+1)); case $n in 5) break;; esac; done; echo $n`, "5", ""},
		{`case "a b" in a) echo 1;; [a-c]\ *|z) echo 2;; *) echo 3;; esac`, "2", ""},
		{`f() { local x=2; echo $x $1; return 3; }; x=1; f a; echo $? $x`, "2 a\n3 1", ""},
		{`echo hi | cat | cat; yes | first`, "hi\ny", ""},
		{`warn 2>&1 | cat; warn 2>/dev/null`, "warning", ""},
		{`echo out >/f; echo more >>/f; cat </f; cat <<E; cat <<'E'` + "\n$((1+1)) `echo q`\nE\n$x\nE\n", "out\nmore\n2 q\n$x", ""},
		{"cat <<-E\n\t\tdeep\n\tE\n", "deep", ""},
		{`cat </missing; echo x >/none/x; echo x >/full`, "", "sh: can't open /missing: no such file\nsh: can't create /none/x: nonexistent directory\nsh: can't create /full: No space left on device"},
		{`{ echo a; echo b; } | cat; ( cd /d; pwd ); pwd`, "a\nb\n/d\n/", ""},
		{`A=1 env; A=2; env; export A; env; unset A; env`, "A=1\n\nA=2\n", ""},
		{`echo 'one two three' | while read a b; do echo "[$a][$b]"; done`, "[one][two three]", ""},
		{`IFS=:; x=a:b; args $x`, `["a" "b"]`, ""},
		{`set -e; false; echo never`, "", ""},
		{`set -u; echo $nope; echo never`, "", "sh: nope: parameter not set"},
		{`eval 'echo "$((2))"'; . /lib.sh; fromlib z; type echo cd none`, "2\nlib z\necho is echo\ncd is a shell builtin", "none: not found"},
		{"# a comment\necho a # not this\necho b#c \\\nd", "a\nb#c d", ""},
		{`echo $$ ${1:-none} $0; echo "$(exit 4)$?"`, "1 none sh\n4", ""},
		{`echo a; exit 9; echo b`, "a", ""},
		{`x=$(false); echo $?; y=$(echo a; false) || echo failed $y`, "1\nfailed a", ""},
		{`echo bg & wait; echo $!`, "bg\n77", ""},
		{`exec echo last; echo never`, "last", ""},
		{`f() { f; }; f`, "", "sh: f: functions too deep"},
	} {
		h := newFake()
		h.files["/dev/null"] = ""
		var out, errs bytes.Buffer
		s := New(h, "/", nil)
		s.Run(t.Context(), c.script, strings.NewReader(""), &out, &errs)
		h.wg.Wait()
		if got := strings.TrimSuffix(out.String(), "\n"); got != c.out || strings.TrimSpace(errs.String()) != c.errs {
			t.Errorf("%s\n%s\n--- want\n%s\n--- errors\n%s--- want\n%s", c.script, got, c.out, errs.String(), c.errs)
		}
	}
}

func TestWrongScripts(t *testing.T) {
	for _, script := range []string{
		"echo 'a", `echo "a`, "if true; then", "fi", "for x in", "echo $(", "echo ${x", "a | ", "&& b", "case x in", "cat <<E\nx", "(", ")", "{ a;", "echo ${}", "a;;b", "for 1 in a; do :; done",
		strings.Repeat("(", 500), strings.Repeat("$(", 500), strings.Repeat("{ ", 500),
	} {
		var out, errs bytes.Buffer
		if status := New(newFake(), "/", nil).Run(t.Context(), script, strings.NewReader(""), &out, &errs); status != StatusMisuse || !strings.HasPrefix(errs.String(), "sh: syntax error") {
			t.Errorf("%.40q: status %d, %s", script, status, errs.String())
		}
	}
}

func TestInteractiveReadsNoFurtherThanACommand(t *testing.T) {
	var out, errs bytes.Buffer
	in := strings.NewReader("x=$(first)\nfor the variable\nif true\nthen echo \"[$x]\"\nfi\nfirst\nrest of the line\ncat\nall\nthat is left\n")
	if status := New(newFake(), "/", nil).Interactive(t.Context(), in, &out, &errs, nil); status != 0 {
		t.Error(status)
	}
	if want := "[for the variable]\nrest of the line\nall\nthat is left\n"; out.String() != want || errs.Len() > 0 {
		t.Errorf("%q, %q", out.String(), errs.String())
	}
	if status := New(newFake(), "/", nil).Interactive(t.Context(), strings.NewReader("echo a\nstatus four"), &out, &errs, nil); status != 4 {
		t.Error("without the last newline:", status)
	}
}

func TestCancelledScriptEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if status := New(newFake(), "/", nil).Run(ctx, "while true; do true; done", strings.NewReader(""), io.Discard, io.Discard); status != StatusKilled {
		t.Error(status)
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pat, s string
		want   bool
	}{
		{"", "", true},
		{"*", "", true},
		{"a*b*c", "aXbYbZc", true},
		{"a*b*c", "aXbYbZ", false},
		{"?", "é", true},
		{"[!a]", "b", true},
		{"[]]", "]", true},
		{"[a", "[a", true},
		{`\*`, "*", true},
		{`\*`, "x", false},
		{"[[:digit:]]x", "7x", true},
		{strings.Repeat("*a", 500), strings.Repeat("a", 5000) + "b", false},
	} {
		if Match(c.pat, c.s) != c.want {
			t.Errorf("%.20q %.20q", c.pat, c.s)
		}
	}
}

// FuzzRun: no script may crash the shell or keep it from ending.
func FuzzRun(f *testing.F) {
	for _, s := range []string{
		`a "b $c" '$d' $(e) ${f:-g} | h && i || j; k & l`, "if a; then b; elif c; then d; else e; fi", "for x in 1 2; do echo $x; done",
		"case a in b|c) d;; *) e;; esac", "cat <<E\n$x `y`\nE\n", "f() { g; }; f", "echo $((1+(2<<3)%4))", "x=1 y= z >a 2>&1 <b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, script string) {
		if len(script) > 2000 {
			return
		}
		if _, err := parse(script); err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200_000_000)
		defer cancel()
		h := newFake()
		h.ctx = ctx
		s := New(h, "/", nil)
		s.Run(ctx, script, strings.NewReader("in\n"), io.Discard, io.Discard)
		s.Wait()
	})
}
