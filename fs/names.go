package fs

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// maxName is the longest name a directory entry can have on Linux, in bytes.
const maxName = 255

// escapeName makes a path component of a name. Nearly all names stay as they
// are. A slash, a control character and a zero byte become %2F, %09, %00 and so
// on, and "." and ".." become %2E and %2E%2E. A per cent sign becomes %25 only
// where it would otherwise read as one of these. So no two names become one and
// unescaping gives back the name.
//
// A name that would be too long for a directory entry is cut and ends in "%~"
// and 16 digits of its SHA-256 instead; that is not reversible.
func escapeName(s string) string {
	const digits = "0123456789ABCDEF"
	if s == "" || s == "." || s == ".." {
		return map[string]string{"": "%_", ".": "%2E", "..": "%2E%2E"}[s]
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; mustEscape(c) || c == '%' && readsAsEscape(s[i:]) {
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	if b.Len() <= maxName {
		return b.String()
	}
	sum := sha256.Sum256([]byte(s))
	return b.String()[:200] + "%~" + hex.EncodeToString(sum[:8])
}

func mustEscape(c byte) bool { return c < 0x20 || c == 0x7f || c == '/' }

// readsAsEscape says whether s, which begins with a per cent sign, begins like
// something escapeName wrote. Its digits are upper case; vSphere's own escapes
// (%2f for a slash in a VM's name) are lower case and stay readable.
func readsAsEscape(s string) bool {
	if strings.HasPrefix(s, "%_") || strings.HasPrefix(s, "%~") || strings.HasPrefix(s, "%25") || strings.HasPrefix(s, "%2E") {
		return true
	}
	if len(s) < 3 || strings.ToUpper(s[:3]) != s[:3] {
		return false
	}
	b, err := hex.DecodeString(s[1:3])
	return err == nil && mustEscape(b[0])
}
