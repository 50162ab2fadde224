package esxi

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"hikae/backup/esxisim"
)

// Answers that never arrive: what came of the call is looked up.
func TestLostAnswers(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	lose := func(method string) {
		l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: method, Lost: true})
	}
	lose("CreateSnapshot_Task")
	s := l.snapshot("one")
	if found, err := l.host.FindSnapshots(t.Context(), l.vm, "one"); err != nil || len(found) != 1 || found[0].ID != s.ID {
		t.Errorf("found %+v, %v; have %s", found, err, s.ID)
	}
	lose("RemoveSnapshot_Task")
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Errorf("remove: %v", err)
	}
	if now := l.find("web01"); len(now.Snapshots) != 0 {
		t.Errorf("left behind: %+v", now.Snapshots)
	}
	lose("UnregisterVM")
	if err := l.PowerOff("web01"); err != nil {
		t.Fatal(err)
	}
	if err := l.host.UnregisterVM(t.Context(), l.vm); err != nil {
		t.Errorf("unregister: %v", err)
	}
	lose("RegisterVM_Task")
	vm, err := l.host.RegisterVM(t.Context(), l.vm.ConfigPath, "web01")
	if err != nil || vm.ConfigPath != l.vm.ConfigPath || len(vm.Disks) != 1 {
		t.Fatalf("register: %+v, %v", vm, err)
	}
	lose("PowerOnVM_Task")
	if err := l.host.PowerOn(t.Context(), vm); err != nil && !errors.Is(err, ErrUnreachable) {
		t.Errorf("power on: %v", err)
	}
	// Reads are simply repeated.
	lose("RetrievePropertiesEx")
	if _, err := l.host.VMs(t.Context()); err != nil {
		t.Errorf("list: %v", err)
	}
}

func TestFailingTasks(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	for fault, kind := range map[string]error{
		"NoDiskSpace": ErrNoSpace, "ApplicationQuiesceFault": ErrQuiesce, "TaskInProgress": ErrBusy, "NoPermission": ErrDenied,
	} {
		l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", Fault: fault, Message: "for a test", InTask: true})
		_, err := l.host.CreateSnapshot(t.Context(), l.vm, "one", "", true)
		if !errors.Is(err, kind) {
			t.Errorf("%s: %v", fault, err)
		}
		if found, err := l.host.FindSnapshots(t.Context(), l.vm, "one"); err != nil || len(found) != 0 {
			t.Errorf("%s: found %v, %v", fault, found, err)
		}
	}
	// Something else at work on the VM: the removal waits for it.
	s := l.snapshot("one")
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "RemoveSnapshot_Task", Fault: "TaskInProgress", Count: 2})
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Errorf("remove: %v", err)
	}
}

// A snapshot whose links cannot be merged is gone all the same; what is left
// behind is merged when there is room, by whoever comes next.
func TestConsolidation(t *testing.T) {
	for _, again := range []bool{true, false} {
		l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true, Thin: true}})
		s := l.snapshot("one")
		l.write(0, mib, random(mib)) // a hole of the base: merging takes room
		want := l.guest(0)
		l.inject(esxisim.Fault{Kind: esxisim.FaultSpace})
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); !errors.Is(err, ErrNoSpace) {
			t.Fatalf("remove: %v", err)
		}
		left := l.find("web01")
		if !left.NeedsConsolidation || len(left.Disks[0].Chain) != 2 {
			t.Fatalf("left behind: %+v", left)
		}
		l.ClearFaults()
		if again {
			if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
				t.Errorf("remove again: %v", err)
			}
		} else if err := l.host.Consolidate(t.Context(), left); err != nil {
			t.Errorf("consolidate: %v", err)
		}
		if now := l.find("web01"); now.NeedsConsolidation || len(now.Disks[0].Chain) != 1 {
			t.Errorf("left behind: %+v", now)
		}
		same(t, "disk", l.guest(0), want)
	}
}

// Who cancels while the host is being asked gets its answer before he may look.
func TestCancelWhileAsking(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", Delay: 200 * time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	before := l.Stats().SOAP.Requests
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		for l.Stats().SOAP.Requests < before+2 { // a sign of life, then the call
			time.Sleep(time.Millisecond)
		}
	})
	_, err := l.host.CreateSnapshot(ctx, l.vm, "one", "", false)
	wg.Wait()
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if found, err := l.host.FindSnapshots(t.Context(), l.vm, "one"); err != nil || len(found) != 1 {
		t.Errorf("found %+v, %v", found, err)
	}
}

// Who stops waiting for a snapshot finds it all the same.
func TestCancelledSnapshot(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", InTask: true, Delay: time.Second})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		for running := false; !running; {
			var err error
			if _, running, err = l.host.running(t.Context(), l.vm.ID, "createSnapshot"); err != nil {
				t.Error(err)
				return
			}
		}
	})
	_, err := l.host.CreateSnapshot(ctx, l.vm, "one", "", false)
	wg.Wait()
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	found, err := l.host.FindSnapshots(t.Context(), l.vm, "one")
	if err != nil || len(found) != 1 {
		t.Fatalf("found %+v, %v", found, err)
	}
	if err := l.host.RemoveSnapshot(t.Context(), found[0].ID); err != nil {
		t.Error(err)
	}
}

func TestUploadAndFolders(t *testing.T) {
	l := start(t, labOptions{})
	ctx := t.Context()
	const dir = "[datastore1] a new/VM #1 100%"
	if err := l.host.MakeDirectory(ctx, "[datastore1] a new"); err != nil {
		t.Fatal(err)
	}
	if err := l.host.MakeDirectory(ctx, dir); err != nil {
		t.Fatal(err)
	}
	if err := l.host.MakeDirectory(ctx, dir); !errors.Is(err, ErrExists) {
		t.Errorf("again: %v", err)
	}
	content := random(3*mib + 17)
	if err := l.host.Upload(ctx, dir+"/x-flat.vmdk", bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	got, err := l.host.ReadFile(ctx, dir+"/x-flat.vmdk", 8*mib)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("read back: %d bytes, %v", len(got), err)
	}
	if err := l.host.Upload(ctx, dir+"/empty", strings.NewReader(""), 0); err != nil {
		t.Errorf("empty: %v", err)
	}
	for p, want := range map[string]bool{dir: true, dir + "/empty": true, dir + "/nothing": false, "[datastore1] nothing": false} {
		if ok, err := l.host.Exists(ctx, p); ok != want || err != nil {
			t.Errorf("%s exists: %v, %v", p, ok, err)
		}
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultDrop, Verb: "PUT", After: 100_000})
	// Cut before or after the host's answer: one shows at once, the other in the file's size.
	err = l.host.Upload(ctx, dir+"/y-flat.vmdk", bytes.NewReader(content), int64(len(content)))
	if err == nil || !errors.Is(err, ErrUnreachable) && !strings.Contains(err.Error(), "stored 100000 of") {
		t.Errorf("cut: %v", err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultSpace, Free: mib})
	if err := l.host.Upload(ctx, dir+"/z-flat.vmdk", bytes.NewReader(content), int64(len(content))); !errors.Is(err, ErrNoSpace) {
		t.Errorf("full: %v", err)
	}
	l.ClearFaults()
	if err := l.host.Delete(ctx, "[datastore1] a new"); err != nil {
		t.Fatal(err)
	}
	if err := l.host.Delete(ctx, "[datastore1] a new"); err != nil {
		t.Errorf("delete again: %v", err)
	}
	if ok, err := l.host.Exists(ctx, "[datastore1] a new"); ok || err != nil {
		t.Errorf("after all: %v, %v", ok, err)
	}
}

func TestRegisterAndPower(t *testing.T) {
	l := start(t, labOptions{})
	ctx := t.Context()
	if _, err := l.host.RegisterVM(ctx, l.vm.ConfigPath, "web01"); !errors.Is(err, ErrExists) {
		t.Errorf("registered twice: %v", err)
	}
	if err := l.host.PowerOn(ctx, l.vm); err != nil {
		t.Fatal(err)
	}
	if err := l.host.PowerOn(ctx, l.vm); err != nil {
		t.Errorf("already on: %v", err)
	}
	if l.find("web01").Power != "poweredOn" {
		t.Error("it is not on")
	}
	if err := l.host.UnregisterVM(ctx, l.vm); err == nil || !strings.Contains(err.Error(), "switch it off") {
		t.Errorf("unregister while on: %v", err)
	}
	if err := l.PowerOff("web01"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.host.UnregisterVM(ctx, l.vm); err != nil {
			t.Errorf("unregister: %v", err)
		}
	}
	vm, err := l.host.RegisterVM(ctx, l.vm.ConfigPath, "a/b 100%")
	if err != nil || vm.Name != "a/b 100%" || len(vm.Disks) != 1 {
		t.Fatalf("register: %+v, %v", vm, err)
	}
	if l.find("a/b 100%").ID != vm.ID {
		t.Error("not found by its name")
	}
	if _, err := l.host.RegisterVM(ctx, "[datastore1] nothing/nothing.vmx", "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("nothing there: %v", err)
	}
}
