package index

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"

	"hikae/repo/internal/block"
	"hikae/repo/internal/keys"
)

const (
	magic   = "hikaeix\x01"
	version = 1
	fileTyp = 3

	headerSize  = 64
	trailerSize = 8 + 4 + 4 + 8 + 32
	tagSize     = 16

	pageEntries  = 341
	pageSize     = pageEntries*block.Size + tagSize // 16,384
	groupPages   = 38
	groupEntries = groupPages * pageEntries
	filterBlock  = 64 // bytes
	groupSize    = groupPages*pageSize + (groupEntries*10+511)/512*filterBlock + tagSize

	maxPages      = 1 << 20
	maxEntries    = maxPages * pageEntries
	maxSuperseded = 1 << 16
	footerFixed   = 24

	sealRecords = 1
	sealFilter  = 2
	sealFooter  = 3

	keyLabel = "index"
)

// name is a segment's name: the first bytes of its salt.
type name [8]byte

func (n name) String() string { return hex.EncodeToString(n[:]) }

func parseName(s string) (n name, ok bool) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(n) || hex.EncodeToString(b) != s {
		return n, false
	}
	return name(b), true
}

// header is a segment's first bytes: all that a key is derived from, and part of
// what every seal in the file binds.
type header [headerSize]byte

func newHeader(epoch uint32, repository [16]byte, salt [32]byte) (h header) {
	copy(h[:], magic)
	binary.LittleEndian.PutUint16(h[8:], version)
	h[10] = fileTyp
	binary.LittleEndian.PutUint32(h[12:], epoch)
	copy(h[16:], repository[:])
	copy(h[32:], salt[:])
	return h
}

func (h *header) epoch() uint32 { return binary.LittleEndian.Uint32(h[12:]) }
func (h *header) name() name    { return name(h[32:40]) }

func (h *header) check(repository [16]byte, as name) error {
	switch {
	case string(h[:8]) != magic:
		return errors.New("it is not an index segment")
	case binary.LittleEndian.Uint16(h[8:]) != version:
		return fmt.Errorf("version %d is unknown to this program; a newer one may know it", binary.LittleEndian.Uint16(h[8:]))
	case h[10] != fileTyp || h[11] != 0:
		return errors.New("it is not an index segment")
	case !bytes.Equal(h[16:32], repository[:]):
		return errors.New("it belongs to another repository")
	case h.name() != as:
		return fmt.Errorf("it is segment %v under another name", h.name())
	}
	return nil
}

// seal is a segment's key, tied to its header.
type seal struct {
	aead   cipher.AEAD
	header header
}

func newSeal(ring *keys.Ring, h header) (seal, error) {
	key, err := ring.Subkey(h.epoch(), keyLabel, h[32:])
	if err != nil {
		return seal{}, err
	}
	defer clear(key[:])
	b, err := aes.NewCipher(key[:])
	if err != nil {
		return seal{}, err
	}
	aead, err := cipher.NewGCM(b)
	return seal{aead: aead, header: h}, err
}

func (s *seal) bind(off int64, what byte) (nonce [12]byte, data [headerSize + 9]byte) {
	binary.BigEndian.PutUint64(nonce[4:], uint64(off))
	copy(data[:], s.header[:])
	binary.LittleEndian.PutUint64(data[headerSize:], uint64(off))
	data[headerSize+8] = what
	return nonce, data
}

// close seals plain in place; it must have room for the tag.
func (s *seal) close(plain []byte, off int64, what byte) []byte {
	nonce, data := s.bind(off, what)
	return s.aead.Seal(plain[:0], nonce[:], plain, data[:])
}

// open opens sealed in place.
func (s *seal) open(sealed []byte, off int64, what byte) ([]byte, error) {
	nonce, data := s.bind(off, what)
	return s.aead.Open(sealed[:0], nonce[:], sealed, data[:])
}

// geometry tells where everything lies in a segment of so many entries.
type geometry struct{ entries int64 }

func (g geometry) pages() int  { return int((g.entries + pageEntries - 1) / pageEntries) }
func (g geometry) groups() int { return int((g.entries + groupEntries - 1) / groupEntries) }

func (g geometry) page(p int) (off int64, size int) {
	n := min(pageEntries, g.entries-int64(p)*pageEntries)
	off = headerSize + int64(p/groupPages)*groupSize + int64(p%groupPages)*pageSize
	return off, int(n)*block.Size + tagSize
}

func (g geometry) filter(group int) (off int64, size int) {
	last := min(g.pages(), (group+1)*groupPages) - 1
	at, n := g.page(last)
	entries := min(groupEntries, g.entries-int64(group)*groupEntries)
	return at + int64(n), filterSize(int(entries)) + tagSize
}

// end is where the footer begins.
func (g geometry) end() int64 {
	off, n := g.filter(g.groups() - 1)
	return off + int64(n)
}

func filterSize(entries int) int { return (entries*10 + 511) / 512 * filterBlock }

// filterAt is the block of a filter in which an id has its bits.
func filterAt(filter []byte, id []byte) []byte {
	hi, _ := bits.Mul64(binary.LittleEndian.Uint64(id[8:]), uint64(len(filter)/filterBlock))
	return filter[hi*filterBlock:][:filterBlock]
}

func filterAdd(filter []byte, id []byte) {
	b := filterAt(filter, id)
	for i, g := 0, binary.LittleEndian.Uint64(id[16:]); i < 7; i, g = i+1, g>>9 {
		b[g%512/8] |= 1 << (g % 8)
	}
}

func filterHas(filter []byte, id []byte) bool {
	b := filterAt(filter, id)
	for i, g := 0, binary.LittleEndian.Uint64(id[16:]); i < 7; i, g = i+1, g>>9 {
		if b[g%512/8]&(1<<(g%8)) == 0 {
			return false
		}
	}
	return true
}

// footer is what is kept of a segment in memory.
type footer struct {
	geometry
	sequence   uint64
	superseded []name
	fences     []uint64 // first 8 bytes of each page's first id, big endian
}

func (f *footer) size() int { return footerFixed + 8*len(f.superseded) + 8*len(f.fences) }

func (f *footer) encode() []byte {
	b := make([]byte, 0, f.size()+tagSize)
	b = binary.LittleEndian.AppendUint64(b, uint64(f.entries))
	b = binary.LittleEndian.AppendUint64(b, f.sequence)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.superseded)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.fences)))
	for _, n := range f.superseded {
		b = append(b, n[:]...)
	}
	for _, x := range f.fences {
		b = binary.BigEndian.AppendUint64(b, x)
	}
	return b
}

// decodeFooter reads a footer's plaintext; end is where the footer was found.
func decodeFooter(b []byte, end int64) (*footer, error) {
	if len(b) < footerFixed {
		return nil, errors.New("the footer is too short")
	}
	entries := binary.LittleEndian.Uint64(b)
	if entries == 0 || entries > maxEntries {
		return nil, fmt.Errorf("the footer counts %d entries", entries)
	}
	f := &footer{geometry: geometry{int64(entries)}, sequence: binary.LittleEndian.Uint64(b[8:])}
	s, n := binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint32(b[20:])
	if s > maxSuperseded || int64(n) != int64(f.pages()) || footerFixed+8*int64(s)+8*int64(n) != int64(len(b)) {
		return nil, fmt.Errorf("the footer's %d bytes do not fit %d entries, %d fences and %d names", len(b), entries, n, s)
	}
	if f.end() != end {
		return nil, fmt.Errorf("the footer lies at %d; %d entries take up to %d", end, entries, f.end())
	}
	b = b[footerFixed:]
	f.superseded = make([]name, s)
	for i := range f.superseded {
		f.superseded[i] = name(b[8*i:])
		if i > 0 && bytes.Compare(f.superseded[i-1][:], f.superseded[i][:]) >= 0 {
			return nil, errors.New("the footer's names are not in order")
		}
	}
	b = b[8*s:]
	f.fences = make([]uint64, n)
	for i := range f.fences {
		f.fences[i] = binary.BigEndian.Uint64(b[8*i:])
		if i > 0 && f.fences[i-1] > f.fences[i] {
			return nil, errors.New("the footer's fences are not in order")
		}
	}
	return f, nil
}

// trailer is a segment's last bytes without the checksum.
type trailer struct {
	off  int64
	size int
}

func (t trailer) encode() []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(t.off))
	b = binary.LittleEndian.AppendUint32(b, uint32(t.size))
	b = binary.LittleEndian.AppendUint32(b, 0)
	return append(b, magic...)
}

// decodeTrailer reads the trailer of a file of so many bytes. It lets no footer
// pass that is larger than the pages before it can need.
func decodeTrailer(b []byte, file int64) (trailer, error) {
	if len(b) != trailerSize || string(b[16:24]) != magic || binary.LittleEndian.Uint32(b[12:]) != 0 {
		return trailer{}, errors.New("its end is not that of an index segment")
	}
	off, size := binary.LittleEndian.Uint64(b), int64(binary.LittleEndian.Uint32(b[8:]))
	if off < headerSize || off > uint64(file) || int64(off)+size+trailerSize != file {
		return trailer{}, errors.New("its trailer points outside the file")
	}
	pages := min((int64(off)+pageSize-1)/pageSize, maxPages)
	if size < footerFixed+tagSize || size > footerFixed+tagSize+8*maxSuperseded+8*pages {
		return trailer{}, fmt.Errorf("its footer cannot have %d bytes", size)
	}
	return trailer{off: int64(off), size: int(size)}, nil
}
