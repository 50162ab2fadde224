package esxi

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"hikae/backup/esxisim"
)

// Reading over SSH while connections break, hang and are refused: the same
// bytes, and none of it for ever.
func TestReadOverBadSSH(t *testing.T) {
	o := labOptions{
		sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}, only: true, disks: []int{12}, vm: esxisim.VMOptions{PowerOn: true},
		tune: func(t *tuning) { t.stall, t.request = time.Second, 4*mib },
	}
	l := start(t, o)
	want := l.guest(0)
	s := l.snapshot("one")
	r := l.open(s.Disks[0])
	for _, f := range []esxisim.Fault{
		{Kind: esxisim.FaultSSHDrop, After: 300_000, Count: 3, Command: "dd if="},
		{Kind: esxisim.FaultSSHDrop, After: 3, Count: 2, Command: "dd if="},
		{Kind: esxisim.FaultSSHHang, Command: "dd if="},
		{Kind: esxisim.FaultSSHCommand, Command: "dd if=", Status: 1, Message: "dd: can't open 'x': Device or resource busy", Count: 2},
	} {
		l.inject(f)
	}
	same(t, "disk", readAll(t, r, mib+7), want)
	// The network fails for a moment: everything breaks, and logins too.
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHDrop, After: 10, Count: 8})
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHRefuse, Count: 3})
	same(t, "disk", readAll(t, r, 3*mib), want)
	l.ClearFaults()

	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "dd if=", Status: 1, Message: "dd: can't open 'x': Device or resource busy", Count: -1})
	if _, err := r.ReadAt(make([]byte, mib), 0); !errors.Is(err, ErrLocked) {
		t.Errorf("a locked file: %v", err)
	}
	l.ClearFaults()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHHang, Command: "dd if=", Count: -1})
	time.AfterFunc(20*time.Millisecond, func() { cancel(why) })
	if _, err := r.ReadAtContext(ctx, make([]byte, mib), 0); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	l.ClearFaults()
	// What crosses the wire is what was asked for.
	patient, err := connect(t.Context(), l.config(), quick())
	if err != nil {
		t.Fatal(err)
	}
	defer patient.Close(context.Background())
	all, err := patient.OpenDisk(t.Context(), s.Disks[0])
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	l.ResetStats()
	before := all.BytesRead()
	same(t, "disk", readAll(t, all, 2*mib), want)
	if out, counted := l.Stats().SSH.BytesOut, all.BytesRead()-before; out > 12*mib*105/100 || counted != 12*mib {
		t.Errorf("%d bytes crossed the wire and %d were counted, for 12 MiB", out, counted)
	}
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
}

// A file server that answers whole files only is not read from.
func TestReadWithoutRanges(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}, vm: esxisim.VMOptions{PowerOn: true}})
	asked := 0
	web := fileServer(t, quick(), func(w http.ResponseWriter, _ *http.Request) {
		asked++
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Write([]byte(strings.Repeat("x", 1000)))
	})
	own := l.host.files
	defer func() { l.host.files = own }()
	l.host.files = web
	want := l.guest(0)
	s := l.snapshot("one")
	same(t, "disk", readAll(t, l.open(s.Disks[0]), mib), want)
	if asked != 2 { // its size, and one byte
		t.Errorf("the file server was asked %d times", asked)
	}
	w, err := l.host.Ways(t.Context())
	if err != nil || w.Reading != WaySSH || w.ReadingWhy == "" || !w.HTTPS.Reachable {
		t.Errorf("%+v, %v", w, err)
	}
	if err := l.host.RemoveSnapshot(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
}

func TestWriteOverBadSSH(t *testing.T) {
	l := start(t, labOptions{sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}})
	w, err := l.host.CreateDisk(t.Context(), "[datastore1] web01/new.vmdk", 8*mib, ThickLazy)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []esxisim.Fault{
		{Kind: esxisim.FaultSSHDrop, After: 300_000, Count: 2, Command: "dd of="},
		{Kind: esxisim.FaultSSHCommand, Command: "dd of=", Lost: true},
		{Kind: esxisim.FaultSSHCommand, Command: "sha256sum", Lost: true},
	} {
		l.inject(f)
	}
	p := random(2 * mib)
	if n, err := w.WriteAtContext(t.Context(), p, mib); err != nil || n != len(p) {
		t.Fatalf("%d, %v", n, err)
	}
	hash, err := w.NewHash(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hash.Write(p)
	if sum, err := w.Hash(t.Context(), mib, 2*mib); err != nil || string(sum) != string(hash.Sum(nil)) {
		t.Errorf("%x, %v", sum, err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultSpace})
	if _, err := l.host.CreateDisk(t.Context(), "[datastore1] web01/large.vmdk", 64*mib, ThickEager); !errors.Is(err, ErrNoSpace) {
		t.Errorf("no room: %v", err)
	}
	l.ClearFaults()
	if ok, err := l.host.Exists(t.Context(), "[datastore1] web01/large.vmdk"); ok || err != nil {
		t.Errorf("left: %v, %v", ok, err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "dd of=", Status: 1, Message: "dd: writing 'x': No space left on device"})
	if _, err := w.WriteAtContext(t.Context(), p, mib); !errors.Is(err, ErrNoSpace) {
		t.Errorf("no room: %v", err)
	}
	l.inject(esxisim.Fault{Kind: esxisim.FaultSSHCommand, Command: "dd if=", Status: 1, Message: "dd: can't open 'x': No such file or directory"})
	if sum, err := w.Hash(t.Context(), mib, mib); !errors.Is(err, ErrNotFound) {
		t.Errorf("%x, %v", sum, err)
	}
	licensed := start(t, labOptions{})
	if _, err := licensed.host.CreateDisk(t.Context(), "[datastore1] x.vmdk", mib, Thin); !errors.Is(err, ErrNoShell) {
		t.Errorf("without SSH: %v", err)
	}
}
