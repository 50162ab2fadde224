package esxi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"hikae/backup/vmdk"
)

// store is a datastore of fixed files behind a Host that has no SOAP side:
// opening a disk needs none.
func store(t *testing.T, content map[string][]byte) *Host {
	f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		b, ok := content[strings.TrimPrefix(r.URL.Path, "/folder/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		serve(w, r, b)
	})
	return &Host{name: f.name, addr: f.addr, files: f, log: f.log, t: f.t, session: f.session}
}

func frozen(capacity int64, chain ...string) Disk {
	return Disk{Key: 2000, Label: "Hard disk 1", Capacity: capacity, Chain: chain, frozen: true}
}

func TestOpenDisk(t *testing.T) {
	content := random(1 << 20)
	desc := vmdk.NewFlatDescriptor("web01", 1<<20, "lsilogic", true, "", 0x1234).Bytes()
	h := store(t, map[string][]byte{"web01/web01.vmdk": desc, "web01/web01-flat.vmdk": content})
	d, err := h.OpenDisk(t.Context(), frozen(1<<20, "[datastore1] web01/web01.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	if d.Capacity() != 1<<20 || !bytes.Equal(d.Descriptor(), desc) || d.BytesRead() != 0 {
		t.Errorf("capacity %d, %d bytes read, descriptor %q", d.Capacity(), d.BytesRead(), d.Descriptor())
	}
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			p := make([]byte, 100_000)
			if n, err := d.ReadAt(p, i*100_000); n != len(p) || err != nil || !bytes.Equal(p, content[i*100_000:(i+1)*100_000]) {
				t.Errorf("read %d: %d, %v", i, n, err)
			}
		})
	}
	wg.Wait()
	if d.BytesRead() != 800_000 {
		t.Errorf("%d bytes read", d.BytesRead())
	}
	p := make([]byte, 100)
	if n, err := d.ReadAt(p, 1<<20-50); n != 50 || !errors.Is(err, io.EOF) || !bytes.Equal(p[:50], content[1<<20-50:]) {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := d.ReadAt(p, 1<<20); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %d, %v", n, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(p, 0); !errors.Is(err, errClosed) {
		t.Errorf("read after Close: %v", err)
	}
}

func TestOpenDiskRefuses(t *testing.T) {
	flat := make([]byte, 1<<20)
	desc := vmdk.NewFlatDescriptor("web01", 1<<20, "lsilogic", true, "", 0x1234).Bytes()
	const at = "[datastore1] web01/web01.vmdk"
	ok := frozen(1<<20, at)
	running, rdm, grown := ok, ok, frozen(2<<20, at)
	running.frozen = false
	rdm.Unsupported = "it is a raw device mapping"
	for _, c := range []struct {
		name, want string
		kind       error
		disk       Disk
		desc, flat []byte
	}{
		{"running", "not frozen", nil, running, desc, flat},
		{"unsupported", "raw device mapping", ErrUnsupported, rdm, desc, flat},
		{"empty", "not frozen", nil, frozen(1 << 20), desc, flat},
		{"other capacity", "the host says it has 2097152 bytes", nil, grown, desc, flat},
		{"no descriptor", "no such file", ErrNotFound, ok, nil, flat},
		{"flat as descriptor", "no VMDK descriptor", nil, ok, flat, flat},
		{"huge descriptor", "more than any VMDK descriptor", nil, ok, append(bytes.Clone(desc), make([]byte, 1<<20)...), flat},
		{"no extent", "no such file", ErrNotFound, ok, desc, nil},
		{"short extent", "is 1048064 bytes long and its descriptor says 1048576", nil, ok, desc, flat[512:]},
		{"long extent", "is 2097152 bytes long and its descriptor says 1048576", nil, ok, desc, make([]byte, 2<<20)},
		{"parent missing", "parent", vmdk.ErrChain, ok, bytes.Replace(desc, []byte("parentCID=ffffffff"), []byte("parentCID=00001234"), 1), flat},
		{"outside", "outside of its datastore", nil, ok, bytes.Replace(desc, []byte(`"web01-flat.vmdk"`), []byte(`"../../x-flat.vmdk"`), 1), flat},
	} {
		content := map[string][]byte{}
		if c.desc != nil {
			content["web01/web01.vmdk"] = c.desc
		}
		if c.flat != nil {
			content["web01/web01-flat.vmdk"] = c.flat
		}
		_, err := store(t, content).OpenDisk(t.Context(), c.disk)
		if err == nil || !strings.Contains(err.Error(), c.want) || c.kind != nil && !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// A file that changes its size after it was opened is not frozen.
func TestDiskThatChanges(t *testing.T) {
	content := map[string][]byte{
		"web01/web01.vmdk":      vmdk.NewFlatDescriptor("web01", 1<<20, "lsilogic", true, "", 1).Bytes(),
		"web01/web01-flat.vmdk": make([]byte, 1<<20),
	}
	h := store(t, content)
	d, err := h.OpenDisk(t.Context(), frozen(1<<20, "[datastore1] web01/web01.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	content["web01/web01-flat.vmdk"] = make([]byte, 2<<20)
	if _, err := d.ReadAt(make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), "not the frozen one") {
		t.Errorf("read: %v", err)
	}
}

func TestDiskReadCancelled(t *testing.T) {
	h := store(t, map[string][]byte{
		"web01/web01.vmdk":      vmdk.NewFlatDescriptor("web01", 1<<20, "lsilogic", true, "", 1).Bytes(),
		"web01/web01-flat.vmdk": make([]byte, 1<<20),
	})
	d, err := h.OpenDisk(t.Context(), frozen(1<<20, "[datastore1] web01/web01.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.ReadAtContext(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
}

// BenchmarkDiskReader reads a disk over TLS on the loopback, as a backup does:
// pieces of 4 MiB, four at once. Server and client share the machine.
func BenchmarkDiskReader(b *testing.B) {
	const size = 256 << 20
	content := random(size)
	f := fileServer(b, defaults(), func(w http.ResponseWriter, r *http.Request) {
		serve(w, r, content)
	})
	buf := make([][]byte, 4)
	for i := range buf {
		buf[i] = make([]byte, 4<<20)
	}
	b.SetBytes(size)
	for b.Loop() {
		var wg sync.WaitGroup
		for i := range buf {
			wg.Go(func() {
				for off := int64(i) * 4 << 20; off < size; off += 16 << 20 {
					if err := f.read(b.Context(), "[datastore1] x-flat.vmdk", buf[i], off, size, func(int, int) {}); err != nil {
						b.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
}
