package repo

import (
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

func TestParseVMID(t *testing.T) {
	for s, want := range map[string]VMID{
		"esx1/web 01":    {"esx1", "web 01"},
		"esx1/a@b":       {"esx1", "a@b"},
		"h/控え":           {"h", "控え"},
		"":               {},
		"esx1":           {},
		"esx1/":          {},
		"/web":           {},
		"esx1/a/b":       {},
		"../web":         {},
		"esx1/..":        {},
		"esx1/a\x00b":    {},
		"esx1/a\nb":      {},
		"a/" + long(201): {},
		"a/" + long(200): {"a", long(200)},
	} {
		got, err := ParseVMID(s)
		if got != want || (err == nil) != (want != VMID{}) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
		if err == nil && got.String() != s {
			t.Errorf("%q became %q", s, got)
		}
	}
}

func long(n int) string { return strings.Repeat("x", n) }

func TestParseSelector(t *testing.T) {
	for s, want := range map[string]string{
		"esx1/web@latest": "latest", "esx1/a@b@3": "3", "esx1/web": "", "esx1/web@": "", "web@3": "", "@": "",
	} {
		vm, sel, err := ParseSelector(s)
		if sel != want || (err == nil) != (want != "") {
			t.Errorf("%q: %v %q %v", s, vm, sel, err)
		}
	}
	if vm, _, _ := ParseSelector("esx1/a@b@3"); vm.Name != "a@b" {
		t.Error(vm)
	}
	if _, _, err := ParseSelector("esx1/web"); err == nil || !strings.Contains(err.Error(), "esx1/web@latest") {
		t.Errorf("the error does not say what to write: %v", err)
	}
}

func refAt(seq uint64, stamp string) Ref {
	t, err := time.Parse(nameTime, stamp)
	if err != nil {
		panic(err)
	}
	return Ref{VM: testVM, Sequence: seq, Time: t}
}

func TestResolve(t *testing.T) {
	refs := []Ref{
		refAt(9, "2025-12-31T23-00-00Z"), // the clock was set back: the newest by sequence
		refAt(1, "2026-11-20T02-00-00Z"),
		refAt(2, "2026-11-21T02-00-00Z"),
		refAt(5, "2026-11-22T02-00-00Z"),
		refAt(6, "2026-11-22T02-00-07Z"),
		refAt(2025, "2026-11-23T00-00-00Z"),
		refAt(2026, "2026-11-24T00-00-00Z"),
	}
	refs[0].Sequence = 3000
	for _, c := range []struct {
		selector string
		want     uint64 // sequence
		err      error
	}{
		{"latest", 3000, nil},
		{"2026-11-20T02-00-00Z", 1, nil},
		{"2026-11-20T02:00:00Z", 1, nil},
		{"2026-11-20", 1, nil},
		{"2026-11-2", 0, ErrAmbiguous},
		{"2026-11-22", 0, ErrAmbiguous},
		{"2026-11-22T02:00:07", 6, nil},
		{"5", 5, nil},
		{"3000", 3000, nil},
		{"2026", 2026, nil},       // the beginning of many names none; the number does
		{"2025", 0, ErrAmbiguous}, // the beginning of one, the number of another
		{"2", 2, nil},
		{"7", 0, ErrNotFound},
		{"yesterday", 0, ErrNotFound},
		{"", 0, ErrNotFound},
		{"-1", 0, ErrNotFound},
	} {
		got, err := resolve(testVM, refs, c.selector)
		if got.Sequence != c.want || !errors.Is(err, c.err) {
			t.Errorf("%q: %d, %v", c.selector, got.Sequence, err)
		}
	}
	if _, err := resolve(testVM, refs, "2026-11-22"); err == nil || !strings.Contains(err.Error(), "2026-11-22T02-00-07Z") {
		t.Errorf("the error does not list them: %v", err)
	}
	if _, err := resolve(testVM, nil, "latest"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

// TestLatest: an old copy that was taken over late is not the latest.
func TestLatest(t *testing.T) {
	at := func(day int) time.Time { return time.Date(2026, 11, day, 2, 0, 0, 0, time.UTC) }
	backup := func(seq uint64, day int) Ref { return Ref{Sequence: seq, Time: at(day)} }
	imported := func(seq uint64, day int) Ref { return Ref{Sequence: seq, Time: at(day), Imported: true} }
	for _, c := range []struct {
		refs []Ref
		want Ref
	}{
		{[]Ref{backup(1, 10), backup(2, 11)}, backup(2, 11)},
		{[]Ref{backup(1, 10), backup(2, 9)}, backup(2, 9)}, // the clock was set back
		{[]Ref{backup(1, 10), imported(2, 3), imported(3, 20)}, backup(1, 10)},
		{[]Ref{imported(5, 8), imported(6, 3), imported(4, 5)}, imported(5, 8)},
	} {
		if got := Latest(c.refs); got != c.want {
			t.Errorf("%v: %v", c.refs, got)
		}
		if got, err := resolve(testVM, c.refs, "latest"); err != nil || got != c.want {
			t.Errorf("%v: resolved to %v, %v", c.refs, got, err)
		}
	}
}

func FuzzRefFile(f *testing.F) {
	f.Add("0000000007-2026-11-22T02-00-00Z")
	f.Add("12345678901-2026-11-22T02-00-00Z")
	f.Add("0000000007-2026-11-22T02-00-00Z-imported")
	f.Add("0000000007-2026-11-22T02-00-00Z.tmp")
	f.Add("00000000007-2026-11-22T02-00-00Z")
	f.Add("identity")
	f.Fuzz(func(t *testing.T, s string) {
		r, ok := parseRefFile(s)
		if ok && r.fileName() != s {
			t.Fatalf("%q is %v", s, r)
		}
	})
}

func FuzzSelector(f *testing.F) {
	f.Add("esx1/web@latest")
	f.Add("a/b@c@d")
	f.Fuzz(func(t *testing.T, s string) {
		vm, sel, err := ParseSelector(s)
		if err == nil && vm.String()+"@"+sel != s {
			t.Fatalf("%q became %v and %q", s, vm, sel)
		}
	})
}

// readOnly is storage that takes no writes.
type readOnly struct{ fsx.FS }

func (readOnly) Create(string) (fsx.File, error)            { return nil, syscall.EROFS }
func (readOnly) Append(string) (fsx.File, error)            { return nil, syscall.EROFS }
func (readOnly) Publish(string, string) error               { return syscall.EROFS }
func (readOnly) Remove(string) error                        { return syscall.EROFS }
func (readOnly) MkdirAll(string) error                      { return syscall.EROFS }
func (readOnly) SyncDir(string) error                       { return syscall.EROFS }
func (readOnly) Lock(string, bool, bool) (io.Closer, error) { return nil, syscall.EROFS }

func TestFolder(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(4, 9*testBlock+100)
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := write(ctx, s, content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	m := Manifest{
		VM: testVM, Mode: ModeIncremental, Reason: "<because>", Consistency: ConsistencyQuiesced,
		Host: HostInfo{"VMware ESXi", "8.0.3", "24022510"}, Guest: GuestInfo{UUID: "564d"},
		Disks: []DiskManifest{diskOf("web01", tree)}, Stats: Stats{BytesRead: 7, Seconds: 1.5},
		Files: []ManifestFile{{"web01.vmx", []byte("secret = \"in the vmx\"\n")}, {"web01.nvram", []byte{0, 1, 2}}},
	}
	ref, err := s.Commit(ctx, m)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	if !ref.Time.Equal(testClock()) {
		t.Errorf("the time is %v, not the clock's", ref.Time)
	}
	_ = r.Close()

	// All of it on storage that takes no writes.
	r = mustOpen(t, readOnly{mem})
	defer r.Close()
	if _, err := r.Begin(ctx, SessionOptions{}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("a session: %v", err)
	}
	if vms, err := r.VMs(ctx); err != nil || len(vms) != 1 || vms[0] != testVM {
		t.Fatal(vms, err)
	}
	if _, err := r.Refs(ctx, VMID{"esx1", "nobody"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("nobody's generations: %v", err)
	}
	if _, err := r.Generation(ctx, refAt(99, "2026-11-20T02-00-00Z")); !errors.Is(err, ErrNotFound) {
		t.Errorf("a generation that is not there: %v", err)
	}
	got, err := r.Resolve(ctx, testVM, "latest")
	if err != nil || got != ref {
		t.Fatal(got, err)
	}
	g, err := r.Generation(ctx, got)
	if err != nil {
		t.Fatal(err)
	}
	if g.Ref() != ref || g.Manifest().Sequence != 1 || g.Manifest().Previous != "" || g.Manifest().Format != 1 || g.Manifest().Tool != "hikae" {
		t.Errorf("%+v", g.Manifest())
	}
	if _, err := g.OpenDisk(1); !errors.Is(err, ErrNotFound) {
		t.Errorf("a disk that is not there: %v", err)
	}
	files, err := g.Files(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"generation.json", "web01-flat.vmdk", "web01.nvram", "web01.vmdk", "web01.vmx"}
	for i, f := range files {
		if f.Name != want[i] || !f.ModTime.Equal(ref.Time) {
			t.Errorf("%+v", f)
		}
		switch f.Name {
		case "web01-flat.vmdk":
			if f.Size != int64(len(content)) || f.StoredBytes != tree.DataBytes || f.Data != nil {
				t.Errorf("%+v", f)
			}
			same(t, f.Disk, content)
		case "generation.json":
			text := string(f.Data)
			for _, have := range []string{
				`"generation": "2026-11-22T02-00-00Z"`, `"sequence": 1`, `"mode": "incremental"`, `"reason": "<because>"`,
				`"capacity": 589924`, `"name": "web01.vmx"`, `"size": 3`, `"consistency": "quiesced"`,
			} {
				if !strings.Contains(text, have) {
					t.Errorf("generation.json lacks %s:\n%s", have, text)
				}
			}
			for _, not := range []string{"in the vmx", "root", "levels", "DescriptorFile"} {
				if strings.Contains(text, not) {
					t.Errorf("generation.json has %q:\n%s", not, text)
				}
			}
			fallthrough
		default:
			if f.Size != int64(len(f.Data)) || f.Disk != nil || f.StoredBytes != f.Size {
				t.Errorf("%+v", f)
			}
		}
	}
	clean(t, r)
}

// Reading past damage in the index, or without it, needs nothing of it.
func TestReadsWithoutIndex(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(4, 30*testBlock)
	ref, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range mem.Files() {
		if strings.HasPrefix(f, "index/") {
			if err := mem.Plant(f, []byte("rubbish")); err != nil {
				t.Fatal(err)
			}
		}
	}
	o := mustOpen(t, mem)
	defer o.Close()
	same(t, openDisk(t, o, ref), content)
	if o.index != nil {
		t.Error("reading opened the index")
	}
	// Writing goes on too: it only stores again.
	content[5]++
	second, err := backup(ctx, o, testVM, testClock().Add(time.Hour), content, openDisk(t, o, ref), whole(content))
	if err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, o, second), content)
}
