package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

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
	// Provisioning is how the disks take their room on the datastore; "" is as
	// each one was, thin or thick (a thick disk's descriptor does not tell whether
	// it was zeroed at once, so it becomes esxi.ThickLazy). Without SSH disks become
	// thick, and esxi.Thin is refused.
	Provisioning esxi.Provisioning
	// State is the directory of the journal, as Options.State; "" goes without,
	// and then a process that is killed leaves behind what it made.
	State string
	// VerifyBlocks is how many ranges of 256 KiB a disk are read back and
	// compared where the host cannot hash what it holds; 0 is 32. Negative verifies
	// nothing, by hashes neither.
	VerifyBlocks int
	Progress     func(Event)
	Logger       *slog.Logger
	Clock        func() time.Time
}

// Ways of writing disks to a host.
const (
	// WaySSH makes each disk with vmkfstools and writes what is not zeros, in
	// parallel. The host's hashes of what it holds are compared before it knows
	// of the VM.
	WaySSH = "ssh"
	// WayUpload sends disks whole over HTTPS, zeros included; they become thick. A
	// sample is read back under a snapshot once the VM is registered.
	WayUpload = "upload"
)

// RestoreResult is what a restore came to. Sizes are in bytes.
type RestoreResult struct {
	Generation    string   `json:"generation"` // host/vm@time
	Host          string   `json:"host"`
	VM            string   `json:"vm"`
	Datastore     string   `json:"datastore"`
	Folder        string   `json:"folder"`     // "[datastore1] web01"
	Identity      string   `json:"identity"`   // keep or new
	Way           string   `json:"way"`        // WaySSH or WayUpload
	WayReason     string   `json:"way_reason"` // why not a better one; "" for the best
	BytesCapacity int64    `json:"bytes_capacity"`
	BytesData     int64    `json:"bytes_data"`     // of the capacity, not zeros
	BytesSent     int64    `json:"bytes_sent"`     // of disks to the host, repeated ones included
	BytesVerified int64    `json:"bytes_verified"` // hashed by the host, or read back, and compared
	PoweredOn     bool     `json:"powered_on"`
	Seconds       float64  `json:"seconds"`
	SecondsSent   float64  `json:"seconds_sent"` // of Seconds, what the disks took to be sent
	Warnings      []string `json:"warnings,omitempty"`
}

// How a restore sends.
const (
	targetsAtOnce = 2 // a host takes four requests and others may be at work
	sendAttempts  = 3
	defaultVerify = 32
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
	kinds    []esxi.Provisioning // what each disk becomes
	config   *vmx.File
	nvram    []byte
	base     string // of the .vmx's and .nvram's names
	entry    *restoreEntry
	vm       *esxi.VM
	targets  []*written // of WaySSH, as the disks
	hashed   bool       // the host's hashes of all disks were compared
	bufs     *pool
	res      RestoreResult
}

// Restore makes a VM out of a generation: a folder of its own on the datastore,
// the disks, the firmware settings, the configuration last; then it registers the
// VM, and starts it if asked to. How the disks are written depends on whether the
// host has SSH (WaySSH, WayUpload), and so do when and how they are verified; the
// VM that comes of it is the same.
//
// Everything that can be known before is checked before, and told in one error
// (ErrRefused, and ErrNoRoom when room is among it). When anything fails later,
// or ctx ends, what was made is removed again; when that fails as well, the error
// names what is left. What a killed process left, the next restore or backup with
// the same State on the same host removes. A VM that is registered and verified
// but does not start stays.
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
	r.cleanup(ctx)
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

// cleanup removes what restores left that were cut off: it takes room, and
// perhaps the name. That it fails is no reason not to restore.
func (r *restoring) cleanup(ctx context.Context) {
	if r.State == "" {
		return
	}
	cleaned, err := CleanupRestores(ctx, r.Host, r.HostName, r.State, r.log)
	for _, c := range cleaned {
		r.warn("an earlier restore of %s was cut off; the folder %q that it had made was removed", c.VM, c.Folder)
	}
	if err != nil && ctx.Err() == nil {
		r.warn("%s", oneLine(err))
	}
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
	if err := r.mark(ctx); err != nil {
		return err
	}
	began := r.now()
	write := r.uploadDisks
	if r.res.Way == WaySSH {
		write = r.writeDisks
	}
	if err := write(ctx); err != nil {
		return err
	}
	r.res.SecondsSent = r.now().Sub(began).Seconds()
	if r.res.Way == WaySSH {
		if err := r.finishDisks(ctx); err != nil {
			return err
		}
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
	r.log.Debug("registered", "vm", r.Name, "id", r.vm.ID)
	if !r.hashed {
		if err := r.verify(ctx); err != nil {
			return err
		}
	}
	return r.commit(ctx)
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
		if there, err := r.Host.Exists(ctx, folder); err != nil {
			return err
		} else if there {
			continue
		}
		e := &restoreEntry{
			Run: newRunID(), Host: r.HostName, VM: r.Name, Generation: r.res.Generation, Folder: folder, Config: r.base + ".vmx",
			Created: r.now().UTC(), PID: os.Getpid(),
		}
		for _, m := range r.manifest.Disks {
			e.Files = append(e.Files, m.Name+".vmdk", m.Name+"-flat.vmdk")
		}
		if err := e.write(r.State); err != nil {
			return err
		}
		r.log.Debug("journalled", "folder", folder, "run", e.Run)
		err := r.Host.MakeDirectory(ctx, folder)
		if errors.Is(err, esxi.ErrExists) { // since a moment
			if err := e.done(); err != nil {
				return err
			}
			continue
		}
		r.entry, r.res.Folder = e, folder
		if err != nil {
			return r.undo(ctx, err) // it may be there all the same
		}
		r.log.Info("made the folder", "folder", folder)
		return nil
	}
	return fmt.Errorf("datastore %s has a hundred folders called %s already; remove some, or choose another name: %w", r.Datastore, r.Name, ErrRefused)
}

// mark makes the mark of a restore that is not finished.
func (r *restoring) mark(ctx context.Context) error {
	err := r.again(ctx, "mark", func() error {
		err := r.Host.MakeDirectory(ctx, r.entry.mark())
		if errors.Is(err, esxi.ErrExists) {
			return nil // nobody else makes one of this name
		}
		return err
	})
	r.log.Debug("marked", "folder", r.res.Folder, "error", err)
	return err
}

// commit ends the restore: from here on it is not undone.
func (r *restoring) commit(ctx context.Context) error {
	if err := r.again(ctx, "mark", func() error { return r.Host.DeleteEmpty(ctx, r.entry.mark()) }); err != nil {
		return err
	}
	r.log.Debug("finished", "folder", r.res.Folder)
	if err := r.entry.done(); err != nil {
		r.log.Warn("the journal entry of a finished restore is left, which harms nothing", "entry", r.entry.path, "error", err)
	}
	return nil
}

// undo removes what was made, and says what became of it.
func (r *restoring) undo(ctx context.Context, cause error) error {
	undo, cancel := undoContext(ctx, 10*time.Minute)
	defer cancel()
	_, err := r.entry.remove(undo, r.Host)
	if err == nil {
		err = r.entry.done()
	}
	if err != nil {
		later := "remove the VM " + r.Name + " and the folder by hand"
		if r.entry.file != nil && !errors.Is(err, errTaken) {
			later = "the next restore or backup on this host tries again"
		}
		r.entry.leave()
		return fmt.Errorf("restore of %s as %s failed: %w; and what it made, the folder %q, could not be removed (%s): %w",
			r.res.Generation, r.Name, cause, r.res.Folder, later, err)
	}
	return fmt.Errorf("restore of %s as %s failed, and what it had made was removed again: %w", r.res.Generation, r.Name, cause)
}

// again does something small that does no harm when done twice.
func (r *restoring) again(ctx context.Context, what string, do func() error) error {
	for attempt := 1; ; attempt++ {
		err := do()
		if err == nil || ctx.Err() != nil || attempt == sendAttempts || !worthAnother(err) {
			return err
		}
		r.log.Warn("a step of the restore broke, doing it again", "what", what, "error", err)
	}
}

// worthAnother tells what may go better the next time: everything that no known
// reason speaks against. The host's client renews an expired session before it
// tries again, and never repeats a refused login.
func worthAnother(err error) bool {
	for _, final := range []error{
		esxi.ErrNoSpace, esxi.ErrRestricted, esxi.ErrDenied, esxi.ErrThumbprint, esxi.ErrHostKey, esxi.ErrLogin, repo.ErrDamaged, repo.ErrClosed,
	} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}

// uploadSmall sends a file of the VM other than a disk's content.
func (r *restoring) uploadSmall(ctx context.Context, name string, data []byte) error {
	err := r.again(ctx, name, func() error { return r.Host.Upload(ctx, r.path(name), bytes.NewReader(data), int64(len(data))) })
	r.log.Debug("sent a small file", "file", name, "error", err)
	return err
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
