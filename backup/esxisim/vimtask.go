package esxisim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// vimTask is a task that vim-cmd started.
type vimTask struct {
	info types.TaskInfo
	vm   int
}

// taskMemory is how long a finished task can be asked about.
const taskMemory = 10 * time.Minute

// vimTasks are the tasks of the host's daemon that shells started, oldest first.
type vimTasks struct {
	mu   sync.Mutex
	list []*vimTask
}

func (t *vimTasks) add(n *vimTask) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.list) >= keptTasks {
		t.list = t.list[1:]
	}
	t.list = append(t.list, n)
}

// each gives copies of those that are remembered.
func (t *vimTasks) each(now time.Time, f func(vm int, info types.TaskInfo)) {
	t.mu.Lock()
	var kept []vimTask
	for _, k := range t.list {
		if done := k.info.CompleteTime; done == nil || now.Sub(*done) < taskMemory {
			kept = append(kept, *k)
		}
	}
	t.mu.Unlock()
	for _, k := range kept {
		f(k.vm, k.info)
	}
}

// task runs an operation on the VM as a task. With async the call returns while
// it goes on. The operation goes on, too, when the shell that asked for it is
// gone: it is the host's daemon that does it.
func (v *vimCall) task(name string, async bool, run func(context.Context) error) error {
	h := v.c.h
	n := h.tasks.Add(1)
	now := h.o.Clock()
	ref := vmRef(v.vm.ID())
	k := &vimTask{vm: v.vm.ID(), info: types.TaskInfo{
		Key: fmt.Sprintf("haTask-%d-vim.%s-%d", v.vm.ID(), name, n), Name: "vim." + name, DescriptionId: name, Entity: &ref, EntityName: v.vm.Name(),
		State: types.TaskInfoStateRunning, QueueTime: now, StartTime: &now, Reason: &types.TaskReasonUser{UserName: h.o.User}, EventChainId: int32(n),
	}}
	k.info.Task = types.ManagedObjectReference{Type: "Task", Value: k.info.Key}
	v.c.tasks.add(k)
	done := make(chan error, 1)
	h.running.Go(func() {
		err := run(h.ctx)
		end := h.o.Clock()
		v.c.tasks.mu.Lock()
		k.info.CompleteTime, k.info.State, k.info.Progress = &end, types.TaskInfoStateSuccess, 100
		if err != nil {
			s := h.vimFault(err, v.vm)
			k.info.State, k.info.Error = types.TaskInfoStateError, &types.LocalizedMethodFault{Fault: s.fault, LocalizedMessage: s.text}
		}
		v.c.tasks.mu.Unlock()
		done <- err
	})
	if async {
		return nil
	}
	select {
	case err := <-done:
		return err
	case <-v.ctx.Done():
		return statusError(1)
	}
}

func (v *vimCall) taskList() error { return v.listTasks(v.vm.ID()) }

func (v *vimCall) allTasks() error { return v.listTasks(0) }

func (v *vimCall) listTasks(vm int) error {
	refs := []types.ManagedObjectReference{}
	v.c.tasks.each(v.c.h.o.Clock(), func(of int, info types.TaskInfo) {
		if vm == 0 || vm == of {
			refs = append(refs, info.Task)
		}
	})
	v.dump(refs)
	return nil
}

func (v *vimCall) taskInfo() error {
	id := v.args[0]
	var found *types.TaskInfo
	v.c.tasks.each(v.c.h.o.Clock(), func(_ int, info types.TaskInfo) {
		if info.Key == id || "vim.Task:"+info.Key == id {
			found = &info
		}
	})
	if found == nil {
		return soapError{
			&types.ManagedObjectNotFound{Obj: types.ManagedObjectReference{Type: "Task", Value: id}},
			"The object has already been deleted or has not been completely created",
		}
	}
	v.dump(found)
	return nil
}
