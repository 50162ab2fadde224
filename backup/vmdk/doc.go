// Package vmdk reads and writes the disk formats of VMware hosts: descriptors, flat extents, the two delta formats of
// snapshots (VMFSsparse, called COWD after its magic, and SEsparse), the hosted sparse format of Workstation and OVF
// files, and the tables of changed block tracking.
//
// A disk is a chain of links. The base link holds the disk as it was before the first snapshot, each further link what was
// written after one. The newest link, the running one, belongs to the VM; all others are frozen. [OpenChain] puts frozen links
// together and reads them as the guest saw them.
//
// # Invariants
//
//   - Nothing here opens a file or a connection except [OpenImage]: every format works on an io.ReaderAt per extent, because on a
//     real host each read is one ranged HTTPS request. Tables are read in pages, kept in one bounded cache per chain, and
//     data that lies together in a file is fetched with one read.
//   - Bytes from outside are never believed: sizes are checked before anything is allocated, memory is bounded by constants, and
//     bad bytes give an error that wraps [ErrFormat], never a panic and never wrong data.
//   - What the format leaves open is refused, not guessed: an SEsparse link whose journal has not been replayed, a link whose parent
//     has been changed since ([ErrChain]), features no public source describes ([ErrUnsupported]).
//
// # Sources
//
// Virtual Disk Format 1.1 and 5.0 (VMware, Inc.) for descriptors, COWD and hosted sparse extents; the documentation of libvmdk
// (Joachim Metz) for the fields of COWD and of change tracking files; the block driver of QEMU for what SEsparse readers agree
// on. The tests hold every format against qemu-img.
package vmdk

import "errors"

// SectorSize is the unit of every length and offset in VMDK metadata, in bytes.
const SectorSize = 512

// maxSectors bounds a disk to 1 EiB, far above the 62 TiB a host allows, so that no product of sizes overflows.
const maxSectors = 1 << 51

var (
	// ErrFormat means that bytes are not what their place in a file promises: another format, or damage.
	ErrFormat = errors.New("not a valid VMDK")
	// ErrUnsupported means a valid file of a kind this package does not read.
	ErrUnsupported = errors.New("not supported")
	// ErrChain means links that do not belong together: a parent changed since its child was made, or another disk.
	ErrChain = errors.New("links do not form a chain")
)
