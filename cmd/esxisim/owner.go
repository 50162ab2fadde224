package main

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"hikae/backup/esxisim"
)

// ownerAction is something a VM's owner does to it.
type ownerAction struct {
	args string // behind the VM's name
	help string
	do   func(h *esxisim.Host, vm string, args []string) error
}

func named(f func(h *esxisim.Host, vm, name string) error) func(*esxisim.Host, string, []string) error {
	return func(h *esxisim.Host, vm string, args []string) error { return f(h, vm, args[0]) }
}

func plain(f func(h *esxisim.Host, vm string) error) func(*esxisim.Host, string, []string) error {
	return func(h *esxisim.Host, vm string, _ []string) error { return f(h, vm) }
}

var ownerActions = map[string]ownerAction{
	"power-on":  {"", "start it", plain((*esxisim.Host).PowerOn)},
	"power-off": {"", "stop it at once", plain((*esxisim.Host).PowerOff)},
	"suspend":   {"", "put it to sleep", plain((*esxisim.Host).Suspend)},
	"snapshot":  {"NAME", "make a snapshot", named((*esxisim.Host).Snapshot)},
	"revert":    {"NAME", "go back to a snapshot", named((*esxisim.Host).Revert)},
	"remove":    {"NAME", "remove a snapshot", named((*esxisim.Host).RemoveSnapshot)},
	"annotate":  {"TEXT", "set its note", named((*esxisim.Host).Annotate)},
	"grow": {"DISK SIZE", "make a disk bigger", func(h *esxisim.Host, vm string, args []string) error {
		disk, err := strconv.Atoi(args[0])
		if err != nil {
			return fmt.Errorf("a disk is a number, counted from 0")
		}
		size, err := parseSize(args[1])
		if err != nil {
			return err
		}
		return h.GrowDisk(vm, disk, size)
	}},
	"add-disk": {"KIND SIZE", "another disk: thin, thick, independent, rdm-physical or rdm-virtual", func(h *esxisim.Host, vm string, args []string) error {
		o := esxisim.DiskOptions{Thin: args[0] == "thin", Independent: args[0] == "independent"}
		if !slices.Contains([]string{"thin", "thick", "independent", "rdm-physical", "rdm-virtual"}, args[0]) {
			return fmt.Errorf("a disk is thin, thick, independent, rdm-physical or rdm-virtual, not %q", args[0])
		}
		o.RawDevice, _ = strings.CutPrefix(args[0], "rdm-")
		if o.RawDevice == args[0] {
			o.RawDevice = ""
		}
		var err error
		if o.Size, err = parseSize(args[1]); err != nil {
			return err
		}
		return h.AddDisk(vm, o)
	}},
	"track":            {"on|off", "change tracking, from the next snapshot or start on", named(setTracking)},
	"track-blind":      {"", "change tracking in spite of snapshots: it misses writes up to the next one", plain((*esxisim.Host).TrackWithSnapshots)},
	"strange-tracking": {"", "change tracking files of an unknown layout", plain((*esxisim.Host).UseStrangeTracking)},
}

func setTracking(h *esxisim.Host, vm, on string) error {
	if on != "on" && on != "off" {
		return fmt.Errorf("change tracking is on or off, not %q", on)
	}
	return h.SetChangeTracking(vm, on == "on")
}

func (a ownerAction) count() int { return len(strings.Fields(a.args)) }

func vmCommand() *cobra.Command {
	var names, list []string
	for n := range ownerActions {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		a := ownerActions[n]
		list = append(list, fmt.Sprintf("  %-30s %s", strings.TrimSpace(n+" VM "+a.args), a.help))
	}
	cmd := &cobra.Command{
		Use:   "vm ACTION VM [ARGUMENT…]",
		Short: "What a VM's owner does to it: power, snapshots, disks, change tracking",
		Long:  "What a VM's owner does to it:\n\n" + strings.Join(list, "\n"),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("vm takes an action: %s", strings.Join(names, ", "))
			}
			a, ok := ownerActions[args[0]]
			if !ok {
				return usage("there is no action %q: %s", args[0], strings.Join(names, ", "))
			}
			if len(args) != 2+a.count() {
				return usage("%s takes: VM %s", args[0], a.args)
			}
			return nil
		},
	}
	dial := controlFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := dial()
		if err != nil {
			return err
		}
		return c.print(cmd, http.MethodPost, "/vm", url.Values{"action": args[:1], "vm": args[1:2], "arg": args[2:]}, nil)
	}
	return cmd
}

func crashCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "crash",
		Short: "Cut the host's power: VMs are off, change tracking knows nothing, sessions are gone",
		Args:  exactArgs(0),
	}
	dial := controlFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := dial()
		if err != nil {
			return err
		}
		return c.print(cmd, http.MethodPost, "/crash", nil, nil)
	}
	return cmd
}

func (c *control) vm(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	a, ok := ownerActions[q.Get("action")]
	err := fmt.Errorf("there is no action %q", q.Get("action"))
	if ok && len(q["arg"]) == a.count() {
		err = a.do(c.h, q.Get("vm"), q["arg"])
	}
	reply(w, map[string]string{"vm": q.Get("vm")}, err)
}

func (c *control) crash(w http.ResponseWriter, _ *http.Request) {
	reply(w, map[string]string{}, c.h.Crash())
}
