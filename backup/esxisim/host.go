// Package esxisim is a simulated ESXi host: what hikae's tests, its demo and a
// curious user run against when no real host is at hand.
//
// It speaks what a standalone host speaks on port 443: the vSphere API at /sdk
// and the datastore at /folder, and on port 22: a shell over SSH with ESXi's
// busybox tools, vim-cmd, vmkfstools and esxcli, true to outputs that operators
// published, in the editions 6.5, 6.7, 7.0 and 8.0. The VMs are real files in a directory that
// plays the VMFS volume "datastore1": .vmx, descriptors, flat files, snapshot
// links in the formats ESXi writes, change tracking files. qemu-img reads the
// same disks the guest sees. Sessions, property collectors and views are those
// of govmomi's simulator; everything a VM is and does is this package's own
// (see internal/hv), because the simulator keeps no files for it.
//
// Where it can be, it is stricter than a real host, so that mistakes show here
// and not there:
//
//   - The link a running VM writes to cannot be read; a frozen one never changes.
//   - Making a directory that exists, with parents too, is an error.
//   - Every call is made in a session, sessions end when idle, and reading
//     /folder does not keep one alive. Five wrong passwords lock the account.
//   - More transfers at once than allowed are answered 503, at once.
//   - The datastore has a capacity, and thick disks take theirs when made.
//   - Changed areas come in pages.
//   - With the free licence every call that is not known to read is refused. The
//     shell is not concerned: vim-cmd speaks to the host from within.
//   - SSH takes keyboard-interactive only unless options open more, AES only, no
//     SFTP, no scp, and few sessions a connection.
//   - What no published output settles differs between the editions: whether
//     vim-cmd's faults show in its exit status, whether lists end in a comma,
//     whether a snapshot is done when its command returns.
//
// It is a stand-in, not an emulator: no clusters, no virtual networks, no guest
// but the one that the caller plays by WriteAt and ReadAt. Nothing here may be
// used to serve anyone's real data.
package esxisim

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/vmdk"
)

const datastoreName = "datastore1"

// PrivateDir is the directory inside the datastore's where the host keeps what
// is its own: certificate, inventory. No way in shows it.
const PrivateDir = hv.PrivateDir

// Host is a running simulated host. Its methods are safe for concurrent use.
type Host struct {
	o        Options
	edition  edition
	log      *slog.Logger
	hv       *hv.Host
	model    *simulator.Model
	ds       *simulator.Datastore
	network  types.ManagedObjectReference
	listener net.Listener
	server   *http.Server
	pin      string
	transfer chan struct{} // one token for each /folder transfer in flight

	sessions  sessions
	waits     waits
	faults    rules
	ssh       *sshd    // nil without SSH
	console   *console // nil without SSH
	folderWay way
	soapWay   way

	// world: changes of the simulator's objects hold it alone, the simulator's
	// own methods share it, because not all of them lock the objects they read.
	world sync.RWMutex

	tasks    atomic.Int64
	mu       sync.Mutex
	taskRefs []types.ManagedObjectReference
	projects map[int]*sync.Mutex // one at a time a VM

	ctx     context.Context // ends when the host closes
	cancel  context.CancelFunc
	running sync.WaitGroup
	closed  sync.Once
	closing error

	doors struct { // counts the requests being served: net/http does not wait for them
		sync.Mutex
		shut   bool
		inside sync.WaitGroup
	}
}

// enter lets a request in unless the host closes.
func (h *Host) enter() bool {
	h.doors.Lock()
	defer h.doors.Unlock()
	if !h.doors.shut {
		h.doors.inside.Add(1)
	}
	return !h.doors.shut
}

func (h *Host) leave() { h.doors.inside.Done() }

// making guards the making of simulator models: their templates are package
// variables of govmomi's that it appends to.
var making sync.Mutex

// Start makes a host over a directory and serves it. It stops with Close, or
// when ctx ends while it is starting.
func Start(ctx context.Context, o Options) (*Host, error) {
	if o.Dir == "" {
		return nil, errors.New("a simulated host needs a directory for its datastore")
	}
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	if o.User == "" {
		o.User = "root"
	}
	if o.Password == "" {
		o.Password = rand.Text()
	}
	switch o.VMFS {
	case 0:
		o.VMFS = 6
	case 5, 6:
	default:
		return nil, fmt.Errorf("there is no VMFS %d here: 5 or 6", o.VMFS)
	}
	if o.MaxInFlight <= 0 {
		o.MaxInFlight = 8
	}
	if o.SessionTimeout <= 0 {
		o.SessionTimeout = 30 * time.Minute
	}
	if o.DatastoreBytes <= 0 {
		o.DatastoreBytes = 1 << 40
	}
	if o.Clock == nil {
		o.Clock = time.Now //nolint:forbidigo // the one place where the real clock comes in
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	e, err := findEdition(o.Edition)
	if err != nil {
		return nil, err
	}
	h := &Host{o: o, edition: e, log: o.Logger, transfer: make(chan struct{}, o.MaxInFlight), projects: map[int]*sync.Mutex{}}
	h.ctx, h.cancel = context.WithCancel(context.WithoutCancel(ctx))
	h.waits.stops = map[string][]chan struct{}{}
	h.sessions = sessions{clock: o.Clock, timeout: o.SessionTimeout, ended: h.endSession, seen: map[string]time.Time{}}
	if err := h.start(ctx); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func (h *Host) start(ctx context.Context) (err error) {
	h.hv, err = hv.Open(ctx, hv.Options{
		Dir: h.o.Dir, Datastore: datastoreName, Capacity: h.o.DatastoreBytes, VMFS: h.o.VMFS, Hardware: h.edition.hardware, CancelLast: h.edition.name >= "7.0",
		Clock: h.o.Clock, Logger: h.log, Changed: h.project,
	})
	if err != nil {
		return err
	}
	if err := h.makeModel(); err != nil {
		return err
	}
	cert, err := h.certificate()
	if err != nil {
		return err
	}
	h.pin = soap.ThumbprintSHA256(cert.Leaf)
	if h.listener, err = net.Listen("tcp", h.o.Listen); err != nil {
		return err
	}
	h.model.Service.Listen = &url.URL{
		Scheme: "https", Host: h.Address(), Path: "/sdk", User: url.UserPassword(h.o.User, h.o.Password),
	}
	for _, vm := range h.hv.VMs() {
		h.project(vm.ID())
	}
	if h.o.SSH != nil {
		if err := h.startSSH(); err != nil {
			return err
		}
	}
	h.server = &http.Server{
		Handler:           http.HandlerFunc(h.serve),
		ReadHeaderTimeout: 30 * time.Second,
		ErrorLog:          log.New(logWriter{h.log}, "", 0),
		BaseContext:       func(net.Listener) context.Context { return h.ctx },
	}
	tl := tls.NewListener(h.listener, &tls.Config{
		Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
	})
	h.running.Go(func() {
		if err := h.server.Serve(tl); !errors.Is(err, http.ErrServerClosed) {
			h.log.Error("serving ended", "err", err)
		}
	})
	return nil
}

// logWriter takes what net/http has to say: broken handshakes, mostly.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Debug("http", "message", string(p))
	return len(p), nil
}

// Close stops serving, waits for what runs, and lets go of the directory. VMs
// that run are started again by the next host over it.
func (h *Host) Close() error {
	h.closed.Do(func() {
		h.cancel()
		var errs []error
		if h.server != nil {
			errs = append(errs, h.server.Close())
		} else if h.listener != nil {
			errs = append(errs, h.listener.Close())
		}
		h.doors.Lock()
		h.doors.shut = true
		h.doors.Unlock()
		h.doors.inside.Wait()
		if h.ssh != nil {
			errs = append(errs, h.ssh.close())
		}
		h.running.Wait()
		if h.console != nil {
			errs = append(errs, h.console.close())
		}
		if h.hv != nil {
			errs = append(errs, h.hv.Close())
		}
		h.closing = errors.Join(errs...)
	})
	return h.closing
}

// Edition is the release of ESXi that the host plays: "8.0".
func (h *Host) Edition() string { return h.edition.name }

// Address is where the host serves, "127.0.0.1:port".
func (h *Host) Address() string { return h.listener.Addr().String() }

// Thumbprint is the certificate's SHA-256 in upper-case hexadecimal with
// colons. It is the same for every host started over the same directory.
func (h *Host) Thumbprint() string { return h.pin }

// User is the account's name.
func (h *Host) User() string { return h.o.User }

// Password is the account's password, the random one when none was given.
func (h *Host) Password() string { return h.o.Password }

// ImportVM makes a VM whose disks hold the raw images' content, in the order of
// its controllers. Holes stay holes.
func (h *Host) ImportVM(ctx context.Context, name string, raws []string, o VMOptions) error {
	vm, err := h.hv.Import(ctx, name, raws, hv.ImportOptions{ChangeTracking: o.ChangeTracking, Thin: o.Thin, Hardware: o.Hardware})
	if err != nil {
		return err
	}
	if o.PowerOn {
		return vm.Start(h.ctx)
	}
	return nil
}

// VMs are the names of the registered VMs.
func (h *Host) VMs() []string {
	var names []string
	for _, vm := range h.hv.VMs() {
		names = append(names, vm.Name())
	}
	return names
}

// PowerOn starts a VM. When it has a question the call waits for the answer.
func (h *Host) PowerOn(vm string) error {
	return h.with(vm, func(vm *hv.VM) error { return vm.Start(h.ctx) })
}

// PowerOff stops a VM at once.
func (h *Host) PowerOff(vm string) error { return h.with(vm, (*hv.VM).PowerOff) }

func (h *Host) with(name string, f func(*hv.VM) error) error {
	vm, err := h.hv.Find(name)
	if err != nil {
		return err
	}
	return f(vm)
}

// DiskSize is the capacity of a disk in bytes. Disks count from 0 in the order
// of their controllers.
func (h *Host) DiskSize(vm string, disk int) (size int64, err error) {
	err = h.with(vm, func(vm *hv.VM) error { size, err = vm.DiskSize(disk); return err })
	return size, err
}

// WriteAt writes as the guest would. The VM must run.
func (h *Host) WriteAt(vm string, disk int, p []byte, off int64) error {
	return h.with(vm, func(vm *hv.VM) error { return vm.WriteAt(disk, p, off) })
}

// ReadAt reads what the guest sees, or would see if it ran. It fills p.
func (h *Host) ReadAt(vm string, disk int, p []byte, off int64) error {
	return h.with(vm, func(vm *hv.VM) error { return vm.ReadAt(disk, p, off) })
}

// NextData finds the first area of a disk at or after off that may hold data.
// The error is io.EOF when only holes follow.
func (h *Host) NextData(ctx context.Context, vm string, disk int, off int64) (start, end int64, err error) {
	err = h.with(vm, func(vm *hv.VM) error { start, end, err = vm.NextData(ctx, disk, off); return err })
	return start, end, err
}

// Become makes the guest write what turns its disk into a raw image, and
// nothing that is equal already (in steps of 64 KiB). What the disk has beyond
// the image's end stays. It returns the bytes written.
func (h *Host) Become(ctx context.Context, vm string, disk int, raw string) (written int64, err error) {
	image, err := vmdk.OpenImage(raw)
	if err != nil {
		return 0, fmt.Errorf("image %s: %w", filepath.Base(raw), err)
	}
	err = h.with(vm, func(vm *hv.VM) error { written, err = vm.Become(ctx, disk, image); return err })
	return written, errors.Join(err, image.Close())
}
