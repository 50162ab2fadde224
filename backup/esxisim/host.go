// Package esxisim is a simulated ESXi host.
package esxisim

import (
	"context"
	"errors"
)

var errNotYet = errors.New("not written yet")

// Host is a running simulated host.
type Host struct{}

// Start starts a host.
func Start(ctx context.Context, o Options) (*Host, error) { return nil, errNotYet }

// Close stops it.
func (h *Host) Close() error { return errNotYet }

// Address is "127.0.0.1:port".
func (h *Host) Address() string { return "" }

// Thumbprint is the certificate's SHA-256 in upper-case hexadecimal with colons.
func (h *Host) Thumbprint() string { return "" }

// User is the account's name.
func (h *Host) User() string { return "" }

// Password is the account's password.
func (h *Host) Password() string { return "" }

// ImportVM makes a VM whose disks hold the raw images' content.
func (h *Host) ImportVM(ctx context.Context, name string, raws []string, o VMOptions) error {
	return errNotYet
}

// VMs are the names of the registered VMs.
func (h *Host) VMs() []string { return nil }

// PowerOn starts a VM.
func (h *Host) PowerOn(vm string) error { return errNotYet }

// PowerOff stops a VM.
func (h *Host) PowerOff(vm string) error { return errNotYet }

// DiskSize is the capacity of a disk in bytes.
func (h *Host) DiskSize(vm string, disk int) (int64, error) { return 0, errNotYet }

// WriteAt writes as the guest would. The VM must be running.
func (h *Host) WriteAt(vm string, disk int, p []byte, off int64) error { return errNotYet }

// ReadAt reads what the guest sees.
func (h *Host) ReadAt(vm string, disk int, p []byte, off int64) error { return errNotYet }

// Become makes guest writes until the disk equals the raw image; it returns the bytes written.
func (h *Host) Become(ctx context.Context, vm string, disk int, raw string) (int64, error) {
	return 0, errNotYet
}

// Stats are the counters so far.
func (h *Host) Stats() Stats { return Stats{} }

// ResetStats sets them to zero.
func (h *Host) ResetStats() {}

// Inject makes something go wrong; the id names it in the log.
func (h *Host) Inject(f Fault) (id string, err error) { return "", errNotYet }

// ClearFaults ends all faults.
func (h *Host) ClearFaults() {}
