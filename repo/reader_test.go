package repo_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hikae/repo"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

// contrib/hikae-read.py was written from FORMAT.md without this package. What it
// reads must be what this package reads.

const (
	readerScript     = "../contrib/hikae-read.py"
	readerPassphrase = "correct horse battery staple"
)

var readerKDF = keys.Params{Time: 2, MemoryKiB: 64, Threads: 2}

// A reader runs hikae-read.py on the repository in dir.
type reader struct {
	dir  string
	args []string // before the command
}

// newReader leaves the test out where the reader cannot run, except in CI.
func newReader(t *testing.T, dir string) reader {
	t.Helper()
	if _, err := os.Stat(readerScript); err != nil { // and go test knows what the result depends on
		t.Fatal(err)
	}
	for _, tool := range []string{"python3", "zstd"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is missing", tool)
			}
			t.Skipf("%s is missing", tool)
		}
	}
	return reader{dir, []string{"--passphrase-file", secretFile(t, readerPassphrase+"\n")}}
}

func secretFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// run returns what the reader printed on standard output, or as an error what it
// said on the other.
func (r reader) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "python3", append(append([]string{readerScript, r.dir}, r.args...), args...)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if _, exited := errors.AsType[*exec.ExitError](err); !exited {
			t.Fatal(err)
		}
		if strings.Contains(said.String(), "Traceback") {
			t.Errorf("the reader fell over:\n%s", said.String())
		}
		return out.String(), errors.New(said.String())
	}
	return out.String(), nil
}

// extract returns a disk as the reader gives it.
func (r reader) extract(t *testing.T, ref repo.Ref, disk string) ([]byte, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.raw")
	if _, err := r.run(t, "extract", ref.String(), disk, name); err != nil {
		if left, _ := filepath.Glob(name + "*"); len(left) > 0 {
			t.Errorf("%s is there after a failure", left)
		}
		return nil, err
	}
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content, nil
}

func readerOpen(t *testing.T, dir string, o repo.Options) *repo.Repository {
	t.Helper()
	r, err := repo.Open(t.Context(), dir, repo.Passphrase([]byte(readerPassphrase)), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// agree compares every disk of every generation, and the list of them.
func agree(t *testing.T, r *repo.Repository, py reader) {
	t.Helper()
	ctx := t.Context()
	vms, err := r.VMs(ctx)
	if err != nil || len(vms) == 0 {
		t.Fatal(vms, err)
	}
	var want []string
	for _, vm := range vms {
		refs, err := r.Refs(ctx, vm)
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range refs {
			want = append(want, ref.String())
			g, err := r.Generation(ctx, ref)
			if err != nil {
				t.Fatal(err)
			}
			for i, m := range g.Manifest().Disks {
				d, err := g.OpenDisk(i)
				if err != nil {
					t.Fatal(err)
				}
				content := make([]byte, d.Size())
				if _, err := io.ReadFull(io.NewSectionReader(d, 0, d.Size()), content); err != nil {
					t.Fatal(err)
				}
				got, err := py.extract(t, ref, m.Name)
				if err != nil {
					t.Errorf("%s %s: %v", ref, m.Name, err)
				} else if !bytes.Equal(got, content) {
					t.Errorf("%s %s: the readers do not agree", ref, m.Name)
				}
			}
		}
	}
	out, err := py.run(t, "list")
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for line := range strings.Lines(out) {
		name, _, _ := strings.Cut(line, "  ")
		listed = append(listed, name)
	}
	if got := strings.Join(listed, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("listed are\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
	if out, err := py.run(t, "verify"); err != nil {
		t.Errorf("%s%v", out, err)
	}
}

// Every frozen repository, with whatever modules Python has and with none.
func TestReaderFrozen(t *testing.T) {
	dirs, err := filepath.Glob("testdata/v*")
	if err != nil || len(dirs) == 0 {
		t.Fatal(dirs, err)
	}
	for _, dir := range dirs {
		py, r := newReader(t, dir), readerOpen(t, dir, repo.Options{})
		agree(t, r, py)
		py.args = append(py.args, "--plain")
		agree(t, r, py)
	}
}

// What the frozen repository has not: other kinds of slots, a rotation, blocks as
// they are, long runs in S2, three nodes, an empty disk, places that moved.
func TestReaderRotatedAndMoved(t *testing.T) {
	t.Parallel()
	dir, ctx := filepath.Join(t.TempDir(), "repo"), t.Context()
	py := newReader(t, dir)
	now := time.Date(2026, 11, 22, 2, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	if err := repo.Init(ctx, dir, repo.InitOptions{Passphrase: []byte(readerPassphrase), KDF: repo.KDF(readerKDF), Clock: clock}); err != nil {
		t.Fatal(err)
	}
	code, recovery := keys.NewRecoveryCode()
	content, file := keys.NewKeyFile()
	readerRotate(t, dir, now, file, recovery)

	image := readerImage()
	var packs [][]string
	for i, compression := range []string{"none", "s2", "zstd-better"} {
		now = now.Add(time.Hour)
		// With no index the second session stores everything again.
		if err := os.RemoveAll(filepath.Join(dir, "index")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, "index"), 0o700); err != nil {
			t.Fatal(err)
		}
		r := readerOpen(t, dir, repo.Options{Clock: clock})
		readerBackup(t, r, repo.VMID{Host: "höst", Name: "a@b c"}, compression, image)
		packs = append(packs, readerPacks(t, dir))
		if i > 0 && len(packs[i]) <= len(packs[i-1]) {
			t.Fatal("nothing was stored again")
		}
	}
	r := readerOpen(t, dir, repo.Options{Clock: clock})
	agree(t, r, py)
	vms, err := r.VMs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	refs, err := r.Refs(ctx, vms[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--key-file", secretFile(t, string(content))},
		{"--plain", "--recovery-file", secretFile(t, strings.ToLower(code)+"\n")},
	} {
		if got, err := (reader{dir, args}).extract(t, refs[1], "disk"); err != nil || !bytes.Equal(got, image) {
			t.Errorf("%s: %v", args, err)
		}
	}

	// The packs of the first two generations go away; the index knows the third's.
	for _, name := range packs[1] {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	agree(t, readerOpen(t, dir, repo.Options{Clock: clock}), py)
	// Without an index their footers do.
	if err := os.RemoveAll(filepath.Join(dir, "index")); err != nil {
		t.Fatal(err)
	}
	if got, err := py.extract(t, refs[0], "disk"); err != nil || !bytes.Equal(got, image) {
		t.Error(err)
	}
}

// readerRotate adds slots of every kind, begins two more epochs, and adds another
// slot in the last.
func readerRotate(t *testing.T, dir string, now time.Time, secrets ...keys.Secret) {
	t.Helper()
	storage, err := fsx.OS(dir)
	if err != nil {
		t.Fatal(err)
	}
	id, err := hex.DecodeString(readerOpen(t, dir, repo.Options{}).ID())
	if err != nil {
		t.Fatal(err)
	}
	ring, _, err := keys.Unlock(storage, [16]byte(id), keys.Passphrase([]byte(readerPassphrase)))
	for i := 0; i < len(secrets) && err == nil; i++ {
		_, err = keys.AddSlot(storage, ring, secrets[i], "金庫", now, readerKDF)
		if err == nil {
			ring, _, err = keys.Rotate(storage, ring, nil, now)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// readerImage is a disk of two levels whose blocks have something for every kind of
// literal and copy.
func readerImage() []byte {
	const block = repo.DefaultBlockSize
	image := make([]byte, 299*block+12345)
	noise := rand.NewChaCha8([32]byte{})
	_, _ = noise.Read(image[:block])
	copy(image[block:], bytes.Repeat([]byte("x"), block))
	copy(image[2*block:], bytes.Repeat([]byte("the copy you keep. "), block/19))
	words := rand.New(noise)
	for at := 3 * block; at < 6*block; {
		n := 1 + words.IntN(1<<words.IntN(12))
		if words.IntN(3) == 0 {
			_, _ = noise.Read(image[at : at+n])
		} else {
			from := 2*block + words.IntN(at-2*block)
			copy(image[at:at+n], image[from:])
		}
		at += n
	}
	copy(image[8*block:], image[block-1000:block+70000])
	copy(image[299*block:], "the end")
	return image
}

// readerBackup makes a generation of the image and of an empty disk.
func readerBackup(t *testing.T, r *repo.Repository, vm repo.VMID, compression string, image []byte) {
	t.Helper()
	ctx := t.Context()
	s, err := r.Begin(ctx, repo.SessionOptions{Compression: compression})
	if err != nil {
		t.Fatal(err)
	}
	m := repo.Manifest{VM: vm, Mode: repo.ModeFull, Consistency: repo.ConsistencyOff}
	for _, d := range []struct {
		name    string
		content []byte
	}{{"disk", image}, {"empty", make([]byte, 512)}} {
		w, err := s.Disk(ctx, int64(len(d.content)), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(ctx, 0, d.content, func() {}); err != nil {
			t.Fatal(err)
		}
		tree, err := w.Finish(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m.Disks = append(m.Disks, repo.DiskManifest{
			Name: d.name, Capacity: tree.Capacity, DataBytes: tree.DataBytes, Root: tree.Root, Levels: tree.Levels,
		})
	}
	_, err = s.Commit(ctx, m)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
}

// readerPacks lists the packs of blocks.
func readerPacks(t *testing.T, dir string) []string {
	t.Helper()
	packs, err := filepath.Glob(filepath.Join(dir, "packs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return packs
}

// One changed byte, anywhere: verify tells, and no wrong byte comes out.
func TestReaderRefuses(t *testing.T) {
	t.Parallel()
	r := readerOpen(t, "testdata/v1", repo.Options{})
	vms, err := r.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	refs, err := r.Refs(t.Context(), vms[0])
	if err != nil {
		t.Fatal(err)
	}
	ref := refs[len(refs)-1]
	py := newReader(t, "testdata/v1")
	want, err := py.extract(t, ref, "web01")
	if err != nil {
		t.Fatal(err)
	}
	py.dir = filepath.Join(t.TempDir(), "repo")
	if err := os.CopyFS(py.dir, os.DirFS("testdata/v1")); err != nil {
		t.Fatal(err)
	}
	failed := 0
	random := rand.New(rand.NewPCG(1, 2))
	err = filepath.WalkDir(py.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == "lock" {
			return err
		}
		whole := mustRead(t, name)
		b, at := bytes.Clone(whole), random.IntN(len(whole))
		b[at] ^= 1 << random.IntN(8)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			return err
		}
		if got, err := py.extract(t, ref, "web01"); err != nil {
			failed++
			if strings.Count(err.Error(), "\n") != 1 {
				t.Errorf("%s, byte %d: %q is more than a line", name, at, err)
			}
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s, byte %d: wrong bytes", name, at)
		}
		if _, err := py.run(t, "verify"); err == nil && e.Name() != "config" { // whose HMAC needs a key
			t.Errorf("%s, byte %d: verify is content", name, at)
		}
		return os.WriteFile(name, whole, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	if failed < 5 { // config, slot, manifest, node packs, block packs
		t.Errorf("only %d files count", failed)
	}
	if got, err := py.extract(t, ref, "web01"); err != nil || !bytes.Equal(got, want) {
		t.Error("the copy was not put right again:", err)
	}

	py.args = []string{"--passphrase-file", secretFile(t, "wrong")}
	if _, err := py.run(t, "list"); err == nil || !strings.Contains(err.Error(), "No key slot opens") {
		t.Error(err)
	}
	newer := bytes.Replace(mustRead(t, "testdata/v1/config"), []byte(`"format":1`), []byte(`"format":2`), 1)
	if err := os.WriteFile(filepath.Join(py.dir, "config"), newer, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := py.run(t, "verify"); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Error(err)
	}
}

func mustRead(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
