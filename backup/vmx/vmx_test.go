package vmx

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const sample = `.encoding = "UTF-8"
config.version = "8"
# a comment
displayName = "web |22one|22 |7C two"
uuid.bios = "56 4d 11 22 33 44 55 66-77 88 99 aa bb cc dd ee"
uuid.location = "56 4d 11 22 33 44 55 66-77 88 99 aa bb cc dd ee"
vc.uuid = "52 00"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
SCSI0:0.FileName = "web-000003.vmdk"
scsi0:0.ctkEnabled = "TRUE"
scsi0:1.present = "FALSE"
scsi0:1.fileName = "gone.vmdk"
sata0:0.present = "TRUE"
sata0:0.deviceType = "cdrom-image"
sata0:0.fileName = "odd.vmdk"
sata0:1.present = "TRUE"
sata0:1.fileName = "/vmfs/volumes/ds2/web/data.vmdk"
ethernet0.addressType = "generated"
ethernet0.generatedAddress = "00:0c:29:00:00:01"
ethernet0.generatedAddressOffset = "0"
ethernet1.addressType = "static"
ethernet1.address = "00:50:56:00:00:01"
ctkEnabled = "TRUE"
sched.swap.derivedName = "/vmfs/volumes/x/web.vswp"
migrate.hostlog = "./web.hlog"
snapshot.redoNotWithParent = "TRUE"
broken line without anything
tools.upgrade.policy = "manual"
`

func parse(t *testing.T, text string) *File {
	t.Helper()
	f, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestUntouchedComesBackByteForByte(t *testing.T) {
	for _, text := range []string{sample, "", "a = \"b\"\n", strings.ReplaceAll(sample, "\n", "\r\n")} {
		if got := string(parse(t, text).Bytes()); got != text {
			t.Errorf("changed:\n%s", cmp.Diff(text, got))
		}
	}
}

func TestGetSetDelete(t *testing.T) {
	f := parse(t, sample+"displayname = \"second\"\n")
	if v, _ := f.Get("DISPLAYNAME"); v != "second" {
		t.Errorf("the last of two values counts, got %q", v)
	}
	f.Set("displayName", `a "b" | c`)
	g := parse(t, string(f.Bytes()))
	if v, _ := g.Get("displayName"); v != `a "b" | c` {
		t.Errorf("escaping: %q", v)
	}
	if n := strings.Count(strings.ToLower(string(f.Bytes())), "displayname"); n != 1 {
		t.Errorf("key stands %d times", n)
	}
	f.Delete("DisplayName")
	if _, ok := f.Get("displayName"); ok {
		t.Error("still there after Delete")
	}
	if v, ok := parse(t, `x=bare`).Get("x"); !ok || v != "bare" {
		t.Errorf("unquoted value: %q %v", v, ok)
	}
	if _, ok := parse(t, `x = "unterminated`).Get("x"); ok {
		t.Error("an unterminated value was read")
	}
}

func TestDisks(t *testing.T) {
	f := parse(t, sample)
	want := []Disk{{"scsi0:0", "web-000003.vmdk"}, {"sata0:1", "/vmfs/volumes/ds2/web/data.vmdk"}}
	if d := cmp.Diff(want, f.Disks()); d != "" {
		t.Error(d)
	}
	f.SetDisk("scsi0:0", "web.vmdk")
	if v, _ := f.Get("scsi0:0.fileName"); v != "web.vmdk" {
		t.Errorf("SetDisk: %q", v)
	}
	f.RemoveDevice("sata0:1")
	if len(f.Disks()) != 1 {
		t.Errorf("RemoveDevice left %v", f.Disks())
	}
}

func TestPortable(t *testing.T) {
	f := parse(t, sample)
	f.Portable()
	text := strings.ToLower(string(f.Bytes()))
	for _, gone := range []string{"ctkenabled", "derivedname", "migrate.", "snapshot."} {
		if strings.Contains(text, gone) {
			t.Errorf("%s is still there", gone)
		}
	}
	if _, ok := f.Get("tools.upgrade.policy"); !ok || !f.True("cleanShutdown") || !strings.Contains(text, "broken line") {
		t.Error("more than needed was removed")
	}
}

func TestIdentity(t *testing.T) {
	f := parse(t, sample)
	if d := cmp.Diff([]string{"ethernet1"}, f.NewIdentity()); d != "" {
		t.Error(d)
	}
	for _, key := range []string{"uuid.bios", "uuid.location", "vc.uuid", "ethernet0.generatedAddress", "ethernet0.generatedAddressOffset"} {
		if v, ok := f.Get(key); ok {
			t.Errorf("%s is still %q", key, v)
		}
	}
	if v, _ := f.Get("uuid.action"); v != "create" {
		t.Errorf("uuid.action %q", v)
	}
	if v, _ := f.Get("ethernet1.startConnected"); v != "FALSE" {
		t.Errorf("an adapter with a fixed address would start connected: %q", v)
	}
	g := parse(t, sample)
	g.KeepIdentity()
	if v, _ := g.Get("uuid.action"); v != "keep" {
		t.Errorf("uuid.action %q", v)
	}
	if _, ok := g.Get("uuid.bios"); !ok {
		t.Error("KeepIdentity lost the UUID")
	}
}

func TestMinimalIsReadable(t *testing.T) {
	var names []string
	for i := range 17 {
		names = append(names, strings.Repeat("d", i+1)+".vmdk")
	}
	f := parse(t, string(New(Minimal{Name: "old one", Disks: names, Adapter: "pvscsi"}).Bytes()))
	disks := f.Disks()
	if len(disks) != len(names) {
		t.Fatalf("%d disks", len(disks))
	}
	seen := map[string]bool{}
	for i, d := range disks {
		if d.File != names[i] || seen[d.Slot] || strings.HasSuffix(d.Slot, ":7") {
			t.Errorf("disk %d: %+v", i, d)
		}
		seen[d.Slot] = true
	}
	if v, _ := f.Get("scsi1.virtualDev"); v != "pvscsi" {
		t.Errorf("second controller: %q", v)
	}
	ide := New(Minimal{Name: "x", Disks: names[:3], Adapter: "ide"})
	if got := ide.Disks()[2].Slot; got != "ide1:0" {
		t.Errorf("third IDE disk in %q", got)
	}
}

func TestSlotOfKey(t *testing.T) {
	for key, want := range map[int32]string{2000: "scsi0:0", 2017: "scsi1:1", 3001: "ide0:1", 16030: "sata1:0", 32001: "nvme0:1", 4000: "", 0: ""} {
		if got := SlotOfKey(key); got != want {
			t.Errorf("%d: %q, want %q", key, got, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, data := range [][]byte{{'a', 0, 'b'}, bytes.Repeat([]byte("a"), MaxSize+1)} {
		if _, err := Parse(data); !errors.Is(err, ErrFormat) {
			t.Errorf("%.10q: %v", data, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte("a = \"|2\"\r\nb=\"|zz|0a\"\n\n = \"x\""))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := Parse(data)
		if err != nil {
			return
		}
		a.Disks()
		a.Portable()
		a.NewIdentity()
		a.Set("displayName", string(data))
		b, err := Parse(a.Bytes())
		if err != nil {
			// A value may carry bytes that make the text refused only when
			// escaping failed: zero bytes are escaped, so this cannot be.
			if len(data) < MaxSize/8 {
				t.Fatal(err)
			}
			return
		}
		if v, _ := b.Get("displayName"); v != string(data) {
			t.Fatalf("display name %q came back as %q", data, v)
		}
	})
}
