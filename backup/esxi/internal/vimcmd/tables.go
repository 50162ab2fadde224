package vimcmd

import (
	"encoding/csv"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// VM is a line of vmsvc/getallvms.
type VM struct {
	ID        int
	Name      string
	Datastore string
	Path      string // of the .vmx within the datastore
}

// vmLine takes a line apart from both ends, because names and paths may
// contain spaces and brackets: the id first, the last "[datastore] path.vmx"
// that is followed by a guest and a hardware version.
var vmLine = regexp.MustCompile(`^(\d+)\s+(.+?)\s+\[([^\]\r\n]+)\]\s+(.+?\.vmx)\s+\S+\s+vmx-\d+(?:\s.*)?$`)

// ParseVMs reads vmsvc/getallvms. invalid lists the ids of registrations that
// the host cannot read ("Skipping invalid VM '4'"). Further lines of annotations
// are passed over; because an annotation may look like a VM, a caller confirms
// each path by vmsvc/get.config.
func ParseVMs(output string) (vms []VM, invalid []int, err error) {
	header := false
	for _, line := range strings.Split(output, "\n") {
		line = strings.TrimRight(line, " \r\t")
		if rest, ok := strings.CutPrefix(line, "Skipping invalid VM '"); ok {
			if id, err := strconv.Atoi(strings.TrimSuffix(rest, "'")); err == nil {
				invalid = append(invalid, id)
			}
			continue
		}
		if f := strings.Fields(line); len(f) >= 3 && f[0] == "Vmid" && f[1] == "Name" && f[2] == "File" {
			header = true
			continue
		}
		m := vmLine.FindStringSubmatch(line)
		if !header || m == nil {
			continue
		}
		id, err := strconv.Atoi(m[1])
		if err != nil || slices.ContainsFunc(vms, func(v VM) bool { return v.ID == id }) {
			continue // the id of a VM seen before: a line of an annotation
		}
		vms = append(vms, VM{ID: id, Name: m[2], Datastore: m[3], Path: m[4]})
	}
	if !header {
		return nil, invalid, fmt.Errorf("%w: vmsvc/getallvms printed no heading: %q", ErrFormat, short(output))
	}
	return vms, invalid, nil
}

// ParsePowerState reads vmsvc/power.getstate: "on", "off" or "suspended".
func ParsePowerState(output string) (string, error) {
	for _, line := range strings.Split(output, "\n") {
		switch strings.TrimSpace(line) {
		case "Powered on":
			return "on", nil
		case "Powered off":
			return "off", nil
		case "Suspended":
			return "suspended", nil
		}
	}
	return "", fmt.Errorf("%w: no power state in %q", ErrFormat, short(output))
}

// Snapshot is one of a VM's snapshots.
type Snapshot struct {
	ID          int
	Name        string
	Parent      int // the id of the snapshot below, 0 for the first
	Description string
	Created     time.Time // to the second; zero when the host prints it in no known form
}

// snapField is a line of the tree: dashes as deep as the snapshot lies, the
// field's name (the host spells Description "Desciption"), a colon.
var snapField = regexp.MustCompile(`^(-*)Snapshot (Name|Id|Desc?r?iption|Created On|State)\s*: ?(.*)$`)

// ParseSnapshots reads vmsvc/snapshot.get and the tree that snapshot.create,
// remove and revert print. Names and descriptions may hold line feeds, so a
// snapshot counts only where a name is followed by its own id at the same
// depth.
func ParseSnapshots(output string) ([]Snapshot, error) {
	if !strings.Contains(output, "Snapshot:") && !strings.Contains(output, "Snapshots:") {
		return nil, fmt.Errorf("%w: no snapshot heading in %q", ErrFormat, short(output))
	}
	var out []Snapshot
	var name string
	depth, last := -1, -1 // of the name being read, and of the snapshot before
	describing := false
	parents := map[int]int{} // by depth
	for _, line := range strings.Split(output, "\n") {
		line = strings.TrimRight(line, "\r")
		m := snapField.FindStringSubmatch(line)
		if m == nil {
			switch {
			case depth >= 0:
				name += "\n" + line
			case describing:
				out[len(out)-1].Description += "\n" + line
			}
			continue
		}
		if depth < 0 && len(out) > 0 && len(m[1]) == last {
			s := &out[len(out)-1]
			switch m[2] {
			case "Created On":
				if t, err := time.Parse("1/2/2006 15:4:5", strings.TrimSpace(m[3])); err == nil {
					s.Created = t
				}
				describing = false
			case "State":
				describing = false
			case "Name", "Id":
			default:
				s.Description, describing = m[3], true
			}
		}
		if m[2] == "Name" {
			depth, name, describing = len(m[1]), m[3], false
			continue
		}
		id, err := strconv.Atoi(strings.TrimSpace(m[3]))
		if m[2] != "Id" || err != nil || depth != len(m[1]) {
			continue
		}
		last = depth
		parent := 0
		for d := depth - 1; d >= 0 && parent == 0; d-- {
			parent = parents[d]
		}
		parents[depth] = id
		for d := range parents {
			if d > depth {
				delete(parents, d)
			}
		}
		out = append(out, Snapshot{ID: id, Name: name, Parent: parent})
		depth = -1
	}
	return out, nil
}

// ParseTasks reads vmsvc/get.tasklist: the names of tasks, such as
// "haTask-512-vim.VirtualMachine.createSnapshot-3887".
func ParseTasks(output string) ([]string, error) {
	v, err := ParseDump(output)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, i := range v.Items {
		out = append(out, strings.TrimPrefix(i.Text, "vim.Task:"))
	}
	return out, nil
}

// Message is a question that a VM waits with.
type Message struct {
	ID      string // of the question, for the answer
	Text    string
	Choices []Choice
}

// Choice is one possible answer.
type Choice struct {
	Number  int
	Text    string
	Default bool
}

var choiceLine = regexp.MustCompile(`^\s*(\d+)\. (.*)$`)

// ParseMessage reads vmsvc/message; nil means that the VM waits for nothing.
func ParseMessage(output string) (*Message, error) {
	if strings.Contains(output, "No message.") {
		return nil, nil
	}
	var m *Message
	for _, line := range strings.Split(output, "\n") {
		line = strings.TrimRight(line, "\r ")
		if rest, ok := strings.CutPrefix(line, "Virtual machine message "); ok && m == nil {
			m = &Message{ID: strings.TrimSuffix(rest, ":")}
			continue
		}
		if m == nil {
			continue
		}
		if c := choiceLine.FindStringSubmatch(line); c != nil {
			n, err := strconv.Atoi(c[1])
			if err != nil {
				continue
			}
			text, isDefault := strings.CutSuffix(c[2], " [default]")
			m.Choices = append(m.Choices, Choice{Number: n, Text: text, Default: isDefault})
			continue
		}
		m.Text = strings.TrimSpace(m.Text + "\n" + line)
	}
	if m == nil {
		return nil, fmt.Errorf("%w: vmsvc/message printed %q", ErrFormat, short(output))
	}
	return m, nil
}

// Filesystem is a line of esxcli storage filesystem list.
type Filesystem struct {
	MountPoint, Name, UUID, Type string
	Mounted                      bool
	Size, Free                   int64 // bytes
}

// ParseFilesystems reads "esxcli --formatter=csv storage filesystem list".
// Columns are found by their headings; those of other versions may follow.
func ParseFilesystems(output string) ([]Filesystem, error) {
	r := csv.NewReader(strings.NewReader(output))
	r.FieldsPerRecord = -1 // every line ends in a comma or none does
	r.LazyQuotes = true
	rows, err := r.ReadAll()
	if err != nil || len(rows) == 0 {
		return nil, fmt.Errorf("%w: no CSV in %q", ErrFormat, short(output))
	}
	column := func(name string) int { return slices.Index(rows[0], name) }
	mount, name, uuid, typ := column("MountPoint"), column("VolumeName"), column("UUID"), column("Type")
	mounted, size, free := column("Mounted"), column("Size"), column("Free")
	for _, c := range []int{mount, name, typ, size, free} {
		if c < 0 {
			return nil, fmt.Errorf("%w: a column is missing in %q", ErrFormat, strings.Join(rows[0], ","))
		}
	}
	at := func(row []string, i int) string {
		if i < 0 || i >= len(row) {
			return ""
		}
		return row[i]
	}
	var out []Filesystem
	for _, row := range rows[1:] {
		f := Filesystem{MountPoint: at(row, mount), Name: at(row, name), UUID: at(row, uuid), Type: at(row, typ), Mounted: at(row, mounted) != "false"}
		var errs [2]error
		f.Size, errs[0] = strconv.ParseInt(at(row, size), 10, 64)
		f.Free, errs[1] = strconv.ParseInt(at(row, free), 10, 64)
		if errs[0] != nil || errs[1] != nil {
			return nil, fmt.Errorf("%w: sizes %q and %q of %s", ErrFormat, at(row, size), at(row, free), f.Name)
		}
		out = append(out, f)
	}
	return out, nil
}

var versionLine = regexp.MustCompile(`VMware ESXi (\d+(?:\.\d+)*) build-(\d+)`)

// ParseVersion reads "vmware -vl".
func ParseVersion(output string) (version, build string, err error) {
	m := versionLine.FindStringSubmatch(output)
	if m == nil {
		return "", "", fmt.Errorf("%w: no version in %q", ErrFormat, short(output))
	}
	return m[1], m[2], nil
}

// ParseVMID reads what solo/registervm prints, the new VM's id. Very old hosts
// print nothing; then ok is false.
func ParseVMID(output string) (id int, ok bool) {
	lines := strings.Fields(output)
	if len(lines) == 0 {
		return 0, false
	}
	id, err := strconv.Atoi(lines[len(lines)-1])
	return id, err == nil && id > 0
}

// Done tells whether a vmkfstools output, whose progress is written over itself
// with carriage returns, ends in the given verb at 100 %.
func Done(output, verb string) bool {
	return strings.Contains(output, verb+": 100% done.")
}
