package vmdk

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTracking(t *testing.T) {
	const id = "52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62/2"
	uuid, n, err := ParseChangeID(id)
	must(t, err)
	if got := FormatChangeID(uuid, n); got != id || n != 2 || uuid[0] != 0x52 || uuid[15] != 0x62 {
		t.Fatalf("change id %q", got)
	}
	for _, bad := range []string{"", "*", "/", "52/1", id + "x", id[1:], "5" + id, id[:len(id)-1], id[:len(id)-1] + "-1", id[:len(id)-1] + "4294967296"} {
		if _, _, err := ParseChangeID(bad); !errors.Is(err, ErrFormat) {
			t.Errorf("change id %q: %v", bad, err)
		}
	}
	// Sizes of real files: 2,621,952 bytes for 40 GiB, half a megabyte for each 10 GiB.
	for _, c := range []struct {
		hardware                    int
		capacity, granularity, size int64
	}{
		{13, 512, 64 << 10, 516},
		{13, 64<<10 + 512, 64 << 10, 520},
		{13, 10 << 30, 64 << 10, 655_872},
		{13, 40 << 30, 64 << 10, 2_621_952},
		{13, 128 << 30, 64 << 10, 8<<20 + 512},
		{13, 128<<30 + 512, 128 << 10, 4<<20 + 516},
		{14, 800 << 30, 512 << 10, 1600<<10*4 + 512},
		{16, 62 << 40, 32 << 20, 1984<<10*4 + 512},
		{17, 40 << 30, 64 << 10, 2_621_952},
		{17, 800 << 30, 64 << 10, 800<<14*4 + 512},
		{21, 800 << 30, 64 << 10, 800<<14*4 + 512},
		{21, 62 << 40, 64 << 10, 62<<24*4 + 512},
	} {
		h := &Tracking{Capacity: c.capacity, Granularity: TrackingGranularity(c.capacity, c.hardware), Number: 7, UUID: uuid}
		if h.Granularity != c.granularity || h.Size() != c.size {
			t.Errorf("%d bytes: blocks of %d, file of %d; want %d, %d", c.capacity, h.Granularity, h.Size(), c.granularity, c.size)
		}
		for pad, want := range map[int64]error{-1: ErrFormat, 0: nil, 511: nil, 512: ErrFormat} {
			got, err := ParseTracking(h.Header(), h.Size()+pad)
			if !errors.Is(err, want) || err == nil && !cmp.Equal(got, h) {
				t.Errorf("with %d bytes more: %+v, %v", pad, got, err)
			}
		}
	}
	h := (&Tracking{Capacity: 1 << 30, Granularity: 64 << 10, UUID: uuid}).Header()
	for _, off := range []int{0, 4, 12, 16, 24, 32} {
		bad := append([]byte(nil), h...)
		bad[off] ^= 0xff
		if _, err := ParseTracking(bad, 512+4*16384); !errors.Is(err, ErrFormat) {
			t.Errorf("byte %d changed: %v", off, err)
		}
	}
	if !IsTracking(h) || IsTracking(nil) {
		t.Error("IsTracking")
	}
}

func FuzzParseTracking(f *testing.F) {
	h := &Tracking{Capacity: 1 << 30, Granularity: 64 << 10}
	f.Add(h.Header(), h.Size())
	f.Fuzz(func(t *testing.T, p []byte, size int64) {
		got, err := ParseTracking(p, size)
		if err != nil {
			return
		}
		if got.Size() > size || got.Size() <= size-SectorSize {
			t.Fatalf("%+v for a file of %d bytes", got, size)
		}
		again, err := ParseTracking(got.Header(), size)
		if err != nil || !cmp.Equal(got, again) {
			t.Fatalf("%+v, written and read %+v: %v", got, again, err)
		}
	})
}
