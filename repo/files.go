package repo

import (
	"context"
	"slices"
	"strings"
	"time"
)

// File is one file of a generation as a folder shows it: either Data or Disk.
type File struct {
	Name        string
	Size        int64     // bytes
	ModTime     time.Time // the generation's time
	Data        []byte    // of a small file; must not be changed
	Disk        *Disk     // of a flat extent, else nil
	StoredBytes int64     // bytes that are not holes
}

// Files shows the generation as the folder of an ordinary VM, sorted by name: its
// .vmx and .nvram, for each disk a descriptor and a flat extent, and
// generation.json, the manifest for people.
func (g *Generation) Files(ctx context.Context) ([]File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var files []File
	small := func(name string, data []byte) {
		files = append(files, File{
			Name: name, Data: data, Size: int64(len(data)), StoredBytes: int64(len(data)), ModTime: g.ref.Time,
		})
	}
	about, err := g.manifest.public()
	if err != nil {
		return nil, err
	}
	small(publicManifestName, about)
	for _, f := range g.manifest.Files {
		small(f.Name, f.Data)
	}
	for i := range g.manifest.Disks {
		m := &g.manifest.Disks[i]
		d, err := g.OpenDisk(i)
		if err != nil {
			return nil, err
		}
		small(m.Name+".vmdk", []byte(m.Descriptor))
		files = append(files, File{
			Name: m.Name + "-flat.vmdk", Disk: d, Size: d.Size(), StoredBytes: d.DataBytes(), ModTime: g.ref.Time,
		})
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return files, nil
}
