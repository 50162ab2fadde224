package hv

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/vdisk"
	"hikae/backup/vmx"
)

// ImportOptions of Import.
type ImportOptions struct {
	ChangeTracking, Thin bool
	Hardware             int // virtual hardware version; 0 is the host's newest
}

// Import makes a VM with one disk for each raw image. The VM is registered and
// off.
func (h *Host) Import(ctx context.Context, name string, raws []string, o ImportOptions) (*VM, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := h.Mkdir(name, false); err != nil {
		return nil, fmt.Errorf("importing %s: %w", name, err)
	}
	vm, err := h.importInto(ctx, name, raws, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("importing %s: %w", name, err), h.root.RemoveAll(name))
	}
	return vm, nil
}

// checkName allows what can be one directory's name on VMFS.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 80 || name == PrivateDir || strings.ContainsAny(name, "/\x00\n\r") {
		return fail(ErrInvalid, "name", "%q cannot be the name of a VM", name)
	}
	return nil
}

func (h *Host) importInto(ctx context.Context, name string, raws []string, o ImportOptions) (*VM, error) {
	var disks []string
	for i, raw := range raws {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		base := name
		if i > 0 {
			base = fmt.Sprintf("%s_%d", name, i)
		}
		fi, err := os.Stat(raw)
		if err != nil {
			return nil, err
		}
		if need := fi.Size(); !o.Thin && !h.space.fits(need) || o.Thin && !h.space.fits(min(allocated(fi), need)) {
			return nil, fail(ErrNoSpace, base, "the datastore has no room for the %d bytes of %s", need, raw)
		}
		d, err := vdisk.ImportRaw(ctx, h.abs(name), base, raw, vdisk.Options{Thin: o.Thin, VMFS: h.o.VMFS})
		if err != nil {
			return nil, err
		}
		if err := d.Close(); err != nil {
			return nil, err
		}
		h.space.refresh()
		disks = append(disks, base+".vmdk")
	}
	x := NewConfig(Config{Name: name, Disks: disks, CPUs: 2, MemoryMiB: 2048, GuestID: "debian11-64", Network: "VM Network", Hardware: cmp.Or(o.Hardware, h.o.Hardware)})
	if o.ChangeTracking {
		SetTracking(x, true)
	}
	return h.CreateVM(path.Join(name, name+".vmx"), x)
}

// CreateVM writes a configuration with the small files that belong to it, and
// registers it. The directory must exist.
func (h *Host) CreateVM(rel string, x *vmx.File) (*VM, error) {
	dir, base := path.Dir(rel), strings.TrimSuffix(path.Base(rel), ".vmx")
	if _, err := h.Stat(rel); err == nil {
		return nil, fail(ErrExists, rel, "%s already exists", rel)
	}
	nvram := base + ".nvram"
	x.Set("nvram", nvram)
	name, _ := x.Get("displayName")
	for file, data := range map[string][]byte{
		rel:                          x.Bytes(),
		path.Join(dir, nvram):        newNVRAM(),
		path.Join(dir, base+".vmsd"): nil,
		path.Join(dir, "vmware.log"): []byte("vmx| Log for simulated VM " + strconv.Quote(name) + "\n"),
	} {
		if err := WriteFile(h.abs(file), data); err != nil {
			return nil, fileError(file, err)
		}
	}
	vm, err := h.Register(rel, "")
	if err != nil {
		return nil, err
	}
	vm.mu.Lock()
	vm.x.Set("uuid.location", vm.location())
	vm.mu.Unlock()
	// Change tracking that the configuration asks for begins before the first write.
	return vm, vm.Reconfigure(func(*vmx.File) error { return nil })
}

// NewDisk makes an empty disk. rel is its descriptor.
func (h *Host) NewDisk(rel string, capacity int64, thin, eager bool, adapter string) error {
	base, ok := strings.CutSuffix(path.Base(rel), ".vmdk")
	if !ok || base == "" {
		return fail(ErrInvalid, "name", "%s is not the path of a .vmdk file", rel)
	}
	if capacity <= 0 || capacity%512 != 0 {
		return fail(ErrInvalid, "capacityKb", "a specified parameter was not correct: capacityKb")
	}
	if _, err := h.Stat(path.Dir(rel)); err != nil {
		return err
	}
	for _, name := range []string{rel, path.Join(path.Dir(rel), base+"-flat.vmdk")} {
		if _, err := h.Stat(name); err == nil {
			return fail(ErrExists, name, "%s already exists", name)
		}
	}
	if !thin && !h.space.fits(capacity) {
		return fail(ErrNoSpace, rel, "there is not enough space on the file system for %s: %d bytes", rel, capacity)
	}
	d, err := vdisk.Create(h.abs(path.Dir(rel)), base, capacity, vdisk.Options{Thin: thin, Eager: eager, Adapter: adapter, VMFS: h.o.VMFS})
	h.space.refresh()
	if errors.Is(err, fs.ErrExist) {
		return fail(ErrExists, rel, "%s already exists", rel)
	}
	if err != nil {
		return err
	}
	return d.Close()
}

// DeleteDisk deletes a disk: the link named, and its files.
func (h *Host) DeleteDisk(rel string) error {
	d, err := h.descriptor(rel)
	if err != nil {
		return err
	}
	for _, name := range linkFiles(rel, d) {
		if err := h.Delete(name); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return nil
}

// Config describes a VM to be made.
type Config struct {
	Name, GuestID, Network string
	Firmware               string // "bios" unless set
	Disks                  []string
	CPUs                   int32
	MemoryMiB              int64
	Hardware               int // virtual hardware version; 0 is 13
}

// NewConfig makes a .vmx as ESXi writes one, the disks on one pvscsi controller
// after the other.
func NewConfig(c Config) *vmx.File {
	if c.Hardware == 0 {
		c.Hardware = oldestHardware
	}
	x := &vmx.File{}
	id := newUUID()
	for _, kv := range [][2]string{
		{".encoding", "UTF-8"},
		{"config.version", "8"},
		{"virtualHW.version", strconv.Itoa(c.Hardware)},
		{"svga.present", "TRUE"},
		{"floppy0.present", "FALSE"},
		{"memSize", strconv.FormatInt(c.MemoryMiB, 10)},
		{"numvcpus", strconv.Itoa(int(c.CPUs))},
		{"displayName", c.Name},
		{"guestOS", c.GuestID},
		{"toolScripts.afterPowerOn", "TRUE"},
		{"tools.syncTime", "FALSE"},
		{"uuid.bios", id},
		{"uuid.location", id},
		{"vc.uuid", newUUID()},
		{"sched.cpu.shares", "normal"},
		{"sched.mem.shares", "normal"},
		{"cleanShutdown", "TRUE"},
	} {
		x.Set(kv[0], kv[1])
	}
	if c.Firmware != "" && c.Firmware != "bios" {
		x.Set("firmware", c.Firmware)
	}
	if c.Network != "" {
		for _, kv := range [][2]string{
			{"present", "TRUE"},
			{"virtualDev", "vmxnet3"},
			{"networkName", c.Network},
			{"addressType", "generated"},
			{"generatedAddress", newMAC()},
			{"generatedAddressOffset", "0"},
		} {
			x.Set("ethernet0."+kv[0], kv[1])
		}
	}
	for i, name := range c.Disks {
		unit := i % 15
		if unit >= 7 {
			unit++
		}
		controller := fmt.Sprintf("scsi%d", i/15)
		AddController(x, controller, "pvscsi")
		AddDisk(x, fmt.Sprintf("%s:%d", controller, unit), name, "persistent")
	}
	return x
}

// oldestHardware stands for a .vmx without a version.
const oldestHardware = 13

// hardware is the virtual hardware version of a configuration.
func hardware(x *vmx.File) int {
	v, _ := x.Get("virtualHW.version")
	n, err := strconv.Atoi(v)
	if err != nil || n <= 0 {
		return oldestHardware
	}
	return n
}

// AddController adds a controller unless it is there.
func AddController(x *vmx.File, name, model string) {
	if x.True(name + ".present") {
		return
	}
	if strings.HasPrefix(name, "scsi") {
		x.Set(name+".virtualDev", model)
	}
	x.Set(name+".present", "TRUE")
}

// AddDisk attaches a disk.
func AddDisk(x *vmx.File, slot, file, mode string) {
	kind := "scsi-hardDisk"
	if strings.HasPrefix(slot, "ide") || strings.HasPrefix(slot, "sata") {
		kind = "ata-hardDisk"
	}
	x.Set(slot+".deviceType", kind)
	x.Set(slot+".fileName", file)
	if mode != "" && mode != "persistent" {
		x.Set(slot+".mode", strings.ReplaceAll(mode, "_", "-"))
	}
	x.Set(slot+".present", "TRUE")
}

// SetTracking asks for change tracking on all disks, or on none.
func SetTracking(x *vmx.File, on bool) {
	value := "FALSE"
	if on {
		value = "TRUE"
	}
	x.Set("ctkEnabled", value)
	for _, d := range x.Disks() {
		x.Set(d.Slot+".ctkEnabled", value)
	}
}

// newUUID is a random identity as a .vmx writes it: "56 4d … -… ".
func newUUID() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[0], b[1] = 0x56, 0x4d // VMware's own
	text := fmt.Sprintf("% x", b)
	return text[:23] + "-" + text[24:]
}

func newMAC() string {
	b := make([]byte, 3)
	rand.Read(b)
	return fmt.Sprintf("00:0c:29:%02x:%02x:%02x", b[0], b[1], b[2])
}

// newNVRAM is a firmware's settings: the size and the mark of a real one.
func newNVRAM() []byte {
	data := make([]byte, 8684)
	copy(data, "MRVN\x01\x00\x00\x00")
	rand.Read(data[64:128]) // settings differ between VMs
	return data
}

// DiskUUID is the identity in a disk's descriptor.
func (h *Host) DiskUUID(rel string) (string, error) {
	d, err := h.descriptor(rel)
	if err != nil {
		return "", err
	}
	return d.Value("ddb.uuid"), nil
}

// DiskCapacity is the size a disk's descriptor tells, in bytes.
func (h *Host) DiskCapacity(rel string) (int64, error) {
	d, err := h.descriptor(rel)
	if err != nil {
		return 0, err
	}
	return d.Capacity(), nil
}
