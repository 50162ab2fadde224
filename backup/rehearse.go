package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"hikae/repo"
	"hikae/repo/guest"
)

// RehearseOptions of NewRehearsal. Repo is required.
type RehearseOptions struct {
	Repo *repo.Repository
	// Quick leaves out reading all blocks: files, partition tables and file systems
	// only.
	Quick bool
	// Progress, if not nil, is told of bytes of data proved, of those of all disks of
	// the generation. It is called from one goroutine at a time.
	Progress func(done, total int64)
	Logger   *slog.Logger
	Clock    func() time.Time
}

// Rehearsed is what came of the rehearsal of one generation. Sizes are in bytes.
type Rehearsed struct {
	Host          string          `json:"host"`
	VM            string          `json:"vm"`
	Generation    string          `json:"generation"`
	Sequence      uint64          `json:"sequence"`
	Time          time.Time       `json:"time"`
	OK            bool            `json:"ok"`
	Quick         bool            `json:"quick"`
	BytesCapacity int64           `json:"bytes_capacity"`
	BytesData     int64           `json:"bytes_data"`
	Disks         []RehearsedDisk `json:"disks"`
	Problems      []Finding       `json:"problems"`
	// Verified is the time that is remembered as that of the last complete
	// verification; nil when this one was not complete, or could not be remembered.
	Verified      *time.Time `json:"verified"`
	NotRemembered string     `json:"not_remembered,omitempty"` // why not
	Seconds       float64    `json:"seconds"`
}

// Damaged tells whether stored bytes are missing or wrong.
func (r *Rehearsed) Damaged() bool {
	for _, p := range r.Problems {
		if p.Damage {
			return true
		}
	}
	return false
}

// RehearsedDisk is one disk of a Rehearsed.
type RehearsedDisk struct {
	Name          string `json:"name"`
	Label         string `json:"label"`
	BytesCapacity int64  `json:"bytes_capacity"`
	BytesData     int64  `json:"bytes_data"`
	guest.Disk
	Proof   *repo.DiskProof `json:"proof,omitempty"` // nil when its blocks were not read
	Seconds float64         `json:"seconds"`         // of reading them
}

// Finding is something that stands in the way of a restore, or of trusting it.
type Finding struct {
	What   string `json:"what"`
	Disk   string `json:"disk,omitempty"`
	Offset int64  `json:"offset,omitempty"` // on the disk
	Length int64  `json:"length,omitempty"` // of the disk
	Pack   string `json:"pack,omitempty"`
	// PackOffset is where in the pack the first bad bytes are.
	PackOffset int64 `json:"pack_offset,omitempty"`
	// Damage tells that stored bytes are missing or wrong. Otherwise they are as they
	// were stored, and what they say does not hold together.
	Damage bool   `json:"damage"`
	Remedy string `json:"remedy"`
}

const (
	remedyDamage   = "hikae repair packs; or copy the pack back from another copy of the repository; otherwise the next backup stores anew what the VM still has there"
	remedyManifest = "copy the file back from another copy of the repository; otherwise this generation is lost, the others are not concerned"
	remedyFiles    = "the disks can still be copied out with hikae copy; back the VM up again, and tell if it comes back"
	remedyGuest    = "the blocks are as they were stored: look whether the guest itself has this fault; if it has not, an older generation may be good, and hikae backup --full makes a new one that relies on none"
)

// Rehearsal does to generations what a restore would, without a host: it opens all
// of them and reads every block.
type Rehearsal struct {
	RehearseOptions
	log      *slog.Logger
	now      func() time.Time
	verifier *repo.DiskVerifier
}

// NewRehearsal makes one. It is for one goroutine. Used for several generations, it
// reads what they share once.
func NewRehearsal(o RehearseOptions) *Rehearsal {
	return &Rehearsal{RehearseOptions: o, log: orDiscard(o.Logger), now: orNow(o.Clock), verifier: o.Repo.NewDiskVerifier()}
}

// Run rehearses the restore of a generation: its manifest and files are opened and
// must agree with each other; in each disk partition tables and file systems are
// looked for and checked as far as package guest does; then every block of every
// disk is opened and hashed. When nothing is wrong, that is remembered in the
// repository.
//
// What is wrong is in the result. An error is ctx's, or storage's that cannot be read
// at all, or repo.ErrNotFound when the generation is not there.
func (r *Rehearsal) Run(ctx context.Context, ref repo.Ref) (Rehearsed, error) {
	began := r.now()
	out := Rehearsed{
		Host: ref.VM.Host, VM: ref.VM.Name, Generation: ref.Name(), Sequence: ref.Sequence, Time: ref.Time.UTC(),
		Quick: r.Quick, Disks: []RehearsedDisk{}, Problems: []Finding{},
	}
	x := &rehearsing{Rehearsal: r, out: &out}
	err := x.run(ctx, ref)
	out.OK = err == nil && len(out.Problems) == 0
	out.Seconds = r.now().Sub(began).Seconds()
	if err != nil {
		return out, fmt.Errorf("verify %v: %w", ref, err)
	}
	return out, nil
}

// rehearsing is one Run.
type rehearsing struct {
	*Rehearsal
	out   *Rehearsed
	g     *repo.Generation
	disks []*repo.Disk
}

func (r *rehearsing) run(ctx context.Context, ref repo.Ref) error {
	// Somebody may forget it while it is read.
	pin, err := r.Repo.Pin(ctx)
	if err != nil {
		return err
	}
	defer pin.Close()
	if r.g, err = r.Repo.Generation(ctx, ref); err != nil {
		if errors.Is(err, repo.ErrDamaged) {
			r.found(Finding{What: oneLine(err), Damage: true, Remedy: remedyManifest})
			return nil
		}
		return err
	}
	m := r.g.Manifest()
	for i := range m.Disks {
		d, err := r.g.OpenDisk(i)
		if err != nil {
			return err
		}
		r.disks = append(r.disks, d)
		r.out.BytesCapacity += d.Size()
		r.out.BytesData += d.DataBytes()
		r.out.Disks = append(r.out.Disks, RehearsedDisk{
			Name: m.Disks[i].Name, Label: m.Disks[i].Label, BytesCapacity: d.Size(), BytesData: d.DataBytes(),
		})
	}
	if err := r.files(ctx); err != nil {
		return err
	}
	for i := range r.disks {
		if err := r.look(ctx, i); err != nil {
			return err
		}
	}
	if r.Quick {
		return nil
	}
	var blocks, bytes int64
	for i := range r.disks {
		if err := r.prove(ctx, i, bytes); err != nil {
			return err
		}
		blocks += r.out.Disks[i].Proof.Blocks
		bytes += r.disks[i].DataBytes()
	}
	if len(r.out.Problems) > 0 {
		return nil
	}
	return r.remember(ctx, blocks, bytes)
}

func (r *rehearsing) found(f Finding) { r.out.Problems = append(r.out.Problems, f) }

// look finds out what lies in a disk.
func (r *rehearsing) look(ctx context.Context, i int) error {
	d := &r.out.Disks[i]
	d.Disk = guest.Look(diskAt{ctx, r.disks[i]}, r.disks[i].Size())
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	unreadable := func(what string, offset int64, err error) error {
		if err == nil || !errors.Is(err, repo.ErrDamaged) {
			return err
		}
		if !r.Quick {
			return nil // reading all blocks will find it, and more exactly
		}
		r.found(Finding{What: fmt.Sprintf("%s cannot be read: %s", what, oneLine(err)), Disk: d.Name, Offset: offset, Damage: true, Remedy: remedyDamage})
		return nil
	}
	if err := unreadable("the partition table", 0, d.Err); err != nil {
		return err
	}
	for _, fault := range d.Table.Faults {
		r.found(Finding{What: fault, Disk: d.Name, Remedy: remedyGuest})
	}
	parts := d.Partitions
	if d.Whole != nil {
		parts = []guest.Partition{*d.Whole}
	}
	for _, p := range parts {
		what := "the beginning of the disk"
		if d.Whole == nil {
			what = fmt.Sprintf("partition %d", p.Number)
		}
		if err := unreadable(what, p.Offset, p.Err); err != nil {
			return err
		}
		for _, fault := range p.Content.Faults {
			r.found(Finding{What: fmt.Sprintf("%s, %s: %s", what, p.Content.Kind, fault), Disk: d.Name, Offset: p.Offset, Length: p.Length, Remedy: remedyGuest})
		}
	}
	return nil
}

// prove reads all blocks of a disk; before are the bytes of the disks before.
func (r *rehearsing) prove(ctx context.Context, i int, before int64) error {
	d := &r.out.Disks[i]
	m := &r.g.Manifest().Disks[i]
	var progress func(done, total int64)
	if r.Progress != nil {
		progress = func(done, _ int64) { r.Progress(before+done, r.out.BytesData) }
	}
	began := r.now()
	line := fmt.Sprintf("%v\x00%d\x00%s", r.g.Ref().VM, m.Key, m.Name)
	proof, err := r.verifier.Verify(ctx, r.disks[i], line, progress)
	if err != nil {
		return err
	}
	d.Proof, d.Seconds = &proof, r.now().Sub(began).Seconds()
	for _, bad := range proof.Damage {
		r.found(Finding{
			What: "cannot be read: " + bad.What, Disk: d.Name, Offset: bad.Offset, Length: bad.Length,
			Pack: bad.Pack, PackOffset: bad.PackOffset, Damage: true, Remedy: remedyDamage,
		})
	}
	if proof.BytesBad == 0 && proof.BytesData != r.disks[i].DataBytes() {
		r.found(Finding{
			What: fmt.Sprintf("it has %d bytes of data, and the manifest says %d", proof.BytesData, r.disks[i].DataBytes()),
			Disk: d.Name, Damage: true, Remedy: remedyManifest,
		})
	}
	return nil
}

// remember keeps that the generation is good. That it cannot be kept takes nothing
// from its being good.
func (r *rehearsing) remember(ctx context.Context, blocks, bytes int64) error {
	now := r.now().UTC().Truncate(time.Second)
	err := r.g.Remember(ctx, repo.Verification{Time: now, Blocks: blocks, Bytes: bytes})
	switch {
	case err == nil:
		r.out.Verified = &now
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, repo.ErrNotFound):
		return err
	case errors.Is(err, repo.ErrDamaged):
		r.found(Finding{What: oneLine(err), Damage: true, Remedy: remedyManifest})
	default:
		r.out.NotRemembered = oneLine(err)
		r.log.Warn("that the generation is good could not be remembered", "generation", r.g.Ref(), "error", err)
	}
	return nil
}

// diskAt is a disk as an io.ReaderAt under a context.
type diskAt struct {
	ctx context.Context
	d   *repo.Disk
}

func (r diskAt) ReadAt(p []byte, off int64) (int, error) { return r.d.ReadAtContext(r.ctx, p, off) }
