package keys

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"time"

	"hikae/repo/internal/fsx"
)

const (
	epochPrefix     = "epoch-"
	epochLimit      = 1 << 20
	epochLinkLabel  = "epoch link"
	epochMACLabel   = "epoch"
	wrappedSize     = 32 + keySize + 16
	maxSlotsInEpoch = 2000 // epochLimit holds more
)

// suite is the one way of HPKE in which epochs are wrapped.
var suite = struct {
	kem  hpke.KEM
	kdf  hpke.KDF
	aead hpke.AEAD
}{hpke.DHKEM(ecdh.X25519()), hpke.HKDFSHA256(), hpke.AES256GCM()}

type epochSlot struct {
	ID      hexBytes    `json:"id"`
	Slot    hexBytes    `json:"slot"`
	Wrapped base64Bytes `json:"wrapped"`
}

// epochFile is the JSON of keys/epoch-<number>.
type epochFile struct {
	Format     uint16      `json:"format"`
	Repository hexBytes    `json:"repository"`
	Epoch      uint32      `json:"epoch"`
	Created    string      `json:"created"`
	Slots      []epochSlot `json:"slots"`
	Link       hexBytes    `json:"link"`
	MAC        hexBytes    `json:"mac"`
	Checksum   hexBytes    `json:"checksum"`
}

func epochName(n uint32) string { return path.Join(dir, fmt.Sprintf("%s%08d", epochPrefix, n)) }

func (e *epochFile) statement() []byte {
	b := []byte("hikae/1 key epoch\x00")
	b = binary.LittleEndian.AppendUint16(b, e.Format)
	b = append(b, e.Repository...)
	b = binary.LittleEndian.AppendUint32(b, e.Epoch)
	b = appendString(b, e.Created)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Slots)))
	for _, s := range e.Slots {
		b = append(b, s.ID...)
		b = append(b, s.Slot...)
		b = appendString(b, string(s.Wrapped))
	}
	return b
}

func (e *epochFile) checksum() [sha256.Size]byte {
	return sha256.Sum256(append(append(e.statement(), e.Link...), e.MAC...))
}

// slot finds the entry made for a slot file as it is now.
func (e *epochFile) slot(s *slotFile) *epochSlot {
	digest := s.digest()
	for i := range e.Slots {
		if bytes.Equal(e.Slots[i].ID, s.ID) && bytes.Equal(e.Slots[i].Slot, digest[:]) {
			return &e.Slots[i]
		}
	}
	return nil
}

// wrapInfo ties a wrapped master to its place.
func wrapInfo(repository []byte, epoch uint32, s *slotFile) []byte {
	b := append([]byte("hikae/1 epoch\x00"), repository...)
	b = binary.LittleEndian.AppendUint32(b, epoch)
	b = append(b, s.ID...)
	digest := s.digest()
	return append(b, digest[:]...)
}

// parseEpoch reads an epoch file and checks all that needs no key.
func parseEpoch(n uint32, b []byte) (*epochFile, error) {
	name := epochName(n)
	var v struct {
		Format uint16 `json:"format"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, damaged(name, "%w", err)
	}
	if v.Format != version {
		return nil, damaged(name, "format %d is unknown to this program; a newer one may know it", v.Format)
	}
	e := new(epochFile)
	if err := decodeJSON(b, e); err != nil {
		return nil, damaged(name, "%w", err)
	}
	if len(e.Repository) != 16 || len(e.Link) != sha256.Size || len(e.MAC) != sha256.Size || len(e.Checksum) != sha256.Size {
		return nil, damaged(name, "a field has the wrong size")
	}
	if e.Epoch != n {
		return nil, damaged(name, "it is epoch %d under another name", e.Epoch)
	}
	if _, err := parseTime(e.Created); err != nil {
		return nil, damaged(name, "%w", err)
	}
	for i, s := range e.Slots {
		if len(s.ID) != 8 || len(s.Slot) != sha256.Size || len(s.Wrapped) != wrappedSize {
			return nil, damaged(name, "slot %d has a field of the wrong size", i)
		}
		if i > 0 && bytes.Compare(e.Slots[i-1].ID, s.ID) >= 0 {
			return nil, damaged(name, "its slots are not in order")
		}
	}
	if sum := e.checksum(); !bytes.Equal(sum[:], e.Checksum) {
		return nil, damaged(name, "the checksum does not fit")
	}
	return e, nil
}

// readEpoch reads the file of an epoch; there is none: fs.ErrNotExist.
func readEpoch(fsys fsx.FS, n uint32) (*epochFile, error) {
	b, err := fsx.ReadFile(fsys, epochName(n), epochLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err != nil {
		return nil, damaged(epochName(n), "%w", err)
	}
	return parseEpoch(n, b)
}

// newestEpoch is the highest number among the epoch files' names, 1 if none.
func newestEpoch(fsys fsx.FS) (uint32, error) {
	list, err := fsys.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	newest := uint32(1)
	for _, e := range list {
		digits, ok := strings.CutPrefix(e.Name(), epochPrefix)
		if n, err := strconv.ParseUint(digits, 10, 32); ok && err == nil && path.Join(dir, e.Name()) == epochName(uint32(n)) {
			newest = max(newest, uint32(n))
		}
	}
	return newest, nil
}

// Fresh checks that the ring has the newest epoch; ErrStale says that it has not.
func (r *Ring) Fresh(fsys fsx.FS) error {
	newest, err := newestEpoch(fsys)
	if err != nil {
		return err
	}
	if newest > r.Epoch() {
		return ErrStale
	}
	return nil
}

// Sync makes the newest epoch last. Who began it may have been killed, or failed, when
// its file was there but not yet sure to stay: whoever found it there must not
// write anything under its keys that is to last longer than they do.
func (r *Ring) Sync(fsys fsx.FS) error {
	if r.Epoch() == 1 {
		return nil // its keys are in the slots
	}
	return fsys.SyncDir(dir)
}

// follow adds the epochs that came after the slot was made.
func (o *opened) follow(fsys fsx.FS, s *slotFile) error {
	const remedy = "; bring the file back from a copy of keys/, or move it and later ones away to read what is older"
	newest, err := newestEpoch(fsys)
	if err != nil {
		return err
	}
	for n := s.Epoch + 1; n <= newest; n++ {
		if n > maxEpochs {
			return damaged(epochName(newest), "there cannot be so many epochs")
		}
		name := epochName(n)
		e, err := readEpoch(fsys, n)
		if errors.Is(err, fs.ErrNotExist) {
			return damaged(name, "it is missing, but later ones are there%s", remedy)
		}
		if err != nil {
			return err
		}
		if [16]byte(e.Repository) != o.ring.repository {
			return damaged(name, "it belongs to repository %x", []byte(e.Repository))
		}
		statement := e.statement()
		if err := o.ring.checkMAC(n-1, epochLinkLabel, e.Link, statement); err != nil {
			return damaged(name, "it was not made by one who had the keys of epoch %d%s", n-1, remedy)
		}
		entry := e.slot(s)
		if entry == nil {
			return fmt.Errorf("%s: %w to epoch %d; use another passphrase or key", s.name, ErrLeftOut, n)
		}
		private, err := suite.kem.NewPrivateKey(o.private)
		if err != nil {
			return damaged(s.name, "%w", err)
		}
		master, err := hpke.Open(private, suite.kdf, suite.aead, wrapInfo(e.Repository, n, s), entry.Wrapped)
		if err != nil || len(master) != keySize {
			return damaged(name, "the key for slot %x does not open%s", []byte(s.ID), remedy)
		}
		o.ring.masters = append(o.ring.masters, [keySize]byte(master))
		clear(master)
		if err := o.ring.checkMAC(n, epochMACLabel, e.MAC, statement, e.Link); err != nil {
			return damaged(name, "its list of slots is not the one that was made%s", remedy)
		}
	}
	return nil
}

func (r *Ring) checkMAC(epoch uint32, label string, want []byte, parts ...[]byte) error {
	key, err := r.Subkey(epoch, label, nil)
	if err != nil {
		return err
	}
	defer clear(key[:])
	if !hmac.Equal(mac(key, parts...), want) {
		return errors.New("wrong mac")
	}
	return nil
}

// vouched tells which slots the newest epoch vouches for: those listed in its
// file, and those made in it.
func (r *Ring) vouched(fsys fsx.FS, slots []*slotFile) ([]*slotFile, error) {
	var newest *epochFile
	if n := r.Epoch(); n > 1 {
		e, err := readEpoch(fsys, n)
		if err != nil {
			return nil, err
		}
		if err := r.checkMAC(n, epochMACLabel, e.MAC, e.statement(), e.Link); err != nil {
			return nil, damaged(epochName(n), "its list of slots is not the one that was made")
		}
		newest = e
	}
	var good []*slotFile
	for _, s := range slots {
		if [16]byte(s.Repository) != r.repository {
			continue
		}
		if s.Epoch == r.Epoch() {
			if r.checkMAC(s.Epoch, slotMACLabel, s.MAC, s.header()) == nil {
				good = append(good, s)
			}
		} else if newest != nil && newest.slot(s) != nil {
			good = append(good, s)
		}
	}
	return good, nil
}

// Vouched lists the slots that the ring vouches for, sorted by id: those that it
// would open for. A slot file that is there but not in this list was planted,
// damaged, or left out of a rotation.
func Vouched(fsys fsx.FS, r *Ring) ([]SlotInfo, error) {
	slots, err := readSlots(fsys)
	if err != nil && !errors.Is(err, ErrDamagedSlot) {
		return nil, err
	}
	good, err := r.vouched(fsys, slots)
	if err != nil {
		return nil, err
	}
	list := make([]SlotInfo, len(good))
	for i, s := range good {
		list[i] = s.info()
	}
	return list, nil
}

// Rotate begins a new epoch and returns the ring that has it; r stays as it is.
// The new master is wrapped to the vouched slots that keep accepts (nil: all);
// the others open nothing afterwards. At least one must remain. Whoever holds an
// older ring goes on with it until the repository is opened again.
func Rotate(fsys fsx.FS, r *Ring, keep func(SlotInfo) bool, now time.Time) (*Ring, []SlotInfo, error) {
	lock, err := lockKeys(fsys)
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	if err := r.Fresh(fsys); err != nil {
		return nil, nil, err
	}
	n := r.Epoch() + 1
	if n > maxEpochs {
		return nil, nil, fmt.Errorf("rotate keys: %d epochs are the most there can be", maxEpochs)
	}
	slots, err := readSlots(fsys)
	if errors.Is(err, errUnread) {
		// It may be as good as any; left out, it would never open again.
		return nil, nil, fmt.Errorf("rotate keys: a slot would be left out: %w", err)
	}
	if err != nil && !errors.Is(err, ErrDamagedSlot) {
		return nil, nil, err
	}
	good, err := r.vouched(fsys, slots)
	if err != nil {
		return nil, nil, err
	}
	next := &Ring{repository: r.repository, seed: r.seed, masters: make([][keySize]byte, n)}
	copy(next.masters, r.masters)
	master := next.masters[n-1][:]
	copy(master, random(keySize))
	e := &epochFile{Format: version, Repository: r.repository[:], Epoch: n, Created: formatTime(now)}
	var wrapped []SlotInfo
	for _, s := range good {
		if keep != nil && !keep(s.info()) {
			continue
		}
		public, err := suite.kem.NewPublicKey(s.Public)
		if err != nil {
			return nil, nil, damaged(s.name, "%w", err)
		}
		w, err := hpke.Seal(public, suite.kdf, suite.aead, wrapInfo(e.Repository, n, s), master)
		if err != nil {
			return nil, nil, damaged(s.name, "%w", err)
		}
		digest := s.digest()
		e.Slots = append(e.Slots, epochSlot{ID: s.ID, Slot: digest[:], Wrapped: w})
		wrapped = append(wrapped, s.info())
	}
	if len(wrapped) == 0 || len(wrapped) > maxSlotsInEpoch {
		return nil, nil, fmt.Errorf("rotate keys to %d slots: %w", len(wrapped), ErrLastSlot)
	}
	if err := next.signEpoch(e); err != nil {
		return nil, nil, err
	}
	if err := writeJSON(fsys, epochName(n), e); err != nil {
		return nil, nil, fmt.Errorf("rotate keys: %w", err)
	}
	return next, wrapped, nil
}

func (r *Ring) signEpoch(e *epochFile) error {
	link, err := r.Subkey(e.Epoch-1, epochLinkLabel, nil)
	if err != nil {
		return err
	}
	own, err := r.Subkey(e.Epoch, epochMACLabel, nil)
	if err != nil {
		return err
	}
	defer clear(link[:])
	defer clear(own[:])
	e.Link = mac(link, e.statement())
	e.MAC = mac(own, e.statement(), e.Link)
	sum := e.checksum()
	e.Checksum = sum[:]
	return nil
}

// RemoveSlot removes the slot with an id. It refuses when no other vouched slot
// would remain. Whoever copied the slot's file and knows its secret still opens
// the epochs there are; Rotate shuts them out of what comes.
func RemoveSlot(fsys fsx.FS, r *Ring, id string) error {
	lock, err := lockKeys(fsys)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := r.Fresh(fsys); err != nil {
		return err
	}
	if b, err := hex.DecodeString(id); err != nil || len(b) != 8 {
		return fmt.Errorf("%q: %w", id, ErrNoSlot)
	}
	name := path.Join(dir, strings.ToLower(id))
	if _, err := fsys.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", id, ErrNoSlot)
	} else if err != nil {
		return err
	}
	slots, err := readSlots(fsys)
	if err != nil && !errors.Is(err, ErrDamagedSlot) {
		return err
	}
	good, err := r.vouched(fsys, slots)
	if err != nil {
		return err
	}
	left := 0
	for _, s := range good {
		if s.name != name {
			left++
		}
	}
	if left == 0 {
		return fmt.Errorf("%s: %w", id, ErrLastSlot)
	}
	if err := fsys.Remove(name); err != nil {
		return err
	}
	return fsys.SyncDir(dir)
}
