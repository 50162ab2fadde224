package esxi

import (
	"context"
	"errors"
	"io"
)

var errSoon = errors.New("not built yet")

// Host is one connected host. Its methods are safe for concurrent use.
type Host struct{}

// Certificate shows the certificate at address (host or host:port) by a TLS
// handshake alone: nothing is sent after it, nothing is verified.
func Certificate(ctx context.Context, address string) (Cert, error) { return Cert{}, errSoon }

// Connect checks the certificate, logs in once, and keeps the session alive
// until Close.
func Connect(ctx context.Context, c Config) (*Host, error) { return nil, errSoon }

// Close logs out. The Host is of no use afterwards.
func (h *Host) Close(ctx context.Context) error { return errSoon }

// About is what the host said of itself at Connect.
func (h *Host) About() About { return About{} }

// VMs lists every registered VM, by name.
func (h *Host) VMs(ctx context.Context) ([]VM, error) { return nil, errSoon }

// VM finds one VM by its name (or by its ConfigPath where names are not unique).
func (h *Host) VM(ctx context.Context, name string) (*VM, error) { return nil, errSoon }

// CreateSnapshot freezes vm's disks. name must be unique in the VM.
func (h *Host) CreateSnapshot(ctx context.Context, vm *VM, name, description string, quiesce bool) (*Snapshot, error) {
	return nil, errSoon
}

// FindSnapshots lists vm's snapshots called name, after every snapshot still
// being made has settled.
func (h *Host) FindSnapshots(ctx context.Context, vm *VM, name string) ([]SnapshotInfo, error) {
	return nil, errSoon
}

// RemoveSnapshot removes one snapshot, keeps its children, and returns when its
// links are merged. A snapshot that is gone is no error.
func (h *Host) RemoveSnapshot(ctx context.Context, id string) error { return errSoon }

// ChangedAreas says which areas of a disk changed between changeID and snap;
// "*" asks for the allocated areas. Sorted, merged, within the disk.
func (h *Host) ChangedAreas(ctx context.Context, snap *Snapshot, diskKey int32, changeID string) ([]Extent, error) {
	return nil, errSoon
}

// OpenDisk opens a frozen disk of a snapshot for reading.
func (h *Host) OpenDisk(ctx context.Context, d Disk) (*DiskReader, error) { return nil, errSoon }

// DiskReader reads a frozen disk. ReadAt is safe for concurrent use.
type DiskReader struct{}

// ReadAt reads as io.ReaderAt.
func (r *DiskReader) ReadAt(p []byte, off int64) (int, error) { return 0, errSoon }

// ReadAtContext reads as io.ReaderAt until ctx ends.
func (r *DiskReader) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return 0, errSoon
}

// Capacity is the disk's size in bytes.
func (r *DiskReader) Capacity() int64 { return 0 }

// BytesRead counts the bytes of disk data that crossed the wire.
func (r *DiskReader) BytesRead() int64 { return 0 }

// Descriptor is the text of the disk's topmost frozen descriptor.
func (r *DiskReader) Descriptor() []byte { return nil }

// Close ends pending reads.
func (r *DiskReader) Close() error { return nil }

// ReadFile reads a small datastore file whole; larger than limit is an error.
func (h *Host) ReadFile(ctx context.Context, dsPath string, limit int64) ([]byte, error) {
	return nil, errSoon
}

// Upload writes a datastore file of exactly size bytes and checks its size.
func (h *Host) Upload(ctx context.Context, dsPath string, r io.Reader, size int64) error {
	return errSoon
}

// Exists tells whether a datastore file or folder exists.
func (h *Host) Exists(ctx context.Context, dsPath string) (bool, error) { return false, errSoon }

// MakeDirectory makes one folder; ErrExists when it is there.
func (h *Host) MakeDirectory(ctx context.Context, dsPath string) error { return errSoon }

// Delete removes a file, or a folder with all in it; gone is no error.
func (h *Host) Delete(ctx context.Context, dsPath string) error { return errSoon }

// Datastores lists the host's datastores by name.
func (h *Host) Datastores(ctx context.Context) ([]Datastore, error) { return nil, errSoon }

// RegisterVM registers vmxPath under name.
func (h *Host) RegisterVM(ctx context.Context, vmxPath, name string) (*VM, error) {
	return nil, errSoon
}

// UnregisterVM forgets a VM and leaves its files.
func (h *Host) UnregisterVM(ctx context.Context, vm *VM) error { return errSoon }

// PowerOn starts a VM.
func (h *Host) PowerOn(ctx context.Context, vm *VM) error { return errSoon }
