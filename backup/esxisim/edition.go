package esxisim

import (
	"fmt"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// edition is one release of ESXi, with what of it a client can see.
type edition struct {
	name     string // as Options.Edition has it
	version  string
	build    string
	update   string // of "vmware -l"
	patch    string // of esxcli system version get
	api      string
	hardware int // newest virtual hardware, which new VMs get
	ssh      string
	shell    shellRules
}

// shellRules are the differences of the shell's tools. Where no record tells
// which release prints what, the forms known are spread over the editions, so
// that a client meets all of them.
type shellRules struct {
	// dynamicType: vim-cmd's dumps have a first line "dynamicType = <unset>,".
	dynamicType bool
	// faultStatus is vim-cmd's exit status when it prints a fault. It is not
	// known which releases exit with 0.
	faultStatus int
	// powerText: power.on of a running VM prints "Power on failed" instead of
	// the fault (6.0, 6.5).
	powerText bool
	// trailingComma: lists of references end in a comma.
	trailingComma bool
	// async: snapshot.create returns before the snapshot is done.
	async bool
	// sha256 and sha512 are there (busybox of 6.7 and later).
	sha512 bool
}

// editions, oldest first; the last one is the default.
var editions = []edition{
	{
		name: "6.5", version: "6.5.0", build: "13932383", update: "Update 3", patch: "0", api: "6.5", hardware: 13, ssh: "OpenSSH_7.5",
		shell: shellRules{dynamicType: true, powerText: true, trailingComma: true},
	},
	{
		name: "6.7", version: "6.7.0", build: "14320388", update: "Update 3", patch: "73", api: "6.7.3", hardware: 14, ssh: "OpenSSH_7.9",
		shell: shellRules{async: true, sha512: true},
	},
	{
		name: "7.0", version: "7.0.3", build: "20036589", update: "Update 3", patch: "55", api: "7.0.3.0", hardware: 19, ssh: "OpenSSH_8.8",
		shell: shellRules{faultStatus: 255, sha512: true},
	},
	{
		name: "8.0", version: "8.0.3", build: "24022510", update: "Update 3", patch: "35", api: "8.0.3.0", hardware: 21, ssh: "OpenSSH_9.6",
		shell: shellRules{faultStatus: 1, async: true, sha512: true},
	},
}

// Editions are the names that Options.Edition takes, oldest first.
func Editions() []string {
	var names []string
	for _, e := range editions {
		names = append(names, e.name)
	}
	return names
}

func findEdition(name string) (edition, error) {
	if name == "" {
		return editions[len(editions)-1], nil
	}
	for _, e := range editions {
		if e.name == name {
			return e, nil
		}
	}
	return edition{}, fmt.Errorf("there is no edition %q here: %s", name, strings.Join(Editions(), ", "))
}

// full is the product's name with version and build.
func (e edition) full() string { return "VMware ESXi " + e.version + " build-" + e.build }

// about makes what a client reads of a host say the edition.
func (e edition) about(a *types.AboutInfo) {
	a.FullName, a.Version, a.Build, a.ApiVersion = e.full(), e.version, e.build, e.api
	a.LicenseProductVersion = e.name[:1] + ".0"
}

// license is the licence of the edition, free or not.
func (e edition) license(free bool) types.LicenseManagerLicenseInfo {
	l := types.LicenseManagerLicenseInfo{
		LicenseKey: "00000-00000-00000-00000-00001", EditionKey: "esx.enterprisePlus.cpuPackage",
		Name: "vSphere " + e.name[:1] + " Enterprise Plus", CostUnit: "cpuPackage",
	}
	if free {
		l.EditionKey, l.Name = "esx.hypervisor.cpuPackage", "vSphere "+e.name[:1]+" Hypervisor"
	}
	return l
}
