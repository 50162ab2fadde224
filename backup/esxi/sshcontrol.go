package esxi

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmx"
)

// sshControl changes the host through its shell: vim-cmd, which talks to the
// host's agent from within and needs no licence for that.
//
// What vim-cmd prints and how it exits says little (a fault may come with exit
// status 0, a snapshot may appear after the command has returned), so after every
// change the host is looked at.
type sshControl struct {
	h  *Host
	sh *shellConn

	mu     sync.Mutex
	ids    map[string]string // of VMs: the inventory's to the shell's, proved
	doubts map[string]doubt  // changes whose answer was lost
}

var _ control = (*sshControl)(nil)

// doubt is a change that may not have reached the host's agent yet: the command
// goes on when its connection breaks.
type doubt struct {
	kind  string
	since time.Time
}

// doubtTime is how long vim-cmd may take from its start to the task that it
// asks for: a second or two on a slow host.
const doubtTime = 10 * time.Second

// vmid is the number the shell knows a VM by. It is the API's id on every
// release known, which is proved by the configuration file that both name.
func (c *sshControl) vmid(ctx context.Context, id string) (string, error) {
	c.mu.Lock()
	num, ok := c.ids[id]
	c.mu.Unlock()
	if ok {
		return num, nil
	}
	c.h.mu.Lock()
	want := c.h.paths[id]
	c.h.mu.Unlock()
	if want == "" {
		vm, err := c.h.refresh(ctx, id)
		if err != nil {
			return "", err
		}
		if want = vm.ConfigPath; want == "" {
			return "", fmt.Errorf("the host does not tell where the configuration of VM %s lies", id)
		}
	}
	candidates := []string{}
	if _, err := strconv.Atoi(id); err == nil {
		candidates = append(candidates, id)
	}
	for round := range 2 {
		for _, num := range candidates {
			v, err := c.sh.dump(ctx, "vmsvc/get.summary", num)
			switch {
			case gone(err) && round == 0:
				continue
			case err != nil:
				return "", err
			case v.Get("config", "vmPathName").Text == want:
				c.mu.Lock()
				defer c.mu.Unlock()
				if c.ids == nil {
					c.ids = map[string]string{}
				}
				c.ids[id] = num
				return num, nil
			}
		}
		if round == 0 {
			vms, _, err := c.sh.list(ctx)
			if err != nil {
				return "", err
			}
			candidates = candidates[:0]
			for _, vm := range vms {
				if joinPath(vm.Datastore, vm.Path) == want {
					candidates = append(candidates, strconv.Itoa(vm.ID))
				}
			}
		}
	}
	return "", asFault(&vimcmd.Fault{Type: "vmodl.fault.ManagedObjectNotFound", Message: "no VM with " + want + " is registered"})
}

// list runs vmsvc/getallvms. Annotations may hold anything, so the table is read
// before a fault is looked for.
func (s *shellConn) list(ctx context.Context) ([]vimcmd.VM, []int, error) {
	r, err := s.vim(ctx, true, "vmsvc/getallvms")
	if err != nil {
		return nil, nil, err
	}
	vms, invalid, perr := vimcmd.ParseVMs(r.out)
	if perr == nil {
		return vms, invalid, nil
	}
	if err := r.fault(); err != nil {
		return nil, nil, err
	}
	return nil, nil, perr
}

// tree runs vmsvc/snapshot.get.
func (s *shellConn) tree(ctx context.Context, num string) ([]vimcmd.Snapshot, error) {
	r, err := s.vim(ctx, true, "vmsvc/snapshot.get", num)
	if err != nil {
		return nil, err
	}
	all, perr := vimcmd.ParseSnapshots(r.out)
	if perr == nil {
		return all, nil
	}
	if err := r.fault(); err != nil {
		return nil, err
	}
	return nil, perr
}

// doubtful notes that the answer to a change was lost.
func (c *sshControl) doubtful(vm, kind string, err error) error {
	if isLost(err) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.doubts == nil {
			c.doubts = map[string]doubt{}
		}
		c.doubts[vm] = doubt{kind, c.h.now()}
	}
	return err
}

// busy tells whether a task of a kind is at work, or may be about to begin.
func (c *sshControl) busy(ctx context.Context, vm, kind string) (bool, error) {
	c.mu.Lock()
	d, ok := c.doubts[vm]
	c.mu.Unlock()
	if ok && d.kind == kind && c.h.now().Sub(d.since) < min(doubtTime, c.h.t.settleTime/4) {
		return true, nil
	}
	words := []string{"vimsvc/task_list"}
	if vm != "" {
		num, err := c.vmid(ctx, vm)
		if err != nil {
			return false, err
		}
		words = []string{"vmsvc/get.tasklist", num}
	}
	tasks, err := c.tasks(ctx, words...)
	if err != nil {
		return false, err
	}
	for _, t := range tasks {
		if !kinds[kind](t) {
			continue
		}
		state, _, err := c.task(ctx, t)
		if err != nil {
			return false, err
		}
		if state == "queued" || state == "running" {
			return true, nil
		}
	}
	return false, nil
}

// kinds tells by its name what a task does, for example
// haTask-512-vim.VirtualMachine.createSnapshot-3887 or
// haTask-512-vim.vm.Snapshot.remove-12.
var kinds = map[string]func(task string) bool{
	"createSnapshot": func(t string) bool { return strings.Contains(t, "createSnapshot") },
	"removeSnapshot": func(t string) bool {
		return strings.Contains(t, "Snapshot.remove") || strings.Contains(t, "removeAllSnapshots") || strings.Contains(t, "consolidateDisks")
	},
	"registerVm": func(t string) bool { return strings.Contains(t, "registerVm") },
}

func (c *sshControl) tasks(ctx context.Context, words ...string) ([]string, error) {
	r, err := c.sh.vim(ctx, true, words...)
	if err != nil {
		return nil, err
	}
	tasks, perr := vimcmd.ParseTasks(r.out)
	if perr == nil {
		return tasks, nil
	}
	if err := r.fault(); err != nil {
		return nil, err
	}
	return nil, perr
}

// task is a task's state and why it failed. One that the host has forgotten is
// over, with a state of "".
func (c *sshControl) task(ctx context.Context, name string) (state string, failed error, err error) {
	v, err := c.sh.dump(ctx, "vimsvc/task_info", name)
	if gone(err) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	state = v.Get("state").Text
	if state == "error" {
		failed = asFault(taskFault(v.Get("error")))
	}
	return state, failed, nil
}

// taskFault finds the fault in a task's error: that itself, or, where the dump
// shows the API's wrapping of it, the one within.
func taskFault(e vimcmd.Value) *vimcmd.Fault {
	f := &vimcmd.Fault{Type: e.Type}
	if inner := e.Get("fault"); inner.IsObject() {
		f.Type = inner.Type
		f.Message = inner.Get("msg").Text
	}
	for _, name := range []string{"msg", "localizedMessage", "faultMessage"} {
		if f.Message == "" {
			f.Message = e.Get(name).Text
		}
	}
	return f
}

// createSnapshot makes a snapshot and waits until the host shows it.
func (c *sshControl) createSnapshot(ctx context.Context, vm, name, description string, quiesce bool) (string, error) {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return "", err
	}
	before, err := c.tasks(ctx, "vmsvc/get.tasklist", num)
	if err != nil {
		return "", err
	}
	flag := "0"
	if quiesce {
		flag = "1"
	}
	// Who cancels while the command is on its way would look for the snapshot
	// before the host began to make it.
	starting, cancel := outlive(ctx, startGrace)
	r, err := c.sh.vim(starting, false, "vmsvc/snapshot.create", num, name, description, "0", flag)
	cancel()
	if err != nil {
		return "", c.doubtful(vm, "createSnapshot", err)
	}
	said := r.fault()
	for pause, look := c.h.t.poll, 0; ; pause, look = min(pause*3/2, 10*c.h.t.poll), look+1 {
		now, err := c.h.refresh(ctx, vm)
		if err != nil {
			return "", &lost{err}
		}
		if i := slices.IndexFunc(now.Snapshots, func(s SnapshotInfo) bool { return s.Name == displayName(name) }); i >= 0 {
			return now.Snapshots[i].ID, nil
		}
		working, failed, err := c.since(ctx, num, "createSnapshot", before)
		switch {
		case err != nil:
			return "", &lost{err}
		case failed != nil:
			return "", failed
		case working:
		case said != nil:
			return "", said
		case look >= appear:
			return "", fmt.Errorf("the host said nothing against it, but the snapshot did not appear (%s)", r.text())
		}
		if err := sleep(ctx, pause); err != nil {
			return "", &lost{err}
		}
	}
}

// appear is how many looks a change has to show, after its command has returned
// and when no task is at work.
const appear = 10

// since looks at the tasks of a kind that were not there before: whether one is
// at work, and how the last one failed.
func (c *sshControl) since(ctx context.Context, num, kind string, before []string) (working bool, failed, err error) {
	tasks, err := c.tasks(ctx, "vmsvc/get.tasklist", num)
	if err != nil {
		return false, nil, err
	}
	for _, t := range tasks {
		if slices.Contains(before, t) || !kinds[kind](t) {
			continue
		}
		state, why, err := c.task(ctx, t)
		if err != nil {
			return false, nil, err
		}
		working = working || state == "queued" || state == "running"
		if why != nil {
			failed = why
		}
	}
	return working, failed, nil
}

// removeSnapshot removes exactly the snapshot that whose names: by its number,
// after a look that the number still has the name.
func (c *sshControl) removeSnapshot(ctx context.Context, _ string, whose owner) error {
	missing := asFault(&vimcmd.Fault{Type: "vmodl.fault.ManagedObjectNotFound", Message: "the snapshot is not there"})
	if whose.vm == "" || whose.number == 0 {
		return missing
	}
	num, err := c.vmid(ctx, whose.vm)
	if err != nil {
		return err
	}
	find := func() (at *vimcmd.Snapshot, children bool, err error) {
		all, err := c.sh.tree(ctx, num)
		if err != nil {
			return nil, false, err
		}
		for i := range all {
			if all[i].ID == int(whose.number) {
				at = &all[i]
			}
			children = children || all[i].Parent == int(whose.number)
		}
		return at, children, nil
	}
	at, children, err := find()
	switch {
	case err != nil:
		return err
	case at == nil:
		return missing
	case displayName(at.Name) != whose.name:
		return fmt.Errorf("snapshot %d is called %q now, not %q; it is left alone", whose.number, displayName(at.Name), whose.name)
	}
	before, err := c.tasks(ctx, "vmsvc/get.tasklist", num)
	if err != nil {
		return err
	}
	id := strconv.Itoa(int(whose.number))
	r, err := c.sh.vim(ctx, false, "vmsvc/snapshot.remove", num, id, "0") // 0: not the children
	if err == nil && strings.Contains(r.out+r.err, "Usage:") && !children {
		// A release that has no such argument. It does not matter when there are
		// no children.
		r, err = c.sh.vim(ctx, false, "vmsvc/snapshot.remove", num, id)
	}
	if err != nil {
		return c.doubtful(whose.vm, "removeSnapshot", err)
	}
	said := r.fault()
	for pause, look := c.h.t.poll, 0; ; pause, look = min(pause*3/2, 10*c.h.t.poll), look+1 {
		working, failed, err := c.since(ctx, num, "removeSnapshot", before)
		if err != nil {
			return &lost{err}
		}
		at, _, err := find()
		switch {
		case err != nil:
			return &lost{err}
		case at == nil && failed != nil:
			return failed // it is gone, but its links were not merged
		case at == nil && !working:
			return nil
		case working:
		case failed != nil:
			return failed
		case said != nil:
			return said
		case look >= appear:
			return fmt.Errorf("the host said nothing against it, but the snapshot is still there (%s)", r.text())
		}
		if err := sleep(ctx, pause); err != nil {
			return &lost{err}
		}
	}
}

// consolidating is the name of the snapshot that consolidate makes. It belongs to
// nobody else, so one that a killed run left is removed by the next.
const consolidating = "hikae-consolidate"

// consolidate merges links that a removal left behind. vim-cmd has no word for
// it, but removing any snapshot merges what nothing refers to any more. Removing
// all of them would take other people's along, so one is made to be removed.
func (c *sshControl) consolidate(ctx context.Context, vm string) error {
	if err := c.tidy(ctx, vm); err != nil {
		return err
	}
	if _, err := c.createSnapshot(ctx, vm, consolidating, "made and removed at once, to merge what another left behind", false); err != nil {
		return err
	}
	return c.tidy(ctx, vm)
}

// tidy removes the snapshots that consolidate made.
func (c *sshControl) tidy(ctx context.Context, vm string) error {
	now, err := c.h.refresh(ctx, vm)
	if err != nil {
		return err
	}
	for _, s := range now.Snapshots {
		if s.Name == consolidating {
			err = errors.Join(err, c.removeSnapshot(ctx, s.ID, owner{vm, now.Name, s.Name, s.number}))
		}
	}
	return err
}

// register registers a VM and finds it again by its file.
func (c *sshControl) register(ctx context.Context, vmxPath, name string) (string, error) {
	file, err := hostPath(vmxPath)
	if err != nil {
		return "", err
	}
	words := []string{"solo/registervm", file, name}
	if name == "" || strings.HasPrefix(name, "-") {
		words = words[:2] // the name in the .vmx counts; this one would pass for an option
	}
	r, err := c.sh.vim(ctx, false, words...)
	if err != nil {
		return "", c.doubtful("", "registerVm", err)
	}
	if err := r.fault(); err != nil {
		return "", err
	}
	for range appear {
		vms, err := c.h.inv.vms(ctx)
		if err != nil {
			return "", &lost{err}
		}
		if i := slices.IndexFunc(vms, func(v VM) bool { return v.ConfigPath == vmxPath }); i >= 0 {
			return vms[i].ID, nil
		}
		if err := sleep(ctx, c.h.t.poll); err != nil {
			return "", &lost{err}
		}
	}
	return "", &lost{fmt.Errorf("the VM does not appear (%s)", r.text())}
}

func (c *sshControl) unregister(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	r, err := c.sh.vim(ctx, false, "vmsvc/unregister", num)
	if err != nil {
		return err
	}
	return r.fault()
}

func (c *sshControl) reload(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	r, err := c.sh.vim(ctx, true, "vmsvc/reload", num)
	if err != nil {
		return err
	}
	return r.fault()
}

// state is a VM's power: on, off or suspended.
func (c *sshControl) state(ctx context.Context, num string) (string, error) {
	r, err := c.sh.vim(ctx, true, "vmsvc/power.getstate", num)
	if err != nil {
		return "", err
	}
	state, perr := vimcmd.ParsePowerState(r.out)
	if perr == nil {
		return state, nil
	}
	if err := r.fault(); err != nil {
		return "", err
	}
	return "", perr
}

// powerOn starts a VM and answers the one question that a restored VM may ask.
// vim-cmd waits until that is answered, so it runs beside the looks.
func (c *sshControl) powerOn(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	if state, err := c.state(ctx, num); err != nil || state == "on" {
		return err
	}
	starting, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		r   *reply
		err error
	}
	done := make(chan outcome, 1)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel() // before waiting
	running.Go(func() {
		r, err := c.sh.vim(starting, false, "vmsvc/power.on", num)
		done <- outcome{r, err}
	})
	answered := map[string]bool{}
	var said *outcome
	for pause, look := c.h.t.poll, 0; ; pause = min(pause*3/2, 10*c.h.t.poll) {
		select {
		case o := <-done:
			said = &o
		case <-time.After(pause):
		case <-ctx.Done():
			return &lost{context.Cause(ctx)}
		}
		state, err := c.state(ctx, num)
		switch {
		case err != nil:
			return &lost{err}
		case state == "on":
			return nil
		}
		if err := c.answer(ctx, vm, num, answered); err != nil {
			return err
		}
		if said == nil {
			continue
		}
		done = nil
		switch look++; {
		case said.err != nil:
			return said.err
		case said.r.fault() != nil:
			return said.r.fault()
		case strings.Contains(said.r.out+said.r.err, "Power on failed"):
			return fmt.Errorf("the host could not start it; its vmware.log says why")
		case look >= appear:
			return fmt.Errorf("the host said nothing against it, but the VM does not run (%s)", said.r.text())
		}
	}
}

// answer gives the answer that a VM waits for, once a question.
func (c *sshControl) answer(ctx context.Context, vm, num string, answered map[string]bool) error {
	r, err := c.sh.vim(ctx, true, "vmsvc/message", num)
	if err != nil {
		return err
	}
	m, perr := vimcmd.ParseMessage(r.out)
	if perr != nil {
		if err := r.fault(); err != nil {
			return err
		}
		return perr
	}
	if m == nil || answered[m.ID] {
		return nil
	}
	var labels []string
	var choice *vimcmd.Choice
	for i := range m.Choices {
		labels = append(labels, m.Choices[i].Text)
	}
	if asksMoved(m.Text) {
		keep, err := c.wantsToKeep(ctx, vm)
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(m.Choices, func(o vimcmd.Choice) bool { return saysMoved(o.Text, keep) }); i >= 0 {
			choice = &m.Choices[i]
		}
	}
	if choice == nil {
		return fmt.Errorf("the VM waits for an answer: %q (%s); give it in the host's own interface", strings.TrimSpace(m.Text), strings.Join(labels, ", "))
	}
	answered[m.ID] = true
	r, err = c.sh.vim(ctx, false, "vmsvc/message", num, m.ID, strconv.Itoa(choice.Number))
	if err != nil && ctx.Err() == nil {
		delete(answered, m.ID) // asked for again if it did not arrive
		return nil
	}
	if err != nil {
		return err
	}
	return r.fault()
}

// wantsToKeep reads uuid.action of the .vmx, as soapControl does.
func (c *sshControl) wantsToKeep(ctx context.Context, vm string) (bool, error) {
	c.h.mu.Lock()
	file := c.h.paths[vm]
	c.h.mu.Unlock()
	text, err := (&shellFiles{c.sh}).readFile(ctx, file, vmx.MaxSize)
	if err != nil {
		return false, err
	}
	config, err := vmx.Parse(text)
	if err != nil {
		return false, err
	}
	action, _ := config.Get("uuid.action")
	return strings.EqualFold(action, "keep"), nil
}

func (c *sshControl) powerOff(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	if state, err := c.state(ctx, num); err != nil || state == "off" {
		return err
	}
	r, err := c.sh.vim(ctx, false, "vmsvc/power.off", num)
	if err != nil {
		return err
	}
	said := r.fault()
	for range appear {
		state, err := c.state(ctx, num)
		switch {
		case err != nil:
			return &lost{err}
		case state == "off":
			return nil
		case said != nil:
			return said
		}
		if err := sleep(ctx, c.h.t.poll); err != nil {
			return &lost{err}
		}
	}
	return fmt.Errorf("the host said nothing against it, but the VM still runs (%s)", r.text())
}

func (c *sshControl) makeDirectory(ctx context.Context, dsPath string) error {
	dir, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	_, err = c.sh.words(ctx, false, "mkdir", dir)
	return err
}

// remove takes files and folders alike. It may run twice.
func (c *sshControl) remove(ctx context.Context, dsPath string) error {
	_, inside, err := splitPath(dsPath)
	if err != nil {
		return err
	}
	file, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	if inside == "" || path.Dir(file) == "/vmfs/volumes" {
		return fmt.Errorf("%q is a whole datastore", dsPath)
	}
	_, err = c.sh.words(ctx, true, "rm", "-rf", file)
	return err
}
