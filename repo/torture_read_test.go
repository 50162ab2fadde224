package repo

import (
	"bytes"
	"errors"
	"slices"
)

// look opens a generation that will be read in later steps, mostly registered.
func (w *walk) look(p *walkProc) {
	if len(w.gens) == 0 || len(p.readers) > 3 {
		return
	}
	x := &walkReader{gen: pick(w.rng, w.sorted())}
	if w.chance(70) {
		x.already = w.condemnedNow()
		var err error
		if x.pin, err = p.r.Pin(w.ctx); err != nil {
			w.mayFail(p, "pin", err)
			return
		}
	}
	var err error
	if x.disk, err = w.openGen(p, x.gen); err != nil {
		if x.pin != nil {
			_ = x.pin.Close()
		}
		w.mayFail(p, "open", err)
		return
	}
	x.tainted = len(w.hurt)+len(w.lost) > 0
	p.readers = append(p.readers, x)
}

func (w *walk) unlook(p *walkProc) {
	if len(p.readers) == 0 {
		return
	}
	x := pick(w.rng, p.readers)
	if x.pin != nil {
		_ = x.pin.Close()
	}
	p.readers = slices.DeleteFunc(p.readers, func(o *walkReader) bool { return o == x })
}

// read reads a part of an open generation: right bytes, or an error if there is a
// reason for one.
func (w *walk) read(p *walkProc) {
	if len(p.readers) == 0 {
		return
	}
	x := pick(w.rng, p.readers)
	if w.chance(70) {
		w.cold(p)
	}
	if len(x.gen.content) == 0 {
		return
	}
	off := w.rng.IntN(len(x.gen.content))
	want := x.gen.content[off : off+1+w.rng.IntN(len(x.gen.content)-off)]
	got := make([]byte, len(want))
	n, err := x.disk.ReadAt(got, int64(off))
	if !bytes.Equal(got[:n], want[:n]) {
		w.fatalf("%d: %v reads otherwise than it was written", p.n, x.gen.ref)
	}
	forgotten := w.gens[x.gen.ref.String()] == nil
	switch {
	case err == nil && forgotten && x.pin != nil && len(x.already) == 0:
		w.did["read pinned after it was forgotten"]++
	case err == nil:
		w.did["read right"]++
	case forgotten && (x.pin == nil || len(x.already) > 0 || x.tainted) && errors.Is(err, ErrDamaged):
		w.did["read after it was deleted"]++
	default:
		w.mayFail(p, "read "+x.gen.ref.String(), err)
	}
}

// cold makes a process read from storage again.
func (w *walk) cold(p *walkProc) {
	p.r.packs.Clear()
	p.r.blocks.Clear()
	p.r.nodes.Clear()
}
