package repo

import (
	"bufio"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/index"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// BenchmarkScale measures what a large repository costs: opening it, an increment, a
// prune. HIKAE_SCALE is its size in GiB of unique blocks; 4096 takes 6 GB in TMPDIR and
// some minutes. Everything in it is real but the blocks' bytes, which are holes in the
// packs' files. Each step runs in a process of its own, whose peak of memory is its own.
//
// In the metrics "big" is that repository and "small" one with nothing but a disk of
// 256 MiB.
func BenchmarkScale(b *testing.B) {
	gib, err := strconv.ParseInt(os.Getenv("HIKAE_SCALE"), 10, 64)
	if err != nil || gib <= 0 {
		b.Skip("HIKAE_SCALE says how many GiB; it is not set")
	}
	root := b.TempDir()
	small, big := filepath.Join(root, "small"), filepath.Join(root, "big")
	began := time.Now()
	scaleMake(b, small, 0)
	scaleMake(b, big, gib<<30/DefaultBlockSize)
	b.Logf("made in %v", time.Since(began).Round(time.Second))

	for _, s := range []struct{ name, step string }{
		{"open-for-backup", "session"},
		{"open-for-reading", "read"},
		{"increment-scattered", "scattered"},
		{"increment-clustered", "clustered"},
		{"increment-all-over-the-disk", "wide"},
		{"stats", "stats"},
		{"check", "check"},
	} {
		b.Run(s.name, func(b *testing.B) {
			var at [2]scaleResult
			for i, dir := range []string{small, big} {
				for range b.N {
					at[i].take(scaleStep(b, s.step, dir))
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(at[1].Seconds, "s-big")
			b.ReportMetric(at[0].Seconds, "s-small")
			b.ReportMetric(at[1].Seconds/at[0].Seconds, "big/small")
			b.ReportMetric(float64(at[1].PeakMiB), "MiB-big")
			b.ReportMetric(float64(at[0].PeakMiB), "MiB-small")
			if at[1].Changed > 0 {
				b.ReportMetric(100*float64(at[1].Metadata)/float64(at[1].Changed), "metadata-%")
			}
		})
	}
	// Half of the large repository goes.
	for _, s := range []string{"forget", "condemn", "delete"} {
		b.Run("prune/"+s, func(b *testing.B) {
			if b.N > 1 {
				b.Skip("it can be done once: -benchtime 1x")
			}
			r := scaleStep(b, s, big)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(r.Seconds, "s-big")
			b.ReportMetric(float64(r.PeakMiB), "MiB-big")
			b.ReportMetric(float64(r.Changed)/(1<<30), "GiB-freed")
		})
	}
}

// scaleResult is what a step tells of itself.
type scaleResult struct {
	Seconds  float64
	PeakMiB  int64
	Changed  int64 // bytes
	Metadata int64 // bytes of node packs, index and manifest for them
}

// take keeps the best time and the worst memory.
func (r *scaleResult) take(o scaleResult) {
	if r.Seconds == 0 || o.Seconds < r.Seconds {
		r.Seconds = o.Seconds
	}
	r.PeakMiB = max(r.PeakMiB, o.PeakMiB)
	r.Changed, r.Metadata = o.Changed, o.Metadata
}

var (
	scaleSmall = VMID{Host: "esx1", Name: "small"}
	scaleHuge  = []VMID{{Host: "esx1", Name: "huge-a"}, {Host: "esx1", Name: "huge-b"}}
)

const scaleDisk = 256 << 20 // of the small VM

// scaleStep runs a step as a process of its own.
func scaleStep(b *testing.B, step, dir string) (r scaleResult) {
	b.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestScaleStep$", "-test.v")
	cmd.Env = append(os.Environ(), "HIKAE_SCALE_STEP="+step, "HIKAE_SCALE_DIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		b.Fatalf("%s in %s: %v\n%s", step, dir, err, out)
	}
	for line := range strings.SplitSeq(string(out), "\n") {
		if rest, ok := strings.CutPrefix(line, "SCALE "); ok {
			if err := json.Unmarshal([]byte(rest), &r); err != nil {
				b.Fatal(err)
			}
			return r
		}
	}
	b.Fatalf("%s says nothing:\n%s", step, out)
	return r
}

// TestScaleStep is a step of BenchmarkScale, in the process that it starts for it.
func TestScaleStep(t *testing.T) {
	step, dir := os.Getenv("HIKAE_SCALE_STEP"), os.Getenv("HIKAE_SCALE_DIR")
	if step == "" {
		t.Skip("a part of BenchmarkScale")
	}
	began := time.Now()
	r, err := Open(t.Context(), dir, Passphrase(passphrase), Options{})
	if err != nil {
		t.Fatal(err)
	}
	result := scaleDo(t, r, step)
	result.Seconds = time.Since(began).Seconds()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			result.PeakMiB = kib >> 10
		}
	}
	text, _ := json.Marshal(result)
	fmt.Printf("SCALE %s\n", text)
}

func scaleDo(t *testing.T, r *Repository, step string) (result scaleResult) {
	ctx := t.Context()
	// The huge disk where there is one.
	vm := scaleSmall
	if refs, err := r.Refs(ctx, scaleHuge[1]); err == nil && len(refs) > 0 {
		vm = scaleHuge[1]
	}
	latest := func(vm VMID) (Ref, *Disk) {
		ref, err := r.Resolve(ctx, vm, "latest")
		if err != nil {
			t.Fatal(err)
		}
		g, err := r.Generation(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		d, err := g.OpenDisk(0)
		if err != nil {
			t.Fatal(err)
		}
		return ref, d
	}
	switch step {
	case "session":
		_, parent := latest(vm)
		s, err := r.Begin(ctx, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Disk(ctx, parent.Size(), parent)
		if err != nil {
			t.Fatal(err)
		}
		w.Abandon()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	case "read":
		_, huge := latest(vm)
		if _, _, err := huge.NextData(ctx, huge.Size()-DefaultBlockSize); err != nil {
			t.Fatal(err)
		}
		_, d := latest(scaleSmall)
		if _, err := d.ReadAt(make([]byte, 4096), scaleDisk/2); err != nil {
			t.Fatal(err)
		}
	case "scattered":
		return scaleIncrement(t, r, scaleSmall, scaleDisk)
	case "clustered":
		return scaleIncrement(t, r, scaleSmall, 0)
	case "wide":
		_, d := latest(vm)
		return scaleIncrement(t, r, vm, d.Size())
	case "stats":
		if _, err := r.Stats(ctx, StatsOptions{}); err != nil {
			t.Fatal(err)
		}
	case "check":
		report, err := r.Check(ctx, CheckOptions{})
		if err != nil || len(report.Problems) > 0 {
			t.Fatal(report, err)
		}
	case "forget":
		refs, err := r.Refs(ctx, scaleHuge[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Forget(ctx, refs, ForgetOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
	case "condemn", "delete":
		report, err := r.Prune(ctx, PruneOptions{})
		if err != nil {
			t.Fatal(err)
		}
		result.Changed = report.BytesFreed
		if step == "delete" && report.PacksDeleted == 0 {
			t.Fatalf("nothing was deleted: %+v", report)
		}
	default:
		t.Fatalf("unknown step %s", step)
	}
	return result
}

// scaleIncrement stores 100 MiB of changes on the VM's disk: 800 blocks evenly over its
// first bytes, so many as over says, or in a row.
func scaleIncrement(t *testing.T, r *Repository, vm VMID, over int64) (result scaleResult) {
	ctx := t.Context()
	ref, err := r.Resolve(ctx, vm, "latest")
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Generation(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	parent, err := g.OpenDisk(0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w, err := s.Disk(ctx, parent.Size(), parent)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abandon()
	const changed = 100 << 20 / DefaultBlockSize
	stride := max(1, over/DefaultBlockSize/changed)
	noise := rand.NewChaCha8([32]byte{byte(len(vm.Name)), byte(stride), byte(time.Now().UnixNano())})
	p := make([]byte, DefaultBlockSize)
	for i := range int64(changed) {
		_, _ = noise.Read(p[:len(p)/2]) // half of it compresses
		done := make(chan struct{})
		if err := w.Write(ctx, i*stride*DefaultBlockSize, p, func() { close(done) }); err != nil {
			t.Fatal(err)
		}
		<-done
	}
	d, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	at := ref.Time.Add(time.Minute)
	if _, err := s.Commit(ctx, Manifest{VM: vm, Time: at, Mode: ModeIncremental, Disks: []DiskManifest{diskOf("d", d)}}); err != nil {
		t.Fatal(err)
	}
	st := s.Stats()
	result.Changed = st.BytesWritten
	result.Metadata = st.BytesStored - st.BytesSealed
	return result
}

// scaleMake makes a repository with a real small VM and, if blocks is not 0, two with
// disks of half as many blocks each.
func scaleMake(b *testing.B, dir string, blocks int64) {
	b.Helper()
	ctx := context.Background()
	if err := Init(ctx, dir, InitOptions{Passphrase: passphrase, KDF: cheap}); err != nil {
		b.Fatal(err)
	}
	r, err := Open(ctx, dir, Passphrase(passphrase), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	small := make([]byte, scaleDisk)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(small)
	t, err := write(ctx, s, small, nil, whole(small))
	if err != nil {
		b.Fatal(err)
	}
	at := testClock()
	if _, err := s.Commit(ctx, Manifest{VM: scaleSmall, Time: at, Mode: ModeFull, Disks: []DiskManifest{diskOf("d", t)}}); err != nil {
		b.Fatal(err)
	}
	if blocks == 0 {
		return
	}
	f := &scaleFake{r: r, s: s, noise: rand.NewChaCha8([32]byte{2})}
	var trees []DiskTree
	_, err = s.index.Rebuild(ctx, index.RebuildOptions{TempName: func() string { return tmpName(s.id, randomName()) }},
		func(ctx context.Context, add func(block.Record) error) error {
			// The small VM's records are replaced with the index.
			if err := s.index.Scan(ctx, add); err != nil {
				return err
			}
			for range scaleHuge {
				t, err := f.disk(ctx, blocks/int64(len(scaleHuge)), add)
				if err != nil {
					return err
				}
				trees = append(trees, t)
			}
			return nil
		})
	if err != nil {
		b.Fatal(err)
	}
	for i, vm := range scaleHuge {
		if _, err := s.Commit(ctx, Manifest{VM: vm, Time: at, Mode: ModeFull, Disks: []DiskManifest{diskOf("d", trees[i])}}); err != nil {
			b.Fatal(err)
		}
	}
}

// scaleFake makes packs whose blocks are holes in their files.
type scaleFake struct {
	r     *Repository
	s     *Session
	noise *rand.ChaCha8
}

// disk makes a disk of blocks that nobody has read.
func (f *scaleFake) disk(ctx context.Context, blocks int64, add func(block.Record) error) (DiskTree, error) {
	bs := int64(f.r.config.BlockSize)
	builder, err := tree.NewBuilder(ctx, loader{f.r}, f.s.storeNode, blocks, tree.Tree{Levels: tree.Levels(0)}, 0)
	if err != nil {
		return DiskTree{}, err
	}
	for n := int64(0); n < blocks; {
		// As many as fit: about 60 KiB each when compressed.
		records, err := f.pack(int(min(blocks-n, dataPackLimit/(60<<10))))
		if err != nil {
			return DiskTree{}, err
		}
		for _, rec := range records {
			if err := errors.Join(builder.Set(ctx, n, rec), add(rec)); err != nil {
				return DiskTree{}, err
			}
			n++
		}
	}
	t, data, _, err := builder.Finish(ctx)
	if err != nil {
		return DiskTree{}, err
	}
	d := DiskTree{Root: t.Root.Append(nil), Levels: t.Levels, Capacity: blocks * bs, DataBytes: data * bs}
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	f.s.roots[finished{t.Root, d.Capacity}] = d
	return d, nil
}

// pack makes a pack of n records: header, footer and trailer are real (FORMAT.md, 3.3),
// only the sum is not.
func (f *scaleFake) pack(n int) ([]block.Record, error) {
	h := pack.Header{Version: pack.Version, Type: pack.Data, Epoch: f.r.ring.Epoch(), Repository: f.r.config.id}
	_, _ = f.noise.Read(h.Salt[:])
	records := make([]block.Record, n)
	var footer []byte
	offset := uint32(pack.HeaderSize)
	for i := range records {
		rec := &records[i]
		_, _ = f.noise.Read(rec.ID[:])
		length := 50<<10 + binary.LittleEndian.Uint32(rec.ID[:])%(20<<10)
		rec.Location = block.Location{Pack: h.Handle(), Offset: offset, Length: length, Kind: block.Zstd}
		offset += length
		footer = rec.Append(footer)
	}
	key, err := f.r.ring.Subkey(h.Epoch, "pack", h.Salt[:])
	if err != nil {
		return nil, err
	}
	c, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(c)
	if err != nil {
		return nil, err
	}
	nonce := binary.BigEndian.AppendUint64(make([]byte, 4), uint64(offset))
	aad := binary.LittleEndian.AppendUint16(nil, h.Version)
	aad = append(append(aad, h.Repository[:]...), h.Salt[:]...)
	aad = append(binary.LittleEndian.AppendUint64(aad, uint64(offset)), 0xff)
	aad = binary.LittleEndian.AppendUint32(aad, uint32(len(footer)))
	aad = append(aad, make([]byte, 32)...)
	sealed := gcm.Seal(nil, nonce, footer, aad)
	end := binary.LittleEndian.AppendUint32(sealed, offset)
	end = binary.LittleEndian.AppendUint32(end, uint32(len(footer)+pack.Overhead))
	end = append(append(end, "hikaeend"...), make([]byte, 32)...)

	name := pack.Data.Path(h.Handle())
	if err := fsx.MakeDir(f.r.fs, pack.Data.Subdir(h.Handle())); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(f.r.dir, filepath.FromSlash(name)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if _, err := file.Write(h.Append(nil)); err != nil {
		return nil, err
	}
	if _, err := file.WriteAt(end, int64(offset)); err != nil {
		return nil, err
	}
	return records, nil
}
