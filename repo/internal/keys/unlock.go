package keys

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"hikae/repo/internal/fsx"
)

// Unlock opens the ring with a secret. It tries every slot of the secret's kind,
// cheapest first, so that a planted slot of absurd cost delays nobody who has a
// good one. repository is the id that the ring must be for.
//
// When none opens, the error is ErrWrongPassphrase; when files are damaged as
// well, also ErrDamagedSlot, naming them, for the right one may be among them.
// Damage to other slots does not matter as long as one opens.
func Unlock(fsys fsx.FS, repository [16]byte, secret Secret) (*Ring, SlotInfo, error) {
	if err := secret.usable(); err != nil {
		return nil, SlotInfo{}, err
	}
	slots, bad := readSlots(fsys)
	if slots == nil && bad != nil && !errors.Is(bad, ErrDamagedSlot) {
		return nil, SlotInfo{}, fmt.Errorf("read the key slots: %w", bad)
	}
	slices.SortStableFunc(slots, func(a, b *slotFile) int {
		// At most 100 · 2^20: no overflow.
		return int(a.KDF.Time*a.KDF.MemoryKiB) - int(b.KDF.Time*b.KDF.MemoryKiB)
	})
	faults := []error{bad}
	var tried []string
	for _, s := range slots {
		if s.Kind != secret.kind {
			continue
		}
		if [16]byte(s.Repository) != repository {
			faults = append(faults, damaged(s.name, "it belongs to repository %x", []byte(s.Repository)))
			continue
		}
		o, ok, err := s.open(secret)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		if !ok {
			tried = append(tried, s.name)
			continue
		}
		err = o.follow(fsys, s)
		clear(o.private)
		if err == nil {
			return o.ring, s.info(), nil
		}
		o.ring.Wipe()
		faults = append(faults, err)
	}
	fault := errors.Join(faults...)
	none := ErrWrongPassphrase
	if secret.kind != KindPassphrase {
		none = fmt.Errorf("%w, the %s given", ErrWrongPassphrase, secret.kind)
	}
	switch {
	case errors.Is(fault, ErrLeftOut):
		return nil, SlotInfo{}, fault
	case fault != nil && tried == nil:
		return nil, SlotInfo{}, fmt.Errorf("no key slot can be tried: %w", fault)
	case fault != nil:
		return nil, SlotInfo{}, fmt.Errorf("%w (tried %s); besides: %w", none, strings.Join(tried, ", "), fault)
	case tried == nil:
		return nil, SlotInfo{}, fmt.Errorf("%w: there is no slot of that kind", none)
	}
	return nil, SlotInfo{}, fmt.Errorf("%w (tried %s)", none, strings.Join(tried, ", "))
}
