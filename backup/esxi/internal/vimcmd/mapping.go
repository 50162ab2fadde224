package vimcmd

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Region is a range of a file in a block map.
type Region struct {
	Offset, Length int64 // bytes
	// Hole: no block is allocated there. Zeroed on demand: a block is, but it
	// was never written and reads as zeros. Neither holds data.
	Hole, Lazy bool
}

// mapLine is one line of the map:
//
//	[     1048576:    1048576] --> [VMFS Z- LVID:5e00…/1:( 88080384 -->  89128960)]
//	[     2097152:    8388608] --> [NOMP -- :(           0 -->     8388608)]
//
// offset and length in the file, what backs it, two flags (the first is Z for
// blocks that are to be zeroed), and where it lies.
var mapLine = regexp.MustCompile(`^\[\s*(\d+):\s*(\d+)\]\s*-->\s*\[(\w+) (\S\S) `)

// mapTotal is the heading, "Mapping for file NAME (N bytes in size):".
var mapTotal = regexp.MustCompile(`\((\d+) bytes in size\)`)

// ParseMapping reads "vmkfstools -t0" for a disk of size bytes. The form is known
// from programs that look for parts of it, not from a document. So nothing is
// believed unless the regions follow each other without a gap from 0 to size
// exactly, and what is not known to be without data counts as data. ErrFormat
// otherwise.
func ParseMapping(output string, size int64) ([]Region, error) {
	var out []Region
	var end int64
	for _, line := range strings.Split(output, "\n") {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "[") {
			if m := mapTotal.FindStringSubmatch(line); m != nil && m[1] != strconv.FormatInt(size, 10) {
				return nil, fmt.Errorf("%w: a map of %s bytes for a disk of %d", ErrFormat, m[1], size)
			}
			continue
		}
		m := mapLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("%w: block map line %q", ErrFormat, short(line))
		}
		off, err1 := strconv.ParseInt(m[1], 10, 64)
		n, err2 := strconv.ParseInt(m[2], 10, 64)
		if err1 != nil || err2 != nil || off != end || n <= 0 || n > size-off {
			return nil, fmt.Errorf("%w: the block map continues at %s with %s bytes, where %d of %d are mapped", ErrFormat, m[1], m[2], end, size)
		}
		end = off + n
		out = append(out, Region{
			Offset: off, Length: n, Hole: m[3] == "NOMP",
			Lazy: m[3] == "VMFS" && m[4] == "Z-",
		})
	}
	if end != size || size <= 0 {
		return nil, fmt.Errorf("%w: the block map ends at %d of %d bytes: %q", ErrFormat, end, size, short(output))
	}
	return out, nil
}
