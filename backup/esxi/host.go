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
	session          *session   // nil: no SOAP
	files            *files     // nil: no /folder
	shell            *shellConn // nil: no SSH configured
	inv              inventory
	soap             control     // nil where there is no such way
	ssh              *sshControl // nil where there is no such way
	now              func() time.Time
	about            About
	place            place

	mu     sync.Mutex
	owners map[string]owner  // of snapshots seen, by id
	paths  map[string]string // of VMs seen: id to .vmx
	found  finding
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
//
// It also finds out how the host can be changed: through its API, or, where its
// licence forbids that or port 443 is closed, by commands over SSH when Config.SSH
// says how. Ways tells what it found.
func Connect(ctx context.Context, c Config) (*Host, error) {
	return connect(ctx, c, defaults())
}

func connect(ctx context.Context, c Config, t tuning) (*Host, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Clock == nil {
		c.Clock = time.Now //nolint:forbidigo // the one place where the real clock comes in
	}
	h := &Host{user: c.User, log: c.Logger, t: t, now: c.Clock, owners: map[string]owner{}, paths: map[string]string{}}
	var err error
	if c.Address == "" && c.SSH != nil && c.SSH.Address != "" {
		h.addr, err = withPort(c.SSH.Address, sshPort)
	} else {
		h.addr, err = hostPort(c.Address)
	}
	if err != nil {
		return nil, err
	}
	if h.name = c.Name; h.name == "" {
		h.name = h.addr
	}
	if c.SSH != nil {
		if h.shell, err = newShell(h, c); err != nil {
			return nil, err
		}
		h.ssh = &sshControl{h: h, sh: h.shell}
	}
	if err := h.open(ctx, c); err != nil {
		return nil, errors.Join(err, h.abandon())
	}
	return h, nil
}

// open connects by every way that is needed.
func (h *Host) open(ctx context.Context, c Config) error {
	if c.Address == "" {
		return h.openShell(ctx, nil)
	}
	err := h.openSOAP(ctx, c)
	switch {
	case err == nil:
		h.choose(ctx)
		return nil
	case h.shell != nil && errors.Is(err, ErrUnreachable) && ctx.Err() == nil:
		h.log.Info("port 443 does not answer, going on over SSH alone", "host", h.name, "error", err)
		h.session.transport.CloseIdleConnections()
		h.session, h.files = nil, nil
		return h.openShell(ctx, err)
	}
	return err
}

// abandon lets go of what a Connect that failed had opened.
func (h *Host) abandon() error {
	if h.session != nil {
		h.session.transport.CloseIdleConnections()
	}
	if h.shell != nil {
		h.shell.client.Close()
	}
	return nil
}

// openSOAP connects to port 443.
func (h *Host) openSOAP(ctx context.Context, c Config) error {
	if c.Thumbprint == "" {
		return errf(ErrThumbprint, nil, "%s (%s) has no thumbprint configured: look at its certificate with hikae host add, compare it with the "+
			"host's console, and pin it", h.name, h.addr)
	}
	pin, err := parseThumbprint(c.Thumbprint)
	if err != nil {
		return errf(ErrThumbprint, err, "%s (%s): %v", h.name, h.addr, err)
	}
	if c.User == "" || c.Password == nil {
		return errf(ErrLogin, nil, "%s (%s) needs a user and a password file", h.name, h.addr)
	}
	c.Name = h.name
	if h.session, err = newSession(c, h.addr, pin, h.t); err != nil {
		return err
	}
	h.files = &files{session: h.session, gate: newThrottle(h.t, c.Clock), name: h.name, addr: h.addr, t: h.t, log: c.Logger}
	h.soap, h.inv = &soapControl{h}, &soapInventory{h}
	return h.start(ctx)
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
	if h.shell != nil {
		h.shell.client.Close()
	}
	if h.session == nil {
		return nil
	}
	return h.explain(context.WithoutCancel(ctx), "log out", h.session.close(ctx))
}

// About is what the host said of itself at Connect.
func (h *Host) About() About { return h.about }

// control is how a host is changed. SOAP is one way; commands over SSH are the
// other, for a host whose licence forbids the first. What only reads is not part
// of it (inventory): every edition allows that.
//
// Ids are those of the inventory. Errors come as the plane gave
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
	removeSnapshot(ctx context.Context, id string, whose owner) error
	// consolidate merges links that a removal left behind.
	consolidate(ctx context.Context, vm string) error
}

type machineControl interface {
	register(ctx context.Context, vmxPath, name string) (id string, err error)
	unregister(ctx context.Context, vm string) error
	powerOn(ctx context.Context, vm string) error
	powerOff(ctx context.Context, vm string) error
	// reload has the host read a VM's .vmx again.
	reload(ctx context.Context, vm string) error
	// setTracking switches change tracking for all disks.
	setTracking(ctx context.Context, vm *VM, on bool) error
}

type fileControl interface {
	makeDirectory(ctx context.Context, dsPath string) error
	remove(ctx context.Context, dsPath string) error
	removeEmpty(ctx context.Context, dsPath string) error
}

// ReadFile reads a small datastore file whole; one larger than limit bytes is
// an error, and a missing one is ErrNotFound.
func (h *Host) ReadFile(ctx context.Context, dsPath string, limit int64) ([]byte, error) {
	return h.store().readFile(ctx, dsPath, limit)
}

// Upload writes a datastore file of exactly size bytes from r, as one stream,
// and checks afterwards that the host stored that many. An existing file is
// replaced. It is not repeated when it breaks, because r cannot be read twice:
// the caller deletes what is there and starts again. r is not read any more
// when Upload has returned.
func (h *Host) Upload(ctx context.Context, dsPath string, r io.Reader, size int64) error {
	store := h.writeStore()
	if store == storage(h.files) && h.files != nil {
		if err := h.session.alive(ctx); err != nil {
			return h.explain(ctx, "upload "+dsPath, err)
		}
	}
	err := store.upload(ctx, dsPath, r, size)
	if err == nil || ctx.Err() != nil || errors.Is(err, errSource) {
		return err
	}
	// A full datastore answers with whatever the host's file server makes of
	// it. What is missing is more than what is free: that is the reason.
	missing := size
	if stored, e := store.head(ctx, dsPath); e == nil {
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
	_, err := h.store().head(ctx, dsPath)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// MakeDirectory makes one folder; its parent must exist. ErrExists when it is
// there already.
func (h *Host) MakeDirectory(ctx context.Context, dsPath string) error {
	return h.explain(ctx, "make folder "+dsPath, h.change(ctx, func(c control) error { return c.makeDirectory(ctx, dsPath) }))
}

// Delete removes a file, or a folder with all in it; one that is gone is no
// error.
func (h *Host) Delete(ctx context.Context, dsPath string) error {
	err := h.explain(ctx, "delete "+dsPath, h.change(ctx, func(c control) error { return c.remove(ctx, dsPath) }))
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}
