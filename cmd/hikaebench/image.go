package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	mib = 1 << 20
	// piece is the granularity of changed areas, that of change tracking on
	// disks up to 128 GiB.
	piece = 64 << 10
)

// area is a range of bytes of a disk.
type area struct{ start, length int64 }

// image is one state of the disk.
type image struct {
	path    string
	size    int64
	data    []area // what the file says it stores
	changed []area // what differs from the state before; data for the first
	csv     string // changed, as a file
}

func total(areas []area) (n int64) {
	for _, a := range areas {
		n += a.length
	}
	return n
}

// openImages measures what each image holds and how it differs from the one
// before it.
func openImages(paths []string, dir string) ([]image, error) {
	var out []image
	for i, p := range paths {
		img := image{path: p}
		f, err := os.Open(p)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return nil, err
		}
		img.size = fi.Size()
		img.data = dataAreas(f, img.size)
		img.changed = img.data
		if i > 0 {
			if img.changed, err = differing(out[i-1], f, img); err != nil {
				return nil, err
			}
		}
		img.csv = filepath.Join(dir, fmt.Sprintf("changed%d.csv", i))
		if err := writeCSV(img.csv, img.changed); err != nil {
			return nil, err
		}
		out = append(out, img)
	}
	return out, nil
}

// dataAreas lists the file's extents, rounded out to pieces.
func dataAreas(f *os.File, size int64) []area {
	var out []area
	for pos := int64(0); pos < size; {
		start, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if err != nil {
			break
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			break
		}
		out = join(out, start/piece*piece, min((end+piece-1)/piece*piece, size))
		pos = end
	}
	return out
}

func join(areas []area, start, end int64) []area {
	if n := len(areas); n > 0 && start <= areas[n-1].start+areas[n-1].length {
		last := &areas[n-1]
		last.length = max(last.length, end-last.start)
		return areas
	}
	return append(areas, area{start, end - start})
}

// differing lists the pieces in which two states differ, reading only where
// either has data.
func differing(before image, now *os.File, img image) ([]area, error) {
	old, err := os.Open(before.path)
	if err != nil {
		return nil, err
	}
	defer old.Close()
	marks := make([]bool, (img.size+piece-1)/piece)
	for _, areas := range [][]area{before.data, img.data} {
		for _, a := range areas {
			for p := a.start / piece; p*piece < min(a.start+a.length, img.size); p++ {
				marks[p] = true
			}
		}
	}
	var out []area
	a, b := make([]byte, piece), make([]byte, piece)
	for p, marked := range marks {
		if !marked {
			continue
		}
		off := int64(p) * piece
		n := min(piece, img.size-off)
		if err := readAt(old, a[:n], off, before.size); err != nil {
			return nil, err
		}
		if err := readAt(now, b[:n], off, img.size); err != nil {
			return nil, err
		}
		if !bytes.Equal(a[:n], b[:n]) {
			out = join(out, off, off+n)
		}
	}
	return out, nil
}

// readAt reads zeros beyond the end: a disk may have grown.
func readAt(f *os.File, p []byte, off, size int64) error {
	clear(p)
	if off >= size {
		return nil
	}
	_, err := f.ReadAt(p[:min(int64(len(p)), size-off)], off)
	if err == io.EOF {
		err = nil
	}
	return err
}

func writeCSV(path string, areas []area) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	for _, a := range areas {
		fmt.Fprintf(w, "%d,%d\n", a.start, a.length)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Close()
}

// generate writes two states of a disk with size bytes of data in eight times
// as much room: text-like, random and repeated regions, as guests have them. In
// the second a twentieth has changed, half of it in one place and half
// scattered.
func generate(dir string, size int64) ([]string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	first, second := filepath.Join(dir, "state0.raw"), filepath.Join(dir, "state1.raw")
	rng := rand.New(rand.NewPCG(8, 1))
	f, err := os.Create(first)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(8 * size); err != nil {
		return nil, err
	}
	buf := make([]byte, mib)
	for off := int64(0); off < size; off += mib {
		fill(rng, buf)
		// Two regions with a hole between them, as partitions leave them.
		at := off
		if off >= size/2 {
			at += 4 * size
		}
		if _, err := f.WriteAt(buf, at); err != nil {
			return nil, err
		}
	}
	g, err := os.Create(second)
	if err != nil {
		return nil, err
	}
	defer g.Close()
	if err := g.Truncate(8 * size); err != nil {
		return nil, err
	}
	for _, a := range dataAreas(f, 8*size) {
		for off := a.start; off < a.start+a.length; off += mib {
			n, err := f.ReadAt(buf[:min(mib, a.start+a.length-off)], off)
			if err != nil && err != io.EOF {
				return nil, err
			}
			if _, err := g.WriteAt(buf[:n], off); err != nil {
				return nil, err
			}
		}
	}
	for off := int64(0); off < size/40; off += mib {
		fill(rng, buf)
		if _, err := g.WriteAt(buf, size/4+off); err != nil {
			return nil, err
		}
	}
	for range size / 40 / (128 << 10) {
		fill(rng, buf[:4096])
		if _, err := g.WriteAt(buf[:4096], rng.Int64N(size/2/4096)*4096); err != nil {
			return nil, err
		}
	}
	return []string{first, second}, nil
}

var words = []string{
	"the ", "disk ", "of ", "a ", "guest ", "holds ", "text ", "and ", "logs\n", "GET /index ", "200 ", "lib", "usr/", "\x00\x00\x00\x00", "int ", "return ", "0x7f",
}

// fill makes a buffer that compresses to about two fifths, like the system
// disks that the figures were first taken on.
func fill(rng *rand.Rand, b []byte) {
	for off := 0; off < len(b); {
		end := min(off+4096+int(rng.Uint32N(32<<10)), len(b))
		if rng.Uint32N(4) == 0 {
			for ; off+8 <= end; off += 8 {
				binary.LittleEndian.PutUint64(b[off:], rng.Uint64())
			}
			off = end
			continue
		}
		for off < end {
			off += copy(b[off:end], words[rng.IntN(len(words))])
			if off < end && rng.Uint32N(3) == 0 {
				b[off] = byte(rng.Uint32())
				off++
			}
		}
	}
}
