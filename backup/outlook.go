package backup

import (
	"fmt"
	"slices"
	"strings"

	"hikae/backup/esxi"
)

// How a backup finds what to read of a VM, as Outlook.Way says it.
const (
	WayChangedAreas = "changed-areas" // the host tells what changed
	WayFullRead     = "full-read"     // what is allocated is read and compared
	WayNone         = "none"          // the VM cannot be backed up
)

// Obstacle is something about a host or a VM that its owner should know.
type Obstacle struct {
	What   string `json:"what"`
	Remedy string `json:"remedy,omitempty"` // a command to type, or what to do
}

// Outlook is how a backup of a VM would go.
type Outlook struct {
	Way      string
	Reason   string
	Findings []Obstacle
}

// Foresee says how a backup of a VM would go, from what its host says of it. id is how
// the operator names it, HOST/VM, for remedies.
func Foresee(vm *esxi.VM, id string) Outlook {
	o := Outlook{Findings: []Obstacle{}}
	add := func(what, remedy string) { o.Findings = append(o.Findings, Obstacle{what, remedy}) }
	var untracked []string
	for _, d := range vm.Disks {
		if d.Unsupported != "" {
			add(d.Label+": "+d.Unsupported, "detach the disk, or make it an ordinary dependent one; the VM is backed up whole or not at all")
		} else if d.ChangeID == "" {
			untracked = append(untracked, d.Label)
		}
	}
	bad := slices.ContainsFunc(vm.Disks, func(d esxi.Disk) bool { return d.Unsupported != "" })
	enable := fmt.Sprintf("hikae cbt enable '%s'", strings.ReplaceAll(id, "'", `'\''`))
	switch {
	case vm.Invalid != "":
		o.Way, o.Reason = WayNone, vm.Invalid
		add("the host cannot use the VM: "+vm.Invalid, "look at it in the host's client; register it anew, or unregister it")
	case len(vm.Disks) == 0:
		o.Way, o.Reason = WayNone, "it has no disks"
	case bad:
		o.Way, o.Reason = WayNone, o.Findings[0].What
	case !vm.ChangeTracking && len(vm.Snapshots) > 0:
		o.Way, o.Reason = WayFullRead, "change tracking is off (ctkEnabled in its configuration)"
		add("change tracking is off, and its snapshots are in the way of switching it on", "remove the snapshots, then: "+enable)
	case !vm.ChangeTracking:
		o.Way, o.Reason = WayFullRead, "change tracking is off (ctkEnabled in its configuration)"
		add("change tracking is off, so every backup reads all that is allocated", enable)
	case len(untracked) == len(vm.Disks):
		o.Way, o.Reason = WayFullRead, "change tracking is on but has not begun: it begins when the VM is powered on, or at the next snapshot"
	case len(untracked) > 0:
		o.Way, o.Reason = WayFullRead, "no change tracking on "+strings.Join(untracked, ", ")
		add("no change tracking on "+strings.Join(untracked, ", "), "power the VM off and on once, or switch it off and on again: hikae cbt")
	default:
		o.Way, o.Reason = WayChangedAreas, "change tracking is on"
	}
	if vm.NeedsConsolidation {
		add("links of a removed snapshot wait to be merged; they slow the VM down and take room", "consolidate its disks in the host's client when the datastore has room")
	}
	if n := len(vm.Snapshots); n > 0 && vm.ChangeTracking {
		add(fmt.Sprintf("it has %d snapshots of its own: backups read through them and leave them alone, but a VM should not live with snapshots", n),
			"remove them in the host's client when they are not needed any more")
	}
	return o
}
