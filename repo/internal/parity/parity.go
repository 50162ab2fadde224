// Package parity mends bit rot. For a file that ends with the SHA-256 of all
// its bytes before, as packs, index segments and sealed files do, it makes a
// sidecar of Reed–Solomon parity over the bytes as they lie, so making, checking
// and mending need no keys, and parity can be added to files that have none.
//
// The file is cut into k data shards, contiguous and equally long (the last
// padded with zeros); m parity shards of the same length are computed byte by
// byte across them over GF(2^8), as klauspost/reedsolomon does with its default
// matrix (Vandermonde, made systematic). Every shard consists of cells of 4,096
// bytes, each with a checksum, which say what is damaged. Cell i of all shards
// together is a stripe, and each stripe can lose any m of its k+m cells: up to
// m/k of the file when damage comes in one piece, and scattered damage as long
// as no stripe is hit more than m times. A cell is what a disk loses at once, so
// small files have cells of that size as well; up to 8 KiB a sidecar alone can
// bring back the whole file.
//
// repo/FORMAT.md describes the sidecar byte by byte.
package parity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"github.com/klauspost/reedsolomon"
)

const (
	magic     = "hikaepa\x01"
	endMagic  = "hpar"
	version   = 1
	cell      = 4096
	crcSize   = 4
	sumSize   = sha256.Size
	fixedSize = 64
	tailSize  = 8 + sumSize

	// aim is the number of data shards of a large file: with it, a parity
	// shard is one per cent.
	aim = 100
	// minParity keeps small files, which have few cells, able to lose two.
	minParity = 2
)

// MaxSize is the largest file that parity is made for, in bytes: eight times the
// largest pack that a writer should make. Mending holds file and sidecar in memory.
const MaxSize = 256 << 20

// MaxPercent is the largest share of parity that may be asked for.
const MaxPercent = 50

// MaxSidecar is the most bytes that a sidecar can have.
const MaxSidecar = MaxSize*3/4 + 4<<20

// Errors, for errors.Is.
var (
	ErrFile    = errors.New("not the file that was finished")          // Build: it does not end with its own SHA-256
	ErrSidecar = errors.New("damaged parity file")                     // it is not whole; Mend: neither of its heads can be read
	ErrBeyond  = errors.New("damaged beyond what its parity can mend") // some stripe lost more cells than there is parity
)

// Range is a damaged part of a file, in bytes.
type Range struct{ Offset, Length int64 }

// Info is what a sidecar says of the file it was made for.
type Info struct {
	Size         int64 // bytes of the file
	Data, Parity int   // shards
	// Sum is the file's last 32 bytes, the SHA-256 of all bytes before.
	Sum [32]byte
}

// layout is what the head says.
type layout struct {
	Info
	cells int    // per shard
	crcs  []byte // (Data+Parity) × cells × crcSize
}

func layoutOf(size int64, percent int) layout {
	total := int((size + cell - 1) / cell)
	l := layout{Info: Info{Size: size}}
	l.cells = (total + aim - 1) / aim
	l.Data = (total + l.cells - 1) / l.cells
	l.Parity = max(minParity, (l.Data*percent+99)/100)
	return l
}

func (l *layout) shard() int    { return l.cells * cell }
func (l *layout) headSize() int { return fixedSize + (l.Data+l.Parity)*l.cells*crcSize + sumSize }
func (l *layout) size() int     { return 2*l.headSize() + l.Parity*l.shard() + tailSize }

func (l *layout) crc(shard, i int) uint32 {
	return binary.LittleEndian.Uint32(l.crcs[(shard*l.cells+i)*crcSize:])
}

// Shards tells how much parity Build makes for a file of so many bytes.
func Shards(size int64, percent int) int {
	l := layoutOf(size, percent)
	return l.Parity
}

// Build makes the sidecar of a file of size bytes, reading it from front to end.
// percent, from 1 to MaxPercent, is how much parity to make. Beside the sidecar it
// takes the memory of one shard, a hundredth of the file. A file that does not end
// with the SHA-256 of all bytes before is ErrFile.
func Build(file io.ReaderAt, size int64, percent int) ([]byte, error) {
	return new(Builder).Build(file, size, percent)
}

// Builder makes sidecars one after the other. For files of similar size that takes
// less than making each with Build, for the matrix is the same.
type Builder struct {
	enc  reedsolomon.Encoder
	k, m int
}

func (b *Builder) encoder(k, m int) (reedsolomon.Encoder, error) {
	if b.enc == nil || b.k != k || b.m != m {
		enc, err := reedsolomon.New(k, m)
		if err != nil {
			return nil, err
		}
		b.enc, b.k, b.m = enc, k, m
	}
	return b.enc, nil
}

// Build is Build.
func (b *Builder) Build(file io.ReaderAt, size int64, percent int) ([]byte, error) {
	if size < sumSize || size > MaxSize {
		return nil, fmt.Errorf("parity is made for files of %d to %d bytes, not for %d", sumSize, MaxSize, size)
	}
	if percent < 1 || percent > MaxPercent {
		return nil, fmt.Errorf("%d %% of parity is out of range: 1 to %d", percent, MaxPercent)
	}
	l := layoutOf(size, percent)
	enc, err := b.encoder(l.Data, l.Parity)
	if err != nil {
		return nil, err
	}
	out := make([]byte, l.size())
	shards := l.parity(out)
	l.crcs = make([]byte, 0, (l.Data+l.Parity)*l.cells*crcSize)
	sum := prefixSum{rest: size - sumSize, hash: sha256.New()}
	buf := make([]byte, l.shard())
	for j := range l.Data {
		off := int64(j) * int64(len(buf))
		n := int(min(int64(len(buf)), size-off))
		if got, err := file.ReadAt(buf[:n], off); got < n {
			if err == nil || errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("%w: it ends at %d, not at %d", ErrFile, off+int64(got), size)
			}
			return nil, err
		}
		clear(buf[n:])
		sum.write(buf[:n])
		l.addCRCs(buf)
		if err := enc.EncodeIdx(buf, j, shards); err != nil {
			return nil, err
		}
	}
	if !bytes.Equal(sum.hash.Sum(nil), sum.end) {
		return nil, fmt.Errorf("%w: its SHA-256 is not the one at its end", ErrFile)
	}
	copy(l.Sum[:], sum.end)
	for _, s := range shards {
		l.addCRCs(s)
	}
	head := l.head()
	copy(out, head)
	at := len(out) - tailSize
	copy(out[at-len(head):], head)
	binary.LittleEndian.PutUint32(out[at:], uint32(len(head)))
	copy(out[at+4:], endMagic)
	whole := sha256.Sum256(out[:len(out)-sumSize])
	copy(out[len(out)-sumSize:], whole[:])
	return out, nil
}

// prefixSum hashes all of a file but its last bytes, which it keeps.
type prefixSum struct {
	rest int64 // bytes that are still to be hashed
	hash hash.Hash
	end  []byte
}

func (s *prefixSum) write(b []byte) {
	n := min(int64(len(b)), s.rest)
	s.hash.Write(b[:n])
	s.rest -= n
	s.end = append(s.end, b[n:]...)
}

func (l *layout) addCRCs(shard []byte) {
	for ; len(shard) > 0; shard = shard[cell:] {
		l.crcs = binary.LittleEndian.AppendUint32(l.crcs, crc32.ChecksumIEEE(shard[:cell]))
	}
}

// parity are the parity shards in a sidecar of the layout's size.
func (l *layout) parity(sidecar []byte) [][]byte {
	shards := make([][]byte, l.Parity)
	for j := range shards {
		at := l.headSize() + j*l.shard()
		shards[j] = sidecar[at : at+l.shard()]
	}
	return shards
}

// data cuts the file into its data shards; what is missing reads as zeros.
func (l *layout) data(file []byte) [][]byte {
	var shards [][]byte
	for j := range l.Data {
		start, end := min(j*l.shard(), len(file)), min((j+1)*l.shard(), len(file))
		s := file[start:end]
		if len(s) < l.shard() {
			s = append(make([]byte, 0, l.shard()), s...)[:l.shard()]
		}
		shards = append(shards, s)
	}
	return shards
}

func (l *layout) head() []byte {
	b := make([]byte, 0, l.headSize())
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, version)
	b = binary.LittleEndian.AppendUint16(b, uint16(l.Data))
	b = binary.LittleEndian.AppendUint16(b, uint16(l.Parity))
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint32(b, cell)
	b = binary.LittleEndian.AppendUint32(b, uint32(l.cells))
	b = binary.LittleEndian.AppendUint64(b, uint64(l.Size))
	b = append(b, l.Sum[:]...)
	b = append(b, l.crcs...)
	s := sha256.Sum256(b)
	return append(b, s[:]...)
}

// parse finds a head that is whole and returns it with the parity shards, which
// may be damaged.
func parse(sidecar []byte) (*layout, [][]byte, error) {
	l := parseHead(sidecar)
	if l == nil && len(sidecar) >= tailSize {
		// The copy at the end: its place follows from its size, which stands
		// in the tail.
		tail := sidecar[len(sidecar)-tailSize:]
		at := len(sidecar) - tailSize - int(binary.LittleEndian.Uint32(tail))
		if string(tail[4:8]) == endMagic && at >= 0 {
			l = parseHead(sidecar[at:])
		}
	}
	if l == nil {
		return nil, nil, fmt.Errorf("%w: neither of its heads is whole", ErrSidecar)
	}
	if len(sidecar) != l.size() {
		return nil, nil, fmt.Errorf("%w: %d bytes instead of %d", ErrSidecar, len(sidecar), l.size())
	}
	return l, l.parity(sidecar), nil
}

// parseHead reads the head that b begins with; nil if there is none.
func parseHead(b []byte) *layout {
	if len(b) < fixedSize || string(b[:8]) != magic || binary.LittleEndian.Uint16(b[8:]) != version ||
		binary.LittleEndian.Uint16(b[14:]) != 0 || binary.LittleEndian.Uint32(b[16:]) != cell {
		return nil
	}
	l := &layout{cells: int(binary.LittleEndian.Uint32(b[20:]))}
	l.Data, l.Parity = int(binary.LittleEndian.Uint16(b[10:])), int(binary.LittleEndian.Uint16(b[12:]))
	size := binary.LittleEndian.Uint64(b[24:])
	if l.Data < 1 || l.Parity < 1 || l.Data+l.Parity > 256 || l.cells < 1 || l.cells > MaxSize/cell || size < sumSize || size > MaxSize {
		return nil
	}
	l.Size = int64(size)
	copy(l.Sum[:], b[32:])
	// The shards hold the file and no more than the padding it needs.
	if int64(l.Data)*int64(l.shard()) < l.Size || int64(l.Data-1)*int64(l.shard()) >= l.Size || len(b) < l.headSize() {
		return nil
	}
	body := b[:l.headSize()-sumSize]
	want := sha256.Sum256(body)
	if !bytes.Equal(want[:], b[len(body):l.headSize()]) {
		return nil
	}
	l.crcs = body[fixedSize:]
	return l
}

// Check proves that a sidecar is whole and tells what it was made for; else it is
// ErrSidecar.
func Check(sidecar []byte) (Info, error) {
	n := len(sidecar) - sumSize
	if n < 0 {
		return Info{}, fmt.Errorf("%w: %d bytes", ErrSidecar, len(sidecar))
	}
	if sum := sha256.Sum256(sidecar[:n]); !bytes.Equal(sum[:], sidecar[n:]) {
		return Info{}, fmt.Errorf("%w: its SHA-256 is not the one at its end", ErrSidecar)
	}
	l, _, err := parse(sidecar)
	if err != nil {
		return Info{}, err
	}
	return l.Info, nil
}

// bad lists, for each stripe that has any, the shards whose cell is not what it was.
func (l *layout) bad(shards [][]byte) map[int][]int {
	bad := map[int][]int{}
	for j, s := range shards {
		for i := range l.cells {
			if crc32.ChecksumIEEE(s[i*cell:(i+1)*cell]) != l.crc(j, i) {
				bad[i] = append(bad[i], j)
			}
		}
	}
	return bad
}

// ranges are the damaged parts of the file, ascending.
func (l *layout) ranges(bad map[int][]int) []Range {
	hit := make(map[int64]bool)
	for i, shards := range bad {
		for _, j := range shards {
			hit[int64(j)*int64(l.cells)+int64(i)] = true
		}
	}
	var out []Range
	for c := int64(0); c*cell < l.Size; c++ {
		if !hit[c] {
			continue
		}
		off := c * cell
		n := min(cell, l.Size-off)
		if k := len(out); k > 0 && out[k-1].Offset+out[k-1].Length == off {
			out[k-1].Length += n
		} else {
			out = append(out, Range{off, n})
		}
	}
	return out
}

// Mend returns the file as it was when the sidecar was made, and what of it had to
// be mended; file may be cut short or have grown. Neither argument is changed.
// ErrBeyond says that too much is damaged, and then where; ErrSidecar that the sidecar
// is of no use.
func Mend(file, sidecar []byte) (mended []byte, damage []Range, err error) {
	l, parity, err := parse(sidecar)
	if err != nil {
		return nil, nil, err
	}
	mended = append(make([]byte, 0, l.Size), file[:min(int64(len(file)), l.Size)]...)[:l.Size]
	shards := append(l.data(mended), parity...)
	bad := l.bad(shards)
	damage = l.ranges(bad)
	var enc reedsolomon.Encoder
	if len(bad) > 0 {
		if enc, err = reedsolomon.New(l.Data, l.Parity); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrSidecar, err)
		}
	}
	for i, lost := range bad {
		if len(lost) > l.Parity {
			return nil, damage, fmt.Errorf("%w: %d of %d cells of a stripe are lost, and %d can be mended", ErrBeyond, len(lost), l.Data+l.Parity, l.Parity)
		}
		stripe := make([][]byte, len(shards))
		for j, s := range shards {
			stripe[j] = s[i*cell : (i+1)*cell]
		}
		for _, j := range lost {
			stripe[j] = nil
		}
		if err := enc.ReconstructData(stripe); err != nil {
			return nil, damage, fmt.Errorf("%w: %w", ErrBeyond, err)
		}
		for _, j := range lost {
			if off := j*l.shard() + i*cell; j < l.Data && int64(off) < l.Size {
				copy(mended[off:], stripe[j])
			}
		}
	}
	if err := l.prove(mended); err != nil {
		return nil, damage, err
	}
	return mended, damage, nil
}

// prove compares the SHA-256: the checksums of the cells are short.
func (l *layout) prove(file []byte) error {
	n := len(file) - sumSize
	if sum := sha256.Sum256(file[:n]); sum != l.Sum || !bytes.Equal(sum[:], file[n:]) {
		return fmt.Errorf("%w: what came out is not the file that parity was made for", ErrBeyond)
	}
	return nil
}
