package backup

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"hikae/backup/esxisim"
	"hikae/backup/vmdk"
	"hikae/repo"
)

// With SSH alone nobody can be asked what changed. The change tracking file is watched
// in three full reads, then believed, and no longer when it misses a write.
func TestTrackingFileIsProvedFirst(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{Free: true}, true)
	w.addVM("web01", esxisim.VMOptions{PowerOn: true, ChangeTracking: true, Thin: true}, image(t, 64*mib, 1, area0(0, 8*mib), area0(40*mib, 4*mib)))
	first := w.backup()
	if first.Mode != repo.ModeFull {
		t.Errorf("first: %s, %s", first.Mode, first.Reason)
	}
	for i := range int64(tablesProved) {
		w.write(0, i*mib, 4096, uint64(10+i))
		res := w.backup()
		if res.Mode != repo.ModeScan || len(res.Warnings) > 0 {
			t.Errorf("%d: %s, %s, %q", i, res.Mode, res.Reason, res.Warnings)
		}
		w.sameAsGuest(res.Ref)
	}
	w.write(0, 41*mib, 4096, 30)
	w.write(0, 50*mib, 4096, 31) // a hole before
	res := w.backup()
	if res.Mode != repo.ModeIncremental || !strings.Contains(res.Reason, "change tracking file") || res.BytesRead > mib {
		t.Errorf("believed: %s, %s, %d bytes read", res.Mode, res.Reason, res.BytesRead)
	}
	w.sameAsGuest(res.Ref)

	// Another epoch proves nothing.
	for _, on := range []bool{false, true} {
		must(t, w.sim.PowerOff("web01"))
		must(t, w.sim.SetChangeTracking("web01", on))
		must(t, w.sim.PowerOn("web01"))
	}
	w.write(0, 2*mib, 4096, 40)
	res = w.backup()
	if res.Mode != repo.ModeScan {
		t.Errorf("after a reset: %s, %s", res.Mode, res.Reason)
	}
	w.sameAsGuest(res.Ref)
	w.checkRepo()
}

// A file that misses a write while it is watched is told of and starts from nothing; one
// that does so later is caught by the sample.
func TestTrackingFileLies(t *testing.T) {
	w := newShellWorld(t, esxisim.Options{}, true)
	w.addVM("web01", esxisim.VMOptions{PowerOn: true, ChangeTracking: true, Thin: true}, image(t, 32*mib, 1, area0(0, 8*mib)))
	lie := func(at int64, seed uint64) {
		if _, err := w.sim.Inject(esxisim.Fault{Kind: esxisim.FaultLie, VM: "web01"}); err != nil {
			t.Fatal(err)
		}
		w.write(0, at, 512, seed)
		w.write(0, 7*mib, 512, seed+1) // noted
	}
	w.backup()
	w.backup()
	lie(2*mib, 5)
	res := w.backup()
	if res.Mode != repo.ModeScan || len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "does not say so") {
		t.Errorf("watched: %s, %q", res.Mode, res.Warnings)
	}
	w.sameAsGuest(res.Ref)
	for i := range tablesProved {
		w.write(0, mib, 512, uint64(20+i))
		if res := w.backup(); res.Mode != repo.ModeScan || len(res.Warnings) > 0 {
			t.Errorf("%d after a lie: %s, %q", i, res.Mode, res.Warnings)
		}
	}
	lie(3*mib, 40)
	res = w.backup(func(o *Options) { o.AuditBlocks = 1000 })
	if res.Mode != repo.ModeScan || !strings.Contains(res.Reason, "said to be unchanged") {
		t.Errorf("believed: %s, %s", res.Mode, res.Reason)
	}
	w.sameAsGuest(res.Ref)
	if res = w.backup(); res.Mode != repo.ModeScan {
		t.Errorf("after a lie that the sample caught: %s", res.Mode)
	}
	w.checkRepo()
}

// table makes a change tracking file.
func table(numbers ...uint32) []byte {
	t := vmdk.Tracking{Capacity: int64(len(numbers)) * 64 << 10, Granularity: 64 << 10, Number: slices.Max(numbers), UUID: [16]byte{1, 2}}
	b := t.Header()
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return b
}

func TestCompareTables(t *testing.T) {
	id := func(n uint32) string { return vmdk.FormatChangeID([16]byte{1, 2}, n) }
	const k = 64 << 10
	for name, c := range map[string]struct {
		then, now []byte
		id        string
		areas     []area
		why       string
	}{
		"nothing":       {table(1, 2, 1), table(1, 2, 1), id(3), nil, ""},
		"one":           {table(1, 2, 1), table(1, 2, 3), id(3), []area{{Offset: 2 * k, Length: k}}, ""},
		"in a row":      {table(1, 2, 1, 1), table(3, 3, 1, 3), id(3), []area{{Offset: 0, Length: 2 * k}, {Offset: 3 * k, Length: k}}, ""},
		"went back":     {table(1, 3), table(2, 2), id(3), nil, "went back"},
		"one went back": {table(2, 3), table(1, 3), id(3), nil, "went back"},
		"another epoch": {table(1, 3), table(1, 3), vmdk.FormatChangeID([16]byte{9}, 5), nil, "another epoch"},
		"an older id":   {table(1, 3), table(1, 3), id(2), nil, "went back"},
		"another size":  {table(1, 3), table(1, 3, 3), id(3), nil, "another size"},
		"zeros":         {table(0, 0), table(0, 0), id(3), nil, "notes nothing"},
		"cut":           {table(1, 1)[:100], table(1, 1), id(3), nil, "cannot be read"},
		"no number":     {table(1, 1), table(1, 1), "x", nil, "cannot be read"},
	} {
		areas, why := compareTables(c.then, c.now, c.id)
		if !slices.Equal(areas, c.areas) || (why == "") != (c.why == "") || !strings.Contains(why, c.why) {
			t.Errorf("%s: %v, %q", name, areas, why)
		}
	}
	// A number that is not the header's yet, and one that the kept file should not have had.
	now := table(1, 3)
	binary.LittleEndian.PutUint32(now[vmdk.TrackingHeaderSize:], 9)
	if _, why := compareTables(table(1, 3), now, id(3)); !strings.Contains(why, "not those of the change id") {
		t.Errorf("a number from the future: %q", why)
	}
	then := table(1, 3)
	binary.LittleEndian.PutUint32(then[36:], 2)
	if areas, why := compareTables(then, table(1, 3), id(3)); why != "" || !slices.Equal(areas, []area{{Offset: k, Length: k}}) {
		t.Errorf("newer than the kept file says it is: %v, %q", areas, why)
	}
}

func FuzzCompareTables(f *testing.F) {
	f.Add(table(1, 2), table(1, 3), "52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62/2")
	f.Fuzz(func(t *testing.T, then, now []byte, id string) {
		areas, why := compareTables(then, now, id)
		if why != "" && len(areas) > 0 {
			t.Fatal("areas and a reason why there are none")
		}
		if tidied := tidy(areas, 1<<62); !slices.Equal(tidied, areas) {
			t.Fatalf("%v is not in order", areas)
		}
	})
}
