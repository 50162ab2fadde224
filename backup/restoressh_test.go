package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/backup/vmdk"
	"hikae/repo"
)

const hostile = "a'; rm -rf x; '"

// newShellWorld is a world whose host has SSH; only closes port 443.
func newShellWorld(t *testing.T, o esxisim.Options, only bool) *world {
	t.Helper()
	if o.SSH == nil {
		o.SSH = &esxisim.SSHOptions{}
	}
	w := newWorld(t, o)
	w.host.Close(context.Background())
	var err error
	w.host, err = esxi.Connect(t.Context(), shellConfig(w.sim.Address(), w.sim.Thumbprint(), w.sim.SSHAddress(), w.sim.SSHFingerprint(), w.sim.User(), w.sim.Password(), only))
	must(t, err)
	t.Cleanup(func() { w.host.Close(context.Background()) })
	return w
}

func shellConfig(address, thumbprint, ssh, fingerprint, user, password string, only bool) esxi.Config {
	c := esxi.Config{
		Name: "esx1", Address: address, Thumbprint: thumbprint, User: user, Password: func() (string, error) { return password, nil },
		SSH: &esxi.SSHConfig{Address: ssh, Fingerprint: fingerprint},
	}
	if only {
		c.Address = ""
	}
	return c
}

// same compares all disks of a generation with those of a VM.
func (w *world) same(ref repo.Ref, vm string) {
	w.t.Helper()
	g := w.generation(ref)
	for i, m := range g.Manifest().Disks {
		d, err := g.OpenDisk(i)
		must(w.t, err)
		equal(w.t, m.Label, repoDisk{d}, simDisk{w.sim, vm, i})
	}
}

// empty fails when something is left of a restore: files, a VM, journal entries.
func (w *world) empty(folder string) {
	w.t.Helper()
	if w.folderExists(folder) {
		files, _ := filepath.Glob(filepath.Join(w.store, folder, "*"))
		w.t.Errorf("files are left: %q", files)
	}
	for _, name := range w.sim.VMs() {
		if name == folder {
			w.t.Errorf("the VM %s is left", name)
		}
	}
	if entries, _ := filepath.Glob(filepath.Join(w.state, "journal", "*.restore*")); len(entries) > 0 {
		w.t.Errorf("the journal still has %v", entries)
	}
}

// The same bytes come back on every edition, with a licence and without, of VMs
// whose names would do harm in a careless shell; only data crosses the wire.
func TestRestoreOverSSH(t *testing.T) {
	for i, edition := range esxisim.Editions() {
		free, only := i%4 != 1, i%2 == 1 && i > 1
		t.Run(fmt.Sprintf("%s free=%v only=%v", edition, free, only), func(t *testing.T) {
			w := newShellWorld(t, esxisim.Options{Edition: edition, Free: free}, only)
			w.addVM(hostile, esxisim.VMOptions{ChangeTracking: true, Thin: true},
				image(t, 24*mib, 1, area0(0, 5*mib), area0(12*mib+128*kib, 64*kib), area0(23*mib, mib)), image(t, 9*mib+512, 2, area0(mib, mib)), image(t, mib, 3))
			ref := w.backup(func(o *Options) { o.VM = hostile }).Ref
			original, err := w.host.VM(t.Context(), hostile)
			must(t, err)
			must(t, w.host.UnregisterVM(t.Context(), original))
			w.sim.ResetStats()
			o := w.restoreOptions(ref)
			o.PowerOn = true
			res, err := Restore(t.Context(), o)
			must(t, err)
			stats := w.sim.Stats()
			if res.Way != WaySSH || res.WayReason != "" || !res.PoweredOn || res.Identity != IdentityKeep || len(res.Warnings) > 0 ||
				res.Folder != "[datastore1] "+hostile+"-1" || res.BytesSent != res.BytesData || res.BytesVerified < res.BytesData {
				t.Errorf("%+v", res)
			}
			if in := stats.SSH.BytesIn + stats.Folder.BytesIn; in > res.BytesData*105/100 {
				t.Errorf("%d bytes crossed the wire for %d of data", in, res.BytesData)
			}
			if out := stats.SSH.BytesOut + stats.Folder.BytesOut; out > mib {
				t.Errorf("%d bytes were read back", out)
			}
			w.same(ref, hostile)
			back, err := w.host.VM(t.Context(), hostile)
			must(t, err)
			if back.UUID != original.UUID || back.Power != "poweredOn" {
				t.Errorf("restored: %+v", back)
			}
			for n, d := range back.Disks {
				if !d.Thin || d.UUID != original.Disks[n].UUID {
					t.Errorf("disk %d was %+v and is %+v", n, original.Disks[n], d)
				}
			}
			w.empty("none")
			// It is a VM like any other, and a backup of it finds nothing new.
			again := w.backup(func(o *Options) { o.VM = hostile })
			if again.BytesStored > 200*kib {
				t.Errorf("the restored VM's backup stored %d bytes", again.BytesStored)
			}
			if !w.folderExists(hostile) {
				t.Error("the original's folder is gone")
			}
		})
	}
}

// Disks become what they were, or what was asked for.
func TestRestoreProvisioning(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: false}, image(t, 8*mib, 1, area0(0, mib)))
	ref := w.backup().Ref
	for i, c := range []struct {
		ask  esxi.Provisioning
		thin bool
	}{{"", false}, {esxi.Thin, true}, {esxi.ThickLazy, false}, {esxi.ThickEager, false}} {
		o := w.restoreOptions(ref)
		o.Name, o.Provisioning = fmt.Sprintf("copy%d", i), c.ask
		_, err := Restore(t.Context(), o)
		must(t, err)
		w.same(ref, o.Name)
		vm, err := w.host.VM(t.Context(), o.Name)
		must(t, err)
		if vm.Disks[0].Thin != c.thin {
			t.Errorf("asked for %q: %+v", c.ask, vm.Disks[0])
		}
		text, err := w.host.ReadFile(t.Context(), vm.Disks[0].Chain[0], vmdk.MaxDescriptor)
		must(t, err)
		d, err := vmdk.ParseDescriptor(text)
		must(t, err)
		if (d.Value("ddb.thinProvisioned") == "1") != c.thin || d.Value("ddb.uuid") == "" {
			t.Errorf("asked for %q:\n%s", c.ask, text)
		}
	}
}

// Room is what thin disks hold, and what thick ones can.
func TestRestoreRoomOverSSH(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true, DatastoreBytes: 16 << 30}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 4<<30, 1, area0(0, 2*mib)))
	ref := w.backup().Ref
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSpace, Free: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	o := w.restoreOptions(ref)
	o.Name, o.Provisioning = "copy", esxi.ThickLazy
	_, err := Restore(t.Context(), o)
	if !errors.Is(err, ErrNoRoom) || !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "has 1.0 GiB free and the VM needs 4.1 GiB (4.0 GiB of thick disks") {
		t.Errorf("%v", err)
	}
	w.empty("copy")
	o.Provisioning = ""
	_, err = Restore(t.Context(), o)
	must(t, err)
	w.same(ref, "copy")
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSpace, Free: 60 * mib}); err != nil {
		t.Fatal(err)
	}
	o.Name = "copy2"
	if _, err = Restore(t.Context(), o); !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "2.0 MiB of data on thin disks") {
		t.Errorf("%v", err)
	}
}

// Whatever goes wrong over SSH, what was made is removed, and nothing else.
func TestRestoreOverSSHUndone(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 16*mib, 1, area0(0, 8*mib)), image(t, 2*mib, 2, area0(0, mib)))
	ref := w.backup().Ref
	command := func(text, message string) esxisim.Fault {
		return esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: text, Message: message, Status: 1, Count: -1}
	}
	for name, c := range map[string]struct {
		fault esxisim.Fault
		is    error
		says  string
	}{
		"folder":              {command("mkdir", "Permission denied"), esxi.ErrDenied, "does not permit"},
		"create, full":        {command("vmkfstools -c", "Failed to create virtual disk: There is not enough space on the file system for the selected operation (13)."), esxi.ErrNoSpace, "datastore is full"},
		"write, full":         {command("dd of=", "dd: error writing: No space left on device"), esxi.ErrNoSpace, "datastore is full"},
		"hash":                {command("dd if=", "dd: Input/output error"), nil, "Input/output error"},
		"check":               {command("vmkfstools -e", "Disk chain is not consistent"), nil, "not consistent"},
		"configuration, full": {command("dd of=/vmfs/volumes/datastore1/copy/copy.vmx", "dd: No space left on device"), esxi.ErrNoSpace, "datastore is full"},
		"register":            {esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "solo/registervm", Fault: "GenericVmConfigFault", Count: -1}, nil, "register"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := w.sim.Inject(c.fault); err != nil {
				t.Fatal(err)
			}
			o := w.restoreOptions(ref)
			o.Name = "copy"
			_, err := Restore(t.Context(), o)
			w.sim.ClearFaults()
			if err == nil || !strings.Contains(err.Error(), "was removed again") || !strings.Contains(err.Error(), c.says) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v", err)
			}
			w.empty("copy")
		})
	}
	for _, at := range []int64{0, 3 * mib, 9 * mib} {
		t.Run(fmt.Sprintf("datastore full after %d bytes", at), func(t *testing.T) {
			o := w.restoreOptions(ref)
			o.Name = "copy"
			full := false
			o.Progress = func(e Event) {
				if e.Phase == PhaseUpload && e.Done >= at && !full {
					full = true
					if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSpace}); err != nil {
						t.Error(err)
					}
				}
			}
			_, err := Restore(t.Context(), o)
			w.sim.ClearFaults()
			if !errors.Is(err, esxi.ErrNoSpace) || !strings.Contains(err.Error(), "was removed again") {
				t.Errorf("%v", err)
			}
			w.empty("copy")
		})
	}
	for _, phase := range []string{PhaseUpload, PhaseVerify, PhaseRegister} {
		t.Run("cancelled in "+phase, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := w.restoreOptions(ref)
			o.Name = "copy"
			o.Progress = func(e Event) {
				if e.Phase == phase && (phase != PhaseUpload || e.Done > 3*mib) {
					cancel()
				}
			}
			if _, err := Restore(ctx, o); !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
			w.empty("copy")
		})
	}
	w.same(ref, "web01")
}

// What a host or a network loses once is done again.
func TestRestoreOverSSHTrouble(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true}, true)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 12*mib, 1, area0(0, 9*mib)))
	ref := w.backup().Ref
	for i, f := range []esxisim.Fault{
		{Kind: esxisim.FaultSSHDrop, Command: "conv=notrunc", After: 100000},
		{Kind: esxisim.FaultSSHCommand, Command: "vmkfstools -c", Lost: true},
		{Kind: esxisim.FaultSSHCommand, Command: "unfinished", Lost: true},
		{Kind: esxisim.FaultSSHCommand, Command: "rmdir", Lost: true},
		{Kind: esxisim.FaultSSHCommand, Command: "dd of=", Skip: 3, Lost: true},
	} {
		if _, err := w.sim.Inject(f); err != nil {
			t.Fatal(err)
		}
		o := w.restoreOptions(ref)
		o.Name = fmt.Sprintf("copy%d", i)
		_, err := Restore(t.Context(), o)
		w.sim.ClearFaults()
		if err != nil {
			t.Errorf("%+v: %v", f, err)
			continue
		}
		w.same(ref, o.Name)
		w.empty("none")
	}
}

// Bytes that the host changed are found by its own hashes, before it knows of the
// VM; zeros between the data are looked at, too.
func TestRestoreOverSSHVerifies(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 8*mib, 1, area0(0, mib), area0(2*mib, 6*mib)))
	ref := w.backup().Ref
	for _, off := range []int64{0, 1536 * kib, 8*mib - 512} {
		o := w.restoreOptions(ref)
		o.Name = "copy"
		o.Progress = func(e Event) {
			if e.Phase == PhaseVerify && e.Done == 0 {
				f, err := os.OpenFile(filepath.Join(w.store, "copy", "web01-flat.vmdk"), os.O_WRONLY, 0)
				must(t, err)
				defer f.Close()
				_, err = f.WriteAt(noise(512, 77), off)
				must(t, err)
			}
			if e.Phase == PhaseRegister {
				t.Error("it was registered")
			}
		}
		if _, err := Restore(t.Context(), o); !errors.Is(err, ErrVerify) {
			t.Errorf("changed at %d: %v", off, err)
		}
		w.empty("copy")
	}
}

// A host without programs for hashes has a sample read back, as without SSH.
func TestRestoreWithoutHashes(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, 8*mib, 1, area0(0, mib)))
	ref := w.backup().Ref
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "which", Status: 1, Count: -1}); err != nil {
		t.Fatal(err)
	}
	o := w.restoreOptions(ref)
	o.Name = "copy"
	res, err := Restore(t.Context(), o)
	must(t, err)
	if res.Way != WaySSH || res.BytesVerified == 0 || len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "no program to compute hashes") {
		t.Errorf("%+v", res)
	}
	w.same(ref, "copy")
	w.noSnapshots()
	w.empty("none")
}

// Without SSH the way is the old one, and says what it costs; a host that can
// neither is refused before anything is touched.
func TestRestoreWithoutSSH(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 8*mib, 1, area0(0, mib)))
	ref := w.backup().Ref
	o := w.restoreOptions(ref)
	o.Name = "copy"
	res, err := Restore(t.Context(), o)
	must(t, err)
	if res.Way != WayUpload || !strings.Contains(res.WayReason, "hikae host add --ssh") || len(res.Warnings) != 1 ||
		!strings.Contains(res.Warnings[0], "8.0 MiB for 1.0 MiB of data") {
		t.Errorf("%+v", res)
	}
	w.empty("none")
	o.Name, o.Provisioning = "copy2", esxi.Thin
	if _, err := Restore(t.Context(), o); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "thin disks can be made over SSH only") {
		t.Errorf("%v", err)
	}

	free := newWorld(t, esxisim.Options{Free: true})
	o.Host, o.State, o.Provisioning = free.host, free.state, ""
	_, err = Restore(t.Context(), o)
	if !errors.Is(err, ErrRefused) || !errors.Is(err, esxi.ErrRestricted) || !strings.Contains(err.Error(), "hikae host add --ssh") {
		t.Errorf("%v", err)
	}
}

// The stretches that are hashed are those that are written, their gaps as zeros.
func TestChecksums(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{}, false)
	w.addVM("web01", esxisim.VMOptions{Thin: true}, image(t, mib, 1))
	must(t, w.host.MakeDirectory(t.Context(), "[datastore1] x"))
	d, err := w.host.CreateDisk(t.Context(), "[datastore1] x/x.vmdk", 200*mib, esxi.Thin)
	must(t, err)
	c := checksums{}
	c.hash, err = d.NewHash(t.Context())
	must(t, err)
	content := make([]byte, 200*mib)
	for _, a := range []area{area0(0, 512), area0(mib, 3*mib), area0(5*mib+1024, mib), area0(60*mib, 4*mib), area0(64*mib, 4*mib), area0(120*mib, 80*mib)} {
		copy(content[a.Offset:a.End()], noise(int(a.Length), 3))
		for s := range steps([]area{a}, nil) {
			c.add(s.Offset, content[s.Offset:s.End()])
		}
	}
	c.flush()
	var got []area
	for _, s := range c.list {
		got = append(got, s.area)
		c.hash.Reset()
		c.hash.Write(content[s.Offset:s.End()])
		if !bytes.Equal(c.hash.Sum(nil), s.sum[:]) {
			t.Errorf("the hash of %v is wrong", s.area)
		}
	}
	want := []area{area0(0, 4*mib), area0(5*mib+1024, mib), area0(60*mib, 8*mib), area0(120*mib, 64*mib), area0(184*mib, 16*mib)}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v instead of %v", got, want)
	}
}
