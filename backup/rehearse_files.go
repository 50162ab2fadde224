package backup

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"hikae/backup/vmdk"
	"hikae/backup/vmx"
	"hikae/repo"
)

// files opens the generation's small files as a restore does, and compares what
// they say of each other.
func (r *rehearsing) files(ctx context.Context) error {
	files, err := r.g.Files(ctx)
	if err != nil {
		return err
	}
	sizes := make(map[string]int64, len(files))
	var configs []repo.File
	for _, f := range files {
		sizes[f.Name] = f.Size
		if strings.HasSuffix(f.Name, ".vmx") {
			configs = append(configs, f)
		}
	}
	switch len(configs) {
	case 0:
		r.found(Finding{What: "there is no configuration (.vmx), so no VM can be made of the disks", Remedy: remedyFiles})
	case 1:
		r.config(configs[0])
	default:
		r.found(Finding{What: fmt.Sprintf("there are %d configurations (.vmx)", len(configs)), Remedy: remedyFiles})
	}
	for i := range r.disks {
		if what := checkDescriptor(&r.g.Manifest().Disks[i], sizes); what != "" {
			r.found(Finding{What: what, Disk: r.out.Disks[i].Name, Remedy: remedyFiles})
		}
	}
	return nil
}

// config compares the configuration's disks with the generation's.
func (r *rehearsing) config(f repo.File) {
	config, err := vmx.Parse(f.Data)
	if err != nil {
		r.found(Finding{What: fmt.Sprintf("the configuration %s cannot be read: %s", f.Name, oneLine(err)), Remedy: remedyFiles})
		return
	}
	disks := r.g.Manifest().Disks
	attached := make([]bool, len(disks))
	for _, d := range config.Disks() {
		i := slices.IndexFunc(disks, func(m repo.DiskManifest) bool { return m.Name+".vmdk" == d.File })
		switch {
		case i < 0:
			r.found(Finding{What: fmt.Sprintf("the configuration %s attaches %s at %s, which is not there: a restored VM goes without", f.Name, d.File, d.Slot), Remedy: remedyFiles})
		case attached[i]:
			r.found(Finding{What: fmt.Sprintf("the configuration %s attaches %s twice", f.Name, d.File), Disk: disks[i].Name, Remedy: remedyFiles})
		default:
			attached[i] = true
		}
	}
	for i, ok := range attached {
		if !ok {
			r.found(Finding{What: fmt.Sprintf("the configuration %s does not attach it: a restored VM has its file, and not the disk", f.Name), Disk: disks[i].Name, Remedy: remedyFiles})
		}
	}
}

// checkDescriptor says what is wrong with a disk's descriptor; sizes are those of
// the generation's files.
func checkDescriptor(m *repo.DiskManifest, sizes map[string]int64) string {
	if m.Descriptor == "" {
		return "it has no descriptor (.vmdk)"
	}
	d, err := vmdk.ParseDescriptor([]byte(m.Descriptor))
	switch {
	case err != nil:
		return fmt.Sprintf("its descriptor cannot be read: %s", oneLine(err))
	case m.Capacity%vmdk.SectorSize != 0:
		return fmt.Sprintf("it has %d bytes, which is no whole number of sectors", m.Capacity)
	case d.Capacity() != m.Capacity:
		return fmt.Sprintf("its descriptor says %d bytes, it has %d", d.Capacity(), m.Capacity)
	case d.ParentCID != vmdk.NoParent || d.ParentFileNameHint != "":
		return fmt.Sprintf("its descriptor asks for a parent disk, %q, and a generation is complete without", path.Base(d.ParentFileNameHint))
	}
	for _, e := range d.Extents {
		if e.Type == vmdk.ExtentZero {
			continue
		}
		have, ok := sizes[e.File]
		switch {
		case !ok:
			return fmt.Sprintf("its descriptor names %s, which is not there", e.File)
		case (e.Offset+e.Sectors)*vmdk.SectorSize > have:
			return fmt.Sprintf("its descriptor wants %d bytes of %s, which has %d", (e.Offset+e.Sectors)*vmdk.SectorSize, e.File, have)
		}
	}
	return ""
}
