package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
)

func newHostTest(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "test NAME",
		Short: "try a host and say what can be done with it",
		Long: `Tries a host without changing anything on it: its certificate, the login, its
version, the room on its datastores, and for each VM how it would be backed up
and why.

Whether the host's licence allows changes through its API (the free edition does
not) cannot be read from the host; the first backup shows it.` + exitCodes(exitNotFound, exitHost),
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
	Address            string            `json:"address"`
	Thumbprint         string            `json:"thumbprint"`
	CertificateExpires time.Time         `json:"certificate_expires"`
	Product            string            `json:"product"`
	Version            string            `json:"version"`
	Build              string            `json:"build"`
	APIType            string            `json:"api_type"`
	Datastores         []datastoreReport `json:"datastores"`
	VMs                []vmReport        `json:"vms"`
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
	Way    string `json:"way"`
	Reason string `json:"reason"`
}

// The ways of vmReport.
const (
	wayChanged = "changed-areas"
	wayFull    = "full-read"
	wayNone    = "none"
)

func describeVM(host string, vm *esxi.VM) vmReport {
	r := vmReport{
		Host: host, VM: vm.Name, Power: vm.Power, Disks: len(vm.Disks),
		ChangeTracking: vm.ChangeTracking, Snapshots: len(vm.Snapshots),
	}
	var untracked, unsupported []string
	for _, d := range vm.Disks {
		r.BytesCapacity += d.Capacity
		if d.Unsupported != "" {
			unsupported = append(unsupported, d.Label+": "+d.Unsupported)
		}
		if d.ChangeID == "" {
			untracked = append(untracked, d.Label)
		}
	}
	switch {
	case vm.Invalid != "":
		r.Way, r.Reason = wayNone, vm.Invalid
	case len(vm.Disks) == 0:
		r.Way, r.Reason = wayNone, "it has no disks"
	case len(unsupported) > 0:
		r.Way, r.Reason = wayNone, strings.Join(unsupported, "; ")
	case !vm.ChangeTracking:
		r.Way, r.Reason = wayFull, "change tracking is off (ctkEnabled in its configuration)"
	case len(untracked) == len(vm.Disks):
		r.Way, r.Reason = wayFull, "change tracking is on but has not begun: it begins when the VM is powered on, or at the next snapshot"
	case len(untracked) > 0:
		r.Way, r.Reason = wayFull, "no change tracking on "+strings.Join(untracked, ", ")
	default:
		r.Way, r.Reason = wayChanged, "change tracking is on"
	}
	return r
}

// wayText is a way for people.
func wayText(way string) string {
	switch way {
	case wayChanged:
		return "changed areas"
	case wayFull:
		return "full read, compared"
	}
	return "cannot be backed up"
}

func runHostTest(ctx context.Context, a *app.App, name string) error {
	conf, err := a.Host(name)
	if err != nil {
		return err
	}
	r := hostReport{Host: conf.Name, Address: conf.Address, Thumbprint: conf.Thumbprint, Datastores: []datastoreReport{}, VMs: []vmReport{}}
	cert, err := esxi.Certificate(ctx, conf.Address)
	if err != nil {
		return err
	}
	r.CertificateExpires = cert.NotAfter.UTC()
	host, err := a.ConnectTo(ctx, conf)
	if err != nil {
		return err
	}
	defer closeHost(ctx, a, host)
	about := host.About()
	r.Product, r.Version, r.Build, r.APIType = about.Product, about.Version, about.Build, about.APIType
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
	if a.UI.JSON {
		return a.UI.Object(r)
	}
	printHostReport(a, r)
	return nil
}

func printHostReport(a *app.App, r hostReport) {
	facts := ui.NewTable(r.Host, "")
	facts.Row("  address", r.Address+", reached")
	expires := "expires " + r.CertificateExpires.Local().Format(time.DateOnly)
	if r.CertificateExpires.Before(a.Clock()) {
		expires = "expired " + r.CertificateExpires.Local().Format(time.DateOnly) + " (hikae compares the thumbprint, so it still works)"
	}
	facts.Row("  certificate", "as pinned, "+expires)
	facts.Row("  login", "accepted")
	facts.Row("  product", fmt.Sprintf("%s %s build %s", r.Product, r.Version, r.Build))
	facts.Row("  licence", "not readable; the first backup shows whether it allows snapshots through the API")
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
}

// vmTable shows VMs of hosts.
func vmTable(vms []vmReport) *ui.Table {
	tab := ui.NewTable("VM", "POWER", ">DISKS", ">CAPACITY", ">SNAPSHOTS", "BACKUP BY", "WHY")
	for _, v := range vms {
		tab.Row(v.Host+"/"+v.VM, v.Power, v.Disks, ui.Size(v.BytesCapacity), v.Snapshots, wayText(v.Way), v.Reason)
	}
	return tab
}
