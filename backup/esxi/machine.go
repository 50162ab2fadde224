package esxi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/types"
)

// RegisterVM registers the VM whose .vmx lies at vmxPath under name. ErrExists
// when that .vmx is registered already.
func (h *Host) RegisterVM(ctx context.Context, vmxPath, name string) (*VM, error) {
	what := fmt.Sprintf("register %s as %s", vmxPath, name)
	var id string
	err := h.change(ctx, func(c control) (err error) {
		id, err = c.register(ctx, vmxPath, escapedName(name))
		return err
	})
	if isLost(err) && ctx.Err() == nil {
		if serr := h.settle(ctx, "", "registerVm"); serr != nil {
			return nil, h.explain(ctx, what, serr)
		}
		vms, verr := h.VMs(ctx)
		if verr != nil {
			return nil, verr
		}
		if i := slices.IndexFunc(vms, func(v VM) bool { return v.ConfigPath == vmxPath }); i >= 0 {
			return &vms[i], nil
		}
	}
	if err != nil {
		return nil, h.explain(ctx, what, err)
	}
	vm, err := h.refresh(ctx, id)
	return vm, h.explain(ctx, what, err)
}

// UnregisterVM makes the host forget a VM and leaves its files. One that is not
// registered any more is no error.
func (h *Host) UnregisterVM(ctx context.Context, vm *VM) error {
	what := "unregister " + vm.Name
	err := h.change(ctx, func(c control) error { return c.unregister(ctx, vm.ID) })
	if gone(err) {
		return nil
	}
	if isLost(err) && ctx.Err() == nil {
		if _, rerr := h.refresh(ctx, vm.ID); gone(rerr) || errors.Is(rerr, ErrNotFound) {
			return nil
		}
	}
	if fault.Is(err, &types.InvalidPowerState{}) {
		return fmt.Errorf("%s: %s: it is powered on; switch it off first", h.name, what)
	}
	return h.explain(ctx, what, err)
}

// PowerOn starts a VM; one that runs is no error. When ESXi asks whether the VM
// was moved or copied, the answer is "moved" if its .vmx says uuid.action =
// "keep", and "copied" (a new identity) otherwise. Any other question is an
// error with the question's text, and the VM goes on waiting.
func (h *Host) PowerOn(ctx context.Context, vm *VM) error {
	what := "power on " + vm.Name
	err := h.change(ctx, func(c control) error { return c.powerOn(ctx, vm.ID) })
	return h.powered(ctx, what, vm, types.VirtualMachinePowerStatePoweredOn, err)
}

// PowerOff stops a VM at once, as by pulling its plug; one that is off is no
// error.
func (h *Host) PowerOff(ctx context.Context, vm *VM) error {
	what := "power off " + vm.Name
	err := h.change(ctx, func(c control) error { return c.powerOff(ctx, vm.ID) })
	return h.powered(ctx, what, vm, types.VirtualMachinePowerStatePoweredOff, err)
}

// powered looks whether a change of power that failed has its result all the
// same.
func (h *Host) powered(ctx context.Context, what string, vm *VM, want types.VirtualMachinePowerState, err error) error {
	if err != nil && ctx.Err() == nil && (isLost(err) || fault.Is(err, &types.InvalidPowerState{})) {
		if now, rerr := h.refresh(ctx, vm.ID); rerr == nil && now.Power == string(want) {
			return nil
		}
	}
	return h.explain(ctx, what, err)
}

// ReloadVM has the host read a VM's configuration file again.
func (h *Host) ReloadVM(ctx context.Context, vm *VM) error {
	return h.explain(ctx, "reload "+vm.Name, h.change(ctx, func(c control) error { return c.reload(ctx, vm.ID) }))
}

// Datastores lists the host's datastores by name.
func (h *Host) Datastores(ctx context.Context) ([]Datastore, error) {
	out, err := h.inv.datastores(ctx)
	if err != nil {
		return nil, h.explain(ctx, "list the datastores", err)
	}
	slices.SortFunc(out, func(a, b Datastore) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func (h *Host) datastoreOf(ctx context.Context, dsPath string) (Datastore, error) {
	name, _, err := splitPath(dsPath)
	if err != nil {
		return Datastore{}, err
	}
	all, err := h.Datastores(ctx)
	if err != nil {
		return Datastore{}, err
	}
	i := slices.IndexFunc(all, func(d Datastore) bool { return d.Name == name })
	if i < 0 {
		return Datastore{}, errf(ErrNotFound, nil, "%s has no datastore called %q", h.name, name)
	}
	return all[i], nil
}

// volumes maps what stands after /vmfs/volumes/ in absolute paths, a
// datastore's name or its id, to its name.
func (h *Host) volumes(ctx context.Context) (map[string]string, error) {
	all, err := h.Datastores(ctx)
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for _, d := range all {
		m[d.Name] = d.Name
		url := strings.TrimSuffix(d.URL, "/")
		m[url[strings.LastIndex(url, "/")+1:]] = d.Name
	}
	return m, nil
}
