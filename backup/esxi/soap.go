package esxi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// soapControl changes the host through its API.
type soapControl struct{ h *Host }

var _ control = (*soapControl)(nil)

// lost marks a change whose outcome is not known: its answer, or the end of its
// task, never arrived. What came of it has to be looked up.
type lost struct{ err error }

func (l *lost) Error() string { return l.err.Error() }
func (l *lost) Unwrap() error { return l.err }

func isLost(err error) bool {
	var l *lost
	return errors.As(err, &l)
}

// run starts a task and waits for its end. The session is looked after first,
// so that a connection which broke while idle is not met by the call that
// cannot be repeated.
func (c *soapControl) run(ctx context.Context, start func(context.Context) (types.ManagedObjectReference, error)) (*types.TaskInfo, error) {
	if err := c.h.session.alive(ctx); err != nil {
		return nil, err
	}
	// Who cancels while the call is on its way would not know whether the task
	// began, and might look for it before it did. The answer comes at once.
	starting, cancel := outlive(ctx, startGrace)
	ref, err := start(starting)
	cancel()
	if err != nil {
		if transient(err) || ctx.Err() != nil {
			err = &lost{err}
		}
		return nil, err
	}
	return c.wait(ctx, ref, nil)
}

// startGrace is how long a cancelled caller waits for the answer to a call that
// starts a task.
const startGrace = 5 * time.Second

// outlive is ctx, ending grace later than it.
func outlive(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(grace):
			cancel(context.Cause(ctx))
		case <-longer.Done():
		}
	})
	return longer, func() { stop(); cancel(nil) }
}

// wait looks at a task until it ends. It polls: govmomi's waiting keeps a
// collector in the session, which an expired session or a broken connection
// takes along, and answers a cancelled context with success. between runs
// before each look.
func (c *soapControl) wait(ctx context.Context, ref types.ManagedObjectReference, between func(context.Context) error) (*types.TaskInfo, error) {
	pause := c.h.t.poll
	for {
		if between != nil {
			if err := between(ctx); err != nil {
				return nil, err
			}
		}
		t, err := fetchOne[mo.Task](ctx, c.h, ref, "info")
		if err != nil {
			switch {
			case gone(err), errors.Is(err, ErrNotFound):
				// ESXi forgets tasks when its agent restarts, and ten minutes after their end.
				err = &lost{errf(ErrUnreachable, nil, "%s has lost track of the task: its management agent was restarted; run it again", c.h.name)}
			case transient(err), ctx.Err() != nil:
				err = &lost{err}
			}
			return nil, err
		}
		switch t.Info.State {
		case types.TaskInfoStateSuccess:
			return &t.Info, nil
		case types.TaskInfoStateError:
			if t.Info.Error == nil || t.Info.Error.Fault == nil {
				return nil, errors.New("the task failed and the host does not say why")
			}
			return nil, task.Error{LocalizedMethodFault: t.Info.Error, Description: t.Info.Description}
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, &lost{err}
		}
		pause = min(pause*3/2, 10*c.h.t.poll)
	}
}

func (c *soapControl) createSnapshot(ctx context.Context, vm, name, description string, quiesce bool) (string, error) {
	info, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.CreateSnapshot_Task(ctx, c.h.session.vc, &types.CreateSnapshot_Task{
			This: vmRef(vm), Name: name, Description: description, Memory: false, Quiesce: quiesce,
		})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	if err != nil {
		return "", err
	}
	ref, ok := info.Result.(types.ManagedObjectReference)
	if !ok {
		return "", &lost{fmt.Errorf("the task ended without naming the snapshot")}
	}
	return ref.Value, nil
}

func (c *soapControl) removeSnapshot(ctx context.Context, id string, _ owner) error {
	_, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.RemoveSnapshot_Task(ctx, c.h.session.vc, &types.RemoveSnapshot_Task{
			This: snapshotRef(id), RemoveChildren: false, Consolidate: types.NewBool(true),
		})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	return err
}

func (c *soapControl) consolidate(ctx context.Context, vm string) error {
	_, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.ConsolidateVMDisks_Task(ctx, c.h.session.vc, &types.ConsolidateVMDisks_Task{This: vmRef(vm)})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	return err
}

func (c *soapControl) register(ctx context.Context, vmxPath, name string) (string, error) {
	info, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.RegisterVM_Task(ctx, c.h.session.vc, &types.RegisterVM_Task{
			This: c.h.place.folder, Path: vmxPath, Name: name, AsTemplate: false, Pool: &c.h.place.pool,
		})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	if err != nil {
		return "", err
	}
	ref, ok := info.Result.(types.ManagedObjectReference)
	if !ok {
		return "", &lost{fmt.Errorf("the task ended without naming the VM")}
	}
	return ref.Value, nil
}

func (c *soapControl) unregister(ctx context.Context, vm string) error {
	if err := c.h.session.alive(ctx); err != nil {
		return err
	}
	_, err := methods.UnregisterVM(ctx, c.h.session.vc, &types.UnregisterVM{This: vmRef(vm)})
	if transient(err) {
		err = &lost{err}
	}
	return err
}

// powerOn starts a VM and answers the one question that a restored VM may ask:
// whether it was moved or copied. ESXi holds the task until it is answered.
func (c *soapControl) powerOn(ctx context.Context, vm string) error {
	if err := c.h.session.alive(ctx); err != nil {
		return err
	}
	res, err := methods.PowerOnVM_Task(ctx, c.h.session.vc, &types.PowerOnVM_Task{This: vmRef(vm)})
	var ref types.ManagedObjectReference
	switch {
	case err == nil:
		ref = res.Returnval
	case transient(err) && ctx.Err() == nil:
		// The task may be running all the same, and it may be asking.
		var running bool
		var lookErr error
		if ref, running, lookErr = c.h.running(ctx, vm, "powerOn"); lookErr != nil || !running {
			return &lost{err}
		}
	default:
		return err
	}
	answered := map[string]bool{}
	_, err = c.wait(ctx, ref, func(ctx context.Context) error { return c.answer(ctx, vm, answered) })
	return err
}

// answer gives the answer that a VM waits for, once a question.
func (c *soapControl) answer(ctx context.Context, vm string, answered map[string]bool) error {
	m, err := fetchOne[mo.VirtualMachine](ctx, c.h, vmRef(vm), "runtime.question", "config.extraConfig")
	if err != nil {
		if transient(err) {
			err = &lost{err}
		}
		return err
	}
	q := m.Runtime.Question
	if q == nil || answered[q.Id] {
		return nil
	}
	choice, ok := choose(q, wantsToKeep(m))
	if !ok {
		var labels []string
		for _, o := range q.Choice.ChoiceInfo {
			labels = append(labels, o.GetElementDescription().Label)
		}
		return fmt.Errorf("the VM waits for an answer: %q (%s); give it in the host's own interface",
			strings.TrimSpace(q.Text), strings.Join(labels, ", "))
	}
	answered[q.Id] = true
	_, err = methods.AnswerVM(ctx, c.h.session.vc, &types.AnswerVM{This: vmRef(vm), QuestionId: q.Id, AnswerChoice: choice})
	if transient(err) {
		delete(answered, q.Id) // asked for again if it did not arrive
		return nil
	}
	return err
}

// wantsToKeep reads uuid.action of the .vmx, which says for itself whether the
// VM takes the place of its original ("keep") or stands beside it ("create").
func wantsToKeep(m *mo.VirtualMachine) bool {
	if m.Config == nil {
		return false
	}
	for _, o := range m.Config.ExtraConfig {
		v := o.GetOptionValue()
		if s, ok := v.Value.(string); ok && strings.EqualFold(v.Key, "uuid.action") {
			return strings.EqualFold(s, "keep")
		}
	}
	return false
}

// choose finds the answer to msg.uuid.altered by its text: the keys of the
// choices differ between versions.
func choose(q *types.VirtualMachineQuestionInfo, keep bool) (key string, ok bool) {
	about := asksMoved(q.Text)
	for _, m := range q.Message {
		about = about || m.Id == "msg.uuid.altered"
	}
	if !about {
		return "", false
	}
	for _, o := range q.Choice.ChoiceInfo {
		d := o.GetElementDescription()
		if saysMoved(d.Label+d.Summary, keep) {
			return d.Key, true
		}
	}
	return "", false
}

// asksMoved tells whether a question is the one about a moved or copied VM.
func asksMoved(text string) bool {
	return strings.Contains(text, "msg.uuid.altered") || strings.Contains(strings.ToLower(text), "moved or copied")
}

// saysMoved tells whether a choice says that the VM was moved (keep) or copied.
func saysMoved(label string, keep bool) bool {
	want := "copied"
	if keep {
		want = "moved"
	}
	return strings.Contains(strings.ToLower(strings.ReplaceAll(label, "_", "")), want)
}

func (c *soapControl) powerOff(ctx context.Context, vm string) error {
	_, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.PowerOffVM_Task(ctx, c.h.session.vc, &types.PowerOffVM_Task{This: vmRef(vm)})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	return err
}

func (c *soapControl) reload(ctx context.Context, vm string) error {
	if err := c.h.session.alive(ctx); err != nil {
		return err
	}
	_, err := methods.Reload(ctx, c.h.session.vc, &types.Reload{This: vmRef(vm)})
	return err
}

func (c *soapControl) makeDirectory(ctx context.Context, dsPath string) error {
	if err := c.h.session.alive(ctx); err != nil {
		return err
	}
	_, err := methods.MakeDirectory(ctx, c.h.session.vc, &types.MakeDirectory{
		This: *c.h.session.vc.ServiceContent.FileManager, Name: dsPath, Datacenter: &c.h.place.datacenter,
		CreateParentDirectories: types.NewBool(false),
	})
	return err
}

func (c *soapControl) remove(ctx context.Context, dsPath string) error {
	_, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.DeleteDatastoreFile_Task(ctx, c.h.session.vc, &types.DeleteDatastoreFile_Task{
			This: *c.h.session.vc.ServiceContent.FileManager, Name: dsPath, Datacenter: &c.h.place.datacenter,
		})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	return err
}

func snapshotRef(id string) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: id}
}

// settle waits until nothing that an earlier call may have started (one whose
// answer was lost, or of a process that died) is at work any more: on a VM, or
// on the host when vm is empty. kind is the end of the task's description id:
// createSnapshot, removeSnapshot, registerVm.
func (h *Host) settle(ctx context.Context, vm, kind string) error {
	deadline, cancel := context.WithTimeout(ctx, h.t.settleTime)
	defer cancel()
	for pause := h.t.poll; ; pause = min(2*pause, 20*h.t.poll) {
		busy, err := h.busy(ctx, vm, kind)
		if err != nil || !busy {
			return err
		}
		if err := sleep(deadline, pause); err != nil {
			if ctx.Err() != nil {
				return err
			}
			return errf(ErrBusy, err, "%s: a %s task has been at work for more than %s", h.name, kind, h.t.settleTime.Round(time.Second))
		}
	}
}

// busy asks whoever may know of such a task.
func (h *Host) busy(ctx context.Context, vm, kind string) (bool, error) {
	if busy, err := h.inv.busy(ctx, vm, kind); busy || err != nil || h.session == nil || !h.overSSH() {
		return busy, err
	}
	return h.ssh.busy(ctx, vm, kind)
}

// running finds a task that is queued or running.
func (h *Host) running(ctx context.Context, vm, kind string) (ref types.ManagedObjectReference, ok bool, err error) {
	recent, err := h.recentTasks(ctx, vm)
	if err != nil {
		return ref, false, err
	}
	for _, ref := range recent {
		t, err := fetchOne[mo.Task](ctx, h, ref, "info")
		if gone(err) || errors.Is(err, ErrNotFound) {
			continue // forgotten between the two calls
		}
		if err != nil {
			return ref, false, err
		}
		atWork := t.Info.State == types.TaskInfoStateQueued || t.Info.State == types.TaskInfoStateRunning
		if atWork && strings.HasSuffix(strings.ToLower(t.Info.DescriptionId), strings.ToLower(kind)) {
			return ref, true, nil
		}
	}
	return ref, false, nil
}

func (h *Host) recentTasks(ctx context.Context, vm string) ([]types.ManagedObjectReference, error) {
	if vm == "" {
		m, err := fetchOne[mo.TaskManager](ctx, h, *h.session.vc.ServiceContent.TaskManager, "recentTask")
		if err != nil {
			return nil, err
		}
		return m.RecentTask, nil
	}
	m, err := fetchOne[mo.VirtualMachine](ctx, h, vmRef(vm), "recentTask")
	if err != nil {
		return nil, err
	}
	return m.RecentTask, nil
}
