package esxisim

import (
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// vim-cmd prints objects of the API in a form of its own: the type's name as
// the host's own code knows it (vim.vm.ConfigInfo, not
// VirtualMachineConfigInfo), fields one a line, strings as they are, quotes and
// line ends included. A list that is empty is left out, but not the comma of the
// field before it.

// dumper writes such a form.
type dumper struct {
	w     io.Writer
	rules shellRules
	ds    string // the datastore's reference: its uuid
}

func (d *dumper) comma() string {
	if d.rules.dynamicType {
		return ", "
	}
	return ","
}

// object prints a pointer to a data object, at the left margin.
func (d *dumper) object(v any) {
	fmt.Fprintln(d.w, d.value(reflect.ValueOf(v), "", false))
}

func (d *dumper) value(v reflect.Value, indent string, optional bool) string {
	switch x := v.Interface().(type) {
	case types.ManagedObjectReference:
		return d.reference(x)
	case time.Time:
		return `"` + x.UTC().Format("2006-01-02T15:04:05.999999Z") + `"`
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return d.nothing(v.Type())
		}
		return d.value(v.Elem(), indent, false)
	case reflect.Struct:
		return d.structure(v, indent)
	case reflect.Slice:
		return d.list(v, indent)
	case reflect.String:
		if optional && v.Len() == 0 {
			return "<unset>"
		}
		return `"` + v.String() + `"`
	}
	if optional && v.IsZero() && v.Kind() != reflect.Bool {
		return "<unset>"
	}
	return fmt.Sprint(v.Interface())
}

// nothing is a value that is not there.
func (d *dumper) nothing(t reflect.Type) string {
	name := t.Name()
	if t.Kind() == reflect.Pointer {
		name = t.Elem().Name()
		if e := t.Elem(); e.Kind() != reflect.Struct || e == reflect.TypeFor[time.Time]() || e == reflect.TypeFor[types.ManagedObjectReference]() {
			return "<unset>"
		}
	}
	return "(" + vmodlName(strings.TrimPrefix(name, "Base")) + ") null"
}

func (d *dumper) reference(r types.ManagedObjectReference) string {
	switch r.Type {
	case "Datastore":
		return "'vim.Datastore:" + d.ds + "'"
	case "VirtualMachineSnapshot":
		return "'vim.vm.Snapshot:" + r.Value + "'"
	}
	return "'vim." + r.Type + ":" + r.Value + "'"
}

type dumpField struct {
	name, text string
	omitted    bool
}

func (d *dumper) fields(v reflect.Value, indent string, list []dumpField) []dumpField {
	t := v.Type()
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		if f.Anonymous {
			if f.Type.Name() != "DynamicData" {
				list = d.fields(v.Field(i), indent, list)
			}
			continue
		}
		name, rest, _ := strings.Cut(f.Tag.Get("xml"), ",")
		if name == "" || name == "-" {
			continue
		}
		fv := v.Field(i)
		if fv.Kind() == reflect.Slice && fv.Len() == 0 {
			list = append(list, dumpField{name: name, omitted: true})
			continue
		}
		list = append(list, dumpField{name: name, text: d.value(fv, indent, strings.Contains(rest, "omitempty"))})
	}
	return list
}

func (d *dumper) structure(v reflect.Value, indent string) string {
	var b strings.Builder
	inner := indent + "   "
	b.WriteString("(" + vmodlName(v.Type().Name()) + ") {\n")
	if d.rules.dynamicType {
		b.WriteString(inner + "dynamicType = <unset>" + d.comma() + "\n")
	}
	list := d.fields(v, inner, nil)
	for i, f := range list {
		if f.omitted {
			continue
		}
		b.WriteString(inner + f.name + " = " + f.text)
		if i < len(list)-1 || d.rules.dynamicType {
			b.WriteString(d.comma())
		}
		b.WriteByte('\n')
	}
	b.WriteString(indent + "}")
	return b.String()
}

func (d *dumper) list(v reflect.Value, indent string) string {
	var items []string
	inner := indent + "   "
	for i := range v.Len() {
		items = append(items, inner+d.value(v.Index(i), inner, false))
	}
	elem := v.Type().Elem()
	if elem.Kind() == reflect.Pointer {
		elem = elem.Elem()
	}
	name := map[reflect.Kind]string{reflect.Int32: "int", reflect.Int64: "long", reflect.String: "string", reflect.Bool: "boolean"}[elem.Kind()]
	if name == "" {
		if name = strings.TrimPrefix(elem.Name(), "Base"); name != "ManagedObjectReference" {
			name = vmodlName(name)
		}
	}
	if len(items) == 0 {
		return "(" + name + ") []"
	}
	end := "\n"
	if d.rules.trailingComma {
		end = d.comma() + "\n"
	}
	return "(" + name + ") [\n" + strings.Join(items, d.comma()+"\n") + end + indent + "]"
}

// vmodlNames are the host's own names of types that follow no rule.
var vmodlNames = map[string]string{
	"VirtualMachineVideoCard": "vim.vm.device.VirtualVideoCard", "VirtualMachineVMCIDevice": "vim.vm.device.VirtualVMCIDevice",
	"VirtualHardware": "vim.vm.VirtualHardware", "ToolsConfigInfo": "vim.vm.ToolsConfigInfo", "GuestInfo": "vim.vm.GuestInfo",
	"VirtualMachineConfigSummary": "vim.vm.Summary.ConfigSummary", "VirtualMachineGuestSummary": "vim.vm.Summary.GuestSummary",
	"VirtualMachineStorageSummary": "vim.vm.Summary.StorageSummary", "VirtualMachineQuickStats": "vim.vm.Summary.QuickStats",
	"VirtualMachineFileLayoutExFileInfo": "vim.vm.FileLayoutEx.FileInfo", "VirtualMachineFileLayoutExDiskLayout": "vim.vm.FileLayoutEx.DiskLayout",
	"VirtualMachineFileLayoutExDiskUnit": "vim.vm.FileLayoutEx.DiskUnit", "VirtualMachineFileLayoutExSnapshotLayout": "vim.vm.FileLayoutEx.SnapshotLayout",
	"VirtualMachineFileLayoutDiskLayout": "vim.vm.FileLayout.DiskLayout", "VirtualMachineFileLayoutSnapshotLayout": "vim.vm.FileLayout.SnapshotLayout",
	"VirtualMachineConfigInfoDatastoreUrlPair": "vim.vm.ConfigInfo.DatastoreUrlPair",
	"MethodFault": "vmodl.MethodFault", "LocalizedMethodFault": "vmodl.LocalizedMethodFault",
	"OptionValue": "vim.option.OptionValue", "BaseOptionValue": "vim.option.OptionValue", "KeyValue": "vim.KeyValue",
	"DatastoreSummary": "vim.Datastore.Summary", "DatastoreCapability": "vim.Datastore.Capability",
	"LicenseManagerLicenseInfo": "vim.LicenseManager.LicenseInfo", "KeyAnyValue": "vmodl.KeyAnyValue",
	"HostListSummary": "vim.host.Summary", "HostHardwareSummary": "vim.host.Summary.HardwareSummary", "HostConfigSummary": "vim.host.Summary.ConfigSummary",
	"HostListSummaryQuickStats": "vim.host.Summary.QuickStats", "HostHardwareInfo": "vim.host.HardwareInfo",
	"VirtualMachineDefaultPowerOpInfo": "vim.vm.DefaultPowerOpInfo", "OptionManager": "vim.option.OptionManager",
}

// vmodlFaults are faults of the transport's own package.
var vmodlFaults = map[string]bool{
	"NotSupported": true, "ManagedObjectNotFound": true, "InvalidArgument": true, "SystemError": true, "RequestCanceled": true,
	"HostCommunication": true, "InvalidRequest": true, "MethodNotFound": true, "SecurityError": true, "NotImplemented": true,
}

// vmodlName is a type's name as the host's own code has it.
func vmodlName(name string) string {
	if full, ok := vmodlNames[name]; ok {
		return full
	}
	if rest, ok := strings.CutPrefix(name, "VirtualMachine"); ok && rest != "" {
		return "vim.vm." + rest
	}
	if rest, ok := strings.CutPrefix(name, "Host"); ok && rest != "" {
		return "vim.host." + rest
	}
	if strings.HasPrefix(name, "Virtual") || strings.HasPrefix(name, "ParaVirtual") {
		for _, device := range []string{"VirtualDevice", "VirtualDisk", "VirtualCdrom", "VirtualEthernetCard", "VirtualPointingDevice", "VirtualFloppy", "VirtualUSB", "VirtualVMCIDevice"} {
			if rest, ok := strings.CutPrefix(name, device); ok && rest != "" {
				return "vim.vm.device." + device + "." + rest
			}
		}
		return "vim.vm.device." + name
	}
	return "vim." + name
}

// faultName is a fault's type as vim-cmd prints it.
func faultName(f types.BaseMethodFault) string {
	name := reflect.TypeOf(f).Elem().Name()
	if vmodlFaults[name] {
		return "vmodl.fault." + name
	}
	return "vim.fault." + name
}

// fault prints a fault. The missing comma after faultMessage is as recorded.
func (d *dumper) fault(f types.BaseMethodFault, text string) {
	c := d.comma()
	fmt.Fprintf(d.w, "(%s) {\n", faultName(f))
	if d.rules.dynamicType {
		fmt.Fprintf(d.w, "   dynamicType = <unset>%s\n   faultCause = (vmodl.MethodFault) null%s\n", c, c)
	} else {
		fmt.Fprintf(d.w, "   faultCause = (vmodl.MethodFault) null%s\n   faultMessage = <unset>\n", c)
	}
	for _, field := range d.fields(reflect.ValueOf(f).Elem(), "   ", nil) {
		if !field.omitted && field.name != "faultCause" && field.name != "faultMessage" {
			fmt.Fprintf(d.w, "   %s = %s%s\n", field.name, field.text, c)
		}
	}
	end := ""
	if d.rules.dynamicType {
		end = c
	}
	fmt.Fprintf(d.w, "   msg = \"%s\"%s\n}\n", text, end)
}
