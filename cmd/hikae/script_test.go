package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"hikae/fs"
	"hikae/repo"
)

// The stories in testdata/script are what an operator does, one task a story,
// with this program as it is and the simulated host as a process of its own.

// esxisim is where TestMain built the simulated host.
var esxisim string

func TestMain(m *testing.M) {
	testscript.Main(withSimulator{m}, map[string]func(){
		// Dozens of commands with keys at their real cost would be most of these tests.
		"hikae": func() { os.Exit(run(os.Args[1:], repo.KDF{Time: 1, MemoryKiB: 8, Threads: 1})) },
	})
}

// withSimulator builds cmd/esxisim around the tests. Not so when this binary is
// started as hikae by a story.
type withSimulator struct{ m *testing.M }

func (w withSimulator) Run() int {
	dir, err := os.MkdirTemp("", "hikae-cli")
	if err == nil {
		defer os.RemoveAll(dir)
		esxisim = filepath.Join(dir, "esxisim")
		var out []byte
		if out, err = exec.Command("go", "build", "-buildvcs=false", "-o", esxisim, "hikae/cmd/esxisim").CombinedOutput(); err != nil {
			err = fmt.Errorf("build esxisim: %w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return w.m.Run()
}

func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", filepath.Dir(esxisim)+string(filepath.ListSeparator)+e.Getenv("PATH"))
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "state"))
			contrib, err := filepath.Abs("../../contrib")
			if err != nil {
				return err
			}
			e.Setenv("CONTRIB", contrib)
			// A failed story must not leave a mount behind; a good one has none.
			e.Defer(func() { _ = fs.Unmount(filepath.Join(e.WorkDir, "mnt"), true) })
			return nil
		},
		Condition: func(name string) (bool, error) {
			if name != "fuse" {
				return false, fmt.Errorf("unknown condition %s", name)
			}
			return haveFUSE(t), nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      cmdExits,
			"sim":        cmdSim,
			"image":      cmdImage,
			"json":       cmdJSON,
			"jsonkeys":   cmdJSONKeys,
			"until-read": cmdUntilRead,
			"setfrom":    cmdSetFrom,

			"until-daemon": cmdUntilDaemon,
			"until-status": cmdUntilStatus,
		},
	})
}

// haveFUSE tells whether this machine can mount; with CI set it has to.
func haveFUSE(t *testing.T) bool {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		_ = f.Close()
		if os.Geteuid() != 0 {
			_, err = exec.LookPath("fusermount3")
		}
	}
	if err != nil && os.Getenv("CI") != "" {
		t.Fatalf("CI is set and this machine cannot mount: %v", err)
	}
	return err == nil
}

// cmdExits runs a program that has to end with a code: exits CODE PROGRAM ARG...
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// cmdSim starts a simulated host: sim NAME ARG... Its ready line gives the
// variables NAME_ADDRESS, NAME_THUMBPRINT and NAME_CONTROL, with --ssh also NAME_SSH and
// NAME_SSH_FINGERPRINT; its password is in
// NAME.password.
func cmdSim(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: sim NAME ARG...")
	}
	name := args[0]
	password := ts.MkAbs(name + ".password")
	ts.Check(os.WriteFile(password, []byte("secret-of-"+name+"\n"), 0o600))
	cmd := exec.Command(esxisim, append([]string{
		"serve", "--datastore", ts.MkAbs(name + ".datastore"),
		"--control", ts.MkAbs(name + ".sock"), "--user", "root", "--password-file", password,
	}, args[1:]...)...)
	cmd.Dir = ts.MkAbs(".")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Defer(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		defer late.Stop()
		if err := cmd.Wait(); err != nil {
			ts.Logf("esxisim ended with %v: %s", err, stderr.String())
		}
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		ts.Fatalf("esxisim gave no ready line: %v\n%s", err, stderr.String())
	}
	var ready struct {
		Address, Thumbprint, User, Control string
		SSH                                string `json:"ssh"`
		SSHFingerprint                     string `json:"ssh_fingerprint"`
	}
	ts.Check(json.Unmarshal(line, &ready))
	ts.Setenv(name+"_ADDRESS", ready.Address)
	ts.Setenv(name+"_THUMBPRINT", ready.Thumbprint)
	ts.Setenv(name+"_CONTROL", ready.Control)
	ts.Setenv(name+"_SSH", ready.SSH)
	ts.Setenv(name+"_SSH_FINGERPRINT", ready.SSHFingerprint)
}

// cmdImage makes a disk image: image FILE SIZE-IN-MIB SEED. One MiB in four has
// bytes that follow from the seed, the others are holes.
func cmdImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: image FILE MIB SEED")
	}
	mib, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	seed, err := strconv.ParseUint(args[2], 10, 64)
	ts.Check(err)
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	ts.Check(f.Truncate(mib << 20))
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	buf := make([]byte, 1<<20)
	for i := int64(0); i < mib; i += 4 {
		_, _ = random.Read(buf) // never fails
		_, err := f.WriteAt(buf, i<<20)
		ts.Check(err)
	}
}

// lines decodes the JSON lines of stdout or a file.
func lines(ts *testscript.TestScript, file string) (objects []map[string]any) {
	for _, line := range strings.Split(strings.TrimSpace(ts.ReadFile(file)), "\n") {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			ts.Fatalf("%s has a line that is no JSON object: %v\n%s", file, err, line)
		}
		objects = append(objects, v)
	}
	return objects
}

// cmdJSON compares a field of line N (from 1) of JSON lines with a regular
// expression that fits the whole value: json FILE N KEY REGEXP.
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 4 {
		ts.Fatalf("usage: json FILE LINE KEY REGEXP")
	}
	got := jsonField(ts, args[0], args[1], args[2])
	re, err := regexp.Compile("^(?:" + args[3] + ")$")
	ts.Check(err)
	if re.MatchString(got) == neg {
		ts.Fatalf("%s is %s", args[2], got)
	}
}

// jsonField returns a field by its dotted path, numbers in full.
func jsonField(ts *testscript.TestScript, file, line, path string) string {
	n, err := strconv.Atoi(line)
	ts.Check(err)
	all := lines(ts, file)
	if n < 1 || n > len(all) {
		ts.Fatalf("%s has %d lines", file, len(all))
	}
	var v any = all[n-1]
	for _, key := range strings.Split(path, ".") {
		switch in := v.(type) {
		case map[string]any:
			v = in[key]
		case []any:
			i, err := strconv.Atoi(key)
			ts.Check(err)
			if i >= len(in) {
				ts.Fatalf("%s has %d elements", path, len(in))
			}
			v = in[i]
		default:
			ts.Fatalf("%s: no field %s", path, key)
		}
	}
	if f, ok := v.(float64); ok {
		return strconv.FormatFloat(f, 'f', -1, 64)
	}
	return fmt.Sprint(v)
}

// cmdJSONKeys demands fields in every JSON line: jsonkeys FILE KEY...
func cmdJSONKeys(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: jsonkeys FILE KEY...")
	}
	for i, object := range lines(ts, args[0]) {
		for _, key := range args[1:] {
			if _, ok := object[key]; !ok {
				ts.Fatalf("line %d has no field %s: %v", i+1, key, object)
			}
		}
	}
}

// cmdSetFrom sets a variable to a JSON field: setfrom VAR FILE LINE KEY.
func cmdSetFrom(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: setfrom VAR FILE LINE KEY")
	}
	ts.Setenv(args[0], jsonField(ts, args[1], args[2], args[3]))
}

// cmdUntilRead waits until a simulated host has had so many /folder requests:
// until-read CONTROL N.
func cmdUntilRead(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: until-read CONTROL REQUESTS")
	}
	want, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		out, err := exec.Command(esxisim, "stats", "--control", args[0]).Output()
		ts.Check(err)
		var stats struct{ Folder struct{ Requests int64 } }
		ts.Check(json.Unmarshal(out, &stats))
		if stats.Folder.Requests >= want {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	ts.Fatalf("the host never had %d requests", want)
}
