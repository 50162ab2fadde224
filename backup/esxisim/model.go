package esxisim

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
)

// makeModel makes the simulator's host, without VMs, and gives it our datastore.
func (h *Host) makeModel() error {
	making.Lock()
	defer making.Unlock()
	m := simulator.ESX()
	m.Machine, m.Datastore, m.Autostart = 0, 0, false
	if err := m.Create(); err != nil {
		return err
	}
	m.Remove() // only its temporary directory, which a killed host would leave: our datastore has its own
	m.Service.RegisterSDK(m.Map())
	ctx := context.Background()
	client, err := vim25.NewClient(ctx, m.Service)
	if err != nil {
		return err
	}
	system, err := object.NewHostSystem(client, esx.HostSystem.Self).ConfigManager().DatastoreSystem(ctx)
	if err != nil {
		return err
	}
	ref, err := system.CreateLocalDatastore(ctx, datastoreName, h.o.Dir)
	if err != nil {
		return err
	}
	h.model = m
	if network := m.Map().Any("Network"); network != nil {
		h.network = network.Reference()
	}
	h.ds = m.Map().Get(ref.Reference()).(*simulator.Datastore)
	url := "/vmfs/volumes/" + h.hv.UUID()
	version := map[int]string{5: "5.81", 6: "6.82"}[h.o.VMFS]
	info := &types.VmfsDatastoreInfo{
		DatastoreInfo:          types.DatastoreInfo{Name: datastoreName, Url: url, MaxFileSize: 64 << 40, Timestamp: types.NewTime(h.o.Clock())},
		MaxPhysicalRDMFileSize: 64 << 40, MaxVirtualRDMFileSize: 62 << 40,
		Vmfs: &types.HostVmfsVolume{
			HostFileSystemVolume: types.HostFileSystemVolume{Type: "VMFS", Name: datastoreName, Capacity: h.o.DatastoreBytes},
			BlockSizeMb:          1, BlockSize: 1024, MaxBlocks: 63963136, MajorVersion: int32(h.o.VMFS), Version: version, Uuid: h.hv.UUID(),
			Extent: []types.HostScsiDiskPartition{{DiskName: "mpx.vmhba0:C0:T0:L0", Partition: 3}},
			Local:  types.NewBool(true), Ssd: types.NewBool(true),
		},
	}
	h.ds.Info, h.ds.Summary.Url, h.ds.Summary.Type = info, url, "VMFS"
	licenses := m.Map().Get(*h.content().LicenseManager).(*simulator.LicenseManager)
	licenses.Licenses = []types.LicenseManagerLicenseInfo{h.edition.license(h.o.Free)}
	h.edition.about(&m.Map().Get(vim25.ServiceInstance).(*simulator.ServiceInstance).Content.About)
	machine := m.Map().Get(esx.HostSystem.Self).(*simulator.HostSystem)
	h.edition.about(&machine.Config.Product)
	if product := machine.Summary.Config.Product; product != nil { // shared with other hosts' models
		own := *product
		h.edition.about(&own)
		machine.Summary.Config.Product = &own
	}
	h.refreshDatastore()
	return nil
}

// refreshDatastore shows how full the datastore is now.
func (h *Host) refreshDatastore() {
	if h.ds == nil {
		return
	}
	capacity, free := h.hv.Space()
	h.world.Lock()
	defer h.world.Unlock()
	ctx := h.context()
	ctx.AutoUpdate(h.ds, func() {
		h.ds.Summary.Capacity, h.ds.Summary.FreeSpace = capacity, free
		info := *h.ds.Info.(*types.VmfsDatastoreInfo)
		info.FreeSpace, info.Timestamp = free, types.NewTime(h.o.Clock())
		h.ds.Info = &info
	})
}

// project makes the simulator's object of a VM show what the VM is now, or go
// when the VM went. What it shows is read under the lock, so that of two
// projections at once the later one is right.
func (h *Host) project(id int) {
	if h.model == nil {
		return // still starting: all VMs follow
	}
	h.mu.Lock()
	mu := h.projects[id]
	if mu == nil {
		mu = new(sync.Mutex)
		h.projects[id] = mu
	}
	h.mu.Unlock()
	mu.Lock()
	defer mu.Unlock()
	var info hv.Info
	vm := h.hv.VM(id)
	err := fmt.Errorf("no VM %d", id)
	if vm != nil {
		info, err = vm.Info()
	}
	func() {
		h.world.Lock()
		defer h.world.Unlock()
		if err != nil {
			h.drop(vmRef(id))
			return
		}
		h.show(info)
	}()
	h.refreshDatastore()
}

// show is project for a VM that is there.
func (h *Host) show(info hv.Info) {
	ctx := h.context()
	ref := vmRef(info.ID)
	want := h.managed(info)
	h.showSnapshots(ctx, ref, info)
	if vm, ok := ctx.Map.Get(ref).(*simulator.VirtualMachine); ok {
		ctx.AutoUpdate(vm, func() {
			vm.Name, vm.Config, vm.Runtime, vm.Summary, vm.Guest = want.Name, want.Config, want.Runtime, want.Summary, want.Guest
			vm.Snapshot, vm.RootSnapshot, vm.Capability = want.Snapshot, want.RootSnapshot, want.Capability
			vm.Layout, vm.LayoutEx, vm.Storage, vm.Network = want.Layout, want.LayoutEx, want.Storage, want.Network
		})
		return
	}
	folder := ctx.Map.Get(esx.Datacenter.VmFolder).(*simulator.Folder)
	vm := &simulator.VirtualMachine{VirtualMachine: want}
	// The folder first: views look at it when the VM appears.
	ctx.WithLock(folder, func() {
		ctx.Update(folder, []types.PropertyChange{{Name: "childEntity", Val: append(slices.Clone(folder.ChildEntity), ref)}})
		ctx.WithLock(vm, func() { ctx.Map.PutEntity(folder, vm) })
	})
	for _, o := range h.holders(ctx) {
		ctx.WithLock(o.obj, func() {
			ctx.Update(o.obj, []types.PropertyChange{{Name: "vm", Val: append(slices.Clone(*o.refs), ref)}})
		})
	}
}

// holder is an object that lists VMs.
type holder struct {
	obj  mo.Reference
	refs *[]types.ManagedObjectReference
}

func (h *Host) holders(ctx *simulator.Context) []holder {
	host := ctx.Map.Get(esx.HostSystem.Self).(*simulator.HostSystem)
	pool := ctx.Map.Get(esx.ResourcePool.Self).(*simulator.ResourcePool)
	return []holder{{host, &host.Vm}, {pool, &pool.Vm}, {h.ds, &h.ds.Vm}}
}

func without(refs []types.ManagedObjectReference, ref types.ManagedObjectReference) []types.ManagedObjectReference {
	return slices.DeleteFunc(slices.Clone(refs), func(r types.ManagedObjectReference) bool { return r == ref })
}

// drop takes a VM that is gone out of the simulator.
func (h *Host) drop(ref types.ManagedObjectReference) {
	ctx := h.context()
	if ctx.Map.Get(ref) == nil {
		return
	}
	for _, o := range h.holders(ctx) {
		ctx.WithLock(o.obj, func() {
			ctx.Update(o.obj, []types.PropertyChange{{Name: "vm", Val: without(*o.refs, ref)}})
		})
	}
	h.dropSnapshots(ctx, ref, nil)
	folder := ctx.Map.Get(esx.Datacenter.VmFolder).(*simulator.Folder)
	ctx.WithLock(folder, func() {
		ctx.Map.Remove(ctx, ref)
		ctx.Update(folder, []types.PropertyChange{{Name: "childEntity", Val: without(folder.ChildEntity, ref)}})
	})
}

func (h *Host) showSnapshots(ctx *simulator.Context, ref types.ManagedObjectReference, info hv.Info) {
	keep := map[types.ManagedObjectReference]bool{}
	for _, s := range info.Snapshots {
		self := snapshotRef(info.ID, s.ID)
		keep[self] = true
		var children []types.ManagedObjectReference
		for _, c := range info.Snapshots {
			if c.Parent == s.ID {
				children = append(children, snapshotRef(info.ID, c.ID))
			}
		}
		config := h.config(info, s.Config, s.Disks)
		if old, ok := ctx.Map.Get(self).(*simulator.VirtualMachineSnapshot); ok {
			ctx.AutoUpdate(old, func() { old.Config, old.ChildSnapshot = *config, children })
			continue
		}
		snap := &simulator.VirtualMachineSnapshot{}
		snap.Self, snap.Vm, snap.Config, snap.ChildSnapshot = self, ref, *config, children
		ctx.Map.Put(snap)
	}
	h.dropSnapshots(ctx, ref, keep)
}

func (h *Host) dropSnapshots(ctx *simulator.Context, vm types.ManagedObjectReference, keep map[types.ManagedObjectReference]bool) {
	for _, o := range ctx.Map.AllReference("VirtualMachineSnapshot") {
		snap, ok := o.(*simulator.VirtualMachineSnapshot)
		if ok && snap.Vm == vm && !keep[snap.Self] {
			ctx.Map.Remove(ctx, snap.Self)
		}
	}
}
