package repo

import (
	"context"
	"errors"
	"fmt"
	"time"

	"hikae/repo/internal/keys"
)

// Errors of keys, for errors.Is.
var (
	// ErrSecret says that a secret cannot be one: empty, mistyped, malformed.
	ErrSecret = keys.ErrSecret
	// ErrLastKey says that without this slot nothing would open the repository.
	ErrLastKey = keys.ErrLastSlot
	// ErrKeysChanged says that others rotated the keys since the repository was
	// opened.
	ErrKeysChanged = keys.ErrStale
)

// Kinds of key slots, as KeySlot.Kind shows them.
const (
	KeyPassphrase = string(keys.KindPassphrase)
	KeyKeyFile    = string(keys.KindKeyFile)
	KeyRecovery   = string(keys.KindRecovery)
)

// KeyFile is the secret in a key file's content: 64 hexadecimal digits with white
// space around them. Anything else is ErrSecret.
func KeyFile(content []byte) (Secret, error) { return keys.KeyFile(content) }

// NewKeyFile makes a random secret and the content of its key file.
func NewKeyFile() (content []byte, secret Secret) { return keys.NewKeyFile() }

// RecoveryCode is the secret that a recovery code stands for. Case, spaces and
// dashes do not matter. What is no code, or a mistyped one, is ErrSecret.
func RecoveryCode(code []byte) (Secret, error) { return keys.RecoveryCode(code) }

// NewRecoveryCode makes a random secret and its code: eight groups of five
// letters and digits, to be printed and put away.
func NewRecoveryCode() (code string, secret Secret) { return keys.NewRecoveryCode() }

// KeySlot is one way to open the repository, as its file says.
type KeySlot struct {
	ID      string    `json:"id"`   // 16 hexadecimal digits
	Kind    string    `json:"kind"` // passphrase, key-file or recovery
	Label   string    `json:"label"`
	Created time.Time `json:"created"` // UTC, whole seconds
	Epoch   uint32    `json:"epoch"`   // the newest when the slot was made
	// Vouched says that who has the keys made this slot and that no rotation left
	// it out. One that is not vouched for was planted, changed, or left out.
	Vouched bool `json:"vouched"`
}

func keySlot(s keys.SlotInfo, vouched bool) KeySlot {
	return KeySlot{ID: s.ID, Kind: string(s.Kind), Label: s.Label, Created: s.Created, Epoch: s.Epoch, Vouched: vouched}
}

// KeyEpoch is the newest key epoch, the one under which this Repository writes.
func (r *Repository) KeyEpoch() uint32 { return r.ring.Epoch() }

// KeySlots lists the slots, sorted by id. Damaged files make an error that matches
// ErrDamaged and names each, besides the list of the others.
func (r *Repository) KeySlots(ctx context.Context) ([]KeySlot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	all, bad := keys.Slots(r.fs)
	if bad != nil && !errors.Is(bad, keys.ErrDamagedSlot) {
		return nil, fmt.Errorf("list the key slots: %w", bad)
	}
	good, err := keys.Vouched(r.fs, r.ring)
	if err != nil {
		return nil, r.keyError("list the key slots", err)
	}
	vouched := make(map[string]bool, len(good))
	for _, s := range good {
		vouched[s.ID] = true
	}
	list := make([]KeySlot, len(all))
	for i, s := range all {
		list[i] = keySlot(s, vouched[s.ID])
	}
	if bad != nil {
		bad = r.keyError("list the key slots", bad)
	}
	return list, bad
}

// AddKey makes a slot by which secret opens the repository. label is for people,
// at most 256 bytes on one line, and can be read without keys. cost counts for
// passphrases only.
func (r *Repository) AddKey(ctx context.Context, secret Secret, label string, cost KDF) (KeySlot, error) {
	if err := ctx.Err(); err != nil {
		return KeySlot{}, err
	}
	s, err := keys.AddSlot(r.fs, r.ring, secret, label, r.opt.Clock(), keys.Params(cost))
	if err != nil {
		return KeySlot{}, r.keyError("add a key", err)
	}
	freeAfter(keys.Params(cost))
	return keySlot(s, true), nil
}

// RemoveKey removes a slot. It refuses (ErrLastKey) when no other slot that is
// vouched for would remain; an id without a slot is ErrNotFound. Who kept a copy of
// the slot's file and knows its secret still reads all that was written so far;
// RotateKeys shuts them out of what comes.
func (r *Repository) RemoveKey(ctx context.Context, id string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := keys.RemoveSlot(r.fs, r.ring, id); err != nil {
		return r.keyError("remove a key", err)
	}
	return nil
}

// ChangeKey replaces the slot that old opens by one that fresh opens, with the same
// label. The new one lasts before the old one goes: when ChangeKey fails, or is
// killed, at least one of them is there.
func (r *Repository) ChangeKey(ctx context.Context, old, fresh Secret, cost KDF) (KeySlot, error) {
	if err := ctx.Err(); err != nil {
		return KeySlot{}, err
	}
	ring, slot, err := keys.Unlock(r.fs, r.config.id, old)
	if err != nil {
		return KeySlot{}, r.keyError("change a key", err)
	}
	ring.Wipe()
	freeAfter(slot.Params)
	made, err := r.AddKey(ctx, fresh, slot.Label, cost)
	if err != nil {
		return KeySlot{}, err
	}
	if err := keys.RemoveSlot(r.fs, r.ring, slot.ID); err != nil {
		return made, r.keyError("remove the old key "+slot.ID+" (the new one is there)", err)
	}
	return made, nil
}

// RotateKeys begins a new key epoch, whose master key all slots that are vouched
// for open; it returns the epoch's number and those slots. What is there stays
// readable and sealed as it is. This Repository, like all that are open, goes on
// under the epoch it was opened in, and cannot read what others write under the
// new one: open it again. FORMAT.md §4.3 says what a rotation protects against.
func (r *Repository) RotateKeys(ctx context.Context) (uint32, []KeySlot, error) {
	if err := ctx.Err(); err != nil {
		return 0, nil, err
	}
	ring, kept, err := keys.Rotate(r.fs, r.ring, nil, r.opt.Clock())
	if err != nil {
		return 0, nil, r.keyError("rotate the keys", err)
	}
	defer ring.Wipe()
	list := make([]KeySlot, len(kept))
	for i, s := range kept {
		list[i] = keySlot(s, true)
	}
	return ring.Epoch(), list, nil
}

// keyError gives errors of keys/ the sentinels of this package.
func (r *Repository) keyError(what string, err error) error {
	err = storageError(r.fs, err)
	switch {
	case errors.Is(err, keys.ErrNoSlot):
		return fmt.Errorf("%s: %w: %w", what, ErrNotFound, err)
	case errors.Is(err, keys.ErrWrongPassphrase):
		return fmt.Errorf("%s: %w: %w", what, ErrWrongPassphrase, err)
	case errors.Is(err, keys.ErrDamagedSlot):
		return fmt.Errorf("%s: %w: %w", what, ErrDamaged, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
