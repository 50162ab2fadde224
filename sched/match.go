package sched

import (
	"fmt"
	"slices"
	"strings"

	"hikae/repo"
)

// pattern names VMs: HOST/VM, both with * for any text and ? for any letter.
type pattern struct {
	host, vm string
	text     string
}

// literal tells that the pattern names one VM.
func (p pattern) literal() bool { return !strings.ContainsAny(p.host+p.vm, "*?") }

func (p pattern) match(vm repo.VMID) bool { return glob(p.host, vm.Host) && glob(p.vm, vm.Name) }

func parsePattern(text string) (pattern, error) {
	host, vm, ok := strings.Cut(text, "/")
	if !ok || host == "" || vm == "" || strings.Contains(vm, "/") {
		return pattern{}, fmt.Errorf("%q names no VM: write HOST/VM, for example esx1/web01, esx1/* or !esx1/scratch*", text)
	}
	return pattern{host, vm, text}, nil
}

// matcher is the VMs of a job: those that a pattern names, without those that
// a pattern with ! names, in whatever order they are written.
type matcher struct{ include, exclude []pattern }

func parseMatcher(texts []string) (m matcher, err error) {
	for _, text := range texts {
		bare, not := strings.CutPrefix(text, "!")
		p, err := parsePattern(bare)
		if err != nil {
			return m, err
		}
		if not {
			m.exclude = append(m.exclude, p)
		} else {
			m.include = append(m.include, p)
		}
	}
	if len(m.include) == 0 {
		return m, fmt.Errorf("it names no VM: write for example [\"esx1/*\"]")
	}
	return m, nil
}

func (m matcher) match(vm repo.VMID) bool {
	hit := func(p pattern) bool { return p.match(vm) }
	return slices.ContainsFunc(m.include, hit) && !slices.ContainsFunc(m.exclude, hit)
}

// hosts are those of all that have VMs in the job.
func (m matcher) hosts(all []string) []string {
	var out []string
	for _, h := range all {
		if slices.ContainsFunc(m.include, func(p pattern) bool { return glob(p.host, h) }) {
			out = append(out, h)
		}
	}
	return out
}

// literals are the VMs that the job names without a wildcard and does not
// exclude: they have to be there.
func (m matcher) literals() []repo.VMID {
	var out []repo.VMID
	for _, p := range m.include {
		if vm := (repo.VMID{Host: p.host, Name: p.vm}); p.literal() && m.match(vm) && !slices.Contains(out, vm) {
			out = append(out, vm)
		}
	}
	return out
}

// glob matches * with any text and ? with any one character. There are no
// brackets and no escapes: VMs do have brackets and backslashes in their names.
func glob(pattern, s string) bool {
	p, t := []rune(pattern), []rune(s)
	star, mark := -1, 0
	i, j := 0, 0
	for j < len(t) {
		switch {
		case i < len(p) && p[i] == '*':
			star, mark = i, j
			i++
		case i < len(p) && (p[i] == '?' || p[i] == t[j]):
			i++
			j++
		case star >= 0:
			mark++
			i, j = star+1, mark
		default:
			return false
		}
	}
	for i < len(p) && p[i] == '*' {
		i++
	}
	return i == len(p)
}
