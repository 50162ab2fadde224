package backup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxisim"
	"hikae/backup/vmx"
	"hikae/repo"
)

// newRepo is a world without a host.
func newRepo(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: filepath.Join(t.TempDir(), "repo"), clock: time.Date(2026, 11, 22, 2, 0, 0, 0, time.UTC)}
	must(t, repo.Init(t.Context(), w.dir, repo.InitOptions{Passphrase: passphrase, KDF: repo.KDF{Time: 1, MemoryKiB: 64, Threads: 1}}))
	w.open()
	return w
}

var imported = repo.VMID{Host: "attic", Name: "old01"}

func (w *world) importDisks(change func(*ImportOptions), disks ...string) Result {
	w.t.Helper()
	o := ImportOptions{Repo: w.repo, VM: imported, Disks: disks, Clock: w.now, Logger: logger(w.t)}
	if change != nil {
		change(&o)
	}
	res, err := Import(w.t.Context(), o)
	if err != nil {
		w.t.Fatalf("import: %v", err)
	}
	return res
}

func (w *world) sameAsFile(ref repo.Ref, disk int, raw string) {
	w.t.Helper()
	d, err := w.generation(ref).OpenDisk(disk)
	must(w.t, err)
	f, err := os.Open(raw)
	must(w.t, err)
	defer f.Close()
	equal(w.t, raw, repoDisk{d}, fileDisk{f})
}

// change writes noise into a copy of an image and lists what it wrote.
func changeImage(t *testing.T, raw string, seed uint64, areas ...area) (changed, list string) {
	t.Helper()
	data, err := os.ReadFile(raw)
	must(t, err)
	var b strings.Builder
	b.WriteString("start,length,kind\n# a comment\n")
	for _, a := range areas {
		copy(data[a.Offset:a.End()], noise(int(a.Length), seed+uint64(a.Offset)))
		fmt.Fprintf(&b, "%d,%d,data\n", a.Offset, a.Length)
	}
	dir := t.TempDir()
	changed, list = filepath.Join(dir, "changed.raw"), filepath.Join(dir, "changed.csv")
	must(t, os.WriteFile(changed, data, 0o600))
	must(t, os.WriteFile(list, []byte(b.String()), 0o600))
	return changed, list
}

func TestImport(t *testing.T) {
	w := newRepo(t)
	raw := image(t, 40*mib+512, 1, area0(0, 6*mib), area0(30*mib, mib))
	when := time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)
	must(t, os.Chtimes(raw, when, when))
	first := w.importDisks(nil, raw)
	if first.Mode != repo.ModeImport || first.Consistency != repo.ConsistencyUnknown || first.Generation != "2020-02-03T04-05-06Z" {
		t.Errorf("%+v", first)
	}
	if first.BytesRead > 8*mib {
		t.Errorf("%d bytes of a sparse image were read", first.BytesRead)
	}
	w.sameAsFile(first.Ref, 0, raw)

	next, list := changeImage(t, raw, 9, area0(2*mib+5, 1000), area0(39*mib, mib+512))
	compared := w.importDisks(nil, next)
	if compared.BytesStored > 2*mib || !strings.Contains(compared.Reason, "compared with generation 2020-02-03T04-05-06Z") {
		t.Errorf("%+v", compared)
	}
	w.sameAsFile(compared.Ref, 0, next)

	third, list3 := changeImage(t, next, 10, area0(3*mib, 200000))
	res := w.importDisks(func(o *ImportOptions) { o.Changed = []string{list3}; o.Time = when.Add(time.Hour) }, third)
	if res.BytesRead > 400*kib || res.BytesRead != res.BytesChanged || res.BytesAudited == 0 || res.Generation != "2020-02-03T05-05-06Z" {
		t.Errorf("%+v", res)
	}
	w.sameAsFile(res.Ref, 0, third)

	// The wrong list is found out by the sample.
	lied := w.importDisks(func(o *ImportOptions) { o.Changed = []string{list}; o.AuditBlocks = 1000 }, raw)
	if !strings.Contains(lied.Reason, "said to be unchanged") {
		t.Errorf("%+v", lied)
	}
	w.sameAsFile(lied.Ref, 0, raw)

	// Grown, and shrunk.
	grown := filepath.Join(t.TempDir(), "grown.raw")
	data, err := os.ReadFile(third)
	must(t, err)
	data = append(data, noise(3*mib, 77)...)
	must(t, os.WriteFile(grown, data, 0o600))
	w.importDisks(nil, third)
	empty := filepath.Join(t.TempDir(), "none.csv")
	must(t, os.WriteFile(empty, nil, 0o600))
	bigger := w.importDisks(func(o *ImportOptions) { o.Changed = []string{empty} }, grown)
	if bigger.BytesRead > 4*mib {
		t.Errorf("%+v", bigger)
	}
	w.sameAsFile(bigger.Ref, 0, grown)
	w.sameAsFile(w.importDisks(nil, raw).Ref, 0, raw)
	w.checkRepo()
}

func TestImportNamesAndConfiguration(t *testing.T) {
	w := newRepo(t)
	dir := t.TempDir()
	a := image(t, 2*mib, 1, area0(0, mib))
	b := image(t, 3*mib, 2, area0(0, mib))
	g := w.generation(w.importDisks(nil, a, b).Ref)
	m := g.Manifest()
	if m.Disks[0].Name != "old01" || m.Disks[1].Name != "old01_1" {
		t.Errorf("names %s and %s", m.Disks[0].Name, m.Disks[1].Name)
	}
	config, err := vmx.Parse(m.Files[0].Data)
	must(t, err)
	if d := config.Disks(); len(d) != 2 || d[1].File != "old01_1.vmdk" {
		t.Errorf("a made configuration has %v", d)
	}

	// A real copy of a VM: its own configuration, a descriptor, firmware settings.
	must(t, os.Rename(b, filepath.Join(dir, "data-flat.vmdk")))
	descriptor := strings.ReplaceAll(m.Disks[1].Descriptor, "old01_1-flat", "data-flat")
	must(t, os.WriteFile(filepath.Join(dir, "data.vmdk"), []byte(descriptor), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "vm.nvram"), []byte("settings"), 0o600))
	text := "scsi0:0.fileName = \"boot.vmdk\"\nscsi0:1.fileName = \"data-000003.vmdk\"\nscsi0:2.fileName = \"lost.vmdk\"\nnvram = \"vm.nvram\"\n"
	must(t, os.WriteFile(filepath.Join(dir, "vm.vmx"), []byte(text), 0o600))
	res := w.importDisks(func(o *ImportOptions) {
		o.VM.Name, o.VMX = "other", filepath.Join(dir, "vm.vmx")
	}, filepath.Join(dir, "data.vmdk"), a)
	m = w.generation(res.Ref).Manifest()
	var names []string
	for _, f := range m.Files {
		names = append(names, f.Name)
		if strings.HasSuffix(f.Name, ".vmx") {
			config, err = vmx.Parse(f.Data)
			must(t, err)
		}
	}
	if !slices.Equal(names, []string{"vm.nvram", "vm.vmx"}) {
		t.Errorf("files %v", names)
	}
	want := []vmx.Disk{{Slot: "scsi0:0", File: "other_1.vmdk"}, {Slot: "scsi0:1", File: "data.vmdk"}}
	if got := config.Disks(); !slices.Equal(got, want) {
		t.Errorf("the configuration attaches %v", got)
	}
	if len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "lost.vmdk") {
		t.Errorf("%q", res.Warnings)
	}
	w.sameAsFile(res.Ref, 0, filepath.Join(dir, "data-flat.vmdk"))
}

// Formats of other programs, with qemu-img as their writer.
func TestImportFormats(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("qemu-img is missing: apt-get install qemu-utils")
		}
		t.Skip("needs qemu-img")
	}
	w := newRepo(t)
	raw := image(t, 20*mib, 1, area0(0, 3*mib), area0(15*mib, mib))
	for _, format := range []string{"monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse"} {
		file := filepath.Join(t.TempDir(), "disk.vmdk")
		out, err := exec.Command("qemu-img", "convert", "-O", "vmdk", "-o", "subformat="+format, raw, file).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", format, err, out)
		}
		res := w.importDisks(nil, file)
		w.sameAsFile(res.Ref, 0, raw)
		if name := res.Disks[0].Name; name != "disk" {
			t.Errorf("%s: the disk is called %s", format, name)
		}
	}
}

// What was imported can be restored and starts.
func TestImportedIsRestored(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	raw := image(t, 6*mib, 1, area0(0, mib), area0(5*mib, mib))
	res := w.importDisks(nil, raw)
	o := w.restoreOptions(res.Ref)
	o.PowerOn = true
	back, err := Restore(t.Context(), o)
	must(t, err)
	if !back.PoweredOn || back.Identity != IdentityKeep {
		t.Errorf("%+v", back)
	}
	d, err := w.generation(res.Ref).OpenDisk(0)
	must(t, err)
	equal(t, "restored", repoDisk{d}, simDisk{w.sim, imported.Name, 0})
}

func TestReadChanged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list.csv")
	for text, want := range map[string][]area{
		"":                                    {},
		"start,length\n5,5\n":                 {area0(5, 5)},
		"# x\n\n 7 , 2 ,zero,more\r\n":        {area0(7, 2)},
		"10,10\n0,11\n95,9223372036854775807": {area0(0, 20), area0(95, 5)},
		"1":                                   nil,
		"start,length\nx,y":                   nil,
		"-1,5":                                nil,
		"100,1":                               nil,
		"99999999999999999999,1":              nil,
		"a,1\n1,1":                            nil,
	} {
		must(t, os.WriteFile(file, []byte(text), 0o600))
		got, err := ReadChanged(file, 100)
		if (err != nil) != (want == nil) || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

func FuzzReadChanged(f *testing.F) {
	f.Add("start,length,kind\n0,65536,data\n# x\n131072,9223372036854775807,zero\r\n", int64(1<<20))
	f.Add("1,2\n1,2,3,4\n-5,7", int64(0))
	f.Fuzz(func(t *testing.T, text string, capacity int64) {
		capacity = max(capacity, 0)
		list, err := parseChanged(strings.NewReader(text), "list", capacity)
		if err == nil && !isTidy(list, capacity) {
			t.Fatalf("%q: %v on a disk of %d", text, list, capacity)
		}
	})
}
