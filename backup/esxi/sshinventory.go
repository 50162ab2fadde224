package esxi

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"hikae/backup/esxi/internal/sshx"
	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
)

// shellInventory looks at a host through its shell alone, where port 443 is
// closed. What vim-cmd's dumps cannot be trusted with (annotations stand in them
// unquoted), or do not show, is read from the files: .vmx, .vmsd, descriptors.
//
// A VM's id is the shell's number; a snapshot's is "12-snapshot-3", as the API of
// a host forms it.
type shellInventory struct {
	h  *Host
	sh *shellConn
}

var _ inventory = (*shellInventory)(nil)

// looksAtOnce is how many VMs are looked at together.
const looksAtOnce = 4

func (i *shellInventory) vms(ctx context.Context) ([]VM, error) {
	listed, invalid, err := i.sh.list(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var vms []VM
	for _, id := range invalid {
		vms = append(vms, VM{
			ID: strconv.Itoa(id), Name: fmt.Sprintf("invalid VM %d", id),
			Invalid: "the host calls it invalid: its files or its datastore are out of reach",
		})
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(looksAtOnce)
	for _, l := range listed {
		g.Go(func() error {
			vm, err := i.vm(ctx, strconv.Itoa(l.ID))
			switch {
			case gone(err):
				return nil // unregistered meanwhile, or a line of an annotation
			case err != nil && (ctx.Err() != nil || transient(err) || i.way(err)):
				return err
			case err != nil: // one VM's trouble, which must not hide the others
				vm = &VM{
					ID: strconv.Itoa(l.ID), Name: displayName(l.Name), ConfigPath: joinPath(l.Datastore, l.Path),
					Invalid: "the host does not show it in a form that can be read: " + err.Error(),
				}
			}
			mu.Lock()
			defer mu.Unlock()
			vms = append(vms, *vm)
			return nil
		})
	}
	return vms, g.Wait()
}

// way tells trouble with the way to the host from trouble with what is on it.
func (i *shellInventory) way(err error) bool {
	for _, kind := range []error{ErrUnreachable, ErrLogin, ErrHostKey, ErrBusy, sshx.ErrRefused, sshx.ErrBusy, sshx.ErrClosed} {
		if errors.Is(err, kind) {
			return true
		}
	}
	var key *sshx.HostKeyError
	return errors.As(err, &key)
}

func (i *shellInventory) vm(ctx context.Context, id string) (*VM, error) {
	if _, err := strconv.Atoi(id); err != nil {
		return nil, asFault(&vimcmd.Fault{Type: "vmodl.fault.ManagedObjectNotFound", Message: "no VM has the number " + id})
	}
	sum, err := i.sh.dump(ctx, "vmsvc/get.summary", id)
	if err != nil {
		return nil, err
	}
	// What stands before the annotation in the dump cannot be part of it.
	config := sum.Get("config")
	vm := &VM{
		ID: id, Name: displayName(config.Get("name").Text), UUID: config.Get("uuid").Text, InstanceUUID: config.Get("instanceUuid").Text,
		GuestID: config.Get("guestId").Text, Power: sum.Get("runtime", "powerState").Text, ConfigPath: config.Get("vmPathName").Text,
		NeedsConsolidation: sum.Get("runtime", "consolidationNeeded").Bool(),
	}
	if s := sum.Get("runtime", "connectionState").Text; s != "" && s != "connected" {
		vm.Invalid = fmt.Sprintf("the host calls it %s: its files or its datastore are out of reach", s)
		return vm, nil
	}
	if _, _, err := splitPath(vm.ConfigPath); err != nil {
		return nil, fmt.Errorf("%w: %w", vimcmd.ErrFormat, err)
	}
	devs, err := i.sh.dump(ctx, "vmsvc/device.getdevices", id)
	if err != nil {
		return nil, err
	}
	vm.Disks = disks(devices(devs))
	for n := range vm.Disks {
		i.lengthen(ctx, &vm.Disks[n])
	}
	if err := i.configure(ctx, vm); err != nil {
		return nil, err
	}
	tree, err := i.sh.tree(ctx, id)
	if err != nil {
		return nil, err
	}
	if len(tree) > 0 {
		list, err := i.snapshotList(ctx, vm.ConfigPath)
		if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, vmx.ErrFormat) {
			return nil, err
		}
		current, _ := list.Get("snapshot.current")
		for _, s := range tree {
			info := SnapshotInfo{
				ID: snapshotID(id, s.ID), Name: displayName(s.Name), Description: s.Description, Created: s.Created,
				Current: strconv.Itoa(s.ID) == current, number: int32(s.ID),
			}
			if s.Parent != 0 {
				info.Parent = snapshotID(id, s.Parent)
			}
			vm.Snapshots = append(vm.Snapshots, info)
		}
	}
	i.h.remember(vm)
	return vm, nil
}

func snapshotID(vm string, number int) string { return fmt.Sprintf("%s-snapshot-%d", vm, number) }

// configure reads what the .vmx alone says for sure.
func (i *shellInventory) configure(ctx context.Context, vm *VM) error {
	text, err := (&shellFiles{i.sh}).readFile(ctx, vm.ConfigPath, vmx.MaxSize)
	if err != nil {
		return err
	}
	config, err := vmx.Parse(text)
	if err != nil {
		return err
	}
	if v, ok := config.Get("virtualHW.version"); ok {
		vm.HardwareVersion = "vmx-" + v
		if len(v) == 1 {
			vm.HardwareVersion = "vmx-0" + v
		}
	}
	vm.ChangeTracking = config.True("ctkEnabled")
	if name, ok := config.Get("nvram"); ok && name != "" && !strings.HasPrefix(name, "/") {
		if ds, p, err := splitPath(vm.ConfigPath); err == nil {
			vm.NVRAMPath = joinPath(ds, path.Join(path.Dir(p), name))
		}
	}
	return nil
}

// snapshotList reads the .vmsd beside a .vmx: keys and values in the same form.
func (i *shellInventory) snapshotList(ctx context.Context, configPath string) (*vmx.File, error) {
	text, err := (&shellFiles{i.sh}).readFile(ctx, strings.TrimSuffix(configPath, ".vmx")+".vmsd", vmx.MaxSize)
	if err != nil {
		return &vmx.File{}, err
	}
	list, err := vmx.Parse(text)
	if err != nil {
		return &vmx.File{}, err
	}
	return list, nil
}

// linkName is how a host names the links of snapshots.
var linkName = regexp.MustCompile(`-\d{6}\.vmdk$`)

// lengthen completes a chain whose parents a dump did not show, from the
// descriptors. What cannot be read stays as it is: opening the disk tells why.
func (i *shellInventory) lengthen(ctx context.Context, d *Disk) {
	if d.Unsupported != "" || len(d.Chain) != 1 || !linkName.MatchString(d.Chain[0]) {
		return
	}
	chain := slices.Clone(d.Chain)
	for len(chain) < 64 { // ESXi allows 32 links
		text, _, err := (&shellFiles{i.sh}).readHead(ctx, chain[0], descriptorLimit)
		if err != nil {
			return
		}
		desc, err := vmdk.ParseDescriptor(text)
		if err != nil {
			return
		}
		if desc.ParentCID == vmdk.NoParent || desc.ParentFileNameHint == "" {
			d.Chain = chain
			return
		}
		var stores map[string]string
		if strings.HasPrefix(desc.ParentFileNameHint, "/") {
			if stores, err = i.h.volumes(ctx); err != nil {
				return
			}
		}
		parent, err := beside(chain[0], desc.ParentFileNameHint, stores)
		if err != nil || slices.Contains(chain, parent) {
			return
		}
		chain = slices.Insert(chain, 0, parent)
	}
}

// snapshotDisks finds the frozen links in the VM's list of snapshots (.vmsd),
// which names them for each, and what lies below them in the running chains.
func (i *shellInventory) snapshotDisks(ctx context.Context, now *VM, id string) ([]Disk, error) {
	number, ok := strings.CutPrefix(id, now.ID+"-snapshot-")
	if !ok {
		return nil, asFault(&vimcmd.Fault{Type: "vmodl.fault.ManagedObjectNotFound", Message: "the snapshot is of another VM"})
	}
	list, err := i.snapshotList(ctx, now.ConfigPath)
	if err != nil {
		return nil, err
	}
	frozen, err := frozenFiles(list, number)
	if err != nil {
		return nil, err
	}
	var stores map[string]string
	var out []Disk
	for _, d := range now.Disks {
		slot := fmt.Sprintf("%s:%d", d.Controller, d.Unit)
		file, ok := frozen[slot]
		if !ok {
			continue // added since, or left out of snapshots
		}
		if strings.HasPrefix(file, "/") && stores == nil {
			if stores, err = i.h.volumes(ctx); err != nil {
				return nil, err
			}
		}
		name, err := beside(now.ConfigPath, file, stores)
		if err != nil {
			return nil, err
		}
		n := slices.Index(d.Chain, name)
		if n < 0 && d.Unsupported == "" {
			return nil, fmt.Errorf("snapshot %s of %s froze %s, on which %s (%s) does not stand any more", number, now.Name, name, d.Label, strings.Join(d.Chain, ", "))
		}
		d.Chain = slices.Clone(d.Chain[:n+1])
		// The change id of a frozen link is not shown; the running one's is of now.
		d.ChangeID = ""
		out = append(out, d)
	}
	return out, nil
}

// frozenFiles reads which file each slot had when a snapshot froze it.
func frozenFiles(list *vmx.File, number string) (map[string]string, error) {
	get := func(key string) string { v, _ := list.Get(key); return v }
	for n := range 1000 { // ESXi allows 32 in a chain
		key := fmt.Sprintf("snapshot%d.", n)
		if get(key+"uid") != number {
			continue
		}
		files := map[string]string{}
		for m := range 256 { // as many as a VM has
			disk := fmt.Sprintf("%sdisk%d.", key, m)
			if slot, file := strings.ToLower(get(disk+"node")), get(disk+"fileName"); slot != "" && file != "" {
				files[slot] = file
			}
		}
		return files, nil
	}
	return nil, fmt.Errorf("the VM's list of snapshots (.vmsd) does not have number %s, which the host shows", number)
}

// vmOf reads it from the id.
func (i *shellInventory) vmOf(ctx context.Context, snapshot string) string {
	vm, _, _ := strings.Cut(snapshot, "-snapshot-")
	if _, err := i.vm(ctx, vm); err != nil { // so that its snapshots are known
		return ""
	}
	return vm
}

func (i *shellInventory) needsConsolidation(ctx context.Context, vm string) (bool, error) {
	sum, err := i.sh.dump(ctx, "vmsvc/get.summary", vm)
	if err != nil {
		return false, err
	}
	return sum.Get("runtime", "consolidationNeeded").Bool(), nil
}

func (i *shellInventory) busy(ctx context.Context, vm, kind string) (bool, error) {
	return i.h.ssh.busy(ctx, vm, kind)
}

// datastores asks esxcli, and vim-cmd where that prints something else.
func (i *shellInventory) datastores(ctx context.Context) ([]Datastore, error) {
	out, err := i.sh.words(ctx, true, "esxcli", "--formatter=csv", "storage", "filesystem", "list")
	var failed *commandError
	if err != nil && !errors.As(err, &failed) {
		return nil, err
	}
	if err == nil {
		if all, perr := vimcmd.ParseFilesystems(out); perr == nil {
			return datastores(all), nil
		}
	}
	v, err := i.sh.dump(ctx, "hostsvc/datastore/listsummary")
	if err != nil {
		return nil, err
	}
	var stores []Datastore
	v.Walk(func(v vimcmd.Value) {
		if v.Type != "vim.Datastore.Summary" || !v.IsObject() {
			return
		}
		d := Datastore{
			Name: displayName(v.Get("name").Text), Type: v.Get("type").Text, URL: v.Get("url").Text, Accessible: v.Get("accessible").Bool(),
		}
		d.Capacity, _ = v.Get("capacity").Int()
		d.Free, _ = v.Get("freeSpace").Int()
		stores = append(stores, d)
	})
	return stores, nil
}

// datastores picks what the API calls one: the host's own boot and scratch
// volumes are none.
func datastores(all []vimcmd.Filesystem) (out []Datastore) {
	for _, f := range all {
		kind, _, _ := strings.Cut(f.Type, "-")
		if f.Name == "" || kind == "vfat" || kind == "VFFS" || strings.HasPrefix(f.Type, "VMFS-L") || strings.HasPrefix(f.Type, "VMFSOS") {
			continue
		}
		out = append(out, Datastore{
			Name: displayName(f.Name), Type: kind, Capacity: f.Size, Free: f.Free, URL: f.MountPoint, Accessible: f.Mounted && f.MountPoint != "",
		})
	}
	return out
}
