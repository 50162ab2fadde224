package esxi

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"hikae/backup/esxisim"
	"hikae/backup/vmdk"
)

const hostile = "a'; rm -rf x; '"

// planes are the ways a free host is backed up by: SOAP to look and SSH to
// change, and SSH alone, each in half of the editions.
func planes(t *testing.T, test func(t *testing.T, o labOptions)) {
	for i, edition := range esxisim.Editions() {
		for n, only := range []bool{false, true} {
			if i%2 != n {
				continue
			}
			name := edition + " beside SOAP"
			if only {
				name = edition + " alone"
			}
			t.Run(name, func(t *testing.T) {
				test(t, labOptions{sim: esxisim.Options{Free: true, Edition: edition, SSH: &esxisim.SSHOptions{}}, only: only})
			})
		}
	}
}

// A whole backup's worth of calls against a host without a licence, on a VM
// whose name would do harm in a careless shell.
func TestFreeHost(t *testing.T) {
	planes(t, func(t *testing.T, o labOptions) {
		o.name = hostile
		o.disks = []int{8, 4}
		o.vm = esxisim.VMOptions{PowerOn: true, Thin: true, ChangeTracking: true}
		if o.sim.Edition == "6.5" {
			o.sim.VMFS = 5
		}
		l := start(t, o)
		if err := l.Annotate(hostile, "first\n99     fake   [datastore1] x/x.vmx   g   vmx-08\n(vim.fault.NotFound) {\n}\n\",\n   powerState = \"poweredOff\",\n   name = \"x"); err != nil {
			t.Fatal(err)
		}
		// A stranger's snapshot below ours.
		if err := l.Snapshot(hostile, "the owner's"); err != nil {
			t.Fatal(err)
		}
		l.write(0, mib, random(mib))
		vm := l.find(hostile)
		if vm.Name != hostile || vm.Power != "poweredOn" || !vm.ChangeTracking || vm.UUID == "" || vm.GuestID == "" || vm.Invalid != "" ||
			vm.HardwareVersion == "" || vm.NVRAMPath == "" || len(vm.Snapshots) != 1 || vm.Snapshots[0].Name != "the owner's" || !vm.Snapshots[0].Current {
			t.Errorf("%+v", vm)
		}
		for i, d := range vm.Disks {
			if d.Unsupported != "" || len(d.Chain) != 2 || d.UUID == "" || d.Label == "" || d.Adapter == "" || d.ChangeID == "" || !d.Thin {
				t.Errorf("disk %d: %+v", i, d)
			}
		}
		ways, err := l.host.Ways(t.Context())
		if err != nil || ways.Control != WaySSH || ways.Licence.API != APIForbidden || !ways.SSH.Reachable || ways.HTTPS.Reachable == o.only ||
			ways.About.Version == "" || ways.About.Build == "" || (ways.Reading == WaySSH) != o.only {
			t.Errorf("%+v, %v", ways, err)
		}

		want := [][]byte{l.guest(0), l.guest(1)}
		s, err := l.host.CreateSnapshot(t.Context(), vm, "hikae-1", "made by a test\nin two lines", false)
		if err != nil {
			t.Fatal(err)
		}
		l.write(0, 3*mib, random(mib)) // too late for the snapshot
		if len(s.Disks) != 2 || len(s.VM.Snapshots) != 2 || s.Name != "hikae-1" {
			t.Fatalf("%+v", s)
		}
		if _, err := l.host.OpenDisk(t.Context(), s.VM.Disks[0]); err == nil {
			t.Error("the running disk opened")
		}
		for i, d := range s.Disks {
			same(t, fmt.Sprintf("disk %d", i), readAll(t, l.open(d), mib+12345), want[i])
			table, err := l.host.TrackingFile(t.Context(), d)
			if err != nil || table.Capacity != d.Capacity || int64(len(table.Data)) < table.Size() {
				t.Errorf("tracking: %v", err)
			}
			areas, err := l.host.AllocatedAreas(t.Context(), d)
			if err != nil {
				t.Fatal(err)
			}
			zerosOutside(t, areas, want[i])
			if n := total(areas); i == 1 && n > d.Capacity/2 {
				t.Errorf("%d of %d bytes are said to be allocated", n, d.Capacity)
			}
		}
		again, err := l.host.Snapshot(t.Context(), vm, s.ID)
		if err != nil || len(again.Disks) != 2 || strings.Join(again.Disks[0].Chain, ",") != strings.Join(s.Disks[0].Chain, ",") {
			t.Errorf("again: %+v, %v", again, err)
		}
		found, err := l.host.FindSnapshots(t.Context(), vm, "hikae-1")
		if err != nil || len(found) != 1 || found[0].ID != s.ID {
			t.Errorf("found %+v, %v", found, err)
		}
		before := l.guest(0)
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Errorf("one that is gone: %v", err)
		}
		same(t, "after the merge", l.guest(0), before)
		if names, err := l.Snapshots(hostile); err != nil || len(names) != 1 || names[0] != "the owner's" {
			t.Errorf("left: %q, %v", names, err)
		}
		if now := l.find(hostile); len(now.Disks[0].Chain) != 2 || now.NeedsConsolidation {
			t.Errorf("left: %+v", now)
		}
	})
}

// zerosOutside makes sure that what lies outside of areas is zeros.
func zerosOutside(t *testing.T, areas []vmdk.Area, content []byte) {
	t.Helper()
	rest := bytes.Clone(content)
	for _, a := range areas {
		clear(rest[a.Offset:a.End()])
	}
	if i := bytes.IndexFunc(rest, func(r rune) bool { return r != 0 }); i >= 0 {
		t.Errorf("there is data at %d, outside of %v", i, areas)
	}
}

func total(areas []vmdk.Area) (n int64) {
	for _, a := range areas {
		n += a.Length
	}
	return n
}

// Restoring over SSH: a thin disk, its data alone, checked by the host.
func TestRestoreOverSSH(t *testing.T) {
	planes(t, func(t *testing.T, o labOptions) {
		o.disks = []int{1}
		l := start(t, o)
		ctx, h := t.Context(), l.host
		dir := "[datastore1] " + hostile
		if err := h.MakeDirectory(ctx, dir); err != nil {
			t.Fatal(err)
		}
		if err := h.MakeDirectory(ctx, dir); !errors.Is(err, ErrExists) {
			t.Errorf("again: %v", err)
		}
		if err := h.MakeDirectory(ctx, dir+"/a/b"); !errors.Is(err, ErrNotFound) {
			t.Errorf("without its parent: %v", err)
		}
		const size = 24*mib + 512
		w, err := h.CreateDisk(ctx, dir+"/disk.vmdk", size, Thin)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.CreateDisk(ctx, dir+"/disk.vmdk", size, Thin); !errors.Is(err, ErrExists) {
			t.Errorf("again: %v", err)
		}
		if w.Capacity() != size || w.Descriptor().Value("ddb.thinProvisioned") != "1" {
			t.Errorf("%d bytes, %+v", w.Capacity(), w.Descriptor())
		}
		content := make([]byte, size)
		var wg sync.WaitGroup
		l.ResetStats()
		var sent int
		for i, a := range []vmdk.Area{{Offset: 0, Length: 512}, {Offset: 3 * mib, Length: 3*mib + 1536}, {Offset: 10*mib + 4096, Length: 65536}, {Offset: size - 1536, Length: 1536}, {Offset: 16 * mib, Length: 5 * mib}} {
			p := content[a.Offset:a.End()]
			copy(p, random(len(p)))
			sent += len(p)
			wg.Go(func() {
				if n, err := w.WriteAtContext(ctx, p, a.Offset); err != nil || n != len(p) {
					t.Errorf("write %d: %d, %v", i, n, err)
				}
			})
		}
		wg.Wait()
		if in := l.Stats().SSH.BytesIn; w.BytesSent() != int64(sent) || in > int64(sent)*105/100 {
			t.Errorf("%d bytes sent, %d arrived, of %d", w.BytesSent(), in, sent)
		}
		for _, a := range []vmdk.Area{{Offset: 0, Length: size}, {Offset: 3 * mib, Length: 3 * mib}, {Offset: size - 512, Length: 512}} {
			hash, err := w.NewHash(ctx)
			if err != nil {
				t.Fatal(err)
			}
			hash.Write(content[a.Offset:a.End()])
			if sum, err := w.Hash(ctx, a.Offset, a.Length); err != nil || !bytes.Equal(sum, hash.Sum(nil)) {
				t.Errorf("hash of %v: %x, %v", a, sum, err)
			}
		}
		if err := w.CheckDisk(ctx); err != nil {
			t.Error(err)
		}
		for _, bad := range [][2]int64{{-512, 512}, {1, 512}, {0, 1}, {size, 512}, {0, size + 512}} {
			if _, err := w.Hash(ctx, bad[0], bad[1]); err == nil {
				t.Errorf("hashed %v", bad)
			}
		}
		config := fmt.Sprintf(`.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "13"
displayName = "%s"
guestOS = "other-64"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "disk.vmdk"
uuid.bios = "56 4d 00 00 00 00 00 00-00 00 00 00 00 00 00 01"
uuid.location = "56 4d 00 00 00 00 00 00-00 00 00 00 00 00 00 02"
`, hostile)
		vmxPath := dir + "/vm.vmx"
		for range 2 { // the second one replaces the first
			if err := h.Upload(ctx, vmxPath, strings.NewReader(config), int64(len(config))); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.Upload(ctx, dir+"/empty", strings.NewReader(""), 0); err != nil {
			t.Error(err)
		}
		if b, err := h.ReadFile(ctx, vmxPath, 1<<20); err != nil || string(b) != config {
			t.Errorf("%q, %v", b, err)
		}
		if _, err := h.ReadFile(ctx, vmxPath, 10); err == nil {
			t.Error("a file larger than its limit was read")
		}
		if _, err := h.ReadFile(ctx, dir+"/none", 10); !errors.Is(err, ErrNotFound) {
			t.Errorf("a missing file: %v", err)
		}
		broken := errors.New("broken source")
		if err := h.Upload(ctx, dir+"/x", errReader{broken}, 10); !errors.Is(err, broken) {
			t.Errorf("broken source: %v", err)
		}
		if err := h.Upload(ctx, dir+"/x", strings.NewReader("short"), 10); !errors.Is(err, errSource) {
			t.Errorf("short source: %v", err)
		}
		for _, name := range []string{"/x", "/x" + temporary} {
			if ok, err := h.Exists(ctx, dir+name); ok || err != nil {
				t.Errorf("%s: %v, %v", name, ok, err)
			}
		}
		vm, err := h.RegisterVM(ctx, vmxPath, hostile)
		if err != nil {
			t.Fatal(err)
		}
		if vm.Name != hostile || len(vm.Disks) != 1 || vm.Disks[0].Capacity != size {
			t.Errorf("%+v", vm)
		}
		if _, err := h.RegisterVM(ctx, vmxPath, hostile); !errors.Is(err, ErrExists) {
			t.Errorf("twice: %v", err)
		}
		for range 2 { // whether it was moved or copied is answered
			if err := h.PowerOn(ctx, vm); err != nil {
				t.Errorf("power on: %v", err)
			}
		}
		if now := l.find(vm.ConfigPath); now.Power != "poweredOn" {
			t.Errorf("%+v", now)
		}
		l.name = hostile
		same(t, "disk", l.guest(0), content)
		for range 2 {
			if err := h.PowerOff(ctx, vm); err != nil {
				t.Errorf("power off: %v", err)
			}
		}
		for range 2 {
			if err := h.UnregisterVM(ctx, vm); err != nil {
				t.Errorf("unregister: %v", err)
			}
		}
		for range 2 {
			if err := h.Delete(ctx, dir); err != nil {
				t.Errorf("delete: %v", err)
			}
		}
		left, err := os.ReadDir(l.dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range left {
			if e.Name() != "web01" && e.Name() != filepath.Base(esxisim.PrivateDir) {
				t.Errorf("left: %s", e.Name())
			}
		}
		if err := h.Delete(ctx, "[datastore1] "); err == nil {
			t.Error("a whole datastore was deleted")
		}
	})
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestTrackingOverBothPlanes(t *testing.T) {
	test := func(t *testing.T, o labOptions) {
		l := start(t, o)
		ctx, h := t.Context(), l.host
		state, err := h.TrackingState(ctx, l.vm)
		if err != nil || state.Enabled || state.Obstacle != nil || len(state.Disks) != 1 || state.Disks[0].Active {
			t.Fatalf("%+v, %v", state, err)
		}
		if err := l.Snapshot("web01", "mine"); err != nil {
			t.Fatal(err)
		}
		if _, err := h.EnableTracking(ctx, l.vm); !errors.Is(err, ErrSnapshots) {
			t.Errorf("with a snapshot: %v", err)
		}
		if state, err := h.TrackingState(ctx, l.vm); err != nil || !errors.Is(state.Obstacle, ErrSnapshots) {
			t.Errorf("with a snapshot: %+v, %v", state, err)
		}
		if err := l.RemoveSnapshot("web01", "mine"); err != nil {
			t.Fatal(err)
		}
		if err := l.PowerOn("web01"); err != nil {
			t.Fatal(err)
		}
		_, err = h.EnableTracking(ctx, l.vm)
		if o.sim.Free && !errors.Is(err, ErrRunning) || !o.sim.Free && err != nil {
			t.Errorf("running: %v", err)
		}
		if err := l.PowerOff("web01"); err != nil {
			t.Fatal(err)
		}
		if !o.sim.Free {
			if _, err := h.DisableTracking(ctx, l.vm); err != nil {
				t.Fatal(err)
			}
		}
		c, err := h.EnableTracking(ctx, l.vm)
		if err != nil || !c.Changed || c.Effect == "" {
			t.Fatalf("%+v, %v", c, err)
		}
		if c, err := h.EnableTracking(ctx, l.vm); err != nil || c.Changed {
			t.Errorf("again: %+v, %v", c, err)
		}
		if err := l.PowerOn("web01"); err != nil {
			t.Fatal(err)
		}
		state, err = h.TrackingState(ctx, l.vm)
		if err != nil || !state.Enabled || !state.Disks[0].Active {
			t.Errorf("%+v, %v", state, err)
		}
		s := l.snapshot("one")
		if _, err := h.TrackingFile(ctx, s.Disks[0]); err != nil {
			t.Error(err)
		}
		if err := h.RemoveSnapshot(ctx, s.ID); err != nil {
			t.Fatal(err)
		}
		if err := l.PowerOff("web01"); err != nil {
			t.Fatal(err)
		}
		if c, err := h.DisableTracking(ctx, l.vm); err != nil || !c.Changed {
			t.Errorf("%+v, %v", c, err)
		}
		entries, err := os.ReadDir(filepath.Join(l.dir, "web01"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if strings.Contains(e.Name(), "hikae") {
				t.Errorf("left: %s", e.Name())
			}
		}
		same(t, "disk", l.guest(0), l.guest(0))
	}
	planes(t, test)
	t.Run("licensed", func(t *testing.T) { test(t, labOptions{}) })
}
