package vdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"hikae/backup/vmdk"
)

const copyStep = 1 << 20

// zeroPart is compared with: what is equal to it becomes a hole.
var zeroPart [16 << 10]byte

// writeDescriptor puts a descriptor in place by a rename, so that it is the old one or the new one, never half.
func writeDescriptor(path string, desc *vmdk.Descriptor) error {
	return replace(path, desc.Bytes())
}

func replace(path string, chunks ...[]byte) error { return replaceSized(path, 0, chunks...) }

// replaceSized makes the file at least so long, with holes where the chunks are zero.
func replaceSized(path string, size int64, chunks ...[]byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".vdisk-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	var n int64
	for _, p := range chunks {
		for len(p) > 0 {
			part := p[:min(len(p), len(zeroPart))]
			if !bytes.Equal(part, zeroPart[:len(part)]) {
				if _, err := f.WriteAt(part, n); err != nil {
					return errors.Join(err, f.Close())
				}
			}
			n, p = n+int64(len(part)), p[len(part):]
		}
	}
	if err := f.Truncate(max(n, size)); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// copyImage writes an image's data into an empty file and makes it as long as the image.
func copyImage(ctx context.Context, dst *os.File, image *vmdk.Image, path string) error {
	var src *os.File
	if kind := image.Kind(); kind == "raw" || kind == "flat" {
		var err error
		if src, err = os.Open(path); err != nil {
			return err
		}
		defer src.Close()
		if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
			return dst.Truncate(image.Capacity())
		}
	}
	if err := dst.Truncate(image.Capacity()); err != nil {
		return err
	}
	buf := make([]byte, copyStep)
	for off := int64(0); ; {
		start, end, err := image.NextData(ctx, off)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if src != nil {
			if start, err = copyRange(ctx, dst, src, start, end); err != nil {
				return err
			}
		}
		// Whatever the kernel could not copy by itself.
		for start < end {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := buf[:min(end-start, copyStep)]
			if _, err := image.ReadAt(p, start); err != nil {
				return err
			}
			if _, err := dst.WriteAt(p, start); err != nil {
				return err
			}
			start += int64(len(p))
		}
		off = end
	}
}

// copyRange lets the kernel copy, and returns how far it came.
func copyRange(ctx context.Context, dst, src *os.File, start, end int64) (int64, error) {
	for start < end {
		if err := ctx.Err(); err != nil {
			return start, err
		}
		from, to := start, start
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(min(end-start, 256<<20)), 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return start, nil // another file system, or the padding behind the end: by hand
		}
		start += int64(n)
	}
	return start, nil
}

func writeZeros(f io.WriterAt, off, n int64) error {
	buf := make([]byte, min(n, copyStep))
	for n > 0 {
		m, err := f.WriteAt(buf[:min(n, int64(len(buf)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(m), n-int64(m)
	}
	return nil
}

// clearRange makes a range of a flat file zero: a hole on a thin disk, where the file system can.
func clearRange(f *os.File, off, n int64, thin bool) error {
	if thin && unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n) == nil {
		return nil
	}
	return writeZeros(f, off, n)
}

// fillHoles writes zeros into the holes of a file.
func fillHoles(ctx context.Context, f *os.File) error {
	local, err := vmdk.NewLocalFile(f)
	if err != nil {
		return err
	}
	for off := int64(0); off < local.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, end, err := local.NextData(off)
		if errors.Is(err, io.EOF) {
			start, end = local.Size(), local.Size()
		} else if err != nil {
			return err
		}
		if err := writeZeros(f, off, start-off); err != nil {
			return err
		}
		off = end
	}
	return nil
}

// removeFiles deletes what is there of some files.
func removeFiles(paths ...string) error {
	var errs []error
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("delete: %w", err))
		}
	}
	return errors.Join(errs...)
}
