package esxi

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hikae/backup/esxisim"
)

func TestSnapshotAndRead(t *testing.T) {
	for _, on := range []bool{true, false} {
		l := start(t, labOptions{disks: []int{8, 3}, vm: esxisim.VMOptions{ChangeTracking: true, Thin: on, PowerOn: on}})
		if _, err := l.host.OpenDisk(t.Context(), l.vm.Disks[0]); err == nil {
			t.Error("a disk that is not frozen was opened")
		}
		want := [][]byte{l.guest(0), l.guest(1)}
		s := l.snapshot("hikae-0123")
		if s.Name != "hikae-0123" || len(s.Disks) != 2 || len(s.VM.Snapshots) != 1 || s.Quiesced {
			t.Fatalf("snapshot %+v", s)
		}
		if on {
			l.write(0, 12345, random(100_000))
		}
		for i, d := range s.Disks {
			if len(d.Chain) != 1 || len(s.VM.Disks[i].Chain) != 2 || d.ChangeID == "" {
				t.Errorf("disk %d: frozen %q, running %q, change id %q", i, d.Chain, s.VM.Disks[i].Chain, d.ChangeID)
			}
			r := l.open(d)
			same(t, "frozen disk", readAll(t, r, mib), want[i])
			if r.BytesRead() != r.Capacity() {
				t.Errorf("%d bytes crossed the wire for %d", r.BytesRead(), r.Capacity())
			}
		}
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Errorf("removing it again: %v", err)
		}
		if now := l.find("web01"); len(now.Snapshots) != 0 || len(now.Disks[0].Chain) != 1 {
			t.Errorf("left behind: %+v", now)
		}
	}
}

// Snapshots of others stay where they are, and are read through.
func TestChain(t *testing.T) {
	for _, vmfs := range []int{5, 6} {
		l := start(t, labOptions{sim: esxisim.Options{VMFS: vmfs}, vm: esxisim.VMOptions{Thin: true, PowerOn: true}})
		for i := range 3 {
			l.snapshot("theirs")
			l.write(0, int64(i)*mib+4096, random(200_000))
			l.write(0, 5*mib, bytes.Repeat([]byte{byte(i)}, 512))
		}
		want := l.guest(0)
		s := l.snapshot("hikae-1")
		l.write(0, 0, random(3*mib))
		if len(s.Disks[0].Chain) != 4 {
			t.Fatalf("chain %q", s.Disks[0].Chain)
		}
		same(t, "chain", readAll(t, l.open(s.Disks[0]), 300_000), want)
		if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
		found, err := l.host.FindSnapshots(t.Context(), l.vm, "theirs")
		if err != nil || len(found) != 3 || found[1].Parent != found[0].ID || !found[2].Current {
			t.Errorf("theirs: %+v, %v", found, err)
		}
	}
}

func TestChangedAreas(t *testing.T) {
	l := start(t, labOptions{disks: []int{64}, vm: esxisim.VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}})
	first := l.snapshot("one")
	key := first.Disks[0].Key
	if err := l.host.RemoveSnapshot(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	written := []int64{0, 7*mib + 100, 7*mib + 70_000, 33 * mib, 64*mib - 512}
	for _, off := range written {
		l.write(0, off, []byte("changed!")) // of no block's size
	}
	second := l.snapshot("two")
	l.write(0, 50*mib, []byte("too late"))
	got, err := l.host.ChangedAreas(t.Context(), second, key, first.Disks[0].ChangeID)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range written {
		if !covered(got, off, 8) {
			t.Errorf("%d is not in %v", off, got)
		}
	}
	if covered(got, 50*mib, 8) || covered(got, 20*mib, 1) {
		t.Errorf("unchanged areas in %v", got)
	}
	sum := int64(0)
	for i, e := range got {
		sum += e.Length
		if i > 0 && e.Offset <= got[i-1].Offset+got[i-1].Length {
			t.Errorf("not merged: %v", got)
		}
	}
	if sum > 5*128<<10 || got[len(got)-1].Offset+got[len(got)-1].Length > 64*mib {
		t.Errorf("%d bytes in %v", sum, got)
	}

	all, err := l.host.ChangedAreas(t.Context(), second, key, "*")
	if err != nil || !covered(all, 0, mib) || !covered(all, 2*mib, mib) {
		t.Errorf("allocated %v, %v", all, err)
	}
	none, err := l.host.ChangedAreas(t.Context(), second, key, second.Disks[0].ChangeID)
	if err != nil || len(none) != 0 {
		t.Errorf("nothing changed, but %v, %v", none, err)
	}

	other := "52 00 00 00 00 00 00 00-00 00 00 00 00 00 00 00/1"
	for _, id := range []string{"", other, "nonsense"} {
		if _, err := l.host.ChangedAreas(t.Context(), second, key, id); !errors.Is(err, ErrNotProvable) {
			t.Errorf("change id %q: %v", id, err)
		}
	}
	if _, err := l.host.ChangedAreas(t.Context(), second, 99, "*"); !errors.Is(err, ErrNotFound) {
		t.Errorf("disk 99: %v", err)
	}
	// A host that cannot be asked says nothing about the disk.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.host.ChangedAreas(ctx, second, key, "*"); errors.Is(err, ErrNotProvable) || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "QueryChangedDiskAreas", Lost: true, Count: 3})
	again, err := l.host.ChangedAreas(t.Context(), second, key, first.Disks[0].ChangeID)
	if err != nil {
		t.Errorf("lost answers: %v", err)
	}
	if diff := cmp.Diff(got, again); diff != "" {
		t.Error(diff)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "QueryChangedDiskAreas", Lost: true, Count: -1})
	if _, err := l.host.ChangedAreas(t.Context(), second, key, "*"); !errors.Is(err, ErrUnreachable) || errors.Is(err, ErrNotProvable) {
		t.Errorf("no answer: %v", err)
	}
	l.ClearFaults()
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "QueryChangedDiskAreas", Fault: "RestrictedVersion", Message: "no"})
	if _, err := l.host.ChangedAreas(t.Context(), second, key, "*"); !errors.Is(err, ErrNotProvable) || !errors.Is(err, ErrRestricted) {
		t.Errorf("restricted: %v", err)
	}
}

func covered(l []Extent, off, n int64) bool {
	for _, e := range l {
		if e.Offset <= off && off+n <= e.Offset+e.Length {
			return true
		}
	}
	return false
}

func TestTrackingOff(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	s := l.snapshot("one")
	if l.vm.ChangeTracking || s.Disks[0].ChangeID != "" {
		t.Errorf("tracking is on: %+v", s.Disks[0])
	}
	if _, err := l.host.ChangedAreas(t.Context(), s, s.Disks[0].Key, "*"); !errors.Is(err, ErrNotProvable) {
		t.Errorf("without tracking: %v", err)
	}
}

// Transfers that break, a host that is busy, and sessions that expire cost
// time, never bytes.
func TestReadThroughTrouble(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	want := l.guest(0)
	s := l.snapshot("one")
	for name, faults := range map[string][]esxisim.Fault{
		"drops":                     {{Kind: esxisim.FaultDrop, Verb: "GET", Path: "-flat", After: 100_000, Count: 5}},
		"cut before the first byte": {{Kind: esxisim.FaultDrop, Verb: "GET", Path: "-flat", After: 0, Count: 5}},
		"busy":                      {{Kind: esxisim.FaultBusy, Path: "-flat", Count: 7}},
		"flaky":                     {{Kind: esxisim.FaultBusy, Path: "-flat", Count: 2, Status: 500}},
		"gateway":                   {{Kind: esxisim.FaultBusy, Path: "-flat", Count: 3, Status: 502}},
		"expired":                   {{Kind: esxisim.FaultExpire}},
		"all": {
			{Kind: esxisim.FaultExpire},
			{Kind: esxisim.FaultDrop, Verb: "GET", Path: "-flat", After: 300_000, Count: 2},
			{Kind: esxisim.FaultBusy, Path: "-flat", Count: 3, Skip: 3},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := l.open(s.Disks[0])
			l.asked.Store(0)
			defer l.ClearFaults()
			for _, f := range faults {
				l.inject(f)
			}
			same(t, name, readAll(t, r, mib), want)
			if n := l.asked.Load(); n > 1 {
				t.Errorf("%d logins for one expiry", n)
			}
			if r.BytesRead() > r.Capacity()+mib {
				t.Errorf("%d bytes crossed the wire for %d", r.BytesRead(), r.Capacity())
			}
		})
	}
}

// The host answers 503 to the fifth request at once; there never is one.
func TestFourInFlight(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{MaxInFlight: 4}, disks: []int{16}, vm: esxisim.VMOptions{PowerOn: true}})
	want := l.guest(0)
	r := l.open(l.snapshot("one").Disks[0])
	l.ResetStats()
	same(t, "read", readAll(t, r, 256<<10), want)
	if n := l.Stats().Folder.Requests; n != 64 {
		t.Errorf("%d requests for 64 pieces: some were refused", n)
	}
}

func TestGivesUpOnHost(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	s := l.snapshot("one")
	r := l.open(s.Disks[0])
	p := make([]byte, mib)
	l.inject(esxisim.Fault{Kind: esxisim.FaultBusy, Count: -1})
	if _, err := r.ReadAt(p, 0); !errors.Is(err, ErrBusy) {
		t.Errorf("busy: %v", err)
	}
	l.ClearFaults()
	l.inject(esxisim.Fault{Kind: esxisim.FaultDrop, Count: -1})
	if _, err := r.ReadAt(p, 0); !errors.Is(err, ErrUnreachable) {
		t.Errorf("cut: %v", err)
	}
	l.ClearFaults()
	// What the VM writes to is locked on the host.
	running := s.VM.Disks[0]
	running.frozen = true // against the rules
	if r, err := l.host.OpenDisk(t.Context(), running); err == nil {
		if _, err = r.ReadAt(p, 0); err == nil {
			t.Error("the running link was read")
		}
	} else if !errors.Is(err, ErrLocked) {
		t.Errorf("locked: %v", err)
	}
	if _, err := l.host.ReadFile(t.Context(), "[datastore1] web01/nothing", mib); !errors.Is(err, ErrNotFound) {
		t.Errorf("missing: %v", err)
	}
	if _, err := l.host.ReadFile(t.Context(), "[elsewhere] web01/web01.vmx", mib); !errors.Is(err, ErrNotFound) {
		t.Errorf("other datastore: %v", err)
	}
}
