package vimcmd

import (
	"fmt"
	"regexp"
	"strings"
)

// Licence is the host's licence as vimsvc/license tells it. The serial number is
// not kept.
type Licence struct {
	Name       string            // e.g. "vSphere 7 Hypervisor"
	Edition    string            // the "vmodl key", e.g. "esxBasic", "esx.hypervisor.cpuPackage", "esx.enterprisePlus.cpuPackage", "eval"
	Properties map[string]string // e.g. expirationHours
}

var (
	licenceField    = regexp.MustCompile(`^\s*(serial|vmodl key|name|total|used|unit):\s*(.*)$`)
	licenceProperty = regexp.MustCompile(`^\s*\[(\w+)\] = (.*)$`)
)

// ParseLicence reads "vimsvc/license --show".
func ParseLicence(output string) (Licence, error) {
	l := Licence{Properties: map[string]string{}}
	for _, line := range strings.Split(output, "\n") {
		line = strings.TrimRight(line, " \r\t")
		if m := licenceField.FindStringSubmatch(line); m != nil {
			switch {
			case m[1] == "vmodl key" && l.Edition == "":
				l.Edition = m[2]
			case m[1] == "name" && l.Name == "":
				l.Name = m[2]
			}
			continue
		}
		if m := licenceProperty.FindStringSubmatch(line); m != nil && m[1] != "feature" {
			if _, twice := l.Properties[m[1]]; !twice {
				l.Properties[m[1]] = m[2]
			}
		}
	}
	if l.Edition == "" && l.Name == "" {
		return Licence{}, fmt.Errorf("%w: no licence in %q", ErrFormat, short(output))
	}
	return l, nil
}
