package guest

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxRead bounds what is read at once.
const maxRead = 4 << 20

// view is a partition or disk that is being looked at.
type view struct {
	r    io.ReaderAt
	size int64
	err  error // the first read that failed
}

// bytes returns n bytes at off; nil when they do not lie in the view, are too many,
// or cannot be read.
func (v *view) bytes(off, n int64) []byte {
	if off < 0 || n <= 0 || n > maxRead || off > v.size || n > v.size-off {
		return nil
	}
	b := make([]byte, n)
	got, err := v.r.ReadAt(b, off)
	if int64(got) == n {
		return b
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if v.err == nil {
		v.err = fmt.Errorf("%d bytes at %d: %w", n, off, err)
	}
	return nil
}

// has tells whether the view has these bytes at off.
func (v *view) has(off int64, magic string) bool {
	b := v.bytes(off, int64(len(magic)))
	return b != nil && string(b) == magic
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c is the checksum that Linux file systems use.
func crc32c(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// without returns a copy of b with zeros from off on, n bytes: checksums are taken
// with their own field zero.
func without(b []byte, off, n int) []byte {
	c := bytes.Clone(b)
	clear(c[off : off+n])
	return c
}

// text is a name as it stands in a field that zeros or spaces fill up.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	s := strings.TrimRight(string(b), " ")
	if !utf8.ValidString(s) {
		return ""
	}
	return s
}

// text16 is a name in UTF-16, little endian.
func text16(b []byte) string {
	u := make([]uint16, 0, len(b)/2)
	for i := 0; i+1 < len(b); i += 2 {
		u = append(u, uint16(b[i])|uint16(b[i+1])<<8)
	}
	return string(utf16.Decode(u))
}

// uuid shows 16 bytes as people write them.
func uuid(b []byte) string {
	s := hex.EncodeToString(b)
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// powerOfTwo tells whether n is 1, 2, 4, … and within bounds.
func powerOfTwo[T uint8 | uint16 | uint32 | int64](n, least, most T) bool {
	return n >= least && n <= most && n&(n-1) == 0
}
