package repo

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

// openDamaged opens a pack whose header may be damaged. All of a header but 24 bytes of
// salt is known from elsewhere; of these one byte may be wrong. Whether a guess is right
// is proved by what opens with it: the footer, or one of the records that are known.
func (x *repairer) openDamaged(k packKey, known []block.Record) (*pack.Pack, error) {
	o := &opener{x: x, k: k, v: x.r.newVerifier()}
	p, err := x.openRaw(k)
	if err != nil && !hurts(err) {
		return nil, err
	}
	head, size, herr := x.head(k)
	if herr != nil {
		if p != nil {
			return p, nil
		}
		return nil, errors.Join(err, herr)
	}
	// The smallest records that the file can have are the cheapest to try.
	for _, rec := range known {
		if int64(rec.Offset)+int64(rec.Length) <= size {
			o.known = append(o.known, rec)
		}
	}
	slices.SortStableFunc(o.known, func(a, b block.Record) int { return cmp.Compare(a.Length, b.Length) })
	if p != nil && o.opens(p) {
		return p, nil
	}
	h := pack.Header{Version: pack.Version, Type: k.typ, Repository: x.r.config.id}
	copy(h.Salt[:], head[len(head)-len(h.Salt):])
	binary.LittleEndian.PutUint64(h.Salt[:], uint64(k.handle))
	if g := o.guess(h, head); g != nil {
		if p != nil {
			_ = p.Close()
		}
		return g, nil
	}
	return p, err
}

// head reads the header's bytes, whatever they are, and the file's size.
func (x *repairer) head(k packKey) (head []byte, size int64, err error) {
	f, err := x.r.fs.Open(k.typ.Path(k.handle))
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	head = make([]byte, pack.HeaderSize)
	if n, err := f.ReadAt(head, 0); n < len(head) {
		return nil, 0, fmt.Errorf("%w: it has %d bytes: %w", pack.ErrFormat, n, err)
	}
	return head, fi.Size(), nil
}

// opener finds the header with which a pack opens.
type opener struct {
	x     *repairer
	k     packKey
	v     *verifier
	buf   reader
	known []block.Record
}

// foreign is how many bytes of what is known of a header may be wrong before the file is
// taken for another one.
const foreign = 12

func (o *opener) guess(h pack.Header, head []byte) *pack.Pack {
	wrong := 0
	for i, b := range h.Append(nil) {
		if b != head[i] {
			wrong++
		}
	}
	if wrong > foreign {
		return nil
	}
	for h.Epoch = o.x.r.ring.Epoch(); h.Epoch > 0; h.Epoch-- {
		if g := o.try(h); g != nil {
			return g
		}
		for i := 8; i < len(h.Salt); i++ {
			was := h.Salt[i]
			for b := 1; b < 256; b++ {
				h.Salt[i] = was ^ byte(b)
				if g := o.try(h); g != nil {
					return g
				}
			}
			h.Salt[i] = was
		}
	}
	return nil
}

func (o *opener) try(h pack.Header) *pack.Pack {
	r := o.x.r
	p, err := pack.Open(headedFS{r.fs, o.k.typ.Path(o.k.handle), h.Append(nil)}, r.ring, r.config.id, o.k.typ, o.k.handle)
	if err != nil {
		return nil
	}
	if o.opens(p) {
		return p
	}
	_ = p.Close()
	return nil
}

// opens tells whether anything opens with the header that a pack has.
func (o *opener) opens(p *pack.Pack) bool {
	if _, err := p.Records(); err == nil {
		return true
	}
	const tries = 2
	for _, rec := range o.known[:min(tries, len(o.known))] {
		if _, err := o.x.readRecord(o.v, &o.buf, p, rec); err == nil {
			return true
		}
	}
	return false
}

// headedFS shows a file with another header.
type headedFS struct {
	fsx.FS
	name string
	head []byte
}

func (f headedFS) Open(name string) (fsx.File, error) {
	file, err := f.FS.Open(name)
	if err != nil || name != f.name {
		return file, err
	}
	return headedFile{file, f.head}, nil
}

type headedFile struct {
	fsx.File
	head []byte
}

func (f headedFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	if off < int64(len(f.head)) {
		copy(p[:n], f.head[off:])
	}
	return n, err
}
