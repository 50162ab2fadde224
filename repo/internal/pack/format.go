// Package pack writes and reads packs: immutable files of many sealed records,
// described byte by byte in repo/FORMAT.md.
//
// Invariants:
//
//   - a pack's key comes from 32 random bytes in its header, and a record's
//     nonce is its offset, which is given out once under a lock: no nonce is
//     used twice with a key. A pack that failed is given up, never continued;
//   - a record's associated data binds repository, pack, offset, kind, raw
//     length and id: bytes that lie elsewhere, or under another id, do not open;
//   - a file has its final name only once it is whole and synced.
//
// Promises: memory is a few buffers, whatever the size of packs or storage's
// speed; sealing runs on the callers' goroutines in parallel; decoders check
// every length and never panic.
package pack

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"

	"hikae/repo/internal/block"
)

// Version is the version of the pack format this package writes.
const Version = 1

// Type says what a pack holds, and so in which directory it lies.
type Type uint8

// Types of packs.
const (
	Data Type = 1 // blocks, in packs/
	Node Type = 2 // tree nodes, in meta/
)

// TypeOf returns the type of pack that holds records of kind k.
func TypeOf(k block.Kind) Type {
	if k.IsNode() {
		return Node
	}
	return Data
}

// Dir is the directory that packs of the type are spread in.
func (t Type) Dir() string {
	if t == Node {
		return "meta"
	}
	return "packs"
}

// Subdir is the directory of one pack.
func (t Type) Subdir(h block.Handle) string { return t.Dir() + "/" + h.String()[:2] }

// Path is the name of a pack's file.
func (t Type) Path(h block.Handle) string { return t.Subdir(h) + "/" + h.String() }

// Sizes, in bytes.
const (
	HeaderSize  = 64
	TrailerSize = 4 + 4 + 8 + 32
	Overhead    = 16 // what sealing adds to a record
	saltSize    = 32

	// MaxRecords is how many records a pack may hold. It bounds what a reader
	// has to take in before it can trust anything.
	MaxRecords = 65536
	// footerKind marks the footer in its associated data.
	footerKind = 0xff
)

var (
	magic        = [8]byte{'h', 'i', 'k', 'a', 'e', 'p', 'k', 1}
	trailerMagic = [8]byte{'h', 'i', 'k', 'a', 'e', 'e', 'n', 'd'}
)

// Errors of readers.
var (
	// ErrFormat says that bytes are not a pack of this repository and place.
	ErrFormat = errors.New("malformed pack")
	// ErrVersion says that a newer program wrote the pack.
	ErrVersion = errors.New("the pack's format is newer than this program; upgrade hikae")
	// ErrSeal says that bytes were changed, moved or swapped after they were
	// sealed.
	ErrSeal = errors.New("authentication failed")
)

// Keys derives a pack's key; *keys.Ring does.
type Keys interface {
	Epoch() uint32
	Subkey(epoch uint32, label string, salt []byte) ([32]byte, error)
}

// Header is the start of every pack.
type Header struct {
	Version    uint16
	Type       Type
	Epoch      uint32
	Repository [16]byte
	Salt       [saltSize]byte
}

// Handle is the pack's name: the first 8 bytes of the salt.
func (h *Header) Handle() block.Handle {
	return block.Handle(binary.LittleEndian.Uint64(h.Salt[:8]))
}

// Append appends the header's 64 bytes.
func (h *Header) Append(b []byte) []byte {
	b = append(b, magic[:]...)
	b = binary.LittleEndian.AppendUint16(b, h.Version)
	b = append(b, byte(h.Type), 0)
	b = binary.LittleEndian.AppendUint32(b, h.Epoch)
	b = append(b, h.Repository[:]...)
	return append(b, h.Salt[:]...)
}

// DecodeHeader reads a header.
func DecodeHeader(b []byte) (Header, error) {
	var h Header
	if len(b) < HeaderSize || !bytes.Equal(b[:8], magic[:]) {
		return h, fmt.Errorf("%w: no pack header", ErrFormat)
	}
	h.Version = binary.LittleEndian.Uint16(b[8:])
	h.Type = Type(b[10])
	h.Epoch = binary.LittleEndian.Uint32(b[12:])
	copy(h.Repository[:], b[16:])
	copy(h.Salt[:], b[32:])
	switch {
	case h.Version > Version:
		return h, fmt.Errorf("%w (version %d)", ErrVersion, h.Version)
	case h.Version == 0 || b[11] != 0:
		return h, fmt.Errorf("%w: header with version %d, reserved byte %d", ErrFormat, h.Version, b[11])
	case h.Type != Data && h.Type != Node:
		return h, fmt.Errorf("%w: type %d", ErrFormat, h.Type)
	case h.Handle() == 0:
		return h, fmt.Errorf("%w: handle zero", ErrFormat)
	}
	return h, nil
}

// Trailer is the end of every pack.
type Trailer struct {
	FooterOffset uint32
	FooterLength uint32 // sealed
	Sum          [32]byte
}

// appendTrailer appends all of the trailer but the sum.
func appendTrailer(b []byte, offset, length uint32) []byte {
	b = binary.LittleEndian.AppendUint32(b, offset)
	b = binary.LittleEndian.AppendUint32(b, length)
	return append(b, trailerMagic[:]...)
}

// DecodeTrailer reads the trailer of a pack of so many bytes.
func DecodeTrailer(b []byte, size int64) (Trailer, error) {
	var t Trailer
	if len(b) != TrailerSize || size < HeaderSize+TrailerSize || !bytes.Equal(b[8:16], trailerMagic[:]) {
		return t, fmt.Errorf("%w: no pack trailer; the file was cut or never finished", ErrFormat)
	}
	t.FooterOffset = binary.LittleEndian.Uint32(b)
	t.FooterLength = binary.LittleEndian.Uint32(b[4:])
	copy(t.Sum[:], b[16:])
	n := int64(t.FooterLength)
	if t.FooterOffset < HeaderSize || int64(t.FooterOffset)+n+TrailerSize != size ||
		n < Overhead || (n-Overhead)%block.Size != 0 || (n-Overhead)/block.Size > MaxRecords {
		return t, fmt.Errorf("%w: footer of %d bytes at %d in a file of %d", ErrFormat, n, t.FooterOffset, size)
	}
	return t, nil
}

// decodeFooter reads the footer's records and proves that they fill the pack.
func decodeFooter(b []byte, h *Header, footerOffset uint32) ([]block.Record, error) {
	records := make([]block.Record, 0, len(b)/block.Size)
	next := uint32(HeaderSize)
	for ; len(b) > 0; b = b[block.Size:] {
		r, err := block.Decode(b)
		if err != nil {
			return nil, fmt.Errorf("%w: footer: %w", ErrFormat, err)
		}
		if r.IsHole() || TypeOf(r.Kind) != h.Type || r.Pack != h.Handle() || r.Offset != next ||
			r.Length <= Overhead || r.Length > footerOffset-next {
			return nil, fmt.Errorf("%w: footer: %v of pack %v at %d, %d bytes, does not follow offset %d",
				ErrFormat, r.Kind, r.Pack, r.Offset, r.Length, next)
		}
		next += r.Length
		records = append(records, r)
	}
	if next != footerOffset {
		return nil, fmt.Errorf("%w: records end at %d, the footer is at %d", ErrFormat, next, footerOffset)
	}
	return records, nil
}

// sealer seals and opens the records of one pack.
type sealer struct {
	aead   cipher.AEAD
	prefix [2 + 16 + saltSize]byte // version, repository, salt
}

func newSealer(k Keys, h *Header) (*sealer, error) {
	key, err := k.Subkey(h.Epoch, "pack", h.Salt[:])
	if err != nil {
		return nil, err
	}
	defer clear(key[:])
	c, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, fmt.Errorf("pack key: %w", err)
	}
	s := new(sealer)
	if s.aead, err = cipher.NewGCM(c); err != nil {
		return nil, fmt.Errorf("pack key: %w", err)
	}
	p := binary.LittleEndian.AppendUint16(s.prefix[:0], h.Version)
	p = append(p, h.Repository[:]...)
	_ = append(p, h.Salt[:]...)
	return s, nil
}

// scratch holds nonce and associated data; it lives on the heap once a
// goroutine rather than once a record.
type scratch struct {
	nonce [12]byte
	aad   [2 + 16 + saltSize + 8 + 1 + 4 + 32]byte
}

// bind fills the scratch for one record.
func (s *sealer) bind(x *scratch, offset uint64, kind byte, raw uint32, id *block.ID) {
	binary.BigEndian.PutUint64(x.nonce[4:], offset)
	a := append(x.aad[:0], s.prefix[:]...)
	a = binary.LittleEndian.AppendUint64(a, offset)
	a = append(a, kind)
	a = binary.LittleEndian.AppendUint32(a, raw)
	_ = append(a, id[:]...)
}

// seal seals plain into dst, which has room for Overhead more and does not
// overlap it.
func (s *sealer) seal(x *scratch, dst, plain []byte, offset uint64, kind byte, raw uint32, id *block.ID) {
	s.bind(x, offset, kind, raw, id)
	s.aead.Seal(dst[:0], x.nonce[:], plain, x.aad[:])
}

// open opens sealed in place.
func (s *sealer) open(x *scratch, sealed []byte, offset uint64, kind byte, raw uint32, id *block.ID) ([]byte, error) {
	s.bind(x, offset, kind, raw, id)
	plain, err := s.aead.Open(sealed[:0], x.nonce[:], sealed, x.aad[:])
	if err != nil {
		return nil, ErrSeal
	}
	return plain, nil
}
