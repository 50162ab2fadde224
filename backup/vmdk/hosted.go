package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zlib"
)

// Hosted sparse extents, as Workstation, Fusion, VirtualBox, qemu-img and OVF files have them ("KDMV"). From Virtual Disk
// Format 5.0. All numbers are little endian, places count in sectors.
//
//	0   "KDMV"                       44  u32 entries of a table, 512
//	4   u32 version, 1 to 3          48  u64 place of the redundant directory
//	8   u32 flags                    56  u64 place of the directory, all ones: in the footer
//	12  u64 capacity                 64  u64 sectors before the first grain
//	20  u64 sectors of a grain       72  u8 1: not closed cleanly
//	28  u64 place of the descriptor  73  "\n \r\n", to notice a transfer as text
//	36  u64 sectors of it            77  u16 compression: 0, 1 deflate
//
// Flags: 1 the four characters are there, 2 the redundant directory is, 4 a table entry 1 means zero, 1<<16 grains are
// compressed, 1<<17 grains have markers. A directory entry is the place of a table, a table entry that of a grain; 0: the parent's. A
// compressed grain is, with a marker, u64 first sector, u32 bytes, and the RFC 1950 stream.
//
// A streamOptimized file is written in one pass, so its directory comes last: a footer, which is the header again with
// the directory's true place, is the last but one sector, between a marker of type 3 and an end marker of zeros.
const (
	hostedMagic      = "KDMV"
	hostedHeader     = 512
	hostedGDAtEnd    = ^uint64(0)
	hostedFlagLines  = 1 << 0
	hostedFlagZero   = 1 << 2
	hostedFlagPacked = 1 << 16
	hostedFlagMarker = 1 << 17
	hostedFooterMark = 3
	// Grains in sectors: the specification asks for more than 8, 128 is usual, larger than 16 MiB nobody writes. Tables: all
	// known writers have 512 entries.
	hostedMinGrain = 8
	hostedMaxGrain = 1 << 15
	hostedMinTable = 64
	hostedMaxTable = 1 << 12
)

type hostedLayout struct {
	Version, Flags                       uint32
	Capacity, Grain, DescAt, DescSectors uint64
	PerTable                             uint32
	RedundantAt, DirectoryAt, Overhead   uint64
	Unclean                              uint8
	Lines                                [4]byte
	Compression                          uint16
}

type hosted struct {
	grains
	layout hostedLayout
	marker bool
}

// parseHosted reads a header or footer sector.
func parseHosted(h []byte) (l hostedLayout, err error) {
	if string(h[:4]) != hostedMagic {
		return l, fmt.Errorf("%w: a sparse extent begins with %q, this with %q", ErrFormat, hostedMagic, h[:4])
	}
	if _, err := binary.Decode(h[4:], binary.LittleEndian, &l); err != nil {
		return l, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	switch {
	case l.Version < 1 || l.Version > 3:
		return l, fmt.Errorf("sparse extent version %d: %w", l.Version, ErrUnsupported)
	case l.Compression > 1:
		return l, fmt.Errorf("sparse extent with compression %d: %w", l.Compression, ErrUnsupported)
	case l.Flags&hostedFlagLines != 0 && string(l.Lines[:]) != "\n \r\n":
		return l, fmt.Errorf("%w: the file was changed by a transfer as text; copy it again in binary mode", ErrFormat)
	case l.Capacity == 0 || l.Capacity > maxSectors || l.Grain < hostedMinGrain || l.Grain > hostedMaxGrain ||
		l.PerTable < hostedMinTable || l.PerTable > hostedMaxTable:
		return l, fmt.Errorf("%w: sparse header with %d sectors in grains of %d, tables of %d", ErrFormat, l.Capacity, l.Grain,
			l.PerTable)
	}
	return l, nil
}

func openHosted(ctx context.Context, src *source, cache *pageCache) (*hosted, error) {
	var h [hostedHeader]byte
	if err := src.readFull(ctx, h[:], 0); err != nil {
		return nil, err
	}
	l, err := parseHosted(h[:])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", src.name, err)
	}
	if l.DirectoryAt == hostedGDAtEnd {
		if l, err = readFooter(ctx, src); err != nil {
			return nil, err
		}
	}
	if l.DirectoryAt == 0 || l.DirectoryAt > maxSectors {
		return nil, fmt.Errorf("%s: %w: grain directory at sector %d", src.name, ErrFormat, l.DirectoryAt)
	}
	x := &hosted{layout: l, marker: l.Flags&hostedFlagMarker != 0}
	isPacked := l.Compression == 1
	x.grains = grains{
		src: src, cache: cache, size: int64(l.Capacity) * SectorSize, grain: int64(l.Grain) * SectorSize,
		perTable: int64(l.PerTable), entry: 4, directory: int64(l.DirectoryAt) * SectorSize,
		tableAt: func(e uint64) (int64, error) { return int64(e) * SectorSize, nil },
		grainAt: func(e uint64) (kind, int64, error) {
			switch {
			case e == 0:
				return fromParent, 0, nil
			case e == 1 && l.Flags&hostedFlagZero != 0:
				return zero, 0, nil
			case isPacked:
				return packed, int64(e) * SectorSize, nil
			}
			return data, int64(e) * SectorSize, nil
		},
	}
	x.tables = (x.size + x.span() - 1) / x.span()
	return x, x.check()
}

func readFooter(ctx context.Context, src *source) (l hostedLayout, err error) {
	if src.Size < 4*SectorSize {
		return l, fmt.Errorf("%s: %w: the file is cut off before its footer", src.name, ErrFormat)
	}
	var f [3 * SectorSize]byte
	if err := src.readFull(ctx, f[:], src.Size-int64(len(f))); err != nil {
		return l, err
	}
	marker, footer, end := f[:SectorSize], f[SectorSize:2*SectorSize], f[2*SectorSize:]
	if binary.LittleEndian.Uint32(marker[12:]) != hostedFooterMark || string(footer[:4]) != hostedMagic ||
		len(bytes.TrimLeft(end[:16], "\x00")) != 0 {
		return l, fmt.Errorf("%s: %w: it does not end with a footer: the file is cut off", src.name, ErrFormat)
	}
	if l, err = parseHosted(footer); err != nil {
		return l, fmt.Errorf("%s: footer: %w", src.name, err)
	}
	return l, nil
}

// next gives packed segments their extent, so that the chain can hand them back.
func (x *hosted) next(ctx context.Context, off, n int64) (segment, error) {
	s, err := x.grains.next(ctx, off, n)
	if s.kind == packed {
		s.ext = x
	}
	return s, err
}

// readPacked inflates the grains that hold [off, off+len(p)).
func (x *hosted) readPacked(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		// The table is in the cache: next has just said that this is a packed grain.
		s, err := x.grains.next(ctx, off-off%x.grain, 1)
		if err != nil {
			return err
		}
		if s.kind != packed {
			return fmt.Errorf("%s: %w: grain at %d changed while it was read", x.src.name, ErrFormat, off)
		}
		first := off - off%x.grain
		key := pageKey{src: x.src, off: s.fileOff, n: min(x.grain, x.size-first), inflated: true}
		grain, err := x.cache.load(ctx, key, func(buf []byte) error { return x.inflate(ctx, buf, s.fileOff, first) })
		if err != nil {
			return err
		}
		n := copy(p, grain[off-first:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// inflate fills buf, which is the disk's at off, from the compressed grain at pos.
func (x *hosted) inflate(ctx context.Context, buf []byte, pos, off int64) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%s: %w: compressed grain at %d: %s", x.src.name, ErrFormat, pos, fmt.Sprintf(format, args...))
	}
	// Deflate makes incompressible bytes a little longer, never twice as long.
	size := x.grain + x.grain/2 + 1024
	if x.marker {
		var m [12]byte
		if err := x.src.readFull(ctx, m[:], pos); err != nil {
			return err
		}
		lba, n := binary.LittleEndian.Uint64(m[:]), int64(binary.LittleEndian.Uint32(m[8:]))
		if lba != uint64(off/SectorSize) {
			return bad("its marker names sector %d, the table %d", lba, off/SectorSize)
		}
		if n == 0 || n > size {
			return bad("%d bytes", n)
		}
		size, pos = n, pos+int64(len(m))
	}
	if x.src.Size >= 0 {
		if pos >= x.src.Size {
			return bad("it is behind the end of the file")
		}
		size = min(size, x.src.Size-pos)
	}
	stream := make([]byte, size)
	if err := x.src.readFull(ctx, stream, pos); err != nil {
		return err
	}
	z, err := zlib.NewReader(bytes.NewReader(stream))
	if err != nil {
		return bad("%v", err)
	}
	defer z.Close()
	if _, err := io.ReadFull(z, buf); err != nil {
		return bad("%v", err)
	}
	// Reading to the end has the checksum compared. A last grain may be longer than what is left of the disk.
	if n, err := io.Copy(io.Discard, io.LimitReader(z, x.grain)); err != nil && !errors.Is(err, io.EOF) {
		return bad("%v", err)
	} else if int64(len(buf))+n > x.grain {
		return bad("it holds more than %d bytes", x.grain)
	}
	return nil
}

// embeddedDescriptor reads the descriptor inside a hosted sparse file; nil when it has none.
func embeddedDescriptor(ctx context.Context, src *source) (*Descriptor, error) {
	var h [hostedHeader]byte
	if err := src.readFull(ctx, h[:], 0); err != nil {
		return nil, err
	}
	l, err := parseHosted(h[:])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", src.name, err)
	}
	if l.DescAt == 0 || l.DescSectors == 0 {
		return nil, nil
	}
	if l.DescAt > maxSectors || l.DescSectors > MaxDescriptor/SectorSize {
		return nil, fmt.Errorf("%s: %w: descriptor of %d sectors", src.name, ErrFormat, l.DescSectors)
	}
	text := make([]byte, l.DescSectors*SectorSize)
	if err := src.readFull(ctx, text, int64(l.DescAt)*SectorSize); err != nil {
		return nil, err
	}
	d, err := ParseDescriptor(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", src.name, err)
	}
	return d, nil
}
