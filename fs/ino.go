package fs

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"
)

// Inode numbers are computed, not handed out: they are the same in every mount
// of a repository, and a request can be answered from the number alone. So the
// mount keeps no table of what the kernel knows, however much that is, and an
// NFS client's file handles outlive the server.
//
//	63..60  kind
//	59..20  hash of the name (host, VM) or low bits of the sequence number
//	19..0   further hash bits, or place within the generation's folder
//
// The kernel stores a generation number with each inode. Here it is a hash of
// the whole identity, repository and file name included: should a number ever
// come to mean something else, old handles are stale instead of wrong.
const (
	inoRoot uint64 = 1 // as FUSE wants it

	kindHost       uint64 = 1
	kindVM         uint64 = 2
	kindLatest     uint64 = 3
	kindGeneration uint64 = 4 // the folder and everything in it

	placeBits                = 20
	placeFolder              = 0
	placePartitions          = 1
	placeFiles               = 2       // 2 + index in the folder
	placePartition           = 1 << 19 // | disk << 10 | number
	maxFolderFiles           = placePartition - placeFiles
	maxShownDisks            = 1 << 9
	maxShownPartition        = 1<<10 - 1
	sequenceMask             = 1<<(60-placeBits) - 1
	hashMask          uint64 = 1<<60 - 1
)

func kindOf(ino uint64) uint64 { return ino >> 60 }

func inoOfHost(name string) uint64 { return kindHost<<60 | hash64("host", name)&hashMask }

func inoOfVM(id vmID) uint64 { return kindVM<<60 | hash64("vm", id.host, id.name)&hashMask }

// inoOfLatest makes the link a new inode whenever it points elsewhere, so that
// the kernel may keep the target of each for ever.
func inoOfLatest(sequence uint64) uint64 {
	return kindLatest<<60 | (sequence&sequenceMask)<<placeBits
}

func inoInGeneration(sequence uint64, place uint64) uint64 {
	return kindGeneration<<60 | (sequence&sequenceMask)<<placeBits | place
}

// splitIno is the inverse of inoOfLatest and inoInGeneration.
func splitIno(ino uint64) (sequence, place uint64) {
	return ino >> placeBits & sequenceMask, ino & (1<<placeBits - 1)
}

func hash64(parts ...string) uint64 {
	h := sha256.New()
	for _, p := range parts {
		h.Write(strconv.AppendInt(nil, int64(len(p)), 10))
		h.Write([]byte{':'})
		h.Write([]byte(p))
	}
	return binary.BigEndian.Uint64(h.Sum(nil))
}

// identity is the kernel's generation number of what the parts name. The
// kernel keeps 32 bits of it.
func identity(parts ...string) uint64 { return hash64(parts...) >> 32 }
