// Package sealed keeps small secrets in files of their own: manifests of
// generations and the names of VMs. repo/FORMAT.md describes them byte by byte.
//
// Promises: a file opens only under the name it was sealed for, so it cannot be
// moved to another VM or another time; every file has its own key, from a random
// salt, and seals one message with it; bad bytes give an error that matches
// ErrDamaged (or ErrVersion), never plaintext and never a panic.
package sealed

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// Version is the version of the file format this package writes.
const Version = 1

// Type says what a file holds.
type Type uint8

// Types of files.
const (
	Manifest     Type = 1
	Identity     Type = 2
	Forgotten    Type = 3
	Verification Type = 4
)

// Sizes, in bytes.
const (
	HeaderSize = 64
	sumSize    = sha256.Size
	tagSize    = 16
	// MaxPlain is the largest content.
	MaxPlain = 128 << 20
	// MaxFile is the largest file: zstd grows what it cannot shrink by little.
	MaxFile = MaxPlain + MaxPlain/128 + 4096
)

var magic = [8]byte{'h', 'i', 'k', 'a', 'e', 's', 'f', 1}

// Errors of Open.
var (
	ErrDamaged = errors.New("damaged file")
	ErrVersion = errors.New("the file's format is newer than this program; upgrade hikae")
)

// Keys derives a file's key; *keys.Ring does.
type Keys interface {
	Epoch() uint32
	Subkey(epoch uint32, label string, salt []byte) ([32]byte, error)
}

// Box seals and opens the files of one repository. It is safe for concurrent use.
type Box struct {
	keys       Keys
	repository [16]byte
	enc        *zstd.Encoder
	dec        *zstd.Decoder
}

// New makes a box; Close frees its memory.
func New(k Keys, repository [16]byte) (*Box, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithZeroFrames(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(MaxPlain))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &Box{keys: k, repository: repository, enc: enc, dec: dec}, nil
}

// Close frees the box's memory.
func (b *Box) Close() { b.dec.Close() }

func (b *Box) aead(header []byte) (cipher.AEAD, error) {
	key, err := b.keys.Subkey(binary.LittleEndian.Uint32(header[12:]), "file", header[32:HeaderSize])
	if err != nil {
		return nil, err
	}
	defer clear(key[:])
	c, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, fmt.Errorf("file key: %w", err)
	}
	return cipher.NewGCM(c)
}

// nonce is all zeros: a key seals one message only.
var nonce [12]byte

// Seal returns the content of the file that holds plain under the given name,
// which is its path in the repository.
func (b *Box) Seal(t Type, name string, plain []byte) ([]byte, error) {
	if len(plain) > MaxPlain {
		return nil, fmt.Errorf("%s: %d bytes, at most %d fit", name, len(plain), MaxPlain)
	}
	var salt [32]byte
	_, _ = rand.Read(salt[:]) // never fails: the program ends if the system has no randomness
	out := append([]byte(nil), magic[:]...)
	out = binary.LittleEndian.AppendUint16(out, Version)
	out = append(out, byte(t), 0)
	out = binary.LittleEndian.AppendUint32(out, b.keys.Epoch())
	out = append(out, b.repository[:]...)
	out = append(out, salt[:]...)
	aead, err := b.aead(out)
	if err != nil {
		return nil, err
	}
	packed := b.enc.EncodeAll(plain, nil)
	aad := append(append([]byte(nil), out...), name...)
	out = aead.Seal(out, nonce[:], packed, aad)
	sum := sha256.Sum256(out)
	return append(out, sum[:]...), nil
}

// Open returns what Seal was given. It changes file.
func (b *Box) Open(t Type, name string, file []byte) ([]byte, error) {
	damaged := func(format string, a ...any) error {
		return fmt.Errorf("%s: %w: %s", name, ErrDamaged, fmt.Sprintf(format, a...))
	}
	if len(file) < HeaderSize+tagSize+sumSize || len(file) > MaxFile || !bytes.Equal(file[:8], magic[:]) {
		return nil, damaged("%d bytes that are no sealed file", len(file))
	}
	header, body := file[:HeaderSize], file[HeaderSize:len(file)-sumSize]
	version := binary.LittleEndian.Uint16(header[8:])
	switch {
	case version > Version:
		return nil, fmt.Errorf("%s: %w (version %d)", name, ErrVersion, version)
	case version == 0 || header[11] != 0 || Type(header[10]) != t:
		return nil, damaged("version %d, type %d", version, header[10])
	case !bytes.Equal(header[16:32], b.repository[:]):
		return nil, damaged("it belongs to another repository")
	}
	aead, err := b.aead(header)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if sum := sha256.Sum256(file[:len(file)-sumSize]); !bytes.Equal(sum[:], file[len(file)-sumSize:]) {
		return nil, damaged("its SHA-256 is not the one at its end")
	}
	aad := append(append([]byte(nil), header...), name...)
	packed, err := aead.Open(body[:0], nonce[:], body, aad)
	if err != nil {
		return nil, damaged("authentication failed")
	}
	plain, err := b.dec.DecodeAll(packed, nil)
	if err != nil {
		return nil, damaged("%v", err)
	}
	return plain, nil
}
