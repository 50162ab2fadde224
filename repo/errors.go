package repo

import (
	"errors"
	"fmt"

	"hikae/repo/internal/block"
)

// Sentinel errors, for errors.Is.
var (
	// ErrNotRepository says that a directory holds no repository.
	ErrNotRepository = errors.New("not a hikae repository")
	// ErrExists says that what should be created is there already.
	ErrExists = errors.New("already exists")
	// ErrWrongPassphrase says that no key slot opens with the secret given.
	ErrWrongPassphrase = errors.New("wrong passphrase")
	// ErrNotFound says that a VM or generation is not in the repository.
	ErrNotFound = errors.New("not found")
	// ErrAmbiguous says that a selector fits several generations.
	ErrAmbiguous = errors.New("ambiguous")
	// ErrDamaged says that stored bytes are missing or not what was written.
	// Errors that name a pack are of type *DamageError.
	ErrDamaged = errors.New("repository damaged")
	// ErrVersion says that a newer program wrote the repository.
	ErrVersion = errors.New("repository format is newer than this program")
	// ErrReadOnly says that the storage takes no writes.
	ErrReadOnly = errors.New("repository is read-only")
	// ErrAppendOnly says that the storage takes what is new and lets nothing be removed.
	ErrAppendOnly = errors.New("nothing can be removed from the repository by this user, it is append-only or somebody else's; do this as its owner")
	// ErrClosed says that a repository, session or disk writer was used after
	// its end.
	ErrClosed = errors.New("closed")
)

// DamageError names the stored bytes that could not be read. It matches
// ErrDamaged.
type DamageError struct {
	Pack   block.Handle // zero when the damage is not in a pack
	Offset uint32       // of the record in the pack, bytes
	Length uint32       // sealed length of the record, bytes
	What   string       // what should be there, or the file's name when Pack is zero
	Err    error
}

func (e *DamageError) Error() string {
	if e.Pack == 0 {
		return fmt.Sprintf("%v: %s: %v", ErrDamaged, e.What, e.Err)
	}
	return fmt.Sprintf("%v: pack %v, offset %d, %d bytes (%s): %v", ErrDamaged, e.Pack, e.Offset, e.Length, e.What, e.Err)
}

// Is makes every DamageError match ErrDamaged.
func (e *DamageError) Is(target error) bool { return target == ErrDamaged }

func (e *DamageError) Unwrap() error { return e.Err }
