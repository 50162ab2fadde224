package backup

import (
	"fmt"
	"strconv"
	"strings"
)

// changeID is ESXi's name for a moment in the life of a disk: the UUID of an
// epoch of change tracking and a number that grows with every snapshot, as in
// "52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62/2". Only moments of one
// epoch can be compared.
type changeID struct {
	epoch  string
	number uint64
}

func parseChangeID(s string) (changeID, error) {
	i := strings.LastIndexByte(s, '/')
	if i <= 0 {
		return changeID{}, fmt.Errorf("the change id %q has no number", s)
	}
	n, err := strconv.ParseUint(s[i+1:], 10, 64)
	if err != nil {
		return changeID{}, fmt.Errorf("the change id %q has no number", s)
	}
	return changeID{epoch: strings.ToLower(strings.Join(strings.Fields(s[:i]), " ")), number: n}, nil
}

// incomparable says why the changes between two moments cannot be asked for;
// "" when they can.
func incomparable(then, now string) string {
	switch {
	case now == "":
		return "change tracking is off"
	case then == "":
		return "change tracking was off at the previous generation"
	}
	a, err := parseChangeID(then)
	if err != nil {
		return "the previous generation's change id cannot be read"
	}
	b, err := parseChangeID(now)
	if err != nil {
		return "the host's change id cannot be read"
	}
	switch {
	case a.epoch != b.epoch:
		return "change tracking was reset since the previous generation"
	case b.number < a.number:
		return "the disk was reverted to a state before the previous generation"
	}
	return ""
}
