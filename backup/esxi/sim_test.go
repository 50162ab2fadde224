package esxi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hikae/backup/esxisim"
)

const mib = 1 << 20

// lab is a simulated host and a connection to it.
type lab struct {
	*esxisim.Host
	t      *testing.T
	host   *Host
	vm     *VM
	asked  atomic.Int32 // for the password
	secret string
	away   bool // the host was closed
}

type labOptions struct {
	sim   esxisim.Options
	disks []int // sizes in MiB; default one of 8
	vm    esxisim.VMOptions
	tune  func(*tuning)
}

// start brings up a host with one VM called web01, half of whose disks are holes.
func start(t *testing.T, o labOptions) *lab {
	t.Helper()
	l := &lab{t: t, secret: "s3cret"}
	o.sim.Dir, o.sim.Password = t.TempDir(), l.secret
	sim, err := esxisim.Start(t.Context(), o.sim)
	if err != nil {
		t.Fatal(err)
	}
	l.Host = sim
	t.Cleanup(func() {
		if err := sim.Close(); err != nil {
			t.Error(err)
		}
	})
	if o.disks == nil {
		o.disks = []int{8}
	}
	var raws []string
	for i, size := range o.disks {
		raws = append(raws, raw(t, i, int64(size)*mib))
	}
	if err := sim.ImportVM(t.Context(), "web01", raws, o.vm); err != nil {
		t.Fatal(err)
	}
	tune := quick()
	if o.tune != nil {
		o.tune(&tune)
	}
	l.host, err = connect(t.Context(), l.config(), tune)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.host.Close(context.Background()); err != nil && !l.away {
			t.Error(err)
		}
	})
	l.vm = l.find("web01")
	return l
}

// raw makes an image: every other MiB is a hole.
func raw(t *testing.T, seed int, size int64) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := rand.NewChaCha8([32]byte{byte(seed)})
	b := make([]byte, mib)
	for at := int64(0); at < size; at += 2 * mib {
		r.Read(b)
		if _, err := f.WriteAt(b[:min(mib, size-at)], at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func (l *lab) config() Config {
	return Config{Name: "lab", Address: l.Address(), User: l.User(), Thumbprint: l.Thumbprint(), Password: func() (string, error) {
		l.asked.Add(1)
		return l.secret, nil
	}}
}

func (l *lab) find(name string) *VM {
	l.t.Helper()
	vm, err := l.host.VM(l.t.Context(), name)
	if err != nil {
		l.t.Fatal(err)
	}
	return vm
}

// guest is what the guest sees now.
func (l *lab) guest(disk int) []byte {
	l.t.Helper()
	size, err := l.DiskSize("web01", disk)
	if err != nil {
		l.t.Fatal(err)
	}
	b := make([]byte, size)
	if err := l.ReadAt("web01", disk, b, 0); err != nil {
		l.t.Fatal(err)
	}
	return b
}

func (l *lab) write(disk int, off int64, p []byte) {
	l.t.Helper()
	if err := l.WriteAt("web01", disk, p, off); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) snapshot(name string) *Snapshot {
	l.t.Helper()
	s, err := l.host.CreateSnapshot(l.t.Context(), l.vm, name, "by a test", false)
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

func (l *lab) open(d Disk) *DiskReader {
	l.t.Helper()
	r, err := l.host.OpenDisk(l.t.Context(), d)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { r.Close() })
	return r
}

func (l *lab) inject(f esxisim.Fault) {
	l.t.Helper()
	if _, err := l.Inject(f); err != nil {
		l.t.Fatal(err)
	}
}

// readAll reads a disk in pieces, several at once.
func readAll(t *testing.T, r *DiskReader, piece int) []byte {
	t.Helper()
	b := make([]byte, r.Capacity())
	var wg sync.WaitGroup
	gate := make(chan struct{}, 8)
	for off := 0; off < len(b); off += piece {
		gate <- struct{}{}
		wg.Go(func() {
			defer func() { <-gate }()
			p := b[off:min(off+piece, len(b))]
			if n, err := r.ReadAtContext(t.Context(), p, int64(off)); n != len(p) || err != nil && err != io.EOF {
				t.Errorf("read %d at %d: %d, %v", len(p), off, n, err)
			}
		})
	}
	wg.Wait()
	return b
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("%s: differs from byte %d on", what, i)
			return
		}
	}
}

func TestInventory(t *testing.T) {
	l := start(t, labOptions{disks: []int{8, 1}, vm: esxisim.VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}})
	if a := l.host.About(); a.APIType != "HostAgent" || a.Version == "" || a.Build == "" || !strings.Contains(a.Product, "ESXi") {
		t.Errorf("about %+v", a)
	}
	vm := l.vm
	if vm.Name != "web01" || vm.Power != "poweredOn" || !vm.ChangeTracking || vm.ConfigPath != "[datastore1] web01/web01.vmx" || vm.Invalid != "" ||
		vm.UUID == "" || vm.HardwareVersion == "" || len(vm.Snapshots) != 0 || len(vm.Disks) != 2 {
		t.Errorf("vm %+v", vm)
	}
	for i, size := range []int64{8 * mib, 1 * mib} {
		d := vm.Disks[i]
		if d.Capacity != size || d.Unsupported != "" || len(d.Chain) != 1 || !d.Thin || d.UUID == "" || d.Label == "" || d.Key == 0 || d.frozen {
			t.Errorf("disk %d: %+v", i, d)
		}
	}
	if b, err := l.host.ReadFile(t.Context(), vm.ConfigPath, mib); err != nil || !bytes.Contains(b, []byte("displayName")) {
		t.Errorf("the .vmx: %q, %v", b, err)
	}
	ds, err := l.host.Datastores(t.Context())
	if err != nil || len(ds) != 1 || ds[0].Name != "datastore1" || ds[0].Free <= 0 || ds[0].Capacity < ds[0].Free || ds[0].Type == "" {
		t.Errorf("datastores %+v, %v", ds, err)
	}
	if _, err := l.host.VM(t.Context(), "web02"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a VM that is not there: %v", err)
	}
	if byPath := l.find(vm.ConfigPath); byPath.ID != vm.ID {
		t.Errorf("by path: %+v", byPath)
	}
}

func TestCertificateOfHost(t *testing.T) {
	l := start(t, labOptions{})
	c, err := Certificate(t.Context(), l.Address())
	if err != nil || c.Thumbprint != l.Thumbprint() || c.NotAfter.IsZero() {
		t.Errorf("certificate %+v, %v; want %s", c, err, l.Thumbprint())
	}
	cfg := l.config()
	cfg.Thumbprint = strings.Repeat("ab", 32)
	l.asked.Store(0)
	_, err = Connect(t.Context(), cfg)
	if !errors.Is(err, ErrThumbprint) || !strings.Contains(err.Error(), l.Thumbprint()) || !strings.Contains(err.Error(), strings.Repeat("AB:", 31)+"AB") {
		t.Errorf("wrong pin: %v", err)
	}
	if l.asked.Load() != 0 {
		t.Error("the password was asked for before the certificate was believed")
	}
	cfg.Thumbprint = ""
	if _, err := Connect(t.Context(), cfg); !errors.Is(err, ErrThumbprint) {
		t.Errorf("no pin: %v", err)
	}
	// VMware's notation is not the only one.
	cfg.Thumbprint = strings.ToLower(strings.ReplaceAll(l.Thumbprint(), ":", ""))
	h, err := Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := Certificate(t.Context(), "127.0.0.1:1"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
	cfg.Address = "127.0.0.1:1"
	if _, err := Connect(t.Context(), cfg); !errors.Is(err, ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
}

// A refused login is sent once, whatever is asked of the host afterwards.
func TestWrongPassword(t *testing.T) {
	l := start(t, labOptions{})
	cfg := l.config()
	cfg.Password = func() (string, error) { return "wrong", nil }
	l.ResetStats()
	_, err := connect(t.Context(), cfg, quick())
	if !errors.Is(err, ErrLogin) || strings.Contains(err.Error(), "wrong-") || !strings.Contains(err.Error(), "user "+l.User()) {
		t.Errorf("wrong password: %v", err)
	}
	if n := l.Stats().SOAP.Requests; n != 2 { // the service content and one login
		t.Errorf("%d SOAP requests", n)
	}

	// The same for a session that cannot be renewed.
	l.secret = "changed meanwhile"
	l.inject(esxisim.Fault{Kind: esxisim.FaultExpire})
	l.asked.Store(0)
	for range 3 {
		if _, err := l.host.VMs(t.Context()); !errors.Is(err, ErrLogin) {
			t.Errorf("expired session, wrong password: %v", err)
		}
		if _, err := l.host.ReadFile(t.Context(), l.vm.ConfigPath, mib); !errors.Is(err, ErrLogin) {
			t.Errorf("expired session, wrong password: %v", err)
		}
	}
	if l.asked.Load() != 1 {
		t.Errorf("%d logins", l.asked.Load())
	}
}

func TestFreeLicence(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{Free: true}, vm: esxisim.VMOptions{PowerOn: true}})
	_, err := l.host.CreateSnapshot(t.Context(), l.vm, "hikae-1", "", false)
	if !errors.Is(err, ErrRestricted) || strings.Count(err.Error(), "licence") != 2 || !strings.HasPrefix(err.Error(), "lab: create snapshot hikae-1 of web01: the host's licence") {
		t.Errorf("snapshot: %v", err)
	}
	for what, err := range map[string]error{
		"folder":     l.host.MakeDirectory(t.Context(), "[datastore1] new"),
		"delete":     l.host.Delete(t.Context(), "[datastore1] web01/web01.nvram"),
		"power":      l.host.PowerOn(t.Context(), l.vm),
		"unregister": l.host.UnregisterVM(t.Context(), l.vm),
	} {
		if !errors.Is(err, ErrRestricted) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := l.host.ReadFile(t.Context(), l.vm.ConfigPath, mib); err != nil {
		t.Errorf("reading: %v", err)
	}
}

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
			l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
			want := l.guest(0)
			s := l.snapshot("one")
			r := l.open(s.Disks[0])
			l.asked.Store(0)
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

// Sessions that expire again and again, in the middle of everything.
func TestSessionsExpire(t *testing.T) {
	l := start(t, labOptions{disks: []int{16}, vm: esxisim.VMOptions{PowerOn: true, ChangeTracking: true}})
	want := l.guest(0)
	expire := func() { l.inject(esxisim.Fault{Kind: esxisim.FaultExpire}) }
	expire()
	s := l.snapshot("one")
	expire()
	r := l.open(s.Disks[0])
	for off := int64(0); off < r.Capacity(); off += mib {
		if off%(4*mib) == 0 {
			expire()
		}
		p := make([]byte, mib)
		if _, err := r.ReadAt(p, off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		same(t, "read", p, want[off:off+mib])
	}
	expire()
	if _, err := l.host.ChangedAreas(t.Context(), s, s.Disks[0].Key, "*"); err != nil {
		t.Error(err)
	}
	expire()
	if found, err := l.host.FindSnapshots(t.Context(), l.vm, "one"); err != nil || len(found) != 1 {
		t.Errorf("found %v, %v", found, err)
	}
	expire()
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	expire()
	if err := l.host.Upload(t.Context(), "[datastore1] web01/note.txt", strings.NewReader("hello"), 5); err != nil {
		t.Error(err)
	}
	expire()
	if ok, err := l.host.Exists(t.Context(), "[datastore1] web01/note.txt"); !ok || err != nil {
		t.Errorf("exists: %v, %v", ok, err)
	}
	expire() // and Close has nobody to say goodbye to
}

func TestKeepalive(t *testing.T) {
	l := start(t, labOptions{tune: func(t *tuning) { t.keepalive = time.Millisecond }})
	l.ResetStats()
	for l.Stats().SOAP.Requests < 3 {
		time.Sleep(time.Millisecond)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultExpire})
	for asked := l.asked.Load(); l.asked.Load() == asked; {
		time.Sleep(time.Millisecond)
	}
}

// The host answers 503 to the fifth request at once; there never is one.
func TestFourInFlight(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{MaxInFlight: 4}, disks: []int{32}, vm: esxisim.VMOptions{PowerOn: true}})
	want := l.guest(0)
	r := l.open(l.snapshot("one").Disks[0])
	l.ResetStats()
	same(t, "read", readAll(t, r, 256<<10), want)
	if n := l.Stats().Folder.Requests; n != 128 {
		t.Errorf("%d requests for 128 pieces: some were refused", n)
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

// Who stops waiting for a snapshot finds it all the same.
func TestCancelledSnapshot(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	l.inject(esxisim.Fault{Kind: esxisim.FaultCall, Method: "CreateSnapshot_Task", InTask: true, Delay: 300 * time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(30*time.Millisecond, cancel)
	if _, err := l.host.CreateSnapshot(ctx, l.vm, "one", "", false); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
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

func TestHostGoesAway(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	r := l.open(l.snapshot("one").Disks[0])
	l.away = true
	if err := l.Host.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadAt(make([]byte, 512), 0); !errors.Is(err, ErrUnreachable) {
		t.Errorf("read: %v", err)
	}
	if _, err := l.host.VMs(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("list: %v", err)
	}
	if _, err := l.host.CreateSnapshot(t.Context(), l.vm, "two", "", false); !errors.Is(err, ErrUnreachable) {
		t.Errorf("snapshot: %v", err)
	}
}
