package esxisim

import (
	"io/fs"
	"path"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// fileCall resolves a datastore path under the file manager's methods.
func (c *call) resolve(name string) (string, error) { return c.h.hv.Resolve(name) }

func makeDirectory(c *call, b any) (any, error) {
	req := b.(*types.MakeDirectory)
	rel, err := c.resolve(req.Name)
	if err != nil {
		return nil, err
	}
	if err := c.h.hv.Mkdir(rel, isTrue(req.CreateParentDirectories)); err != nil {
		return nil, err
	}
	return &types.MakeDirectoryResponse{}, nil
}

// fileTask starts a task of the file manager's.
func (c *call) fileTask(op string, f func() error) (any, error) {
	return c.start(c.entity(), op, func() (any, error) {
		err := f()
		c.h.refreshDatastore()
		return nil, err
	})
}

func deleteFile(c *call, b any) (any, error) {
	rel, err := c.resolve(b.(*types.DeleteDatastoreFile_Task).Name)
	if err != nil {
		return nil, err
	}
	return c.fileTask("FileManager.deleteFile", func() error { return c.h.hv.Delete(rel) })
}

// fromTo resolves a source and a destination.
func (c *call) fromTo(from, to string) (string, string, error) {
	a, err := c.resolve(from)
	if err != nil {
		return "", "", err
	}
	b, err := c.resolve(to)
	return a, b, err
}

func moveFile(c *call, b any) (any, error) {
	req := b.(*types.MoveDatastoreFile_Task)
	from, to, err := c.fromTo(req.SourceName, req.DestinationName)
	if err != nil {
		return nil, err
	}
	return c.fileTask("FileManager.moveFile", func() error { return c.h.hv.Move(from, to, isTrue(req.Force)) })
}

func copyFile(c *call, b any) (any, error) {
	req := b.(*types.CopyDatastoreFile_Task)
	from, to, err := c.fromTo(req.SourceName, req.DestinationName)
	if err != nil {
		return nil, err
	}
	return c.fileTask("FileManager.copyFile", func() error { return c.h.hv.Copy(from, to, isTrue(req.Force)) })
}

func createDisk(c *call, b any) (any, error) {
	req := b.(*types.CreateVirtualDisk_Task)
	rel, err := c.resolve(req.Name)
	if err != nil {
		return nil, err
	}
	spec, ok := req.Spec.(types.BaseFileBackedVirtualDiskSpec)
	if !ok {
		return nil, unsupported("a disk without a file")
	}
	s := spec.GetFileBackedVirtualDiskSpec()
	return c.start(c.entity(), "VirtualDiskManager.createVirtualDisk", func() (any, error) {
		err := c.h.hv.NewDisk(rel, s.CapacityKb*1024, s.DiskType == string(types.VirtualDiskTypeThin),
			s.DiskType == string(types.VirtualDiskTypeEagerZeroedThick), adapterOf(s.AdapterType))
		c.h.refreshDatastore()
		return req.Name, err
	})
}

// adapterOf turns the API's adapter type into a descriptor's.
func adapterOf(t string) string {
	switch t {
	case string(types.VirtualDiskAdapterTypeIde):
		return "ide"
	case string(types.VirtualDiskAdapterTypeBusLogic):
		return "buslogic"
	}
	return "lsilogic"
}

func deleteDisk(c *call, b any) (any, error) {
	rel, err := c.resolve(b.(*types.DeleteVirtualDisk_Task).Name)
	if err != nil {
		return nil, err
	}
	return c.fileTask("VirtualDiskManager.deleteVirtualDisk", func() error { return c.h.hv.DeleteDisk(rel) })
}

func diskID(c *call, b any) (any, error) {
	rel, err := c.resolve(b.(*types.QueryVirtualDiskUuid).Name)
	if err != nil {
		return nil, err
	}
	id, err := c.h.hv.DiskUUID(rel)
	if err != nil {
		return nil, err
	}
	return &types.QueryVirtualDiskUuidResponse{Returnval: id}, nil
}

func searchDatastore(c *call, b any) (any, error) {
	req := b.(*types.SearchDatastore_Task)
	return c.search("searchDatastore", req.DatastorePath, req.SearchSpec, false)
}

func searchDatastoreTree(c *call, b any) (any, error) {
	req := b.(*types.SearchDatastoreSubFolders_Task)
	return c.search("searchDatastoreSubFolders", req.DatastorePath, req.SearchSpec, true)
}

func (c *call) search(op, where string, spec *types.HostDatastoreBrowserSearchSpec, deep bool) (any, error) {
	rel, err := c.resolve(where)
	if err != nil {
		return nil, err
	}
	if spec == nil {
		spec = &types.HostDatastoreBrowserSearchSpec{}
	}
	for _, p := range spec.MatchPattern {
		if _, err := path.Match(p, ""); err != nil {
			return nil, invalid("searchSpec.matchPattern")
		}
	}
	return c.start(c.entity(), "HostDatastoreBrowser."+op, func() (any, error) {
		results, err := c.h.searchDir(rel, spec, deep)
		if err != nil {
			return nil, err
		}
		if deep {
			return types.ArrayOfHostDatastoreBrowserSearchResults{HostDatastoreBrowserSearchResults: results}, nil
		}
		return results[0], nil
	})
}

// searchDir is a directory's matching files, with those of the directories in
// it when deep.
func (h *Host) searchDir(rel string, spec *types.HostDatastoreBrowserSearchSpec, deep bool) ([]types.HostDatastoreBrowserSearchResults, error) {
	list, err := h.hv.List(rel)
	if err != nil {
		return nil, err
	}
	folder := h.hv.Path(rel)
	if rel != "." {
		folder += "/"
	}
	ds := h.ds.Self
	results := []types.HostDatastoreBrowserSearchResults{{Datastore: &ds, FolderPath: folder}}
	for _, fi := range list {
		if matches(fi, spec) {
			results[0].File = append(results[0].File, h.fileInfo(path.Join(rel, fi.Name()), fi, spec.Details))
		}
		if deep && fi.IsDir() {
			sub, err := h.searchDir(path.Join(rel, fi.Name()), spec, true)
			if err != nil {
				continue // it went meanwhile
			}
			results = append(results, sub...)
		}
	}
	return results, nil
}

func matches(fi fs.FileInfo, spec *types.HostDatastoreBrowserSearchSpec) bool {
	name := fi.Name()
	ok := len(spec.MatchPattern) == 0
	for _, p := range spec.MatchPattern {
		m, _ := path.Match(p, name)
		ok = ok || m
	}
	if !ok || len(spec.Query) == 0 {
		return ok
	}
	for _, q := range spec.Query {
		switch q.(type) {
		case *types.FileQuery:
			ok = true
		case *types.FolderFileQuery:
			ok = fi.IsDir()
		case *types.VmConfigFileQuery:
			ok = path.Ext(name) == ".vmx"
		case *types.VmDiskFileQuery:
			ok = isDescriptor(name)
		case *types.VmLogFileQuery:
			ok = path.Ext(name) == ".log"
		case *types.VmNvramFileQuery:
			ok = path.Ext(name) == ".nvram"
		case *types.VmSnapshotFileQuery:
			ok = path.Ext(name) == ".vmsn"
		case *types.IsoImageFileQuery:
			ok = path.Ext(name) == ".iso"
		default:
			ok = false
		}
		if ok {
			return true
		}
	}
	return false
}

// isDescriptor tells a disk from the files its data is in.
func isDescriptor(name string) bool {
	if path.Ext(name) != ".vmdk" {
		return false
	}
	for _, s := range []string{"-flat.vmdk", "-delta.vmdk", "-sesparse.vmdk", "-ctk.vmdk"} {
		if strings.HasSuffix(name, s) {
			return false
		}
	}
	return true
}

func (h *Host) fileInfo(rel string, fi fs.FileInfo, want *types.FileQueryFlags) types.BaseFileInfo {
	info := types.FileInfo{Path: fi.Name()}
	if want == nil {
		want = &types.FileQueryFlags{}
	}
	if want.FileSize {
		info.FileSize = fi.Size()
	}
	if want.Modification {
		t := fi.ModTime()
		info.Modification = &t
	}
	if want.FileOwner {
		info.Owner = "root"
	}
	switch {
	case !want.FileType:
		return &info
	case fi.IsDir():
		return &types.FolderFileInfo{FileInfo: info}
	case isDescriptor(fi.Name()):
		d := &types.VmDiskFileInfo{FileInfo: info}
		if c, err := h.hv.DiskCapacity(rel); err == nil {
			d.CapacityKb = c / 1024
		}
		return d
	}
	switch path.Ext(fi.Name()) {
	case ".vmx":
		return &types.VmConfigFileInfo{FileInfo: info}
	case ".nvram":
		return &types.VmNvramFileInfo{FileInfo: info}
	case ".log":
		return &types.VmLogFileInfo{FileInfo: info}
	case ".vmsn":
		return &types.VmSnapshotFileInfo{FileInfo: info}
	case ".iso":
		return &types.IsoImageFileInfo{FileInfo: info}
	}
	return &info
}
