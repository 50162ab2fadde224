package esxi

import (
	"bytes"
	"context"
	"crypto/md5"  //nolint:gosec // only to compare with what the host computes, where it has nothing better
	"crypto/sha1" //nolint:gosec // as above
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strings"
	"sync"
	"sync/atomic"

	"hikae/backup/esxi/internal/shell"
	"hikae/backup/esxi/internal/sshx"
	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmdk"
)

// Provisioning is how a new disk takes its room on the datastore.
type Provisioning string

// The values of Provisioning, as vmkfstools names them.
const (
	Thin       Provisioning = "thin"             // as blocks are written
	ThickLazy  Provisioning = "zeroedthick"      // at once, zeroed when written first
	ThickEager Provisioning = "eagerzeroedthick" // at once, and zeroed at once
)

// sector is what every offset and length of a DiskWriter is a multiple of.
const sector = vmdk.SectorSize

// DiskWriter writes ranges of a disk that no VM uses, over SSH. What is not
// written stays as it was: zeros, on a new disk. Its methods are safe for
// concurrent use; as many run at once as the host is given connections (4), the
// others wait, so the bytes in flight are those of four ranges.
type DiskWriter struct {
	h          *Host
	path       string // of the descriptor, "[datastore1] web01/web01.vmdk"
	flat       string // of its content, as the shell names it
	capacity   int64
	descriptor *vmdk.Descriptor
	sent       atomic.Int64

	mu     sync.Mutex
	hasher string // "" until it is known
}

// CreateDisk makes a new disk, descriptor and flat file, and opens it for
// writing. dsPath is the descriptor's, "[datastore1] web01/web01.vmdk", and its
// folder exists. capacity is in bytes, a multiple of 512. ErrExists when a disk
// of that name is there, ErrNoSpace when a thick one does not fit, ErrNoShell
// without SSH. What is left when it fails otherwise is removed again.
func (h *Host) CreateDisk(ctx context.Context, dsPath string, capacity int64, p Provisioning) (*DiskWriter, error) {
	what := "create disk " + dsPath
	file, err := h.diskPath(ctx, what, dsPath)
	if err != nil {
		return nil, err
	}
	switch {
	case p != Thin && p != ThickLazy && p != ThickEager:
		return nil, fmt.Errorf("%s: %s: there is no disk format %q", h.name, what, p)
	case capacity <= 0 || capacity%sector != 0:
		return nil, fmt.Errorf("%s: %s: a disk cannot have %d bytes", h.name, what, capacity)
	}
	exists, err := h.Exists(ctx, dsPath)
	if err != nil {
		return nil, err
	}
	if exists {
		return nil, errf(ErrExists, nil, "%s: %s: it exists already", h.name, what)
	}
	size := fmt.Sprintf("%dK", capacity>>10)
	if capacity%1024 != 0 {
		size = fmt.Sprintf("%ds", capacity/sector)
	}
	// An eagerly zeroed disk takes as long as it is large.
	out, err := h.shell.words(ctx, false, "vmkfstools", "-c", size, "-d", string(p), file)
	if err == nil && strings.Contains(out, "Failed") && !vimcmd.Done(out, "Create") {
		err = &commandError{"vmkfstools", &reply{out: out}}
	}
	var w *DiskWriter
	if err == nil {
		w, err = h.OpenDiskWriter(ctx, dsPath)
	}
	if err == nil && w.capacity != capacity {
		err = fmt.Errorf("%s: %s: the host made a disk of %d bytes instead of %d", h.name, what, w.capacity, capacity)
	}
	if err == nil {
		return w, nil
	}
	undo, cancel := outlive(ctx, startGrace)
	defer cancel()
	_, _ = h.shell.words(undo, true, "vmkfstools", "-U", file) // whatever is there now was not before
	return nil, h.explain(ctx, what, err)
}

// OpenDiskWriter opens an existing disk with one flat file for writing. It must
// not be in use: no VM that runs, no snapshot on it.
func (h *Host) OpenDiskWriter(ctx context.Context, dsPath string) (*DiskWriter, error) {
	what := "open disk " + dsPath
	if _, err := h.diskPath(ctx, what, dsPath); err != nil {
		return nil, err
	}
	store := &shellFiles{h.shell}
	text, err := h.descriptor(ctx, store, dsPath)
	if err != nil {
		return nil, err
	}
	d, err := vmdk.ParseDescriptor(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", h.name, what, err)
	}
	if d.ParentCID != vmdk.NoParent || len(d.Extents) != 1 || d.Extents[0].Type != vmdk.ExtentVMFS || d.Extents[0].Offset != 0 {
		return nil, fmt.Errorf("%s: %s: it is not a disk with one flat file (%s)", h.name, what, d.CreateType)
	}
	name, err := beside(dsPath, d.Extents[0].File, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", h.name, what, err)
	}
	size, err := store.head(ctx, name)
	if err != nil {
		return nil, err
	}
	if size != d.Capacity() {
		return nil, fmt.Errorf("%s: %s: %s is %d bytes long and its descriptor says %d", h.name, what, name, size, d.Capacity())
	}
	w := &DiskWriter{h: h, path: dsPath, capacity: size, descriptor: d}
	w.flat, err = hostPath(name)
	return w, err
}

// diskPath is where the shell finds a disk, once there is a shell.
func (h *Host) diskPath(ctx context.Context, what, dsPath string) (string, error) {
	if h.shell == nil {
		return "", errf(ErrNoShell, nil, "%s: %s: that is done over SSH, which is not configured (hikae host add --ssh)", h.name, what)
	}
	if err := h.tryShell(ctx); err != nil {
		return "", err
	}
	if !strings.HasSuffix(dsPath, ".vmdk") {
		return "", fmt.Errorf("%s: %s: a disk's descriptor is called .vmdk", h.name, what)
	}
	return hostPath(dsPath)
}

// Capacity is the disk's size in bytes.
func (w *DiskWriter) Capacity() int64 { return w.capacity }

// Descriptor is the disk's descriptor as the host wrote it.
func (w *DiskWriter) Descriptor() *vmdk.Descriptor { return w.descriptor.Clone() }

// BytesSent counts the bytes of content sent so far, repeated ones included.
func (w *DiskWriter) BytesSent() int64 { return w.sent.Load() }

// check makes sure that a range is one of whole sectors within the disk.
func (w *DiskWriter) check(off, n int64) error {
	if off < 0 || n <= 0 || off%sector != 0 || n%sector != 0 || off > w.capacity || n > w.capacity-off {
		return fmt.Errorf("%s: %d bytes at %d are no range of whole sectors in a disk of %d bytes", w.path, n, off, w.capacity)
	}
	return nil
}

// unit is the largest block size for dd that divides all of the numbers.
func unit(numbers ...int64) int64 {
	bs := int64(mostBlock)
	for _, n := range numbers {
		for n%bs != 0 {
			bs /= 2
		}
	}
	return bs
}

// WriteAtContext writes p at off, both multiples of 512 bytes. A write that
// breaks off is sent again: the same bytes in the same place.
func (w *DiskWriter) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := w.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	what := fmt.Sprintf("write %s at %d", w.path, off)
	bs := unit(off)
	line, err := shell.Command("dd", "of="+w.flat, fmt.Sprintf("bs=%d", bs), fmt.Sprintf("seek=%d", off/bs), "conv=notrunc")
	if err != nil {
		return 0, err
	}
	for try := 1; ; try++ {
		in := &counted{r: bytes.NewReader(p)}
		res, err := w.h.shell.client.Run(ctx, sshx.Command{Line: line, Stdin: in, Data: true, Stall: w.h.t.call})
		w.sent.Add(in.n)
		switch {
		case err == nil && res.Status == 0 && in.n == int64(len(p)):
			return len(p), nil
		case err == nil && res.Status == 0:
			err = fmt.Errorf("the host took %d of %d bytes", in.n, len(p))
		case err == nil:
			err = &commandError{"dd", &reply{"", string(res.Stderr), res.Status}}
		}
		var broke *sshx.LostError
		if ctx.Err() != nil || !errors.As(err, &broke) && !errors.Is(err, sshx.ErrBusy) || try >= w.h.t.tries {
			return 0, w.h.explain(ctx, what, err)
		}
		w.h.log.Debug("writing over SSH failed, trying again", "host", w.h.name, "request", what, "try", try, "error", err)
		if err := sleep(ctx, jitter(w.h.t.pause, w.h.t.longest, try)); err != nil {
			return 0, w.h.explain(ctx, what, err)
		}
	}
}

// hashes are the programs that compute one on the host, best first.
var hashes = []struct {
	program string
	new     func() hash.Hash
}{
	{"sha256sum", sha256.New},
	{"sha1sum", sha1.New},
	{"md5sum", md5.New},
}

// NewHash is a hash of the kind that Hash computes on the host. ErrUnsupported
// when the host has none.
func (w *DiskWriter) NewHash(ctx context.Context) (hash.Hash, error) {
	program, err := w.program(ctx)
	if err != nil {
		return nil, err
	}
	for _, h := range hashes {
		if h.program == program {
			return h.new(), nil
		}
	}
	return nil, fmt.Errorf("there is no hash %q", program)
}

func (w *DiskWriter) program(ctx context.Context) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hasher != "" {
		return w.hasher, nil
	}
	ctx, cancel := w.h.shellCall(ctx)
	defer cancel()
	for _, h := range hashes {
		// ESXi's shell has no builtin "command".
		out, err := w.h.shell.words(ctx, true, "which", h.program)
		var failed *commandError
		if errors.As(err, &failed) {
			continue
		}
		if err != nil {
			return "", w.h.explain(ctx, "look for "+h.program, err)
		}
		if strings.TrimSpace(out) != "" {
			w.hasher = h.program
			return w.hasher, nil
		}
	}
	return "", errf(ErrUnsupported, nil, "%s has no program to compute a hash with", w.h.name)
}

// Hash has the host compute the hash of n bytes at off, both multiples of 512,
// of what is on its datastore: compare with NewHash's of what was written.
func (w *DiskWriter) Hash(ctx context.Context, off, n int64) ([]byte, error) {
	if err := w.check(off, n); err != nil {
		return nil, err
	}
	what := fmt.Sprintf("hash %d bytes of %s at %d", n, w.path, off)
	program, err := w.program(ctx)
	if err != nil {
		return nil, err
	}
	bs := unit(off, n)
	line, err := shell.Command("dd", "if="+w.flat, fmt.Sprintf("bs=%d", bs), fmt.Sprintf("skip=%d", off/bs), fmt.Sprintf("count=%d", n/bs))
	if err != nil {
		return nil, err
	}
	r, err := w.h.shell.run(ctx, true, sshx.Command{Line: line + " | " + program, Data: true})
	if err == nil && r.status != 0 {
		err = &commandError{program, r}
	}
	if err != nil {
		return nil, w.h.explain(ctx, what, err)
	}
	word, _, _ := strings.Cut(strings.TrimSpace(r.out), " ")
	sum, err := hex.DecodeString(word)
	if err != nil || len(sum) < md5.Size || len(sum) > sha256.Size {
		return nil, fmt.Errorf("%s: %s: %s prints %q", w.h.name, what, program, strings.TrimSpace(r.out))
	}
	// A pipe hides that dd failed; it then says why, and how much it read.
	if failed := (&commandError{"dd", r}); failed.says("dd: ") {
		return nil, w.h.explain(ctx, what, failed)
	}
	return sum, nil
}

// CheckDisk has the host check that a disk's links and files belong together
// (vmkfstools -e).
func (w *DiskWriter) CheckDisk(ctx context.Context) error {
	what := "check disk " + w.path
	file, err := hostPath(w.path)
	if err != nil {
		return err
	}
	_, err = w.h.shell.words(ctx, true, "vmkfstools", "-e", file)
	return w.h.explain(ctx, what, err)
}
