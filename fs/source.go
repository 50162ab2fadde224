package fs

import (
	"context"
	"io"
	"time"
)

// source is what a mount shows. The mount knows a repository by this alone, so
// that tests can show it disks that are slow, damaged, or gone.
//
// All methods are called concurrently, and calls may outlive the request that
// made them: a call that does not return when its context ends is left behind.
type source interface {
	// ID tells repositories apart.
	ID() string
	VMs(ctx context.Context) ([]vmID, error)
	// Refs lists the generations of a VM in any order, without opening them.
	Refs(ctx context.Context, vm vmID) ([]ref, error)
	// Open reads one generation. It is errGone when there is no such generation
	// any more.
	Open(ctx context.Context, r ref) (*snapshot, error)
	// Verified is when a generation was last verified and found good; zero for never.
	Verified(ctx context.Context, r ref) (time.Time, error)
	// Pin keeps what there is from being deleted until the Closer is closed.
	Pin(ctx context.Context) (io.Closer, error)
	// Space is how many bytes the storage of the repository holds in all, and
	// how many are free.
	Space(ctx context.Context) (total, free uint64, err error)
}

// disk is a disk of a generation. Its content never changes.
type disk interface {
	Size() int64
	// ReadAtContext fills p, which lies on the disk, or fails.
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
	// Lend returns n bytes at off, which lie on the disk, without copying them, or
	// fails. n is at most maxRead.
	Lend(ctx context.Context, off, n int64) (loan, error)
	// NextData returns the first area at or after off that is not a hole, or
	// io.EOF. Areas may adjoin.
	NextData(ctx context.Context, off int64) (start, end int64, err error)
	// Prefetch tells that this area will be read soon. It does not block.
	Prefetch(off, n int64)
}

// loan is bytes of a disk on loan: nobody changes them until Return, which must be
// called once.
type loan interface {
	Parts() [][]byte
	Return()
}

type vmID struct{ host, name string }

func (id vmID) String() string { return id.host + "/" + id.name }

// ref names a generation. Sequence numbers are unique in a repository.
type ref struct {
	vm       vmID
	sequence uint64
	time     time.Time
	name     string // of its folder
	imported bool
}

func (r ref) String() string { return r.vm.String() + "@" + r.name }

// snapshot is an opened generation.
type snapshot struct {
	attrs []xattr // of the folder and of everything in it
	files []file
}

// file is one file of a generation's folder: small ones as bytes, flat extents
// as disks.
type file struct {
	name   string
	data   []byte
	disk   disk
	stored int64 // bytes of the disk that are not holes
	attrs  []xattr
}

// xattr is an extended attribute; its name carries no "user.hikae." yet.
type xattr struct{ name, value string }
