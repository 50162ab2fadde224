package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The steps' names join hikae's rows with those of the other tools.
const (
	stepFull      = "store the first state"
	stepFast      = "store the first state, s2 or lz4"
	stepKnown     = "store the next, changes known"
	stepScan      = "store the next, changes unknown"
	stepUnchanged = "store it again, nothing changed"
	stepRestore   = "restore to a local file, on the disk"
	stepHostFull  = "host: first backup"
	stepHostNext  = "host: next backup"
)

type bench struct {
	options
	out    *table
	states []image
	repo   string
	pass   string // file that holds the passphrase
	config string
}

func (b *bench) path(elem ...string) string {
	return filepath.Join(append([]string{b.work}, elem...)...)
}

func (b *bench) prepare(ctx context.Context) (err error) {
	if b.states, err = openImages(b.images, b.work); err != nil {
		return err
	}
	for i, s := range b.states {
		say("state %d: %s, %d MiB, %d MiB in use, %d MiB in changed areas", i, s.path, s.size/mib, total(s.data)/mib, total(s.changed)/mib)
	}
	b.repo, b.pass, b.config = b.path("repository"), b.path("passphrase"), b.path("hikae.toml")
	if err := os.WriteFile(b.pass, []byte("correct horse battery staple\n"), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(b.config, nil, 0o600); err != nil {
		return err
	}
	if b.reuse {
		return nil
	}
	_, err = b.run(ctx, b.hikaeCommand(ctx, "init"))
	return err
}

// measured is what one finished process used.
type measured struct {
	seconds float64
	rss     int64
	stdout  []byte
}

// run runs a command to its end. What it says on standard error appears only
// when it fails.
func (b *bench) run(ctx context.Context, cmd *exec.Cmd) (measured, error) {
	b.dropCaches()
	var out, errs bytes.Buffer
	cmd.Stdout = &out
	cmd.Stderr = &errs
	begin := time.Now()
	err := cmd.Run()
	m := measured{seconds: time.Since(begin).Seconds(), stdout: out.Bytes()}
	if ctx.Err() != nil {
		return m, ctx.Err()
	}
	if err != nil {
		return m, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, errs.Bytes())
	}
	m.rss = peak(cmd)
	return m, nil
}

// runToDisk is run until what was written is on the disk: some tools see to that
// themselves, others leave it to the system.
func (b *bench) runToDisk(ctx context.Context, cmd *exec.Cmd) (measured, error) {
	m, err := b.run(ctx, cmd)
	begin := time.Now()
	syscall.Sync()
	m.seconds += time.Since(begin).Seconds()
	return m, err
}

func peak(cmd *exec.Cmd) int64 {
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		return ru.Maxrss << 10
	}
	return 0
}

// dropCaches makes the next step cold, as the first backup of a night is.
func (b *bench) dropCaches() {
	if !b.drop {
		return
	}
	syscall.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		say("cannot drop the page cache (%v): steps run warm", err)
		b.drop = false
	}
}

func (b *bench) hikaeCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, b.hikae, append([]string{
		"--config", b.config, "--repo", b.repo, "--passphrase-file", b.pass, "--state", b.path("state"),
	}, args...)...)
	// A clean stop, so that nothing of a cut-off measurement stays behind.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	return cmd
}

func treeSize(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if fi, err := d.Info(); err == nil {
				n += fi.Size()
			}
		}
		return nil
	})
	return n
}

// storeOne runs a command that adds to a folder, and reports what it cost.
func (b *bench) storeOne(ctx context.Context, r row, dir string, cmd *exec.Cmd) error {
	_, err := b.stored(ctx, r, dir, cmd)
	return err
}

// stored is storeOne for who needs the figures.
func (b *bench) stored(ctx context.Context, r row, dir string, cmd *exec.Cmd) (row, error) {
	before, meta := treeSize(dir), metadata(dir)
	m, err := b.run(ctx, cmd)
	if err != nil {
		return r, err
	}
	r.Seconds, r.RSS, r.Stored = m.seconds, m.rss, treeSize(dir)-before
	if r.Tool == "hikae" {
		r.Meta = metadata(dir) - meta
	}
	b.out.add(r)
	return r, nil
}

// metadata is how much of a repository of hikae's is not blocks: tree nodes, index,
// manifests.
func metadata(dir string) (n int64) {
	for _, sub := range []string{"meta", "index", "generations"} {
		n += treeSize(filepath.Join(dir, sub))
	}
	return n
}

func (b *bench) store(ctx context.Context) error {
	vm := "bench/disk"
	first := b.states[0]
	err := b.storeOne(ctx, row{Step: stepFull, Tool: "hikae", Bytes: total(first.data)}, b.repo,
		b.hikaeCommand(ctx, "import", vm, "--disk", first.path, "--time", stamp(0), "--json"))
	if err != nil {
		return err
	}
	// The other compression, beside tools that have nothing slower and smaller.
	fast := b.path("fast")
	if _, err := b.run(ctx, b.hikaeCommand(ctx, "--repo", fast, "init")); err != nil {
		return err
	}
	err = b.storeOne(ctx, row{Step: stepFast, Tool: "hikae", Bytes: total(first.data)}, fast,
		b.hikaeCommand(ctx, "--repo", fast, "import", vm, "--compression", "s2", "--disk", first.path, "--time", stamp(0), "--json"))
	if err != nil {
		return err
	}
	if err := os.RemoveAll(fast); err != nil {
		return err
	}
	for i, s := range b.states[1:] {
		// The same step on a copy of the repository first, without the
		// changed areas.
		aside := b.path("aside")
		if err := exec.CommandContext(ctx, "cp", "-a", b.repo, aside).Run(); err != nil {
			return err
		}
		cmd := b.hikaeCommand(ctx, "--repo", aside, "import", vm, "--disk", s.path, "--time", stamp(i+1), "--json")
		if err := b.storeOne(ctx, row{Step: stepScan, Tool: "hikae", Bytes: total(s.data), Note: fmt.Sprintf("state %d", i+1)}, aside, cmd); err != nil {
			return err
		}
		if err := os.RemoveAll(aside); err != nil {
			return err
		}
		cmd = b.hikaeCommand(ctx, "import", vm, "--disk", s.path, "--changed", s.csv, "--time", stamp(i+1), "--json")
		if err := b.storeOne(ctx, row{Step: stepKnown, Tool: "hikae", Bytes: total(s.changed), Note: fmt.Sprintf("state %d", i+1)}, b.repo, cmd); err != nil {
			return err
		}
	}
	last := b.states[len(b.states)-1]
	return b.storeOne(ctx, row{Step: stepUnchanged, Tool: "hikae", Bytes: total(last.data)}, b.repo,
		b.hikaeCommand(ctx, "import", vm, "--disk", last.path, "--time", stamp(len(b.states)), "--json"))
}

// stamp gives the generations of a run different times in order.
func stamp(i int) string {
	return time.Date(2026, 1, 1, 0, 0, i, 0, time.UTC).Format(time.RFC3339)
}

func (b *bench) restore(ctx context.Context) error {
	to := b.path("restored")
	m, err := b.runToDisk(ctx, b.hikaeCommand(ctx, "copy", "bench/disk@"+filepath.Base(stampName(0)), to))
	if err != nil {
		return err
	}
	b.out.add(row{Step: stepRestore, Tool: "hikae", Seconds: m.seconds, RSS: m.rss, Bytes: total(b.states[0].data)})
	flat, err := theOne(to, "-flat.vmdk")
	if err != nil {
		return err
	}
	if err := same(ctx, b.states[0].path, flat); err != nil {
		return err
	}
	return os.RemoveAll(to)
}

// stampName is stamp as generations are called.
func stampName(i int) string { return strings.ReplaceAll(stamp(i), ":", "-") }

// theOne finds the only file below dir whose name ends so.
func theOne(dir, suffix string) (string, error) {
	var found string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, suffix) && found == "" {
			found = p
		}
		return err
	})
	if err == nil && found == "" {
		err = fmt.Errorf("no *%s below %s", suffix, dir)
	}
	return found, err
}

// same fails when a measured step produced other bytes than it was given: a
// fast wrong answer is no measurement.
func same(ctx context.Context, a, c string) error {
	if out, err := exec.CommandContext(ctx, "cmp", a, c).CombinedOutput(); err != nil {
		return fmt.Errorf("%s and %s differ: %s", a, c, out)
	}
	return nil
}

// simulated backs the same states up through a simulated host.
func (b *bench) simulated(ctx context.Context) error {
	store, socket, password := b.path("vmfs"), b.path("control"), b.path("host-password")
	if err := os.WriteFile(password, []byte("a password\n"), 0o600); err != nil {
		return err
	}
	if err := os.MkdirAll(store, 0o700); err != nil {
		return err
	}
	host := exec.CommandContext(ctx, b.esxisim, "serve", "--datastore", store, "--control", socket,
		"--password-file", password, "--vm", "disk="+b.states[0].path)
	host.Cancel = func() error { return host.Process.Signal(syscall.SIGTERM) }
	host.Stderr = os.Stderr
	pipe, err := host.StdoutPipe()
	if err != nil {
		return err
	}
	if err := host.Start(); err != nil {
		return err
	}
	defer func() {
		_ = host.Process.Signal(syscall.SIGTERM)
		_, _ = io.Copy(io.Discard, pipe)
		_ = host.Wait()
	}()
	line, err := bufio.NewReader(pipe).ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("esxisim serve said nothing: %w", err)
	}
	var ready struct{ Address, Thumbprint, User string }
	if err := json.Unmarshal(line, &ready); err != nil {
		return err
	}
	if _, err := b.run(ctx, b.hikaeCommand(ctx, "host", "add", "sim", "--address", ready.Address,
		"--user", ready.User, "--password-file", password, "--thumbprint", ready.Thumbprint)); err != nil {
		return err
	}
	for i, s := range b.states {
		step := stepHostNext
		if i == 0 {
			step = stepHostFull
		} else if err := exec.CommandContext(ctx, b.esxisim, "become", "--control", socket, "disk", "0", s.path).Run(); err != nil {
			return fmt.Errorf("esxisim become: %w", err)
		}
		if err := exec.CommandContext(ctx, b.esxisim, "stats", "--control", socket, "--reset").Run(); err != nil {
			return fmt.Errorf("esxisim stats: %w", err)
		}
		before := treeSize(b.repo)
		m, err := b.run(ctx, b.hikaeCommand(ctx, "backup", "sim/disk", "--json"))
		if err != nil {
			return err
		}
		stats, err := exec.CommandContext(ctx, b.esxisim, "stats", "--control", socket).Output()
		if err != nil {
			return fmt.Errorf("esxisim stats: %w", err)
		}
		var wire struct {
			Folder struct {
				BytesOut int64 `json:"bytes_out"`
			} `json:"folder"`
		}
		if err := json.Unmarshal(stats, &wire); err != nil {
			return err
		}
		var result struct {
			Mode string `json:"mode"`
		}
		if err := json.Unmarshal(lastLine(m.stdout), &result); err != nil {
			return fmt.Errorf("hikae backup --json: %w", err)
		}
		b.out.add(row{
			Step: step, Tool: "hikae", Seconds: m.seconds, RSS: m.rss, Bytes: total(s.changed), Wire: wire.Folder.BytesOut,
			Stored: treeSize(b.repo) - before, Note: "state " + strconv.Itoa(i) + ", " + result.Mode,
		})
	}
	return nil
}

func lastLine(b []byte) []byte {
	b = bytes.TrimSpace(b)
	return b[bytes.LastIndexByte(b, '\n')+1:]
}
