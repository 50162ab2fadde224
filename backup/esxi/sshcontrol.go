package esxi

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"hikae/backup/esxi/internal/vimcmd"
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
	if ok && d.kind == kind && c.h.now().Sub(d.since) < c.h.t.doubt {
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
