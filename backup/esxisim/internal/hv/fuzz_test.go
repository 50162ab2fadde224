package hv

import (
	"os"
	"testing"

	"hikae/backup/vmx"
)

// FuzzSnapshotList feeds anything as a .vmsd and .vmsn: it is refused or read,
// and what was read can be written and read again.
func FuzzSnapshotList(f *testing.F) {
	f.Add([]byte(`snapshot.lastUID = "2"
snapshot.current = "2"
snapshot0.uid = "1"
snapshot0.filename = "a.vmsn"
snapshot0.displayName = "one"
snapshot0.createTimeHigh = "390845"
snapshot0.createTimeLow = "-1386474960"
snapshot0.numDisks = "1"
snapshot0.disk0.fileName = "vm.vmdk"
snapshot0.disk0.node = "scsi0:0"
snapshot1.uid = "2"
snapshot1.filename = "a.vmsn"
snapshot1.parent = "1"
snapshot1.displayName = "two"
snapshot.numSnapshots = "2"
`))
	f.Add([]byte(`snapshot.numSnapshots = "99999999999"`))
	f.Add([]byte("snapshot.numSnapshots = \"1\"\nsnapshot0.uid = \"1\"\nsnapshot0.parent = \"1\"\nsnapshot0.filename = \"a.vmsn\""))
	dir := f.TempDir()
	h := &Host{o: Options{Dir: dir, Datastore: "datastore1"}}
	if err := os.Mkdir(dir+"/vm", 0o700); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, name := range []string{"vm.vmsd", "a.vmsn"} {
			if err := os.WriteFile(dir+"/vm/"+name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		vm := &VM{h: h, path: "vm/vm.vmx", x: &vmx.File{}}
		if vm.loadSnapshots() != nil {
			return
		}
		for _, s := range vm.snaps {
			if err := os.WriteFile(dir+"/vm/"+s.file(vm), s.encode(), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := vm.writeVMSD(); err != nil {
			t.Fatal(err)
		}
		again := &VM{h: h, path: "vm/vm.vmx", x: &vmx.File{}}
		if err := again.loadSnapshots(); err != nil {
			t.Fatalf("written by itself: %v", err)
		}
		if len(again.snaps) != len(vm.snaps) || again.current != vm.current {
			t.Errorf("%d snapshots, current %d; then %d, %d", len(vm.snaps), vm.current, len(again.snaps), again.current)
		}
		for i, s := range vm.snaps {
			if b := again.snaps[i]; b.Name != s.Name || b.Description != s.Description || b.Parent != s.Parent || len(b.Disks) != len(s.Disks) {
				t.Errorf("%+v came back as %+v", s, b)
			}
		}
	})
}
