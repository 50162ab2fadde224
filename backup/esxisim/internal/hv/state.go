package hv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

// Question is what a VM asks before it goes on.
type Question struct {
	ID      int
	Text    string
	Choices []Choice
}

// Choice is one possible answer.
type Choice struct {
	Label   string
	Default bool
	kind    answer
}

type answer int

const (
	cancelled answer = iota
	moved
	copied
)

// pending is a question that waits for its answer.
type pending struct {
	Question
	answered chan answer
}

const movedText = "msg.uuid.altered:This virtual machine might have been moved or copied.\n" +
	"In order to configure certain management and networking features, VMware ESX needs to know if this virtual machine was moved or copied.\n\n" +
	"If you don't know, answer \"I _copied it\"."

// location is the identity of the place a VM's configuration lies at, as its
// uuid.location holds it.
func (vm *VM) location() string {
	sum := sha256.Sum256([]byte(vm.h.UUID() + "/" + vm.path))
	text := fmt.Sprintf("56 4d % x", sum[:14])
	return text[:23] + "-" + text[24:]
}

// mustAsk tells whether a VM was last started somewhere else and does not say
// what to think of it.
func (vm *VM) mustAsk() bool {
	at, has := vm.x.Get("uuid.location")
	_, told := vm.x.Get("uuid.action")
	return has && !told && at != vm.location()
}

// Question is the question the VM waits with; nil when there is none.
func (vm *VM) Question() *Question {
	vm.mu.RLock()
	defer vm.mu.RUnlock()
	if vm.asked == nil {
		return nil
	}
	q := vm.asked.Question
	return &q
}

// Answer answers the question by the place of a choice in its list.
func (vm *VM) Answer(id, choice int) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	q := vm.asked
	if q == nil || q.ID != id {
		return fail(ErrInvalid, "questionId", "a specified parameter was not correct: questionId")
	}
	if choice < 0 || choice >= len(q.Choices) {
		return fail(ErrInvalid, "answerChoice", "a specified parameter was not correct: answerChoice")
	}
	select {
	case q.answered <- q.Choices[choice].kind:
	default: // somebody was faster
	}
	return nil
}

// Start starts the VM. Before that it may have to wait for an answer: then the
// call ends with the answer, or with ctx.
func (vm *VM) Start(ctx context.Context) error {
	vm.mu.Lock()
	err := vm.startable()
	if err != nil || !vm.mustAsk() {
		if err == nil {
			err = vm.powerOn()
		}
		vm.mu.Unlock()
		return vm.done(err)
	}
	if vm.asked != nil {
		vm.mu.Unlock()
		return fail(ErrBusy, vm.path, "another task is starting %s already", vm.path)
	}
	vm.questions++
	choices := []Choice{{"Cancel (Cancel)", false, cancelled}, {"I _moved it (I _moved it)", false, moved}, {"I _copied it (I _copied it)", true, copied}}
	if vm.h.o.CancelLast {
		choices = append(choices[1:], choices[0])
	}
	q := &pending{Question{vm.questions, movedText, choices}, make(chan answer, 1)}
	vm.asked = q
	vm.mu.Unlock()
	vm.h.o.Changed(vm.id)

	got := cancelled
	select {
	case got = <-q.answered:
	case <-ctx.Done():
	}
	vm.mu.Lock()
	vm.asked = nil
	err = vm.startable()
	switch {
	case err != nil:
	case got == cancelled:
		err = fail(ErrCancelled, vm.name(), "starting %s was cancelled at a question", vm.name())
	default:
		vm.x.Set("uuid.action", map[answer]string{moved: "keep", copied: "create"}[got])
		if err = vm.writeVMX(); err == nil {
			err = vm.powerOn()
		}
	}
	vm.mu.Unlock()
	return vm.done(err)
}

// startable reads the configuration anew: it is the VM's own process that
// starts it, and that reads the file and not the host's memory of it.
func (vm *VM) startable() error {
	if err := vm.alive(); err != nil {
		return err
	}
	if vm.on.Load() {
		return fail(ErrPower, vm.name(), "%s is powered on already", vm.name())
	}
	return vm.reread()
}

// reread takes over what the .vmx file says now. Called while the VM is off.
func (vm *VM) reread() error {
	text, err := os.ReadFile(vm.h.abs(vm.path))
	if err != nil {
		return fileError(vm.path, err)
	}
	x, err := vmx.Parse(text)
	if err != nil {
		return fail(ErrInvalid, vm.path, "%s: %v", vm.path, err)
	}
	vm.x = x
	old := vm.disks
	vm.readDisks(old)
	for _, d := range vm.disks { // their files may be others under the same names
		vm.look(d)
	}
	return nil
}

// Reload takes over a configuration that was edited as a file. A VM that runs
// keeps its own.
func (vm *VM) Reload() error {
	vm.mu.Lock()
	err := vm.alive()
	if err == nil && !vm.on.Load() {
		err = vm.reread()
	}
	vm.mu.Unlock()
	return vm.done(err)
}

// Broken tells that the configuration cannot be read any more.
func (vm *VM) Broken() bool {
	text, err := os.ReadFile(vm.h.abs(vm.path))
	if err != nil {
		return true
	}
	_, err = vmx.Parse(text)
	return err != nil
}

// suspendKey names the file with the memory of a VM that is suspended.
const suspendKey = "checkpoint.vmState"

// Suspended tells whether the VM sleeps.
func (vm *VM) Suspended() bool { return vm.suspended.Load() }

// Suspend puts the VM to sleep: it lets go of its disks, and keeps its memory
// in a file until it starts again.
func (vm *VM) Suspend() error {
	vm.mu.Lock()
	err := vm.suspend()
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) suspend() error {
	if err := vm.powerOff(); err != nil {
		return err
	}
	state := vm.base() + ".vmss"
	if err := WriteFile(vm.h.abs(vm.beside(state)), []byte("\xd2\xbe\xd2\xbe"+vm.name())); err != nil {
		return fileError(state, err)
	}
	vm.x.Set(suspendKey, state)
	vm.suspended.Store(true)
	return vm.writeVMX()
}

// wake forgets the memory of a VM that slept.
func (vm *VM) wake() error {
	if !vm.suspended.Swap(false) {
		return nil
	}
	if state, ok := vm.x.Get(suspendKey); ok {
		if file, err := vm.diskFile(state); err == nil {
			if err := vm.h.root.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
				vm.h.o.Logger.Warn("cannot delete a suspended VM's memory", "file", file, "err", err)
			}
		}
	}
	vm.x.Delete(suspendKey)
	return vm.writeVMX()
}

// Crash is what the host's power failure does to its VMs: they are off, and
// change tracking, whose files were not closed, knows nothing any more.
func (h *Host) Crash() error {
	var errs []error
	for _, vm := range h.VMs() {
		vm.mu.Lock()
		err := vm.crash()
		vm.mu.Unlock()
		errs = append(errs, vm.done(err))
	}
	return errors.Join(errs...)
}

func (vm *VM) crash() error {
	if vm.gone || !vm.on.Load() {
		return nil
	}
	err := vm.powerOff()
	for _, d := range vm.disks {
		err = errors.Join(err, vm.with(d, func(v *vdisk.Disk) error {
			err := v.ResetTracking()
			d.as.Store(see(v))
			return err
		}))
	}
	return err
}

// Grow makes a disk bigger, capacity in bytes; the VM may run.
func (vm *VM) Grow(n int, capacity int64) error {
	vm.mu.Lock()
	err := vm.grow(n, capacity)
	vm.mu.Unlock()
	return vm.done(err)
}

func (vm *VM) grow(n int, capacity int64) error {
	d, err := vm.disk(n)
	if err != nil {
		return err
	}
	s := d.seen()
	if len(s.links) != 1 || len(vm.snaps) > 0 {
		return fail(ErrUnsupported, d.file, "a disk with snapshots cannot grow: %s", d.file)
	}
	if capacity < s.capacity || capacity%512 != 0 {
		return fail(ErrInvalid, "capacityInKB", "a specified parameter was not correct: capacityInKB")
	}
	if !s.thin && !vm.h.space.fits(capacity-s.capacity) {
		return fail(ErrNoSpace, d.file, "there is not enough space on the file system for %s", d.file)
	}
	return vm.with(d, func(v *vdisk.Disk) error {
		err := v.Grow(capacity)
		d.as.Store(see(v))
		return err
	})
}

// disk is the VM's disk n. Called under vm.mu.
func (vm *VM) disk(n int) (*disk, error) {
	if err := vm.alive(); err != nil {
		return nil, err
	}
	if n < 0 || n >= len(vm.disks) {
		return nil, fail(ErrGone, strconv.Itoa(n), "%s has no disk %d: it has %d, counted from 0", vm.name(), n, len(vm.disks))
	}
	return vm.disks[n], nil
}

// TrackWithSnapshots turns change tracking on although there are snapshots, as
// hosts since 6.5 do without a word: it misses what is written until the next
// snapshot.
func (vm *VM) TrackWithSnapshots() error {
	return vm.eachDisk(func(v *vdisk.Disk) error { return v.EnableTracking(vdisk.TrackingOptions{WithSnapshots: true}) }, true)
}

// UseStrangeTracking keeps change tracking in files of a layout that nobody
// else knows.
func (vm *VM) UseStrangeTracking() error {
	return vm.eachDisk(func(v *vdisk.Disk) error {
		if !v.Tracking() {
			return fail(ErrTracking, vm.path, "change tracking is not active on %s", vm.path)
		}
		return v.UseStrangeTracking()
	}, false)
}

func (vm *VM) eachDisk(f func(*vdisk.Disk) error, configure bool) error {
	vm.mu.Lock()
	err := vm.alive()
	if err == nil && configure {
		SetTracking(vm.x, true)
		err = vm.writeVMX()
	}
	for _, d := range vm.disks {
		if err != nil || d.independent() || d.physical() {
			continue
		}
		err = vm.with(d, func(v *vdisk.Disk) error {
			err := f(v)
			d.as.Store(see(v))
			return err
		})
	}
	vm.holdFiles()
	vm.mu.Unlock()
	return vm.done(err)
}
