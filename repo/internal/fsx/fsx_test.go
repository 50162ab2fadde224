package fsx

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// onEach runs a test on every implementation: what holds on one must hold on all.
func onEach(t *testing.T, test func(t *testing.T, fsys FS)) {
	t.Run("os", func(t *testing.T) {
		fsys, err := OS(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		test(t, fsys)
	})
	t.Run("mem", func(t *testing.T) { test(t, NewMem()) })
	t.Run("faulty", func(t *testing.T) { test(t, NewFaulty(NewMem())) })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustBe(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

func content(t *testing.T, fsys FS, name string) string {
	t.Helper()
	b, err := ReadFile(fsys, name, 1<<20)
	must(t, err)
	return string(b)
}

func names(t *testing.T, fsys FS, dir string) []string {
	t.Helper()
	list, err := fsys.ReadDir(dir)
	must(t, err)
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	return got
}

func TestFiles(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		must(t, MakeDir(fsys, "a/b"))
		must(t, fsys.MkdirAll("a/b")) // again is fine
		f, err := fsys.Create("a/b/f")
		must(t, err)
		if f.Name() != "a/b/f" {
			t.Errorf("name %q", f.Name())
		}
		for _, s := range []string{"one ", "two"} {
			if n, err := io.WriteString(f, s); n != len(s) || err != nil {
				t.Fatal(n, err)
			}
		}
		must(t, f.Sync())
		if fi, err := f.Stat(); err != nil || fi.Size() != 7 || fi.IsDir() {
			t.Fatal(fi, err)
		}
		must(t, f.Close())
		if _, err := f.Write([]byte("x")); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("write to a closed file: %v", err)
		}
		if f.Close() == nil {
			t.Error("closing twice went well")
		}

		_, err = fsys.Create("a/b/f")
		mustBe(t, err, fs.ErrExist)
		_, err = fsys.Open("a/b/g")
		mustBe(t, err, fs.ErrNotExist)
		_, err = fsys.Create("a/c/f")
		mustBe(t, err, fs.ErrNotExist)
		_, err = fsys.Stat("a/b/g")
		mustBe(t, err, fs.ErrNotExist)
		mustBe(t, fsys.SyncDir("a/c"), fs.ErrNotExist)
		mustBe(t, fsys.Remove("a/b/g"), fs.ErrNotExist)
		if err := fsys.MkdirAll("a/b/f/g"); err == nil {
			t.Error("a directory in a file")
		}

		f, err = fsys.Append("a/b/f")
		must(t, err)
		_, err = io.WriteString(f, " three")
		must(t, err)
		must(t, f.Close())
		f, err = fsys.Append("a/b/new")
		must(t, err)
		must(t, f.Close())

		f, err = fsys.Open("a/b/f")
		must(t, err)
		must(t, iotest.TestReader(struct{ io.Reader }{f}, []byte("one two three")))
		buf := make([]byte, 5)
		if n, err := f.ReadAt(buf, 4); n != 5 || err != nil || string(buf) != "two t" {
			t.Errorf("read at 4: %d %v %q", n, err, buf)
		}
		if n, err := f.ReadAt(buf, 10); n != 3 || !errors.Is(err, io.EOF) {
			t.Errorf("read over the end: %d %v", n, err)
		}
		if n, err := f.ReadAt(buf, 99); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read behind the end: %d %v", n, err)
		}
		if _, err := f.ReadAt(buf, -1); err == nil {
			t.Error("read before the start")
		}
		if _, err := f.Write(buf); err == nil {
			t.Error("wrote to a file opened for reading")
		}
		must(t, f.Close())

		if got := fmt.Sprint(names(t, fsys, "a/b")); got != "[f new]" {
			t.Errorf("directory %s", got)
		}
		if fi, err := fsys.Stat("a"); err != nil || !fi.IsDir() || fi.Name() != "a" {
			t.Error(fi, err)
		}
		if err := fsys.Remove("a/b"); err == nil {
			t.Error("removed a directory that is not empty")
		}
		must(t, fsys.Remove("a/b/f"))
		must(t, fsys.Remove("a/b/new"))
		must(t, fsys.Remove("a/b"))
		if got := names(t, fsys, "a"); len(got) != 0 {
			t.Errorf("left in a: %v", got)
		}
		if n, err := fsys.Free(); err != nil || n == 0 {
			t.Errorf("free: %d %v", n, err)
		}
	})
}

func TestNamesStayInside(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		must(t, WriteFile(fsys, "t", "f", nil))
		for _, bad := range []string{"", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/"} {
			_, e1 := fsys.Open(bad)
			_, e2 := fsys.Create(bad)
			_, e3 := fsys.Append(bad)
			_, e4 := fsys.ReadDir(bad)
			_, e5 := fsys.Stat(bad)
			_, e6 := fsys.Lock(bad, true, false)
			for i, err := range []error{
				e1, e2, e3, e4, e5, e6, fsys.Remove(bad), fsys.MkdirAll(bad), fsys.SyncDir(bad),
				fsys.Publish(bad, "x"), fsys.Publish("f", bad), fsys.Replace(bad, "x"), fsys.Replace("f", bad),
			} {
				if !errors.Is(err, fs.ErrInvalid) {
					t.Errorf("call %d with name %q: %v", i, bad, err)
				}
			}
		}
	})
}

func TestPublish(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		must(t, fsys.MkdirAll("tmp"))
		must(t, fsys.MkdirAll("d"))
		must(t, WriteFile(fsys, "tmp/1", "d/x", []byte("first")))
		err := WriteFile(fsys, "tmp/2", "d/x", []byte("second"))
		mustBe(t, err, fs.ErrExist)
		if got := content(t, fsys, "d/x"); got != "first" {
			t.Errorf("published file replaced by %q", got)
		}
		if left := names(t, fsys, "tmp"); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
		mustBe(t, fsys.Publish("tmp/none", "d/y"), fs.ErrNotExist)
		mustBe(t, WriteFile(fsys, "tmp/3", "none/y", nil), fs.ErrNotExist)
		if left := names(t, fsys, "tmp"); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
		boom := errors.New("boom")
		mustBe(t, WriteFunc(fsys, "tmp/4", "d/z", func(io.Writer) error { return boom }), boom)
		if left := names(t, fsys, "tmp"); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
		if got := fmt.Sprint(names(t, fsys, "d")); got != "[x]" {
			t.Errorf("published: %s", got)
		}
	})
}

func TestReplace(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		must(t, fsys.MkdirAll("tmp"))
		must(t, fsys.MkdirAll("d/e"))
		must(t, ReplaceFile(fsys, "tmp/1", "d/x", []byte("first")))
		reader, err := fsys.Open("d/x")
		must(t, err)
		defer reader.Close()
		must(t, ReplaceFile(fsys, "tmp/2", "d/x", []byte("second")))
		if got := content(t, fsys, "d/x"); got != "second" {
			t.Errorf("not replaced: %q", got)
		}
		buf := make([]byte, 5)
		if _, err := reader.ReadAt(buf, 0); err != nil || string(buf) != "first" {
			t.Errorf("who had it open reads %q, %v", buf, err)
		}
		must(t, fsys.Replace("d/x", "d/x"))
		must(t, fsys.Replace("d/x", "d/y"))
		mustBe(t, fsys.Replace("tmp/none", "d/y"), fs.ErrNotExist)
		mustBe(t, ReplaceFile(fsys, "tmp/3", "none/y", nil), fs.ErrNotExist)
		if err := ReplaceFile(fsys, "tmp/4", "d/e", nil); err == nil {
			t.Error("replaced a directory")
		}
		if left := names(t, fsys, "tmp"); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
		if got := fmt.Sprint(names(t, fsys, "d")); got != "[e y]" || content(t, fsys, "d/y") != "second" {
			t.Errorf("there is %s", got)
		}
	})
}

// TestOSReplaceSameFile: two names of one file become one.
func TestOSReplaceSameFile(t *testing.T) {
	dir := t.TempDir()
	fsys, err := OS(dir)
	must(t, err)
	must(t, WriteFile(fsys, "t", "a", []byte("a")))
	must(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")))
	must(t, fsys.Replace("a", "b"))
	if got := fmt.Sprint(names(t, fsys, ".")); got != "[b]" {
		t.Error(got)
	}
}

func TestReadFileLimit(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		must(t, WriteFile(fsys, "t", "f", []byte("12345")))
		_, err := ReadFile(fsys, "f", 4)
		mustBe(t, err, ErrTooLarge)
		if b, err := ReadFile(fsys, "f", 5); err != nil || string(b) != "12345" {
			t.Error(b, err)
		}
	})
}

func TestLock(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		a, err := fsys.Lock("l", false, false)
		must(t, err)
		b, err := fsys.Lock("l", false, true)
		must(t, err)
		_, err = fsys.Lock("l", true, false)
		mustBe(t, err, ErrLocked)
		must(t, a.Close())
		if a.Close() == nil {
			t.Error("giving back twice went well")
		}
		_, err = fsys.Lock("l", true, false)
		mustBe(t, err, ErrLocked)
		must(t, b.Close())
		x, err := fsys.Lock("l", true, false)
		must(t, err)
		_, err = fsys.Lock("l", false, false)
		mustBe(t, err, ErrLocked)

		got := make(chan io.Closer)
		go func() {
			c, err := fsys.Lock("l", true, true)
			if err != nil {
				t.Error(err)
			}
			got <- c
		}()
		select {
		case <-got:
			t.Error("two hold the lock")
		case <-time.After(20 * time.Millisecond):
		}
		// The file goes away under the waiter: what it gets must be a lock on
		// the file that others will find.
		must(t, fsys.Remove("l"))
		must(t, x.Close())
		c := <-got
		_, err = fsys.Lock("l", true, false)
		mustBe(t, err, ErrLocked)
		must(t, c.Close())
		y, err := fsys.Lock("l", true, false)
		must(t, err)
		must(t, y.Close())
	})
}

// TestLockCounts has many take turns: never two at once, none forgotten.
func TestLockCounts(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		var wg sync.WaitGroup
		// Atomic for the race detector only: a kernel lock means nothing to it.
		var inside, total atomic.Int32
		for range 8 {
			wg.Go(func() {
				for range 25 {
					l, err := fsys.Lock("l", true, true)
					if err != nil {
						t.Error(err)
						return
					}
					if inside.Add(1) != 1 {
						t.Error("two inside")
					}
					total.Add(1)
					inside.Add(-1)
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if total.Load() != 200 {
			t.Errorf("%d turns", total.Load())
		}
	})
}

func TestConcurrentReaders(t *testing.T) {
	onEach(t, func(t *testing.T, fsys FS) {
		data := bytes.Repeat([]byte("0123456789"), 1000)
		must(t, WriteFile(fsys, "t", "f", data))
		f, err := fsys.Open("f")
		must(t, err)
		defer f.Close()
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				buf := make([]byte, 100)
				for off := i; off+100 < len(data); off += 97 {
					if _, err := f.ReadAt(buf, int64(off)); err != nil || !bytes.Equal(buf, data[off:off+100]) {
						t.Errorf("at %d: %v", off, err)
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestOSRoot(t *testing.T) {
	dir := t.TempDir()
	if _, err := OS(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if _, err := OS(file); err == nil {
		t.Error("a file as root")
	}
}

func TestOSModes(t *testing.T) {
	dir := t.TempDir()
	fsys, err := OS(dir)
	must(t, err)
	must(t, fsys.MkdirAll("d"))
	must(t, WriteFile(fsys, "d/t", "d/f", nil))
	l, err := fsys.Lock("d/l", true, false)
	must(t, err)
	must(t, l.Close())
	for name, want := range map[string]fs.FileMode{"d": 0o700, "d/f": 0o600, "d/l": 0o600} {
		fi, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if got := fi.Mode().Perm(); got&^want != 0 {
			t.Errorf("%s has mode %o", name, got)
		}
	}
}

// TestOSPublishWays tries the ways for storage without hard links where they can
// be tried.
func TestOSPublishWays(t *testing.T) {
	dir := t.TempDir()
	a, b, c := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
	must(t, os.WriteFile(a, []byte("a"), 0o600))
	must(t, os.WriteFile(b, []byte("b"), 0o600))
	mustBe(t, publishByRename(a, b), fs.ErrExist)
	mustBe(t, renameCarefully(a, b), fs.ErrExist)
	must(t, publishByRename(a, c))
	must(t, renameCarefully(c, a))
	if got, err := os.ReadFile(a); err != nil || string(got) != "a" {
		t.Error(got, err)
	}

	// A link that is there already is one whose answer was lost.
	fsys, err := OS(dir)
	must(t, err)
	must(t, os.Link(a, c))
	must(t, fsys.Publish("a", "c"))
	if _, err := os.Stat(a); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the old name stays:", err)
	}
}

// TestOSPublishAppendOnly: a directory in which nothing can be removed.
func TestOSPublishAppendOnly(t *testing.T) {
	dir := t.TempDir()
	fsys, err := OS(dir)
	must(t, err)
	must(t, fsys.MkdirAll("tmp"))
	must(t, fsys.MkdirAll("d"))
	f, err := fsys.Create("tmp/x")
	must(t, err)
	must(t, f.Close())
	if !appendOnly(t, filepath.Join(dir, "tmp")) {
		t.Skip("chattr +a needs root and a file system that has it")
	}
	must(t, fsys.Publish("tmp/x", "d/x"))
	if got := fmt.Sprint(names(t, fsys, "tmp"), names(t, fsys, "d")); got != "[x] [x]" {
		t.Error(got)
	}
}

// TestOSSyncStaysFailed: an answer once given is not taken back.
func TestOSSyncStaysFailed(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "f"))
	must(t, err)
	o := &osFile{File: f, name: "f"}
	must(t, f.Close()) // so that the first Sync fails
	first := o.Sync()
	if first == nil {
		t.Fatal("synced a closed file")
	}
	o.File, err = os.Create(filepath.Join(dir, "g")) // now it could succeed
	must(t, err)
	defer o.Close()
	if second := o.Sync(); !errors.Is(second, first) {
		t.Errorf("the second sync: %v", second)
	}
}
