package esxisim

import (
	"context"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
)

// areasPerAnswer is how many changed areas one answer holds, so that clients
// must ask again as they must on a host with a fragmented disk.
const areasPerAnswer = 500

// handlers are the methods of this host's own.
var handlers = map[string]handler{
	"PowerOnVM_Task":  vmTask("powerOn", func(c *call, vm *hv.VM, _ any) (any, error) { return nil, vm.Start(c.h.ctx) }),
	"PowerOffVM_Task": vmTask("powerOff", func(_ *call, vm *hv.VM, _ any) (any, error) { return nil, vm.PowerOff() }),
	"SuspendVM_Task":  vmTask("suspend", func(_ *call, vm *hv.VM, _ any) (any, error) { return nil, vm.Suspend() }),
	"AnswerVM":        answerVM,
	"ResetVM_Task":    vmTask("reset", func(_ *call, vm *hv.VM, _ any) (any, error) { return nil, reset(vm) }),
	"ShutdownGuest":   vmCall(func(_ *call, vm *hv.VM, _ any) (any, error) { return &types.ShutdownGuestResponse{}, vm.PowerOff() }),
	"RebootGuest":     vmCall(func(_ *call, vm *hv.VM, _ any) (any, error) { return &types.RebootGuestResponse{}, reset(vm) }),
	"ReconfigVM_Task": vmTask("reconfigure", func(c *call, vm *hv.VM, b any) (any, error) {
		return nil, c.h.reconfigure(vm, &b.(*types.ReconfigVM_Task).Spec)
	}),
	"Rename_Task": vmTask("rename", func(_ *call, vm *hv.VM, b any) (any, error) {
		name := b.(*types.Rename_Task).NewName
		return nil, vm.Reconfigure(func(x *vmx.File) error { x.Set("displayName", name); return nil })
	}),
	"UnregisterVM": vmCall(func(_ *call, vm *hv.VM, _ any) (any, error) { return &types.UnregisterVMResponse{}, vm.Unregister() }),
	"Destroy_Task": vmTask("destroy", func(_ *call, vm *hv.VM, _ any) (any, error) { return nil, vm.Destroy() }),
	"Reload":       vmCall(func(_ *call, vm *hv.VM, _ any) (any, error) { return &types.ReloadResponse{}, vm.Reload() }),
	"RefreshStorageInfo": vmCall(func(c *call, vm *hv.VM, _ any) (any, error) {
		c.h.project(vm.ID())
		return &types.RefreshStorageInfoResponse{}, nil
	}),
	"CreateSnapshot_Task": vmTask("createSnapshot", func(_ *call, vm *hv.VM, b any) (any, error) {
		r := b.(*types.CreateSnapshot_Task)
		return createSnapshot(vm, hv.SnapshotOptions{Name: r.Name, Description: r.Description, Memory: r.Memory, Quiesce: r.Quiesce})
	}),
	"CreateSnapshotEx_Task": vmTask("createSnapshotEx", func(_ *call, vm *hv.VM, b any) (any, error) {
		r := b.(*types.CreateSnapshotEx_Task)
		return createSnapshot(vm, hv.SnapshotOptions{Name: r.Name, Description: r.Description, Memory: r.Memory, Quiesce: r.QuiesceSpec != nil})
	}),
	"RemoveAllSnapshots_Task": vmTask("removeAllSnapshots", func(c *call, vm *hv.VM, _ any) (any, error) {
		return nil, vm.RemoveAllSnapshots(c.h.ctx)
	}),
	"RevertToCurrentSnapshot_Task": vmTask("revertToCurrentSnapshot", func(_ *call, vm *hv.VM, _ any) (any, error) { return nil, vm.Revert(0) }),
	"ConsolidateVMDisks_Task": vmTask("consolidateDisks", func(c *call, vm *hv.VM, _ any) (any, error) {
		return nil, vm.Consolidate(c.h.ctx)
	}),
	"RemoveSnapshot_Task": snapshotTask("remove", func(c *call, vm *hv.VM, id int, b any) error {
		return vm.RemoveSnapshot(c.h.ctx, id, b.(*types.RemoveSnapshot_Task).RemoveChildren)
	}),
	"RevertToSnapshot_Task": snapshotTask("revert", func(_ *call, vm *hv.VM, id int, b any) error {
		on, quiet := vm.On(), b.(*types.RevertToSnapshot_Task).SuppressPowerOn
		err := vm.Revert(id)
		if err == nil && quiet != nil && *quiet && !on && vm.On() {
			err = vm.PowerOff()
		}
		return err
	}),
	"QueryChangedDiskAreas": queryChangedDiskAreas,
	"RegisterVM_Task":       registerVM,
	"CreateVM_Task":         createVM,

	"MakeDirectory":                  makeDirectory,
	"DeleteDatastoreFile_Task":       deleteFile,
	"MoveDatastoreFile_Task":         moveFile,
	"CopyDatastoreFile_Task":         copyFile,
	"CreateVirtualDisk_Task":         createDisk,
	"DeleteVirtualDisk_Task":         deleteDisk,
	"QueryVirtualDiskUuid":           diskID,
	"SearchDatastore_Task":           searchDatastore,
	"SearchDatastoreSubFolders_Task": searchDatastoreTree,
	"RefreshDatastore": func(c *call, _ any) (any, error) {
		c.h.refreshDatastore()
		return &types.RefreshDatastoreResponse{}, nil
	},
	"CancelTask": func(*call, any) (any, error) { return nil, unsupported("a task of this host cannot be cancelled") },
}

func vmCall(f func(c *call, vm *hv.VM, body any) (any, error)) handler {
	return func(c *call, body any) (any, error) {
		vm, err := c.vm()
		if err != nil {
			return nil, err
		}
		res, err := f(c, vm, body)
		if err != nil {
			return nil, c.h.powerFault(err, vm)
		}
		return res, nil
	}
}

func vmTask(op string, f func(c *call, vm *hv.VM, body any) (any, error)) handler {
	return func(c *call, body any) (any, error) {
		vm, err := c.vm()
		if err != nil {
			return nil, err
		}
		return c.start(c.entity(), "VirtualMachine."+op, func() (any, error) {
			res, err := f(c, vm, body)
			return res, c.h.powerFault(err, vm)
		})
	}
}

func snapshotTask(op string, f func(c *call, vm *hv.VM, id int, body any) error) handler {
	return func(c *call, body any) (any, error) {
		vm, id, err := c.h.snapshotOf(c.this)
		if err != nil {
			return nil, err
		}
		c.this = vmRef(vm.ID()) // the task is the VM's
		return c.start(c.entity(), "vm.Snapshot."+op, func() (any, error) { return nil, f(c, vm, id, body) })
	}
}

// entity is the simulator's object that a call is for.
func (c *call) entity() mo.Reference {
	if obj := c.ctx.Map.Get(c.this); obj != nil {
		return obj
	}
	return c.ctx.Map.Get(esx.HostSystem.Self) // it went meanwhile
}

// answerVM answers a VM's question: the choices are numbered from 0.
func answerVM(c *call, b any) (any, error) {
	req := b.(*types.AnswerVM)
	vm, err := c.vm()
	if err != nil {
		return nil, err
	}
	id, err1 := strconv.Atoi(strings.TrimPrefix(req.QuestionId, questionPrefix))
	choice, err2 := strconv.Atoi(req.AnswerChoice)
	if err1 != nil || err2 != nil {
		return nil, invalid("questionId")
	}
	return &types.AnswerVMResponse{}, vm.Answer(id, choice)
}

// powerFault completes a fault about the power state with the states.
func (h *Host) powerFault(err error, vm *hv.VM) error {
	if err == nil {
		return nil
	}
	s := h.asFault(err)
	if f, ok := s.fault.(*types.InvalidPowerState); ok {
		f.ExistingState, f.RequestedState = state(vm), power(!vm.On(), false)
	}
	return s
}

func reset(vm *hv.VM) error {
	if err := vm.PowerOff(); err != nil {
		return err
	}
	return vm.PowerOn()
}

func createSnapshot(vm *hv.VM, o hv.SnapshotOptions) (any, error) {
	id, err := vm.CreateSnapshot(o)
	if err != nil {
		return nil, err
	}
	return snapshotRef(vm.ID(), id), nil
}

func queryChangedDiskAreas(c *call, b any) (any, error) {
	req := b.(*types.QueryChangedDiskAreas)
	vm, err := c.vm()
	if err != nil {
		return nil, err
	}
	snapshot := 0
	if req.Snapshot != nil {
		of, id, err := c.h.snapshotOf(*req.Snapshot)
		if err != nil {
			return nil, err
		}
		if of != vm {
			return nil, invalid("snapshot")
		}
		snapshot = id
	}
	areas, capacity, err := vm.Changed(context.Background(), snapshot, req.DeviceKey, req.ChangeId)
	if err != nil {
		return nil, c.h.powerFault(err, vm)
	}
	if req.StartOffset < 0 || req.StartOffset >= capacity {
		return nil, invalid("startOffset")
	}
	return &types.QueryChangedDiskAreasResponse{Returnval: page(areas, req.StartOffset, capacity)}, nil
}

// page is the answer from an offset on: so many areas, and up to where they
// tell everything.
func page(areas []vmdk.Area, start, capacity int64) types.DiskChangeInfo {
	info := types.DiskChangeInfo{StartOffset: start, Length: capacity - start}
	for _, a := range areas {
		from, end := max(a.Offset, start), min(a.End(), capacity)
		if from >= end {
			continue
		}
		if len(info.ChangedArea) == areasPerAnswer {
			last := info.ChangedArea[areasPerAnswer-1]
			info.Length = last.Start + last.Length - start
			break
		}
		info.ChangedArea = append(info.ChangedArea, types.DiskChangeExtent{Start: from, Length: end - from})
	}
	return info
}

func registerVM(c *call, b any) (any, error) {
	req := b.(*types.RegisterVM_Task)
	if c.this.Type != "Folder" {
		return nil, gone(c.this)
	}
	if req.AsTemplate {
		return nil, unsupported("templates")
	}
	return c.start(c.entity(), "Folder.registerVm", func() (any, error) {
		rel, err := c.h.hv.Resolve(req.Path)
		if err != nil {
			return nil, err
		}
		vm, err := c.h.hv.Register(rel, req.Name)
		if err != nil {
			return nil, err
		}
		return vmRef(vm.ID()), nil
	})
}

func createVM(c *call, b any) (any, error) {
	req := b.(*types.CreateVM_Task)
	if c.this.Type != "Folder" {
		return nil, gone(c.this)
	}
	return c.start(c.entity(), "Folder.createVm", func() (any, error) { return c.h.createVM(&req.Config) })
}

// createVM makes a VM as a spec describes it.
func (h *Host) createVM(spec *types.VirtualMachineConfigSpec) (any, error) {
	if spec.Name == "" {
		return nil, invalid("configSpec.name")
	}
	if spec.Files == nil || spec.Files.VmPathName == "" {
		return nil, invalid("configSpec.files.vmPathName")
	}
	rel, err := h.hv.Resolve(spec.Files.VmPathName)
	if err != nil {
		return nil, err
	}
	if path.Ext(rel) != ".vmx" { // a datastore, or a directory: the VM's own is made in it
		rel = path.Join(rel, spec.Name)
		for i := 1; ; i++ {
			dir := rel
			if i > 1 {
				dir = fmt.Sprintf("%s_%d", rel, i-1)
			}
			if _, err := h.hv.Stat(dir); err != nil {
				rel = path.Join(dir, spec.Name+".vmx")
				break
			}
		}
	}
	if _, err := h.hv.Stat(path.Dir(rel)); err != nil {
		if err := h.hv.Mkdir(path.Dir(rel), false); err != nil {
			return nil, err
		}
	}
	x := hv.NewConfig(hv.Config{Name: spec.Name, GuestID: guestOS(or(spec.GuestId, "otherGuest")), CPUs: 1, MemoryMiB: 256, Firmware: spec.Firmware, Hardware: h.edition.hardware})
	if err := h.apply(x, path.Dir(rel), spec); err != nil {
		return nil, err
	}
	vm, err := h.hv.CreateVM(rel, x)
	if err != nil {
		return nil, err
	}
	return vmRef(vm.ID()), nil
}
