package vmdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Image is a disk image on this machine, opened for reading: a raw image, a flat extent, or any VMDK together with all its
// files and parents. It is safe for concurrent use.
type Image struct {
	kind  string
	chain *Chain
	desc  *Descriptor
	files []*os.File
}

// OpenImage opens a local image:
//
//   - a descriptor (NAME.vmdk), its extents beside it, and the parents it names, whatever their formats
//   - a hosted sparse file (monolithicSparse, streamOptimized) with its parents
//   - a raw image, a block device, or a flat extent (NAME-flat.vmdk) itself. A length that is no multiple of SectorSize is
//     filled up with zeros
//
// ErrUnsupported: an image of another program, with the command that converts it; ErrFormat: damaged; ErrChain: a parent was changed or
// is missing.
func OpenImage(path string) (*Image, error) {
	i := &Image{}
	if err := i.open(context.Background(), path); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	return i, nil
}

func (i *Image) open(ctx context.Context, path string) error {
	f, head, err := i.openFile(path)
	if err != nil {
		return err
	}
	if f.Size() == 0 {
		return fmt.Errorf("%s: the file is empty", path)
	}
	if err := foreign(path, f, head); err != nil {
		return err
	}
	if !IsDescriptor(head) && !bytes.HasPrefix(head, []byte(hostedMagic)) {
		i.kind = "raw"
		if strings.HasSuffix(path, "-flat.vmdk") {
			i.kind = "flat"
		}
		size := (f.Size() + SectorSize - 1) / SectorSize * SectorSize
		i.chain, err = rawChain(File{R: padded{f}, Size: size}, path)
		return err
	}
	var links []LinkSource // top first
	for path := path; ; {
		if len(links) == maxDepth {
			return fmt.Errorf("%s: %w: more than %d links: a link names one of its children as its parent", path, ErrChain, maxDepth)
		}
		ls, err := i.openLink(ctx, f, head, path)
		if err != nil {
			return err
		}
		links = append(links, ls)
		if ls.Descriptor.ParentCID == NoParent {
			break
		}
		hint := ls.Descriptor.ParentFileNameHint
		if hint == "" {
			return fmt.Errorf("%s: %w: it has a parent but does not name it", path, ErrChain)
		}
		path = beside(path, hint)
		if f, head, err = i.openFile(path); err != nil {
			return fmt.Errorf("%s: %w: its parent cannot be opened: %w", ls.Name, ErrChain, err)
		}
	}
	for a, b := 0, len(links)-1; a < b; a, b = a+1, b-1 {
		links[a], links[b] = links[b], links[a]
	}
	i.desc = links[len(links)-1].Descriptor
	i.kind = i.desc.CreateType
	i.chain, err = OpenChain(ctx, links, ChainOptions{})
	return err
}

func (i *Image) openFile(path string) (*LocalFile, []byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	i.files = append(i.files, f)
	if st, err := f.Stat(); err != nil {
		return nil, nil, err
	} else if m := st.Mode(); !m.IsRegular() && m&os.ModeDevice == 0 || m&os.ModeCharDevice != 0 {
		return nil, nil, fmt.Errorf("%s: not a file or block device", path)
	}
	local, err := NewLocalFile(f)
	if err != nil {
		return nil, nil, err
	}
	head := make([]byte, 512)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	return local, head[:n], nil
}

// openLink reads a link's descriptor, by itself or inside a sparse file, and opens its extents.
func (i *Image) openLink(ctx context.Context, f *LocalFile, head []byte, path string) (LinkSource, error) {
	ls := LinkSource{Name: path}
	if bytes.HasPrefix(head, []byte(hostedMagic)) {
		src := &source{File: File{R: f, Size: f.Size()}, name: path}
		d, err := embeddedDescriptor(ctx, src)
		if err != nil {
			return ls, err
		}
		if d == nil {
			return ls, fmt.Errorf("%s: one piece of a disk; give its descriptor instead (the .vmdk without a number): %w", path,
				ErrUnsupported)
		}
		if len(d.Extents) != 1 || !strings.EqualFold(d.Extents[0].Type, ExtentSparse) {
			return ls, fmt.Errorf("%s: sparse file whose descriptor has %d extents: %w", path, len(d.Extents), ErrUnsupported)
		}
		// The file may have been renamed since: the extent is this file whatever name the descriptor has for it.
		d.Extents[0].File = filepath.Base(path)
		ls.Descriptor, ls.Files = d, []File{src.File}
		return ls, nil
	}
	if f.Size() > MaxDescriptor {
		return ls, fmt.Errorf("%s: %w: descriptor of %d bytes", path, ErrFormat, f.Size())
	}
	text := make([]byte, f.Size())
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, f.Size()), text); err != nil {
		return ls, fmt.Errorf("%s: %w", path, err)
	}
	d, err := ParseDescriptor(text)
	if err != nil {
		return ls, fmt.Errorf("%s: %w", path, err)
	}
	ls.Descriptor = d
	for _, e := range d.Extents {
		if e.Type == ExtentZero {
			ls.Files = append(ls.Files, File{})
			continue
		}
		x, _, err := i.openFile(beside(path, e.File))
		if err != nil {
			return ls, fmt.Errorf("%s: extent: %w", path, err)
		}
		ls.Files = append(ls.Files, File{R: x, Size: x.Size()})
	}
	return ls, nil
}

// beside is a file that a descriptor names: relative names are in the descriptor's folder.
func beside(descriptor, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(descriptor), filepath.FromSlash(name))
}

// foreign tells files that would otherwise be taken for raw images.
func foreign(path string, f *LocalFile, head []byte) error {
	convert := func(what string) error {
		return fmt.Errorf("%s: a %s image: %w: convert it first, with: qemu-img convert -O raw %q %q", path, what, ErrUnsupported, path,
			strings.TrimSuffix(path, filepath.Ext(path))+".raw")
	}
	is := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case is("QFI\xfb"):
		return convert("qcow2")
	case is("QED\x00"):
		return convert("qed")
	case is("conectix"):
		return convert("VHD")
	case is("vhdxfile"):
		return convert("VHDX")
	case is("WithoutFreeSpace"), is("WithouFreSpacExt"):
		return convert("Parallels")
	case len(head) >= 68 && string(head[64:68]) == "\x7f\x10\xda\xbe":
		return convert("VDI")
	case is(cowdMagic) || len(head) >= 16 && is("\xbe\xba\xfe\xca\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"):
		return fmt.Errorf("%s: the data of one snapshot; give the snapshot's descriptor instead (NAME-00000N.vmdk): %w", path,
			ErrUnsupported)
	case IsTracking(head):
		return fmt.Errorf("%s: a change tracking file, not a disk: %w", path, ErrUnsupported)
	case is("\x1f\x8b\x08"), is("\xfd7zXZ\x00"), is("\x28\xb5\x2f\xfd"),
		len(head) >= 10 && is("BZh") && string(head[4:10]) == "1AY&SY":
		return fmt.Errorf("%s: the image is compressed: %w: unpack it first", path, ErrUnsupported)
	}
	if f.Size() >= SectorSize {
		var tail [8]byte // a VHD of fixed size has its only mark at the end
		if _, err := f.ReadAt(tail[:], f.Size()-SectorSize); err == nil && string(tail[:]) == "conectix" {
			return convert("VHD")
		}
	}
	return nil
}

// padded fills the file's last sector with zeros.
type padded struct{ *LocalFile }

func (p padded) ReadAt(b []byte, off int64) (int, error) {
	n, err := p.LocalFile.ReadAt(b, off)
	if errors.Is(err, io.EOF) && n < len(b) && off+int64(len(b)) < p.size+SectorSize {
		clear(b[n:])
		return len(b), nil
	}
	return n, err
}

// NextData is that of the file; data that reaches its end reaches the end of the last sector.
func (p padded) NextData(off int64) (start, end int64, err error) {
	start, end, err = p.LocalFile.NextData(off)
	if err == nil && end == p.size {
		end = (end + SectorSize - 1) / SectorSize * SectorSize
	}
	return start, end, err
}

// rawChain is a chain of one flat link without a descriptor.
func rawChain(f File, name string) (*Chain, error) {
	d := NewFlatDescriptor("raw", f.Size, "", false, "", 0)
	d.Extents[0].File = name
	return OpenChain(context.Background(), []LinkSource{{Name: name, Descriptor: d, Files: []File{f}}}, ChainOptions{})
}

// Kind is how the image is kept: "raw", "flat" or the createType of its descriptor (vmfs, monolithicSparse, streamOptimized, …).
func (i *Image) Kind() string { return i.kind }

// Descriptor is the top link's descriptor; nil for raw images and flat extents by themselves.
func (i *Image) Descriptor() *Descriptor { return i.desc }

// Capacity is the disk's size in bytes, a multiple of SectorSize.
func (i *Image) Capacity() int64 { return i.chain.Capacity() }

// ReadAt implements io.ReaderAt.
func (i *Image) ReadAt(p []byte, off int64) (int, error) { return i.chain.ReadAt(p, off) }

// ReadAtContext is ReadAt that can be cancelled.
func (i *Image) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return i.chain.ReadAtContext(ctx, p, off)
}

// NextData finds the first area at or after off that may hold data; io.EOF: nothing but zeros follows. See Chain.NextData.
func (i *Image) NextData(ctx context.Context, off int64) (start, end int64, err error) {
	return i.chain.NextData(ctx, off)
}

// Allocated is every area that may hold data.
func (i *Image) Allocated(ctx context.Context) ([]Area, error) { return i.chain.Allocated(ctx) }

// Close closes the files.
func (i *Image) Close() error {
	var errs []error
	for _, f := range i.files {
		errs = append(errs, f.Close())
	}
	i.files = nil
	return errors.Join(errs...)
}
