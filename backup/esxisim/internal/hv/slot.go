package hv

import (
	"fmt"
	"strconv"
	"strings"
)

// bus is one kind of controller with the device keys ESXi gives it.
type bus struct {
	name                string
	controller, disk    int32 // first keys
	width, controllers  int32
	reserved            int32 // unit the controller takes itself; -1: none
	defaultVirtualModel string
}

// buses in the order of their controllers' keys, which is the order of disks.
var buses = []bus{
	{"ide", 200, 3000, 2, 2, -1, ""},
	{"scsi", 1000, 2000, 16, 4, 7, "lsilogic"},
	{"sata", 15000, 16000, 30, 4, -1, "ahci"},
	{"nvme", 31000, 32000, 64, 4, -1, "nvme"},
}

// Place is where a device is attached.
type Place struct {
	Bus        string // ide, scsi, sata, nvme
	Number     int32  // of the controller
	Unit       int32
	Key        int32 // device key
	Controller int32 // controller's device key
}

// ParseSlot reads "scsi0:1".
func ParseSlot(slot string) (Place, error) {
	for _, b := range buses {
		rest, ok := strings.CutPrefix(strings.ToLower(slot), b.name)
		if !ok {
			continue
		}
		num, unit, ok := strings.Cut(rest, ":")
		n, err1 := strconv.ParseInt(num, 10, 32)
		u, err2 := strconv.ParseInt(unit, 10, 32)
		if !ok || err1 != nil || err2 != nil || n < 0 || int32(n) >= b.controllers || u < 0 || int32(u) >= b.width || int32(u) == b.reserved {
			break
		}
		return Place{b.name, int32(n), int32(u), b.disk + int32(n)*b.width + int32(u), b.controller + int32(n)}, nil
	}
	return Place{}, fail(ErrInvalid, slot, "%q is no place for a disk", slot)
}

// Slot is the place as a .vmx names it.
func (p Place) Slot() string { return fmt.Sprintf("%s%d:%d", p.Bus, p.Number, p.Unit) }

// ControllerName is the controller as a .vmx names it.
func (p Place) ControllerName() string { return fmt.Sprintf("%s%d", p.Bus, p.Number) }

// SlotAt is the place of a unit on the controller with this device key.
func SlotAt(controller, unit int32) (Place, error) {
	for _, b := range buses {
		if controller >= b.controller && controller < b.controller+b.controllers {
			return ParseSlot(fmt.Sprintf("%s%d:%d", b.name, controller-b.controller, unit))
		}
	}
	return Place{}, fail(ErrInvalid, "controllerKey", "there is no controller with key %d", controller)
}

// FreeUnit is the first unit of a controller that is not taken.
func FreeUnit(controller int32, taken func(slot string) bool) (Place, error) {
	for unit := int32(0); unit < 64; unit++ {
		if p, err := SlotAt(controller, unit); err == nil && !taken(p.Slot()) {
			return p, nil
		}
	}
	return Place{}, fail(ErrInvalid, "unitNumber", "the controller with key %d has no free unit", controller)
}
