package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"hikae/backup/vmdk"
)

// descriptorLimit bounds what is read of a descriptor. Real ones are below
// 2 KiB; a file called .vmdk that is none may be as large as a disk.
const descriptorLimit = 64 << 10

// DiskReader reads a frozen disk through its chain of links. Its methods are
// safe for concurrent use.
type DiskReader struct {
	store      storage // one for the whole disk
	chain      *vmdk.Chain
	descriptor []byte
	bytes      atomic.Int64
	ctx        context.Context // ends with Close, and every read with it
	cancel     context.CancelCauseFunc
}

var (
	_ io.ReaderAt = (*DiskReader)(nil)
	_ io.Closer   = (*DiskReader)(nil)
)

var errClosed = errors.New("the disk was closed")

// OpenDisk opens a disk of a Snapshot for reading: ctx is for the opening only.
// A disk that a VM may be writing to is refused, as is one that is Unsupported.
func (h *Host) OpenDisk(ctx context.Context, d Disk) (*DiskReader, error) {
	if d.Unsupported != "" {
		return nil, errf(ErrUnsupported, nil, "%s: %s cannot be backed up: %s", h.name, d.Label, d.Unsupported)
	}
	if !d.frozen || len(d.Chain) == 0 {
		return nil, fmt.Errorf("%s: %s is not frozen: only disks of a snapshot are read", h.name, d.Label)
	}
	if err := h.probeRanges(ctx, d.Chain[0]); err != nil {
		return nil, err
	}
	volumes := sync.OnceValues(func() (map[string]string, error) { return h.volumes(ctx) })
	r := &DiskReader{store: h.store()}
	r.ctx, r.cancel = context.WithCancelCause(context.Background())
	var links []vmdk.LinkSource
	for _, name := range d.Chain {
		text, err := h.descriptor(ctx, r.store, name)
		if err != nil {
			return nil, err
		}
		desc, err := vmdk.ParseDescriptor(text)
		if err != nil {
			return nil, fmt.Errorf("%s: descriptor %s: %w", h.name, name, err)
		}
		link := vmdk.LinkSource{Name: name, Descriptor: desc}
		for _, e := range desc.Extents {
			if e.File == "" { // reads as zeros
				link.Files = append(link.Files, vmdk.File{})
				continue
			}
			file, err := h.extent(ctx, r, name, e, volumes)
			if err != nil {
				return nil, err
			}
			link.Files = append(link.Files, file)
		}
		links = append(links, link)
		r.descriptor = text
	}
	chain, err := vmdk.OpenChain(ctx, links, vmdk.ChainOptions{ReadGap: readGap})
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", h.name, d.Label, err)
	}
	r.chain = chain
	if r.chain.Capacity() != d.Capacity {
		return nil, fmt.Errorf("%s: %s: the host says it has %d bytes, its descriptors say %d; consolidate or repair the disk first",
			h.name, d.Label, d.Capacity, r.chain.Capacity())
	}
	return r, nil
}

// readGap is how many unneeded bytes between two pieces of a link are read
// along rather than asked around: at 100 MB/s half a millisecond's worth, about
// what a request costs.
const readGap = 64 << 10

// descriptor reads a link's descriptor and makes sure that it is one.
func (h *Host) descriptor(ctx context.Context, store storage, name string) ([]byte, error) {
	text, size, err := store.readHead(ctx, name, descriptorLimit)
	if err != nil {
		return nil, err
	}
	if !vmdk.IsDescriptor(text) {
		return nil, fmt.Errorf("%s: %s is no VMDK descriptor (it lacks \"# Disk DescriptorFile\"); the disk is damaged or of a kind ESXi does not make",
			h.name, name)
	}
	if size > descriptorLimit {
		return nil, fmt.Errorf("%s: %s is %d bytes long, more than any VMDK descriptor", h.name, name, size)
	}
	return text, nil
}

// extent opens one extent file of a link. A flat file must have the size that
// the descriptor says, to the byte; that of a sparse one is what it is now, and
// must stay so, for the link is frozen.
func (h *Host) extent(ctx context.Context, r *DiskReader, descriptor string, e vmdk.Extent,
	volumes func() (map[string]string, error),
) (vmdk.File, error) {
	var stores map[string]string
	if strings.HasPrefix(e.File, "/") { // a parent of another VM: rare, and worth a question to the host only then
		var err error
		if stores, err = volumes(); err != nil {
			return vmdk.File{}, err
		}
	}
	name, err := beside(descriptor, e.File, stores)
	if err != nil {
		return vmdk.File{}, fmt.Errorf("%s: %w", h.name, err)
	}
	size, err := r.store.head(ctx, name)
	if err != nil {
		return vmdk.File{}, err
	}
	if size < 0 {
		return vmdk.File{}, fmt.Errorf("%s: the host does not tell the size of %s", h.name, name)
	}
	if e.Type == vmdk.ExtentVMFS || e.Type == vmdk.ExtentFlat {
		if want := e.Sectors<<9 + e.Offset<<9; size != want && (e.Offset == 0 || size < want) {
			return vmdk.File{}, fmt.Errorf("%s: %s is %d bytes long and its descriptor says %d; the disk is damaged", h.name, name, size, want)
		}
	}
	return vmdk.File{R: &extentReader{disk: r, name: name, size: size}, Size: size}, nil
}

// extentReader reads one extent file.
type extentReader struct {
	disk *DiskReader
	name string
	size int64
}

func (x *extentReader) ReadAt(p []byte, off int64) (int, error) {
	return x.ReadAtContext(x.disk.ctx, p, off)
}

// ReadAtContext is what vmdk prefers to ReadAt.
func (x *extentReader) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%s: read at %d", x.name, off)
	}
	if off >= x.size {
		return 0, io.EOF
	}
	var err error
	if rest := x.size - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	n := 0
	rerr := x.disk.store.read(ctx, x.name, p, off, x.size, func(right, wire int) {
		n += right
		x.disk.bytes.Add(int64(wire))
	})
	if rerr != nil {
		return n, rerr
	}
	return n, err
}

// ReadAt reads as io.ReaderAt.
func (r *DiskReader) ReadAt(p []byte, off int64) (int, error) {
	return r.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads as io.ReaderAt does, until ctx ends or the disk is
// closed. Large reads are cut into requests of at most 16 MiB; several reads at
// once use up to four connections.
func (r *DiskReader) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if r.ctx.Err() != nil {
		return 0, errClosed
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(r.ctx, func() { cancel(errClosed) })()
	return r.chain.ReadAtContext(ctx, p, off)
}

// Capacity is the disk's size in bytes.
func (r *DiskReader) Capacity() int64 { return r.chain.Capacity() }

// BytesRead counts the bytes of the disk's extent files that crossed the wire
// so far, repeated ones included.
func (r *DiskReader) BytesRead() int64 { return r.bytes.Load() }

// Descriptor is the text of the disk's topmost frozen descriptor.
func (r *DiskReader) Descriptor() []byte { return r.descriptor }

// NextData finds the first area at or after off that some link holds; io.EOF:
// only holes follow. For a flat base that is all of it.
func (r *DiskReader) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	return r.chain.NextData(ctx, off)
}

// Close ends reads under way.
func (r *DiskReader) Close() error {
	r.cancel(errClosed)
	return nil
}
