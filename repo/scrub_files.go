package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/sealed"
)

// storedKind is a kind of file that ends with the SHA-256 of all its bytes before, and
// so can be verified without keys.
type storedKind uint8

const (
	storedPack storedKind = iota // of blocks or of nodes
	storedSegment
	storedSealed // manifest, identity, what was forgotten, what was verified
)

// storedFile is one such file.
type storedFile struct {
	path     string
	kind     storedKind
	pack     packKey // if it is one
	size     int64
	parity   int64 // size of its sidecar; -1 without
	modified int64 // seconds since 1970
}

// walkStored calls each for every stored file, directory by directory, and orphan, if
// not nil, for every sidecar whose file was not seen. What goes away meanwhile is
// passed over, and so is whatever has an unknown name.
func walkStored(ctx context.Context, fsys fsx.FS, each func(f storedFile) error, orphan func(name string) error) error {
	var dirs []string
	for _, top := range []string{pack.Data.Dir(), pack.Node.Dir(), generationsDir} {
		list, err := fsys.ReadDir(top)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range list {
			if e.IsDir() {
				dirs = append(dirs, path.Join(top, e.Name()))
			}
		}
	}
	dirs = append(dirs, indexDir)
	for _, dir := range dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		list, err := fsys.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := walkDir(dir, list, each, orphan); err != nil {
			return err
		}
	}
	return nil
}

func walkDir(dir string, list []fs.DirEntry, each func(f storedFile) error, orphan func(name string) error) error {
	sidecars := make(map[string]fs.DirEntry)
	for _, e := range list {
		if name, ok := strings.CutSuffix(e.Name(), paritySuffix); ok {
			sidecars[name] = e
		}
	}
	for _, e := range list {
		f, ok := storedName(path.Join(dir, e.Name()))
		if !ok || e.IsDir() {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		f.size, f.modified, f.parity = fi.Size(), fi.ModTime().Unix(), -1
		if side := sidecars[e.Name()]; side != nil {
			delete(sidecars, e.Name())
			si, err := side.Info()
			if err == nil {
				f.parity = si.Size()
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := each(f); err != nil {
			return err
		}
	}
	for name := range sidecars {
		if f, ok := storedName(path.Join(dir, name)); ok && orphan != nil {
			if err := orphan(f.path); err != nil {
				return err
			}
		}
	}
	return nil
}

// storedName tells what a file is by its path.
func storedName(name string) (f storedFile, ok bool) {
	f.path = name
	dir, base := path.Split(name)
	switch top, _, _ := strings.Cut(name, "/"); top {
	case indexDir:
		b, err := hex.DecodeString(base)
		f.kind = storedSegment
		return f, err == nil && len(b) == 8 && dir == indexDir+"/"
	case generationsDir:
		f.kind = storedSealed
		return f, sealedType(base) != 0
	default:
		h, err := block.ParseHandle(base)
		for _, t := range []pack.Type{pack.Data, pack.Node} {
			if err == nil && t.Path(h) == name {
				f.pack = packKey{t, h}
				return f, true
			}
		}
		return f, false
	}
}

// sealedType is the type of sealed file that has such a name; 0 for none.
func sealedType(base string) sealed.Type {
	if digits, ok := strings.CutPrefix(base, forgottenPrefix); ok {
		if _, err := strconv.ParseUint(digits, 10, 63); err == nil {
			return sealed.Forgotten
		}
	}
	if _, ok := parseRefFile(base); ok {
		return sealed.Manifest
	}
	if rest, ok := strings.CutPrefix(base, verificationPrefix); ok {
		digits, stamp, _ := strings.Cut(rest, "-")
		n, err := strconv.ParseUint(digits, 10, 63)
		at, terr := time.Parse(nameTime, stamp)
		if err == nil && terr == nil && verificationName(n, at) == base {
			return sealed.Verification
		}
	}
	if base == identityName {
		return sealed.Identity
	}
	return 0
}

// precious tells whether parity is made for the file: not for what can be made anew.
func (f storedFile) precious() bool {
	return f.kind == storedPack || f.kind == storedSealed && sealedType(path.Base(f.path)) != sealed.Verification
}

// proofBuffer is how much is read at once when a file is verified.
const proofBuffer = 1 << 20

// prover verifies files from front to end.
type prover struct {
	fs  fsx.FS
	id  [16]byte // of the repository
	buf []byte
}

func newProver(fsys fsx.FS, id [16]byte) *prover {
	return &prover{fs: fsys, id: id, buf: make([]byte, proofBuffer)}
}

// prove reads a file and proves its SHA-256, its header and the shape of its end. It
// reads what seems damaged a second time, through a new handle: only what is wrong
// twice is damage, which is a *DamageError. It returns the bytes read, once.
func (p *prover) prove(ctx context.Context, f storedFile) (int64, error) {
	n, err := p.once(ctx, f)
	if isDamaged(err) {
		_, err = p.once(ctx, f)
	}
	switch {
	case err == nil || ctx.Err() != nil || errors.Is(err, fs.ErrNotExist):
		return n, err
	case isDamaged(err):
		return n, f.damage(err)
	}
	return n, fmt.Errorf("read %s: %w", f.path, err)
}

func (p *prover) once(ctx context.Context, f storedFile) (int64, error) {
	file, err := p.fs.Open(f.path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return 0, err
	}
	return p.read(ctx, f, file, fi.Size())
}

// read proves size bytes of r to be the file f.
func (p *prover) read(ctx context.Context, f storedFile, r io.ReaderAt, size int64) (int64, error) {
	const head = pack.HeaderSize // of the other kinds as well
	if size < head+sha256.Size {
		return 0, fmt.Errorf("%w: %d bytes are too few", pack.ErrFormat, size)
	}
	var header, end []byte
	sum := sha256.New()
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return off, err
		}
		b := p.buf[:min(int64(len(p.buf)), size-off)]
		n, err := r.ReadAt(b, off)
		if n < len(b) {
			if err == nil || errors.Is(err, io.EOF) {
				err = fmt.Errorf("%w: the file ends at %d, it had %d bytes", pack.ErrFormat, off+int64(n), size)
			}
			return off, err
		}
		if off == 0 {
			header = append(header, b[:head]...)
		}
		sum.Write(b[:min(int64(n), max(0, size-sha256.Size-off))])
		end = append(end, b[max(0, n-trailerMost):]...)
		end = end[max(0, len(end)-trailerMost):]
		off += int64(n)
	}
	if want := end[len(end)-sha256.Size:]; !bytes.Equal(sum.Sum(nil), want) {
		return size, fmt.Errorf("%w: its SHA-256 is not the one at its end", pack.ErrFormat)
	}
	return size, f.shape(p.id, header, end, size)
}

// trailerMost is the longest trailer, that of a segment.
const trailerMost = 56

// shape proves that header and end are those of the file. What they do not say to
// those without keys is proved when they are opened.
func (f storedFile) shape(id [16]byte, header, end []byte, size int64) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s", pack.ErrFormat, fmt.Sprintf(format, a...))
	}
	if f.kind == storedPack {
		h, err := pack.DecodeHeader(header)
		if err != nil {
			return err
		}
		if h.Repository != id || h.Type != f.pack.typ || h.Handle() != f.pack.handle {
			return bad("the file holds pack %v of type %d of repository %x", h.Handle(), h.Type, h.Repository)
		}
		_, err = pack.DecodeTrailer(end[len(end)-pack.TrailerSize:], size)
		return err
	}
	magic, typ := sealedMagic, byte(sealedType(path.Base(f.path)))
	if f.kind == storedSegment {
		magic, typ = segmentMagic, segmentType
		if hex.EncodeToString(header[32:40]) != path.Base(f.path) {
			return bad("it is segment %x under another name", header[32:40])
		}
		if size < int64(len(header)+trailerMost) || string(end[16:24]) != magic {
			return bad("it has no trailer")
		}
	}
	version := binary.LittleEndian.Uint16(header[8:])
	switch {
	case string(header[:8]) != magic || header[10] != typ || header[11] != 0 || version == 0:
		return bad("its header is none of such a file")
	case [16]byte(header[16:32]) != id:
		return bad("it belongs to another repository")
	case version > FormatVersion:
		return fmt.Errorf("%w (version %d)", pack.ErrVersion, version)
	}
	return nil
}

// What FORMAT.md says of the headers of segments and sealed files.
const (
	indexDir     = "index"
	segmentMagic = "hikaeix\x01"
	segmentType  = 3
	sealedMagic  = "hikaesf\x01"
)

// damage names the file in an error.
func (f storedFile) damage(err error) error {
	if f.kind == storedPack {
		return &DamageError{Pack: f.pack.handle, What: "the whole file", Err: err}
	}
	return &DamageError{What: f.path, Err: err}
}

// isDamaged tells whether an error is about bytes that are not what was written, or
// that the disk cannot read any more.
func isDamaged(err error) bool {
	return errors.Is(err, pack.ErrFormat) || errors.Is(err, pack.ErrVersion) || unreadable(err)
}

// unreadable tells whether storage says that it cannot read these bytes.
func unreadable(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EBADMSG) || errors.Is(err, syscall.EUCLEAN)
}
