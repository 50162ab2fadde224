package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
)

// COWD, as a host's snapshots of smaller disks on VMFS 5 have it (createType vmfsSparse). All numbers are little endian, places
// count in sectors. From Virtual Disk Format 1.1, "ESX Server Sparse Extents".
//
//	0     "COWD"
//	4     u32 version, 1
//	8     u32 flags, 3
//	12    u32 capacity in sectors
//	16    u32 sectors of a grain (1)
//	20    u32 place of the grain directory (4)
//	24    u32 entries of the directory
//	28    u32 first free sector of the file
//	32…   names and counters that no reader needs; 2048 bytes in all
//
// A directory entry is the place of a table, 0: none. A table has 4096 entries: 0 the parent's, 1 zero, else the grain's place.
const (
	cowdMagic     = "COWD"
	cowdHeader    = 2048
	cowdPerTable  = 4096
	cowdDirectory = 4 // sectors
	// cowdMaxGrain bounds a grain, in sectors; hosts write 1.
	cowdMaxGrain = 1 << 11
)

type cowd struct {
	noPacked
	grains
	free int64 // from the header, in sectors
}

func openCOWD(ctx context.Context, src *source, cache *pageCache) (*cowd, error) {
	var h [32]byte
	if err := src.readFull(ctx, h[:], 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(h[:4]) != cowdMagic {
		return nil, fmt.Errorf("%s: %w: a VMFSsparse link begins with %q, this with %q", src.name, ErrFormat, cowdMagic, h[:4])
	}
	if v := le.Uint32(h[4:]); v != 1 {
		return nil, fmt.Errorf("%s: VMFSsparse version %d: %w", src.name, v, ErrUnsupported)
	}
	sectors, grain := int64(le.Uint32(h[12:])), int64(le.Uint32(h[16:]))
	directory, entries := int64(le.Uint32(h[20:])), int64(le.Uint32(h[24:]))
	if sectors == 0 || grain == 0 || grain > cowdMaxGrain || directory == 0 {
		return nil, fmt.Errorf("%s: %w: VMFSsparse header with %d sectors in grains of %d, directory at %d", src.name, ErrFormat,
			sectors, grain, directory)
	}
	c := &cowd{free: int64(le.Uint32(h[28:]))}
	c.grains = grains{
		src: src, cache: cache, size: sectors * SectorSize, grain: grain * SectorSize,
		perTable: cowdPerTable, entry: 4, directory: directory * SectorSize,
		tableAt: func(e uint64) (int64, error) { return int64(e) * SectorSize, nil },
		grainAt: func(e uint64) (kind, int64, error) {
			switch e {
			case 0:
				return fromParent, 0, nil
			case 1: // a grain cannot be inside the header
				return zero, 0, nil
			}
			return data, int64(e) * SectorSize, nil
		},
	}
	c.tables = (c.size + c.span() - 1) / c.span()
	if c.tables > entries {
		return nil, fmt.Errorf("%s: %w: directory of %d entries, the disk needs %d", src.name, ErrFormat, entries, c.tables)
	}
	return c, c.check()
}
