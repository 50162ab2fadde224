package esxisim

import (
	"fmt"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// keptTasks is how many tasks can be asked about; a host forgets older ones.
const keptTasks = 200

// taskResponse is the Response of every method that starts a task.
type taskResponse struct {
	Returnval types.ManagedObjectReference `xml:"returnval"`
}

// start runs a task. Other than the simulator's own, it does not hold the
// entity's lock while it runs: a client can read a VM whose snapshot is being
// removed, as on a real host. name is e.g. "VirtualMachine.createSnapshot".
func (c *call) start(entity mo.Reference, name string, run func() (any, error)) (any, error) {
	h := c.h
	ref := entity.Reference()
	kind, op, _ := strings.Cut(name, ".")
	t := simulator.CreateTask(entity, op, nil)
	n := h.tasks.Add(1)
	t.Self = types.ManagedObjectReference{Type: "Task", Value: fmt.Sprintf("haTask-%s-vim.%s-%d", ref.Value, name, n)}
	t.Info.Key, t.Info.Task = t.Self.Value, t.Self
	t.Info.Name, t.Info.DescriptionId = c.name, kind+"."+op
	t.Info.EventChainId = int32(n)
	t.Info.Reason = &types.TaskReasonUser{UserName: h.o.User}
	now := h.o.Clock()
	t.Info.QueueTime, t.Info.StartTime, t.Info.State = now, &now, types.TaskInfoStateRunning
	func() {
		h.world.Lock()
		defer h.world.Unlock()
		c.ctx.WithLock(entity, func() {
			if e, ok := entity.(mo.Entity); ok {
				t.Info.EntityName = e.Entity().Name
			}
			c.ctx.Map.Put(t)
		})
	}()
	h.forgetTasks(t.Self)

	h.running.Go(func() {
		h.pause(c.task.delay)
		err := c.task.err
		var result any
		if err == nil {
			result, err = run()
		}
		now := h.o.Clock()
		changes := []types.PropertyChange{
			{Name: "info.completeTime", Val: now},
			{Name: "info.result", Val: result},
			{Name: "info.progress", Val: int32(100)},
			{Name: "info.state", Val: types.TaskInfoStateSuccess},
		}
		if err != nil {
			h.log.Info("task failed", "task", t.Self.Value, "err", err)
			s := h.asFault(err)
			changes = []types.PropertyChange{
				{Name: "info.completeTime", Val: now},
				{Name: "info.error", Val: types.LocalizedMethodFault{Fault: s.fault, LocalizedMessage: s.text}},
				{Name: "info.state", Val: types.TaskInfoStateError},
			}
		}
		h.world.Lock()
		defer h.world.Unlock()
		ctx := h.context()
		ctx.Map.AtomicUpdate(ctx, t, changes)
	})
	return &taskResponse{t.Self}, nil
}

// forgetTasks takes a new task into the list and drops the oldest.
func (h *Host) forgetTasks(ref types.ManagedObjectReference) {
	h.mu.Lock()
	h.taskRefs = append(h.taskRefs, ref)
	var old []types.ManagedObjectReference
	if n := len(h.taskRefs) - keptTasks; n > 0 {
		old, h.taskRefs = h.taskRefs[:n:n], h.taskRefs[n:]
	}
	h.mu.Unlock()
	for _, ref := range old {
		ctx := h.context()
		ctx.Map.Remove(ctx, ref)
	}
}
