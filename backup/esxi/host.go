package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/types"
)

// Host is one connected host. Its methods are safe for concurrent use.
type Host struct {
	name, addr, user string
	log              *slog.Logger
	t                tuning
	session          *session
	files            *files
	control          control
	about            About
	place            place

	mu     sync.Mutex
	owners map[string]owner // of snapshots seen, by id
}

// place is where a standalone host keeps its VMs: the same on every ESXi, asked
// all the same.
type place struct {
	datacenter, folder, pool types.ManagedObjectReference
	name                     string // of the datacenter, for /folder's dcPath
}

// Connect checks the certificate, logs in once, and keeps the session alive
// until Close. A refused login is ErrLogin and must not be repeated with the
// same password; a certificate other than the pinned one is ErrThumbprint.
func Connect(ctx context.Context, c Config) (*Host, error) {
	return connect(ctx, c, defaults())
}

func connect(ctx context.Context, c Config, t tuning) (*Host, error) {
	addr, err := hostPort(c.Address)
	if err != nil {
		return nil, err
	}
	if c.Name == "" {
		c.Name = addr
	}
	if c.Thumbprint == "" {
		return nil, errf(ErrThumbprint, nil, "%s (%s) has no thumbprint configured: look at its certificate with hikae host add, compare it with the "+
			"host's console, and pin it", c.Name, addr)
	}
	pin, err := parseThumbprint(c.Thumbprint)
	if err != nil {
		return nil, errf(ErrThumbprint, err, "%s (%s): %v", c.Name, addr, err)
	}
	if c.User == "" || c.Password == nil {
		return nil, errf(ErrLogin, nil, "%s (%s) needs a user and a password file", c.Name, addr)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Clock == nil {
		c.Clock = time.Now //nolint:forbidigo // the one place where the real clock comes in
	}

	s, err := newSession(c, addr, pin, t)
	if err != nil {
		return nil, err
	}
	h := &Host{
		name: c.Name, addr: addr, user: c.User, log: c.Logger, t: t, session: s,
		owners: map[string]owner{},
	}
	h.files = &files{session: s, gate: newThrottle(t, c.Clock), name: h.name, addr: addr, t: t, log: c.Logger}
	h.control = &soapControl{h}
	if err := h.start(ctx); err != nil {
		s.transport.CloseIdleConnections()
		return nil, err
	}
	return h, nil
}

// start says hello, logs in and looks around.
func (h *Host) start(ctx context.Context) error {
	s := h.session
	// Not through the session's RoundTrip: an address that does not answer is
	// told at once, not after all tries.
	vc, err := vim25.NewClient(ctx, s.soap)
	if err != nil {
		return h.explain(ctx, "connect", err)
	}
	about := vc.ServiceContent.About
	h.about = About{Product: about.Name, Version: about.Version, Build: about.Build, APIType: about.ApiType}
	if vc.IsVC() {
		return fmt.Errorf("%s (%s) is a vCenter Server: give the address of the ESXi host itself", h.name, h.addr)
	}
	if vc.ServiceContent.SessionManager == nil {
		return fmt.Errorf("%s (%s) answers, but is no ESXi host", h.name, h.addr)
	}
	vc.RoundTripper = s
	s.vc = vc
	if err := s.renew(ctx, 0); err != nil {
		return h.explain(ctx, "log in", err)
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	go s.keep(background)
	if h.place, err = h.look(ctx); err != nil {
		return errors.Join(err, s.close(ctx))
	}
	h.files.datacenter = h.place.name
	return nil
}

// Close logs out, also when ctx has ended, and takes a few seconds at most. The
// Host is of no use afterwards; what is still open on it fails.
func (h *Host) Close(ctx context.Context) error {
	return h.explain(context.WithoutCancel(ctx), "log out", h.session.close(ctx))
}

// About is what the host said of itself at Connect.
func (h *Host) About() About { return h.about }

// control is how a host is changed. SOAP is one way; a host whose licence
// forbids that has another. What only reads is not part of it: every edition
// allows that through SOAP and /folder.
//
// Ids are the host's own (managed object ids). Errors come as the plane gave
// them; Host explains them, and looks what came of a call whose answer was lost
// (lost).
type control interface {
	snapshotControl
	machineControl
	fileControl
}

type snapshotControl interface {
	createSnapshot(ctx context.Context, vm, name, description string, quiesce bool) (id string, err error)
	// removeSnapshot keeps children and returns when the links are merged.
	removeSnapshot(ctx context.Context, id string) error
	// consolidate merges links that a removal left behind.
	consolidate(ctx context.Context, vm string) error
}

type machineControl interface {
	register(ctx context.Context, vmxPath, name string) (id string, err error)
	unregister(ctx context.Context, vm string) error
	powerOn(ctx context.Context, vm string) error
}

type fileControl interface {
	makeDirectory(ctx context.Context, dsPath string) error
	remove(ctx context.Context, dsPath string) error
}

// ReadFile reads a small datastore file whole; one larger than limit bytes is
// an error, and a missing one is ErrNotFound.
func (h *Host) ReadFile(ctx context.Context, dsPath string, limit int64) ([]byte, error) {
	return h.files.readFile(ctx, dsPath, limit)
}

// Upload writes a datastore file of exactly size bytes from r, as one stream,
// and checks afterwards that the host stored that many. An existing file is
// replaced. It is not repeated when it breaks, because r cannot be read twice:
// the caller deletes what is there and starts again. r is not read any more
// when Upload has returned.
func (h *Host) Upload(ctx context.Context, dsPath string, r io.Reader, size int64) error {
	if err := h.session.alive(ctx); err != nil {
		return h.explain(ctx, "upload "+dsPath, err)
	}
	err := h.files.upload(ctx, dsPath, r, size)
	if err == nil || ctx.Err() != nil || errors.Is(err, errSource) {
		return err
	}
	// A full datastore answers with whatever the host's file server makes of
	// it. What is missing is more than what is free: that is the reason.
	missing := size
	if stored, e := h.files.head(ctx, dsPath); e == nil {
		missing -= stored
	}
	if ds, e := h.datastoreOf(ctx, dsPath); e == nil && ds.Free < missing {
		return errf(ErrNoSpace, err, "%s: upload %s: datastore %s is full: %d MiB are free and %d MiB more are needed",
			h.name, dsPath, ds.Name, ds.Free>>20, (missing+1<<20-1)>>20)
	}
	return err
}

// Exists tells whether a datastore file or folder exists.
func (h *Host) Exists(ctx context.Context, dsPath string) (bool, error) {
	_, err := h.files.head(ctx, dsPath)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// MakeDirectory makes one folder; its parent must exist. ErrExists when it is
// there already.
func (h *Host) MakeDirectory(ctx context.Context, dsPath string) error {
	return h.explain(ctx, "make folder "+dsPath, h.control.makeDirectory(ctx, dsPath))
}

// Delete removes a file, or a folder with all in it; one that is gone is no
// error.
func (h *Host) Delete(ctx context.Context, dsPath string) error {
	err := h.explain(ctx, "delete "+dsPath, h.control.remove(ctx, dsPath))
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}
