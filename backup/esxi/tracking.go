package esxi

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

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
