package codec

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"hikae/repo/internal/block"
)

const size = 128 << 10

func samples() map[string][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, size)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	text := bytes.Repeat([]byte("the copy you keep, "), size/19+1)[:size]
	half := append(append([]byte(nil), noise[:size/2]...), text[:size/2]...)
	return map[string][]byte{"noise": noise, "text": text, "half": half, "zeros": make([]byte, size)}
}

func TestRoundTrip(t *testing.T) {
	d, err := NewDecompressor(size)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, name := range append(Names(), "") {
		c, err := New(name, size)
		if err != nil {
			t.Fatal(err)
		}
		for what, src := range samples() {
			for _, compress := range []func([]byte) ([]byte, block.Kind){c.Block, c.Node} {
				out, kind := compress(src)
				if what == "noise" && kind != block.Raw && kind != block.NodeRaw {
					t.Errorf("%s: noise became a %v", name, kind)
				}
				if what == "text" && name != "none" && kind.IsBlock() && len(out) > size/10 {
					t.Errorf("%s: text became %d bytes", name, len(out))
				}
				dst := make([]byte, size)
				if err := d.Decompress(dst, kind, out); err != nil {
					t.Fatalf("%s %s: %v", name, what, err)
				}
				if !bytes.Equal(dst, src) {
					t.Fatalf("%s %s: other bytes came back", name, what)
				}
				// In the middle of a larger buffer nothing around it changes, nor does
				// anything beyond the slack.
				around := bytes.Repeat([]byte{0xa5}, 3*Slack+size)
				if err := d.Decompress(around[Slack:Slack+size], kind, out); err != nil || !bytes.Equal(around[Slack:Slack+size], src) {
					t.Fatalf("%s %s: %v", name, what, err)
				}
				if untouched := bytes.Repeat([]byte{0xa5}, 2*Slack); !bytes.Equal(around[:Slack], untouched[:Slack]) || !bytes.Equal(around[Slack+size:], untouched) {
					t.Fatalf("%s %s: bytes around were changed", name, what)
				}
				clear(around[Slack : Slack+size])
				if err := d.DecompressRoomy(around[Slack:Slack+size], kind, out); err != nil || !bytes.Equal(around[Slack:Slack+size], src) {
					t.Fatalf("%s %s with slack: %v", name, what, err)
				}
				if !bytes.Equal(around[2*Slack+size:], bytes.Repeat([]byte{0xa5}, Slack)) {
					t.Fatalf("%s %s: bytes beyond the slack were changed", name, what)
				}
				if d.DecompressRoomy(make([]byte, size-1, size+2*Slack), kind, out) == nil || d.DecompressRoomy(make([]byte, size+1, size+2*Slack), kind, out) == nil {
					t.Fatalf("%s %s: another length passed", name, what)
				}
				for _, wrong := range []int{size - 1, size + 1, 0} {
					if d.Decompress(make([]byte, wrong), kind, out) == nil {
						t.Fatalf("%s %s: %d bytes passed as %d", name, what, size, wrong)
					}
				}
			}
		}
	}
	if _, err := New("lz4", size); err == nil {
		t.Fatal("lz4 passed")
	}
}

func FuzzDecompress(f *testing.F) {
	const small = 4 << 10
	d, err := NewDecompressor(small)
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range Names() {
		c, err := New(name, small)
		if err != nil {
			f.Fatal(err)
		}
		for _, src := range samples() {
			out, kind := c.Block(src[size/2-small/2:][:small])
			f.Add(byte(kind), append([]byte(nil), out...))
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, src []byte) {
		dst := make([]byte, small)
		exact := d.Decompress(dst, block.Kind(kind), src)
		room := bytes.Repeat([]byte{0xa5}, small+2*Slack)
		roomy := d.DecompressRoomy(room[:small], block.Kind(kind), src)
		if (exact == nil) != (roomy == nil) || exact == nil && !bytes.Equal(dst, room[:small]) {
			t.Fatalf("without slack %v, with slack %v", exact, roomy)
		}
		if !bytes.Equal(room[small+Slack:], bytes.Repeat([]byte{0xa5}, Slack)) {
			t.Fatal("bytes beyond the slack were changed")
		}
	})
}
