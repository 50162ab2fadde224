package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
)

func newHostTest(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "test NAME",
		Short: "try a host and say what can be done with it",
		Long: `Tries a host without changing anything on it: the ways to it, the login, version and
licence, how it is changed and read and why so, its clock, the room on its datastores,
and for each VM how it would be backed up and why. Whatever stands in the way comes with
a remedy.` + exitCodes(exitNotFound, exitHost),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeHost(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runHostTest(cmd.Context(), a, args[0])
		},
	}
	jsonFlag(a, cmd)
	return cmd
}

// hostReport is what host test found, in JSON.
type hostReport struct {
	Host               string            `json:"host"`
	Address            string            `json:"address"` // of HTTPS
	Thumbprint         string            `json:"thumbprint"`
	CertificateExpires time.Time         `json:"certificate_expires"`
	Product            string            `json:"product"`
	Version            string            `json:"version"`
	Build              string            `json:"build"`
	APIType            string            `json:"api_type"`
	HTTPS              wayReport         `json:"https"`
	SSH                wayReport         `json:"ssh"`
	Licence            string            `json:"licence"`
	LicenceAllowsAPI   string            `json:"licence_allows_api"` // yes, no or unknown
	Control            string            `json:"control"`            // soap, ssh, or "" when the host cannot be changed
	ControlReason      string            `json:"control_reason"`
	Reading            string            `json:"reading"` // https or ssh
	ReadingReason      string            `json:"reading_reason"`
	ClockAheadSeconds  float64           `json:"clock_ahead_seconds"` // of this machine's
	Findings           []backup.Obstacle `json:"findings"`
	Datastores         []datastoreReport `json:"datastores"`
	VMs                []vmReport        `json:"vms"`
}

// wayReport is one way to a host.
type wayReport struct {
	Configured bool   `json:"configured"`
	Address    string `json:"address,omitempty"`
	Reachable  bool   `json:"reachable"`
	Error      string `json:"error,omitempty"`
}

func wayOf(w esxi.Way) wayReport {
	r := wayReport{Configured: w.Configured, Address: w.Address, Reachable: w.Reachable}
	if w.Err != nil {
		r.Error = w.Err.Error()
	}
	return r
}

type datastoreReport struct {
	Name          string `json:"name"`
	Type          string `json:"type"`
	BytesCapacity int64  `json:"bytes_capacity"`
	BytesFree     int64  `json:"bytes_free"`
	Accessible    bool   `json:"accessible"`
}

// vmReport is one VM on a host, in JSON; also what vms prints.
type vmReport struct {
	Host           string `json:"host"`
	VM             string `json:"vm"`
	Power          string `json:"power"`
	Disks          int    `json:"disks"`
	BytesCapacity  int64  `json:"bytes_capacity"`
	ChangeTracking bool   `json:"change_tracking"`
	Snapshots      int    `json:"snapshots"`
	// Way is how a backup would find what to read: changed-areas, full-read, or
	// none when the VM cannot be backed up.
	Way      string            `json:"way"`
	Reason   string            `json:"reason"`
	Findings []backup.Obstacle `json:"findings"`
}

func describeVM(host string, vm *esxi.VM) vmReport {
	o := backup.Foresee(vm, host+"/"+vm.Name)
	r := vmReport{
		Host: host, VM: vm.Name, Power: vm.Power, Disks: len(vm.Disks), ChangeTracking: vm.ChangeTracking,
		Snapshots: len(vm.Snapshots), Way: o.Way, Reason: o.Reason, Findings: o.Findings,
	}
	for _, d := range vm.Disks {
		r.BytesCapacity += d.Capacity
	}
	return r
}

// wayText is a way for people.
func wayText(way string) string {
	switch way {
	case backup.WayChangedAreas:
		return "changed areas"
	case backup.WayFullRead:
		return "full read, compared"
	}
	return "cannot be backed up"
}

func runHostTest(ctx context.Context, a *app.App, name string) error {
	conf, err := a.Host(name)
	if err != nil {
		return err
	}
	r := hostReport{
		Host: conf.Name, Address: conf.Address, Thumbprint: conf.Thumbprint,
		Datastores: []datastoreReport{}, VMs: []vmReport{}, Findings: []backup.Obstacle{},
	}
	if conf.Address != "" {
		cert, err := esxi.Certificate(ctx, conf.Address)
		if err != nil && conf.SSH == "" {
			return err
		}
		r.CertificateExpires = cert.NotAfter.UTC()
	}
	host, err := a.ConnectTo(ctx, conf)
	if err != nil {
		return err
	}
	defer closeHost(ctx, a, host)
	about := host.About()
	r.Product, r.Version, r.Build, r.APIType = about.Product, about.Version, about.Build, about.APIType
	ways, err := host.Ways(ctx)
	if err != nil {
		return err
	}
	r.HTTPS, r.SSH = wayOf(ways.HTTPS), wayOf(ways.SSH)
	r.Licence, r.LicenceAllowsAPI = ways.Licence.Name, ways.Licence.API
	r.Control, r.ControlReason, r.Reading, r.ReadingReason = ways.Control, ways.ControlWhy, ways.Reading, ways.ReadingWhy
	there, err := host.Time(ctx)
	if err != nil {
		return err
	}
	r.ClockAheadSeconds = there.Sub(a.Clock()).Round(time.Second).Seconds()
	stores, err := host.Datastores(ctx)
	if err != nil {
		return err
	}
	for _, d := range stores {
		r.Datastores = append(r.Datastores, datastoreReport{d.Name, d.Type, d.Capacity, d.Free, d.Accessible})
	}
	vms, err := host.VMs(ctx)
	if err != nil {
		return err
	}
	for i := range vms {
		r.VMs = append(r.VMs, describeVM(conf.Name, &vms[i]))
	}
	r.find()
	if a.UI.JSON {
		return a.UI.Object(r)
	}
	printHostReport(a, r)
	return nil
}

// maxClockOff is how far a host's clock may be off before it is worth a word: times in
// its logs and its guests' clocks follow it.
const maxClockOff = 2 * time.Minute

// find adds what stands in the way.
func (r *hostReport) find() {
	add := func(what, remedy string) {
		r.Findings = append(r.Findings, backup.Obstacle{What: what, Remedy: remedy})
	}
	again := "hikae host remove " + r.Host + ", then hikae host add " + r.Host + " … --ssh ADDRESS"
	switch {
	case r.HTTPS.Configured && !r.HTTPS.Reachable:
		add("HTTPS does not answer: "+r.HTTPS.Error, "see that port 443 of "+r.Address+" is open to this machine")
	case !r.HTTPS.Configured:
		add("HTTPS is not configured, so disks are read over SSH, which is slower", "hikae host remove "+r.Host+", then hikae host add "+r.Host+" … --address ADDRESS")
	}
	if r.SSH.Configured && !r.SSH.Reachable {
		add("SSH does not answer: "+r.SSH.Error, "switch it on in the host's client (Manage, Services, TSM-SSH)")
	}
	switch {
	case r.Control == "" && !r.SSH.Configured:
		add("nothing can be backed up: "+r.ControlReason, again)
	case r.Control == "":
		add("nothing can be backed up: "+r.ControlReason, "make SSH work, as above")
	case !r.SSH.Configured:
		add("SSH is not configured: restores send every byte of a disk and make it thick", again)
	}
	if ahead := time.Duration(r.ClockAheadSeconds) * time.Second; ahead.Abs() > maxClockOff {
		add(fmt.Sprintf("the host's clock is off by %s from this machine's", ahead.Abs()), "let both follow a time server (Manage, System, Time & date on the host)")
	}
	for _, d := range r.Datastores {
		switch {
		case !d.Accessible:
			add("datastore "+d.Name+" is not accessible", "see its storage in the host's client")
		case d.BytesFree < d.BytesCapacity/20 && d.BytesFree < 50<<30:
			add(fmt.Sprintf("datastore %s has %s free of %s, and a snapshot grows while a backup reads", d.Name, ui.Size(d.BytesFree), ui.Size(d.BytesCapacity)),
				"free some before the next backup")
		}
	}
}

func printHostReport(a *app.App, r hostReport) {
	facts := ui.NewTable(r.Host, "")
	facts.Row("  HTTPS", wayWords(r.HTTPS))
	facts.Row("  SSH", wayWords(r.SSH))
	expires := "expires " + r.CertificateExpires.Local().Format(time.DateOnly)
	if r.CertificateExpires.Before(a.Clock()) {
		expires = "expired " + r.CertificateExpires.Local().Format(time.DateOnly) + " (hikae compares the thumbprint, so it still works)"
	}
	if !r.CertificateExpires.IsZero() {
		facts.Row("  certificate", "as pinned, "+expires)
	}
	facts.Row("  product", fmt.Sprintf("%s %s build %s", r.Product, r.Version, r.Build))
	licence := "not readable"
	if r.Licence != "" {
		licence = r.Licence
	}
	switch r.LicenceAllowsAPI {
	case esxi.APIAllowed:
		licence += "; it allows changes through the API"
	case esxi.APIForbidden:
		licence += "; it forbids changes through the API"
	default:
		licence += "; the first backup shows whether it allows changes through the API"
	}
	facts.Row("  licence", licence)
	facts.Row("  snapshots by", wayName(r.Control)+": "+r.ControlReason)
	facts.Row("  disks read by", wayName(r.Reading)+": "+r.ReadingReason)
	clock := "as here"
	if ahead := time.Duration(r.ClockAheadSeconds) * time.Second; ahead.Abs() > time.Second {
		clock = fmt.Sprintf("%s %s this machine's", ahead.Abs(), map[bool]string{true: "ahead of", false: "behind"}[ahead > 0])
	}
	facts.Row("  clock", clock)
	a.UI.Print(facts)

	a.UI.Printf("\n")
	stores := ui.NewTable("DATASTORE", "TYPE", ">CAPACITY", ">FREE", "")
	for _, d := range r.Datastores {
		note := ""
		if !d.Accessible {
			note = "not accessible now"
		}
		stores.Row(d.Name, d.Type, ui.Size(d.BytesCapacity), ui.Size(d.BytesFree), note)
	}
	a.UI.Print(stores)

	a.UI.Printf("\n")
	a.UI.Print(vmTable(r.VMs))

	findings := slices.Clone(r.Findings)
	for _, v := range r.VMs {
		for _, f := range v.Findings {
			findings = append(findings, backup.Obstacle{What: v.Host + "/" + v.VM + ": " + f.What, Remedy: f.Remedy})
		}
	}
	if len(findings) == 0 {
		a.UI.Printf("\nNothing stands in the way.\n")
		return
	}
	a.UI.Printf("\n")
	for _, f := range findings {
		a.UI.Printf("- %s\n", ui.Clean(f.What))
		if f.Remedy != "" {
			a.UI.Printf("    %s\n", ui.Clean(f.Remedy))
		}
	}
}

func wayWords(w wayReport) string {
	switch {
	case !w.Configured:
		return "not configured"
	case w.Reachable:
		return w.Address + ", logged in"
	}
	return w.Address + ": " + w.Error
}

func wayName(way string) string {
	switch way {
	case esxi.WaySOAP:
		return "the API"
	case esxi.WayHTTPS:
		return "HTTPS"
	case esxi.WaySSH:
		return "SSH"
	}
	return "nothing"
}

// vmTable shows VMs of hosts.
func vmTable(vms []vmReport) *ui.Table {
	tab := ui.NewTable("VM", "POWER", ">DISKS", ">CAPACITY", ">SNAPSHOTS", "BACKUP BY", "WHY")
	for _, v := range vms {
		tab.Row(v.Host+"/"+v.VM, v.Power, v.Disks, ui.Size(v.BytesCapacity), v.Snapshots, wayText(v.Way), v.Reason)
	}
	return tab
}
