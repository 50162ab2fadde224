package vmx

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Disk is one virtual disk as the configuration names it.
type Disk struct {
	Slot string // where it is attached: "scsi0:0", "sata0:1", "ide1:0", "nvme0:0"
	File string // its descriptor: a name beside the .vmx, or an absolute path on the host
}

// slotKey matches the key that names a device's file.
var slotKey = regexp.MustCompile(`(?i)^((?:scsi|sata|ide|nvme)\d+:\d+)\.filename$`)

// Disks lists the disks in the file's order. Images in CD drives and devices
// that are switched off (present = "FALSE") are none.
func (f *File) Disks() []Disk {
	var disks []Disk
	for key, file := range f.All() {
		m := slotKey.FindStringSubmatch(key)
		if m == nil || !strings.HasSuffix(strings.ToLower(file), ".vmdk") {
			continue
		}
		slot := strings.ToLower(m[1])
		kind, _ := f.Get(slot + ".deviceType")
		if strings.Contains(strings.ToLower(kind), "cdrom") {
			continue
		}
		if present, ok := f.Get(slot + ".present"); ok && !strings.EqualFold(present, "TRUE") {
			continue
		}
		disks = append(disks, Disk{Slot: slot, File: file})
	}
	return disks
}

// SetDisk gives the disk in a slot another file.
func (f *File) SetDisk(slot, file string) { f.Set(slot+".fileName", file) }

// RemoveDevice removes everything said about a slot.
func (f *File) RemoveDevice(slot string) {
	prefix := strings.ToLower(slot) + "."
	f.DeleteFunc(func(key, _ string) bool { return strings.HasPrefix(strings.ToLower(key), prefix) })
}

// SlotOfKey tells the slot a disk of this device key sits in, by the numbers
// ESXi gives devices: SCSI from 2000 (16 a bus), IDE from 3000 (2 a bus), SATA
// from 16000 (30 a bus), NVMe from 32000 (64 a bus). Empty for other keys. The
// ranges are custom, not contract: use it only where nothing better is known.
func SlotOfKey(key int32) string {
	switch {
	case key >= 2000 && key < 2000+4*16:
		return slot("scsi", (key-2000)/16, (key-2000)%16)
	case key >= 3000 && key < 3000+2*2:
		return slot("ide", (key-3000)/2, (key-3000)%2)
	case key >= 16000 && key < 16000+4*30:
		return slot("sata", (key-16000)/30, (key-16000)%30)
	case key >= 32000 && key < 32000+4*64:
		return slot("nvme", (key-32000)/64, (key-32000)%64)
	}
	return ""
}

func slot(bus string, n, unit int32) string { return fmt.Sprintf("%s%d:%d", bus, n, unit) }

// bound are the keys that tie a configuration to the place and the moment it
// was taken from: swap and log files, snapshots, migrations, change tracking
// files that a backup does not carry.
var bound = regexp.MustCompile(`(?i)^(` + strings.Join([]string{
	`ctkenabled`, `.*\.ctkenabled`, `sched\.swap\.derivedname`, `.*\.redo`, `vmotion\..*`, `migrate\..*`,
	`checkpoint\.vmstate.*`, `[a-z]+\d+:\d+\.filters`, `.*hbr_filter.*`, `vmxstats\.filename`, `snapshot\..*`,
	`migratehostlog.*`, `extendedconfigfile`, `.*\.changetrackpath`,
}, "|") + `)$`)

// Portable removes what holds only in the place the configuration came from,
// so that it can be registered elsewhere: change tracking (its files do not
// travel, and a disk that says it is tracked without them does not open), swap
// and redo files, snapshots, migrations.
func (f *File) Portable() {
	f.DeleteFunc(func(key, _ string) bool { return bound.MatchString(key) })
	f.Set("cleanShutdown", "TRUE")
}

// KeepIdentity leaves the VM who it was and answers beforehand the question
// whether it was moved or copied, which would otherwise block its first start.
func (f *File) KeepIdentity() { f.Set("uuid.action", "keep") }

// NewIdentity makes the VM another one than that it was copied from: no UUIDs,
// no generated hardware addresses; ESXi makes new ones at the first start.
// Addresses set by hand would collide too: those adapters stay disconnected,
// and their names are returned.
func (f *File) NewIdentity() (disconnected []string) {
	nic := regexp.MustCompile(`(?i)^(ethernet\d+)\.addresstype$`)
	generated := map[string]bool{}
	for key, value := range f.All() {
		m := nic.FindStringSubmatch(key)
		if m == nil {
			continue
		}
		if strings.EqualFold(value, "static") {
			disconnected = append(disconnected, strings.ToLower(m[1]))
		} else {
			generated[strings.ToLower(m[1])] = true
		}
	}
	for _, name := range disconnected {
		f.Set(name+".startConnected", "FALSE")
	}
	f.DeleteFunc(func(key, _ string) bool {
		key = strings.ToLower(key)
		switch key {
		case "uuid.bios", "uuid.location", "vc.uuid":
			return true
		}
		name, field, _ := strings.Cut(key, ".")
		return generated[name] && (strings.HasPrefix(field, "generatedaddress") || field == "address")
	})
	f.Set("uuid.action", "create")
	return disconnected
}

// Minimal describes a VM of which nothing but its disks is known.
type Minimal struct {
	Name     string   // display name
	NVRAM    string   // name of its firmware settings, "" for none
	Disks    []string // descriptors beside the .vmx, in order
	Adapter  string   // as a disk descriptor says it: ide, lsilogic, buslogic, pvscsi, lsisas1068; "" is lsilogic
	GuestID  string   // "" is other-64
	Hardware int      // virtual hardware version; 0 is 13, which ESXi 6.5 and later take
}

// New makes a configuration that ESXi registers and starts: one processor, 1 GiB
// of memory, no network, the disks in order on one controller.
func New(m Minimal) *File {
	f := &File{}
	set := func(key, value string) { f.Set(key, value) }
	if m.Hardware == 0 {
		m.Hardware = 13
	}
	if m.GuestID == "" {
		m.GuestID = "other-64"
	}
	set(".encoding", "UTF-8")
	set("config.version", "8")
	set("virtualHW.version", strconv.Itoa(m.Hardware))
	set("displayName", m.Name)
	set("guestOS", m.GuestID)
	set("memSize", "1024")
	set("numvcpus", "1")
	if m.NVRAM != "" {
		set("nvram", m.NVRAM)
	}
	set("pciBridge0.present", "TRUE")
	for _, n := range []string{"4", "5", "6", "7"} { // where PCI Express devices attach
		set("pciBridge"+n+".present", "TRUE")
		set("pciBridge"+n+".virtualDev", "pcieRootPort")
		set("pciBridge"+n+".functions", "8")
	}
	set("vmci0.present", "TRUE")
	set("hpet0.present", "TRUE")
	for i, disk := range m.Disks {
		s := minimalSlot(m.Adapter, len(m.Disks), i)
		if bus, unit, _ := strings.Cut(s, ":"); strings.HasPrefix(bus, "scsi") && unit == "0" {
			set(bus+".present", "TRUE")
			set(bus+".virtualDev", scsiModel(m.Adapter))
		}
		set(s+".present", "TRUE")
		set(s+".deviceType", map[bool]string{true: "ata-hardDisk", false: "scsi-hardDisk"}[strings.HasPrefix(s, "ide")])
		set(s+".fileName", disk)
	}
	return f
}

// minimalSlot spreads disks over controllers: IDE takes four, a SCSI bus 15,
// unit 7 being the controller itself.
func minimalSlot(adapter string, n, i int) string {
	if strings.EqualFold(adapter, "ide") && n <= 4 {
		return slot("ide", int32(i/2), int32(i%2))
	}
	unit := i % 15
	if unit >= 7 {
		unit++
	}
	return slot("scsi", int32(i/15), int32(unit))
}

func scsiModel(adapter string) string {
	switch a := strings.ToLower(adapter); a {
	case "pvscsi", "buslogic", "lsisas1068":
		return a
	}
	return "lsilogic"
}
