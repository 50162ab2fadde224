package esxisim

import (
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"hikae/backup/esxisim/internal/busybox"
	"hikae/backup/esxisim/internal/hostfs"
	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/esxisim/internal/shell"
)

// console is what a shell on the host is: its files, its commands, and the
// processes that run behind it. The client that logs in is root; the licence
// does not concern it: vim-cmd speaks to the host's daemon from within.
type console struct {
	h     *Host
	files *hostfs.FS
	box   *busybox.Box
	own   map[string]shell.Command

	mu    sync.Mutex
	pid   int
	procs map[int]*process

	tasks vimTasks
}

type process struct {
	line   string
	cancel context.CancelFunc
}

const hostname = "localhost.localdomain"

func newConsole(h *Host) (*console, error) {
	c := &console{h: h, pid: 2_100_000, procs: map[int]*process{}}
	c.own = map[string]shell.Command{
		"vim-cmd": c.vimCmd, "vmkfstools": c.vmkfstools, "esxcli": c.esxcli, "vmware": c.vmware,
	}
	c.box = busybox.New(busybox.Options{
		FS: nil, Clock: h.o.Clock, Hostname: hostname,
		Release: h.edition.version, Version: "#1 SMP Release build-" + h.edition.build, Machine: "x86_64",
		Volumes: c.dfVolumes, SHA512: h.edition.shell.sha512, Processes: c.processes, Kill: c.kill,
	})
	files := map[string]string{
		"/etc/vmware/esx.conf": "/system/uuid = \"" + h.hv.UUID() + "\"\n",
		"/etc/motd":            "The time and date of this login have been sent to the system logs.\n",
		"/etc/profile":         "# profile\n",
		"/etc/ssh/sshd_config": c.sshdConfig(),
	}
	if h.o.SSH != nil && len(h.o.SSH.AuthorizedKeys) > 0 {
		files["/etc/ssh/keys-root/authorized_keys"] = string(h.o.SSH.AuthorizedKeys)
	}
	for _, n := range c.box.Names() {
		files["/bin/"+n] = ""
	}
	for n := range c.own {
		files["/bin/"+n] = ""
		if n == "esxcli" || n == "vmkfstools" {
			files["/sbin/"+n] = ""
		}
	}
	var err error
	if c.files, err = hostfs.New(h.hv, h.hv.Private("root"), files); err != nil {
		return nil, err
	}
	c.box.SetFS(c.files)
	return c, nil
}

// sshdConfig is what the host says of its SSH server, true to how it is set up.
func (c *console) sshdConfig() string {
	o := c.h.o.SSH
	sessions := o.MaxSessions
	if sessions <= 0 {
		sessions = defaultSessions
	}
	password := map[bool]string{true: "yes", false: "no"}[o.Password]
	return fmt.Sprintf("PermitRootLogin yes\nCiphers %s\nMaxSessions %d\nPasswordAuthentication %s\nAuthorizedKeysFile /etc/ssh/keys-%%u/authorized_keys\n",
		strings.Join(sshCiphers, ","), sessions, password)
}

func (c *console) close() error { return c.files.Close() }

// run runs a command line as sshd does: by the login shell with -c, or as a
// shell that reads its commands from in.
func (c *console) run(ctx context.Context, interactive, tty bool, line string, env map[string]string, in io.Reader, out, errs io.Writer) int {
	vars := map[string]string{
		"PATH": "/bin:/sbin", "HOME": "/", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "PWD": "/",
	}
	for k, v := range env {
		vars[k] = v
	}
	pid := c.begin(line, func() {})
	defer c.end(pid)
	s := shell.New(c, "/", vars)
	s.SetPID(pid)
	if !interactive {
		return s.Run(ctx, line, in, out, errs)
	}
	var prompt func()
	if tty {
		fmt.Fprint(out, "The time and date of this login have been sent to the system logs.\r\n\r\n")
		out, errs = crlf{out}, crlf{errs}
		prompt = func() { fmt.Fprintf(out, "[root@localhost:%s] ", "~") }
	}
	return s.Interactive(ctx, in, out, errs, prompt)
}

// crlf is what a terminal makes of line ends.
type crlf struct{ w io.Writer }

func (c crlf) Write(p []byte) (int, error) {
	if _, err := io.WriteString(c.w, strings.ReplaceAll(string(p), "\n", "\r\n")); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Find is shell.Host's.
func (c *console) Find(name string) shell.Command {
	base := path.Base(name)
	if strings.Contains(name, "/") {
		i, err := c.files.Stat(name)
		if err != nil || i.IsDir() || i.Mode&0o111 == 0 {
			return nil
		}
		if dir := path.Dir(name); dir != "/bin" && dir != "/sbin" {
			return c.script(name)
		}
	}
	cmd := c.own[base]
	if cmd == nil {
		cmd = c.box.Find(base)
	}
	if cmd == nil {
		return nil
	}
	return c.faulty(cmd)
}

// script runs an executable file of one's own as a script.
func (c *console) script(name string) shell.Command {
	return func(ctx context.Context, p *shell.Proc) int {
		q := *p
		q.Args = append([]string{"sh", name}, p.Args[1:]...)
		return c.box.Find("sh")(ctx, &q)
	}
}

// Open is shell.Host's.
func (c *console) Open(name string, flag int) (shell.File, error) { return c.files.Open(name, flag) }

// List is shell.Host's.
func (c *console) List(name string) ([]string, error) {
	list, err := c.files.List(name)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names, nil
}

// IsDir is shell.Host's.
func (c *console) IsDir(name string) bool {
	i, err := c.files.Stat(name)
	return err == nil && i.IsDir()
}

// Background is shell.Host's: such a command lives until it ends, is killed, or
// the host stops, whatever becomes of the connection.
func (c *console) Background(line string) (ctx context.Context, pid int, done func()) {
	ctx, cancel := context.WithCancel(c.h.ctx)
	pid = c.begin(line, cancel)
	finished := make(chan struct{})
	c.h.running.Go(func() { <-finished })
	return ctx, pid, func() {
		cancel()
		c.end(pid)
		close(finished)
	}
}

func (c *console) begin(line string, cancel context.CancelFunc) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pid++
	c.procs[c.pid] = &process{line, cancel}
	return c.pid
}

func (c *console) end(pid int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.procs, pid)
}

func (c *console) processes() (list []busybox.Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for pid, p := range c.procs {
		list = append(list, busybox.Process{PID: pid, Line: p.line})
	}
	slices.SortFunc(list, func(a, b busybox.Process) int { return a.PID - b.PID })
	return list
}

func (c *console) kill(pid int) bool {
	c.mu.Lock()
	p := c.procs[pid]
	c.mu.Unlock()
	if p != nil {
		p.cancel()
	}
	return p != nil
}

// crash ends everything that runs and forgets what was done.
func (c *console) crash() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.procs {
		p.cancel()
	}
	c.tasks.mu.Lock()
	defer c.tasks.mu.Unlock()
	c.tasks.list = nil
}

// faulty wraps a command with the faults that were injected for it.
func (c *console) faulty(cmd shell.Command) shell.Command {
	return func(ctx context.Context, p *shell.Proc) int {
		line := strings.Join(p.Args, " ")
		conn, _ := ctx.Value(connKey{}).(*sshConn)
		if _, hit := c.h.faults.ssh(FaultSSHHang, line); hit {
			c.h.log.Info("injected fault: command hangs", "command", line)
			var gone chan struct{}
			if conn != nil {
				gone = conn.gone
			}
			select {
			case <-gone:
			case <-ctx.Done():
			}
			return shell.StatusKilled
		}
		f, hit := c.h.faults.ssh(FaultSSHCommand, line)
		if !hit {
			return cmd(ctx, p)
		}
		c.h.log.Info("injected fault: command", "command", line, "fault", f.Fault, "status", f.Status, "delay", f.Delay, "lost", f.Lost)
		c.pause(ctx, f.Delay)
		switch {
		case f.Fault != "":
			return c.printFault(p, f.Fault, f.Message)
		case f.Status != 0 || f.Message != "":
			if f.Message != "" {
				fmt.Fprintln(p.Err, f.Message)
			}
			return max(f.Status, 1)
		}
		status := cmd(ctx, p)
		if f.Lost && conn != nil {
			conn.Close() //nolint:errcheck // that is the point
		}
		return status
	}
}

func (c *console) pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// vmware -v, -l, -vl
func (c *console) vmware(_ context.Context, p *shell.Proc) int {
	opts := strings.Join(p.Args[1:], "")
	if opts == "" || strings.Trim(opts, "-vl") != "" {
		fmt.Fprintln(p.Err, "Usage: vmware -v | -l")
		return 1
	}
	if strings.Contains(opts, "v") {
		fmt.Fprintln(p.Out, c.h.edition.full())
	}
	if strings.Contains(opts, "l") {
		version := c.h.edition.name
		if version < "7.0" {
			version = c.h.edition.version
		}
		fmt.Fprintf(p.Out, "VMware ESXi %s %s\n", version, c.h.edition.update)
	}
	return 0
}

// volume is one row of what the host has mounted.
type volume struct {
	mount, name, uuid, kind string
	size, free              int64
}

// volumes are the datastore and the small ones of the installation. Unmounted
// or nameless ones are among them, as on every host.
func (c *console) volumes() []volume {
	capacity, free := c.h.hv.Space()
	list := []volume{{"/vmfs/volumes/" + c.h.hv.UUID(), c.h.hv.Datastore(), c.h.hv.UUID(), fmt.Sprintf("VMFS-%d", c.h.o.VMFS), capacity, free}}
	if c.h.edition.name < "7.0" {
		return append(list,
			volume{"/vmfs/volumes/e5a1f5a4-0b6e0b6c-3c1c-b4b5b6b7b8b9", "", "e5a1f5a4-0b6e0b6c-3c1c-b4b5b6b7b8b9", "vfat", 261853184, 261844992},
			volume{"/vmfs/volumes/4e1c7d2a-9d3e2f10-8a5b-000c29abcdef", "", "4e1c7d2a-9d3e2f10-8a5b-000c29abcdef", "vfat", 299712512, 83992576})
	}
	return append(list,
		volume{"/vmfs/volumes/5f1f2b3c-6d7e8f90-1a2b-000c29abcdef", "OSDATA-5f1f2b3c-6d7e8f90-1a2b-000c29abcdef", "5f1f2b3c-6d7e8f90-1a2b-000c29abcdef", "VFFS", 128580583424, 124554051584},
		volume{"/vmfs/volumes/9c8b7a65-43211234-5678-9abcdef01234", "BOOTBANK1", "9c8b7a65-43211234-5678-9abcdef01234", "vfat", 4293591040, 4087808000},
		volume{"/vmfs/volumes/1a2b3c4d-5e6f7a8b-9c0d-e1f2a3b4c5d6", "BOOTBANK2", "1a2b3c4d-5e6f7a8b-9c0d-e1f2a3b4c5d6", "vfat", 4293591040, 4293525504})
}

func (c *console) dfVolumes() (list []busybox.Volume) {
	for _, v := range c.volumes() {
		mount := v.mount
		if v.name != "" {
			mount = "/vmfs/volumes/" + v.name
		}
		list = append(list, busybox.Volume{Type: v.kind, Mount: mount, Size: v.size, Free: v.free})
	}
	return list
}

// rel is a path given to a command, relative to the datastore. Datastore paths
// ("[datastore1] a/b") are taken too.
func (c *console) rel(p *shell.Proc, name string) (string, error) {
	if strings.HasPrefix(name, "[") {
		return c.h.hv.Resolve(name)
	}
	rel, ok := c.files.DatastorePath(p.Path(name))
	if !ok {
		return "", &hv.Error{Kind: hv.ErrNotFound, Name: name, Text: name + " was not found"}
	}
	return rel, nil
}
