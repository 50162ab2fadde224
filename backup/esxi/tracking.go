package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
)

// TrackingState is how change tracking stands for a VM.
type TrackingState struct {
	// Enabled is what the configuration says. It is not at work for a disk before
	// that has a change id.
	Enabled bool
	Disks   []DiskTracking // those that can be backed up
	// Obstacle is why EnableTracking would refuse now: a sentence of
	// ErrSnapshots, ErrRunning or ErrUnsupported; nil when it would not.
	Obstacle error
}

// DiskTracking is one disk's.
type DiskTracking struct {
	Key    int32
	Label  string
	Active bool // the disk has a change id: its changes are being tracked
}

// TrackingChange is what switching change tracking came to.
type TrackingChange struct {
	Changed bool // false: it was so already
	// Effect says in one sentence from when on it holds; "" when nothing changed.
	Effect string
}

// TrackingState tells how change tracking stands for a VM now. It changes
// nothing.
func (h *Host) TrackingState(ctx context.Context, vm *VM) (*TrackingState, error) {
	now, err := h.refresh(ctx, vm.ID)
	if err != nil {
		return nil, h.explain(ctx, "look at "+vm.Name, err)
	}
	s := &TrackingState{Enabled: now.ChangeTracking, Obstacle: h.trackable(now)}
	for _, d := range now.Disks {
		if d.Unsupported == "" {
			s.Disks = append(s.Disks, DiskTracking{d.Key, d.Label, d.ChangeID != ""})
		}
	}
	return s, nil
}

// EnableTracking has the host track which areas of vm's disks change. It refuses
// while the VM has snapshots (ErrSnapshots): tracking that begins on a snapshot's
// link misses what lies below, and since ESXi 6.5 nothing reports that. Over SSH
// it also refuses while the VM runs (ErrRunning): a running VM's configuration
// file is rewritten by the host.
//
// The first backup afterwards is a full one: tracking begins with it.
func (h *Host) EnableTracking(ctx context.Context, vm *VM) (TrackingChange, error) {
	return h.setTracking(ctx, vm, true)
}

// DisableTracking is its opposite, and refuses for the same reasons.
func (h *Host) DisableTracking(ctx context.Context, vm *VM) (TrackingChange, error) {
	return h.setTracking(ctx, vm, false)
}

func (h *Host) setTracking(ctx context.Context, vm *VM, on bool) (TrackingChange, error) {
	what := "enable change tracking of " + vm.Name
	if !on {
		what = "disable change tracking of " + vm.Name
	}
	now, err := h.refresh(ctx, vm.ID)
	if err != nil {
		return TrackingChange{}, h.explain(ctx, what, err)
	}
	if now.ChangeTracking == on {
		return TrackingChange{}, nil
	}
	if err := h.trackable(now); err != nil {
		return TrackingChange{}, err
	}
	if err := h.change(ctx, func(c control) error { return c.setTracking(ctx, now, on) }); err != nil {
		return TrackingChange{}, h.explain(ctx, what, err)
	}
	after, err := h.refresh(ctx, vm.ID)
	if err != nil {
		return TrackingChange{}, h.explain(ctx, what, err)
	}
	if after.ChangeTracking != on {
		return TrackingChange{}, fmt.Errorf("%s: %s: the host took it and did not do it", h.name, what)
	}
	c := TrackingChange{Changed: true}
	switch {
	case now.Power == string(types.VirtualMachinePowerStatePoweredOff) && h.overSSH():
		c.Effect = "it takes effect when the VM is powered on"
	case now.Power == string(types.VirtualMachinePowerStatePoweredOff):
		c.Effect = "it takes effect at once"
	default:
		c.Effect = "it takes effect with the next snapshot, which the next backup makes, or when the VM is powered off and on"
	}
	return c, nil
}

// trackable is why change tracking cannot be switched now.
func (h *Host) trackable(vm *VM) error {
	refuse := func(kind error, format string, args ...any) error {
		return errf(kind, nil, "%s: change tracking of %s cannot be switched now: %s", h.name, vm.Name, fmt.Sprintf(format, args...))
	}
	version := 0
	if _, err := fmt.Sscanf(vm.HardwareVersion, "vmx-%d", &version); err != nil {
		version = 0
	}
	switch {
	case vm.Invalid != "":
		return refuse(ErrUnsupported, "%s", vm.Invalid)
	case version != 0 && version < 7:
		return refuse(ErrUnsupported, "its virtual hardware is version %d, and tracking needs 7; upgrade it", version)
	case len(vm.Snapshots) > 0:
		return refuse(ErrSnapshots, "it has %s; remove all of them first, because tracking that begins above a snapshot misses changes",
			plural(len(vm.Snapshots), "snapshot"))
	case vm.NeedsConsolidation:
		return refuse(ErrSnapshots, "links of removed snapshots are left; consolidate its disks first")
	case h.overSSH() && vm.Power != string(types.VirtualMachinePowerStatePoweredOff):
		return refuse(ErrRunning, "the licence leaves only its configuration file to be edited, which a VM that is not powered off overwrites; "+
			"power it off first")
	}
	return nil
}

func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func (c *soapControl) setTracking(ctx context.Context, vm *VM, on bool) error {
	_, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.ReconfigVM_Task(ctx, c.h.session.vc, &types.ReconfigVM_Task{
			This: vmRef(vm.ID), Spec: types.VirtualMachineConfigSpec{ChangeTrackingEnabled: types.NewBool(on)},
		})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	})
	return err
}

// saved is what the copy of a .vmx is called while it is edited.
const saved = ".hikae-old"

// setTracking edits the configuration file of a VM that is off: a copy first, the
// new one beside it, checked and renamed into place, and the host told to read
// it. When that fails the copy goes back.
func (c *sshControl) setTracking(ctx context.Context, vm *VM, on bool) error {
	num, err := c.vmid(ctx, vm.ID)
	if err != nil {
		return err
	}
	store := &shellFiles{c.sh}
	old, err := store.readFile(ctx, vm.ConfigPath, vmx.MaxSize)
	if err != nil {
		return err
	}
	config, err := vmx.Parse(old)
	if err != nil {
		return err
	}
	track(config, on)
	file, err := hostPath(vm.ConfigPath)
	if err != nil {
		return err
	}
	if _, err := c.sh.words(ctx, true, "cp", "-f", file, file+saved); err != nil {
		return err
	}
	text := config.Bytes()
	err = c.still(ctx, num, vm.ConfigPath, old)
	if err == nil {
		err = store.upload(ctx, vm.ConfigPath, strings.NewReader(string(text)), int64(len(text)))
	}
	undo, cancel := outlive(ctx, startGrace)
	defer cancel()
	if err == nil {
		if err = c.reload(ctx, vm.ID); err != nil {
			return errors.Join(err, store.rename(undo, file+saved, file), c.reload(undo, vm.ID))
		}
	}
	_, rerr := c.sh.words(undo, true, "rm", "-f", file+saved)
	return errors.Join(err, rerr)
}

// still makes sure, right before a .vmx is replaced, that nobody else changed it
// and that the VM did not start.
func (c *sshControl) still(ctx context.Context, num, configPath string, old []byte) error {
	now, err := (&shellFiles{c.sh}).readFile(ctx, configPath, vmx.MaxSize)
	if err != nil {
		return err
	}
	if string(now) != string(old) {
		return fmt.Errorf("somebody else changed %s at the same time; run it again", configPath)
	}
	state, err := c.state(ctx, num)
	if err != nil {
		return err
	}
	if state != "off" {
		return errf(ErrRunning, nil, "%s: the VM was started meanwhile; power it off first", c.h.name)
	}
	return nil
}

// track sets the keys that switch change tracking, for the VM and for each disk
// (VMware KB 1031873).
func track(config *vmx.File, on bool) {
	value := "FALSE"
	if on {
		value = "TRUE"
	}
	config.Set("ctkEnabled", value)
	for _, d := range config.Disks() {
		mode, _ := config.Get(d.Slot + ".mode")
		if strings.HasPrefix(strings.ToLower(mode), "independent") && on {
			continue // never in a snapshot, and not trackable
		}
		config.Set(d.Slot+".ctkEnabled", value)
	}
}

// TrackingFile is a change tracking file as it is on the datastore: header and
// table.
type TrackingFile struct {
	vmdk.Tracking
	Path string // "[datastore1] web01/web01-ctk.vmdk"
	Data []byte // the whole file
}

// maxTrackingFile is more than the largest table (2 Mi entries) has.
const maxTrackingFile = 16 << 20

// TrackingFile reads the change tracking file of a frozen disk's top link: what
// was written up to the snapshot. ErrNotProvable: the link has none, or one of a
// layout that is not known. What the table says has to be proved by the caller;
// the layout beyond the first fields is nowhere documented.
func (h *Host) TrackingFile(ctx context.Context, d Disk) (*TrackingFile, error) {
	what := "read the change tracking file of " + d.Label
	doubt := func(cause error, format string, args ...any) error {
		return errf(ErrNotProvable, cause, "%s: %s: %s", h.name, what, fmt.Sprintf(format, args...))
	}
	if !d.frozen || len(d.Chain) == 0 {
		return nil, fmt.Errorf("%s: %s: it is not frozen: only disks of a snapshot are read", h.name, what)
	}
	store, top := h.store(), d.Chain[len(d.Chain)-1]
	text, err := h.descriptor(ctx, store, top)
	if err != nil {
		return nil, err
	}
	desc, err := vmdk.ParseDescriptor(text)
	if err != nil {
		return nil, doubt(err, "its descriptor cannot be read: %v", err)
	}
	if desc.ChangeTrackPath == "" {
		return nil, doubt(nil, "change tracking was not at work when the snapshot was made")
	}
	var stores map[string]string
	if strings.HasPrefix(desc.ChangeTrackPath, "/") {
		if stores, err = h.volumes(ctx); err != nil {
			return nil, err
		}
	}
	name, err := beside(top, desc.ChangeTrackPath, stores)
	if err != nil {
		return nil, doubt(err, "%v", err)
	}
	data, err := store.readFile(ctx, name, maxTrackingFile)
	if errors.Is(err, ErrNotFound) {
		return nil, doubt(err, "%s is missing", name)
	}
	if err != nil {
		return nil, err
	}
	t, err := vmdk.ParseTracking(data, int64(len(data)))
	if err != nil {
		return nil, doubt(err, "%s has a layout that is not known: %v", name, err)
	}
	if t.Capacity != d.Capacity {
		return nil, doubt(nil, "%s is for a disk of %d bytes, not %d", name, t.Capacity, d.Capacity)
	}
	return &TrackingFile{Tracking: *t, Path: name, Data: data}, nil
}

// AllocatedAreas tells which areas of a frozen disk may hold data, in order and
// within the disk: what lies between reads as zeros. It asks the host for the
// map of the base's file (vmkfstools -t0) and reads the tables of the links
// above. ErrNotProvable: SSH is not there, or what the host prints is not a map
// that accounts for every byte; then everything may hold data.
func (h *Host) AllocatedAreas(ctx context.Context, d Disk) ([]vmdk.Area, error) {
	what := "allocated areas of " + d.Label
	doubt := func(cause error, format string, args ...any) error {
		return errf(ErrNotProvable, cause, "%s: %s: %s", h.name, what, fmt.Sprintf(format, args...))
	}
	if !d.frozen || len(d.Chain) == 0 {
		return nil, fmt.Errorf("%s: %s: it is not frozen: only disks of a snapshot are read", h.name, what)
	}
	if h.shell == nil {
		return nil, doubt(nil, "only the host's shell tells, and SSH is not configured (hikae host add --ssh)")
	}
	if err := h.tryShell(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, doubt(err, "only the host's shell tells: %v", err)
	}
	areas, err := h.baseMap(ctx, d)
	if err != nil {
		if ctx.Err() != nil {
			return nil, h.explain(ctx, what, err)
		}
		return nil, doubt(err, "the host does not tell in a form that can be read (%v)", err)
	}
	if len(d.Chain) == 1 {
		return areas, nil
	}
	r, err := h.OpenDisk(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }() // only read
	for link := 1; link < len(d.Chain); link++ {
		for off := int64(0); off < d.Capacity; {
			// Zeros held by a link cover data below, but listing what is below all
			// the same is only less exact.
			a, zeros, err := r.chain.Held(ctx, link, off)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", h.name, what, err)
			}
			if off = a.End(); !zeros {
				areas = append(areas, a)
			}
		}
	}
	return vmdk.MergeAreas(areas), nil
}

// baseMap asks vmkfstools for the map of the base link's file.
func (h *Host) baseMap(ctx context.Context, d Disk) ([]vmdk.Area, error) {
	file, err := hostPath(d.Chain[0])
	if err != nil {
		return nil, err
	}
	ctx, cancel := h.shellCall(ctx)
	defer cancel()
	out, err := h.shell.words(ctx, true, "vmkfstools", "-t0", file)
	if err != nil {
		return nil, err
	}
	regions, err := vimcmd.ParseMapping(out, d.Capacity)
	if err != nil {
		return nil, err
	}
	var areas []vmdk.Area
	for _, r := range regions {
		if !r.Hole && !r.Lazy {
			areas = append(areas, vmdk.Area{Offset: r.Offset, Length: r.Length})
		}
	}
	return vmdk.MergeAreas(areas), nil
}
