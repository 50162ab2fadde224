package fs

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// serveEnv makes the test binary a mount server instead of running tests. A
// mount that hangs then hangs another process, which can be killed.
const serveEnv = "HIKAE_TEST_MOUNT"

func TestMain(m *testing.M) {
	if os.Getenv(serveEnv) != "" {
		os.Exit(serve())
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	// No mount may be left, whatever happened.
	all, err := mounts()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	for _, mi := range all {
		if mi.kind == fsType && strings.Contains(mi.dir, mountPrefix()) {
			fmt.Fprintln(os.Stderr, "left mounted:", mi.dir)
			unix.Unmount(mi.dir, unix.MNT_DETACH)
			code = 1
		}
	}
	os.Exit(code)
}

// order is what a test asks of the process that mounts, one JSON line each.
type order struct {
	Op       string // mount, add, forget, stick, loosen, refuse, accept, unmount, detach, stats
	Dir      string
	Repo     string
	Gens     []fakeGeneration
	Sequence uint64
	Timeout  time.Duration
	Refresh  time.Duration
	Cache    int64
	Umask    uint32
	Others   bool
	Debug    bool
	Procs    int
}

type reply struct {
	Err                   string
	Busy                  bool
	Opens, Lists, Waiting int64
	Reads, Ahead, Steps   int64 // of all disks
	HeapBytes             uint64
	Sys                   uint64
	Goroutines            int
}

// serve is the process that mounts.
func serve() int {
	src := &fakeSource{}
	var srv *Server
	do := func(o order) (r reply, err error) {
		switch o.Op {
		case "mount":
			if o.Procs > 0 {
				runtime.GOMAXPROCS(o.Procs)
			}
			src.gens = o.Gens
			log := testLog(os.Stderr)
			srv, err = mount(context.Background(), src, o.Repo, o.Dir, Options{Timeout: o.Timeout, Refresh: o.Refresh, CacheBytes: o.Cache, Umask: o.Umask, AllowOther: o.Others, Logger: log, Debug: o.Debug})
		case "add":
			for _, g := range o.Gens {
				src.add(g)
			}
		case "forget":
			src.forget(o.Sequence)
		case "stick":
			ch := make(chan struct{})
			src.stuck.Store(&ch)
		case "loosen":
			if p := src.stuck.Swap(nil); p != nil {
				close(*p)
			}
		case "refuse":
			src.refused.Store(true)
		case "accept":
			src.refused.Store(false)
		case "unmount":
			err = srv.Unmount()
		case "detach":
			err = srv.Detach()
		case "wait":
			srv.Wait()
		case "stats":
			src.disks.Range(func(_, v any) bool {
				d := v.(*fakeDisk)
				r.Reads += d.reads.Load()
				r.Ahead += d.ahead.Load()
				r.Steps += d.steps.Load()
				return true
			})
			r.Opens, r.Lists, r.Waiting = src.opens.Load(), src.lists.Load(), src.waiting.Load()
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			r.HeapBytes, r.Sys, r.Goroutines = m.HeapAlloc, m.Sys-m.HeapReleased, runtime.NumGoroutine()
		default:
			err = fmt.Errorf("unknown order %q", o.Op)
		}
		if err != nil {
			r.Err, r.Busy = err.Error(), errors.Is(err, ErrBusy)
		}
		return r, nil
	}
	in, out := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			if srv != nil && srv.Unmount() != nil {
				srv.Detach()
			}
			return 0
		}
		r, _ := do(o)
		out.Encode(r)
	}
}

// mounted is a mount in another process.
type mounted struct {
	t   testing.TB
	dir string
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
	log *lockedLog
}

type lockedLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// mountPrefix tells this process's mounts from those of another test run.
func mountPrefix() string { return fmt.Sprintf("hikae-fs-test-%d-", os.Getpid()) }

// mountDir makes a directory to mount on. It is not in t.TempDir, whose removal
// would walk into a mount that a failed test left behind.
func mountDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", mountPrefix())
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	return dir
}

func needMount(t testing.TB) {
	t.Helper()
	missing := ""
	if _, err := os.Stat("/dev/fuse"); err != nil {
		missing = "/dev/fuse"
	} else if _, err := helper(); err != nil && os.Geteuid() != 0 {
		missing = "fusermount3"
	}
	if missing == "" {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is missing", missing)
	}
	t.Skipf("needs %s", missing)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func needTools(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is not installed", name)
			}
			t.Skipf("needs %s", name)
		}
	}
}

// start runs a server process without mounting anything.
func start(t testing.TB) *mounted {
	t.Helper()
	needMount(t)
	m := &mounted{t: t, dir: mountDir(t), log: &lockedLog{}}
	m.startServer(os.Args[0])
	return m
}

func (m *mounted) startServer(argv ...string) {
	t := m.t
	t.Helper()
	m.cmd = exec.Command(argv[0], argv[1:]...)
	m.cmd.Env = append(os.Environ(), serveEnv+"=1")
	m.cmd.Stderr = m.log
	in, err := m.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	m.in, m.out = in, json.NewDecoder(out)
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The watchdog: when the server dies, whoever hangs in the mount gets an
	// error, and the test goes on to fail.
	dog := time.AfterFunc(90*time.Second, func() {
		fmt.Fprintf(os.Stderr, "%s: the mount hangs; killing it\n", t.Name())
		t.Fail()
		m.kill()
	})
	t.Cleanup(func() {
		dog.Stop()
		in.Close()
		done := make(chan struct{})
		go func() { m.cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Error("the server does not end")
			m.kill()
			<-done
		}
		if t.Failed() {
			t.Logf("server's log:\n%s", m.log)
		}
		detachFully(m.dir)
	})
}

func (m *mounted) kill() {
	m.cmd.Process.Kill()
	detachFully(m.dir)
}

func detachFully(dir string) {
	for range 10 {
		if _, ok, err := mountAt(dir); !ok || err != nil || detach(dir) != nil {
			return
		}
	}
}

// ask gives an order; a refusal is returned.
func (m *mounted) ask(o order) (reply, error) {
	m.t.Helper()
	var r reply
	if err := json.NewEncoder(m.in).Encode(o); err != nil {
		return r, err
	}
	if err := m.out.Decode(&r); err != nil {
		return r, fmt.Errorf("the server is gone: %w", err)
	}
	if r.Err != "" {
		return r, errors.New(r.Err)
	}
	return r, nil
}

func (m *mounted) must(o order) reply {
	m.t.Helper()
	r, err := m.ask(o)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", o.Op, err, m.log)
	}
	return r
}

// mountGens mounts generations and returns the mount.
func mountGens(t testing.TB, o order) *mounted {
	t.Helper()
	m := start(t)
	o.Op, o.Dir = "mount", m.dir
	if o.Repo == "" {
		o.Repo = t.TempDir()
	}
	m.must(o)
	return m
}

func (m *mounted) path(parts ...string) string {
	return filepath.Join(append([]string{m.dir}, parts...)...)
}

func testLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
