package esxisim

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestShellAgreesWithTheSystems runs scripts in the simulated host and in the
// machine's own shell, and compares what they print and how they end.
func TestShellAgreesWithTheSystems(t *testing.T) {
	bin := judge(t, "sh")
	h := sshHost(t, Options{})
	c := dial(t, h)
	local := t.TempDir()
	files := map[string]string{
		"a.txt":   "one\ntwo words\nthree\n\nfive five\n",
		"b c.txt": "x,y,z\n1,2,3\nno delimiter\n",
		"n.txt":   "10\n9\n100\n-5\n9\n",
		"last":    "no end",
		"script":  "echo \"script $1 $#\"; return 0 2>/dev/null; exit 4\n",
	}
	want(t, c, "mkdir /vmfs/volumes/datastore1/d")
	for name, text := range files {
		must(t, os.WriteFile(filepath.Join(local, name), []byte(text), 0o600))
		want(t, c, "cat >'/vmfs/volumes/datastore1/d/"+name+"'", text)
	}
	for _, script := range []string{
		`echo a  b "c  d" 'e $x' f\ g; echo; echo -n no end`,
		`printf '%s|%5d|%-4s|%03d|%x\n' a 42 b 7 255 c 1 d 2 3; printf '%b%%\n' 'a\tb\n'; printf 'x\n'`,
		`x="a b"; for i in $x "$x"; do echo "[$i]"; done; set -- 1 "2 3"; for i; do echo $i; done; echo $# "$@"`,
		`f=/a/b.c/d.tar.gz; echo ${f##*/} ${f%/*} ${f%%.*} ${f#*.} ${#f} ${none:-default} ${none:+set} "${f:+is set}"`,
		`echo $((3*(4+5)%7)) $((1<<10|3)) $((5>3&&2<1)) $((-7/2)); i=0; while [ $i -lt 3 ]; do i=$((i+1)); echo $i; done`,
		`case foo.vmdk in *-flat.vmdk) echo flat;; *.vmdk|*.vmx) echo disk;; *) echo other;; esac`,
		`f() { local y=2; echo "$1 $y"; return 5; }; y=1; f x; echo $? $y; f() ( exit 6 ); f; echo $?`,
		`if test -f a.txt && [ ! -d a.txt ] && [ -s a.txt ] && [ -d . ]; then echo yes; else echo no; fi; [ a = b ] || [ 3 -gt 2 ] && echo t; test; echo $?; [ "" ]; echo $?; [ ! "" ]; echo $?`,
		`[ -e none ]; echo $?; [ -n "" -o -z "" ]; echo $?; [ 1 -eq 1 -a a != b ]; echo $?; [ \( 1 = 2 \) -o 3 = 3 ]; echo $?`,
		`cat a.txt | grep five; grep -c o a.txt; grep -n '^t' a.txt; grep -v e a.txt; grep -i TWO a.txt; grep -q none a.txt; echo $?; grep -E 'one|five+' a.txt; grep -o 'w[a-z]*' a.txt; grep -x three a.txt; grep -l one *.txt; grep -F 'e.' a.txt; echo $?`,
		`sed -n 2p a.txt; sed 's/o/0/' a.txt; sed 's/e/E/g;/^$/d' a.txt; sed -n '/two/,/five/p' a.txt; sed -e 's/\(t\)\(w\)/\2\1/' a.txt; sed '$d' a.txt; sed 's|one|a/b|' a.txt; sed -n '$p' a.txt; sed 2q a.txt; sed -E 's/(f)(i)/[\2\1]&/g' a.txt; sed '2!d' a.txt`,
		`cut -d, -f1,3 'b c.txt'; cut -d, -f2- 'b c.txt'; cut -c2-3 a.txt; cut -s -d, -f1 'b c.txt'`,
		`sort n.txt; sort -n n.txt; sort -rn n.txt; sort -u n.txt; sort n.txt | uniq; sort n.txt | uniq -c | sed 's/^ *//'; sort n.txt | uniq -d`,
		`tr a-z A-Z <a.txt; tr -d 'aeiou\n' <a.txt; echo; echo aabbcc | tr -s b; echo 'a b' | tr ' ' '\n'`,
		`head -n 2 a.txt; tail -n 2 a.txt; head -1 a.txt; tail -n +4 a.txt; head -c 5 a.txt; echo; tail -c 5 a.txt; tail -1 last`,
		`wc -l <a.txt; wc -c <a.txt; wc -w <a.txt; cat last | wc -l`,
		`basename /a/b/c.vmx .vmx; basename c; dirname /a/b/c; dirname c; dirname /c`,
		`seq 3; seq 2 4; seq 5 -2 1; expr 3 + 4; expr 10 / 3; expr a = b; echo $?; expr abc : 'a\(.\)c'`,
		`echo hello | md5sum; echo hello | sha1sum; echo hello | sha256sum; sha256sum a.txt; sha1sum a.txt >sums; sha1sum -c sums; rm sums`,
		`dd if=a.txt bs=4 skip=1 count=2 2>/dev/null; echo; printf 0123456789 >o; printf XY | dd of=o bs=1 seek=3 conv=notrunc 2>/dev/null; cat o; echo; printf AB | dd of=o bs=2 seek=1 2>/dev/null; cat o; echo; dd if=none of=x 2>/dev/null; echo $?; rm o`,
		`echo 1 >w; echo 2 >>w; cat w; cat <w; { echo a; echo b >&2; } >w 2>&1; cat w; echo err 2>/dev/null >&2; rm w; cat w 2>/dev/null; echo $?`,
		"cat <<END\n$((1+1)) `echo sub` \\$x\nEND\ncat <<'END'\n$x `y`\nEND\n",
		`mkdir -p p/q/r && touch p/q/f && cp -r p p2 && mv p2/q/f p2/g && find p2 | sort; find . -name '*.txt' -type f | sort; find p2 -maxdepth 1 | sort; rm -r p p2; ls`,
		`ls *.txt; for f in *.none; do echo "$f"; done; echo [ab]*; echo "*.txt"; ls none 2>/dev/null || echo failed`,
		`mkdir m; mkdir m 2>/dev/null; echo $?; mkdir -p m; echo $?; touch m/x; rmdir m 2>/dev/null; echo $?; rm m 2>/dev/null; echo $?; rm -f none; echo $?; rm none 2>/dev/null; echo $?; rm -rf m; mv none x 2>/dev/null; echo $?; cp none x 2>/dev/null; echo $?`,
		`a=$(cat a.txt); echo $a; echo "$a"; b=` + "`echo \"a b\"`" + `; echo $b; echo "$(echo "in \"quotes\"")"`,
		`echo 'a:b c:d' | while IFS=: read x y z; do echo "$x-$y-$z"; done; printf 'l1\nl2' | while read -r l; do echo "[$l]"; done; printf '%s\n' 'back\slash' | { read -r x; echo "$x"; }`,
		`true && false || echo c; ! true; echo $?; (exit 3) || echo $?; { false; true; } && echo g; false | true; echo $?`,
		`sh -c 'echo "$0 $1 $#"' name a b; sh script x y; echo $?; sh -c 'exit 9'; echo $?; . ./script 2>/dev/null; echo $?; sh -s a b <<'E'
echo "$# $2"
E`,
		`set -e; echo a; false; echo never`,
		`set -u; echo "${none-ok}"; (echo $none) 2>/dev/null; echo after`,
		`trap 'echo never' HUP; eval "x='a b'"; echo "$x"; unset x; echo "[$x]"; export E=1; sh -c 'echo $E'; F=2 sh -c 'echo $F'; echo "[$F]"`,
		`echo a b c | xargs -n 1 echo x; printf 'a\0b c\0' | xargs -0 -n 1 echo; env A=1 sh -c 'echo $A'`,
		`yes_() { while true; do echo y; done; }; yes_ | head -n 2; echo ok`,
		`echo one >x; cmp x x; echo $?; echo two >y; cmp -s x y; echo $?; rm x y; test -x script; echo $?`,
		`for i in 1 2 3; do for j in a b; do [ $j = b ] && continue 2; [ $i = 3 ] && break 2; echo $i$j; done; done; echo end`,
		`gzip -c a.txt | gzip -dc; gzip -c <a.txt | zcat | head -n 1; hexdump -C last`,
		`cd ..; pwd >/dev/null; cd - >/dev/null; ls a.txt; (cd / && pwd); x=$(cd /tmp; pwd); echo $x`,
	} {
		if strings.Contains(script, "hexdump") {
			if _, err := exec.LookPath("hexdump"); err != nil {
				script = strings.ReplaceAll(script, "hexdump -C last", "true")
			}
		}
		cmd := exec.CommandContext(t.Context(), bin, "-c", script)
		var out bytes.Buffer
		cmd.Dir, cmd.Stdout, cmd.Stdin = local, &out, strings.NewReader("")
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
		_ = cmd.Run() // the status tells
		got, errs, status := sh(t, c, "cd /vmfs/volumes/datastore1/d || exit 99; "+script)
		if got != out.String() || status != cmd.ProcessState.ExitCode() {
			t.Errorf("%s\nstatus %d\n%s%s--- the system's: status %d\n%s", script, status, got, errs, cmd.ProcessState.ExitCode(), out.String())
		}
	}
}
