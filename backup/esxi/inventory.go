package esxi

import (
	"context"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// walk is the way from the root folder to every datacenter, VM, datastore and
// compute resource. It needs no view on the host, so that nothing is left there
// and an expired session loses nothing.
func walk() []types.BaseSelectionSpec {
	named := func(names ...string) (l []types.BaseSelectionSpec) {
		for _, n := range names {
			l = append(l, &types.SelectionSpec{Name: n})
		}
		return l
	}
	step := func(name, kind, path string, then ...string) *types.TraversalSpec {
		return &types.TraversalSpec{SelectionSpec: types.SelectionSpec{Name: name}, Type: kind, Path: path, SelectSet: named(then...)}
	}
	return []types.BaseSelectionSpec{
		step("children", "Folder", "childEntity", "children", "machines", "hosts", "stores"),
		step("machines", "Datacenter", "vmFolder", "children"),
		step("hosts", "Datacenter", "hostFolder", "children"),
		step("stores", "Datacenter", "datastore"),
	}
}

// collect fetches properties of every object of a kind, in one call.
func collect[T any](ctx context.Context, h *Host, kind string, paths ...string) ([]T, error) {
	return retrieve[T](ctx, h, types.PropertyFilterSpec{
		ObjectSet: []types.ObjectSpec{{
			Obj: h.session.vc.ServiceContent.RootFolder, Skip: types.NewBool(true), SelectSet: walk(),
		}},
		PropSet: []types.PropertySpec{{Type: kind, PathSet: paths}},
	})
}

// fetch gets properties of objects by reference; those that are gone are an error.
func fetch[T any](ctx context.Context, h *Host, refs []types.ManagedObjectReference, paths ...string) ([]T, error) {
	spec := types.PropertyFilterSpec{PropSet: []types.PropertySpec{{Type: refs[0].Type, PathSet: paths}}}
	for _, r := range refs {
		spec.ObjectSet = append(spec.ObjectSet, types.ObjectSpec{Obj: r})
	}
	return retrieve[T](ctx, h, spec)
}

func fetchOne[T any](ctx context.Context, h *Host, ref types.ManagedObjectReference, paths ...string) (*T, error) {
	all, err := fetch[T](ctx, h, []types.ManagedObjectReference{ref}, paths...)
	if err != nil {
		return nil, err
	}
	if len(all) != 1 {
		return nil, errf(ErrNotFound, nil, "%s: %s is not there any more", h.name, ref.Value)
	}
	return &all[0], nil
}

func retrieve[T any](ctx context.Context, h *Host, spec types.PropertyFilterSpec) ([]T, error) {
	for renewals := 0; ; renewals++ {
		epoch := h.session.current()
		res, err := property.DefaultCollector(h.session.vc).RetrieveProperties(ctx, types.RetrieveProperties{
			SpecSet: []types.PropertyFilterSpec{spec},
		})
		if err != nil {
			return nil, err
		}
		expired := false
		for i := range res.Returnval {
			// A property that the host cannot give (a VM whose datastore is
			// away has many) is missing, not a failure of the whole list. An
			// expired session can show in the same way.
			for _, m := range res.Returnval[i].MissingSet {
				if _, ok := m.Fault.Fault.(*types.NotAuthenticated); ok {
					expired = true
				}
			}
			res.Returnval[i].MissingSet = nil
		}
		if expired {
			if renewals == 2 {
				return nil, soap.WrapVimFault(&types.NotAuthenticated{})
			}
			if err := h.session.renewPatiently(ctx, epoch); err != nil {
				return nil, err
			}
			continue
		}
		var out []T
		if err := mo.LoadObjectContent(res.Returnval, &out); err != nil {
			return nil, err
		}
		return out, nil
	}
}

// look finds where the host keeps its VMs.
func (h *Host) look(ctx context.Context) (place, error) {
	const what = "look around"
	dcs, err := collect[mo.Datacenter](ctx, h, "Datacenter", "name", "vmFolder")
	if err != nil {
		return place{}, h.explain(ctx, what, err)
	}
	crs, err := collect[mo.ComputeResource](ctx, h, "ComputeResource", "resourcePool")
	if err != nil {
		return place{}, h.explain(ctx, what, err)
	}
	if len(dcs) != 1 || len(crs) != 1 || crs[0].ResourcePool == nil {
		return place{}, fmt.Errorf("%s (%s) is no standalone ESXi host: it has %d datacenters and %d compute resources",
			h.name, h.addr, len(dcs), len(crs))
	}
	return place{
		datacenter: dcs[0].Self, folder: dcs[0].VmFolder, pool: *crs[0].ResourcePool, name: dcs[0].Name,
	}, nil
}

// vmPaths are the properties of a VM that matter here: config and layoutEx
// whole are ten times as much.
var vmPaths = []string{
	"name", "snapshot", "runtime.powerState", "runtime.connectionState", "runtime.consolidationNeeded",
	"config.uuid", "config.instanceUuid", "config.guestId", "config.version", "config.files",
	"config.hardware.device", "config.changeTrackingEnabled", "config.extraConfig", "layoutEx.file",
}

// inventory is how a host is looked at. SOAP is one way, which every licence
// allows; where port 443 is closed, the shell is the other. Errors come as the
// way gave them; Host explains them.
type inventory interface {
	vms(ctx context.Context) ([]VM, error)
	// vm fetches one VM again.
	vm(ctx context.Context, id string) (*VM, error)
	// snapshotDisks are now's disks as one of its snapshots froze them: their
	// chains end with the frozen link.
	snapshotDisks(ctx context.Context, now *VM, id string) ([]Disk, error)
	// vmOf is the VM that a snapshot belongs to; "" when nobody knows any more.
	vmOf(ctx context.Context, snapshot string) (vm string)
	needsConsolidation(ctx context.Context, vm string) (bool, error)
	// busy tells whether a task of a kind is queued or running: on a VM, or on
	// the host when vm is "". kind is createSnapshot, removeSnapshot or
	// registerVm.
	busy(ctx context.Context, vm, kind string) (bool, error)
	datastores(ctx context.Context) ([]Datastore, error)
}

// soapInventory looks at the host through its API.
type soapInventory struct{ h *Host }

var _ inventory = (*soapInventory)(nil)

// vms lists all of them in one property fetch.
func (i *soapInventory) vms(ctx context.Context) ([]VM, error) {
	all, err := collect[mo.VirtualMachine](ctx, i.h, "VirtualMachine", vmPaths...)
	if err != nil {
		return nil, err
	}
	vms := make([]VM, 0, len(all))
	for n := range all {
		vms = append(vms, i.h.convert(&all[n]))
	}
	return vms, nil
}

// VMs lists every registered VM, by name.
func (h *Host) VMs(ctx context.Context) ([]VM, error) {
	vms, err := h.inv.vms(ctx)
	if err != nil {
		return nil, h.explain(ctx, "list the VMs", err)
	}
	slices.SortFunc(vms, func(a, b VM) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.ConfigPath, b.ConfigPath)
	})
	return vms, nil
}

// VM finds one VM by its name, or by its ConfigPath where two have one name.
func (h *Host) VM(ctx context.Context, name string) (*VM, error) {
	vms, err := h.VMs(ctx)
	if err != nil {
		return nil, err
	}
	var found []VM
	for _, vm := range vms {
		if vm.ConfigPath == name && name != "" {
			return &vm, nil
		}
		if vm.Name == name {
			found = append(found, vm)
		}
	}
	switch len(found) {
	case 1:
		return &found[0], nil
	case 0:
		return nil, errf(ErrNotFound, nil, "%s has no VM called %q; hikae vms %s lists them", h.name, name, h.name)
	}
	var paths []string
	for _, vm := range found {
		paths = append(paths, fmt.Sprintf("%q", vm.ConfigPath))
	}
	return nil, fmt.Errorf("%s has %d VMs called %q; rename one, or say which by its path: %s",
		h.name, len(found), name, strings.Join(paths, ", "))
}

// refresh fetches vm again.
func (h *Host) refresh(ctx context.Context, id string) (*VM, error) { return h.inv.vm(ctx, id) }

func (i *soapInventory) vm(ctx context.Context, id string) (*VM, error) {
	m, err := fetchOne[mo.VirtualMachine](ctx, i.h, vmRef(id), vmPaths...)
	if err != nil {
		return nil, err
	}
	vm := i.h.convert(m)
	return &vm, nil
}

func (i *soapInventory) snapshotDisks(ctx context.Context, _ *VM, id string) ([]Disk, error) {
	m, err := fetchOne[mo.VirtualMachineSnapshot](ctx, i.h, snapshotRef(id), "config.hardware.device")
	if err != nil {
		return nil, err
	}
	return disks(m.Config.Hardware.Device), nil
}

func (i *soapInventory) vmOf(ctx context.Context, snapshot string) string {
	m, err := fetchOne[mo.VirtualMachineSnapshot](ctx, i.h, snapshotRef(snapshot), "vm")
	if err != nil {
		return ""
	}
	return m.Vm.Value
}

func (i *soapInventory) needsConsolidation(ctx context.Context, vm string) (bool, error) {
	m, err := fetchOne[mo.VirtualMachine](ctx, i.h, vmRef(vm), "runtime.consolidationNeeded")
	if err != nil {
		return false, err
	}
	return m.Runtime.ConsolidationNeeded, nil
}

func (i *soapInventory) busy(ctx context.Context, vm, kind string) (bool, error) {
	_, ok, err := i.h.running(ctx, vm, kind)
	return ok, err
}

func (i *soapInventory) datastores(ctx context.Context) ([]Datastore, error) {
	all, err := collect[mo.Datastore](ctx, i.h, "Datastore", "summary")
	if err != nil {
		return nil, err
	}
	var out []Datastore
	for _, d := range all {
		s := d.Summary
		out = append(out, Datastore{
			Name: displayName(s.Name), Type: s.Type, Capacity: s.Capacity, Free: s.FreeSpace, URL: s.Url, Accessible: s.Accessible,
		})
	}
	return out, nil
}

func vmRef(id string) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachine", Value: id}
}

func (h *Host) convert(m *mo.VirtualMachine) VM {
	vm := VM{
		ID:    m.Self.Value,
		Name:  displayName(m.Name),
		Power: string(m.Runtime.PowerState),

		NeedsConsolidation: m.Runtime.ConsolidationNeeded,
	}
	if s := m.Runtime.ConnectionState; s != "" && s != types.VirtualMachineConnectionStateConnected {
		vm.Invalid = fmt.Sprintf("the host calls it %s: its files or its datastore are out of reach", s)
	}
	if m.Snapshot != nil {
		current := ""
		if c := m.Snapshot.CurrentSnapshot; c != nil {
			current = c.Value
		}
		vm.Snapshots = flatten(m.Snapshot.RootSnapshotList, "", current)
	}
	defer h.remember(&vm)
	c := m.Config
	if c == nil {
		if vm.Invalid == "" {
			vm.Invalid = "the host cannot read its configuration"
		}
		return vm
	}
	vm.UUID, vm.InstanceUUID = c.Uuid, c.InstanceUuid
	vm.GuestID, vm.HardwareVersion = c.GuestId, c.Version
	vm.ConfigPath = c.Files.VmPathName
	vm.ChangeTracking = c.ChangeTrackingEnabled != nil && *c.ChangeTrackingEnabled
	vm.NVRAMPath = nvram(m)
	vm.Disks = disks(c.Hardware.Device)
	return vm
}

// owner is whose a snapshot is, and its number among that VM's.
type owner struct {
	vm, vmName, name string
	number           int32
}

// remember notes where a VM's configuration lies and whose a snapshot is, so
// that its removal can look after the VM even when the snapshot itself is gone.
func (h *Host) remember(vm *VM) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if vm.ConfigPath != "" {
		h.paths[vm.ID] = vm.ConfigPath
	}
	for _, s := range vm.Snapshots {
		h.owners[s.ID] = owner{vm.ID, vm.Name, s.Name, s.number}
	}
}

// nvram finds the file of BIOS or EFI settings: the layout lists it, else the
// .vmx names it beside itself.
func nvram(m *mo.VirtualMachine) string {
	if m.LayoutEx != nil {
		for _, f := range m.LayoutEx.File {
			if f.Type == string(types.VirtualMachineFileLayoutExFileTypeNvram) {
				return f.Name
			}
		}
	}
	for _, o := range m.Config.ExtraConfig {
		v := o.GetOptionValue()
		name, ok := v.Value.(string)
		if !strings.EqualFold(v.Key, "nvram") || !ok || name == "" {
			continue
		}
		if ds, p, err := splitPath(m.Config.Files.VmPathName); err == nil && !strings.HasPrefix(name, "/") {
			return joinPath(ds, path.Join(path.Dir(p), name))
		}
	}
	return ""
}

func flatten(tree []types.VirtualMachineSnapshotTree, parent, current string) (l []SnapshotInfo) {
	for _, t := range tree {
		l = append(l, SnapshotInfo{
			ID: t.Snapshot.Value, Parent: parent, Name: displayName(t.Name), Description: t.Description,
			Created: t.CreateTime, Quiesced: t.Quiesced, Current: t.Snapshot.Value == current, number: t.Id,
		})
		l = append(l, flatten(t.ChildSnapshotList, t.Snapshot.Value, current)...)
	}
	return l
}

// displayName undoes the escapes %2f, %5c and %25, in which ESXi keeps a slash,
// a backslash and a per cent sign in names.
func displayName(s string) string {
	if n, err := url.PathUnescape(s); err == nil {
		return n
	}
	return s
}

// escapedName is the opposite, for names given to the host.
func escapedName(s string) string {
	return strings.NewReplacer("%", "%25", "/", "%2f", `\`, "%5c").Replace(s)
}

// gone tells whether the host does not know an object (any more).
func gone(err error) bool {
	return fault.Is(err, &types.ManagedObjectNotFound{})
}
