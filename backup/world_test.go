package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/repo"
)

const mib = 1 << 20

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// world is a simulated host, a connection to it, and a repository.
type world struct {
	t     *testing.T
	sim   *esxisim.Host
	host  *esxi.Host
	repo  *repo.Repository
	dir   string // of the repository
	state string
	store string // the directory that plays the datastore
	clock time.Time
}

var passphrase = []byte("correct horse")

func newWorld(t *testing.T, o esxisim.Options) *world {
	t.Helper()
	w := &world{t: t, dir: filepath.Join(t.TempDir(), "repo"), state: t.TempDir(), clock: time.Date(2026, 11, 22, 2, 0, 0, 0, time.UTC)}
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	w.store = o.Dir
	sim, err := esxisim.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	w.sim = sim
	t.Cleanup(func() {
		if err := sim.Close(); err != nil {
			t.Errorf("close the simulated host: %v", err)
		}
	})
	w.host = connect(t, sim.Address(), sim.User(), sim.Password(), sim.Thumbprint())
	must(t, repo.Init(t.Context(), w.dir, repo.InitOptions{Passphrase: passphrase, KDF: repo.KDF{Time: 1, MemoryKiB: 64, Threads: 1}}))
	w.open()
	return w
}

func connect(t *testing.T, address, user, password, thumbprint string) *esxi.Host {
	t.Helper()
	h, err := esxi.Connect(t.Context(), esxi.Config{
		Name: "esx1", Address: address, User: user, Thumbprint: thumbprint, Logger: logger(t),
		Password: func() (string, error) { return password, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close(context.Background()) })
	return h
}

func logger(t *testing.T) *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// open opens the repository anew, as another process would.
func (w *world) open() {
	w.t.Helper()
	r, err := repo.Open(w.t.Context(), w.dir, repo.Passphrase(passphrase), repo.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	w.repo = r
	w.t.Cleanup(func() { r.Close() })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// now is a clock that goes on by a minute whenever it is looked at.
func (w *world) now() time.Time {
	w.clock = w.clock.Add(time.Minute)
	return w.clock
}

func (w *world) options() Options {
	return Options{
		Repo: w.repo, Host: w.host, HostName: "esx1", VM: "web01", State: w.state, Clock: w.now, Logger: logger(w.t),
	}
}

// backup runs and demands success.
func (w *world) backup(change ...func(*Options)) Result {
	w.t.Helper()
	res, err := w.try(change...)
	if err != nil {
		w.t.Fatalf("backup: %v", err)
	}
	if res.Ref.Sequence == 0 {
		w.t.Fatalf("no generation in %+v", res)
	}
	return res
}

func (w *world) try(change ...func(*Options)) (Result, error) {
	o := w.options()
	for _, c := range change {
		c(&o)
	}
	return Run(w.t.Context(), o)
}

func (w *world) generation(ref repo.Ref) *repo.Generation {
	w.t.Helper()
	g, err := w.repo.Generation(w.t.Context(), ref)
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

// reader is anything that content can be compared with.
type reader interface {
	read(p []byte, off int64) error
	nextData(off int64) (start, end int64, err error)
	size() int64
}

type simDisk struct {
	sim  *esxisim.Host
	vm   string
	disk int
}

func (d simDisk) read(p []byte, off int64) error { return d.sim.ReadAt(d.vm, d.disk, p, off) }
func (d simDisk) nextData(off int64) (int64, int64, error) {
	return d.sim.NextData(context.Background(), d.vm, d.disk, off)
}

func (d simDisk) size() int64 {
	n, err := d.sim.DiskSize(d.vm, d.disk)
	if err != nil {
		return -1
	}
	return n
}

type repoDisk struct{ *repo.Disk }

func (d repoDisk) read(p []byte, off int64) error {
	if n, err := d.ReadAt(p, off); n < len(p) {
		return err
	}
	return nil
}

func (d repoDisk) nextData(off int64) (int64, int64, error) {
	return d.NextData(context.Background(), off)
}
func (d repoDisk) size() int64 { return d.Size() }

type fileDisk struct{ *os.File }

func (d fileDisk) read(p []byte, off int64) error {
	if n, err := d.ReadAt(p, off); n < len(p) {
		return err
	}
	return nil
}

func (d fileDisk) nextData(off int64) (int64, int64, error) {
	start, err := d.Seek(off, 3)
	if err != nil {
		return 0, 0, io.EOF
	}
	end, err := d.Seek(start, 4)
	return start, end, err
}

func (d fileDisk) size() int64 {
	info, err := d.Stat()
	if err != nil {
		return -1
	}
	return info.Size()
}

// equal compares two disks byte for byte, wherever either may hold data.
func equal(t *testing.T, what string, a, b reader) {
	t.Helper()
	if a.size() != b.size() {
		t.Fatalf("%s: %d bytes and %d bytes", what, a.size(), b.size())
	}
	var areas []area
	for _, r := range []reader{a, b} {
		for off := int64(0); off < r.size(); {
			start, end, err := r.nextData(off)
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			areas = append(areas, area{Offset: start, Length: end - start})
			off = end
		}
	}
	p, q := make([]byte, mib), make([]byte, mib)
	for s := range steps(tidy(areas, a.size()), nil) {
		for off := s.Offset; off < s.End(); off += mib {
			n := min(mib, s.End()-off)
			must(t, a.read(p[:n], off))
			must(t, b.read(q[:n], off))
			if !bytes.Equal(p[:n], q[:n]) {
				for i := range p[:n] {
					if p[i] != q[i] {
						t.Fatalf("%s: they differ at byte %d", what, off+int64(i))
					}
				}
			}
		}
	}
}

// sameAsGuest compares every disk of a generation with what the guest sees now.
func (w *world) sameAsGuest(ref repo.Ref) {
	w.t.Helper()
	g := w.generation(ref)
	for i, m := range g.Manifest().Disks {
		d, err := g.OpenDisk(i)
		must(w.t, err)
		equal(w.t, fmt.Sprintf("%s of %v and the guest's disk", m.Label, ref), repoDisk{d}, simDisk{w.sim, ref.VM.Name, i})
	}
}

// noSnapshots fails when the host has snapshots of ours.
func (w *world) noSnapshots() {
	w.t.Helper()
	vms, err := w.host.VMs(context.Background())
	must(w.t, err)
	for _, vm := range vms {
		for _, s := range vm.Snapshots {
			if strings.HasPrefix(s.Name, snapshotPrefix) {
				w.t.Errorf("%s still has snapshot %s", vm.Name, s.Name)
			}
		}
	}
	if entries, _ := filepath.Glob(filepath.Join(w.state, "journal", "*.json*")); len(entries) > 0 {
		w.t.Errorf("the journal still has %v", entries)
	}
}

// checkRepo proves the repository, data included.
func (w *world) checkRepo() {
	w.t.Helper()
	report, err := w.repo.Check(w.t.Context(), repo.CheckOptions{ReadData: true})
	must(w.t, err)
	if len(report.Problems) > 0 {
		w.t.Errorf("the repository has problems: %+v", report.Problems)
	}
}

// image makes a raw image with random data in areas, holes elsewhere.
func image(t *testing.T, size int64, seed uint64, areas ...area) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.raw"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(size))
	for _, a := range areas {
		_, err := f.WriteAt(noise(int(a.Length), seed+uint64(a.Offset)), a.Offset)
		must(t, err)
	}
	return f.Name()
}

func noise(n int, seed uint64) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(seed >> 32)}).Read(p)
	return p
}

// addVM imports a VM of the given disks.
func (w *world) addVM(name string, o esxisim.VMOptions, raws ...string) {
	w.t.Helper()
	must(w.t, w.sim.ImportVM(w.t.Context(), name, raws, o))
}

// write is the guest writing noise.
func (w *world) write(disk int, off int64, n int, seed uint64) {
	w.t.Helper()
	must(w.t, w.sim.WriteAt("web01", disk, noise(n, seed), off))
}
