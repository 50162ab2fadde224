package esxi

import (
	"context"
	"errors"
	"io"
)

// storage is how a host's files are read and written: its file server, or its
// shell. Errors are sentences already.
type storage interface {
	// head gives a file's size, below 0 when the host does not tell.
	head(ctx context.Context, dsPath string) (size int64, err error)
	// read fills p from off of a file that is total bytes long. count hears how
	// many more bytes of p are right, and how many crossed the wire for that.
	read(ctx context.Context, dsPath string, p []byte, off, total int64, count func(right, wire int)) error
	readHead(ctx context.Context, dsPath string, limit int64) (b []byte, size int64, err error)
	readFile(ctx context.Context, dsPath string, limit int64) ([]byte, error)
	// upload writes a whole file of size bytes, replacing what was there.
	upload(ctx context.Context, dsPath string, r io.Reader, size int64) error
}

var (
	_ storage = (*files)(nil)
	_ storage = (*shellFiles)(nil)
)

// store is where files are read: the file server, as long as it answers ranges.
// One way for all of a host, so that no file is read by two at once: a host
// refuses what another of its services has open.
func (h *Host) store() storage {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.files != nil && !h.found.noRanges {
		return h.files
	}
	return &shellFiles{h.shell}
}

// writeStore is where files are written: by the way of all changes.
func (h *Host) writeStore() storage {
	if h.overSSH() {
		return &shellFiles{h.shell}
	}
	return h.files
}

// errNoRanges is a file server that answers the whole file when asked for a
// part of it.
var errNoRanges = errors.New("the file server ignores ranges")

// tryRanges finds out once whether the file server answers ranges, by the first
// VM's configuration file. It is asked only where there is another way.
func (h *Host) tryRanges(ctx context.Context) error {
	h.mu.Lock()
	known := h.found.rangesOK || h.found.noRanges
	h.mu.Unlock()
	if known {
		return nil
	}
	vms, err := h.VMs(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		if vm.ConfigPath != "" && vm.Invalid == "" {
			return h.probeRanges(ctx, vm.ConfigPath)
		}
	}
	return nil
}

// probeRanges asks for one byte of a file.
func (h *Host) probeRanges(ctx context.Context, dsPath string) error {
	h.mu.Lock()
	known := h.found.rangesOK || h.found.noRanges
	h.mu.Unlock()
	if known || h.files == nil || h.shell == nil {
		return nil
	}
	err := h.files.ranges(ctx, dsPath)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err == nil:
		h.found.rangesOK = true
	case errors.Is(err, errNoRanges):
		h.log.Info("the host's file server ignores ranges, reading over SSH", "host", h.name)
		h.found.noRanges = true
	default:
		return err
	}
	return nil
}
