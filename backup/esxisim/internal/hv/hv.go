// Package hv is the hypervisor under the simulated host: the VMs of one VMFS
// directory as files, and what can be done to them. It knows no protocol: the
// SOAP side, and any other way in, look at the same VMs through it.
//
// A VM is its .vmx, its .vmsd with one .vmsn a snapshot, and its disks, which
// are true VMDK files (see vdisk). Nothing about a VM is kept anywhere else, so
// that a host started over the directory again finds every VM as it was. Only
// which VMs are registered, under which number, and whether they ran stands in
// a small file of the host's own.
//
// Promises, stricter than a real host where that finds more mistakes:
//
//   - What a running VM writes to cannot be read or replaced from outside, and
//     what a snapshot froze never changes while the snapshot is there.
//   - No write goes beyond the datastore's capacity. Thick disks take theirs
//     from the start.
//   - The guest writes only while the VM runs.
//
// Everything is safe for concurrent use. Guest I/O shares a VM's lock, changes
// of the VM hold it alone: a guest stands still during a snapshot, as it does.
package hv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// PrivateDir holds the host's own files inside the datastore's directory. No
// way in shows it.
const PrivateDir = ".esxisim"

// Options of a hypervisor. Dir, Datastore, Capacity and Clock are required.
type Options struct {
	Dir       string
	Datastore string // the datastore's name
	Capacity  int64  // bytes
	VMFS      int    // 5 or 6
	Hardware  int    // virtual hardware version of new VMs; 0 is 13
	// CancelLast puts a question's way out at the end of its choices.
	CancelLast bool
	Clock      func() time.Time
	Logger     *slog.Logger
	// Changed is told that a VM appeared, changed or went. It is called
	// without any lock held, possibly several times at once.
	Changed func(id int)
}

// Host is the hypervisor of one directory.
type Host struct {
	o     Options
	root  *os.Root
	lock  *os.File
	space space

	mu       sync.Mutex // guards what follows
	vms      map[int]*VM
	next     int                     // number of the next VM
	used     map[int]map[string]bool // files of running VMs, by VM; true: held against readers too
	uploaded map[string]bool         // flat files that came by upload: on VMFS these are fully allocated
}

// inventory is what the host remembers across a restart.
type inventory struct {
	Next     int             `json:"next"`
	VMs      []inventoryItem `json:"vms"`
	Uploaded []string        `json:"uploaded,omitempty"`
}

type inventoryItem struct {
	ID   int    `json:"id"`
	Path string `json:"path"` // of the .vmx, relative to the datastore
	On   bool   `json:"on"`
}

// Open takes a directory over. VMs that were registered are registered again,
// those that ran are started; in a directory no host ever saw, every .vmx is
// registered. Only one Host at a time can have a directory.
func Open(ctx context.Context, o Options) (*Host, error) {
	if o.Changed == nil {
		o.Changed = func(int) {}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, PrivateDir), 0o700); err != nil {
		return nil, fmt.Errorf("datastore directory: %w", err)
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	o.Dir = dir
	h := &Host{o: o, vms: map[int]*VM{}, next: 1, used: map[int]map[string]bool{}, uploaded: map[string]bool{}}
	if h.lock, err = lockFile(filepath.Join(dir, PrivateDir, "lock")); err != nil {
		return nil, err
	}
	if h.root, err = os.OpenRoot(dir); err != nil {
		return nil, errors.Join(err, h.lock.Close())
	}
	h.space.h = h
	if err := h.load(ctx); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is served by another simulated host: %w", filepath.Dir(filepath.Dir(name)), err)
	}
	return f, nil
}

// Private is the full path of one of the host's own files.
func (h *Host) Private(name string) string { return filepath.Join(h.o.Dir, PrivateDir, name) }

func (h *Host) load(ctx context.Context) error {
	var inv inventory
	data, err := os.ReadFile(h.Private("inventory.json"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if inv, err = h.discover(); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(data, &inv); err != nil {
			return fmt.Errorf("%s: %w; remove it to have all VMs found anew", h.Private("inventory.json"), err)
		}
	}
	h.next = max(inv.Next, 1)
	for _, name := range inv.Uploaded {
		h.uploaded[name] = true
	}
	for _, item := range inv.VMs {
		if err := ctx.Err(); err != nil {
			return err
		}
		vm, err := h.load1(item.Path, item.ID)
		if err != nil { // as on a real host one broken VM is no reason to be down
			h.o.Logger.Warn("cannot register a VM again", "vm", item.Path, "err", err)
			continue
		}
		if item.On {
			if err := vm.PowerOn(); err != nil {
				h.o.Logger.Warn("cannot start a VM again", "vm", item.Path, "err", err)
			}
		}
	}
	return h.save()
}

// discover finds the .vmx files of a directory that has no inventory.
func (h *Host) discover() (inventory, error) {
	found, err := filepath.Glob(filepath.Join(escapeGlob(h.o.Dir), "*", "*.vmx"))
	if err != nil {
		return inventory{}, err
	}
	slices.Sort(found)
	inv := inventory{Next: len(found) + 1}
	for i, name := range found {
		inv.VMs = append(inv.VMs, inventoryItem{ID: i + 1, Path: h.rel(name)})
	}
	return inv, nil
}

func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// save writes the inventory. Callers must not hold h.mu or a VM's lock.
func (h *Host) save() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	inv := inventory{Next: h.next}
	for id, vm := range h.vms {
		inv.VMs = append(inv.VMs, inventoryItem{ID: id, Path: vm.path, On: vm.on.Load()})
	}
	slices.SortFunc(inv.VMs, func(a, b inventoryItem) int { return a.ID - b.ID })
	for name := range h.uploaded {
		inv.Uploaded = append(inv.Uploaded, name)
	}
	slices.Sort(inv.Uploaded)
	data, err := json.MarshalIndent(inv, "", "  ")
	if err != nil {
		return err
	}
	return WriteFile(h.Private("inventory.json"), data)
}

// WriteFile replaces a file as a whole, so that a killed host leaves the old
// content or the new.
func WriteFile(name string, data []byte) error {
	tmp := name + "~"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, name); err != nil {
		os.Remove(tmp)
		return err
	}
	return nil
}

// Close lets go of the directory. VMs that run are remembered as running.
func (h *Host) Close() error {
	var errs []error
	for _, vm := range h.VMs() {
		vm.mu.Lock()
		errs = append(errs, vm.closeDisks())
		vm.gone = true
		vm.mu.Unlock()
	}
	if h.root != nil {
		errs = append(errs, h.root.Close())
	}
	return errors.Join(append(errs, h.lock.Close())...)
}

// Datastore is the datastore's name.
func (h *Host) Datastore() string { return h.o.Datastore }

// Dir is the full path of the datastore's directory.
func (h *Host) Dir() string { return h.o.Dir }

// VMs are the registered VMs by their numbers.
func (h *Host) VMs() []*VM {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := make([]*VM, 0, len(h.vms))
	for _, vm := range h.vms {
		list = append(list, vm)
	}
	slices.SortFunc(list, func(a, b *VM) int { return a.id - b.id })
	return list
}

// VM finds a VM by its number; nil when there is none.
func (h *Host) VM(id int) *VM {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.vms[id]
}

// Find finds a VM by name.
func (h *Host) Find(name string) (*VM, error) {
	for _, vm := range h.VMs() {
		if vm.Name() == name {
			return vm, nil
		}
	}
	return nil, fail(ErrGone, name, "no VM called %q is registered", name)
}

// InUse tells whether a running VM holds a file so that it cannot be read, or,
// with write, cannot be changed.
func (h *Host) InUse(name string, write bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, files := range h.used {
		if exclusive, ok := files[name]; ok && (exclusive || write) {
			return true
		}
	}
	return false
}
