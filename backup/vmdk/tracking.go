package vmdk

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// TrackingHeaderSize is the length of a change tracking file's header, in bytes; the table follows it.
const TrackingHeaderSize = 512

const (
	trackingMagic   = 0xf61972a2
	trackingVersion = 1
	// On older virtual hardware minGranularity, then doubling: a table never has more than 2 Mi entries.
	minGranularity = 64 << 10
	maxEntries     = 2 << 20
	maxGranularity = 1 << 30
	// fineHardware is the first virtual hardware with version 2 of change tracking.
	fineHardware = 17
)

// Tracking is the header of a change tracking file (NAME-ctk.vmdk). Behind it is one little endian u32 for each block of
// Granularity bytes: the number of the last change id under which the block was written, 0 for never. "Changed since N" is every
// block with a number above N.
//
// VMware has not published the format. Known (libvmdk, "Change tracking file"; sizes of real files) are magic, version, the u32 at
// 12, the 16 bytes of identity at 44 and the size of the table; the other fields are this package's best guess, so a reader of
// a real host's file proves what it reads before it relies on it. All numbers are little endian.
//
//	0   u32 0xf61972a2        32  u32 sectors of a block (guessed)
//	4   u32 1                 36  u32 current number (guessed)
//	8   u32 0                 40  u32 0
//	12  u32 512, table's place 44  identity: the part of a change id before the slash
//	16  u64 capacity in sectors (guessed)
//	24  u64 blocks (guessed)
type Tracking struct {
	Capacity    int64 // of the disk, in bytes
	Granularity int64 // bytes of a block: a power of two from 64 KiB on
	Number      uint32
	UUID        [16]byte
}

// TrackingGranularity is the bytes a block of change tracking has on a disk of a VM of that virtual hardware version.
//
// Known: files of real hosts fit 64 KiB for disks up to 40 GiB, and Broadcom's "CBT Enhancements in vSphere 7 and 8" says that
// from vSphere 7.0 on VMs of hardware version 17 or higher use version 2 of change tracking, "with a smaller and adaptable block
// size". Believed: on older hardware the size doubles above 128 GiB so that the table keeps its length, and "smaller" is 64 KiB
// at every size; what it adapts to is not published. A reader therefore takes the size from the file, never from here.
func TrackingGranularity(capacity int64, hardware int) int64 {
	g := int64(minGranularity)
	if hardware >= fineHardware {
		return g
	}
	for g < maxGranularity && (capacity+g-1)/g > maxEntries {
		g *= 2
	}
	return g
}

// Blocks is the number of entries in the table.
func (t *Tracking) Blocks() int64 { return (t.Capacity + t.Granularity - 1) / t.Granularity }

// Size is the length of the whole file, in bytes.
func (t *Tracking) Size() int64 { return TrackingHeaderSize + 4*t.Blocks() }

// ChangeID is the change id whose number the header holds.
func (t *Tracking) ChangeID() string { return FormatChangeID(t.UUID, t.Number) }

// ParseTracking reads a header. size is the file's length, which must fit the table that the header promises (up to one
// sector of padding). ErrFormat otherwise.
func ParseTracking(header []byte, size int64) (*Tracking, error) {
	if len(header) < TrackingHeaderSize {
		return nil, fmt.Errorf("%w: change tracking header of %d bytes", ErrFormat, len(header))
	}
	le := binary.LittleEndian
	if m, v, at := le.Uint32(header), le.Uint32(header[4:]), le.Uint32(header[12:]); m != trackingMagic || v != trackingVersion ||
		at != TrackingHeaderSize {
		return nil, fmt.Errorf("%w: change tracking file with magic %#x, version %d, table at %d", ErrFormat, m, v, at)
	}
	sectors, grain := le.Uint64(header[16:]), int64(le.Uint32(header[32:]))*SectorSize
	if sectors == 0 || sectors > maxSectors || grain < minGranularity || grain > maxGranularity || !powerOfTwo(grain) {
		return nil, fmt.Errorf("%w: change tracking file for %d sectors in blocks of %d bytes", ErrFormat, sectors, grain)
	}
	t := &Tracking{Capacity: int64(sectors) * SectorSize, Granularity: grain, Number: le.Uint32(header[36:])}
	copy(t.UUID[:], header[44:60])
	if n := le.Uint64(header[24:]); n != uint64(t.Blocks()) || size < t.Size() || size >= t.Size()+SectorSize {
		return nil, fmt.Errorf("%w: change tracking file of %d bytes with %d entries for %d blocks", ErrFormat, size, n, t.Blocks())
	}
	return t, nil
}

// Header is the header as bytes.
func (t *Tracking) Header() []byte {
	h := make([]byte, TrackingHeaderSize)
	le := binary.LittleEndian
	le.PutUint32(h, trackingMagic)
	le.PutUint32(h[4:], trackingVersion)
	le.PutUint32(h[12:], TrackingHeaderSize)
	le.PutUint64(h[16:], uint64(t.Capacity/SectorSize))
	le.PutUint64(h[24:], uint64(t.Blocks()))
	le.PutUint32(h[32:], uint32(t.Granularity/SectorSize))
	le.PutUint32(h[36:], t.Number)
	copy(h[44:], t.UUID[:])
	return h
}

// FormatUUID writes 16 bytes as a host does in descriptors and change ids: "52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62".
func FormatUUID(uuid [16]byte) string {
	var b strings.Builder
	for i, c := range uuid {
		if i == 8 {
			b.WriteByte('-')
		} else if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%02x", c)
	}
	return b.String()
}

// ParseUUID reads 16 bytes in hex, with spaces and dashes anywhere. ErrFormat.
func ParseUUID(s string) (uuid [16]byte, err error) {
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "-", "").Replace(s))
	if err != nil || len(b) != len(uuid) {
		return uuid, fmt.Errorf("%w: uuid %q", ErrFormat, s)
	}
	return [16]byte(b), nil
}

// FormatChangeID writes a change id: FormatUUID, a slash, the number.
func FormatChangeID(uuid [16]byte, number uint32) string {
	return FormatUUID(uuid) + "/" + strconv.FormatUint(uint64(number), 10)
}

// ParseChangeID reads a change id. ErrFormat.
func ParseChangeID(s string) (uuid [16]byte, number uint32, err error) {
	head, tail, ok := strings.Cut(s, "/")
	if !ok {
		return uuid, 0, fmt.Errorf("%w: change id %q", ErrFormat, s)
	}
	if uuid, err = ParseUUID(head); err != nil {
		return uuid, 0, fmt.Errorf("%w: change id %q", ErrFormat, s)
	}
	n, err := strconv.ParseUint(tail, 10, 32)
	if err != nil {
		return uuid, 0, fmt.Errorf("%w: change id %q", ErrFormat, s)
	}
	return uuid, uint32(n), nil
}

// IsTracking says whether a file that begins with these bytes is a change tracking file.
func IsTracking(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0xa2, 0x72, 0x19, 0xf6})
}
