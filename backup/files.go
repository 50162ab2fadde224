package backup

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"

	"hikae/backup/esxi"
	"hikae/backup/vmx"
	"hikae/repo"
)

// vmFiles is what belongs to a generation besides the disks' content.
type vmFiles struct {
	list  []repo.ManifestFile
	disks []string // base names of the disks' files, in the VM's order
}

// nvramLimit is far above any firmware's settings, in bytes.
const nvramLimit = 16 << 20

// readFiles reads the VM's configuration and firmware settings. It is done
// before the snapshot, when the configuration names the same links as the
// inventory that was just read.
func (r *run) readFiles(ctx context.Context) error {
	base := strings.TrimSuffix(path.Base(pathOf(r.vm.ConfigPath)), ".vmx")
	names := newNames(base)
	for _, d := range r.vm.Disks {
		r.files.disks = append(r.files.disks, names.disk(path.Base(pathOf(first(d.Chain)))))
	}
	config, err := r.readConfig(ctx)
	if err != nil {
		return err
	}
	for _, w := range rename(config, r.vm.Disks, r.files.disks) {
		r.warn("%s", w)
	}
	var nvram []byte
	if r.vm.NVRAMPath != "" {
		nvram, err = r.Host.ReadFile(ctx, r.vm.NVRAMPath, nvramLimit)
		if errors.Is(err, esxi.ErrNotFound) {
			err = nil // it comes with the first start
		}
		if err != nil {
			return err
		}
	}
	if len(nvram) > 0 {
		config.Set("nvram", names.base+".nvram")
		r.files.list = append(r.files.list, repo.ManifestFile{Name: names.base + ".nvram", Data: nvram})
	}
	r.files.list = append(r.files.list, repo.ManifestFile{Name: names.base + ".vmx", Data: config.Bytes()})
	return nil
}

// readConfig reads the .vmx. A VM whose configuration cannot be read has one
// made from the inventory instead: its disks matter more.
func (r *run) readConfig(ctx context.Context) (*vmx.File, error) {
	text, err := r.Host.ReadFile(ctx, r.vm.ConfigPath, vmx.MaxSize)
	if err == nil {
		var f *vmx.File
		if f, err = vmx.Parse(text); err == nil {
			return f, nil
		}
	}
	if ctx.Err() != nil || errors.Is(err, esxi.ErrUnreachable) || errors.Is(err, esxi.ErrLogin) {
		return nil, err
	}
	r.warn("the configuration %s cannot be read, the generation has a minimal one made from the inventory: %s", r.vm.ConfigPath, oneLine(err))
	m := vmx.Minimal{Name: r.vm.Name, GuestID: strings.TrimSuffix(r.vm.GuestID, "Guest"), Disks: r.files.disks}
	for i := range m.Disks {
		m.Disks[i] += ".vmdk"
	}
	if len(r.vm.Disks) > 0 {
		m.Adapter = r.vm.Disks[0].Adapter
	}
	_, _ = fmt.Sscanf(r.vm.HardwareVersion, "vmx-%d", &m.Hardware)
	return vmx.New(m), nil
}

// rename makes a configuration name its disks as the generation does. Disks are
// matched by the slot they are attached at, else by the name of their running
// link. What does not match is returned as warnings.
func rename(config *vmx.File, disks []esxi.Disk, names []string) (warnings []string) {
	done := map[int]bool{}
	for _, entry := range config.Disks() {
		at := -1
		for i, d := range disks {
			if !done[i] && d.Controller != "" && strings.EqualFold(entry.Slot, fmt.Sprintf("%s:%d", d.Controller, d.Unit)) {
				at = i
			}
		}
		for i, d := range disks {
			if at < 0 && !done[i] && len(d.Chain) > 0 && path.Base(pathOf(d.Chain[len(d.Chain)-1])) == path.Base(entry.File) {
				at = i
			}
		}
		if at < 0 {
			warnings = append(warnings, fmt.Sprintf("the configuration attaches %s at %s, which is no disk of the VM's inventory; it is not in the generation",
				entry.File, entry.Slot))
			continue
		}
		done[at] = true
		config.SetDisk(entry.Slot, names[at]+".vmdk")
	}
	for i, d := range disks {
		if !done[i] {
			warnings = append(warnings, fmt.Sprintf("%s is not in the VM's configuration; its content is in the generation, a restored VM does not have it attached", d.Label))
		}
	}
	return warnings
}

// pathOf is the part of a datastore path after the datastore.
func pathOf(ds string) string {
	if _, p, ok := strings.Cut(ds, "] "); ok && strings.HasPrefix(ds, "[") {
		return p
	}
	return ds
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// fileNames gives the files of a generation names that differ from each other,
// also where case does not count.
type fileNames struct {
	base string
	used map[string]bool
}

// maxName keeps names within what the repository and file systems take, the
// longest suffix ("-flat.vmdk" and a number) included; in bytes.
const maxName = 160

// newNames starts with the VM's own files.
func newNames(base string) *fileNames {
	n := &fileNames{base: cleanName(base, "vm"), used: map[string]bool{"generation.json": true}}
	n.used[strings.ToLower(n.base+".vmx")] = true
	n.used[strings.ToLower(n.base+".nvram")] = true
	return n
}

var linkNumber = regexp.MustCompile(`-\d{6}$`)

// disk gives a disk's files their base name, after its base link's descriptor:
// "web01.vmdk" gives web01. A link's number ("web01-000001.vmdk") is not part of
// it.
func (n *fileNames) disk(descriptor string) string {
	name := strings.TrimSuffix(descriptor, ".vmdk")
	if short := linkNumber.ReplaceAllString(name, ""); short != "" {
		name = short
	}
	name = cleanName(name, "disk")
	for i := 1; ; i++ {
		try := name
		if i > 1 {
			try = fmt.Sprintf("%s-%d", name, i)
		}
		a, b := strings.ToLower(try+".vmdk"), strings.ToLower(try+"-flat.vmdk")
		if !n.used[a] && !n.used[b] {
			n.used[a], n.used[b] = true, true
			return try
		}
	}
}

// cleanName makes a file name of whatever a host calls something.
func cleanName(s, otherwise string) string {
	s = strings.ToValidUTF8(strings.Map(func(c rune) rune {
		if c < 0x20 || c == '/' || c == '\\' || c == 0x7f {
			return '_'
		}
		return c
	}, s), "_")
	for len(s) > maxName {
		s = s[:len(s)-1]
	}
	s = strings.ToValidUTF8(s, "")
	if strings.Trim(s, ". ") == "" {
		return otherwise
	}
	return s
}
