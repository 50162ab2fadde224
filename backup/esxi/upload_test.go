package esxi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
)

func TestUpload(t *testing.T) {
	content := random(300_000)
	var mu sync.Mutex // a handler may outlive the answer it gave
	var stored []byte
	var status int
	handler := func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodHead {
			w.Header().Set("Content-Length", fmt.Sprint(len(stored)))
			return
		}
		if r.ContentLength != int64(len(content)) {
			t.Errorf("announced %d bytes", r.ContentLength)
		}
		if status == http.StatusInternalServerError { // without reading the body
			w.WriteHeader(status)
			return
		}
		stored, _ = io.ReadAll(r.Body)
		w.WriteHeader(status)
	}
	f := fileServer(t, quick(), handler)
	answer := func(code int) {
		mu.Lock()
		defer mu.Unlock()
		status = code
	}
	up := func(r io.Reader) error {
		return f.upload(t.Context(), flat, r, int64(len(content)))
	}

	answer(http.StatusCreated)
	if err := up(bytes.NewReader(content)); err != nil {
		t.Errorf("upload: %v", err)
	}
	mu.Lock()
	if !bytes.Equal(stored, content) {
		t.Error("other bytes were stored")
	}
	mu.Unlock()
	// More than announced is left in the reader.
	long := bytes.NewReader(append(bytes.Clone(content), 1, 2, 3))
	if err := up(long); err != nil || long.Len() != 3 {
		t.Errorf("upload: %v, %d bytes left", err, long.Len())
	}
	if err := up(bytes.NewReader(content[:1000])); !errors.Is(err, errSource) || !strings.Contains(err.Error(), "1000 of 300000") {
		t.Errorf("short reader: %v", err)
	}
	broken := errors.New("the repository is damaged")
	if err := up(io.MultiReader(bytes.NewReader(content[:1000]), iotest.ErrReader(broken))); !errors.Is(err, broken) || !errors.Is(err, errSource) {
		t.Errorf("broken reader: %v", err)
	}
	answer(http.StatusInternalServerError)
	if err := up(bytes.NewReader(content)); err == nil || !strings.Contains(err.Error(), "HTTP 500") {
		t.Errorf("refused: %v", err)
	}
	answer(http.StatusInsufficientStorage)
	if err := up(bytes.NewReader(content)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("full: %v", err)
	}

	cut := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		io.CopyN(io.Discard, r.Body, 1000)
		panic(http.ErrAbortHandler)
	})
	if err := cut.upload(t.Context(), flat, bytes.NewReader(random(32<<20)), 32<<20); !errors.Is(err, ErrUnreachable) {
		t.Errorf("cut: %v", err)
	}
	short := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Length", "17")
	})
	if err := short.upload(t.Context(), flat, bytes.NewReader(content), int64(len(content))); err == nil || !strings.Contains(err.Error(), "stored 17 of") {
		t.Errorf("short: %v", err)
	}
}
