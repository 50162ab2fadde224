package repo

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// VMID names a VM: the host by the operator's name for it, the VM as the host
// names it.
type VMID struct {
	Host string `json:"host"`
	Name string `json:"name"`
}

// String returns "host/name".
func (id VMID) String() string { return id.Host + "/" + id.Name }

// Validate refuses names that could not be a directory of the mount.
func (id VMID) Validate() error {
	if err := validateName("host", id.Host); err != nil {
		return err
	}
	return validateName("VM", id.Name)
}

func validateName(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("the %s name is empty", what)
	case s == "." || s == "..":
		return fmt.Errorf("%q cannot be a %s name", s, what)
	case len(s) > 200:
		return fmt.Errorf("the %s name is %d bytes long, 200 is the limit", what, len(s))
	case strings.ContainsAny(s, "/\x00\n"):
		return fmt.Errorf("the %s name %q contains a slash, a line feed or a zero byte", what, s)
	}
	return nil
}

// ParseVMID reads "host/name".
func ParseVMID(s string) (VMID, error) {
	host, name, ok := strings.Cut(s, "/")
	id := VMID{Host: host, Name: name}
	if !ok {
		return VMID{}, fmt.Errorf("%q does not name a VM: write HOST/VM", s)
	}
	if err := id.Validate(); err != nil {
		return VMID{}, fmt.Errorf("%q does not name a VM: %w", s, err)
	}
	return id, nil
}

// ParseSelector reads "host/vm@selector"; Resolve says what a selector may be.
// The last @ parts the two, so VM names may contain one.
func ParseSelector(s string) (VMID, string, error) {
	i := strings.LastIndexByte(s, '@')
	if i < 0 || i == len(s)-1 {
		return VMID{}, "", fmt.Errorf("%q does not name a generation: write HOST/VM@GENERATION, for example %s@latest", s, strings.TrimSuffix(s, "@"))
	}
	vm, err := ParseVMID(s[:i])
	if err != nil {
		return VMID{}, "", err
	}
	return vm, s[i+1:], nil
}

// nameTime is how a generation's time appears in names: UTC, whole seconds, no
// colons, so that it is a file name everywhere.
const nameTime = "2006-01-02T15-04-05Z"

// Ref names one generation. It is made from file names alone.
type Ref struct {
	VM       VMID
	Sequence uint64    // the repository's own counter; it never goes back
	Time     time.Time // UTC, whole seconds
	// Imported tells that the time was given by hand: an old copy that was
	// taken over late has an old time and a high sequence number.
	Imported bool
}

// Name returns the generation's time as "2026-11-22T02-00-00Z", unique within
// its VM.
func (r Ref) Name() string { return r.Time.UTC().Format(nameTime) }

// String returns "host/vm@2026-11-22T02-00-00Z".
func (r Ref) String() string { return r.VM.String() + "@" + r.Name() }

// fileName is the name of the generation's manifest within its VM's directory.
func (r Ref) fileName() string {
	s := fmt.Sprintf("%010d-%s", r.Sequence, r.Name())
	if r.Imported {
		s += importedSuffix
	}
	return s
}

const importedSuffix = "-imported"

// parseRefFile reads what fileName wrote; ok is false for any other name.
func parseRefFile(s string) (r Ref, ok bool) {
	rest, imported := strings.CutSuffix(s, importedSuffix)
	digits, stamp, ok := strings.Cut(rest, "-")
	if !ok || len(digits) < 10 || len(digits) > 19 {
		return Ref{}, false
	}
	seq, err := strconv.ParseUint(digits, 10, 63)
	if err != nil {
		return Ref{}, false
	}
	t, err := time.Parse(nameTime, stamp)
	r = Ref{Sequence: seq, Time: t, Imported: imported}
	if err != nil || r.fileName() != s {
		return Ref{}, false
	}
	return r, true
}

// Latest returns the generation of a VM that was made last. Of those that
// backups made it is the one with the highest sequence number: a clock that was
// set back must not hide it. Imported ones, whose numbers say nothing about
// their age, count by their time and only where there are no others. It panics
// on an empty list.
func Latest(refs []Ref) Ref {
	return slices.MaxFunc(refs, func(a, b Ref) int {
		switch {
		case a.Imported != b.Imported && b.Imported:
			return 1
		case a.Imported != b.Imported:
			return -1
		case a.Imported && !a.Time.Equal(b.Time):
			return a.Time.Compare(b.Time)
		}
		return cmp.Compare(a.Sequence, b.Sequence)
	})
}

// resolve picks the one reference that the selector names. Refs are ascending
// by time.
func resolve(vm VMID, refs []Ref, selector string) (Ref, error) {
	if len(refs) == 0 {
		return Ref{}, fmt.Errorf("%v has no generations: %w", vm, ErrNotFound)
	}
	if selector == "" {
		return Ref{}, fmt.Errorf("an empty selector names no generation of %v: write latest, a time, or a sequence number: %w", vm, ErrNotFound)
	}
	if selector == "latest" {
		return Latest(refs), nil
	}
	stamp := strings.ReplaceAll(selector, ":", "-")
	var found []Ref
	for _, r := range refs {
		if r.Name() == stamp {
			return r, nil
		}
		if strings.HasPrefix(r.Name(), stamp) {
			found = append(found, r)
		}
	}
	if seq, err := strconv.ParseUint(selector, 10, 63); err == nil {
		for _, r := range refs {
			if r.Sequence != seq {
				continue
			}
			// The beginning of several times ("2026") names none of them, so
			// the number wins; against the beginning of a single other time it
			// does not.
			if len(found) == 1 && found[0] != r {
				found = append(found, r)
			} else {
				found = []Ref{r}
			}
			break
		}
	}
	switch len(found) {
	case 0:
		return Ref{}, fmt.Errorf("%v has no generation %q: %w", vm, selector, ErrNotFound)
	case 1:
		return found[0], nil
	}
	names := make([]string, 0, len(found))
	for _, r := range found {
		if len(names) == 20 {
			names = append(names, "…")
			break
		}
		names = append(names, r.Name())
	}
	return Ref{}, fmt.Errorf("%q fits %d generations of %v (%s): %w", selector, len(found), vm, strings.Join(names, ", "), ErrAmbiguous)
}
