package esxisim

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"hikae/backup/esxisim/internal/shell"
)

// cell is a named value of an answer.
type cell struct {
	name  string
	value any // string, int64, bool
}

// answer of an esxcli command: one record, or a list of them.
type esxcliAnswer struct {
	kind  string // of the records, for keyvalue
	list  bool
	table bool // printed as a table, not as blocks
	title int  // the cell that heads a block, with blocks
	rows  [][]cell
}

type esxcliCommand func(c *console, opts map[string]string) (*esxcliAnswer, error)

var esxcliCommands = map[string]esxcliCommand{
	"system version get": func(c *console, _ map[string]string) (*esxcliAnswer, error) {
		e := c.h.edition
		return &esxcliAnswer{kind: "VersionGet", rows: [][]cell{{
			{"Product", "VMware ESXi"},
			{"Version", e.version},
			{"Build", "Releasebuild-" + e.build},
			{"Update", strings.TrimPrefix(e.update, "Update ")},
			{"Patch", e.patch},
		}}}, nil
	},
	"system hostname get": func(*console, map[string]string) (*esxcliAnswer, error) {
		return &esxcliAnswer{kind: "FullyQualifiedHostName", rows: [][]cell{{
			{"Domain Name", "localdomain"}, {"Fully Qualified Domain Name", hostname}, {"Host Name", "localhost"},
		}}}, nil
	},
	"system time get": func(c *console, _ map[string]string) (*esxcliAnswer, error) {
		return &esxcliAnswer{kind: "Time", rows: [][]cell{{{"", c.h.o.Clock().UTC().Format("2006-01-02T15:04:05Z")}}}}, nil
	},
	"system uuid get": func(c *console, _ map[string]string) (*esxcliAnswer, error) {
		return &esxcliAnswer{kind: "UUID", rows: [][]cell{{{"", c.h.hv.UUID()}}}}, nil
	},
	"storage filesystem list": func(c *console, _ map[string]string) (*esxcliAnswer, error) {
		a := &esxcliAnswer{kind: "FilesystemVolume", list: true, table: true}
		for _, v := range c.volumes() {
			a.rows = append(a.rows, []cell{
				{"Mount Point", v.mount}, {"Volume Name", v.name}, {"UUID", v.uuid}, {"Mounted", true}, {"Type", v.kind}, {"Size", v.size}, {"Free", v.free},
			})
		}
		return a, nil
	},
	"network ip interface ipv4 get": func(*console, map[string]string) (*esxcliAnswer, error) {
		return &esxcliAnswer{kind: "IPv4Interface", list: true, table: true, rows: [][]cell{{
			{"Name", "vmk0"},
			{"IPv4 Address", "127.0.0.1"},
			{"IPv4 Netmask", "255.0.0.0"},
			{"IPv4 Broadcast", "127.255.255.255"},
			{"Address Type", "STATIC"},
			{"Gateway", "0.0.0.0"},
			{"DHCP DNS", false},
		}}}, nil
	},
	"network ip interface list": func(*console, map[string]string) (*esxcliAnswer, error) {
		return &esxcliAnswer{kind: "NetworkInterface", list: true, rows: [][]cell{{
			{"Name", "vmk0"}, {"MAC Address", "00:0c:29:00:00:01"}, {"Enabled", true}, {"Portset", "vSwitch0"}, {"Portgroup", "Management Network"}, {"MTU", int64(1500)},
		}}}, nil
	},
	"network ip connection list": func(*console, map[string]string) (*esxcliAnswer, error) {
		return &esxcliAnswer{kind: "IpConnection", list: true, table: true, rows: [][]cell{{
			{"Proto", "tcp"}, {"Recv Q", int64(0)}, {"Send Q", int64(0)}, {"Local Address", "0.0.0.0:22"}, {"Foreign Address", "0.0.0.0:0"}, {"State", "LISTEN"},
		}}}, nil
	},
	"vm process list": func(c *console, _ map[string]string) (*esxcliAnswer, error) {
		a := &esxcliAnswer{kind: "VirtualMachine", list: true, title: 4}
		for _, vm := range c.h.hv.VMs() {
			info, err := vm.Info()
			if err != nil || !info.On {
				continue
			}
			uuid, _ := info.Config.Get("uuid.bios")
			a.rows = append(a.rows, []cell{
				{"World ID", worldID(vm.ID())},
				{"Process ID", int64(0)},
				{"VMX Cartel ID", worldID(vm.ID()) - 1},
				{"UUID", uuid},
				{"Display Name", info.Name},
				{"Config File", path.Join("/vmfs/volumes", c.h.hv.UUID(), info.Path)},
			})
		}
		return a, nil
	},
	"vm process kill": func(c *console, opts map[string]string) (*esxcliAnswer, error) {
		for _, vm := range c.h.hv.VMs() {
			if vm.On() && strconv.FormatInt(worldID(vm.ID()), 10) == opts["world-id"]+opts["w"] {
				return nil, vm.PowerOff()
			}
		}
		return nil, fmt.Errorf("unable to find a virtual machine with the world ID \"%s\"", opts["world-id"]+opts["w"])
	},
	"software profile get": func(c *console, _ map[string]string) (*esxcliAnswer, error) {
		e := c.h.edition
		name := "(Updated) ESXi-" + e.version + "-" + e.build + "-standard"
		return &esxcliAnswer{kind: "ImageProfile", title: 0, rows: [][]cell{{
			{"Name", name}, {"Vendor", "VMware, Inc."}, {"Creation Time", "2026-01-01T00:00:00"}, {"Acceptance Level", "PartnerSupported"},
		}}}, nil
	},
	"system settings advanced list": func(_ *console, opts map[string]string) (*esxcliAnswer, error) {
		known := map[string]int64{
			"/Security/AccountLockFailures": lockAfter, "/Security/AccountUnlockTime": int64(lockFor.Seconds()), "/UserVars/ESXiShellInteractiveTimeOut": 0, "/UserVars/SuppressShellWarning": 0, "/Config/HostAgent/vmacore/soap/maxSessionCount": 500,
		}
		name := opts["option"] + opts["o"]
		v, ok := known[name]
		if !ok {
			return nil, fmt.Errorf("unable to find option %s", strings.TrimPrefix(path.Base(name), "/"))
		}
		return &esxcliAnswer{kind: "Option", list: true, rows: [][]cell{{{"Path", name}, {"Type", "integer"}, {"Int Value", v}, {"Default Int Value", v}}}}, nil
	},
}

func worldID(vm int) int64 { return 2_097_000 + 10*int64(vm) }

// esxcli runs one of its commands.
func (c *console) esxcli(_ context.Context, p *shell.Proc) int {
	var words []string
	opts := map[string]string{}
	for args := p.Args[1:]; len(args) > 0; args = args[1:] {
		a := args[0]
		if !strings.HasPrefix(a, "-") {
			words = append(words, a)
			continue
		}
		name, value, has := strings.Cut(strings.TrimLeft(a, "-"), "=")
		if !has && len(args) > 1 && !strings.HasPrefix(args[1], "-") {
			value, args = args[1], args[1:]
		}
		opts[name] = value
	}
	cmd, ok := esxcliCommands[strings.Join(words, " ")]
	if !ok {
		fmt.Fprintf(p.Err, "Error: Unknown command or namespace %s\n", strings.Join(words, " "))
		return 1
	}
	a, err := cmd(c, opts)
	if err != nil {
		fmt.Fprintf(p.Err, "Error: %v\n", err)
		return 1
	}
	if a == nil {
		return 0
	}
	switch f := opts["formatter"]; {
	case f == "":
		a.plain(p)
	case f == "csv":
		a.csv(p)
	case f == "keyvalue":
		a.keyValue(p)
	case f == "json" && c.h.edition.name >= "6.7":
		a.json(p)
	default:
		fmt.Fprintf(p.Err, "Error: Invalid formatter %s\n", f)
		return 1
	}
	return 0
}

func (a *esxcliAnswer) plain(p *shell.Proc) {
	if a.table {
		a.columns(p)
		return
	}
	for i, row := range a.rows {
		indent := "   "
		if a.list && i > 0 {
			fmt.Fprintln(p.Out)
		}
		if a.list || a.kind == "ImageProfile" {
			fmt.Fprintln(p.Out, row[a.title].value)
		}
		for _, f := range row {
			if f.name == "" {
				fmt.Fprintln(p.Out, f.value)
				continue
			}
			fmt.Fprintf(p.Out, "%s%s: %v\n", indent, f.name, f.value)
		}
	}
}

// columns prints a table: two blanks between columns, numbers to the right.
func (a *esxcliAnswer) columns(p *shell.Proc) {
	if len(a.rows) == 0 {
		return
	}
	width := make([]int, len(a.rows[0]))
	right := make([]bool, len(width))
	for _, row := range a.rows {
		for i, f := range row {
			width[i] = max(width[i], len(f.name), len(fmt.Sprint(f.value)))
			_, right[i] = f.value.(int64)
		}
	}
	line := func(text func(i int) string) {
		var cols []string
		for i := range width {
			w := -width[i]
			if right[i] {
				w = width[i]
			}
			cols = append(cols, fmt.Sprintf("%*s", w, text(i)))
		}
		fmt.Fprintln(p.Out, strings.TrimRight(strings.Join(cols, "  "), " "))
	}
	line(func(i int) string { return a.rows[0][i].name })
	line(func(i int) string { return strings.Repeat("-", width[i]) })
	for _, row := range a.rows {
		line(func(i int) string { return fmt.Sprint(row[i].value) })
	}
}

func (f cell) key() string { return strings.ReplaceAll(f.name, " ", "") }

// csv prints the columns by their names' order, each with a comma behind it.
// What contains one is quoted, with its quotes doubled.
func (a *esxcliAnswer) csv(p *shell.Proc) {
	for i, row := range a.rows {
		row = slices.Clone(row)
		slices.SortFunc(row, func(x, y cell) int { return strings.Compare(x.key(), y.key()) })
		if i == 0 {
			for _, f := range row {
				fmt.Fprint(p.Out, f.key(), ",")
			}
			fmt.Fprintln(p.Out)
		}
		for _, f := range row {
			text := fmt.Sprint(f.value)
			if strings.ContainsAny(text, ",\"\n") {
				text = `"` + strings.ReplaceAll(text, `"`, `""`) + `"`
			}
			fmt.Fprint(p.Out, text, ",")
		}
		fmt.Fprintln(p.Out)
	}
}

func (a *esxcliAnswer) keyValue(p *shell.Proc) {
	for i, row := range a.rows {
		prefix := a.kind
		if a.list {
			prefix = fmt.Sprintf("%s[%d]", a.kind, i)
		}
		for _, f := range row {
			kind := "string"
			switch f.value.(type) {
			case int64:
				kind = "integer"
			case bool:
				kind = "boolean"
			}
			fmt.Fprintf(p.Out, "%s.%s.%s=%v\n", prefix, f.key(), kind, f.value)
		}
	}
}

func (a *esxcliAnswer) json(p *shell.Proc) {
	records := []map[string]any{}
	for _, row := range a.rows {
		m := map[string]any{}
		for _, f := range row {
			m[f.key()] = f.value
		}
		records = append(records, m)
	}
	var v any = records
	if !a.list && len(records) == 1 {
		v = records[0]
	}
	e := json.NewEncoder(p.Out)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		p.Errorf("%v", err)
	}
}
