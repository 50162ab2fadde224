package busybox

import (
	"bytes"
	"context"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/esxisim/internal/shell"
)

// host gives a shell the tools over an empty datastore.
type host struct {
	box *Box
	fs  *hostfs.FS
}

func newHost(t testing.TB) *host {
	t.Helper()
	h, err := hv.Open(t.Context(), hv.Options{Dir: t.TempDir(), Datastore: "datastore1", Capacity: 1 << 20, VMFS: 6, Clock: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	f, err := hostfs.New(h, filepath.Join(t.TempDir(), "root"), map[string]string{"/etc/motd": "hello\n", "/bin/dd": ""})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return &host{New(Options{FS: f, Clock: func() time.Time { return time.Unix(1e9, 0) }, Hostname: "h", Processes: func() []Process { return nil }}), f}
}

func (h *host) Find(name string) shell.Command {
	return h.box.Find(name[strings.LastIndexByte(name, '/')+1:])
}

func (h *host) Open(name string, flag int) (shell.File, error) { return h.fs.Open(name, flag) }

func (h *host) List(name string) ([]string, error) {
	list, err := h.fs.List(name)
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names, err
}

func (h *host) IsDir(name string) bool {
	i, err := h.fs.Stat(name)
	return err == nil && i.IsDir()
}

func (h *host) Background(string) (context.Context, int, func()) {
	return context.Background(), 1, func() {}
}

func (h *host) run(t testing.TB, script string) (string, int) {
	t.Helper()
	var out bytes.Buffer
	status := shell.New(h, "/", nil).Run(t.Context(), script, strings.NewReader("stdin\n"), &out, &out)
	return out.String(), status
}

// TestTools holds what the system's own tools print differently from a host's.
func TestTools(t *testing.T) {
	h := newHost(t)
	const ds = "/vmfs/volumes/datastore1"
	for _, c := range []struct {
		script, out string
		status      int
	}{
		{"readlink " + ds + "; readlink -f " + ds + "/x", "5e0026d9-a647150e-d8a8-4cedfb76e9d5\n/vmfs/volumes/5e0026d9-a647150e-d8a8-4cedfb76e9d5/x\n", 0},
		{"ls " + ds + "/.esxisim; cat " + ds + "/.esxisim/lock; cat " + ds + "/../datastore1/.esxisim/lock", "ls: " + ds + "/.esxisim: No such file or directory\ncat: can't open '" + ds + "/.esxisim/lock': No such file or directory\ncat: can't open '" + ds + "/../datastore1/.esxisim/lock': No such file or directory\n", 1},
		{"echo x >/vmfs/volumes/other/f", "sh: can't create /vmfs/volumes/other/f: nonexistent directory\n", 1},
		{"mkdir /vmfs/volumes/other", "mkdir: can't create directory '/vmfs/volumes/other': Operation not permitted\n", 1},
		{"cat /etc; mv /etc/motd " + ds + "/m && cat " + ds + "/m; ls /etc", "cat: can't open '/etc': Is a directory\nhello\n", 0},
		{"stat -c '%n %s %F %b' " + ds + "/m; stat -c %s none", ds + "/m 6 regular file 8\nstat: can't stat 'none': No such file or directory\n", 1},
		{"rm " + ds + "; rm -r " + ds, strings.Repeat("rm: can't remove '"+ds+"': Device or resource busy\n", 2), 1},
		{"dd if=/dev/zero of=" + ds + "/big bs=1M count=2 2>&1 | head -n 3; ls -l " + ds + "/big | cut -c1-10", "1+0 records in\n0+0 records out\ndd: error writing '" + ds + "/big': No space left on device\n-rw-------\n", 0},
		{"dd if=/etc/none of=x", "dd: can't open '/etc/none': No such file or directory\n", 1},
		{"dd if=/etc/motd iflag=skip_bytes", "dd: invalid argument 'skip_bytes' to 'iflag'\n", 1},
		{"dd if=/dev/zero bs=3 count=2 2>/dev/null | wc -c; dd if=/dev/zero of=/dev/null bs=1M count=3", "6\n3+0 records in\n3+0 records out\n3145728 bytes (3.0MB) copied, 0.000001 seconds, 2.9TB/s\n", 0},
		{"date; date +%s; date '+%Y-%m-%d %H:%M:%S'; hostname; uname", "Sun Sep  9 01:46:40 UTC 2001\n1000000000\n2001-09-09 01:46:40\nh\nVMkernel\n", 0},
		{"which dd none; ls -z", "/bin/dd\nls: invalid option -- 'z'\n", 1},
		{"sleep x; usleep 1; kill x; kill 5", "sleep: invalid number 'x'\nkill: bad pid 'x'\nkill: can't kill pid 5: No such process\n", 1},
	} {
		if out, status := h.run(t, c.script); out != c.out || status != c.status {
			t.Errorf("%s\nstatus %d\n%s--- not %d\n%s", c.script, status, out, c.status, c.out)
		}
	}
}

func FuzzOptions(f *testing.F) {
	for _, s := range []string{"if=a of=b bs=1M seek=2x3 conv=notrunc,sync", `s/\(a\)/\1&/gp;1,$d;/x/!p`, `%5d\n\x41\0101\c`, "[[:digit:]]*a\\{2\\}", "a-z[:upper:]"} {
		f.Add(s)
	}
	f.Fuzz(func(_ *testing.T, s string) {
		_, _ = parseDD(strings.Fields(s))
		_, _ = size(s)
		_, _ = parseSed(s, false)
		_, _ = parseSed(s, true)
		_, _ = unescape(s, false)
		_ = trSet(s)
		_, _ = regexp.Compile(basicRegexp(s))
	})
}
