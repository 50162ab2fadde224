package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hikae/backup/esxisim"
	"hikae/backup/vmx"
	"hikae/repo"
)

func (w *world) restoreOptions(ref repo.Ref) RestoreOptions {
	return RestoreOptions{
		Generation: w.generation(ref), Host: w.host, HostName: "esx1", Datastore: "datastore1", State: w.state,
		Clock: w.now, Logger: logger(w.t),
	}
}

// folderExists looks on the datastore itself.
func (w *world) folderExists(name string) bool {
	w.t.Helper()
	_, err := os.Stat(filepath.Join(w.store, name))
	if err != nil && !os.IsNotExist(err) {
		w.t.Fatal(err)
	}
	return err == nil
}

func TestRestoreBeside(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked,
		image(t, 20*mib, 1, area0(0, 5*mib), area0(19*mib, mib)), image(t, 9*mib+512, 2, area0(mib, mib)))
	ref := w.backup().Ref
	o := w.restoreOptions(ref)
	o.Name, o.PowerOn = "web01 copy", true
	res, err := Restore(t.Context(), o)
	must(t, err)
	if !res.PoweredOn || res.Identity != IdentityNew || res.BytesSent != res.BytesCapacity || res.BytesVerified == 0 || res.Folder != "[datastore1] web01 copy" {
		t.Errorf("%+v", res)
	}
	g := w.generation(ref)
	for i := range g.Manifest().Disks {
		d, err := g.OpenDisk(i)
		must(t, err)
		equal(t, "restored disk", repoDisk{d}, simDisk{w.sim, "web01 copy", i})
	}
	w.noSnapshots()
	before, err := w.host.VM(t.Context(), "web01")
	must(t, err)
	after, err := w.host.VM(t.Context(), "web01 copy")
	must(t, err)
	if after.UUID == before.UUID || after.Power != "poweredOn" {
		t.Errorf("restored: %+v", after)
	}
	text, err := w.host.ReadFile(t.Context(), after.ConfigPath, vmx.MaxSize)
	must(t, err)
	config, err := vmx.Parse(text)
	must(t, err)
	if v, _ := config.Get("displayName"); v != "web01 copy" || config.True("ctkEnabled") {
		t.Errorf("configuration:\n%s", text)
	}
	// A restored VM can be backed up, and costs nothing to.
	again := w.backup(func(o *Options) { o.VM = "web01 copy" })
	w.sameAsGuest(again.Ref)
	if again.BytesStored > 200*kib {
		t.Errorf("the restored VM's backup stored %d bytes", again.BytesStored)
	}
}

func TestRestoreInPlaceOfTheOriginal(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", esxisim.VMOptions{ChangeTracking: true, Thin: true}, image(t, 8*mib, 1, area0(0, mib)))
	ref := w.backup().Ref
	vm, err := w.host.VM(t.Context(), "web01")
	must(t, err)
	must(t, w.host.UnregisterVM(t.Context(), vm)) // the folder stays, and stays as it is
	res, err := Restore(t.Context(), w.restoreOptions(ref))
	must(t, err)
	if res.Identity != IdentityKeep || res.Folder != "[datastore1] web01-1" {
		t.Errorf("%+v", res)
	}
	back, err := w.host.VM(t.Context(), "web01")
	must(t, err)
	if back.UUID != vm.UUID {
		t.Errorf("the UUID was %s and is %s", vm.UUID, back.UUID)
	}
	if next := w.backup(); next.Mode != repo.ModeScan {
		t.Errorf("the first backup after a restore: %+v", next)
	}
}

func TestRestoreRefusals(t *testing.T) {
	w := newWorld(t, esxisim.Options{DatastoreBytes: 3 << 30})
	w.addVM("web01", tracked, image(t, 2<<30, 1, area0(0, mib)))
	ref := w.backup().Ref
	if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultSpace, Free: 1500 * mib}); err != nil {
		t.Fatal(err)
	}
	w.sim.ResetStats()
	_, err := Restore(t.Context(), w.restoreOptions(ref))
	if !errors.Is(err, ErrRefused) || !errors.Is(err, ErrNoRoom) {
		t.Fatal(err)
	}
	for _, part := range []string{"a VM called web01 already", "1.5 GiB free", "2.1 GiB", "nothing was touched"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in: %v", part, err)
		}
	}
	o := w.restoreOptions(ref)
	o.Datastore = "elsewhere"
	if _, err := Restore(t.Context(), o); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "datastore1") {
		t.Errorf("%v", err)
	}
	if in := w.sim.Stats().Folder.BytesIn; in > 0 {
		t.Errorf("%d bytes were uploaded", in)
	}
}

// Whatever goes wrong, what was made is removed, and nothing else.
func TestRestoreUndone(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 16*mib, 1, area0(0, 8*mib)), image(t, 2*mib, 2, area0(0, mib)))
	ref := w.backup().Ref
	for name, f := range map[string]esxisim.Fault{
		"upload":   {Kind: esxisim.FaultDrop, Verb: "PUT", After: mib, Count: -1},
		"space":    {Kind: esxisim.FaultSpace}, // once the upload has begun
		"register": {Kind: esxisim.FaultCall, Method: "RegisterVM_Task", Fault: "GenericVmConfigFault", InTask: true},
		"verify":   {Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", Fault: "GenericVmConfigFault", InTask: true, Count: -1},
	} {
		t.Run(name, func(t *testing.T) {
			o := w.restoreOptions(ref)
			o.Name = "copy"
			inject := func() {
				if _, err := w.sim.Inject(f); err != nil {
					t.Error(err)
				}
			}
			if name == "space" {
				f.Free = 6 * mib
				done := false
				o.Progress = func(e Event) {
					if e.Phase == PhaseUpload && !done {
						done = true
						inject()
					}
				}
			} else {
				inject()
			}
			_, err := Restore(t.Context(), o)
			w.sim.ClearFaults()
			if err == nil || !strings.Contains(err.Error(), "was removed again") {
				t.Fatalf("%v", err)
			}
			if w.folderExists("copy") {
				t.Error("files are left")
			}
			if _, err := w.host.VM(t.Context(), "copy"); err == nil {
				t.Error("the VM is left")
			}
			w.noSnapshots()
		})
	}
	for _, phase := range []string{PhaseUpload, PhaseRegister, PhaseVerify} {
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
			_, err := Restore(ctx, o)
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("%v", err)
			}
			if w.folderExists("copy") {
				t.Error("files are left")
			}
			w.noSnapshots()
		})
	}
	if !w.folderExists("web01") {
		t.Error("the original's folder is gone")
	}
	// After all that it works.
	o := w.restoreOptions(ref)
	o.Name = "copy"
	res, err := Restore(t.Context(), o)
	must(t, err)
	if res.Folder != "[datastore1] copy" {
		t.Errorf("%+v", res)
	}
}

// An upload that breaks in the middle, and a session that ends, are survived.
func TestRestoreTrouble(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 12*mib, 1, area0(0, 8*mib)))
	ref := w.backup().Ref
	for i, f := range []esxisim.Fault{
		{Kind: esxisim.FaultDrop, Verb: "PUT", After: 5 * mib},
		{Kind: esxisim.FaultExpire},
		{Kind: esxisim.FaultBusy, Verb: "PUT"},
	} {
		if _, err := w.sim.Inject(f); err != nil {
			t.Fatal(err)
		}
		o := w.restoreOptions(ref)
		o.Name = fmt.Sprintf("copy%d", i)
		if _, err := Restore(t.Context(), o); err != nil {
			t.Errorf("%s: %v", f.Kind, err)
			continue
		}
		w.sim.ClearFaults()
		d, err := w.generation(ref).OpenDisk(0)
		must(t, err)
		equal(t, f.Kind, repoDisk{d}, simDisk{w.sim, o.Name, 0})
	}
}

// Bytes that the host changed are found, and the VM is not left there.
func TestRestoreVerifies(t *testing.T) {
	w := newWorld(t, esxisim.Options{})
	w.addVM("web01", tracked, image(t, 8*mib, 1, area0(0, 8*mib)))
	ref := w.backup().Ref
	o := w.restoreOptions(ref)
	o.Name = "copy"
	o.Progress = func(e Event) {
		if e.Phase == PhaseVerify && e.Done == 0 {
			f, err := os.OpenFile(filepath.Join(w.store, "copy", "web01-flat.vmdk"), os.O_WRONLY, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteAt(noise(512, 77), 8*mib-512)
			must(t, err)
		}
	}
	_, err := Restore(t.Context(), o)
	if !errors.Is(err, ErrVerify) {
		t.Errorf("%v", err)
	}
	if w.folderExists("copy") {
		t.Error("a VM with wrong disks is left")
	}
	w.noSnapshots()
}
