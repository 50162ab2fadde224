package ui

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Size shows bytes in binary units with at most three significant digits.
func Size(n int64) string {
	if n < 0 {
		return "-" + Size(-n)
	}
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	v, unit := float64(n), ""
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"} {
		v /= 1024
		unit = u
		if v < 999.5 {
			break
		}
	}
	digits := 0
	switch {
	case v < 9.995:
		digits = 2
	case v < 99.95:
		digits = 1
	}
	s := strconv.FormatFloat(v, 'f', digits, 64)
	if digits > 0 {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	return s + " " + unit
}

// Rate shows bytes over a time.
func Rate(n int64, d time.Duration) string {
	if d <= 0 {
		return "-"
	}
	return Size(int64(float64(n)/d.Seconds())) + "/s"
}

// Duration shows a time as a person says it: two units, no fractions of long
// ones.
func Duration(d time.Duration) string {
	if d >= 10*time.Second {
		d = d.Round(time.Second)
	}
	switch {
	case d < 0:
		return "-" + Duration(-d)
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %02d min", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours())/24)
}

// Seconds shows a number of seconds as Duration does.
func Seconds(s float64) string { return Duration(time.Duration(s * float64(time.Second))) }

// ParseSize reads a size such as 128KiB, 128K or 131072. Units are binary.
func ParseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGTiBkmgt ")
	unit := strings.ToUpper(strings.TrimSpace(s[len(digits):]))
	n, err := strconv.ParseInt(digits, 10, 64)
	shift := map[string]uint{"": 0, "B": 0, "K": 10, "KIB": 10, "M": 20, "MIB": 20, "G": 30, "GIB": 30, "T": 40, "TIB": 40}
	by, ok := shift[unit]
	if err != nil || !ok || n < 0 || n > (1<<62)>>by {
		return 0, fmt.Errorf("%q is not a size: write it as 128KiB, 20GiB or in bytes", s)
	}
	return n << by, nil
}
