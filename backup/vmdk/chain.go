package vmdk

import (
	"context"
	"errors"
	"io"
)

var errNotYet = errors.New("not written yet")

// File is one extent file of a link, however it is reached. If R has ReadAtContext(ctx, p, off), that is used; if R has
// NextData(off) (start, end int64, err error), it tells the holes of a flat file (io.EOF: only holes follow).
type File struct {
	R    io.ReaderAt
	Size int64 // in bytes; -1 when not known
}

// LinkSource is one link: its descriptor and its extent files in the descriptor's order (nothing for ZERO extents).
type LinkSource struct {
	Name       string // for errors: the descriptor's path
	Descriptor *Descriptor
	Files      []File
	// Running, when set, is read instead of Files: the link a simulated guest writes to.
	Running *Delta
}

// ChainOptions tunes a chain; the zero value is right for a host.
type ChainOptions struct {
	CacheBytes int // bound of the cache for tables; 0 is 8 MiB
	ReadGap    int // pieces of one file with at most so many bytes between them are fetched by one read; 0 is 32 KiB, -1 none
}

// Chain is a disk as the guest sees it through its links. It is safe for concurrent use.
type Chain struct{}

// OpenChain puts links together, base first, and reads their headers. ErrChain: they do not belong together.
func OpenChain(ctx context.Context, links []LinkSource, o ChainOptions) (*Chain, error) {
	return nil, errNotYet
}

// Capacity is the disk's size in bytes.
func (c *Chain) Capacity() int64 { return 0 }

// ReadAt implements io.ReaderAt.
func (c *Chain) ReadAt(p []byte, off int64) (int, error) { return 0, errNotYet }

// ReadAtContext is ReadAt with a context for the reads below.
func (c *Chain) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return 0, errNotYet
}

// NextData finds the first area at or after off that some link holds; io.EOF: only holes follow.
func (c *Chain) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	return 0, 0, errNotYet
}

// Allocated is every area that some link holds; a flat link holds all, unless its file tells its holes.
func (c *Chain) Allocated(ctx context.Context) ([]Area, error) { return nil, errNotYet }

// Delta is a snapshot link that can be written (used by the simulated host).
type Delta struct{}

// Image is a local disk image opened for import: raw, flat, or any VMDK with its chain.
type Image struct{}

// OpenImage opens a local image. Kind is "raw", "flat", "vmfs", "monolithicSparse", "streamOptimized", … (a descriptor's createType).
func OpenImage(path string) (*Image, error) { return nil, errNotYet }

// Kind is how the image is kept: "raw" or a VMDK createType.
func (i *Image) Kind() string { return "" }

// Capacity is the disk's size in bytes, a multiple of SectorSize.
func (i *Image) Capacity() int64 { return 0 }

// ReadAt implements io.ReaderAt.
func (i *Image) ReadAt(p []byte, off int64) (int, error) { return 0, errNotYet }

// NextData finds the first data at or after off; io.EOF: only holes follow.
func (i *Image) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	return 0, 0, errNotYet
}

// Close closes the files.
func (i *Image) Close() error { return nil }

// TrackingGranularity is the bytes one entry of a change tracking file stands for: 64 KiB up to 128 GiB, then doubling.
func TrackingGranularity(capacity int64) int64 { return 0 }
