package vimcmd

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const licence = `[200] Sending request for installed licenses...[200] Complete, result is:
  serial: AAAAA-BBBBB-CCCCC-DDDDD-EEEEE
  vmodl key: esxBasic
  name: vSphere 4 Hypervisor
  total: 0
  used:  2
  unit: cpuPackage:6core
  Properties:
    [ProductName] = VMware ESX Server
    [feature] = vsmp:4 ("Up to 4-way virtual SMP")
    [expirationHours] = 0
[200] End of report.
`

func TestLicence(t *testing.T) {
	l, err := ParseLicence(licence)
	want := Licence{"vSphere 4 Hypervisor", "esxBasic", map[string]string{"ProductName": "VMware ESX Server", "expirationHours": "0"}}
	if d := cmp.Diff(want, l); d != "" || err != nil {
		t.Error(d, err)
	}
	if _, err := ParseLicence("sh: vim-cmd: not found"); !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
}

const mapping = `Mapping for file x.vmdk (5242880 bytes in size):
[           0:     1048576] --> [VMFS -- LVID:5e0026d9-a647150e-d8a8-4cedfb76e9d5/5e0026d9-9f-d8a8-4cedfb76e9d5/1:(    88080384 -->     89128960)]
[     1048576:     2097152] --> [NOMP -- :(           0 -->      2097152)]
[     3145728:     1048576] --> [VMFS Z- LVID:5e0026d9-a647150e-d8a8-4cedfb76e9d5/5e0026d9-9f-d8a8-4cedfb76e9d5/1:(    89128960 -->     90177536)]
[     4194304:     1048576] --> [NEWT ?? LVID:x/y/1:(    89128960 -->     90177536)]
`

func TestMapping(t *testing.T) {
	const mib = 1 << 20
	got, err := ParseMapping(mapping, 5*mib)
	want := []Region{{0, mib, false, false}, {mib, 2 * mib, true, false}, {3 * mib, mib, false, true}, {4 * mib, mib, false, false}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Error(d, err)
	}
	for what, bad := range map[string]string{
		"another size": mapping, "nothing": "", "an error": "Failed to open virtual disk 'x': the file is locked (16392)",
		"a gap":         "[0: 1048576] --> [VMFS -- L:x]\n[2097152: 4194304] --> [VMFS -- L:x]",
		"an overlap":    "[0: 1048576] --> [VMFS -- L:x]\n[0: 6291456] --> [VMFS -- L:x]",
		"a short end":   "[0: 1048576] --> [VMFS -- L:x]",
		"a long end":    "[0: 10485760] --> [VMFS -- L:x]",
		"ends, not len": "[0: 1048576] --> [VMFS -- L:x]\n[1048576: 6291456] --> [NOMP -- :x]",
		"another form":  "[0: 1048576] --> [VMFS]\n[1048576: 5242880] --> [VMFS -- L:x]",
		"a huge number": "[0: 99999999999999999999] --> [VMFS -- L:x]",
	} {
		if got, err := ParseMapping(bad, 6*mib); !errors.Is(err, ErrFormat) {
			t.Errorf("%s passed: %v, %v", what, got, err)
		}
	}
}

func FuzzLicence(f *testing.F) {
	f.Add(licence)
	f.Fuzz(func(_ *testing.T, s string) { _, _ = ParseLicence(s) })
}

func FuzzMapping(f *testing.F) {
	f.Add(mapping, int64(5<<20))
	f.Add("[0: 512] --> [NOMP -- :]", int64(512))
	f.Fuzz(func(t *testing.T, s string, size int64) {
		regions, err := ParseMapping(s, size)
		if err != nil {
			return
		}
		var end int64
		for _, r := range regions {
			if r.Offset != end || r.Length <= 0 {
				t.Fatalf("%+v at %d", r, end)
			}
			end += r.Length
		}
		if end != size {
			t.Fatalf("%d of %d", end, size)
		}
	})
}
