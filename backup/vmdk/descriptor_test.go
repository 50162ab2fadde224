package vmdk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// sample is a descriptor as hosts write them, with change tracking on.
const sample = `# Disk DescriptorFile
version=3
encoding="UTF-8"
CID=21c6c69b
parentCID=ffffffff
isNativeSnapshot="no"
createType="vmfs"

# Extent description
RW 41963520 VMFS "vm-flat.vmdk"

# Change Tracking File
changeTrackPath="vm-ctk.vmdk"

# The Disk Data Base 
#DDB

ddb.adapterType = "lsilogic"
ddb.deletable = "true"
ddb.geometry.cylinders = "65270"
ddb.uuid = "60 00 C2 94 7b 3f 53 be-cb 4b ee 5e 3d 92 72 2e"
ddb.virtualHWVersion = "13"
`

func TestDescriptorOfAHost(t *testing.T) {
	d, err := ParseDescriptor([]byte(sample))
	must(t, err)
	want := &Descriptor{
		Version: 3, Encoding: "UTF-8", CID: 0x21c6c69b, ParentCID: NoParent, CreateType: "vmfs",
		Extents:         []Extent{{Access: "RW", Sectors: 41963520, Type: "VMFS", File: "vm-flat.vmdk"}},
		ChangeTrackPath: "vm-ctk.vmdk", Other: []string{`isNativeSnapshot="no"`},
		DDB: []Entry{
			{"ddb.adapterType", "lsilogic"},
			{"ddb.deletable", "true"},
			{"ddb.geometry.cylinders", "65270"},
			{"ddb.uuid", "60 00 C2 94 7b 3f 53 be-cb 4b ee 5e 3d 92 72 2e"},
			{"ddb.virtualHWVersion", "13"},
		},
	}
	if diff := cmp.Diff(want, d); diff != "" {
		t.Fatal(diff)
	}
	if got := string(d.Bytes()); got != sample {
		t.Fatalf("written as\n%s", got)
	}
	if d.Capacity() != 41963520*512 {
		t.Fatalf("capacity %d", d.Capacity())
	}
	s := d.Standalone("restored")
	text := string(s.Bytes())
	for _, gone := range []string{"changeTrack", "version=3", "vm-flat", "-ctk"} {
		if strings.Contains(text, gone) {
			t.Errorf("standalone still has %q:\n%s", gone, text)
		}
	}
	if !strings.Contains(text, `RW 41963520 VMFS "restored-flat.vmdk"`) || s.Value("DDB.uuid") != d.Value("ddb.uuid") || d.Version != 3 {
		t.Errorf("standalone:\n%s", text)
	}
	// Windows line ends, a byte order mark, padding as inside a sparse file.
	crlf := "\xef\xbb\xbf" + strings.ReplaceAll(sample, "\n", "\r\n") + "\x00\x00 CID=1"
	if got, err := ParseDescriptor([]byte(crlf)); err != nil || !cmp.Equal(got, want) {
		t.Fatalf("with CRLF: %v\n%s", err, cmp.Diff(want, got))
	}
}

func TestDescriptorOfASnapshot(t *testing.T) {
	d, err := ParseDescriptor([]byte("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=21c6c69b\ncreateType=\"seSparse\"\n" +
		"parentFileNameHint=\"/vmfs/volumes/5e00-1/a b/vm.vmdk\"\nRW 8 SESPARSE \"vm-000001-sesparse.vmdk\"\n"))
	must(t, err)
	s := d.Standalone("x")
	if d.ParentCID != 0x21c6c69b || d.ParentFileNameHint != "/vmfs/volumes/5e00-1/a b/vm.vmdk" || s.ParentFileNameHint != "" ||
		s.ParentCID != NoParent || s.CreateType != TypeVMFS {
		t.Fatalf("%+v\n%+v", d, s)
	}
}

func TestBadDescriptors(t *testing.T) {
	const head = "# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"vmfs\"\n"
	for name, text := range map[string]string{
		"empty":              "",
		"another text":       "hello",
		"no extent":          head,
		"no version":         "# Disk DescriptorFile\nCID=1\ncreateType=\"vmfs\"\nRW 1 VMFS \"a\"",
		"no cid":             "# Disk DescriptorFile\nversion=1\ncreateType=\"vmfs\"\nRW 1 VMFS \"a\"",
		"bad cid":            "# Disk DescriptorFile\nversion=1\nCID=123456789\n",
		"bad version":        "# Disk DescriptorFile\nversion=-1\n",
		"zero sectors":       head + `RW 0 VMFS "a"`,
		"negative sectors":   head + `RW -5 VMFS "a"`,
		"too many sectors":   head + `RW 9223372036854775807 VMFS "a"`,
		"sum too large":      head + strings.Repeat("RW 2251799813685248 VMFS \"a\"\n", 2),
		"no file":            head + `RW 1 VMFS`,
		"name not quoted":    head + `RW 1 VMFS a`,
		"name not closed":    head + `RW 1 VMFS "a`,
		"negative offset":    head + `RW 1 FLAT "a" -1`,
		"extent without end": head + `RW`,
	} {
		if d, err := ParseDescriptor([]byte(text)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v, %+v", name, err, d)
		}
	}
}

// TestDescriptorRoundTrip: any names and values survive being written and read.
func TestDescriptorRoundTrip(t *testing.T) {
	name := rapid.StringOf(rapid.OneOf(rapid.SampledFrom([]rune("|\"\n\r27CAa ä/.")), rapid.Rune())).Filter(func(s string) bool {
		return !strings.ContainsRune(s, 0)
	})
	rapid.Check(t, func(t *rapid.T) {
		d := &Descriptor{
			Version: rapid.IntRange(1, 4).Draw(t, "version"), CID: rapid.Uint32().Draw(t, "cid"),
			ParentCID: rapid.Uint32().Draw(t, "parent"), CreateType: name.Draw(t, "type"), ParentFileNameHint: name.Draw(t, "hint"),
			ChangeTrackPath: name.Draw(t, "ctk"),
			Extents: []Extent{
				{"RW", rapid.Int64Range(1, 1<<40).Draw(t, "sectors"), "VMFS", name.Draw(t, "file"), 0},
				{"RDONLY", 1, "FLAT", name.Draw(t, "file2"), rapid.Int64Range(0, 1<<40).Draw(t, "offset")},
				{"RW", 7, "ZERO", "", 0},
			},
		}
		if v := name.Draw(t, "value"); v != "" {
			d.SetValue("ddb.comment", v)
		}
		got, err := ParseDescriptor(d.Bytes())
		if err != nil || !cmp.Equal(got, d) {
			t.Fatalf("%v\n%s\n%s", err, cmp.Diff(d, got), d.Bytes())
		}
	})
}

func TestNewFlatDescriptor(t *testing.T) {
	d := NewFlatDescriptor("web", 40<<30, "", true, "60 00", 7)
	if got, err := ParseDescriptor(d.Bytes()); err != nil || !cmp.Equal(got, d) {
		t.Fatalf("%v\n%s", err, d.Bytes())
	}
	for key, want := range map[string]string{
		"ddb.geometry.cylinders": "5221", "ddb.geometry.heads": "255", "ddb.geometry.sectors": "63",
		"ddb.thinProvisioned": "1", "ddb.adapterType": "lsilogic", "ddb.uuid": "60 00",
	} {
		if d.Value(key) != want {
			t.Errorf("%s is %q, want %q", key, d.Value(key), want)
		}
	}
	if d := NewFlatDescriptor("web", 512, "ide", false, "", 7); d.Value("ddb.geometry.cylinders") != "1" || d.Value("ddb.uuid") != "" ||
		d.Value("ddb.thinProvisioned") != "" || d.Extents[0].Sectors != 1 {
		t.Errorf("%s", d.Bytes())
	}
}

// TestQemuReadsDescriptors: what is written here is a disk to qemu-img, names with spaces and umlauts included.
func TestQemuReadsDescriptors(t *testing.T) {
	qemu := needQemu(t)
	for _, name := range []string{"web01", "Büro Server (alt)", "a|b"} {
		dir := t.TempDir()
		text := NewFlatDescriptor(name, 3<<20, "", false, "", 1).Bytes()
		content := bytes.Repeat([]byte("hikae"), 3<<20/5+1)[:3<<20]
		must(t, os.WriteFile(filepath.Join(dir, name+".vmdk"), text, 0o600))
		must(t, os.WriteFile(filepath.Join(dir, name+"-flat.vmdk"), content, 0o600))
		same(t, name, convert(t, qemu, filepath.Join(dir, name+".vmdk")), content)
	}
}

func FuzzParseDescriptor(f *testing.F) {
	f.Add([]byte(sample))
	f.Add(NewFlatDescriptor("a|22\"", 1<<30, "ide", true, "", 1).Bytes())
	f.Add([]byte("# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"x\"\nRW 1 FLAT \"a\" 5 partitionUUID x\nRW 2 ZERO\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := ParseDescriptor(text)
		if err != nil {
			return
		}
		if d.Capacity() <= 0 {
			t.Fatalf("capacity %d", d.Capacity())
		}
		// What was read can be written, and means the same then.
		again, err := ParseDescriptor(d.Bytes())
		if err != nil || again.Capacity() != d.Capacity() || again.CID != d.CID || again.ParentFileNameHint != d.ParentFileNameHint {
			t.Fatalf("%v\n%s", err, d.Bytes())
		}
	})
}
