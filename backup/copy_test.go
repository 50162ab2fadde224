package backup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hikae/repo"
)

// sameAsFolder compares what a copy wrote with the generation.
func (w *world) sameAsFolder(ref repo.Ref, dest string) {
	w.t.Helper()
	files, err := w.generation(ref).Files(w.t.Context())
	must(w.t, err)
	names := map[string]bool{}
	for _, want := range files {
		names[want.Name] = true
		path := filepath.Join(dest, want.Name)
		info, err := os.Stat(path)
		must(w.t, err)
		if info.Size() != want.Size || !info.ModTime().Equal(want.ModTime) {
			w.t.Errorf("%s: %d bytes of %v, want %d of %v", want.Name, info.Size(), info.ModTime(), want.Size, want.ModTime)
		}
		if want.Disk == nil {
			data, err := os.ReadFile(path)
			must(w.t, err)
			if !bytes.Equal(data, want.Data) {
				w.t.Errorf("%s differs", want.Name)
			}
			continue
		}
		f, err := os.Open(path)
		must(w.t, err)
		equal(w.t, want.Name, repoDisk{want.Disk}, fileDisk{f})
		f.Close()
		if got := allocated(info); got > want.StoredBytes+mib {
			w.t.Errorf("%s takes %d bytes, %d are data: holes were filled", want.Name, got, want.StoredBytes)
		}
	}
	entries, err := os.ReadDir(dest)
	must(w.t, err)
	for _, e := range entries {
		if !names[e.Name()] {
			w.t.Errorf("%s is left in %s", e.Name(), dest)
		}
	}
}

func TestCopy(t *testing.T) {
	w := newRepo(t)
	ref := w.importDisks(nil,
		image(t, 60*mib+512, 1, area0(0, 20*mib), area0(50*mib+3*512, 4*mib), area0(60*mib, 512)), image(t, 3*mib, 2)).Ref
	dest := filepath.Join(t.TempDir(), "a", "b")
	o := CopyOptions{Generation: w.generation(ref), Dest: dest, Clock: w.now, Logger: logger(t)}
	res, err := Copy(t.Context(), o)
	must(t, err)
	if res.BytesKept != 0 || res.BytesWritten < 24*mib || res.BytesWritten > 26*mib {
		t.Errorf("%+v", res)
	}
	w.sameAsFolder(ref, dest)
	if _, err := Copy(t.Context(), o); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "old01-flat.vmdk") {
		t.Errorf("a second copy over the first: %v", err)
	}
	w.sameAsFolder(ref, dest)
}

func TestCopyGoesOn(t *testing.T) {
	w := newRepo(t)
	ref := w.importDisks(nil, image(t, 50*mib, 1, area0(0, 15*mib), area0(20*mib, 30*mib)), image(t, 8*mib, 2, area0(0, 8*mib))).Ref
	other := w.importDisks(nil, image(t, mib, 3)).Ref
	dest := t.TempDir()
	stop := errors.New("enough")
	interrupted := func(at int64) CopyResult {
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		res, err := Copy(ctx, CopyOptions{Generation: w.generation(ref), Dest: dest, Progress: func(e Event) {
			if e.Phase == PhaseRead && e.Done > at {
				cancel(stop)
			}
		}})
		if !errors.Is(err, stop) || !strings.Contains(err.Error(), "the same command goes on") {
			t.Fatalf("%v", err)
		}
		return res
	}
	first := interrupted(10 * mib)
	if _, err := Copy(t.Context(), CopyOptions{Generation: w.generation(other), Dest: dest}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "unfinished copy of") {
		t.Errorf("another generation's copy into the same folder: %v", err)
	}
	second := interrupted(35 * mib)
	if second.BytesKept < first.BytesWritten-pieceSize || second.BytesKept == 0 {
		t.Errorf("kept %d of %d bytes", second.BytesKept, first.BytesWritten)
	}
	res, err := Copy(t.Context(), CopyOptions{Generation: w.generation(ref), Dest: dest})
	must(t, err)
	if res.BytesWritten > 30*mib {
		t.Errorf("the last part wrote %d bytes", res.BytesWritten)
	}
	w.sameAsFolder(ref, dest)
}

// A part that is not what the state says it is starts again.
func TestCopyDistrusts(t *testing.T) {
	w := newRepo(t)
	ref := w.importDisks(nil, image(t, 64*mib, 1, area0(0, 64*mib))).Ref
	dest := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Copy(ctx, CopyOptions{Generation: w.generation(ref), Dest: dest, Progress: func(e Event) {
		if e.Done > 14*mib {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	part := filepath.Join(dest, "old01-flat.vmdk.part")
	info, err := os.Stat(part)
	must(t, err)
	must(t, os.WriteFile(part, make([]byte, info.Size()), 0o600)) // all zeros: as after a crash that lost data
	res, err := Copy(t.Context(), CopyOptions{Generation: w.generation(ref), Dest: dest})
	must(t, err)
	if res.BytesKept > mib || res.BytesWritten < 24*mib {
		t.Errorf("%+v", res)
	}
	w.sameAsFolder(ref, dest)
}

// smallFS mounts a small file system; only root can.
func smallFS(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("mounting a small file system: %v; run the tests as root", err)
		}
		t.Skipf("needs root to mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func TestCopyWithoutRoom(t *testing.T) {
	w := newRepo(t)
	ref := w.importDisks(nil, image(t, 32*mib, 1, area0(0, 30*mib))).Ref
	dest := smallFS(t, "25m")
	sub := filepath.Join(dest, "new")
	_, err := Copy(t.Context(), CopyOptions{Generation: w.generation(ref), Dest: sub})
	if !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "30.0 MiB") || !strings.Contains(err.Error(), "25.0 MiB") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(sub); !os.IsNotExist(err) {
		t.Errorf("a folder was left behind: %v", err)
	}
	// Enough room at first, then somebody else takes it.
	must(t, unix.Mount("tmpfs", dest, "tmpfs", unix.MS_REMOUNT, "size=36m"))
	done := false
	_, err = Copy(t.Context(), CopyOptions{Generation: w.generation(ref), Dest: dest, Progress: func(e Event) {
		if e.Done > 12*mib && !done {
			done = true
			must(t, os.WriteFile(filepath.Join(dest, "ballast"), make([]byte, 12*mib), 0o600))
		}
	}})
	if !errors.Is(err, ErrNoRoom) || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "goes on from there") {
		t.Fatalf("%v", err)
	}
	must(t, os.Remove(filepath.Join(dest, "ballast")))
	res, err := Copy(t.Context(), CopyOptions{Generation: w.generation(ref), Dest: dest})
	must(t, err)
	if res.BytesKept < 12*mib {
		t.Errorf("%+v", res)
	}
	w.sameAsFolder(ref, dest)
}

func TestCopyStateIsNotBelieved(t *testing.T) {
	w := newRepo(t)
	ref := w.importDisks(nil, image(t, 2*mib, 1, area0(0, mib))).Ref
	g := w.generation(ref)
	for name, text := range map[string]string{"broken": "{", "null": `{"files": {"old01-flat.vmdk": null}}`} {
		dest := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dest, copyStateName), []byte(text), 0o600))
		if _, err := Copy(t.Context(), CopyOptions{Generation: g, Dest: dest}); err == nil {
			t.Errorf("%s: a copy went on from it", name)
		}
	}
	for _, done := range []int64{-1, 1 << 60, 5} {
		dest := t.TempDir()
		s := copyState{Generation: "x", Identity: identity(g.Manifest()), Files: map[string]*copyProgress{"old01-flat.vmdk": {Done: done}}}
		text, err := json.Marshal(s)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dest, copyStateName), text, 0o600))
		must(t, os.WriteFile(filepath.Join(dest, "old01-flat.vmdk.part"), make([]byte, 2*mib), 0o600))
		if _, err := Copy(t.Context(), CopyOptions{Generation: g, Dest: dest}); err != nil {
			t.Errorf("%d: %v", done, err)
			continue
		}
		w.sameAsFolder(ref, dest)
	}
}

// A repository that becomes full ends the run cleanly and hurts nothing.
func TestRepositoryWithoutRoom(t *testing.T) {
	dir := smallFS(t, "24m")
	w := newRepo(t)
	w.dir = filepath.Join(dir, "repo")
	must(t, repo.Init(t.Context(), w.dir, repo.InitOptions{Passphrase: passphrase, KDF: repo.KDF{Time: 1, MemoryKiB: 64, Threads: 1}}))
	w.open()
	raw := image(t, 8*mib, 1, area0(0, 4*mib))
	first := w.importDisks(nil, raw)
	_, err := Import(t.Context(), ImportOptions{Repo: w.repo, VM: imported, Disks: []string{image(t, 40*mib, 9, area0(0, 40*mib))}, Clock: w.now})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v", err)
	}
	t.Log(err)
	w.sameAsFile(first.Ref, 0, raw)
	w.checkRepo()
	w.repo.Close() // so that the file system can be unmounted
}
