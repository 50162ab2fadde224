package pack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"

	"hikae/repo/internal/block"
	"hikae/repo/internal/codec"
	"hikae/repo/internal/fsx"
)

// IsDamage tells whether an error of this package means that stored bytes are
// missing or wrong, as opposed to storage that cannot be reached.
func IsDamage(err error) bool {
	return errors.Is(err, ErrFormat) || errors.Is(err, ErrSeal) ||
		errors.Is(err, codec.ErrCorrupt) || errors.Is(err, fs.ErrNotExist)
}

// Pack is an open pack; its methods may be used by many goroutines.
type Pack struct {
	file   fsx.File
	typ    Type
	header Header
	seal   *sealer
}

// Open opens a pack and checks its header.
func Open(fsys fsx.FS, k Keys, repository [16]byte, t Type, h block.Handle) (*Pack, error) {
	f, err := fsys.Open(t.Path(h))
	if err != nil {
		return nil, err
	}
	p, err := open(f, k, repository, t, h)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return p, nil
}

func open(f fsx.File, k Keys, repository [16]byte, t Type, h block.Handle) (*Pack, error) {
	var b [HeaderSize]byte
	if err := readFull(f, b[:], 0); err != nil {
		return nil, err
	}
	p := &Pack{file: f, typ: t}
	var err error
	if p.header, err = DecodeHeader(b[:]); err != nil {
		return nil, err
	}
	switch {
	case p.header.Repository != repository:
		return nil, fmt.Errorf("%w: it belongs to another repository", ErrFormat)
	case p.header.Type != t || p.header.Handle() != h:
		return nil, fmt.Errorf("%w: the file holds pack %v of type %d", ErrFormat, p.header.Handle(), p.header.Type)
	}
	p.seal, err = newSealer(k, &p.header)
	return p, err
}

// Handle is the pack's name.
func (p *Pack) Handle() block.Handle { return p.header.Handle() }

// Header is the pack's header.
func (p *Pack) Header() Header { return p.header }

// Close closes the pack's file.
func (p *Pack) Close() error { return p.file.Close() }

// readFull reads len(b) bytes; a file that ends before is damaged.
func readFull(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: the file ends at %d, %d more bytes expected", ErrFormat, off+int64(n), len(b)-n)
	}
	return err
}

// ReadSealed reads sealed bytes as they lie in the file.
func (p *Pack) ReadSealed(b []byte, off int64) error { return readFull(p.file, b, off) }

// Unseal opens a record's sealed bytes in place and returns the payload, still
// compressed. raw is the length of the plaintext after decompression. On an
// error the bytes are zeroed, never plaintext.
func (p *Pack) Unseal(x *Scratch, r block.Record, raw int, sealed []byte) ([]byte, error) {
	if r.Pack != p.Handle() || r.IsHole() || TypeOf(r.Kind) != p.typ || len(sealed) != int(r.Length) || len(sealed) < Overhead {
		return nil, fmt.Errorf("%w: a %v of %d bytes", ErrFormat, r.Kind, r.Length)
	}
	return p.seal.open(&x.x, sealed, uint64(r.Offset), byte(r.Kind), uint32(raw), &r.ID)
}

// Size is the length of the pack's file in bytes.
func (p *Pack) Size() (int64, error) {
	fi, err := p.file.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// Trailer reads the pack's last bytes and checks them against its size.
func (p *Pack) Trailer() (Trailer, error) {
	size, err := p.Size()
	if err != nil {
		return Trailer{}, err
	}
	b := make([]byte, TrailerSize)
	if size < HeaderSize+TrailerSize {
		return Trailer{}, fmt.Errorf("%w: %d bytes are no pack", ErrFormat, size)
	}
	if err := readFull(p.file, b, size-TrailerSize); err != nil {
		return Trailer{}, err
	}
	return DecodeTrailer(b, size)
}

// Records reads and proves the footer: every record of the pack, by offset.
func (p *Pack) Records() ([]block.Record, error) {
	t, err := p.Trailer()
	if err != nil {
		return nil, err
	}
	sealed := make([]byte, t.FooterLength)
	if err := readFull(p.file, sealed, int64(t.FooterOffset)); err != nil {
		return nil, err
	}
	raw := uint32(len(sealed) - Overhead)
	plain, err := p.seal.open(new(scratch), sealed, uint64(t.FooterOffset), footerKind, raw, &block.ID{})
	if err != nil {
		return nil, fmt.Errorf("footer: %w", err)
	}
	return decodeFooter(plain, &p.header, t.FooterOffset)
}

// Scrubber reads a pack from front to end and proves its sum; meanwhile the
// caller sees every record.
type Scrubber struct {
	sum    hash.Hash
	sealed []byte
}

// Scrub reads the whole pack. each, if not nil, is called for every record with
// its sealed bytes, which it may change. It returns the bytes read. The sum is
// proved last: an error of each does not hide it, both are joined.
func (s *Scrubber) Scrub(p *Pack, each func(r block.Record, sealed []byte) error) (int64, error) {
	if s.sum == nil {
		s.sum = sha256.New()
	}
	s.sum.Reset()
	size, err := p.Size()
	if err != nil {
		return 0, err
	}
	t, err := p.Trailer()
	if err != nil {
		return 0, err
	}
	var bad error
	var records []block.Record
	if each != nil {
		if records, err = p.Records(); err != nil {
			bad = err
		}
	}
	var next int64
	read := func(end int64) ([]byte, error) {
		n := int(end - next)
		if cap(s.sealed) < n {
			s.sealed = make([]byte, n)
		}
		b := s.sealed[:n]
		if err := readFull(p.file, b, next); err != nil {
			return nil, err
		}
		s.sum.Write(b)
		next = end
		return b, nil
	}
	if _, err := read(HeaderSize); err != nil {
		return next, err
	}
	for _, r := range records {
		b, err := read(int64(r.Offset) + int64(r.Length))
		if err != nil {
			return next, err
		}
		if err := each(r, b); err != nil {
			bad = errors.Join(bad, err)
		}
	}
	for end := size - sha256.Size; next < end; {
		if _, err := read(min(end, next+256<<10)); err != nil {
			return next, err
		}
	}
	if got := s.sum.Sum(nil); !bytes.Equal(got, t.Sum[:]) {
		bad = errors.Join(bad, fmt.Errorf("%w: SHA-256 of the file is %x, its end says %x", ErrFormat, got[:8], t.Sum[:8]))
	}
	return size, bad
}
