package esxisim

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/hv"
	"hikae/backup/esxisim/internal/shell"
)

// vmkStatus is vmkfstools' exit status when something failed.
const vmkStatus = 255

// vmkOptions are vmkfstools' options that take a value, long and short; the
// others stand alone.
var (
	vmkLong = map[string]string{
		"createvirtualdisk": "c", "diskformat": "d", "adaptertype": "a", "clonevirtualdisk": "i", "deletevirtualdisk": "U",
		"renamevirtualdisk": "E", "extendvirtualdisk": "X", "queryfs": "P", "chainConsistent": "e", "humanreadable": "h", "verbose": "v",
		"objecttype": "W",
	}
	vmkValues = "cdaiEXtvW"
)

// parseVMK takes the command line apart. Operands may stand anywhere.
func parseVMK(args []string) (opts map[string]string, rest []string, err error) {
	opts = map[string]string{}
	for i := 0; i < len(args); i++ {
		a := args[i]
		if len(a) < 2 || a[0] != '-' {
			rest = append(rest, a)
			continue
		}
		name, value, has := "", "", false
		if long, ok := strings.CutPrefix(a, "--"); ok {
			long, value, has = strings.Cut(long, "=")
			if name, ok = vmkLong[long]; !ok {
				return nil, nil, fmt.Errorf("unrecognized option '--%s'", long)
			}
		} else {
			name, value = a[1:2], a[2:]
			has = value != ""
			if !strings.Contains("cdaiUEXPDtehvWK", name) {
				return nil, nil, fmt.Errorf("invalid option -- '%s'", name)
			}
			for has && !strings.Contains(vmkValues, name) { // -Ph
				opts[name] = ""
				name, value = value[:1], value[1:]
				has = value != ""
			}
		}
		if strings.Contains(vmkValues, name) && !has {
			if i++; i >= len(args) {
				return nil, nil, fmt.Errorf("option requires an argument -- '%s'", name)
			}
			value = args[i]
		}
		opts[name] = value
	}
	return opts, rest, nil
}

// diskSize reads a size with a unit: K, M, G, T, S for sectors; bytes without.
func diskSize(s string) (int64, error) {
	units := map[string]int64{"": 1, "s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
	n := len(s)
	for n > 0 && (s[n-1] < '0' || s[n-1] > '9') {
		n--
	}
	unit, ok := units[strings.ToLower(s[n:])]
	v, err := strconv.ParseInt(s[:n], 10, 64)
	if err != nil || !ok || v <= 0 || v > 62<<40/unit {
		return 0, fmt.Errorf("invalid size %q", s)
	}
	return v * unit / 512 * 512, nil
}

// vmkError words an error as the disk library does, with its number.
func vmkError(err error) string {
	switch is := func(kind error) bool { return errors.Is(err, kind) }; {
	case is(hv.ErrNotFound):
		return "The system cannot find the file specified (25)."
	case is(hv.ErrExists):
		return "The file already exists (39)."
	case is(hv.ErrNoSpace):
		return "There is not enough space on the file system for the selected operation (13)."
	case is(hv.ErrLocked):
		return "Failed to lock the file (16392)."
	case is(hv.ErrUnsupported):
		return "The operation is not supported on this disk type (6)."
	case is(hv.ErrInvalid):
		return "The file specified is not a virtual disk (15)."
	}
	return err.Error() + " (1)."
}

// vmkfstools is the volume and disk tool.
func (c *console) vmkfstools(ctx context.Context, p *shell.Proc) int {
	opts, rest, err := parseVMK(p.Args[1:])
	if err != nil {
		p.Errorf("%v", err)
		fmt.Fprintln(p.Err, "OPTIONS FOR VIRTUAL DISKS:\n\nvmkfstools -c #[bBsSkKmMgGtT]")
		return 1
	}
	defer c.h.refreshDatastore()
	failed := func(format string, args ...any) int {
		fmt.Fprintf(p.Err, format+"\n", args...)
		return vmkStatus
	}
	operand := func(i int) (string, string, bool) {
		if i >= len(rest) {
			fmt.Fprintln(p.Err, "Incorrect number of arguments. Need a path.")
			return "", "", false
		}
		rel, err := c.rel(p, rest[i])
		if err != nil {
			failed("Failed to open '%s': %s", rest[i], vmkError(err))
			return "", "", false
		}
		return rel, rest[i], true
	}
	has := func(o string) bool { _, ok := opts[o]; return ok }
	thin, eager, ok := vmkFormat(opts["d"])
	if !ok {
		return failed("Invalid disk format '%s'", opts["d"])
	}
	if has("i") { // the source is the option's value
		rest = append([]string{opts["i"]}, rest...)
	}
	if has("E") {
		rest = append([]string{opts["E"]}, rest...)
	}
	rel, name, ok := operand(0)
	if !ok {
		return vmkStatus
	}
	switch {
	case has("c"):
		size, err := diskSize(opts["c"])
		if err != nil {
			return failed("%v", err)
		}
		if err := c.h.hv.NewDisk(rel, size, thin, eager, ""); err != nil {
			return failed("Failed to create virtual disk: %s", vmkError(err))
		}
		fmt.Fprintln(p.Out, "Create: 100% done.")
	case has("i"):
		to, _, ok := operand(1)
		if !ok {
			return vmkStatus
		}
		fmt.Fprintf(p.Out, "Destination disk format: VMFS %s\nCloning disk '%s'...\n", vmkFormatName(thin, eager), name)
		if err := c.h.hv.Clone(ctx, rel, to, thin, eager); err != nil {
			return failed("Failed to clone disk: %s", vmkError(err))
		}
		fmt.Fprint(p.Out, "Clone: 10% done.\rClone: 55% done.\rClone: 100% done.\n")
	case has("U"):
		if err := c.deleteDisk(rel); err != nil {
			return failed("Failed to delete virtual disk: %s", vmkError(err))
		}
		fmt.Fprintln(p.Out, "Destroy: 100% done.")
	case has("E"):
		to, _, ok := operand(1)
		if !ok {
			return vmkStatus
		}
		if err := c.h.hv.RenameDisk(rel, to); err != nil {
			return failed("Failed to rename virtual disk: %s", vmkError(err))
		}
	case has("X"):
		size, err := diskSize(opts["X"])
		if err != nil {
			return failed("%v", err)
		}
		if err := c.h.hv.GrowDisk(rel, size); err != nil {
			return failed("Failed to extend the disk: %s", vmkError(err))
		}
		fmt.Fprintln(p.Out, "Grow: 100% done.")
	case has("e"):
		return c.chainCheck(p, rel, opts["v"] != "")
	case has("t"):
		if err := c.mapping(p, rel, name); err != nil {
			return failed("Failed to open '%s': %s", name, vmkError(err))
		}
	case has("P"):
		c.volumeInfo(p)
	case has("D"):
		return c.lockInfo(p, rel, name)
	default:
		return failed("Nothing to do: no option says what.")
	}
	return 0
}

// deleteDisk deletes a disk that is one.
func (c *console) deleteDisk(rel string) error {
	if _, err := c.h.hv.Stat(rel); err != nil {
		return err
	}
	if _, err := c.h.hv.DiskCapacity(rel); err != nil {
		return &hv.Error{Kind: hv.ErrInvalid, Name: rel, Text: err.Error()}
	}
	return c.h.hv.DeleteDisk(rel)
}

func vmkFormat(s string) (thin, eager, ok bool) {
	switch strings.ToLower(s) {
	case "thin":
		return true, false, true
	case "eagerzeroedthick":
		return false, true, true
	case "", "zeroedthick", "thick":
		return false, false, true
	}
	return false, false, false
}

func vmkFormatName(thin, eager bool) string {
	switch {
	case thin:
		return "thin-provisioned"
	case eager:
		return "eagerzeroedthick"
	}
	return "zeroedthick"
}

func (c *console) chainCheck(p *shell.Proc, rel string, verbose bool) int {
	err := c.h.hv.CheckChain(rel)
	if err == nil {
		fmt.Fprintln(p.Out, "Disk chain is consistent.")
		return 0
	}
	var e *hv.Error
	if errors.As(err, &e) && strings.HasPrefix(e.Text, "Content ID mismatch") {
		if verbose {
			fmt.Fprintln(p.Err, e.Text)
		}
		fmt.Fprintln(p.Err, "Disk chain is not consistent : The parent virtual disk has been modified since the child was created. "+
			"The content ID of the parent virtual disk does not match the corresponding parent content ID in the child (18)")
		return vmkStatus
	}
	fmt.Fprintf(p.Err, "Failed to open '%s': %s\n", rel, vmkError(err))
	return vmkStatus
}

// mapping prints how a disk lies on its volume. The marks of the three kinds of
// areas are as recorded; the rest of the line follows published examples.
func (c *console) mapping(p *shell.Proc, rel, name string) error {
	capacity, list, err := c.h.hv.Mapping(rel)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.Out, "Mapping for file %s (%d bytes in size):\n", name, capacity)
	id := c.h.hv.UUID()
	for _, e := range list {
		kind := "NOMP -- :"
		switch {
		case e.Zeroed:
			kind = fmt.Sprintf("VMFS Z- LVID:%s/%s/1:", id, id)
		case e.Allocated:
			kind = fmt.Sprintf("VMFS -- LVID:%s/%s/1:", id, id)
		}
		fmt.Fprintf(p.Out, "[%12d:%12d] --> [%s(%13d --> %13d)]\n", e.Offset, e.Length, kind, e.Place, e.Place+e.Length)
	}
	return nil
}

func (c *console) volumeInfo(p *shell.Proc) {
	capacity, free := c.h.hv.Space()
	version, major := "6.82", 24
	if c.h.o.VMFS == 5 {
		version, major = "5.81", 14
	}
	fmt.Fprintf(p.Out, "VMFS-%s (Raw Major Version: %d) file system spanning 1 partitions.\nFile system label (if any): %s\nMode: public\n", version, major, c.h.hv.Datastore())
	fmt.Fprintf(p.Out, "Capacity %d (%d file blocks * 1048576), %d (%d blocks) avail, max supported file size %d\nDisk Block Size: 512/512/0\n",
		capacity, capacity>>20, free, free>>20, int64(64)<<40)
	fmt.Fprintf(p.Out, "UUID: %s\nPartitions spanned (on \"lvm\"):\n\tmpx.vmhba0:C0:T0:L0:3\nIs Native Snapshot Capable: NO\n", c.h.hv.UUID())
}

// lockInfo prints who holds a file.
func (c *console) lockInfo(p *shell.Proc, rel, name string) int {
	fi, err := c.h.hv.Stat(rel)
	if err != nil {
		fmt.Fprintf(p.Err, "Could not open '%s': %s\n", name, vmkError(err))
		return vmkStatus
	}
	mode, owner := 0, "00000000-00000000-0000-000000000000"
	if c.h.hv.InUse(rel, true) {
		mode, owner = 1, "5e0026d9-00000000-0000-4cedfb76e9d5"
	}
	fmt.Fprintf(p.Out, "Lock [type 10c00001 offset 236560384 v 44, hb offset 4091904\ngen 6155, mode %d, owner %s mtime 23668\nnum 0 gblnum 0 gblgen 0 gblbrk 0]\n", mode, owner)
	fmt.Fprintf(p.Out, "Addr <4, 558, 4>, gen 6, links 1, type reg, flags 0, uid 0, gid 0, mode 600\nlen %d, nb %d tbz 0, cow 0, newSinceEpoch 0, zla 1, bs 1048576\n",
		fi.Size(), (c.h.hv.Used(rel, fi)+1<<20-1)>>20)
	return 0
}
