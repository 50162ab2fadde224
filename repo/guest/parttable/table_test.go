package parttable

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
)

// header changes the header of a GPT and its checksum with it.
func header(disk []byte, at int64, change func(h []byte)) {
	h := disk[at : at+92]
	change(h)
	clear(h[16:20])
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
}

func TestInspectGPT(t *testing.T) {
	end := int64(4*mib - 512)
	for _, c := range []struct {
		name         string
		change       func(disk []byte) []byte
		fault, note  string
		parts        int
		provedSecond bool
	}{
		{name: "first copy lost", parts: 2, fault: "first copy of the GPT does not hold: the checksum of its entries", change: func(d []byte) []byte { d[2*512+40]++; return d }},
		{name: "first header gone", parts: 2, fault: "first copy of the GPT does not hold: it is not there", change: func(d []byte) []byte { clear(d[512:1024]); return d }},
		{name: "both gone", fault: "neither copy holds: it is not there", change: func(d []byte) []byte { clear(d[512:1024]); clear(d[end:]); return d }},
		{name: "second header broken", parts: 2, fault: "second copy of the GPT, at byte 4193792, does not hold: the checksum of its header", change: func(d []byte) []byte { d[end+20]++; return d }},
		{name: "second entries broken", parts: 2, fault: "does not hold: the checksum of its entries", change: func(d []byte) []byte { d[end-100]++; return d }},
		{name: "second copy gone", parts: 2, fault: "is not at byte", change: func(d []byte) []byte { clear(d[end:]); return d }},
		{name: "copies differ", parts: 2, fault: "the two copies of the GPT differ", change: func(d []byte) []byte { header(d, end, func(h []byte) { h[60]++ }); return d }},
		{name: "cut", parts: 2, fault: "past the end of the disk", change: func(d []byte) []byte { return d[:2*mib] }},
		{name: "enlarged", parts: 2, note: "enlarged after it was partitioned", provedSecond: true, change: func(d []byte) []byte { return append(d, make([]byte, mib)...) }},
		{name: "no protective record", parts: 2, note: "boot record does not say", provedSecond: true, change: func(d []byte) []byte { clear(d[:512]); return d }},
		{name: "whole", parts: 2, provedSecond: true, change: func(d []byte) []byte { return d }},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := c.change(gptDisk(512))
			table, err := Inspect(bytes.NewReader(disk), int64(len(disk)))
			if err != nil {
				t.Fatal(err)
			}
			if table.Kind != GPT || len(table.Partitions) != c.parts {
				t.Errorf("%+v", table)
			}
			faults := slices.DeleteFunc(table.Faults, func(s string) bool { return strings.HasPrefix(s, "partition 3 does not lie on the disk") })
			if c.fault == "" && len(faults) > 0 || c.fault != "" && (len(faults) != 1 || !strings.Contains(faults[0], c.fault)) {
				t.Errorf("faults %q, want %q", faults, c.fault)
			}
			if c.note == "" && len(table.Notes) > 0 || c.note != "" && (len(table.Notes) != 1 || !strings.Contains(table.Notes[0], c.note)) {
				t.Errorf("notes %q, want %q", table.Notes, c.note)
			}
			if got := slices.Contains(table.Proved, "second copy"); got != c.provedSecond {
				t.Errorf("proved %q", table.Proved)
			}
		})
	}
}

func TestInspectMBR(t *testing.T) {
	disk := make([]byte, 4*mib)
	copy(disk, mbrSector([3]uint32{0x83, 100, 1000}, [3]uint32{0x07, 1000, 100}, [3]uint32{0x0f, 4000, 100}, [3]uint32{0x83, 8000, 1000}))
	table, err := Inspect(bytes.NewReader(disk), int64(len(disk)))
	if err != nil || table.Kind != MBR || table.SectorSize != 512 || len(table.Partitions) != 3 {
		t.Fatalf("%+v, %v", table, err)
	}
	if want := []string{"partition 4 does not lie on the disk: 1000 sectors from 8000, of 8192", "the chain of logical partitions breaks at sector 4000"}; !slices.Equal(table.Faults, want) {
		t.Errorf("%q", table.Faults)
	}
	if want := []string{"partitions 1 and 2 overlap"}; !slices.Equal(table.Notes, want) {
		t.Errorf("%q", table.Notes)
	}
	if table, err := Inspect(bytes.NewReader(make([]byte, mib)), mib); err != nil || table.Kind != "" || len(table.Faults)+len(table.Notes) > 0 {
		t.Errorf("zeros: %+v, %v", table, err)
	}
}

func TestTypeName(t *testing.T) {
	if TypeName("0FC63DAF-8483-4772-8E79-3D69D8477DE4") != "Linux" || TypeName("0x07") == "" || TypeName("0x00") != "" {
		t.Error("the names of types are wrong")
	}
}
