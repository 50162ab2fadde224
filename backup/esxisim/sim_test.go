package esxisim

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start starts a host over a fresh directory.
func start(t *testing.T, o Options) *Host {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.Logger == nil && testing.Verbose() {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	h, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return h
}

const mib = 1 << 20

// image makes a raw image: random data in its first part and near its end, a
// hole between.
func image(t *testing.T, size int64, seed uint64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.raw")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, size / 2, size - mib} {
		if _, err := f.WriteAt(noise(mib, seed+uint64(off)), off); err != nil {
			t.Fatal(err)
		}
	}
	return name
}

func noise(n int, seed uint64) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	p := make([]byte, n)
	rand.NewChaCha8(key).Read(p)
	return p
}

// login connects a client that trusts the host by its thumbprint.
func login(t *testing.T, h *Host) *govmomi.Client {
	t.Helper()
	u := &url.URL{Scheme: "https", Host: h.Address(), Path: "/sdk", User: url.UserPassword(h.User(), h.Password())}
	sc := soap.NewClient(u, false)
	sc.SetThumbprint(u.Host, h.Thumbprint())
	c, err := newClient(t.Context(), sc, u.User)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c.Logout(ctx)
		sc.DefaultTransport().CloseIdleConnections()
	})
	return c
}

// vmOf finds a VM by name and fetches its properties.
func vmOf(t *testing.T, c *govmomi.Client, name string) (*object.VirtualMachine, mo.VirtualMachine) {
	t.Helper()
	vm, err := find.NewFinder(c.Client).VirtualMachine(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return vm, props(t, vm)
}

func props(t *testing.T, vm *object.VirtualMachine) (p mo.VirtualMachine) {
	t.Helper()
	if err := vm.Properties(t.Context(), vm.Reference(), nil, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// disk reads a whole disk as the guest sees it.
func disk(t *testing.T, h *Host, vm string, n int) []byte {
	t.Helper()
	size, err := h.DiskSize(vm, n)
	must(t, err)
	p := make([]byte, size)
	must(t, h.ReadAt(vm, n, p, 0))
	return p
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, not %d", what, len(got), len(want))
	}
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: differs first at %d", what, i)
	}
}
