package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
)

// SEsparse, as a host's snapshots on VMFS 6 and of large disks have it. VMware has not published it; these are the facts that the
// readers of QEMU, dissect and Xen Orchestra agree on. All numbers are little endian u64, places and sizes count in sectors.
//
// Constant header, sector 0:
//
//	0   magic 0xcafebabe      64   reserved ×2            128  directory place, size
//	8   version 2.1           80   volatile header place, size   144  tables' place, size
//	16  capacity              96   journal header place, size    160  free bitmap place, size
//	24  sectors of a grain, 8 112  journal place, size           176  back map place, size
//	32  sectors of a table, 64                                   192  grains' place, size
//	40  flags 0, reserved 0                                      208  zeros up to 512
//
// Volatile header, one sector: magic 0xcafecafe, number of the next free table, next transaction, 1 when the journal must be
// replayed, zeros.
//
// A directory entry is 0, or has 1 in its top four bits and the number of a table in its low 32. A table entry's top four bits say:
// 0 the parent's; 1 unmapped by the guest and 2 zero, both read as zeros; 3 a grain, whose number is the low 48 bits
// shifted left by 12 together with the 12 bits above them.
const (
	seMagic         = 0xcafebabe
	seVolatileMagic = 0xcafecafe
	seVersion       = 0x0000000200000001
	seGrain         = 8  // sectors
	seTable         = 64 // sectors
	sePerTable      = seTable * SectorSize / 8
	seHeader        = 512
	// maxSESparse bounds the capacity, in sectors: 64 TiB.
	maxSESparse = 64 << 40 / SectorSize

	seTypeTable = 1
	seTypeZero  = 2
	seTypeGrain = 3
)

// seLayout is the constant header's numbers, in its order.
type seLayout struct {
	Magic, Version, Capacity, GrainSize, TableSize, Flags        uint64
	Reserved                                                     [4]uint64
	VolatileAt, VolatileSize, JournalHeaderAt, JournalHeaderSize uint64
	JournalAt, JournalSize, DirectoryAt, DirectorySize           uint64
	TablesAt, TablesSize, BitmapAt, BitmapSize, BackAt, BackSize uint64
	GrainsAt, GrainsSize                                         uint64
}

type seVolatile struct {
	Magic, FreeTable, NextTransaction, ReplayJournal uint64
}

type sesparse struct {
	noPacked
	grains
	layout    seLayout
	freeTable int64 // from the volatile header
}

func openSESparse(ctx context.Context, src *source, cache *pageCache) (*sesparse, error) {
	var h [seHeader]byte
	if err := src.readFull(ctx, h[:], 0); err != nil {
		return nil, err
	}
	s := &sesparse{}
	l := &s.layout
	n, err := binary.Decode(h[:], binary.LittleEndian, l)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", src.name, ErrFormat, err)
	}
	if l.Magic != seMagic {
		return nil, fmt.Errorf("%s: %w: an SEsparse link begins with magic %#x, this with %#x", src.name, ErrFormat, uint64(seMagic), l.Magic)
	}
	if l.Version != seVersion || l.GrainSize != seGrain || l.TableSize != seTable || l.Flags != 0 || l.Reserved != [4]uint64{} ||
		len(bytes.TrimLeft(h[n:], "\x00")) != 0 {
		return nil, fmt.Errorf("%s: SEsparse version %#x with grains of %d and tables of %d sectors, flags %#x: %w", src.name,
			l.Version, l.GrainSize, l.TableSize, l.Flags, ErrUnsupported)
	}
	for _, v := range []uint64{l.VolatileAt, l.DirectoryAt, l.DirectorySize, l.TablesAt, l.GrainsAt} {
		if v == 0 || v > maxSectors {
			return nil, fmt.Errorf("%s: %w: SEsparse header with a part at sector %d", src.name, ErrFormat, v)
		}
	}
	if l.Capacity == 0 || l.Capacity > maxSESparse {
		return nil, fmt.Errorf("%s: %w: SEsparse link of %d sectors", src.name, ErrFormat, l.Capacity)
	}
	if err := s.readVolatile(ctx, src); err != nil {
		return nil, err
	}
	tablesAt, grainsAt := int64(l.TablesAt)*SectorSize, int64(l.GrainsAt)*SectorSize
	s.grains = grains{
		src: src, cache: cache, size: int64(l.Capacity) * SectorSize, grain: seGrain * SectorSize,
		perTable: sePerTable, entry: 8, directory: int64(l.DirectoryAt) * SectorSize,
		tableAt: func(e uint64) (int64, error) {
			if e == 0 {
				return 0, nil
			}
			if e>>32 != seTypeTable<<28 {
				return 0, fmt.Errorf("%#x", e)
			}
			return tablesAt + int64(uint32(e))*seTable*SectorSize, nil
		},
		grainAt: func(e uint64) (kind, int64, error) {
			switch e >> 60 {
			case 0:
				if e == 0 {
					return fromParent, 0, nil
				}
			case 1, seTypeZero:
				return zero, 0, nil
			case seTypeGrain:
				if number := int64(e<<16>>4 | e>>48&0xfff); number < maxSectors/seGrain {
					return data, grainsAt + number*seGrain*SectorSize, nil
				}
			}
			return 0, 0, fmt.Errorf("%#x", e)
		},
	}
	s.tables = (s.size + s.span() - 1) / s.span()
	if have := int64(l.DirectorySize) * SectorSize / 8; s.tables > have {
		return nil, fmt.Errorf("%s: %w: directory of %d entries, the disk needs %d", src.name, ErrFormat, have, s.tables)
	}
	return s, s.check()
}

func (s *sesparse) readVolatile(ctx context.Context, src *source) error {
	var h [seHeader]byte
	if err := src.readFull(ctx, h[:], int64(s.layout.VolatileAt)*SectorSize); err != nil {
		return err
	}
	var v seVolatile
	if _, err := binary.Decode(h[:], binary.LittleEndian, &v); err != nil {
		return fmt.Errorf("%s: %w: %w", src.name, ErrFormat, err)
	}
	if v.Magic != seVolatileMagic {
		return fmt.Errorf("%s: %w: SEsparse volatile header with magic %#x", src.name, ErrFormat, v.Magic)
	}
	if v.ReplayJournal != 0 {
		return fmt.Errorf("%s: SEsparse link in use, or left by a crash: its journal must be replayed by the host first: %w", src.name,
			ErrUnsupported)
	}
	if v.FreeTable > 1<<32 {
		return fmt.Errorf("%s: %w: SEsparse volatile header with table %d", src.name, ErrFormat, v.FreeTable)
	}
	s.freeTable = int64(v.FreeTable)
	return nil
}
