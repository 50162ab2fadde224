package block

import (
	"bytes"
	"testing"
)

func FuzzDecode(f *testing.F) {
	f.Add(make([]byte, Size))
	f.Add(Record{ID: ID{1, 2}, Location: Location{Pack: 7, Offset: 64, Length: MaxLength, Kind: Zstd}}.Append(nil))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if err != nil {
			return
		}
		if got := r.Append(nil); !bytes.Equal(got, b[:Size]) {
			t.Fatalf("decoded %x, encoded again %x", b[:Size], got)
		}
	})
}

func TestHandle(t *testing.T) {
	h := Handle(0x0123456789abcdef)
	if got, err := ParseHandle(h.String()); err != nil || got != h {
		t.Fatalf("%v %v", got, err)
	}
	for _, s := range []string{"", "0000000000000000", "0123456789ABCDEF", "123", "0123456789abcdeg", "../../etc/passwd"} {
		if _, err := ParseHandle(s); err == nil {
			t.Errorf("%q passed as a pack's name", s)
		}
	}
}
