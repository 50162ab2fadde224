package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"hikae/backup/esxi"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
	"hikae/repo"
)

// problems gathers what stands in the way of a restore, so that the operator
// sees all of it at once.
type problems struct {
	list  []string
	kinds []error // besides ErrRefused
}

func (p *problems) add(format string, args ...any) {
	p.list = append(p.list, fmt.Sprintf(format, args...))
}

// err is nil when there are none.
func (p *problems) err(what string) error {
	if len(p.list) == 0 {
		return nil
	}
	kind := ErrRefused
	for _, k := range p.kinds {
		kind = fmt.Errorf("%w: %w", kind, k)
	}
	return fmt.Errorf("%s cannot begin, nothing was touched: %s: %w", what, strings.Join(p.list, "; "), kind)
}

// preflight checks all that can be checked before anything is touched. An error
// of the way to the host is returned as it is.
func (r *restoring) preflight(ctx context.Context) error {
	var p problems
	r.checkGeneration(ctx, &p)
	if err := r.checkWay(ctx, &p); err != nil {
		return err
	}
	original, err := r.checkName(ctx, &p)
	if err != nil {
		return err
	}
	stores, err := r.Host.Datastores(ctx)
	if err != nil {
		return err
	}
	r.checkStore(stores, &p)
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := p.err(fmt.Sprintf("restoring %s as %s", r.res.Generation, r.Name)); err != nil {
		return err
	}
	r.configure(r.config, original)
	if r.res.Way == WayUpload {
		if r.res.BytesData < r.res.BytesCapacity {
			r.warn("%s, so its disks become thick and are sent whole, zeros included: %s for %s of data", r.res.WayReason, size(r.res.BytesCapacity), size(r.res.BytesData))
		}
	}
	return nil
}

// checkGeneration opens everything that will be needed of the generation.
func (r *restoring) checkGeneration(ctx context.Context, p *problems) {
	r.base = cleanName(r.Name, "vm")
	for i, m := range r.manifest.Disks {
		d, err := r.Generation.OpenDisk(i)
		kind := r.Provisioning
		if desc, derr := vmdk.ParseDescriptor([]byte(m.Descriptor)); derr != nil && err == nil && m.Descriptor != "" {
			p.add("%s (%s) has a descriptor that cannot be read: %s", m.Label, m.Name, oneLine(derr))
			continue
		} else if derr == nil && kind == "" {
			kind = provisioning(desc)
		}
		if err == nil {
			// The root of its tree is read by this: a generation whose tree is
			// gone is found out now.
			if _, _, err = d.NextData(ctx, 0); errors.Is(err, io.EOF) {
				err = nil
			}
		}
		switch {
		case err != nil:
			p.add("%s (%s) of the generation cannot be read: %s (see hikae check)", m.Label, m.Name, oneLine(err))
		case d.Size()%512 != 0:
			p.add("%s (%s) has %d bytes, which is no whole number of sectors", m.Label, m.Name, d.Size())
		case m.Descriptor == "":
			p.add("%s (%s) has no descriptor", m.Label, m.Name)
		default:
			r.disks = append(r.disks, d)
			r.kinds = append(r.kinds, kind)
			r.res.BytesCapacity += d.Size()
			r.res.BytesData += d.DataBytes()
		}
	}
	for _, f := range r.manifest.Files {
		switch {
		case strings.HasSuffix(f.Name, ".nvram"):
			r.nvram = f.Data
		case strings.HasSuffix(f.Name, ".vmx"):
			config, err := vmx.Parse(f.Data)
			if err != nil {
				p.add("the configuration %s of the generation cannot be read: %s", f.Name, oneLine(err))
				continue
			}
			r.config = config
		}
	}
	if r.config == nil && len(p.list) == 0 {
		p.add("the generation has no configuration (.vmx)")
	}
}

// checkName looks for VMs in the way. original tells whether the VM that was
// backed up is still on the host.
func (r *restoring) checkName(ctx context.Context, p *problems) (original bool, err error) {
	if err := (repo.VMID{Host: "host", Name: r.Name}).Validate(); err != nil || len(r.Name) > 80 {
		p.add("%q cannot be a VM's name here (at most 80 bytes, no slash); give another with --name", r.Name)
	}
	vms, err := r.Host.VMs(ctx)
	if err != nil {
		return false, err
	}
	g := r.manifest.Guest
	for _, vm := range vms {
		if strings.EqualFold(vm.Name, r.Name) {
			p.add("the host has a VM called %s already; give another name with --name, or unregister that one", vm.Name)
		}
		if (g.UUID != "" && strings.EqualFold(vm.UUID, g.UUID)) || (g.InstanceUUID != "" && strings.EqualFold(vm.InstanceUUID, g.InstanceUUID)) {
			original = true
		}
	}
	return original, nil
}

// checkWay decides how the disks are written.
func (r *restoring) checkWay(ctx context.Context, p *problems) error {
	ways, err := r.Host.Ways(ctx)
	if err != nil {
		return err
	}
	if ways.Control == "" {
		p.add("nothing can be changed on the host: %s", ways.ControlWhy)
		p.kinds = append(p.kinds, esxi.ErrRestricted)
	}
	r.res.Way = WaySSH
	if ways.SSH.Reachable {
		return nil
	}
	r.res.Way = WayUpload
	switch {
	case !ways.SSH.Configured:
		r.res.WayReason = "SSH to the host is not configured (hikae host add --ssh)"
	case ways.SSH.Err != nil:
		r.res.WayReason = "SSH does not work: " + oneLine(ways.SSH.Err)
	default:
		r.res.WayReason = "SSH does not work"
	}
	if r.Provisioning == esxi.Thin {
		p.add("thin disks can be made over SSH only, and %s", r.res.WayReason)
	}
	return nil
}

// checkStore looks for the datastore and its room. Thin disks take what is not
// zeros, all others their size at once; a file that is uploaded is allocated in
// full.
func (r *restoring) checkStore(stores []esxi.Datastore, p *problems) {
	i := slices.IndexFunc(stores, func(s esxi.Datastore) bool { return s.Name == r.Datastore })
	if i < 0 {
		var names []string
		for _, s := range stores {
			names = append(names, s.Name)
		}
		p.add("the host has no datastore called %s (it has %s)", r.Datastore, strings.Join(names, ", "))
		return
	}
	s := stores[i]
	if !s.Accessible {
		p.add("datastore %s is not accessible", s.Name)
		return
	}
	need, why := r.room()
	if s.Free < need {
		p.kinds = append(p.kinds, ErrNoRoom)
		p.add("datastore %s has %s free and the VM needs %s (%s): free some, or restore to another datastore", s.Name, size(s.Free), size(need), why)
	}
}

// smallFiles is more than descriptors, configuration and log take, in bytes.
const smallFiles = 64 << 20

// room is what the VM takes on the datastore in bytes, and what of it is what.
func (r *restoring) room() (need int64, why string) {
	var thin, thick int64
	for i, d := range r.disks {
		if r.res.Way == WaySSH && r.kinds[i] == esxi.Thin {
			thin += d.DataBytes()
		} else {
			thick += d.Size()
		}
	}
	var parts []string
	if thin > 0 {
		parts = append(parts, size(thin)+" of data on thin disks")
	}
	if thick > 0 {
		parts = append(parts, size(thick)+" of thick disks")
		if r.res.Way == WayUpload {
			parts[len(parts)-1] = size(thick) + " of disks, which become thick without SSH"
		}
	}
	need = thin + thick + smallFiles
	if r.PowerOn && r.config != nil {
		v, _ := r.config.Get("memSize")
		if mib, err := strconv.ParseInt(v, 10, 32); err == nil && mib > 0 {
			need += mib << 20
			parts = append(parts, size(mib<<20)+" to swap when it runs")
		}
	}
	return need, strings.Join(append(parts, size(smallFiles)+" for its other files"), ", ")
}
