package repo

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRoundTrip(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	content := image(1, 100*testBlock+1234)
	first, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content))
	if err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, r, first), content)

	changed := bytes.Clone(content)
	copy(changed[7*testBlock:], image(2, 3*testBlock))
	clear(changed[50*testBlock : 52*testBlock])
	second, err := backup(ctx, r, testVM, testClock().Add(time.Hour), changed, openDisk(t, r, first),
		[]extent{{6 * testBlock, 5 * testBlock}, {50 * testBlock, 2 * testBlock}})
	if err != nil {
		t.Fatal(err)
	}
	same(t, openDisk(t, r, second), changed)
	same(t, openDisk(t, r, first), content)
	clean(t, r)

	// Another process sees the same.
	o := mustOpen(t, mem)
	defer o.Close()
	refs, err := o.Refs(ctx, testVM)
	if err != nil || len(refs) != 2 || refs[0] != first || refs[1] != second {
		t.Fatal(refs, err)
	}
	same(t, openDisk(t, o, second), changed)
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, "tmp/") || strings.HasPrefix(name, "sessions/") {
			t.Errorf("%s was left behind", name)
		}
	}
}

func TestDirectory(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "new", "repo")
	o := InitOptions{Passphrase: passphrase, KDF: cheap}
	if err := Init(ctx, dir, o); err != nil {
		t.Fatal(err)
	}
	if err := Init(ctx, dir, o); !errors.Is(err, ErrExists) {
		t.Fatalf("init twice: %v", err)
	}
	if _, err := Open(ctx, dir, Passphrase([]byte("wrong")), Options{}); !errors.Is(err, ErrWrongPassphrase) {
		t.Fatalf("wrong passphrase: %v", err)
	}
	if _, err := Open(ctx, filepath.Dir(dir), Passphrase(passphrase), Options{}); !errors.Is(err, ErrNotRepository) {
		t.Fatalf("the directory above: %v", err)
	}
	if _, err := Open(ctx, dir+"x", Passphrase(passphrase), Options{}); !errors.Is(err, ErrNotRepository) {
		t.Fatalf("no directory: %v", err)
	}
	if err := Init(ctx, filepath.Dir(dir), o); !errors.Is(err, ErrExists) {
		t.Fatalf("init beside other files: %v", err)
	}
	r, err := Open(ctx, dir, Passphrase(passphrase), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.BlockSize() != DefaultBlockSize || len(r.ID()) != 32 || r.Dir() != dir {
		t.Fatal(r.BlockSize(), r.ID(), r.Dir())
	}
	content := image(3, 3<<20)
	ref, err := backup(ctx, r, testVM, testClock(), content, nil, whole(content[:len(content)/DefaultBlockSize*DefaultBlockSize]))
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(content))
	if n, err := openDisk(t, r, ref).ReadAt(got, 0); n != len(got) || err != nil || !bytes.Equal(got, content) {
		t.Fatal(n, err)
	}
	clean(t, r)
	err = filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, fi.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
