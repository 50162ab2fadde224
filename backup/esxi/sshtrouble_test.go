package esxi

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxisim"
)

// Answers over SSH that never arrive: what came of the command is looked up.
func TestLostAnswersOverSSH(t *testing.T) {
	for _, only := range []bool{false, true} {
		o := labOptions{sim: esxisim.Options{Free: true, Edition: "6.7", SSH: &esxisim.SSHOptions{}}, only: only, vm: esxisim.VMOptions{PowerOn: true}}
		o.tune = func(t *tuning) { t.doubt = 50 * time.Millisecond }
		l := start(t, o)
		lose := func(command string) {
			l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: command, Lost: true})
		}
		lose("vmsvc/snapshot.create")
		s := l.snapshot("one")
		lose("vmsvc/snapshot.remove")
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Errorf("remove: %v", err)
		}
		if names, err := l.Snapshots("web01"); err != nil || len(names) != 0 {
			t.Errorf("left: %q, %v", names, err)
		}
		lose("vmsvc/power.off")
		if err := l.host.PowerOff(t.Context(), l.vm); err != nil {
			t.Errorf("power off: %v", err)
		}
		lose("vmsvc/unregister")
		if err := l.host.UnregisterVM(t.Context(), l.vm); err != nil {
			t.Errorf("unregister: %v", err)
		}
		lose("solo/registervm")
		vm, err := l.host.RegisterVM(t.Context(), l.vm.ConfigPath, "web01")
		if err != nil {
			t.Fatalf("register: %v", err)
		}
		lose("vmsvc/power.on")
		if err := l.host.PowerOn(t.Context(), vm); err != nil {
			t.Errorf("power on: %v", err)
		}
		lose("mv -f")
		if err := l.host.Upload(t.Context(), "[datastore1] web01/x", strings.NewReader("abc"), 3); err != nil {
			t.Errorf("upload: %v", err)
		}
		for _, read := range []string{"getallvms", "get.summary", "snapshot.get", "stat", "cat", "dd if="} {
			lose(read)
			if vms, err := l.host.VMs(t.Context()); err != nil || len(vms) != 1 || vms[0].Invalid != "" {
				t.Errorf("%s: %+v, %v", read, vms, err)
			}
		}
		l.ClearFaults()
	}
}

func TestFaultsOverSSH(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{Free: true, Edition: "6.5", SSH: &esxisim.SSHOptions{}}, vm: esxisim.VMOptions{PowerOn: true}})
	for fault, kind := range map[string]error{
		"NoDiskSpace": ErrNoSpace, "ApplicationQuiesceFault": ErrQuiesce, "TaskInProgress": ErrBusy, "NoPermission": ErrDenied,
	} {
		l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "snapshot.create", Fault: fault, Message: "for a test"})
		_, err := l.host.CreateSnapshot(t.Context(), l.vm, "one", "", true)
		if !errors.Is(err, kind) || !strings.Contains(err.Error(), "for a test") && fault != "NoPermission" {
			t.Errorf("%s: %v", fault, err)
		}
	}
	// The host's agent is restarting: vim-cmd cannot log in to it for a moment.
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "vim-cmd", Message: "Failed to login: Connection reset by peer", Status: 1, Count: 3})
	s := l.snapshot("one")
	for text, kind := range map[string]error{
		"mkdir: can't create directory 'x': No space left on device": ErrNoSpace, "mkdir: Permission denied": ErrDenied, "mkdir: Device or resource busy": ErrLocked,
	} {
		l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "mkdir", Message: text, Status: 1})
		if err := l.host.MakeDirectory(t.Context(), "[datastore1] x"); !errors.Is(err, kind) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
}

// A licence that expires while hikae is connected.
func TestLicenceExpires(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{SSH: &esxisim.SSHOptions{}}, vm: esxisim.VMOptions{PowerOn: true}})
	if l.Stats().SSH.Requests != 0 {
		t.Error("SSH was used on a licensed host")
	}
	w, err := l.host.Ways(t.Context())
	if err != nil || w.Control != WaySOAP || w.Licence.API != APIAllowed || !w.SSH.Reachable || w.Reading != WayHTTPS {
		t.Errorf("%+v, %v", w, err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", Fault: "RestrictedVersion"})
	s := l.snapshot("one")
	if w, err = l.host.Ways(t.Context()); err != nil || w.Control != WaySSH || w.Licence.API != APIForbidden {
		t.Errorf("%+v, %v", w, err)
	}
	before := l.Stats().SSH.Requests
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if l.Stats().SSH.Requests == before {
		t.Error("the snapshot was not removed over SSH")
	}
}

func TestConsolidationOverSSH(t *testing.T) {
	for _, only := range []bool{false, true} {
		l := start(t, labOptions{sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}, only: only, vm: esxisim.VMOptions{PowerOn: true, Thin: true}})
		if err := l.Snapshot("web01", "the owner's"); err != nil {
			t.Fatal(err)
		}
		s := l.snapshot("one")
		l.write(0, mib, random(mib))
		want := l.guest(0)
		l.inject(esxisim.Fault{Kind: esxisim.FaultSpace})
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); !errors.Is(err, ErrNoSpace) {
			t.Fatalf("remove: %v", err)
		}
		left := l.find("web01")
		if !left.NeedsConsolidation {
			t.Fatalf("left behind: %+v", left)
		}
		l.ClearFaults()
		// As a run that was killed while consolidating leaves it.
		if err := l.Snapshot("web01", consolidating); err != nil {
			t.Fatal(err)
		}
		if err := l.host.Consolidate(t.Context(), left); err != nil {
			t.Errorf("consolidate: %v", err)
		}
		if now := l.find("web01"); now.NeedsConsolidation || len(now.Disks[0].Chain) != 2 || len(now.Snapshots) != 1 || now.Snapshots[0].Name != "the owner's" {
			t.Errorf("left behind: %+v", now)
		}
		same(t, "disk", l.guest(0), want)
	}
}

// Port 443 that is closed is told, and SSH is enough.
func TestPort443Closed(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}})
	c := l.config()
	c.Address = "127.0.0.1:1"
	h, err := connect(t.Context(), c, quick())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close(context.Background())
	w, err := h.Ways(t.Context())
	if err != nil || w.Control != WaySSH || w.Reading != WaySSH || !w.HTTPS.Configured || w.HTTPS.Reachable || !errors.Is(w.HTTPS.Err, ErrUnreachable) {
		t.Errorf("%+v, %v", w, err)
	}
	if vms, err := h.VMs(t.Context()); err != nil || len(vms) != 1 || vms[0].Name != "web01" {
		t.Errorf("%+v, %v", vms, err)
	}
	if ds, err := h.Datastores(t.Context()); err != nil || len(ds) != 1 || ds[0].Name != "datastore1" || ds[0].Free <= 0 || ds[0].Type != "VMFS" || !ds[0].Accessible {
		t.Errorf("%+v, %v", ds, err)
	}
	if _, err := h.ChangedAreas(t.Context(), &Snapshot{Disks: []Disk{{Key: 1, ChangeID: "x", Capacity: 1}}}, 1, "x/1"); !errors.Is(err, ErrNotProvable) {
		t.Errorf("changed areas: %v", err)
	}
	c.SSH.Address = "127.0.0.1:1"
	if _, err := connect(t.Context(), c, quick()); !errors.Is(err, ErrUnreachable) || !errors.Is(err, ErrSSHDisabled) {
		t.Errorf("neither: %v", err)
	}
}

func TestSSHLogins(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}})
	key, err := HostKey(t.Context(), l.SSHAddress())
	if err != nil || key.Fingerprint != l.SSHFingerprint() || key.Type == "" {
		t.Errorf("%+v, %v", key, err)
	}
	if _, err := HostKey(t.Context(), "127.0.0.1:1"); !errors.Is(err, ErrSSHDisabled) {
		t.Errorf("nobody there: %v", err)
	}
	c := l.config()
	c.SSH.Fingerprint = "SHA256:" + strings.Repeat("A", 43)
	asked := 0
	c.SSH.Password = func() (string, error) { asked++; return "secret", nil }
	h, err := connect(t.Context(), c, quick())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close(context.Background())
	_, err = h.CreateSnapshot(t.Context(), l.vm, "one", "", false)
	if !errors.Is(err, ErrHostKey) || !strings.Contains(err.Error(), l.SSHFingerprint()) || asked != 0 {
		t.Errorf("another key: %v, %d passwords", err, asked)
	}
	c.SSH.Fingerprint = l.SSHFingerprint()
	h2, err := connect(t.Context(), c, quick())
	if err != nil {
		t.Fatal(err)
	}
	defer h2.Close(context.Background())
	for range 3 {
		if _, err = h2.CreateSnapshot(t.Context(), l.vm, "one", "", false); !errors.Is(err, ErrLogin) {
			t.Errorf("wrong password: %v", err)
		}
	}
	if w, err := h2.Ways(t.Context()); err != nil || w.Control != "" || !errors.Is(w.SSH.Err, ErrLogin) || asked != 1 {
		t.Errorf("%+v, %v, %d passwords", w, err, asked)
	}
	c.SSH.Fingerprint = ""
	if _, err := connect(t.Context(), c, quick()); !errors.Is(err, ErrHostKey) {
		t.Errorf("no pin: %v", err)
	}
	c.SSH = &SSHConfig{Address: l.SSHAddress(), Fingerprint: l.SSHFingerprint(), Key: []byte("no key")}
	if _, err := connect(t.Context(), c, quick()); !errors.Is(err, ErrLogin) {
		t.Errorf("no key: %v", err)
	}
}

// An agent that hangs is not waited for for ever.
func TestHangOverSSH(t *testing.T) {
	l := start(t, labOptions{
		sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}, only: true, tune: func(t *tuning) { t.call = 2 * time.Second },
	})
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHHang, Command: "get.summary"})
	if _, err := l.host.VMs(t.Context()); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "hostd restart") {
		t.Errorf("hanging: %v", err)
	}
	if vms, err := l.host.VMs(t.Context()); err != nil || len(vms) != 1 || vms[0].Invalid != "" {
		t.Errorf("afterwards: %+v, %v", vms, err)
	}
	// One VM whose files cannot be read does not hide the others.
	if err := l.ImportVM(t.Context(), "web02", []string{raw(t, 2, mib)}, esxisim.VMOptions{}); err != nil {
		t.Fatal(err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "cat /vmfs/volumes/datastore1/web01/web01.vmx", Status: 1, Message: "cat: read error: Input/output error"})
	vms, err := l.host.VMs(t.Context())
	if err != nil || len(vms) != 2 || vms[0].Name != "web01" || !strings.Contains(vms[0].Invalid, "Input/output error") || vms[1].Invalid != "" {
		t.Errorf("%+v, %v", vms, err)
	}
}

// What the shell's way brought along for the API's as well.
func TestPowerAndReloadBySOAP(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	for range 2 {
		if err := l.host.PowerOff(t.Context(), l.vm); err != nil {
			t.Errorf("power off: %v", err)
		}
	}
	if now := l.find("web01"); now.Power != "poweredOff" {
		t.Errorf("%+v", now)
	}
	if err := l.host.ReloadVM(t.Context(), l.vm); err != nil {
		t.Errorf("reload: %v", err)
	}
	if _, err := l.host.AllocatedAreas(t.Context(), Disk{Label: "x", Chain: []string{"[d] x.vmdk"}, frozen: true}); !errors.Is(err, ErrNotProvable) {
		t.Errorf("without SSH: %v", err)
	}
	if _, err := l.host.TrackingFile(t.Context(), l.vm.Disks[0]); err == nil {
		t.Error("the tracking file of a running disk was read")
	}
	s := l.snapshot("one")
	if _, err := l.host.TrackingFile(t.Context(), s.Disks[0]); !errors.Is(err, ErrNotProvable) {
		t.Errorf("without tracking: %v", err)
	}
}

// BenchmarkReadOverSSH is the way in without port 443, at the simulated host.
func BenchmarkReadOverSSH(b *testing.B) {
	sim, err := esxisim.Start(b.Context(), esxisim.Options{Dir: b.TempDir(), Password: "s3cret", Free: true, SSH: &esxisim.SSHOptions{}})
	if err != nil {
		b.Fatal(err)
	}
	defer sim.Close()
	h, err := Connect(b.Context(), Config{User: sim.User(), Password: func() (string, error) { return "s3cret", nil }, SSH: &SSHConfig{
		Address: sim.SSHAddress(), Fingerprint: sim.SSHFingerprint(),
	}})
	if err != nil {
		b.Fatal(err)
	}
	defer h.Close(context.Background())
	const size = 64 * mib
	w, err := h.CreateDisk(b.Context(), "[datastore1] x.vmdk", size, ThickEager)
	if err != nil {
		b.Fatal(err)
	}
	p := random(16 * mib)
	b.Run("write", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			if _, err := w.WriteAtContext(b.Context(), p, 16*mib); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			if err := h.store().read(b.Context(), "[datastore1] x-flat.vmdk", p, 16*mib, size, func(int, int) {}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
