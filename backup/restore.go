package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"hikae/backup/esxi"
	"hikae/backup/vmx"
	"hikae/repo"
)

// Identities of a restored VM.
const (
	IdentityKeep = "keep" // the VM is who it was: the original is gone
	IdentityNew  = "new"  // another VM, beside the original
)

// RestoreOptions of Restore. Generation, Host and Datastore are required.
type RestoreOptions struct {
	Generation *repo.Generation
	Host       *esxi.Host
	HostName   string // the operator's name for the host; for messages and the journal
	Datastore  string
	// Name of the restored VM and its folder; "" is the name it had. A VM of
	// another name than it had, or beside the original, gets a new identity.
	Name    string
	PowerOn bool
	// State is the directory of the journal, as Options.State; "" goes without,
	// and then a process killed while it verifies leaves its snapshot behind.
	State string
	// VerifyBlocks is how many ranges of 256 KiB a disk are read back and
	// compared; 0 is 32, negative is none.
	VerifyBlocks int
	Progress     func(Event)
	Logger       *slog.Logger
	Clock        func() time.Time
}

// RestoreResult is what a restore came to. Sizes are in bytes.
type RestoreResult struct {
	Generation    string   `json:"generation"` // host/vm@time
	Host          string   `json:"host"`
	VM            string   `json:"vm"`
	Datastore     string   `json:"datastore"`
	Folder        string   `json:"folder"`   // "[datastore1] web01"
	Identity      string   `json:"identity"` // keep or new
	BytesCapacity int64    `json:"bytes_capacity"`
	BytesData     int64    `json:"bytes_data"`     // of the capacity, not zeros
	BytesSent     int64    `json:"bytes_sent"`     // to the host, repeated ones included
	BytesVerified int64    `json:"bytes_verified"` // read back and compared
	PoweredOn     bool     `json:"powered_on"`
	Seconds       float64  `json:"seconds"`
	Warnings      []string `json:"warnings,omitempty"`
}

// How a restore sends.
const (
	uploadsAtOnce  = 2 // disks; a host takes four requests and others may be at work
	uploadAttempts = 3
	defaultVerify  = 32
	// verifyBlock is a multiple of every block size a repository may have.
	verifyBlock = 256 << 10
)

// restoring is one run of Restore.
type restoring struct {
	RestoreOptions
	log      *slog.Logger
	meter    *meter
	now      func() time.Time
	manifest *repo.Manifest
	disks    []*repo.Disk
	config   *vmx.File
	nvram    []byte
	base     string // of the .vmx's and .nvram's names
	vm       *esxi.VM
	bufs     *pool
	res      RestoreResult
}

// Restore makes a VM out of a generation: a folder of its own on the datastore,
// each disk as a flat file with its descriptor, the firmware settings, the
// configuration last; then it registers the VM, reads a sample of every disk
// back, and starts it if asked to. Disks become thick: a datastore's file server
// takes whole files only, so their zeros cross the wire as well.
//
// Everything that can be known before is checked before, and told in one error
// (ErrRefused, and ErrNoRoom when room is among it). When anything fails later,
// or ctx ends, what was made is removed again; when that fails as well, the error
// names what is left. A VM that is registered and verified but does not start
// stays.
func Restore(ctx context.Context, o RestoreOptions) (RestoreResult, error) {
	if o.Generation == nil || o.Host == nil || o.Datastore == "" {
		return RestoreResult{}, errors.New("a restore needs a generation, a host and a datastore")
	}
	r := &restoring{
		RestoreOptions: o, log: orDiscard(o.Logger), meter: newMeter(o.Progress), now: orNow(o.Clock),
		manifest: o.Generation.Manifest(), bufs: newPool(poolPieces),
	}
	if r.Name == "" {
		r.Name = r.manifest.VM.Name
	}
	if r.VerifyBlocks == 0 {
		r.VerifyBlocks = defaultVerify
	}
	began := r.now()
	r.res = RestoreResult{Generation: o.Generation.Ref().String(), Host: o.HostName, VM: r.Name, Datastore: o.Datastore}
	err := r.run(ctx)
	r.res.Seconds = r.now().Sub(began).Seconds()
	return r.res, err
}

func (r *restoring) run(ctx context.Context) error {
	r.meter.begin(PhaseCheck, 0, "")
	if err := r.preflight(ctx); err != nil {
		return err
	}
	if err := r.build(ctx); err != nil {
		return err
	}
	if !r.PowerOn {
		return nil
	}
	r.meter.begin(PhasePowerOn, 0, "")
	if err := r.Host.PowerOn(ctx, r.vm); err != nil {
		return fmt.Errorf("%s is restored, verified and registered, but did not start: %w", r.Name, err)
	}
	r.res.PoweredOn = true
	return nil
}

// build makes the VM, or nothing.
func (r *restoring) build(ctx context.Context) (err error) {
	if err := r.makeFolder(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = r.undo(ctx, err)
		}
	}()
	if err := r.uploadDisks(ctx); err != nil {
		return err
	}
	if len(r.nvram) > 0 {
		if err := r.uploadSmall(ctx, r.base+".nvram", r.nvram); err != nil {
			return err
		}
	}
	// The configuration comes last: until it is there nothing here is a VM.
	if err := r.uploadSmall(ctx, r.base+".vmx", r.config.Bytes()); err != nil {
		return err
	}
	r.meter.begin(PhaseRegister, 0, "")
	if r.vm, err = r.Host.RegisterVM(ctx, r.path(r.base+".vmx"), r.Name); err != nil {
		return err
	}
	return r.verify(ctx)
}

// path is a file in the VM's folder.
func (r *restoring) path(name string) string { return r.res.Folder + "/" + name }

// makeFolder makes a folder that was not there before: everything in it is ours.
func (r *restoring) makeFolder(ctx context.Context) error {
	for i := range 100 {
		folder := fmt.Sprintf("[%s] %s", r.Datastore, cleanName(r.Name, "vm"))
		if i > 0 {
			folder += fmt.Sprintf("-%d", i)
		}
		err := r.Host.MakeDirectory(ctx, folder)
		if errors.Is(err, esxi.ErrExists) {
			continue
		}
		if err != nil {
			return err
		}
		r.res.Folder = folder
		r.log.Info("made the folder", "folder", folder)
		return nil
	}
	return fmt.Errorf("datastore %s has a hundred folders called %s already; remove some, or choose another name: %w", r.Datastore, r.Name, ErrRefused)
}

// undo removes what was made, and says what became of it.
func (r *restoring) undo(ctx context.Context, cause error) error {
	undo, cancel := undoContext(ctx, 10*time.Minute)
	defer cancel()
	var err error
	if r.vm == nil {
		// The call to register may have failed after the host had done it.
		r.vm, err = r.registered(undo)
	}
	if r.vm != nil {
		err = errors.Join(err, r.Host.UnregisterVM(undo, r.vm))
	}
	if err == nil {
		err = r.Host.Delete(undo, r.res.Folder)
	}
	if err != nil {
		return fmt.Errorf("restore of %s as %s failed: %w; and what it made could not be removed, so remove the VM %s and the folder %q by hand: %w",
			r.res.Generation, r.Name, cause, r.Name, r.res.Folder, err)
	}
	return fmt.Errorf("restore of %s as %s failed, and what it had made was removed again: %w", r.res.Generation, r.Name, cause)
}

// registered finds the VM whose configuration lies in our folder.
func (r *restoring) registered(ctx context.Context) (*esxi.VM, error) {
	vms, err := r.Host.VMs(ctx)
	if err != nil {
		return nil, err
	}
	for i := range vms {
		if vms[i].ConfigPath == r.path(r.base+".vmx") {
			return &vms[i], nil
		}
	}
	return nil, nil
}

// uploadDisks sends all disks, a few at once.
func (r *restoring) uploadDisks(ctx context.Context) error {
	r.meter.begin(PhaseUpload, r.res.BytesCapacity, "")
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(uploadsAtOnce)
	for i, d := range r.disks {
		g.Go(func() error {
			m := r.manifest.Disks[i]
			if err := r.uploadDisk(ctx, m.Name+"-flat.vmdk", m.Label, d); err != nil {
				return fmt.Errorf("%s (%s): %w", m.Label, m.Name, err)
			}
			return r.uploadSmall(ctx, m.Name+".vmdk", []byte(m.Descriptor))
		})
	}
	return g.Wait()
}

// uploadDisk sends one disk. A transfer that breaks starts again: the host takes
// whole files only.
func (r *restoring) uploadDisk(ctx context.Context, name, label string, d *repo.Disk) error {
	for attempt := 1; ; attempt++ {
		c := newContent(ctx, d, r.bufs, func(n int64) { r.meter.add(label, n) })
		err := r.Host.Upload(ctx, r.path(name), c, d.Size())
		sent := c.Close()
		r.meter.mu.Lock()
		r.res.BytesSent += sent
		r.meter.mu.Unlock()
		if err == nil || ctx.Err() != nil || attempt == uploadAttempts || !worthAnother(err) {
			return err
		}
		r.log.Warn("an upload broke, starting it again", "file", name, "after", sent, "error", err)
		r.meter.grow(sent)
		if err := r.Host.Delete(ctx, r.path(name)); err != nil {
			return err
		}
	}
}

func (r *restoring) uploadSmall(ctx context.Context, name string, data []byte) error {
	for attempt := 1; ; attempt++ {
		err := r.Host.Upload(ctx, r.path(name), bytes.NewReader(data), int64(len(data)))
		if err == nil || ctx.Err() != nil || attempt == uploadAttempts || !worthAnother(err) {
			return err
		}
		r.log.Warn("an upload broke, starting it again", "file", name, "error", err)
	}
}

// worthAnother tells what may go better the next time: everything that no known
// reason speaks against. The host's client renews an expired session before it
// tries again, and never repeats a refused login.
func worthAnother(err error) bool {
	for _, final := range []error{esxi.ErrNoSpace, esxi.ErrRestricted, esxi.ErrDenied, esxi.ErrThumbprint, repo.ErrDamaged, repo.ErrClosed} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}

// configure makes the configuration of the restored VM.
func (r *restoring) configure(config *vmx.File, original bool) {
	config.Portable()
	config.Set("displayName", r.Name)
	config.Set("nvram", r.base+".nvram")
	have := map[string]bool{}
	for _, d := range r.manifest.Disks {
		have[d.Name+".vmdk"] = true
	}
	for _, d := range config.Disks() {
		if !have[d.File] {
			r.warn("the configuration attaches %s at %s, which is not in the generation; the restored VM goes without", d.File, d.Slot)
			config.RemoveDevice(d.Slot)
		}
	}
	for key := range config.All() {
		if k := strings.ToLower(key); k == "vtpm.present" || strings.HasPrefix(k, "encryption.") {
			r.warn("the VM was encrypted or has a virtual TPM (%s): it starts only where its keys are", key)
			break
		}
	}
	if original || r.Name != r.manifest.VM.Name {
		r.res.Identity = IdentityNew
		for _, nic := range config.NewIdentity() {
			r.warn("%s has a hardware address set by hand and starts disconnected, so that it does not collide with the original's", nic)
		}
	} else {
		r.res.Identity = IdentityKeep
		config.KeepIdentity()
	}
	r.config = config
}

func (r *restoring) warn(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.res.Warnings = append(r.res.Warnings, text)
	r.log.Warn(text)
}
