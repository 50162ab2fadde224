// Package codec compresses blocks and tree nodes, each for itself, and restores
// them to exactly the size they had.
//
// Promises: what does not shrink by 3 % is kept as it is; bytes that were not
// made by this package give an error, never a panic, and never more memory than
// the caller's buffer.
package codec

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"hikae/repo/internal/block"
)

// ErrName says that a compression's name is not known.
var ErrName = errors.New("unknown compression")

// ErrCorrupt says that bytes do not decompress to what they should.
var ErrCorrupt = errors.New("compressed data is corrupt")

// Names lists the compressions New knows; the first is the default.
func Names() []string { return []string{"zstd", "zstd-default", "zstd-better", "s2", "none"} }

// Compressor compresses one thing at a time: every goroutine has its own.
type Compressor struct {
	zstd    *zstd.Encoder
	s2      bool
	scratch []byte
}

// New makes a compressor: "zstd" or "" (fastest), "zstd-default",
// "zstd-better", "s2" or "none". size is the largest input, in bytes.
func New(name string, size int) (*Compressor, error) {
	var level zstd.EncoderLevel
	switch name {
	case "", "zstd":
		level = zstd.SpeedFastest
	case "zstd-default":
		level = zstd.SpeedDefault
	case "zstd-better":
		level = zstd.SpeedBetterCompression
	case "s2":
		return &Compressor{s2: true, scratch: make([]byte, s2.MaxEncodedLen(size))}, nil
	case "none":
		return &Compressor{}, nil
	default:
		return nil, fmt.Errorf("%w %q: choose one of %v", ErrName, name, Names())
	}
	window := zstd.MinWindowSize
	for window < size {
		window *= 2
	}
	// No checksum in the frame: every record is authenticated by its seal.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(window), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &Compressor{zstd: enc, scratch: make([]byte, 0, enc.MaxEncodedSize(size))}, nil
}

// Block compresses a block. The result is good until the next call; it is src
// itself when compression gains nothing.
func (c *Compressor) Block(src []byte) ([]byte, block.Kind) {
	switch {
	case c.zstd != nil:
		if out := c.zstd.EncodeAll(src, c.scratch[:0]); worthIt(out, src) {
			return out, block.Zstd
		}
	case c.s2:
		if out := s2.Encode(c.scratch, src); worthIt(out, src) {
			return out, block.S2
		}
	}
	return src, block.Raw
}

// Node compresses a tree node, always with zstd if at all.
func (c *Compressor) Node(src []byte) ([]byte, block.Kind) {
	if c.zstd != nil {
		if out := c.zstd.EncodeAll(src, c.scratch[:0]); worthIt(out, src) {
			return out, block.NodeZstd
		}
	}
	return src, block.NodeRaw
}

func worthIt(out, src []byte) bool { return len(out) <= len(src)-len(src)*3/100 }

// Slack is how many bytes beyond the plaintext DecompressRoomy writes at most. zstd
// copies 16 bytes at a time when it may write past the end, which makes it a fifth
// quicker.
const Slack = 64

// Decompressor is safe for concurrent use.
type Decompressor struct {
	zstd  *zstd.Decoder
	roomy sync.Pool // of *[]byte: buffers with slack, for those who have none
}

// NewDecompressor makes a decompressor of blocks and nodes of at most size
// bytes.
func NewDecompressor(size int) (*Decompressor, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(uint64(max(size, zstd.MinWindowSize))), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	x := &Decompressor{zstd: d}
	x.roomy.New = func() any {
		b := make([]byte, size+Slack)
		return &b
	}
	return x, nil
}

// Close frees the decompressor's memory.
func (d *Decompressor) Close() { d.zstd.Close() }

// Decompress fills dst, whose length is the plaintext's, from a record's
// payload. dst and src must not overlap. Nothing beyond dst's length is touched.
func (d *Decompressor) Decompress(dst []byte, kind block.Kind, src []byte) error {
	switch kind {
	case block.Raw, block.NodeRaw:
		if len(src) != len(dst) {
			return fmt.Errorf("%w: %d bytes instead of %d", ErrCorrupt, len(src), len(dst))
		}
		copy(dst, src)
	case block.Zstd, block.NodeZstd:
		b := d.roomy.Get().(*[]byte)
		defer d.roomy.Put(b)
		if len(dst)+Slack > len(*b) {
			return fmt.Errorf("%w: %d bytes are more than there can be", ErrCorrupt, len(dst))
		}
		if err := d.decode(*b, len(dst), src); err != nil {
			return err
		}
		copy(dst, *b)
	case block.S2:
		if n, err := s2.DecodedLen(src); err != nil || n != len(dst) {
			return fmt.Errorf("%w: s2 block of %d bytes instead of %d", ErrCorrupt, n, len(dst))
		}
		out, err := s2.Decode(dst, src)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
		if &out[0] != &dst[0] {
			copy(dst, out)
		}
	default:
		return fmt.Errorf("%w: a %v has no bytes", ErrCorrupt, kind)
	}
	return nil
}

// DecompressRoomy is Decompress, quicker. dst needs Slack bytes of capacity beyond
// its length, which nobody else uses: what they hold afterwards is undefined.
func (d *Decompressor) DecompressRoomy(dst []byte, kind block.Kind, src []byte) error {
	if kind != block.Zstd && kind != block.NodeZstd || cap(dst)-len(dst) < Slack {
		return d.Decompress(dst, kind, src)
	}
	return d.decode(dst[:len(dst)+Slack], len(dst), src)
}

// decode fills the first n bytes of room, which has Slack bytes more.
func (d *Decompressor) decode(room []byte, n int, src []byte) error {
	out, err := d.zstd.DecodeAll(src, room[:0:n+Slack])
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if len(out) != n {
		return fmt.Errorf("%w: %d bytes instead of %d", ErrCorrupt, len(out), n)
	}
	if n > 0 && &out[0] != &room[0] { // the decoder took a buffer of its own
		copy(room[:n], out)
	}
	return nil
}
