package esxisim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/esxisim/internal/shell"
)

// vimCall is one call of vim-cmd.
type vimCall struct {
	c    *console
	ctx  context.Context
	p    *shell.Proc
	args []string // behind the command
	vm   *hv.VM   // of the commands of vmsvc that take one
}

// vimCommand is one of vim-cmd's commands.
type vimCommand struct {
	args  string // for people
	least int    // arguments it needs
	help  string
	vm    bool // the first argument is a VM's id
	run   func(v *vimCall) error
}

var vimCommands map[string]vimCommand

func init() { // the commands ask the table for their usage
	vimCommands = map[string]vimCommand{
		"vmsvc/getallvms":          {"", 0, "Get the list of virtual machines on the host", false, (*vimCall).getAllVMs},
		"vmsvc/power.getstate":     {"vmid", 1, "Retrieve the power state of the virtual machine.", true, (*vimCall).powerState},
		"vmsvc/power.on":           {"vmid", 1, "Power on the specified virtual machine.", true, (*vimCall).powerOn},
		"vmsvc/power.off":          {"vmid", 1, "Power off the specified virtual machine.", true, (*vimCall).powerOff},
		"vmsvc/power.shutdown":     {"vmid", 1, "Power off the guest.", true, (*vimCall).shutdown},
		"vmsvc/power.reset":        {"vmid", 1, "Reset the specified virtual machine.", true, (*vimCall).reset},
		"vmsvc/get.summary":        {"vmid", 1, "Get summary of the virtual machine.", true, (*vimCall).summary},
		"vmsvc/get.config":         {"vmid", 1, "Get configuration information for the virtual machine.", true, (*vimCall).config},
		"vmsvc/get.runtime":        {"vmid", 1, "Get runtime information for the virtual machine.", true, (*vimCall).runtime},
		"vmsvc/get.guest":          {"vmid", 1, "Get guest information.", true, (*vimCall).guest},
		"vmsvc/get.filelayout":     {"vmid", 1, "Get the file layout of the virtual machine.", true, (*vimCall).fileLayout},
		"vmsvc/get.filelayoutex":   {"vmid", 1, "Get the file layout of the virtual machine.", true, (*vimCall).fileLayoutEx},
		"vmsvc/get.snapshotinfo":   {"vmid", 1, "Get the snapshot information of the virtual machine.", true, (*vimCall).snapshotInfo},
		"vmsvc/get.datastores":     {"vmid", 1, "Get list of datastores used by the virtual machine.", true, (*vimCall).datastores},
		"vmsvc/get.tasklist":       {"vmid", 1, "Get a list of tasks running on the virtual machine.", true, (*vimCall).taskList},
		"vmsvc/device.getdevices":  {"vmid", 1, "Get a list of virtual devices.", true, (*vimCall).devices},
		"vmsvc/snapshot.get":       {"vmid", 1, "Retrieve snapshots.", true, (*vimCall).snapshots},
		"vmsvc/snapshot.create":    {"vmid [snapshotName] [snapshotDescription] [includeMemory] [quiesced]", 1, "Create a snapshot of the virtual machine.", true, (*vimCall).createSnapshot},
		"vmsvc/snapshot.remove":    {"vmid snapshotId [removeChildren]", 2, "Remove a snapshot.", true, (*vimCall).removeSnapshot},
		"vmsvc/snapshot.removeall": {"vmid", 1, "Remove all snapshots of the virtual machine.", true, (*vimCall).removeAll},
		"vmsvc/snapshot.revert":    {"vmid snapshotId [suppressPowerOn]", 2, "Revert to a snapshot.", true, (*vimCall).revert},
		"vmsvc/power.suspend":      {"vmid", 1, "Suspend the specified virtual machine.", true, (*vimCall).suspend},
		"vmsvc/reload":             {"vmid", 1, "Reload the virtual machine configuration.", true, func(v *vimCall) error { return v.vm.Reload() }},
		"vmsvc/message":            {"vmid [messageId] [messageChoice]", 1, "Show the current virtual machine message.", true, (*vimCall).message},
		"vmsvc/unregister":         {"vmid", 1, "Unregister the specified virtual machine.", true, func(v *vimCall) error { return v.vm.Unregister() }},
		"vmsvc/destroy":            {"vmid", 1, "Delete the specified virtual machine from disk.", true, func(v *vimCall) error { return v.vm.Destroy() }},
		"solo/registervm":          {"[/vmfs/volumes/datastore/]path.vmx [name] [resourcepool]", 1, "Register a virtual machine.", false, (*vimCall).register},
		"solo/registerVm":          {"[/vmfs/volumes/datastore/]path.vmx [name] [resourcepool]", 1, "Register a virtual machine.", false, (*vimCall).register},
		"vimsvc/license":           {"--show", 1, "Show the licenses.", false, (*vimCall).license},
		"vimsvc/task_list":         {"", 0, "Show the tasks.", false, (*vimCall).allTasks},
		"vimsvc/task_info":         {"taskId", 1, "Show a task.", false, (*vimCall).taskInfo},
		"hostsvc/hostsummary":      {"", 0, "Summary of the host.", false, (*vimCall).hostSummary},
		"hostsvc/hosthardware":     {"", 0, "Hardware of the host.", false, (*vimCall).hostHardware},

		"hostsvc/datastore/listsummary": {"", 0, "Summaries of the datastores.", false, (*vimCall).datastoreSummaries},
		"hostsvc/datastore/info":        {"datastore", 1, "Information about a datastore.", false, (*vimCall).datastoreInfo},
	}
}

// vimCmd is vim-cmd.
func (c *console) vimCmd(ctx context.Context, p *shell.Proc) int {
	if len(p.Args) < 2 || p.Args[1] == "help" || p.Args[1] == "-h" {
		fmt.Fprintln(p.Out, "Commands available under /:")
		for _, group := range []string{"hbrsvc/", "internalsvc/", "solo/", "vmsvc/", "hostsvc/", "proxysvc/", "vimsvc/", "help"} {
			fmt.Fprintln(p.Out, group)
		}
		return 0
	}
	name := strings.TrimPrefix(p.Args[1], "/")
	cmd, ok := vimCommands[name]
	if !ok {
		return c.noCommand(p, name)
	}
	v := &vimCall{c: c, ctx: ctx, p: p, args: p.Args[2:]}
	if len(v.args) < cmd.least {
		base := name[strings.LastIndexByte(name, '/')+1:]
		fmt.Fprintf(p.Out, "Insufficient arguments.\nUsage: %s %s\n\n%s\n", base, cmd.args, cmd.help)
		return 1
	}
	if cmd.vm {
		id, err := strconv.Atoi(v.args[0])
		if err == nil {
			v.vm = c.h.hv.VM(id)
		}
		if v.vm == nil {
			return c.fail(p, soapError{&types.NotFound{}, fmt.Sprintf("Unable to find a VM corresponding to \"%s\"", v.args[0])})
		}
		v.args = v.args[1:]
	}
	err := cmd.run(v)
	var said statusError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &said):
		return int(said)
	}
	return c.fail(p, c.h.vimFault(err, v.vm))
}

// statusError ends a call that has said already what is wrong.
type statusError int

func (statusError) Error() string { return "failed" }

// noCommand lists a group, or says that there is no such command.
func (c *console) noCommand(p *shell.Proc, name string) int {
	prefix := strings.TrimSuffix(name, "/") + "/"
	var below []string
	for n := range vimCommands {
		if rest, ok := strings.CutPrefix(n, prefix); ok {
			below = append(below, rest)
		}
	}
	if below == nil {
		fmt.Fprintf(p.Out, "Invalid command '%s'.\n", name)
		return 1
	}
	slices.Sort(below)
	fmt.Fprintf(p.Out, "Commands available under %s:\n%s\n", prefix, strings.Join(below, "\n"))
	return 0
}

func (c *console) dumper(w io.Writer) *dumper {
	return &dumper{w: w, rules: c.h.edition.shell, ds: c.h.hv.UUID()}
}

func (v *vimCall) dump(object any) { v.c.dumper(v.p.Out).object(object) }

// fail prints a fault as vim-cmd does, on standard output.
func (c *console) fail(p *shell.Proc, s soapError) int {
	c.dumper(p.Out).fault(s.fault, s.text)
	return c.h.edition.shell.faultStatus
}

// printFault prints a fault that was asked for by name.
func (c *console) printFault(p *shell.Proc, name, text string) int {
	fault, err := newFault(name)
	if err != nil {
		p.Errorf("%v", err)
		return 1
	}
	if text == "" {
		text = "injected fault: " + name
	}
	return c.fail(p, soapError{fault, text})
}

// vimFault is asFault with what a VM's state adds.
func (h *Host) vimFault(err error, vm *hv.VM) soapError {
	s := h.asFault(err)
	if f, ok := s.fault.(*types.InvalidPowerState); ok && vm != nil {
		f.ExistingState, f.RequestedState = state(vm), power(!vm.On(), false)
		state := map[types.VirtualMachinePowerState]string{
			types.VirtualMachinePowerStatePoweredOn: "Powered on", types.VirtualMachinePowerStatePoweredOff: "Powered off",
			types.VirtualMachinePowerStateSuspended: "Suspended",
		}[f.ExistingState]
		s.text = "The attempted operation cannot be performed in the current state (" + state + ")."
	}
	return s
}

// table prints rows as vim-cmd does: headings centred over columns that are as
// wide as their widest value, three blanks between them.
func table(w io.Writer, head []string, rows [][]string) {
	width := make([]int, len(head))
	for i, h := range head {
		width[i] = len(h)
		for _, r := range rows {
			width[i] = max(width[i], len(r[i]))
		}
	}
	width[len(head)-1] = len(head[len(head)-1]) // annotations are as long as they are
	var line strings.Builder
	for i, h := range head {
		left := (width[i] - len(h)) / 2
		fmt.Fprintf(&line, "%*s%-*s", left, "", width[i]-left, h)
		if i < len(head)-1 {
			line.WriteString("   ")
		}
	}
	fmt.Fprintln(w, line.String())
	for _, r := range rows {
		line.Reset()
		for i, v := range r {
			fmt.Fprintf(&line, "%-*s", width[i], v)
			if i < len(r)-1 {
				line.WriteString("   ")
			}
		}
		fmt.Fprintln(w, line.String())
	}
}

func (v *vimCall) getAllVMs() error {
	var rows [][]string
	for _, vm := range v.c.h.hv.VMs() {
		if vm.Broken() {
			fmt.Fprintf(v.p.Out, "Skipping invalid VM '%d'\n", vm.ID())
			continue
		}
		info, err := vm.Info()
		if err != nil {
			continue // it went meanwhile
		}
		guest, _ := info.Config.Get("guestOS")
		note, _ := info.Config.Get("annotation")
		rows = append(rows, []string{
			strconv.Itoa(info.ID), info.Name, v.c.h.hv.Path(info.Path), guestID(guest), "vmx-" + fmt.Sprintf("%02d", hardware(info.Config)), note,
		})
	}
	table(v.p.Out, []string{"Vmid", "Name", "File", "Guest OS", "Version", "Annotation"}, rows)
	return nil
}

// snapshots prints the tree.
func (v *vimCall) snapshots() error {
	info, err := v.vm.Info()
	if err != nil {
		return err
	}
	fmt.Fprintln(v.p.Out, "Get Snapshot:")
	v.tree(info, 0, "")
	return nil
}

func (v *vimCall) tree(info hv.Info, parent int, indent string) {
	for _, s := range info.Snapshots {
		if s.Parent != parent {
			continue
		}
		mark := "|-CHILD"
		if parent == 0 {
			mark = "|-ROOT"
		}
		state := "powered off"
		if s.Memory {
			state = "powered on"
		}
		at := s.Created.UTC()
		fmt.Fprintln(v.p.Out, indent+mark)
		for _, f := range [][2]string{
			{"Snapshot Name        ", s.Name},
			{"Snapshot Id        ", strconv.Itoa(s.ID)},
			{"Snapshot Desciption  ", s.Description}, // the host's spelling
			{"Snapshot Created On  ", fmt.Sprintf("%d/%d/%d %d:%d:%d", at.Month(), at.Day(), at.Year(), at.Hour(), at.Minute(), at.Second())},
			{"Snapshot State       ", state},
		} {
			fmt.Fprintf(v.p.Out, "%s--%s: %s\n", indent, f[0], f[1])
		}
		v.tree(info, s.ID, indent+"--")
	}
}
