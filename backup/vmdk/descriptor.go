package vmdk

import (
	"bytes"
	"fmt"
	"math/bits"
	"slices"
	"strconv"
	"strings"
)

// NoParent is the parentCID of a base link.
const NoParent uint32 = 0xffffffff

// MaxDescriptor bounds a descriptor's text, in bytes. Real ones have one or two kilobytes; a reader that fetches one from a host
// asks for no more than this.
const MaxDescriptor = 1 << 20

// maxExtents bounds the extents of one link: 2 GB pieces of a 62 TiB disk.
const maxExtents = 1 << 15

// Values of Descriptor.CreateType and Extent.Type that this package writes or looks for.
const (
	TypeVMFS       = "vmfs"       // one flat extent on a host
	TypeVMFSSparse = "vmfsSparse" // COWD link
	TypeSESparse   = "seSparse"   // SEsparse link

	ExtentVMFS       = "VMFS"
	ExtentFlat       = "FLAT"
	ExtentVMFSSparse = "VMFSSPARSE"
	ExtentSESparse   = "SESPARSE"
	ExtentSparse     = "SPARSE" // hosted sparse, or COWD in old files
	ExtentZero       = "ZERO"
)

// Descriptor is the text that describes one link: `# Disk DescriptorFile`.
type Descriptor struct {
	Version            int // 1; 3 while change tracking is on
	Encoding           string
	CID, ParentCID     uint32
	CreateType         string
	ParentFileNameHint string // "" for a base link; relative to the descriptor's folder unless absolute
	Extents            []Extent
	ChangeTrackPath    string   // "" without change tracking
	DDB                []Entry  // the disk data base, in order, keys with their "ddb." prefix
	Other              []string // lines of the head that this package does not know, kept as they are
}

// Extent is one extent line: where a run of the disk's sectors is kept.
type Extent struct {
	Access  string // RW, RDONLY or NOACCESS
	Sectors int64
	Type    string
	File    string // "" for ZERO
	Offset  int64  // in sectors, where a flat extent begins in its file
}

// Entry is a key and its value in the disk data base.
type Entry struct {
	Key, Value string
}

// IsDescriptor says whether a file that begins with these bytes is a descriptor's text.
func IsDescriptor(head []byte) bool {
	const mark = "# Disk DescriptorFile"
	head = bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\xef\xbb\xbf")), " \t\r\n")
	return len(head) >= len(mark) && strings.EqualFold(string(head[:len(mark)]), mark)
}

// ParseDescriptor reads a descriptor's text. What follows a NUL byte is padding, as in a descriptor kept inside a sparse file.
// It fails with ErrFormat.
func ParseDescriptor(text []byte) (*Descriptor, error) {
	if i := bytes.IndexByte(text, 0); i >= 0 {
		text = text[:i]
	}
	if len(text) > MaxDescriptor {
		return nil, fmt.Errorf("%w: descriptor of %d bytes", ErrFormat, len(text))
	}
	if !IsDescriptor(text) {
		return nil, fmt.Errorf("%w: the text does not begin with \"# Disk DescriptorFile\"", ErrFormat)
	}
	d := &Descriptor{ParentCID: NoParent}
	var sectors int64
	seen := map[string]bool{}
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || i == 0 {
			continue
		}
		if e, ok, err := parseExtent(line); err != nil {
			return nil, fmt.Errorf("%w: descriptor line %d: %w", ErrFormat, i+1, err)
		} else if ok {
			if sectors += e.Sectors; sectors > maxSectors || len(d.Extents) == maxExtents {
				return nil, fmt.Errorf("%w: descriptor line %d: the disk is too large", ErrFormat, i+1)
			}
			d.Extents = append(d.Extents, e)
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			d.Other = append(d.Other, line)
			continue
		}
		key, value = strings.TrimSpace(key), unquote(strings.TrimSpace(value))
		if err := d.set(key, value, line); err != nil {
			return nil, fmt.Errorf("%w: descriptor line %d: %w", ErrFormat, i+1, err)
		}
		seen[strings.ToLower(key)] = true
	}
	for _, key := range []string{"version", "cid", "createtype"} {
		if !seen[key] {
			return nil, fmt.Errorf("%w: the descriptor has no line %q", ErrFormat, key)
		}
	}
	if len(d.Extents) == 0 {
		return nil, fmt.Errorf("%w: the descriptor has no extent", ErrFormat)
	}
	return d, nil
}

func (d *Descriptor) set(key, value, line string) (err error) {
	switch strings.ToLower(key) {
	case "version":
		if d.Version, err = strconv.Atoi(value); err != nil || d.Version < 1 || d.Version > 99 {
			return fmt.Errorf("version %q", value)
		}
	case "encoding":
		d.Encoding = value
	case "cid":
		d.CID, err = parseCID(value)
	case "parentcid":
		d.ParentCID, err = parseCID(value)
	case "createtype":
		d.CreateType = value
	case "parentfilenamehint":
		d.ParentFileNameHint = value
	case "changetrackpath":
		d.ChangeTrackPath = value
	default:
		if strings.HasPrefix(strings.ToLower(key), "ddb.") {
			d.DDB = append(d.DDB, Entry{key, value})
		} else {
			d.Other = append(d.Other, line)
		}
	}
	return err
}

func parseCID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("content id %q", s)
	}
	return uint32(n), nil
}

// parseExtent reads `RW 4192256 SPARSE "file.vmdk" 0`. A line that does not begin with an access word is none (ok false).
func parseExtent(line string) (e Extent, ok bool, err error) {
	access, rest, _ := strings.Cut(line, " ")
	switch access {
	case "RW", "RDONLY", "NOACCESS":
	default:
		return e, false, nil
	}
	e.Access = access
	count, rest, _ := strings.Cut(strings.TrimLeft(rest, " \t"), " ")
	if e.Sectors, err = strconv.ParseInt(count, 10, 64); err != nil || e.Sectors <= 0 || e.Sectors > maxSectors {
		return e, false, fmt.Errorf("extent of %q sectors", count)
	}
	e.Type, rest, _ = strings.Cut(strings.TrimLeft(rest, " \t"), " ")
	if e.Type == "" || strings.ContainsAny(e.Type, "\"\t") {
		return e, false, fmt.Errorf("extent type %q", e.Type)
	}
	rest = strings.TrimLeft(rest, " \t")
	if rest == "" {
		if e.Type != ExtentZero {
			return e, false, fmt.Errorf("extent of type %s names no file", e.Type)
		}
		return e, true, nil
	}
	if rest[0] != '"' {
		return e, false, fmt.Errorf("extent's file name is not quoted")
	}
	name, tail, found := strings.Cut(rest[1:], `"`)
	if !found {
		return e, false, fmt.Errorf("extent's file name is not closed")
	}
	e.File = unescape(name)
	// Only the first word of the tail has a meaning here: raw disk extents have more.
	if f := strings.Fields(tail); len(f) > 0 {
		if e.Offset, err = strconv.ParseInt(f[0], 10, 64); err != nil || e.Offset < 0 || e.Offset > maxSectors {
			return e, false, fmt.Errorf("extent begins at sector %q", f[0])
		}
	}
	return e, true, nil
}

// Capacity is the disk's size in bytes: the sum of its extents.
func (d *Descriptor) Capacity() int64 {
	var n int64
	for _, e := range d.Extents {
		n += e.Sectors
	}
	return n * SectorSize
}

// Bytes is the descriptor as text, in the order and with the headings a host writes.
func (d *Descriptor) Bytes() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Disk DescriptorFile\nversion=%d\n", d.Version)
	if d.Encoding != "" {
		fmt.Fprintf(&b, "encoding=%s\n", quote(d.Encoding))
	}
	fmt.Fprintf(&b, "CID=%08x\nparentCID=%08x\n", d.CID, d.ParentCID)
	for _, line := range d.Other {
		fmt.Fprintf(&b, "%s\n", strings.Map(dropControl, line))
	}
	fmt.Fprintf(&b, "createType=%s\n", quote(d.CreateType))
	if d.ParentFileNameHint != "" {
		fmt.Fprintf(&b, "parentFileNameHint=%s\n", quote(d.ParentFileNameHint))
	}
	b.WriteString("\n# Extent description\n")
	for _, e := range d.Extents {
		fmt.Fprintf(&b, "%s %d %s", e.Access, e.Sectors, e.Type)
		if e.Type != ExtentZero || e.File != "" {
			fmt.Fprintf(&b, " %s", quote(e.File))
		}
		// A flat extent of a hosted disk always says where it begins; a host's own never does, and readers insist on both.
		if e.Offset != 0 || e.Type == ExtentFlat {
			fmt.Fprintf(&b, " %d", e.Offset)
		}
		b.WriteByte('\n')
	}
	if d.ChangeTrackPath != "" {
		fmt.Fprintf(&b, "\n# Change Tracking File\nchangeTrackPath=%s\n", quote(d.ChangeTrackPath))
	}
	b.WriteString("\n# The Disk Data Base \n#DDB\n\n")
	for _, e := range d.DDB {
		fmt.Fprintf(&b, "%s = %s\n", e.Key, quote(e.Value))
	}
	return b.Bytes()
}

// Clone is a copy that shares nothing.
func (d *Descriptor) Clone() *Descriptor {
	c := *d
	c.Extents, c.DDB, c.Other = slices.Clone(d.Extents), slices.Clone(d.DDB), slices.Clone(d.Other)
	return &c
}

// Value is a value of the disk data base, e.g. of "ddb.uuid", or "".
func (d *Descriptor) Value(key string) string {
	for _, e := range d.DDB {
		if strings.EqualFold(e.Key, key) {
			return e.Value
		}
	}
	return ""
}

// SetValue changes or adds a value of the disk data base; "" removes it.
func (d *Descriptor) SetValue(key, value string) {
	for i, e := range d.DDB {
		if strings.EqualFold(e.Key, key) {
			if value == "" {
				d.DDB = slices.Delete(d.DDB, i, i+1)
			} else {
				d.DDB[i].Value = value
			}
			return
		}
	}
	if value != "" {
		d.DDB = append(d.DDB, Entry{key, value})
	}
}

// Standalone describes the same disk as one flat extent "<name>-flat.vmdk": version 1, without parent and change tracking, the
// disk data base kept. It is what a restored or browsed disk has. Call it on a base link's descriptor: those of
// snapshots have no disk data base worth keeping.
func (d *Descriptor) Standalone(name string) *Descriptor {
	c := d.Clone()
	c.Version, c.ParentCID, c.CreateType = 1, NoParent, TypeVMFS
	c.ParentFileNameHint, c.ChangeTrackPath = "", ""
	c.Extents = []Extent{{Access: "RW", Sectors: d.Capacity() / SectorSize, Type: ExtentVMFS, File: name + "-flat.vmdk"}}
	return c
}

// NewFlatDescriptor describes a new disk with one flat extent "<name>-flat.vmdk". The capacity, in bytes, is a multiple of
// SectorSize; adapter is lsilogic, buslogic, ide or pvscsi ("" is lsilogic); uuid is the disk's identity as the host writes it
// ("60 00 C2 9…"), "" leaves it to the host.
func NewFlatDescriptor(name string, capacity int64, adapter string, thin bool, uuid string, cid uint32) *Descriptor {
	if adapter == "" {
		adapter = "lsilogic"
	}
	d := &Descriptor{
		Version: 1, Encoding: "UTF-8", CID: cid, ParentCID: NoParent, CreateType: TypeVMFS,
		Other: []string{`isNativeSnapshot="no"`},
		Extents: []Extent{{
			Access: "RW", Sectors: capacity / SectorSize, Type: ExtentVMFS, File: name + "-flat.vmdk",
		}},
	}
	cylinders, heads, sectors := geometry(capacity, adapter)
	d.SetValue("ddb.adapterType", adapter)
	d.SetValue("ddb.encoding", "UTF-8")
	d.SetValue("ddb.geometry.cylinders", strconv.FormatInt(cylinders, 10))
	d.SetValue("ddb.geometry.heads", strconv.FormatInt(heads, 10))
	d.SetValue("ddb.geometry.sectors", strconv.FormatInt(sectors, 10))
	if thin {
		d.SetValue("ddb.thinProvisioned", "1")
	}
	d.SetValue("ddb.uuid", uuid)
	d.SetValue("ddb.virtualHWVersion", "13")
	return d
}

// geometry is the invented shape of a disk that old guests ask for: what VMware's tools choose by size.
func geometry(capacity int64, adapter string) (cylinders, heads, sectors int64) {
	switch {
	case adapter == "ide":
		heads, sectors = 16, 63
	case capacity < 1<<30:
		heads, sectors = 64, 32
	case capacity < 2<<30:
		heads, sectors = 128, 32
	default:
		heads, sectors = 255, 63
	}
	cylinders = capacity / SectorSize / (heads * sectors)
	if adapter == "ide" {
		cylinders = min(cylinders, 16383)
	}
	return max(cylinders, 1), heads, sectors
}

// escapes are the two-digit codes that stand for what a quoted string cannot hold.
var escapes = map[byte]string{'"': "|22", '\n': "|0A", '\r': "|0D", 0: "|00"}

// quote puts a value between quotes. A bar is escaped only where it would read as an escape, so that ordinary names stay as they
// are for readers that know no escapes.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		if e, ok := escapes[s[i]]; ok {
			b.WriteString(e)
		} else if _, ok := escaped(s[i:]); ok {
			b.WriteString("|7C")
		} else {
			b.WriteByte(s[i])
		}
	}
	b.WriteByte('"')
	return b.String()
}

func escaped(s string) (byte, bool) {
	if len(s) < 3 || s[0] != '|' {
		return 0, false
	}
	n, err := strconv.ParseUint(s[1:3], 16, 8)
	if err != nil {
		return 0, false
	}
	c := byte(n)
	_, ok := escapes[c]
	return c, ok || c == '|'
}

func unescape(s string) string {
	if !strings.Contains(s, "|") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if c, ok := escaped(s[i:]); ok {
			b.WriteByte(c)
			i += 2
		} else {
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

func unquote(s string) string {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		s = s[1 : len(s)-1]
	}
	return unescape(s)
}

func dropControl(r rune) rune {
	if r < ' ' && r != '\t' {
		return -1
	}
	return r
}

// powerOfTwo reports whether n is 1, 2, 4, …
func powerOfTwo(n int64) bool { return n > 0 && bits.OnesCount64(uint64(n)) == 1 }
