package esxisim

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
)

// object is the VM as the API shows it.
func (v *vimCall) object() (mo.VirtualMachine, error) {
	info, err := v.vm.Info()
	if err != nil {
		return mo.VirtualMachine{}, err
	}
	return v.c.h.managed(info), nil
}

// show prints a heading and a part of the VM's object.
func (v *vimCall) show(heading string, part func(*mo.VirtualMachine) any) error {
	vm, err := v.object()
	if err != nil {
		return err
	}
	if heading != "" {
		fmt.Fprintf(v.p.Out, "%s\n\n", heading)
	}
	v.dump(part(&vm))
	return nil
}

func (v *vimCall) summary() error {
	return v.show("Listsummary:", func(vm *mo.VirtualMachine) any { return &vm.Summary })
}

func (v *vimCall) config() error {
	return v.show("Configuration:", func(vm *mo.VirtualMachine) any { return vm.Config })
}

func (v *vimCall) runtime() error {
	return v.show("Runtime information", func(vm *mo.VirtualMachine) any { return &vm.Runtime })
}

func (v *vimCall) guest() error {
	return v.show("Guest information:", func(vm *mo.VirtualMachine) any { return vm.Guest })
}

func (v *vimCall) fileLayoutEx() error {
	return v.show("", func(vm *mo.VirtualMachine) any { return vm.LayoutEx })
}

func (v *vimCall) fileLayout() error {
	return v.show("Filelayout:", func(vm *mo.VirtualMachine) any { return vm.Layout })
}

func (v *vimCall) devices() error {
	return v.show("Devices:", func(vm *mo.VirtualMachine) any { return &vm.Config.Hardware })
}

func (v *vimCall) snapshotInfo() error {
	return v.show("Snapshot info:", func(vm *mo.VirtualMachine) any { return vm.Snapshot })
}

func (v *vimCall) datastores() error {
	capacity, free := v.c.h.hv.Space()
	for _, kv := range [][2]any{
		{"name", v.c.h.hv.Datastore()},
		{"url", "/vmfs/volumes/" + v.c.h.hv.UUID()},
		{"capacity", capacity},
		{"freeSpace", free},
		{"accessible", true},
		{"type", "VMFS"},
		{"multipleHostAccess", false},
	} {
		fmt.Fprintf(v.p.Out, "%-20s %v\n", kv[0], kv[1])
	}
	return nil
}

func (v *vimCall) powerState() error {
	fmt.Fprintln(v.p.Out, "Retrieved runtime info")
	fmt.Fprintln(v.p.Out, map[types.VirtualMachinePowerState]string{
		types.VirtualMachinePowerStatePoweredOn: "Powered on", types.VirtualMachinePowerStatePoweredOff: "Powered off",
		types.VirtualMachinePowerStateSuspended: "Suspended",
	}[state(v.vm)])
	return nil
}

// powerText lets old releases say only that it failed.
func (v *vimCall) powerText(what string, err error) error {
	if err != nil && v.c.h.edition.shell.powerText {
		fmt.Fprintln(v.p.Out, what+" failed")
		return statusError(v.c.h.edition.shell.faultStatus)
	}
	return err
}

func (v *vimCall) powerOn() error {
	fmt.Fprintln(v.p.Out, "Powering on VM:")
	return v.powerText("Power on", v.task("VirtualMachine.powerOn", false, v.vm.Start))
}

func (v *vimCall) powerOff() error {
	fmt.Fprintln(v.p.Out, "Powering off VM:")
	return v.powerText("Power off", v.task("VirtualMachine.powerOff", false, func(context.Context) error { return v.vm.PowerOff() }))
}

func (v *vimCall) suspend() error {
	fmt.Fprintln(v.p.Out, "Suspending VM:")
	return v.task("VirtualMachine.suspend", false, func(context.Context) error { return v.vm.Suspend() })
}

// message shows the question a VM waits with, or answers it.
func (v *vimCall) message() error {
	q := v.vm.Question()
	if len(v.args) >= 2 {
		id, err1 := strconv.Atoi(strings.TrimPrefix(v.args[0], questionPrefix))
		choice, err2 := strconv.Atoi(v.args[1])
		if err1 != nil || err2 != nil {
			return invalid("questionId")
		}
		return v.vm.Answer(id, choice)
	}
	if q == nil {
		fmt.Fprintln(v.p.Out, "No message.")
		return nil
	}
	prefix := questionPrefix
	if v.c.h.edition.name == "6.5" {
		prefix = ""
	}
	fmt.Fprintf(v.p.Out, "Virtual machine message %s%d:\n%s\n\n", prefix, q.ID, q.Text)
	for i, c := range q.Choices {
		mark := ""
		if c.Default {
			mark = " [default]"
		}
		fmt.Fprintf(v.p.Out, "%d. %s%s\n", i, c.Label, mark)
	}
	return nil
}

func (v *vimCall) shutdown() error {
	return v.task("VirtualMachine.shutdownGuest", false, func(context.Context) error { return v.vm.PowerOff() })
}

func (v *vimCall) reset() error {
	fmt.Fprintln(v.p.Out, "Reset VM:")
	return v.task("VirtualMachine.reset", false, func(context.Context) error { return reset(v.vm) })
}

func flag01(args []string, i int) bool {
	return i < len(args) && (args[i] == "1" || strings.EqualFold(args[i], "true"))
}

func (v *vimCall) createSnapshot() error {
	arg := func(i int) string {
		if i < len(v.args) {
			return v.args[i]
		}
		return ""
	}
	fmt.Fprintln(v.p.Out, "Create Snapshot:")
	o := hv.SnapshotOptions{Name: arg(0), Description: arg(1), Memory: flag01(v.args, 2), Quiesce: flag01(v.args, 3)}
	return v.task("VirtualMachine.createSnapshot", v.c.h.edition.shell.async, func(context.Context) error {
		_, err := v.vm.CreateSnapshot(o)
		return err
	})
}

// snapshotID reads the number of a snapshot that there is.
func (v *vimCall) snapshotID() (int, error) {
	id, err := strconv.Atoi(v.args[0])
	info, ierr := v.vm.Info()
	if ierr != nil {
		return 0, ierr
	}
	for _, s := range info.Snapshots {
		if err == nil && s.ID == id {
			return id, nil
		}
	}
	return 0, soapError{&types.NotFound{}, fmt.Sprintf("Unable to find a snapshot corresponding to \"%s\"", v.args[0])}
}

func (v *vimCall) removeSnapshot() error {
	id, err := v.snapshotID()
	if err != nil {
		return err
	}
	fmt.Fprintln(v.p.Out, "Remove Snapshot:")
	err = v.task("vm.Snapshot.remove", false, func(ctx context.Context) error { return v.vm.RemoveSnapshot(ctx, id, flag01(v.args, 1)) })
	return v.withTree(err)
}

func (v *vimCall) removeAll() error {
	fmt.Fprintln(v.p.Out, "Remove All Snapshots:")
	err := v.task("VirtualMachine.removeAllSnapshots", false, v.vm.RemoveAllSnapshots)
	return v.withTree(err)
}

func (v *vimCall) revert() error {
	id, err := v.snapshotID()
	if err != nil {
		return err
	}
	fmt.Fprintln(v.p.Out, "Revert Snapshot:")
	err = v.task("vm.Snapshot.revert", false, func(context.Context) error {
		on := v.vm.On()
		err := v.vm.Revert(id)
		if err == nil && flag01(v.args, 1) && !on && v.vm.On() {
			err = v.vm.PowerOff()
		}
		return err
	})
	return v.withTree(err)
}

// withTree prints the tree after a change of it.
func (v *vimCall) withTree(err error) error {
	if err != nil {
		return err
	}
	info, err := v.vm.Info()
	if err == nil {
		v.tree(info, 0, "")
	}
	return err
}

func (v *vimCall) register() error {
	name := v.args[0]
	if !strings.HasPrefix(name, "/") && !strings.HasPrefix(name, "[") {
		name = "/vmfs/volumes/" + name
	}
	rel, err := v.c.rel(v.p, name)
	if err != nil {
		return soapError{&types.NotFound{}, "The object or item referred to could not be found."}
	}
	display := ""
	if len(v.args) > 1 {
		display = v.args[1]
	}
	vm, err := v.c.h.hv.Register(path.Clean(rel), display)
	switch {
	case errors.Is(err, hv.ErrNotFound):
		return soapError{&types.NotFound{}, "The object or item referred to could not be found."}
	case err != nil:
		return err
	}
	fmt.Fprintln(v.p.Out, vm.ID())
	return nil
}

func (v *vimCall) license() error {
	if v.args[0] != "--show" {
		fmt.Fprintf(v.p.Out, "Invalid option '%s'.\n", v.args[0])
		return statusError(1)
	}
	l := v.c.h.edition.license(v.c.h.o.Free)
	fmt.Fprintf(v.p.Out, "[200] License to be shown:\n   serial: %s\n   vmodl key: %s\n   name: %s\n   total: 0\n   used:  1\n   unit: %s\n"+
		"   Properties:\n     [ProductName] = %s\n     [ProductVersion] = %s.0\n",
		l.LicenseKey, l.EditionKey, l.Name, l.CostUnit, "VMware ESX Server", v.c.h.edition.name[:1])
	return nil
}

func (v *vimCall) hostSystem() *simulator.HostSystem {
	return v.c.h.model.Map().Get(esx.HostSystem.Self).(*simulator.HostSystem)
}

func (v *vimCall) hostSummary() error {
	v.c.h.world.RLock()
	defer v.c.h.world.RUnlock()
	v.dump(&v.hostSystem().Summary)
	return nil
}

func (v *vimCall) hostHardware() error {
	v.c.h.world.RLock()
	defer v.c.h.world.RUnlock()
	v.dump(v.hostSystem().Hardware)
	return nil
}

func (v *vimCall) datastoreSummary() *types.DatastoreSummary {
	v.c.h.refreshDatastore()
	v.c.h.world.RLock()
	defer v.c.h.world.RUnlock()
	s := v.c.h.ds.Summary
	s.Datastore = &v.c.h.ds.Self
	return &s
}

func (v *vimCall) datastoreSummaries() error {
	d := v.c.dumper(v.p.Out)
	d.object([]types.DatastoreSummary{*v.datastoreSummary()})
	return nil
}

func (v *vimCall) datastoreInfo() error {
	if n := v.args[0]; n != v.c.h.hv.Datastore() && n != v.c.h.hv.UUID() {
		return soapError{&types.NotFound{}, "The object or item referred to could not be found."}
	}
	v.dump(v.datastoreSummary())
	return nil
}
