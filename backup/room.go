package backup

import (
	"fmt"
	"slices"
	"strings"

	"hikae/backup/esxi"
)

// deltaShare and deltaLeast say how much room a snapshot's links need while a
// backup reads: what the guest writes meanwhile. Guests that rewrite more than a
// twentieth of their data during one backup are rare, and running out of room
// stops them.
const (
	deltaShare = 20
	deltaLeast = 1 << 30
)

// deltaRoom makes sure that the snapshot's links have room to grow, on every
// datastore that holds disks of the VM.
func deltaRoom(stores []esxi.Datastore, vm *esxi.VM, p *parent) error {
	data := map[string]int64{} // datastore → bytes the VM holds there, as far as known
	for _, d := range vm.Disks {
		ds := datastoreOf(d.Chain)
		i := slices.IndexFunc(stores, func(s esxi.Datastore) bool { return s.Name == ds })
		if i < 0 {
			continue // the host will say what is wrong with it
		}
		guess := d.Capacity
		if before := p.disk(d); before >= 0 {
			guess = min(guess, p.manifest.Disks[before].DataBytes)
		} else if d.Thin {
			guess = min(guess, stores[i].Capacity-stores[i].Free)
		}
		data[ds] += guess
	}
	for _, s := range stores {
		bytes, used := data[s.Name]
		if need := max(deltaLeast, bytes/deltaShare); used && s.Free < need {
			return fmt.Errorf("datastore %s has %s free, and a snapshot of %s needs room for %s there while it is read: "+
				"free some and run the backup again: %w", s.Name, size(s.Free), vm.Name, size(need), ErrNoRoom)
		}
	}
	return nil
}

// datastoreOf is the name in "[datastore1] web01/web01.vmdk" of a chain's
// newest link, beside which its next link comes to be.
func datastoreOf(chain []string) string {
	if len(chain) == 0 {
		return ""
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(chain[len(chain)-1], "["), "]")
	return name
}

// disk finds the disk that d was in the previous generation; -1 when it was not
// there. The disk's own UUID goes before the place it is attached at, so a disk
// that was moved to another controller is still the same.
func (p *parent) disk(d esxi.Disk) int {
	if p == nil {
		return -1
	}
	byUUID, byKey, same := -1, -1, 0
	for i, m := range p.manifest.Disks {
		if d.UUID != "" && m.UUID == d.UUID {
			byUUID, same = i, same+1
		}
		if m.Key == d.Key {
			byKey = i
		}
	}
	if same == 1 {
		return byUUID
	}
	return byKey
}
