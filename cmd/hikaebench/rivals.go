package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// rival is another backup tool, told to do hikae's steps.
type rival struct {
	name    string
	env     []string
	init    []string
	setup   [][]string // after init
	fast    bool       // it compresses with lz4 or the like
	store   func(image, label string) []string
	restore func(label, dir string) []string // runs in dir, an empty folder; nil where its command line cannot name a state
	mount   []string                         // stays in the foreground; nil where it cannot
}

// rivals measures the other tools on the states that hikae stored. Each reads
// the state under one constant name, so that it finds its own earlier backup.
func (b *bench) rivals(ctx context.Context) error {
	if !b.others {
		return nil
	}
	source := b.path("source")
	if err := os.MkdirAll(source, 0o700); err != nil {
		return err
	}
	disk := filepath.Join(source, "disk.raw")
	dir, mnt := b.path("rival"), b.path("rival-mnt")
	cache := b.path("rival-cache")
	environ := func(own ...string) []string {
		return slices.Concat(os.Environ(), []string{"HOME=" + b.path("home"), "XDG_CACHE_HOME=" + cache}, own)
	}
	list := []rival{
		{
			name: "restic", env: environ("RESTIC_REPOSITORY="+dir, "RESTIC_PASSWORD_FILE="+b.pass),
			init:  []string{"init"},
			store: func(p, label string) []string { return []string{"backup", "--tag", label, p} },
			restore: func(label, to string) []string {
				args := []string{"restore", "latest", "--tag", label, "--target", to}
				if offers(ctx, "--sparse", "restic", "restore", "--help") {
					args = append(args, "--sparse") // since 0.15
				}
				return args
			},
			mount: []string{"mount", mnt},
		},
		{
			name: "borg", env: environ("BORG_REPO="+dir, "BORG_PASSCOMMAND=cat "+b.pass, "BORG_BASE_DIR="+b.path("home")),
			init: []string{"init", "--encryption", "repokey-blake2"},
			fast: true,
			store: func(p, label string) []string {
				return []string{"create", "--sparse", "--compression", "lz4", "--chunker-params", "fixed,131072", "::" + label, p}
			},
			restore: func(label, _ string) []string { return []string{"extract", "--sparse", "::" + label} },
		},
		{
			name: "kopia", env: environ("KOPIA_PASSWORD=correct horse battery staple", "KOPIA_CHECK_FOR_UPDATES=false"),
			init:  []string{"repository", "create", "filesystem", "--path", dir},
			setup: [][]string{{"policy", "set", "--global", "--compression", "zstd-fastest"}},
			store: func(p, _ string) []string { return []string{"snapshot", "create", filepath.Dir(p)} },
		},
	}
	for _, r := range list {
		if _, err := exec.LookPath(r.name); err != nil {
			say("%s is not installed: left out", r.name)
			continue
		}
		for _, d := range []string{dir, cache, mnt, b.path("home")} {
			if err := errors.Join(os.RemoveAll(d), os.MkdirAll(d, 0o700)); err != nil {
				return err
			}
		}
		if err := b.rival(ctx, r, disk, dir, mnt); err != nil {
			return fmt.Errorf("measuring %s: %w", r.name, err)
		}
	}
	return nil
}

// offers tells whether a program's help names a flag.
func offers(ctx context.Context, flag, program string, help ...string) bool {
	out, err := exec.CommandContext(ctx, program, help...).CombinedOutput()
	return err == nil && bytes.Contains(out, []byte(flag))
}

func (b *bench) rival(ctx context.Context, r rival, disk, dir, mnt string) error {
	command := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, r.name, args...)
		cmd.Env = r.env
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		return cmd
	}
	for _, args := range append([][]string{r.init}, r.setup...) {
		if _, err := b.run(ctx, command(args...)); err != nil {
			return err
		}
	}
	for i, s := range b.states {
		if err := os.Remove(disk); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Link(s.path, disk); err != nil {
			if err := exec.CommandContext(ctx, "cp", "--sparse=always", s.path, disk).Run(); err != nil {
				return err
			}
		}
		step := stepScan
		if i == 0 {
			step = stepFull
		}
		got, err := b.stored(ctx, row{Step: step, Tool: r.name, Bytes: total(s.data), Note: fmt.Sprintf("state %d", i)}, dir, command(r.store(disk, fmt.Sprintf("state%d", i))...))
		if err != nil {
			return err
		}
		if i == 0 && r.fast {
			got.Step, got.Ratio = stepFast, 0
			b.out.add(got)
		}
	}
	last := b.states[len(b.states)-1]
	if err := b.storeOne(ctx, row{Step: stepUnchanged, Tool: r.name, Bytes: total(last.data)}, dir, command(r.store(disk, "again")...)); err != nil {
		return err
	}
	if r.restore != nil {
		to := b.path("rival-restored")
		if err := os.MkdirAll(to, 0o700); err != nil {
			return err
		}
		cmd := command(r.restore("state0", to)...)
		cmd.Dir = to
		m, err := b.runToDisk(ctx, cmd)
		if err != nil {
			return err
		}
		b.out.add(row{Step: stepRestore, Tool: r.name, Seconds: m.seconds, RSS: m.rss, Bytes: total(b.states[0].data)})
		if err := os.RemoveAll(to); err != nil {
			return err
		}
	}
	if r.mount != nil {
		return b.rivalMount(ctx, r, command(r.mount...), mnt)
	}
	return nil
}

func (b *bench) rivalMount(ctx context.Context, r rival, cmd *exec.Cmd, mnt string) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	}()
	var file string
	for begin := time.Now(); file == ""; {
		if time.Since(begin) > time.Minute || ctx.Err() != nil {
			say("%s's mount showed nothing within a minute: left out", r.name)
			return ctx.Err()
		}
		time.Sleep(200 * time.Millisecond)
		if found, err := filepath.Glob(filepath.Join(mnt, "snapshots", "*", "*")); err == nil && len(found) > 0 {
			file, _ = theOne(found[0], "disk.raw")
		}
	}
	for _, read := range b.readers(file) {
		got, err := read(ctx)
		if err != nil {
			return err
		}
		got.Tool = r.name
		b.out.add(got)
	}
	return nil
}
