package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ready is the line serve prints.
type ready struct {
	Address      string   `json:"address"`
	Thumbprint   string   `json:"thumbprint"`
	User         string   `json:"user"`
	PasswordFile string   `json:"password_file"`
	Control      string   `json:"control"`
	Edition      string   `json:"edition"`
	SSH          string   `json:"ssh"`
	Fingerprint  string   `json:"ssh_fingerprint"`
	VMs          []string `json:"vms"`
}

// serve runs a host as the program does, until the test ends or stop is called.
func serve(t *testing.T, args ...string) (line ready, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	pr, pw := io.Pipe()
	done := make(chan int, 1)
	var errs bytes.Buffer
	go func() {
		code := run(ctx, append([]string{"serve"}, args...), nil, pw, &errs)
		pw.Close()
		done <- code
	}()
	if err := json.NewDecoder(pr).Decode(&line); err != nil {
		cancel()
		t.Fatalf("%v; exit code %d\n%s", err, <-done, &errs)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if code := <-done; code != 0 {
			t.Errorf("serve: exit code %d\n%s", code, &errs)
		}
	}
	t.Cleanup(stop)
	return line, stop
}

// cli runs a command.
func cli(t *testing.T, want int, in io.Reader, args ...string) (out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	if code := run(t.Context(), args, in, &o, &e); code != want {
		t.Errorf("esxisim %s: exit code %d, not %d\n%s", strings.Join(args, " "), code, want, &e)
	}
	return o.String(), e.String()
}

func rawImage(t *testing.T, dir, name string, size int64, at map[int64][]byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(size)
	}
	for off, p := range at {
		if err == nil {
			_, err = f.WriteAt(p, off)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return path
}

func noise(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}

func TestTheWholeProgram(t *testing.T) {
	dir := t.TempDir()
	const size = 8 << 20
	first := noise(100_000)
	d0 := rawImage(t, dir, "d0.raw", size, map[int64][]byte{1 << 20: first})
	d1 := rawImage(t, dir, "d1.raw", size, map[int64][]byte{1 << 20: first, 4 << 20: noise(70_000)})
	ds := filepath.Join(dir, "ds")
	line, stop := serve(t, "--datastore", ds, "--vm", "web01="+d0+","+d1, "--vm", "db="+d1, "--space", "2G")
	if line.Address == "" || line.Thumbprint == "" || line.User != "root" || len(line.VMs) != 2 {
		t.Errorf("ready: %+v", line)
	}
	for _, name := range []string{line.PasswordFile, line.Control} {
		fi, err := os.Stat(name)
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, fi.Mode(), err)
		}
	}
	password, err := os.ReadFile(line.PasswordFile)
	if err != nil || len(password) < 20 {
		t.Errorf("password: %d bytes, %v", len(password), err)
	}
	t.Setenv("ESXISIM_CONTROL", line.Control)

	read := func(vm, disk string) []byte {
		t.Helper()
		f, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var errs bytes.Buffer
		if code := run(t.Context(), []string{"read", vm, disk}, nil, f, &errs); code != 0 {
			t.Fatalf("read: %d\n%s", code, &errs)
		}
		sparse, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		if plain, _ := cli(t, 0, nil, "read", vm, disk); plain != string(sparse) {
			t.Error("a pipe gets other bytes than a file")
		}
		return sparse
	}
	want, err := os.ReadFile(d0)
	if err != nil {
		t.Fatal(err)
	}
	if got := read("web01", "0"); !bytes.Equal(got, want) {
		t.Error("the guest does not see the image")
	}
	p := noise(1_500_000)
	if out, _ := cli(t, 0, bytes.NewReader(p), "write", "web01", "0", "333"); out != "{\"written\":1500000}\n" {
		t.Error(out)
	}
	copy(want[333:], p)
	if got := read("web01", "0"); !bytes.Equal(got, want) {
		t.Error("the guest does not see what it wrote")
	}
	out, _ := cli(t, 0, nil, "become", "db", "0", d0)
	var become struct {
		Changed int64 `json:"bytes_changed"`
	}
	if err := json.Unmarshal([]byte(out), &become); err != nil || become.Changed != 2*65536 {
		t.Errorf("%v: %s", err, out)
	}
	orig, err := os.ReadFile(d0)
	if err != nil || !bytes.Equal(read("db", "0"), orig) {
		t.Error("it became something else", err)
	}

	for _, f := range [][]string{
		{"drop", "--after", "1M", "--count", "2", "--verb", "GET"},
		{"busy", "--count", "3"},
		{"call", "CreateSnapshot_Task", "--fault", "TaskInProgress", "--delay", "1s"},
		{"space", "10M"},
		{"lie", "web01", "0"},
		{"lie"},
		{"expire"},
		{"clear"},
	} {
		cli(t, 0, nil, append([]string{"fault"}, f...)...)
	}
	out, _ = cli(t, 0, nil, "stats", "--reset")
	var stats map[string]map[string]int64
	if err := json.Unmarshal([]byte(out), &stats); err != nil || len(stats) != 3 || stats["folder"]["bytes_out"] != 0 {
		t.Errorf("%v: %s", err, out)
	}

	for _, c := range []struct {
		code int
		args []string
		text string
	}{
		{2, []string{"nonsense"}, "there is no command"},
		{2, []string{"read", "web01"}, "accepts 2 arg"},
		{2, []string{"serve", "--bogus"}, "unknown flag"},
		{2, []string{"serve"}, "--datastore"},
		{2, []string{"serve", "--datastore", ds, "--vm", "x"}, "NAME=disk0.raw"},
		{2, []string{"serve", "--datastore", ds, "--space", "lots"}, "no size"},
		{1, []string{"serve", "--datastore", ds}, "served by another"},
		{1, []string{"read", "none", "0"}, `no VM called "none"`},
		{1, []string{"read", "web01", "2"}, "no disk 2"},
		{1, []string{"write", "web01", "0", "8388607"}, "outside the disk"},
		{1, []string{"become", "web01", "0", filepath.Join(dir, "none.raw")}, "none.raw"},
		{1, []string{"fault", "call", "X", "--fault", "NoSuchFault"}, "NoSuchFault"},
		{1, []string{"stats", "--control", filepath.Join(dir, "none")}, "no simulated host listens"},
	} {
		if _, errs := cli(t, c.code, strings.NewReader("xx"), c.args...); !strings.Contains(errs, c.text) {
			t.Errorf("%v: %q lacks %q", c.args, errs, c.text)
		}
	}

	stop()
	if _, err := os.Stat(line.Control); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	cli(t, 1, nil, "stats")
	again, stop := serve(t, "--datastore", ds, "--vm", "web01="+d0)
	defer stop()
	if again.Thumbprint != line.Thumbprint || len(again.VMs) != 2 {
		t.Errorf("after the restart: %+v", again)
	}
	if got := read("web01", "0"); !bytes.Equal(got, want) {
		t.Error("the restart changed the disk")
	}
	now, err := os.ReadFile(again.PasswordFile)
	if err != nil || !bytes.Equal(now, password) {
		t.Error("the restart changed the password", err)
	}
}

func TestAFailedStartLeavesNoSocket(t *testing.T) {
	dir := t.TempDir()
	_, errs := cli(t, 1, nil, "serve", "--datastore", filepath.Join(dir, "ds"), "--vm", "x="+filepath.Join(dir, "none.raw"))
	if !strings.Contains(errs, "none.raw") {
		t.Error(errs)
	}
	if list, _ := filepath.Glob(filepath.Join(dir, "ds", "*")); len(list) != 1 { // the host's own directory
		t.Errorf("left: %v", list)
	}
	if _, err := os.Stat(filepath.Join(dir, "ds", ".esxisim", "control")); !os.IsNotExist(err) {
		t.Error("a socket is left")
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "17": 17, "1K": 1024, "3m": 3 << 20, "2G": 2 << 30, "1TiB": 1 << 40, "5kb": 5 << 10} {
		if got, err := parseSize(s); got != want || err != nil {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "K", "-1", "1.5G", "1X", "9999999T", "1 G", "0x10"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%s: %d", s, got)
		}
	}
}

func TestServeStopsWhileImporting(t *testing.T) {
	dir := t.TempDir()
	raw := rawImage(t, dir, "d.raw", 1<<20, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	if code := run(ctx, []string{"serve", "--datastore", filepath.Join(dir, "ds"), "--vm", "x=" + raw}, nil, &out, &errs); code != 1 || out.Len() != 0 {
		t.Errorf("exit code %d: %s%s", code, &out, &errs)
	}
}

func TestEditionsAndOwners(t *testing.T) {
	dir := t.TempDir()
	raw := rawImage(t, dir, "d.raw", 4<<20, map[int64][]byte{1 << 20: noise(100_000)})
	line, _ := serve(t, "--datastore", filepath.Join(dir, "ds"), "--vm", "vm="+raw, "--ssh", "127.0.0.1:0", "--edition", "6.7", "--free")
	if line.Edition != "6.7" || !strings.HasPrefix(line.Fingerprint, "SHA256:") || !strings.HasPrefix(line.SSH, "127.0.0.1:") {
		t.Errorf("ready: %+v", line)
	}
	t.Setenv("ESXISIM_CONTROL", line.Control)
	for _, args := range []string{
		"vm snapshot vm one", "vm revert vm one", "vm remove vm one", "vm grow vm 0 8M", "vm track vm off", "vm add-disk vm independent 1M",
		"vm add-disk vm rdm-physical 1M", "vm add-disk vm rdm-virtual 1M", "vm add-disk vm thick 1M", "vm power-on vm", "vm suspend vm", "vm power-on vm",
		"vm annotate vm note", "vm power-off vm", "vm track vm on", "vm strange-tracking vm", "vm snapshot vm two", "vm track-blind vm", "crash",
		"fault ssh-refuse", "fault ssh-drop --after 1M --command dd", "fault ssh-command snapshot.create --fault TaskInProgress", "fault ssh-hang --command vim-cmd --count -1", "fault clear",
	} {
		cli(t, 0, nil, strings.Fields(args)...)
	}
	for _, c := range []struct {
		code       int
		args, text string
	}{
		{2, "vm", "vm takes an action"},
		{2, "vm fly vm", "there is no action"},
		{2, "vm grow vm 0", "VM DISK SIZE"},
		{1, "vm grow vm 0 1M", "cannot grow"},
		{1, "vm revert vm none", "no snapshot called"},
		{1, "vm suspend vm", "powered off"},
		{1, "vm add-disk vm round 1M", "not \"round\""},
		{1, "fault ssh-command x --fault NoSuchFault", "NoSuchFault"},
		{1, "serve --datastore " + filepath.Join(dir, "other") + " --edition 5.5", "no edition"},
		{2, "serve --datastore " + filepath.Join(dir, "other") + " --ssh-password", "need --ssh"},
	} {
		if _, errs := cli(t, c.code, nil, strings.Fields(c.args)...); !strings.Contains(errs, c.text) {
			t.Errorf("%s: %q lacks %q", c.args, errs, c.text)
		}
	}
}
