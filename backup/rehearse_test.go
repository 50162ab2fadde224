package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hikae/backup/vmdk"
	"hikae/backup/vmx"
	"hikae/repo"
)

// program finds a program that a test needs; with CI set it has to be there.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if found, err := exec.LookPath(p); err == nil {
			return found
		}
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("CI is set and %s is not installed", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

func output(t *testing.T, stdin, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// guestDisk is a disk with a GPT and one ext4 partition from 1 MiB on.
func guestDisk(t *testing.T) string {
	t.Helper()
	sfdisk, mke2fs := program(t, "sfdisk"), program(t, "mke2fs")
	raw := filepath.Join(t.TempDir(), "disk.raw")
	must(t, os.WriteFile(raw, nil, 0o600))
	must(t, os.Truncate(raw, 64*mib))
	output(t, "label: gpt\nstart=2048,size=122880\n", sfdisk, "-q", raw)
	output(t, "", mke2fs, "-q", "-t", "ext4", "-b", "1024", "-O", "metadata_csum", "-L", "data", "-E", "offset=1048576", raw, "60M")
	return raw
}

func (w *world) rehearse(ref repo.Ref, change ...func(*RehearseOptions)) Rehearsed {
	w.t.Helper()
	o := RehearseOptions{Repo: w.repo, Clock: w.now, Logger: logger(w.t)}
	for _, c := range change {
		c(&o)
	}
	got, err := NewRehearsal(o).Run(w.t.Context(), ref)
	must(w.t, err)
	return got
}

func TestRehearse(t *testing.T) {
	w := newRepo(t)
	raw := guestDisk(t)
	data, err := os.ReadFile(raw)
	must(t, err)
	ref := w.importDisks(nil, raw).Ref
	var last, all int64
	got := w.rehearse(ref, func(o *RehearseOptions) { o.Progress = func(done, total int64) { last, all = done, total } })
	if !got.OK || got.Quick || got.Verified == nil || len(got.Problems) > 0 || got.BytesCapacity != 64*mib || len(got.Disks) != 1 || got.Damaged() {
		t.Fatalf("%+v", got)
	}
	d := got.Disks[0]
	if d.Table.Kind != "gpt" || !slices.Contains(d.Table.Proved, "second copy") || len(d.Partitions) != 1 {
		t.Fatalf("%+v", d)
	}
	if c := d.Partitions[0].Content; c.Kind != "ext4" || c.Label != "data" || c.Bytes != 60*mib || !slices.Contains(c.Proved, "backup superblock") {
		t.Errorf("%+v", c)
	}
	if d.Proof == nil || d.Proof.BlocksRead != d.Proof.Blocks || d.Proof.BytesData != d.BytesData || last != d.BytesData || all != d.BytesData {
		t.Errorf("%+v, progress ended at %d of %d", d.Proof, last, all)
	}
	v, err := w.repo.Verification(t.Context(), ref)
	if err != nil || !v.Time.Equal(*got.Verified) || v.Blocks != d.Proof.Blocks || v.Bytes != d.BytesData {
		t.Errorf("%+v, %v", v, err)
	}

	// Without blocks nothing is proved, so nothing is remembered.
	quick := w.rehearse(ref, func(o *RehearseOptions) { o.Quick = true })
	if !quick.OK || quick.Disks[0].Proof != nil || quick.Verified != nil || quick.Disks[0].Partitions[0].Content.Kind != "ext4" {
		t.Errorf("%+v", quick)
	}

	// As if changes had been missed: the superblock is of another day than its
	// checksum, and one copy of the table is lost. All blocks are whole.
	stale := bytes.Clone(data)
	stale[mib+1024+0x90]++
	clear(stale[64*mib-512:])
	must(t, os.WriteFile(raw, stale, 0o600))
	bad := w.importDisks(nil, raw).Ref
	got = w.rehearse(bad)
	if got.OK || got.Damaged() || got.Verified != nil || len(got.Problems) != 2 || got.Disks[0].Proof.BytesBad != 0 {
		t.Fatalf("%+v", got)
	}
	for i, want := range []string{"second copy of the GPT is not at byte", "partition 1, ext4: superblock checksum: wrong"} {
		if p := got.Problems[i]; !strings.Contains(p.What, want) || p.Remedy != remedyGuest || p.Disk == "" {
			t.Errorf("%+v, want %q", p, want)
		}
	}
	if got.Problems[1].Offset != mib {
		t.Errorf("%+v", got.Problems[1])
	}
	if _, err := w.repo.Verification(t.Context(), bad); !errors.Is(err, repo.ErrNotFound) {
		t.Errorf("it was remembered: %v", err)
	}

	// In one rehearsal what both have is read once.
	both := NewRehearsal(RehearseOptions{Repo: w.repo, Clock: w.now})
	_, err = both.Run(t.Context(), ref)
	must(t, err)
	got, err = both.Run(t.Context(), bad)
	must(t, err)
	if p := got.Disks[0].Proof; p.BlocksRead != 2 || p.Blocks < 4 {
		t.Errorf("%+v", p)
	}

	if _, err := both.Run(t.Context(), repo.Ref{VM: ref.VM, Sequence: 99, Time: ref.Time}); !errors.Is(err, repo.ErrNotFound) {
		t.Errorf("one that is not there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := both.Run(ctx, ref); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestRehearseNamesDamage(t *testing.T) {
	w := newRepo(t)
	raw := image(t, 20*mib, 3, area0(0, mib), area0(10*mib, mib))
	ref := w.importDisks(nil, raw).Ref
	packs, err := filepath.Glob(filepath.Join(w.dir, "packs", "*", "*"))
	if err != nil || len(packs) != 1 {
		t.Fatalf("%q, %v", packs, err)
	}
	info, err := os.Stat(packs[0])
	must(t, err)
	// The last record of the pack is the last block of the disk's data.
	f, err := os.OpenFile(packs[0], os.O_WRONLY, 0)
	if errors.Is(err, os.ErrPermission) {
		must(t, os.Chmod(packs[0], 0o600))
		f, err = os.OpenFile(packs[0], os.O_WRONLY, 0)
	}
	must(t, err)
	_, err = f.WriteAt([]byte("rot"), info.Size()-48-(16*48+16)-1000)
	must(t, errors.Join(err, f.Close()))
	w.open()
	got := w.rehearse(ref)
	if got.OK || !got.Damaged() || got.Verified != nil || len(got.Problems) != 1 || got.Disks[0].Proof.BytesBad != 128*kib {
		t.Fatalf("%+v", got)
	}
	p := got.Problems[0]
	if p.Length != 128*kib || p.Pack != filepath.Base(packs[0]) || p.PackOffset == 0 || !p.Damage || p.Remedy != remedyDamage || p.Disk != "old01" {
		t.Errorf("%+v", p)
	}
	// Where it says, and nowhere else.
	d, err := w.generation(ref).OpenDisk(0)
	must(t, err)
	for off := int64(0); off < d.Size(); off += 128 * kib {
		if _, err := d.ReadAt(make([]byte, 128*kib), off); (off == p.Offset) != errors.Is(err, repo.ErrDamaged) {
			t.Errorf("at %d: %v", off, err)
		}
	}

	// A manifest that does not open is a finding as well.
	manifests, err := filepath.Glob(filepath.Join(w.dir, "generations", "*", "00000*"))
	if err != nil || len(manifests) != 1 {
		t.Fatalf("%q, %v", manifests, err)
	}
	must(t, os.Chmod(manifests[0], 0o600))
	text, err := os.ReadFile(manifests[0])
	must(t, err)
	text[100]++
	must(t, os.WriteFile(manifests[0], text, 0o600))
	got = w.rehearse(ref)
	if got.OK || len(got.Problems) != 1 || !got.Problems[0].Damage || got.Problems[0].Remedy != remedyManifest {
		t.Errorf("%+v", got)
	}
}

// stored makes a generation of one disk of zeros as a stranger might.
func (w *world) stored(second int, change func(m *repo.Manifest)) repo.Ref {
	w.t.Helper()
	s, err := w.repo.Begin(w.t.Context(), repo.SessionOptions{})
	must(w.t, err)
	defer s.Close()
	m := repo.Manifest{VM: imported, Time: w.clock.AddDate(0, 0, second), Mode: repo.ModeImport, Consistency: repo.ConsistencyUnknown}
	for i := range 2 {
		d, err := s.Disk(w.t.Context(), 4*mib, nil)
		must(w.t, err)
		tree, err := d.Finish(w.t.Context())
		must(w.t, err)
		name := fmt.Sprintf("disk%d", i)
		m.Disks = append(m.Disks, repo.DiskManifest{
			Key: int32(2000 + i), Name: name, Capacity: tree.Capacity, DataBytes: tree.DataBytes, Root: tree.Root, Levels: tree.Levels,
			Descriptor: string(vmdk.NewFlatDescriptor(name, tree.Capacity, "", true, "", 7).Bytes()),
		})
	}
	config := vmx.New(vmx.Minimal{Name: "old01", Disks: []string{"disk0.vmdk", "disk1.vmdk"}})
	m.Files = []repo.ManifestFile{{Name: "old01.vmx", Data: config.Bytes()}}
	change(&m)
	ref, err := s.Commit(w.t.Context(), m)
	must(w.t, err)
	return ref
}

func TestRehearseComparesFiles(t *testing.T) {
	w := newRepo(t)
	descriptor := func(change func(d *vmdk.Descriptor)) func(*repo.Manifest) {
		return func(m *repo.Manifest) {
			d, err := vmdk.ParseDescriptor([]byte(m.Disks[1].Descriptor))
			must(t, err)
			change(d)
			m.Disks[1].Descriptor = string(d.Bytes())
		}
	}
	config := func(change func(c *vmx.File)) func(*repo.Manifest) {
		return func(m *repo.Manifest) {
			c, err := vmx.Parse(m.Files[0].Data)
			must(t, err)
			change(c)
			m.Files[0].Data = c.Bytes()
		}
	}
	for i, c := range []struct {
		want   []string
		change func(m *repo.Manifest)
	}{
		{nil, func(*repo.Manifest) {}},
		{[]string{"there is no configuration"}, func(m *repo.Manifest) { m.Files = nil }},
		{[]string{"there are 2 configurations"}, func(m *repo.Manifest) {
			m.Files = append(m.Files, repo.ManifestFile{Name: "b.vmx", Data: m.Files[0].Data})
		}},
		{[]string{"old01.vmx cannot be read"}, func(m *repo.Manifest) { m.Files[0].Data = []byte("\x00") }},
		{[]string{"does not attach it"}, config(func(c *vmx.File) { c.RemoveDevice("scsi0:1") })},
		{[]string{"attaches other.vmdk at scsi0:1, which is not there", "does not attach it"}, config(func(c *vmx.File) { c.SetDisk("scsi0:1", "other.vmdk") })},
		{[]string{"attaches disk0.vmdk twice", "does not attach it"}, config(func(c *vmx.File) { c.SetDisk("scsi0:1", "disk0.vmdk") })},
		{[]string{"it has no descriptor"}, func(m *repo.Manifest) { m.Disks[1].Descriptor = "" }},
		{[]string{"its descriptor cannot be read"}, func(m *repo.Manifest) { m.Disks[1].Descriptor = "nonsense" }},
		{[]string{"its descriptor says 4193792 bytes, it has 4194304"}, descriptor(func(d *vmdk.Descriptor) { d.Extents[0].Sectors-- })},
		{[]string{"asks for a parent disk, \"base.vmdk\""}, descriptor(func(d *vmdk.Descriptor) { d.ParentCID, d.ParentFileNameHint = 5, "/x/base.vmdk" })},
		{[]string{"names x-flat.vmdk, which is not there"}, descriptor(func(d *vmdk.Descriptor) { d.Extents[0].File = "x-flat.vmdk" })},
		{[]string{"wants 4194816 bytes of disk1-flat.vmdk, which has 4194304"}, descriptor(func(d *vmdk.Descriptor) { d.Extents[0].Type, d.Extents[0].Offset = vmdk.ExtentFlat, 1 })},
	} {
		got := w.rehearse(w.stored(i+1, c.change))
		if got.OK != (c.want == nil) || got.Damaged() || len(got.Problems) != len(c.want) {
			t.Errorf("%q: %+v", c.want, got.Problems)
			continue
		}
		for i, want := range c.want {
			if !strings.Contains(got.Problems[i].What, want) || got.Problems[i].Remedy != remedyFiles {
				t.Errorf("%+v, want %q", got.Problems[i], want)
			}
		}
	}
}
