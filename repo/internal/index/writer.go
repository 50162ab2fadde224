package index

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// source yields records sorted by id, the newest of one id first. The 48 bytes
// are valid until the next call; io.EOF ends them.
type source interface {
	next() ([]byte, error)
}

// writer makes a segment from records as they come. Its memory is one group's
// ids and the fences, whatever the number of records.
type writer struct {
	out  *bufio.Writer
	sum  hash.Hash
	seal seal
	off  int64

	page   []byte // plaintext of the page being filled
	ids    []byte // bytes 0–24 of each id in the group: what the filter needs
	filter []byte // made when the group is full
	footer
	same []byte // records with the id written last
}

func newWriter(w io.Writer, s seal) (*writer, error) {
	sum := sha256.New()
	x := &writer{
		out: bufio.NewWriterSize(io.MultiWriter(w, sum), 256<<10), sum: sum, seal: s,
		page: make([]byte, 0, pageSize),
	}
	return x, x.emit(s.header[:])
}

func (w *writer) emit(b []byte) error {
	n, err := w.out.Write(b)
	w.off += int64(n)
	return err
}

// add takes the next record; one that was there already is dropped.
func (w *writer) add(rec []byte) error {
	if len(w.same) > 0 {
		switch bytes.Compare(w.same[:32], rec[:32]) {
		case 1:
			return errors.New("records are not in order")
		case 0:
			if seen(w.same, rec) {
				return nil
			}
		case -1:
			w.same = w.same[:0]
		}
	}
	if w.entries == maxEntries {
		return fmt.Errorf("a segment holds at most %d entries", maxEntries)
	}
	w.same = append(w.same, rec...)
	if len(w.page) == 0 {
		w.fences = append(w.fences, binary.BigEndian.Uint64(rec))
	}
	w.page = append(w.page, rec...)
	w.ids = append(w.ids, rec[:24]...)
	w.entries++
	if len(w.page) == pageEntries*block.Size {
		if err := w.flushPage(); err != nil {
			return err
		}
	}
	if w.entries%groupEntries == 0 {
		return w.flushGroup()
	}
	return nil
}

func (w *writer) flushPage() error {
	err := w.emit(w.seal.close(w.page, w.off, sealRecords))
	w.page = w.page[:0]
	return err
}

func (w *writer) flushGroup() error {
	if w.filter == nil {
		w.filter = make([]byte, filterSize(groupEntries)+tagSize)
	}
	filter := w.filter[:filterSize(len(w.ids)/24)]
	clear(filter)
	for ids := w.ids; len(ids) > 0; ids = ids[24:] {
		filterAdd(filter, ids)
	}
	w.ids = w.ids[:0]
	return w.emit(w.seal.close(filter, w.off, sealFilter))
}

// finish writes what is left, footer and trailer.
func (w *writer) finish() error {
	if len(w.page) > 0 {
		if err := w.flushPage(); err != nil {
			return err
		}
	}
	if len(w.ids) > 0 {
		if err := w.flushGroup(); err != nil {
			return err
		}
	}
	end := trailer{off: w.off, size: w.size() + tagSize}
	if err := w.emit(w.seal.close(w.encode(), w.off, sealFooter)); err != nil {
		return err
	}
	if err := w.emit(end.encode()); err != nil {
		return err
	}
	if err := w.out.Flush(); err != nil {
		return err
	}
	if err := w.emit(w.sum.Sum(nil)); err != nil {
		return err
	}
	return w.out.Flush()
}

// write makes a segment of all that src yields, at least one record, and returns
// it open for lookups.
func (x *Index) write(ctx context.Context, src source, sequence uint64, superseded []name) (*segment, error) {
	return x.writeAs(ctx, x.opt.TempName(), src, sequence, superseded)
}

// writeAs is write by way of a temporary file of the caller's.
func (x *Index) writeAs(ctx context.Context, tmp string, src source, sequence uint64, superseded []name) (*segment, error) {
	h := newHeader(x.ring.Epoch(), x.ring.Repository(), random32())
	s, err := newSeal(x.ring, h)
	if err != nil {
		return nil, err
	}
	if err := x.makeDir(); err != nil {
		return nil, err
	}
	var w *writer
	file := path.Join(x.dir, h.name().String())
	err = fsx.WriteFunc(x.fsys, tmp, file, func(out io.Writer) error {
		var err error
		if w, err = newWriter(out, s); err != nil {
			return err
		}
		w.sequence, w.superseded = sequence, superseded
		for n := 0; ; n++ {
			if n%4096 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			rec, err := src.next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			if err := w.add(rec); err != nil {
				return err
			}
		}
		return w.finish()
	})
	if err != nil {
		return nil, fmt.Errorf("write index segment: %w", err)
	}
	return &segment{file: file, name: h.name(), bytes: w.off, seal: s, footer: w.footer}, nil
}

// makeDir makes the index's directory, once.
func (x *Index) makeDir() error {
	x.mu.RLock()
	made := x.madeDir
	x.mu.RUnlock()
	if made {
		return nil
	}
	if err := fsx.MakeDir(x.fsys, x.dir); err != nil {
		return fmt.Errorf("make the index's directory: %w", err)
	}
	x.mu.Lock()
	x.madeDir = true
	x.mu.Unlock()
	return nil
}
