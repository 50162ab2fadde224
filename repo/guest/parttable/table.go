package parttable

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Kinds of tables.
const (
	GPT = "gpt" // GUID partition table
	MBR = "mbr" // master boot record
)

// Table is a disk's partition table, and how well it holds together.
type Table struct {
	Kind       string      `json:"kind"` // GPT, MBR, or "" where there is none
	SectorSize int64       `json:"sector_size,omitempty"`
	Partitions []Partition `json:"-"`
	Proved     []string    `json:"proved,omitempty"` // what was checked and holds
	Notes      []string    `json:"notes,omitempty"`  // worth knowing, and no fault
	Faults     []string    `json:"faults,omitempty"` // what does not hold together

	protected bool // the boot record says that there is a GPT
}

func (t *Table) fault(format string, args ...any) {
	t.Faults = append(t.Faults, fmt.Sprintf(format, args...))
}

func (t *Table) note(format string, args ...any) {
	t.Notes = append(t.Notes, fmt.Sprintf(format, args...))
}

// Inspect reads a disk's table as Read does, and looks at what Read has no need of:
// the second copy of a GPT, and whether partitions overlap. Only a failing read is
// an error; what was found until then is returned with it.
func Inspect(r io.ReaderAt, size int64) (Table, error) {
	t := Table{Partitions: []Partition{}}
	g, err := t.read(r, size)
	if err != nil {
		return t, err
	}
	if g != nil {
		if err := t.inspectGPT(r, size, g); err != nil {
			return t, err
		}
	}
	byPlace := slices.SortedFunc(slices.Values(t.Partitions), func(a, b Partition) int { return cmp.Compare(a.Offset, b.Offset) })
	for i := 1; i < len(byPlace); i++ {
		if a, b := byPlace[i-1], byPlace[i]; a.Offset+a.Length > b.Offset {
			t.note("partitions %d and %d overlap", a.Number, b.Number)
		}
	}
	return t, nil
}

// inspectGPT compares the copy of a GPT that was read with the other one.
func (t *Table) inspectGPT(r io.ReaderAt, size int64, g *gpt) error {
	if !t.protected {
		t.note("the boot record does not say that there is a GPT")
	}
	if g.at != g.lba {
		t.Proved = append(t.Proved, "second copy of the GPT")
		return nil // that the first one is lost was said
	}
	t.Proved = append(t.Proved, "GPT")
	last := size - size%g.lba - g.lba
	switch {
	case g.alternate < 0:
		t.fault("the second copy of the GPT would lie past the end of the disk: the disk was larger once")
		return nil
	case g.alternate < last:
		// Nobody moves it when a disk is enlarged, until a program asks to.
		t.note("the disk was enlarged after it was partitioned: the second copy of the GPT is at byte %d, not at the end", g.alternate)
	}
	other, err := readGPT(r, size, g.lba, g.alternate)
	if bad := (*faultError)(nil); errors.As(err, &bad) {
		t.fault("the second copy of the GPT, at byte %d, does not hold: %v", g.alternate, bad)
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case other == nil:
		t.fault("the second copy of the GPT is not at byte %d", g.alternate)
	case other.disk != g.disk || other.sum != g.sum:
		t.fault("the two copies of the GPT differ")
	default:
		t.Proved = append(t.Proved, "second copy")
	}
	return nil
}

// typeNames are the partition types one meets, by what they are for. GUIDs: UEFI
// specification 2.10, Microsoft's PARTITION_INFORMATION_GPT, and the Discoverable
// Partitions Specification; the others: the list that util-linux's fdisk shows.
var typeNames = map[string]string{
	"0x05": "extended", "0x07": "NTFS or exFAT", "0x0b": "FAT32", "0x0c": "FAT32", "0x06": "FAT16", "0x0e": "FAT16", "0x01": "FAT12", "0x04": "FAT16",
	"0x27": "Windows recovery", "0x42": "Windows dynamic disk", "0x82": "Linux swap", "0x83": "Linux", "0x8e": "Linux LVM",
	"0xa5": "FreeBSD", "0xa6": "OpenBSD", "0xa9": "NetBSD", "0xaf": "Apple HFS", "0xbf": "Solaris", "0xef": "EFI system", "0xfb": "VMFS", "0xfc": "VMware core dump", "0xfd": "Linux RAID",

	"C12A7328-F81F-11D2-BA4B-00A0C93EC93B": "EFI system",
	"21686148-6449-6E6F-744E-656564454649": "BIOS boot",
	"E3C9E316-0B5C-4DB8-817D-F92DF00215AE": "Microsoft reserved",
	"EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "Windows data",
	"5808C8AA-7E8F-42E0-85D2-E1E90434CFB3": "Windows dynamic disk metadata",
	"AF9B60A0-1431-4F62-BC68-3311714A69AD": "Windows dynamic disk",
	"DE94BBA4-06D1-4D40-A16A-BFD50179D6AC": "Windows recovery",
	"E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D": "Windows Storage Spaces",
	"0FC63DAF-8483-4772-8E79-3D69D8477DE4": "Linux",
	"0657FD6D-A4AB-43C4-84E5-0933C84B4F4F": "Linux swap",
	"E6D6D379-F507-44C2-A23C-238F2A3DF928": "Linux LVM",
	"A19D880F-05FC-4D3B-A006-743F0F84911E": "Linux RAID",
	"BC13C2FF-59E6-4262-A352-B275FD6F7172": "Linux boot",
	"4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "Linux root",
	"CA7D7CCB-63ED-4C53-861C-1742536059CC": "LUKS",
	"83BD6B9D-7F41-11DC-BE0B-001560B84F0F": "FreeBSD boot",
	"516E7CB5-6ECF-11D6-8FF8-00022D09712B": "FreeBSD swap",
	"516E7CB6-6ECF-11D6-8FF8-00022D09712B": "FreeBSD UFS",
	"516E7CBA-6ECF-11D6-8FF8-00022D09712B": "FreeBSD ZFS",
	"6A898CC3-1DD2-11B2-99A6-080020736631": "ZFS",
	"7C3457EF-0000-11AA-AA11-00306543ECAC": "Apple APFS",
	"48465300-0000-11AA-AA11-00306543ECAC": "Apple HFS+",
	"AA31E02A-400F-11DB-9590-000C2911D1B8": "VMFS",
	"9D275380-40AD-11DB-BF97-000C2911D1B8": "VMware core dump",
	"9198EFFC-31C0-11DB-8F78-000C2911D1B8": "VMware reserved",
}

// TypeName says what partitions of a type are for; "" when it is not known here.
func TypeName(kind string) string { return typeNames[kind] }
