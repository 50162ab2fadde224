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

	"hikae/backup/esxisim"
)

const mib = 1 << 20

type sim = esxisim.Host // named so that it does not stand in the way of Host

// lab is a simulated host and a connection to it.
type lab struct {
	*sim
	t      *testing.T
	host   *Host
	vm     *VM
	asked  atomic.Int32 // for the password
	secret string
	name   string // of the VM
	dir    string // the datastore's
	only   bool
	away   bool // the host was closed
}

type labOptions struct {
	sim   esxisim.Options
	disks []int // sizes in MiB; default one of 8
	vm    esxisim.VMOptions
	tune  func(*tuning)
	name  string // of the VM; "" is web01
	only  bool   // SSH, and port 443 closed
}

// start brings up a host with one VM called web01, half of whose disks are holes.
func start(t *testing.T, o labOptions) *lab {
	t.Helper()
	l := &lab{t: t, secret: "s3cret", name: o.name, only: o.only}
	if l.name == "" {
		l.name = "web01"
	}
	o.sim.Dir, o.sim.Password = t.TempDir(), l.secret
	l.dir = o.sim.Dir
	host, err := esxisim.Start(t.Context(), o.sim)
	if err != nil {
		t.Fatal(err)
	}
	l.sim = host
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
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
	if err := host.ImportVM(t.Context(), l.name, raws, o.vm); err != nil {
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
	l.vm = l.find(l.name)
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
	c := Config{Name: "lab", Address: l.Address(), User: l.User(), Thumbprint: l.Thumbprint(), Password: func() (string, error) {
		l.asked.Add(1)
		return l.secret, nil
	}}
	if addr := l.SSHAddress(); addr != "" {
		c.SSH = &SSHConfig{Address: addr, Fingerprint: l.SSHFingerprint()}
	}
	if l.only {
		c.Address, c.Thumbprint = "", ""
	}
	return c
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
	size, err := l.DiskSize(l.name, disk)
	if err != nil {
		l.t.Fatal(err)
	}
	b := make([]byte, size)
	if err := l.ReadAt(l.name, disk, b, 0); err != nil {
		l.t.Fatal(err)
	}
	return b
}

func (l *lab) write(disk int, off int64, p []byte) {
	l.t.Helper()
	if err := l.WriteAt(l.name, disk, p, off); err != nil {
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
			if n, err := r.ReadAtContext(t.Context(), p, int64(off)); n != len(p) || err != nil && !errors.Is(err, io.EOF) {
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
	if bytes.Equal(got, want) { // the loop is slow under the race detector
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
		if _, err := r.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
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

func TestHostGoesAway(t *testing.T) {
	l := start(t, labOptions{vm: esxisim.VMOptions{PowerOn: true}})
	r := l.open(l.snapshot("one").Disks[0])
	l.away = true
	if err := l.Close(); err != nil {
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
