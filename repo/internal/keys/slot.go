package keys

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"hikae/repo/internal/fsx"
)

const (
	dir          = "keys"
	slotLimit    = 64 << 10
	labelLimit   = 256
	kdfArgon2id  = "argon2id"
	kdfHKDF      = "hkdf-sha256"
	slotMACLabel = "slot"
)

// SlotInfo is what a slot's file says in the clear. Only Unlock proves it.
type SlotInfo struct {
	ID      string // 16 hexadecimal digits
	File    string // name in the repository
	Kind    Kind
	Label   string
	Created time.Time
	Epoch   uint32 // the newest epoch when the slot was made
	Params  Params // zero unless Kind is KindPassphrase
}

// hexBytes is a byte string that JSON shows in lower-case hexadecimal.
type hexBytes []byte

func (b hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, b), nil }

func (b *hexBytes) UnmarshalText(t []byte) error {
	v, err := hex.DecodeString(string(t))
	if err == nil && hex.EncodeToString(v) != string(t) {
		err = errors.New("not lower-case hexadecimal")
	}
	*b = v
	return err
}

// base64Bytes is a byte string that JSON shows in base64, in the one way that
// encodes it.
type base64Bytes []byte

func (b base64Bytes) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, b), nil
}

func (b *base64Bytes) UnmarshalText(t []byte) error {
	v, err := base64.StdEncoding.Strict().DecodeString(string(t))
	if err == nil && base64.StdEncoding.EncodeToString(v) != string(t) {
		err = errors.New("not plain base64")
	}
	*b = v
	return err
}

type kdfFile struct {
	Name      string   `json:"name"`
	Time      uint32   `json:"time,omitempty"`
	MemoryKiB uint32   `json:"memory_kib,omitempty"`
	Threads   uint8    `json:"threads,omitempty"`
	Salt      hexBytes `json:"salt"`
}

func (k kdfFile) params() Params {
	return Params{Time: k.Time, MemoryKiB: k.MemoryKiB, Threads: k.Threads}
}

// slotFile is the JSON of keys/<id>.
type slotFile struct {
	Format     uint16      `json:"format"`
	Repository hexBytes    `json:"repository"`
	ID         hexBytes    `json:"id"`
	Kind       Kind        `json:"kind"`
	Label      string      `json:"label"`
	Created    string      `json:"created"`
	Epoch      uint32      `json:"epoch"`
	KDF        kdfFile     `json:"kdf"`
	Public     hexBytes    `json:"public"`
	MAC        hexBytes    `json:"mac"`
	Body       base64Bytes `json:"body"`
	Checksum   hexBytes    `json:"checksum"`

	name    string // the file it was read from
	created time.Time
}

// header is everything that MAC and body bind.
func (s *slotFile) header() []byte {
	b := []byte("hikae/1 key slot\x00")
	b = binary.LittleEndian.AppendUint16(b, s.Format)
	b = append(b, s.Repository...)
	b = append(b, s.ID...)
	b = appendString(b, string(s.Kind))
	b = appendString(b, s.Label)
	b = appendString(b, s.Created)
	b = binary.LittleEndian.AppendUint32(b, s.Epoch)
	b = appendString(b, s.KDF.Name)
	b = binary.LittleEndian.AppendUint32(b, s.KDF.Time)
	b = binary.LittleEndian.AppendUint32(b, s.KDF.MemoryKiB)
	b = append(b, s.KDF.Threads)
	b = append(b, s.KDF.Salt...)
	return append(b, s.Public...)
}

// bound is header ‖ mac: the body's associated data, and what epochs name.
func (s *slotFile) bound() []byte { return append(s.header(), s.MAC...) }

func (s *slotFile) digest() [sha256.Size]byte { return sha256.Sum256(s.bound()) }

func (s *slotFile) checksum() [sha256.Size]byte { return sha256.Sum256(append(s.bound(), s.Body...)) }

func appendString(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(s))), s...)
}

func mac(key [keySize]byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key[:])
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func (s *slotFile) info() SlotInfo {
	i := SlotInfo{
		ID: hex.EncodeToString(s.ID), File: s.name, Kind: s.Kind, Label: s.Label,
		Created: s.created, Epoch: s.Epoch,
	}
	if s.Kind == KindPassphrase {
		i.Params = s.KDF.params()
	}
	return i
}

// damaged is what every fault of a file in keys/ becomes.
func damaged(name string, why string, args ...any) error {
	return fmt.Errorf("%s: %w: %w", name, ErrDamagedSlot, fmt.Errorf(why, args...))
}

// decodeJSON reads one object, without unknown fields and without anything
// behind it.
func decodeJSON(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON object")
	}
	return nil
}

// parseSlot reads a slot file and checks all that needs no key.
func parseSlot(name string, b []byte) (*slotFile, error) {
	// The version first: a newer format may have other fields.
	var v struct {
		Format uint16 `json:"format"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, damaged(name, "%w", err)
	}
	if v.Format != version {
		return nil, damaged(name, "format %d is unknown to this program; a newer one may know it", v.Format)
	}
	s := &slotFile{name: name}
	if err := decodeJSON(b, s); err != nil {
		return nil, damaged(name, "%w", err)
	}
	for _, f := range []struct {
		what      string
		got, want int
	}{
		{"repository", len(s.Repository), 16},
		{"id", len(s.ID), 8},
		{"salt", len(s.KDF.Salt), 32},
		{"public key", len(s.Public), 32},
		{"mac", len(s.MAC), sha256.Size},
		{"checksum", len(s.Checksum), sha256.Size},
	} {
		if f.got != f.want {
			return nil, damaged(name, "%s has %d bytes instead of %d", f.what, f.got, f.want)
		}
	}
	if hex.EncodeToString(s.ID) != path.Base(name) {
		return nil, damaged(name, "it is slot %x under another name", []byte(s.ID))
	}
	switch s.Kind {
	case KindPassphrase:
		if s.KDF.Name != kdfArgon2id {
			return nil, damaged(name, "key derivation %q does not fit a %s", s.KDF.Name, s.Kind)
		}
		if err := s.KDF.params().check(); err != nil {
			return nil, damaged(name, "%w", err)
		}
	case KindKeyFile, KindRecovery:
		if s.KDF.Name != kdfHKDF || s.KDF.params() != (Params{}) {
			return nil, damaged(name, "key derivation %q does not fit a %s", s.KDF.Name, s.Kind)
		}
	default:
		return nil, damaged(name, "kind %q is unknown", s.Kind)
	}
	if err := checkLabel(s.Label); err != nil {
		return nil, damaged(name, "%w", err)
	}
	var err error
	if s.created, err = parseTime(s.Created); err != nil {
		return nil, damaged(name, "%w", err)
	}
	if s.Epoch < 1 || s.Epoch > maxEpochs {
		return nil, damaged(name, "epoch %d is out of range", s.Epoch)
	}
	if want := bodySize(s.Epoch) + 16; len(s.Body) != want {
		return nil, damaged(name, "the body has %d bytes instead of %d", len(s.Body), want)
	}
	if sum := s.checksum(); !bytes.Equal(sum[:], s.Checksum) {
		return nil, damaged(name, "the checksum does not fit")
	}
	return s, nil
}

func checkLabel(l string) error {
	if len(l) > labelLimit || !utf8.ValidString(l) || strings.ContainsFunc(l, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("a label is at most %d bytes of text on one line", labelLimit)
	}
	return nil
}

func formatTime(t time.Time) string { return t.UTC().Truncate(time.Second).Format(time.RFC3339) }

// parseTime accepts the one way in which formatTime writes a time.
func parseTime(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if err == nil && formatTime(t) != s {
		err = fmt.Errorf("time %q is not in UTC and whole seconds", s)
	}
	return t.UTC(), err
}

// errUnread says that the storage failed: what the file holds is not known.
var errUnread = errors.New("it cannot be read")

// readSlots reads all slot files. Those that are damaged are in the error, the
// others are returned all the same.
func readSlots(fsys fsx.FS) ([]*slotFile, error) {
	list, err := fsys.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var slots []*slotFile
	var bad []error
	for _, e := range list {
		// Other names are no slots: epochs, the lock, what servers leave behind.
		if id, err := hex.DecodeString(e.Name()); err != nil || len(id) != 8 || hex.EncodeToString(id) != e.Name() {
			continue
		}
		name := path.Join(dir, e.Name())
		b, err := fsx.ReadFile(fsys, name, slotLimit)
		if errors.Is(err, fsx.ErrTooLarge) {
			bad = append(bad, damaged(name, "%w", err))
			continue
		}
		if err != nil {
			bad = append(bad, damaged(name, "%w: %w", errUnread, err))
			continue
		}
		s, err := parseSlot(name, b)
		if err != nil {
			bad = append(bad, err)
			continue
		}
		slots = append(slots, s)
	}
	return slots, errors.Join(bad...)
}

// Slots lists the slots by what their files say, sorted by id. Damaged files
// make an error for which errors.Is(err, ErrDamagedSlot) holds and which names
// each; the good ones are returned beside it.
func Slots(fsys fsx.FS) ([]SlotInfo, error) {
	slots, err := readSlots(fsys)
	list := make([]SlotInfo, len(slots))
	for i, s := range slots {
		list[i] = s.info()
	}
	return list, err
}

// bodySize is the size of a body's plaintext.
func bodySize(epochs uint32) int { return keySize + keySize + 4 + int(epochs)*keySize }

// AddSlot adds a slot by which secret opens the ring and returns what its file
// says. label is for people: at most 256 bytes on one line. p counts for
// passphrases only; zero is the default. The directory tmp must exist.
func AddSlot(fsys fsx.FS, r *Ring, secret Secret, label string, now time.Time, p Params) (SlotInfo, error) {
	if err := secret.usable(); err != nil {
		return SlotInfo{}, err
	}
	if err := checkLabel(label); err != nil {
		return SlotInfo{}, err
	}
	kdf := kdfFile{Name: kdfHKDF, Salt: random(32)}
	if secret.kind == KindPassphrase {
		if p == (Params{}) {
			p = DefaultParams()
		}
		if err := p.check(); err != nil {
			return SlotInfo{}, err
		}
		kdf.Name, kdf.Time, kdf.MemoryKiB, kdf.Threads = kdfArgon2id, p.Time, p.MemoryKiB, p.Threads
	}
	// Exclusive against Rotate, which would not know of this slot.
	lock, err := lockKeys(fsys)
	if err != nil {
		return SlotInfo{}, err
	}
	defer lock.Close()
	if err := r.Fresh(fsys); err != nil {
		return SlotInfo{}, err
	}
	s, err := r.sealSlot(secret, label, now, kdf)
	if err != nil {
		return SlotInfo{}, err
	}
	if err := writeJSON(fsys, s.name, s); err != nil {
		return SlotInfo{}, fmt.Errorf("add key slot: %w", err)
	}
	return s.info(), nil
}

// sealSlot makes a slot; kdf must have a salt that no slot has had before.
func (r *Ring) sealSlot(secret Secret, label string, now time.Time, kdf kdfFile) (*slotFile, error) {
	private, err := suite.kem.GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("make a slot's key pair: %w", err)
	}
	priv, err := private.Bytes()
	if err != nil {
		return nil, fmt.Errorf("make a slot's key pair: %w", err)
	}
	defer clear(priv)
	s := &slotFile{
		Format: version, Repository: r.repository[:], ID: random(8), Kind: secret.kind, Label: label,
		Created: formatTime(now), Epoch: r.Epoch(), KDF: kdf, Public: private.PublicKey().Bytes(),
		created: now.UTC().Truncate(time.Second),
	}
	s.name = path.Join(dir, hex.EncodeToString(s.ID))
	key, err := r.Subkey(s.Epoch, slotMACLabel, nil)
	if err != nil {
		return nil, err
	}
	defer clear(key[:])
	s.MAC = mac(key, s.header())

	body := make([]byte, 0, bodySize(s.Epoch))
	defer func() { clear(body) }()
	body = append(body, priv...)
	body = append(body, r.seed[:]...)
	body = binary.LittleEndian.AppendUint32(body, s.Epoch)
	for i := range r.masters {
		body = append(body, r.masters[i][:]...)
	}
	k := secret.slotKey(s.KDF.Salt, s.KDF.params())
	defer clear(k[:])
	s.Body = gcm(k).Seal(nil, make([]byte, 12), body, s.bound())
	sum := s.checksum()
	s.Checksum = sum[:]
	return s, nil
}

// opened is what a slot's body holds.
type opened struct {
	ring    *Ring
	private []byte
}

// open opens the body; ok is false when the secret does not fit.
func (s *slotFile) open(secret Secret) (o opened, ok bool, err error) {
	k := secret.slotKey(s.KDF.Salt, s.KDF.params())
	defer clear(k[:])
	body, err := gcm(k).Open(nil, make([]byte, 12), s.Body, s.bound())
	if err != nil {
		return o, false, nil
	}
	defer clear(body)
	// From here on the file was made by somebody who knew the secret.
	rest := body[2*keySize+4:]
	if binary.LittleEndian.Uint32(body[2*keySize:]) != s.Epoch {
		return o, false, damaged(s.name, "body and header differ in their epoch")
	}
	private, err := ecdh.X25519().NewPrivateKey(body[:keySize])
	if err != nil || !bytes.Equal(private.PublicKey().Bytes(), s.Public) {
		return o, false, damaged(s.name, "public and private key do not belong together")
	}
	o.private = append([]byte(nil), body[:keySize]...)
	o.ring = &Ring{repository: [16]byte(s.Repository), masters: make([][keySize]byte, s.Epoch)}
	copy(o.ring.seed[:], body[keySize:])
	for i := range o.ring.masters {
		copy(o.ring.masters[i][:], rest[i*keySize:])
	}
	return o, true, nil
}

func gcm(key [keySize]byte) cipher.AEAD {
	b, err := aes.NewCipher(key[:])
	if err != nil {
		panic("keys: " + err.Error()) // the key's length is a constant
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic("keys: " + err.Error())
	}
	return a
}

func lockKeys(fsys fsx.FS) (io.Closer, error) {
	l, err := fsys.Lock(path.Join(dir, "lock"), true, true)
	if err != nil {
		return nil, fmt.Errorf("lock the key slots: %w", err)
	}
	sweep(fsys)
	return l, nil
}

// sweep removes unfinished files. Only who holds the lock makes such: those that are
// there were left behind. What cannot be removed does no harm.
func sweep(fsys fsx.FS) {
	list, err := fsys.ReadDir("tmp")
	if err != nil {
		return
	}
	for _, e := range list {
		if strings.HasPrefix(e.Name(), "key-") {
			_ = fsys.Remove(path.Join("tmp", e.Name()))
		}
	}
}

// Sweep removes the unfinished files of key changes that were killed, unless one is
// under way.
func Sweep(fsys fsx.FS) error {
	l, err := fsys.Lock(path.Join(dir, "lock"), true, false)
	if errors.Is(err, fsx.ErrLocked) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lock the key slots: %w", err)
	}
	sweep(fsys)
	return l.Close()
}

func writeJSON(fsys fsx.FS, name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return fsx.WriteFile(fsys, "tmp/key-"+hex.EncodeToString(random(8)), name, append(b, '\n'))
}
