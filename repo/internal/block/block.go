// Package block holds the words every part of the repository shares: the id of
// a block, the place where its sealed bytes lie, and the 48 byte record that
// joins the two. Tree nodes, pack footers and index pages are arrays of such
// records, so their encoding is fixed by the repository's format version.
package block

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// ID names a block or a tree node by the keyed BLAKE3 hash of its plaintext.
// Without the repository's key it says nothing about the content.
type ID [32]byte

// String returns the id in hexadecimal, shortened to what a person can compare.
func (id ID) String() string { return hex.EncodeToString(id[:8]) }

// Handle names a pack. It is random, stands in the pack's header and is its
// file name; zero names no pack.
type Handle uint64

// String returns the handle as it appears in file names: 16 hexadecimal digits.
func (h Handle) String() string { return fmt.Sprintf("%016x", uint64(h)) }

// ParseHandle reads a handle as String writes it.
func ParseHandle(s string) (Handle, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 8 || hex.EncodeToString(b) != s {
		return 0, fmt.Errorf("%q is not a pack's name (16 lower-case hexadecimal digits)", s)
	}
	h := Handle(binary.BigEndian.Uint64(b))
	if h == 0 {
		return 0, errors.New("the pack name of all zeros names no pack")
	}
	return h, nil
}

// Kind says what a record's bytes are and how they were compressed.
type Kind uint8

// Kinds of records. A hole has neither id nor place: it reads as zeros,
// whatever it covers.
const (
	Hole     Kind = 0x00
	Raw      Kind = 0x01 // a block, not compressed
	Zstd     Kind = 0x02 // a block, one zstd frame
	S2       Kind = 0x03 // a block, one S2 block
	NodeRaw  Kind = 0x11 // a tree node, not compressed
	NodeZstd Kind = 0x12 // a tree node, one zstd frame
)

// IsNode tells whether the record leads to a tree node.
func (k Kind) IsNode() bool { return k == NodeRaw || k == NodeZstd }

// IsBlock tells whether the record leads to a block of a disk.
func (k Kind) IsBlock() bool { return k == Raw || k == Zstd || k == S2 }

// Valid tells whether the format knows the kind.
func (k Kind) Valid() bool { return k == Hole || k.IsNode() || k.IsBlock() }

// String names the kind as documents and errors do.
func (k Kind) String() string {
	switch k {
	case Hole:
		return "hole"
	case Raw:
		return "raw block"
	case Zstd:
		return "zstd block"
	case S2:
		return "s2 block"
	case NodeRaw:
		return "raw node"
	case NodeZstd:
		return "zstd node"
	}
	return fmt.Sprintf("unknown kind 0x%02x", uint8(k))
}

// MaxLength is the largest sealed length a record can carry, in bytes.
const MaxLength = 1<<24 - 1

// Location is where a sealed record lies: Length bytes, tag included, at
// Offset of a pack.
type Location struct {
	Pack   Handle
	Offset uint32
	Length uint32 // at most MaxLength
	Kind   Kind
}

// Record joins an id with a place where its bytes were put.
type Record struct {
	ID ID
	Location
}

// Size is the encoded size of a record in bytes.
const Size = 48

// IsHole tells whether the record stands for zeros.
func (r Record) IsHole() bool { return r.Kind == Hole }

// Append appends the record's 48 bytes: id 32, pack 8, offset 4, length 3,
// kind 1, numbers little endian.
func (r Record) Append(b []byte) []byte {
	b = append(b, r.ID[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Pack))
	b = binary.LittleEndian.AppendUint32(b, r.Offset)
	return append(b, byte(r.Length), byte(r.Length>>8), byte(r.Length>>16), byte(r.Kind))
}

// ErrRecord says that 48 bytes are no record of this format.
var ErrRecord = errors.New("malformed record")

// Decode reads a record from the first 48 bytes of b. It refuses unknown
// kinds, holes that carry anything, and places that cannot be.
func Decode(b []byte) (Record, error) {
	if len(b) < Size {
		return Record{}, fmt.Errorf("%w: %d bytes instead of %d", ErrRecord, len(b), Size)
	}
	var r Record
	copy(r.ID[:], b)
	r.Pack = Handle(binary.LittleEndian.Uint64(b[32:]))
	r.Offset = binary.LittleEndian.Uint32(b[40:])
	r.Length = uint32(b[44]) | uint32(b[45])<<8 | uint32(b[46])<<16
	r.Kind = Kind(b[47])
	switch {
	case !r.Kind.Valid():
		return Record{}, fmt.Errorf("%w: %v", ErrRecord, r.Kind)
	case r.Kind == Hole && r != (Record{}):
		return Record{}, fmt.Errorf("%w: a hole with a place", ErrRecord)
	case r.Kind != Hole && (r.Pack == 0 || r.Length == 0):
		return Record{}, fmt.Errorf("%w: a %v without a place", ErrRecord, r.Kind)
	}
	return r, nil
}
