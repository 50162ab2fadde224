package esxisim

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmware/govmomi/vim25/mo"
)

func TestEditionsSayWhatTheyAre(t *testing.T) {
	for _, name := range append(Editions(), "") {
		h := start(t, Options{Edition: name})
		c := login(t, h)
		want, err := findEdition(name)
		must(t, err)
		about := c.ServiceContent.About
		if about.Version != want.version || about.Build != want.build || about.FullName != want.full() || about.ApiVersion != want.api {
			t.Errorf("%q: %+v", name, about)
		}
		var sys mo.HostSystem
		must(t, c.RetrieveOne(t.Context(), h.model.Map().Any("HostSystem").Reference(), []string{"config.product", "summary"}, &sys))
		if sys.Config.Product.FullName != want.full() || sys.Summary.Config.Product.Version != want.version {
			t.Errorf("%q: the host says %+v", name, sys.Summary.Config.Product)
		}
		must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{}))
		if _, p := vmOf(t, c, "vm"); p.Config.Version != fmt.Sprintf("vmx-%d", want.hardware) {
			t.Errorf("%q: %s", name, p.Config.Version)
		}
	}
	if _, err := Start(t.Context(), Options{Dir: t.TempDir(), Edition: "5.5"}); err == nil {
		t.Error("there is an edition 5.5")
	}
}

// TestTrackingGranularity: the same scattered writes cost the same whatever the
// disk's size on newer virtual hardware, and more on a big disk of older.
func TestTrackingGranularity(t *testing.T) {
	h := start(t, Options{DatastoreBytes: 4 << 40})
	changed := func(name string, size int64, hw int) (sum int64) {
		raw := filepath.Join(t.TempDir(), "disk.raw")
		must(t, os.WriteFile(raw, nil, 0o600))
		must(t, os.Truncate(raw, size))
		must(t, h.ImportVM(t.Context(), name, []string{raw}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true, Hardware: hw}))
		c := login(t, h)
		vm, _ := vmOf(t, c, name)
		since := backing(t, snapshot(t, c, vm, "before").Config.Hardware.Device).ChangeId
		for i := range int64(20) {
			must(t, h.WriteAt(name, 0, noise(4096, uint64(i)), i*300_000_000/4096*4096))
		}
		after := snapshot(t, c, vm, "after").Self
		list, _ := areas(t, c, vm, &after, since, size)
		for _, a := range list {
			sum += a.Length
		}
		return sum
	}
	const gib = 1 << 30
	small, big := changed("a", 8*gib, 21), changed("b", 800*gib, 21)
	if small != 20*64<<10 || big != small {
		t.Errorf("hardware 21: %d bytes of 8 GiB, %d of 800 GiB", small, big)
	}
	small, big = changed("c", 8*gib, 13), changed("d", 800*gib, 13)
	if small != 20*64<<10 || big != 20*512<<10 {
		t.Errorf("hardware 13: %d bytes of 8 GiB, %d of 800 GiB", small, big)
	}
}
