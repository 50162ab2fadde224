package hv

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strconv"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmdk"
)

// Disks of the guest count from 0 in controller order.

// guest gives the VM's disk n to f while changes of the VM wait.
func (vm *VM) guest(n int, f func(*vdisk.Disk) error) error {
	vm.mu.RLock()
	defer vm.mu.RUnlock()
	if err := vm.alive(); err != nil {
		return err
	}
	if n < 0 || n >= len(vm.disks) {
		return fail(ErrGone, strconv.Itoa(n), "%s has no disk %d: it has %d, counted from 0", vm.name(), n, len(vm.disks))
	}
	return vm.with(vm.disks[n], f)
}

// running is guest for writes: only a VM that runs writes.
func (vm *VM) running(n int, f func(*vdisk.Disk) error) error {
	return vm.guest(n, func(v *vdisk.Disk) error {
		if !vm.on.Load() {
			return fail(ErrPower, vm.name(), "%s is powered off: a guest writes only while it runs", vm.name())
		}
		return f(v)
	})
}

// DiskSize is a disk's capacity in bytes.
func (vm *VM) DiskSize(n int) (size int64, err error) {
	err = vm.guest(n, func(v *vdisk.Disk) error { size = v.Capacity(); return nil })
	return size, err
}

// ReadAt reads what the guest sees.
func (vm *VM) ReadAt(n int, p []byte, off int64) error {
	return vm.guest(n, func(v *vdisk.Disk) error {
		m, err := v.ReadAt(p, off)
		if m == len(p) {
			return nil
		}
		return err
	})
}

// NextData finds the first area at or after off that may hold data; io.EOF when
// there is none.
func (vm *VM) NextData(ctx context.Context, n int, off int64) (start, end int64, err error) {
	err = vm.guest(n, func(v *vdisk.Disk) error { start, end, err = v.NextData(ctx, off); return err })
	return start, end, err
}

// WriteAt writes as the guest.
func (vm *VM) WriteAt(n int, p []byte, off int64) error {
	return vm.running(n, func(v *vdisk.Disk) error { return vm.write(v, p, off) })
}

func (vm *VM) write(v *vdisk.Disk, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > v.Capacity() {
		return fail(ErrInvalid, "offset", "bytes %d to %d are outside the disk of %d bytes", off, off+int64(len(p)), v.Capacity())
	}
	if !vm.h.space.take(int64(len(p))) {
		room, err := vm.room(v, off, int64(len(p)))
		if err != nil {
			return err
		}
		if !room {
			return fail(ErrNoSpace, vm.name(), "there is no more space for the virtual disk of %s", vm.name())
		}
	}
	_, err := v.WriteAt(p, off)
	return fileError(vm.name(), err)
}

// room is asked when the datastore is full: writes to blocks the running link
// has already need none.
func (vm *VM) room(v *vdisk.Disk, off, n int64) (bool, error) {
	links := v.Links()
	top := links[len(links)-1]
	if vm.thick(vm.h.rel(top.Descriptor)) {
		return true, nil
	}
	if len(links) > 1 {
		return false, nil // what of it the link has cannot be told from outside
	}
	start, end, err := v.NextData(context.Background(), off)
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	return err == nil && start <= off && end >= off+n, err
}

// LieNextWrite makes change tracking miss the next write to a disk.
func (vm *VM) LieNextWrite(n int) error {
	return vm.running(n, func(v *vdisk.Disk) error { v.MissNextWrite(); return nil })
}

// Disks is how many disks the VM has.
func (vm *VM) Disks() int {
	vm.mu.RLock()
	defer vm.mu.RUnlock()
	return len(vm.disks)
}

const (
	becomeStep  = 1 << 20  // compared and written at a time; between steps the VM can be changed
	becomeBlock = 64 << 10 // written when anything in it differs
)

// Become makes the guest write what is needed for its disk to equal an image,
// and nothing else. Beyond the image's end the disk keeps its content. It
// returns the bytes written.
func (vm *VM) Become(ctx context.Context, n int, image *vmdk.Image) (written int64, err error) {
	size, err := vm.DiskSize(n)
	if err != nil {
		return 0, err
	}
	if image.Capacity() > size {
		return 0, fail(ErrInvalid, "image", "the image has %d bytes, the disk only %d", image.Capacity(), size)
	}
	size = image.Capacity()
	want, have := make([]byte, becomeStep), make([]byte, becomeStep)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return written, err
		}
		// Where both have holes there is nothing to compare.
		next, err := vm.nextEither(ctx, n, image, off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return written, err
		}
		off = max(off, next/becomeStep*becomeStep)
		step := min(becomeStep-off%becomeStep, size-off)
		if _, err := image.ReadAt(want[:step], off); err != nil && !errors.Is(err, io.EOF) {
			return written, err
		}
		err = vm.running(n, func(v *vdisk.Disk) error {
			if m, err := v.ReadAt(have[:step], off); int64(m) < step {
				return err
			}
			for i := int64(0); i < step; i += becomeBlock {
				p := want[i:min(i+becomeBlock, step)]
				if bytes.Equal(p, have[i:i+int64(len(p))]) {
					continue
				}
				if err := vm.write(v, p, off+i); err != nil {
					return err
				}
				written += int64(len(p))
			}
			return nil
		})
		if err != nil {
			return written, err
		}
		off += step
	}
	return written, nil
}

func (vm *VM) nextEither(ctx context.Context, n int, image *vmdk.Image, off int64) (int64, error) {
	a, _, errA := image.NextData(ctx, off)
	b, _, errB := vm.NextData(ctx, n, off)
	switch {
	case errA != nil && !errors.Is(errA, io.EOF):
		return 0, errA
	case errB != nil && !errors.Is(errB, io.EOF):
		return 0, errB
	case errA != nil && errB != nil:
		return 0, io.EOF
	case errA != nil:
		return b, nil
	case errB != nil:
		return a, nil
	}
	return min(a, b), nil
}
