package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"hikae/cmd/hikae/internal/config"
	"hikae/sched"
)

// cmdUntilDaemon waits until a daemon answers.
func cmdUntilDaemon(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: until-daemon")
	}
	untilStatus(ts, "daemon.version", ".*")
}

// cmdUntilStatus waits until a field of hikae status --json is as it should be:
// until-status KEY REGEXP.
func cmdUntilStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: until-status KEY REGEXP")
	}
	untilStatus(ts, args[0], args[1])
}

func untilStatus(ts *testscript.TestScript, key, want string) {
	re, err := regexp.Compile("^(?:" + want + ")$")
	ts.Check(err)
	last := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err := ts.Exec("hikae", "status", "--json", "--socket", "run/s", "--config", "/dev/null"); err != nil {
			continue
		}
		var v any
		ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &v))
		for _, k := range strings.Split(key, ".") {
			switch in := v.(type) {
			case map[string]any:
				v = in[k]
			case []any:
				v = nil
				if len(in) > 0 {
					v = in[0]
				}
			}
		}
		if last, _ = v.(string); re.MatchString(last) {
			return
		}
	}
	ts.Fatalf("%s never became %s; it is %q", key, want, last)
}

func TestTheExampleConfigurationIsRight(t *testing.T) {
	f, err := config.Load(filepath.Join("..", "..", "contrib", "hikae.toml"))
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[sched.Kind]bool{}
	for _, j := range f.Jobs {
		kinds[jobKind(j)] = true
	}
	for _, kind := range []sched.Kind{sched.KindBackup, sched.KindPrune, sched.KindCheck} {
		if !kinds[kind] {
			t.Errorf("the example has no job of kind %s", kind)
		}
	}
}

func TestTheUnitIsRight(t *testing.T) {
	tool, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("CI is set and there is no systemd-analyze")
		}
		t.Skip("needs systemd-analyze")
	}
	unit, err := os.ReadFile(filepath.Join("..", "..", "contrib", "systemd", "hikae.service"))
	if err != nil {
		t.Fatal(err)
	}
	// It looks for the program, which is not installed here.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(unit), "/usr/local/bin/hikae", self)
	path := filepath.Join(t.TempDir(), "hikae.service")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "verify", "--man=no", "--recursive-errors=no", path).CombinedOutput()
	if err != nil || strings.Contains(string(out), "hikae.service") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
