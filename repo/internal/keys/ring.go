package keys

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

var (
	// ErrWrongPassphrase says that no slot opens with the secret given.
	ErrWrongPassphrase = errors.New("no key slot opens with this passphrase")
	// ErrDamagedSlot says that a file in keys/ is not what it should be.
	ErrDamagedSlot = errors.New("damaged key file")
	// ErrNoEpoch says that the ring lacks the master key of an epoch: somebody
	// rotated the keys since it was opened, or a file names an epoch that never
	// was.
	ErrNoEpoch = errors.New("the key ring has no such epoch; open the repository again")
	// ErrNoSlot says that there is no slot of that name.
	ErrNoSlot = errors.New("no such key slot")
	// ErrLastSlot says that without this slot nothing would open the repository.
	ErrLastSlot = errors.New("the last key slot cannot be removed")
	// ErrLeftOut says that a slot opens, but a rotation left it out.
	ErrLeftOut = errors.New("this key slot was left out of a key rotation")
	// ErrStale says that others rotated the keys since the ring was opened.
	ErrStale = errors.New("the keys were rotated meanwhile; open the repository again")
	// ErrParams says that costs for Argon2id are out of range.
	ErrParams = errors.New("key derivation costs out of range")
	// ErrSecret says that a secret cannot be one: empty, mistyped, malformed.
	ErrSecret = errors.New("unusable secret")
)

const (
	version   = 1
	keySize   = 32
	maxEpochs = 1000 // a rotation every day for years; bounds what a file can make us allocate
)

// Ring holds the master keys of a repository. It never changes, so it may be
// used by many goroutines at once until Wipe.
type Ring struct {
	repository [16]byte
	seed       [keySize]byte
	masters    [][keySize]byte // of epoch 1, 2, …
}

// Create makes the ring of a new repository, in its first epoch. random must be
// a source fit for keys, as crypto/rand.Reader.
func Create(random io.Reader, repository [16]byte) (*Ring, error) {
	r := &Ring{repository: repository, masters: make([][keySize]byte, 1)}
	if _, err := io.ReadFull(random, r.seed[:]); err != nil {
		return nil, fmt.Errorf("make keys: %w", err)
	}
	if _, err := io.ReadFull(random, r.masters[0][:]); err != nil {
		return nil, fmt.Errorf("make keys: %w", err)
	}
	return r, nil
}

// Repository is the id of the repository that the ring belongs to.
func (r *Ring) Repository() [16]byte { return r.repository }

// Epoch is the newest epoch, the one writers use.
func (r *Ring) Epoch() uint32 { return uint32(len(r.masters)) }

// Subkey derives the key for one purpose, and one file if salt is its salt, from
// the master of an epoch. An epoch that the ring does not have is ErrNoEpoch.
func (r *Ring) Subkey(epoch uint32, label string, salt []byte) ([32]byte, error) {
	if epoch == 0 || epoch > r.Epoch() {
		return [32]byte{}, fmt.Errorf("epoch %d: %w", epoch, ErrNoEpoch)
	}
	return derive(r.masters[epoch-1][:], salt, "hikae/1 "+label), nil
}

// IDKey is the key of the hash that names blocks. It is the same in every epoch.
func (r *Ring) IDKey() [32]byte { return r.IDSubkey("block") }

// IDSubkey derives a key that is the same in every epoch, for hashes that name
// things and for what is written once when the repository is made.
func (r *Ring) IDSubkey(label string) [32]byte {
	return derive(r.seed[:], nil, "hikae/1 id "+label)
}

// Wipe overwrites the keys. The ring must not be used any more.
func (r *Ring) Wipe() {
	clear(r.seed[:])
	clear(r.masters)
	r.masters = nil
}

// Format keeps keys out of logs and error messages, whatever the verb.
func (r *Ring) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[secret]") }

func derive(secret, salt []byte, info string) (key [keySize]byte) {
	b, err := hkdf.Key(sha256.New, secret, salt, info, keySize)
	if err != nil {
		// Only lengths that are constants here, or a FIPS policy no secret of
		// ours can break, make it fail.
		panic("keys: " + err.Error())
	}
	copy(key[:], b)
	clear(b)
	return key
}
