package backup

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hikae/backup/esxi"
	"hikae/backup/vmx"
)

func TestDiskNamesDiffer(t *testing.T) {
	n := newNames("web01")
	var got []string
	for _, d := range []string{"web01.vmdk", "web01-000002.vmdk", "WEB01.vmdk", "web01-2.vmdk", "a.vmdk", "a-flat.vmdk", "", "../x.vmdk", "-000001.vmdk", "..", strings.Repeat("é", 200)} {
		got = append(got, n.disk(d))
	}
	want := []string{"web01", "web01-2", "WEB01-3", "web01-2-2", "a", "a-flat-2", "disk", ".._x", "-000001", "disk-2", strings.Repeat("é", 80)}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	seen := map[string]bool{}
	for _, name := range got {
		for _, f := range []string{name + ".vmdk", name + "-flat.vmdk"} {
			if f = strings.ToLower(f); seen[f] {
				t.Errorf("%s twice", f)
			}
			seen[f] = true
		}
	}
}

func TestRename(t *testing.T) {
	config, err := vmx.Parse([]byte(`scsi0:0.fileName = "web-000001.vmdk"
scsi0:1.fileName = "/vmfs/volumes/other/web/data-000001.vmdk"
scsi0:2.fileName = "stray.vmdk"
`))
	if err != nil {
		t.Fatal(err)
	}
	disks := []esxi.Disk{
		{Label: "Hard disk 1", Controller: "scsi0", Unit: 0, Chain: []string{"[ds] web/web.vmdk", "[ds] web/web-000001.vmdk"}},
		{Label: "Hard disk 2", Chain: []string{"[other] web/data.vmdk", "[other] web/data-000001.vmdk"}},
		{Label: "Hard disk 3", Controller: "sata0", Unit: 3, Chain: []string{"[ds] web/three.vmdk"}},
	}
	warnings := rename(config, disks, []string{"web", "data", "three"})
	if d := cmp.Diff([]vmx.Disk{{Slot: "scsi0:0", File: "web.vmdk"}, {Slot: "scsi0:1", File: "data.vmdk"}, {Slot: "scsi0:2", File: "stray.vmdk"}}, config.Disks()); d != "" {
		t.Error(d)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], "stray.vmdk") || !strings.Contains(warnings[1], "Hard disk 3") {
		t.Errorf("%q", warnings)
	}
}
