// Package parity mends bit rot. For a sealed file it makes a sidecar of
// Reed–Solomon parity over the sealed bytes, so making, checking and mending
// need no keys, and parity can be added to files that have none.
//
// The file is cut into k data shards, contiguous and equally long (the last
// padded with zeros); m parity shards of the same length are computed byte by
// byte across them over GF(2^8), as klauspost/reedsolomon does with its default
// matrix (Vandermonde, made systematic). Every shard consists of cells of 4,096
// bytes, each with a checksum, which say what is damaged. Cell i of all shards
// together is a stripe, and each stripe can lose any m of its k+m cells: up to
// m/k of the file when damage comes in one piece, and scattered damage as long
// as no stripe is hit more than m times.
//
// The sidecar's bytes, numbers little endian:
//
//	head    magic "hikaepar" 8, version u16 = 1, k u16, m u16, zero u16,
//	        cell size u32 = 4096, cells per shard u32, file size u64,
//	        name u64, SHA-256 of the file 32,
//	        (k+m) × cells per shard checksums of 8 bytes, shard by shard
//	        (the first 8 bytes of the SHA-256 of the cell),
//	        SHA-256 of the head so far 32
//	parity  m shards
//	head    once more: a sidecar rots too
//	size    of the head u32, magic "hpar" 4
package parity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/reedsolomon"
)

const (
	magic     = "hikaepar"
	endMagic  = "hpar"
	version   = 1
	cell      = 4096
	sumSize   = 8
	fixedSize = 72
	tailSize  = 8

	// aim is the number of data shards of a large file: with it, a parity
	// shard is one per cent.
	aim = 100
	// minParity keeps small files, which have few cells, able to lose two.
	minParity = 2
)

// MaxSize is the largest file that parity is made for, in bytes: four times the
// largest pack. Mending holds file and sidecar in memory.
const MaxSize = 256 << 20

// MaxPercent is the largest share of parity that may be asked for.
const MaxPercent = 50

// Errors, for errors.Is.
var (
	ErrSidecar = errors.New("damaged parity file")                // neither of its heads can be read, or it is of another file
	ErrBeyond  = errors.New("damage beyond what parity can mend") // some stripe lost more cells than there is parity
)

// Range is a damaged part of a file, in bytes.
type Range struct{ Offset, Length int64 }

// layout is what the head says.
type layout struct {
	k, m, cells int // cells per shard
	size        int64
	name        uint64
	sum         [32]byte
	sums        []byte // (k+m) × cells × sumSize
}

func (l layout) shard() int    { return l.cells * cell }
func (l layout) headSize() int { return fixedSize + (l.k+l.m)*l.cells*sumSize + sha256.Size }

func (l layout) cellSum(shard, i int) []byte {
	at := (shard*l.cells + i) * sumSize
	return l.sums[at : at+sumSize]
}

// Build makes the sidecar of a file. Name ties the two together; percent, from
// 1 to MaxPercent, is how much parity to make.
func Build(file []byte, name uint64, percent int) ([]byte, error) {
	if len(file) == 0 || len(file) > MaxSize {
		return nil, fmt.Errorf("parity is made for files of 1 to %d bytes, not for %d", MaxSize, len(file))
	}
	if percent < 1 || percent > MaxPercent {
		return nil, fmt.Errorf("%d %% of parity is out of range: 1 to %d", percent, MaxPercent)
	}
	total := (len(file) + cell - 1) / cell
	l := layout{size: int64(len(file)), name: name, sum: sha256.Sum256(file)}
	l.cells = (total + aim - 1) / aim
	l.k = (total + l.cells - 1) / l.cells
	l.m = max(minParity, (l.k*percent+99)/100)
	shards := l.split(file)
	for range l.m {
		shards = append(shards, make([]byte, l.shard()))
	}
	enc, err := reedsolomon.New(l.k, l.m)
	if err != nil {
		return nil, err
	}
	if err := enc.Encode(shards); err != nil {
		return nil, err
	}
	for _, s := range shards {
		for i := range l.cells {
			l.sums = append(l.sums, checksum(s[i*cell:(i+1)*cell])...)
		}
	}
	head := l.head()
	out := make([]byte, 0, 2*len(head)+l.m*l.shard()+tailSize)
	out = append(out, head...)
	for _, s := range shards[l.k:] {
		out = append(out, s...)
	}
	out = append(out, head...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(head)))
	return append(out, endMagic...), nil
}

func checksum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:sumSize]
}

// split cuts the file into its data shards; what is missing reads as zeros.
func (l layout) split(file []byte) [][]byte {
	var shards [][]byte
	for j := range l.k {
		start, end := min(j*l.shard(), len(file)), min((j+1)*l.shard(), len(file))
		s := file[start:end]
		if len(s) < l.shard() {
			s = append(make([]byte, 0, l.shard()), s...)[:l.shard()]
		}
		shards = append(shards, s)
	}
	return shards
}

func (l layout) head() []byte {
	b := make([]byte, 0, l.headSize())
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, version)
	b = binary.LittleEndian.AppendUint16(b, uint16(l.k))
	b = binary.LittleEndian.AppendUint16(b, uint16(l.m))
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint32(b, cell)
	b = binary.LittleEndian.AppendUint32(b, uint32(l.cells))
	b = binary.LittleEndian.AppendUint64(b, uint64(l.size))
	b = binary.LittleEndian.AppendUint64(b, l.name)
	b = append(b, l.sum[:]...)
	b = append(b, l.sums...)
	s := sha256.Sum256(b)
	return append(b, s[:]...)
}

// parse finds a head that is whole and returns it with the parity shards.
func parse(sidecar []byte) (layout, [][]byte, error) {
	try := func(at int) (layout, bool) {
		if at < 0 || at+fixedSize > len(sidecar) {
			return layout{}, false
		}
		return parseHead(sidecar[at:])
	}
	l, ok := try(0)
	if !ok && len(sidecar) >= tailSize {
		// The copy at the end: its place follows from its size, which stands
		// in the tail.
		tail := sidecar[len(sidecar)-tailSize:]
		if string(tail[4:]) == endMagic {
			l, ok = try(len(sidecar) - tailSize - int(binary.LittleEndian.Uint32(tail)))
		}
	}
	if !ok {
		return layout{}, nil, fmt.Errorf("%w: neither of its heads is whole; make it again", ErrSidecar)
	}
	head := l.headSize()
	if want := 2*head + l.m*l.shard() + tailSize; len(sidecar) != want {
		return layout{}, nil, fmt.Errorf("%w: %d bytes instead of %d; make it again", ErrSidecar, len(sidecar), want)
	}
	var shards [][]byte
	for j := range l.m {
		at := head + j*l.shard()
		shards = append(shards, sidecar[at:at+l.shard()])
	}
	return l, shards, nil
}

func parseHead(b []byte) (layout, bool) {
	if string(b[:8]) != magic || binary.LittleEndian.Uint16(b[8:]) != version || binary.LittleEndian.Uint32(b[16:]) != cell {
		return layout{}, false
	}
	l := layout{
		k: int(binary.LittleEndian.Uint16(b[10:])), m: int(binary.LittleEndian.Uint16(b[12:])),
		cells: int(binary.LittleEndian.Uint32(b[20:])), name: binary.LittleEndian.Uint64(b[32:]),
	}
	size := binary.LittleEndian.Uint64(b[24:])
	if l.k < 1 || l.m < 1 || l.k+l.m > 256 || l.cells < 1 || l.cells > MaxSize/cell || size == 0 || size > MaxSize {
		return layout{}, false
	}
	l.size = int64(size)
	// The shards hold the file and no more than the padding it needs.
	if int64(l.k*l.shard()) < l.size || int64((l.k-1)*l.shard()) >= l.size || len(b) < l.headSize() {
		return layout{}, false
	}
	copy(l.sum[:], b[40:])
	body := b[:l.headSize()-sha256.Size]
	want := sha256.Sum256(body)
	if !bytes.Equal(want[:], b[len(body):l.headSize()]) {
		return layout{}, false
	}
	l.sums = body[fixedSize:]
	return l, true
}

// Name returns what the sidecar was made for.
func Name(sidecar []byte) (name uint64, size int64, err error) {
	l, _, err := parse(sidecar)
	return l.name, l.size, err
}

// Damage lists the parts of the file that are not as they were when the
// sidecar was made; none means that all is well. A file that was cut short is
// damaged where bytes are missing.
func Damage(file, sidecar []byte) ([]Range, error) {
	l, _, err := parse(sidecar)
	if err != nil {
		return nil, err
	}
	var out []Range
	l.eachBad(l.split(file[:min(int64(len(file)), l.size)]), func(shard, i int) {
		off := int64(shard*l.shard() + i*cell)
		n := min(cell, l.size-off)
		if k := len(out); k > 0 && out[k-1].Offset+out[k-1].Length == off {
			out[k-1].Length += n
		} else if n > 0 {
			out = append(out, Range{off, n})
		}
	})
	return out, nil
}

// eachBad calls fn for every cell of the shards whose checksum does not hold,
// shard by shard.
func (l layout) eachBad(shards [][]byte, fn func(shard, i int)) {
	for j, s := range shards {
		for i := range l.cells {
			if !bytes.Equal(checksum(s[i*cell:(i+1)*cell]), l.cellSum(j, i)) {
				fn(j, i)
			}
		}
	}
}

// Mend returns the file as it was when the sidecar was made, and what had to
// be mended. Neither argument is changed. ErrBeyond says that too much is
// damaged, ErrSidecar that the sidecar is of no use.
func Mend(file, sidecar []byte) (mended []byte, damage []Range, err error) {
	l, parityShards, err := parse(sidecar)
	if err != nil {
		return nil, nil, err
	}
	if damage, err = Damage(file, sidecar); err != nil {
		return nil, nil, err
	}
	mended = append(make([]byte, 0, l.size), file[:min(int64(len(file)), l.size)]...)[:l.size]
	shards := append(l.split(mended), parityShards...)
	bad := map[int][]int{} // stripe → shards
	l.eachBad(shards, func(shard, i int) { bad[i] = append(bad[i], shard) })
	enc, err := reedsolomon.New(l.k, l.m)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrSidecar, err)
	}
	for i, lost := range bad {
		if len(lost) > l.m {
			return nil, damage, fmt.Errorf("%w: %d of %d cells of a stripe are lost, %d can be", ErrBeyond, len(lost), l.k+l.m, l.m)
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
			if off := j*l.shard() + i*cell; j < l.k && int64(off) < l.size {
				copy(mended[off:], stripe[j])
			}
		}
	}
	// The checksums of the cells are short; this one is not.
	if sha256.Sum256(mended) != l.sum {
		return nil, damage, fmt.Errorf("%w: what came out is not the file that parity was made for", ErrBeyond)
	}
	return mended, damage, nil
}
