package shell

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// sh is a real shell: what it makes of a command line is what counts.
func sh(t testing.TB) string {
	path, err := exec.LookPath("sh")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("sh is missing")
		}
		t.Skip("sh is missing")
	}
	return path
}

// echo has the shell print its arguments, each ended by a zero byte.
func echo(t testing.TB, words ...string) []string {
	t.Helper()
	line, err := Command(append([]string{"printf", `%s\0`}, words...)...)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(sh(t), "-c", line)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", line, err, out)
	}
	got := strings.Split(string(out), "\x00")
	left, err := os.ReadDir(cmd.Dir)
	if err != nil || len(left) != 0 {
		t.Errorf("%q left files: %v, %v", line, left, err)
	}
	return got[:len(got)-1]
}

var hostile = []string{
	"a'; touch x; '", `a"; touch x; "`, "$(touch x)", "`touch x`", "${HOME}", "~", "*", "?", "[a-z]*", "a\nb", "a\n'\ntouch x\n'",
	"\n", " ", "", "'", "''", `\`, `\'`, `'\''`, "a\\\nb", "-n", "--", "-rf", ">x", "<x", "|touch x", "& touch x &", "; touch x", "#x", "a #b",
	"!!", "{a,b}", "控え", "naïve — “x”", "\x01\x02\x7f", "\xff\xfe", "a\tb", "a\r\nb", "%s", `\0`, "x=y", "/vmfs/volumes/ds 1/a'b/c.vmx",
}

func TestEveryWordArrives(t *testing.T) {
	got := echo(t, hostile...)
	if len(got) != len(hostile) {
		t.Fatalf("%d words became %d", len(hostile), len(got))
	}
	for i, want := range hostile {
		if got[i] != want {
			t.Errorf("%q became %q", want, got[i])
		}
	}
}

func TestNUL(t *testing.T) {
	if _, err := Command("ls", "a\x00b"); !errors.Is(err, ErrNUL) {
		t.Errorf("a zero byte: %v", err)
	}
}

func TestReadable(t *testing.T) {
	if got, _ := Command("vim-cmd", "vmsvc/snapshot.get", "12"); got != "vim-cmd vmsvc/snapshot.get 12" {
		t.Error(got)
	}
}

func FuzzQuote(f *testing.F) {
	for _, s := range hostile {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if strings.IndexByte(s, 0) >= 0 {
			return
		}
		if got := echo(t, s, "end"); len(got) != 2 || got[0] != s || got[1] != "end" {
			t.Errorf("%q became %q", s, got)
		}
	})
}
