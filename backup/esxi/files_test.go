package esxi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick is a tuning in which waiting costs no test time.
func quick() tuning {
	t := defaults()
	t.pause, t.longest, t.poll = time.Microsecond, 50*time.Microsecond, time.Millisecond
	t.call = 30 * time.Second
	return t
}

// fileServer is a /folder that answers whatever a test wants: the simulated
// host is true, and these tests are about hosts (or things between) that are not.
func fileServer(t testing.TB, tune tuning, handler http.HandlerFunc) *files {
	t.Helper()
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	addr := srv.Listener.Addr().String()
	c := Config{
		Name: "lab", User: "root", Logger: slog.New(slog.DiscardHandler),
		Password: func() (string, error) { return "", errors.New("no login in these tests") },
	}
	s, err := newSession(c, addr, thumbprint(srv.Certificate().Raw), tune)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.transport.CloseIdleConnections()
		srv.Close()
	})
	return &files{
		session: s, gate: newThrottle(tune, time.Now), name: "lab", addr: addr,
		datacenter: "ha-datacenter", t: tune, log: c.Logger,
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{7})
	r.Read(b)
	return b
}

// serve answers honestly.
func serve(w http.ResponseWriter, r *http.Request, content []byte) {
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

const flat = "[datastore1] web01/web01-flat.vmdk"

func (f *files) all(ctx context.Context, size int) ([]byte, error) {
	b := make([]byte, size)
	err := f.read(ctx, flat, b, 0, int64(size), func(int, int) {})
	return b, err
}

func TestReadHonest(t *testing.T) {
	content := random(300_000)
	tune := quick()
	tune.request = 100_000
	var ranges sync.Map
	f := fileServer(t, tune, func(w http.ResponseWriter, r *http.Request) {
		ranges.Store(r.Header.Get("Range"), true)
		if r.URL.EscapedPath() != "/folder/web01/web01-flat.vmdk" || r.URL.RawQuery != "dcPath=ha-datacenter&dsName=datastore1" {
			t.Errorf("asked for %s", r.URL)
		}
		serve(w, r, content)
	})
	got, err := f.all(t.Context(), len(content))
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("read: %v, equal %v", err, bytes.Equal(got, content))
	}
	for _, want := range []string{"bytes=0-99999", "bytes=100000-199999", "bytes=200000-299999"} {
		if _, ok := ranges.Load(want); !ok {
			t.Errorf("no request for %s", want)
		}
	}
}

func TestNamesOnTheWire(t *testing.T) {
	f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s|%s", r.URL.EscapedPath(), r.URL.RawQuery)
	})
	got, err := f.readFile(t.Context(), "[my store+1] a b/c+d #1%/ü?&.vmx", 1000)
	want := "/folder/a%20b/c%2Bd%20%231%25/%C3%BC%3F%26.vmx|dcPath=ha-datacenter&dsName=my%20store%2B1"
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

// lies are answers that must never be taken for the bytes asked for.
func TestReadDisbelieves(t *testing.T) {
	content := random(1000)
	for _, c := range []struct {
		name, want string
		kind       error
		handler    http.HandlerFunc
	}{
		{"ignores ranges", "ignores ranges", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Write(content)
		}},
		{"folder", "web page", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprint(w, "<html>Index of web01</html>")
		}},
		{"no content range", "without a sound Content-Range", nil, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content)
		}},
		{"other range", "answers bytes 1-999", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 1-999/1000")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[1:])
		}},
		{"shorter range", "answers bytes 0-499", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 0-499/1000")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[:500])
		}},
		{"grown file", "is not the frozen one", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 0-999/2000")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content)
		}},
		{"shrunk file", "shorter than it was", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes */0")
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		}},
		{"wrong length", "announces 10 bytes", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 0-999/1000")
			w.Header().Set("Content-Length", "10")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[:10])
		}},
		{"redirect", "HTTP 302", nil, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.example/", http.StatusFound)
		}},
		{"missing", "no such file", ErrNotFound, http.NotFound},
		{"forbidden", "Administrator role", ErrDenied, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int32
			f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				c.handler(w, r)
			})
			_, err := f.all(t.Context(), len(content))
			if err == nil || !strings.Contains(err.Error(), c.want) || c.kind != nil && !errors.Is(err, c.kind) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if asked.Load() != 1 {
				t.Errorf("asked %d times", asked.Load())
			}
		})
	}
}

// A lie in a later request must not go unnoticed because the first was true.
func TestReadResumesWhereItBroke(t *testing.T) {
	content := random(1 << 20)
	var mu sync.Mutex
	var ranges []string
	f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		ranges = append(ranges, r.Header.Get("Range"))
		n := len(ranges)
		mu.Unlock()
		if n > 3 {
			serve(w, r, content)
			return
		}
		var from, to int
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(content)))
		w.Header().Set("Content-Length", fmt.Sprint(to-from+1))
		w.WriteHeader(http.StatusPartialContent)
		w.Write(content[from : from+200_000])
		panic(http.ErrAbortHandler)
	})
	var counted int
	got := make([]byte, len(content))
	err := f.read(t.Context(), flat, got, 0, int64(len(got)), func(n, _ int) { counted += n })
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("read: %v, equal %v", err, bytes.Equal(got, content))
	}
	if counted != len(content) {
		t.Errorf("%d bytes crossed the wire for %d", counted, len(content))
	}
	last := ranges[len(ranges)-1]
	if last == ranges[0] || len(ranges) != 4 {
		t.Errorf("requests %v", ranges)
	}
}

func TestGivesUp(t *testing.T) {
	for _, c := range []struct {
		name, want string
		kind       error
		tries      int
		handler    http.HandlerFunc
	}{
		{"busy", "stays busy", ErrBusy, 10, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }},
		{"locked", "locked", ErrLocked, 4, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusInternalServerError) }},
		{"cut", "cannot be reached", ErrUnreachable, 10, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }},
		{"trickle", "cannot be reached", ErrUnreachable, 10, func(w http.ResponseWriter, r *http.Request) {
			var from, to int
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/1000", from, to))
			w.Header().Set("Content-Length", fmt.Sprint(to-from+1))
			w.WriteHeader(http.StatusPartialContent)
			w.Write([]byte{1})
			panic(http.ErrAbortHandler)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int32
			f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				c.handler(w, r)
			})
			_, err := f.all(t.Context(), 1000)
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v", err)
			}
			if int(asked.Load()) != c.tries {
				t.Errorf("%d tries, want %d", asked.Load(), c.tries)
			}
		})
	}
}

// A host that stops in the middle of an answer, without closing, is noticed.
func TestStall(t *testing.T) {
	content := random(1000)
	tune := quick()
	tune.stall = 50 * time.Millisecond
	var asked atomic.Int32
	release := make(chan struct{})
	f := fileServer(t, tune, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) > 1 {
			serve(w, r, content)
			return
		}
		w.Header().Set("Content-Range", "bytes 0-999/1000")
		w.Header().Set("Content-Length", "1000")
		w.WriteHeader(http.StatusPartialContent)
		w.Write(content[:100])
		w.(http.Flusher).Flush()
		<-release
	})
	got, err := f.all(t.Context(), len(content))
	close(release)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("read: %v", err)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	})
	if _, err := f.all(ctx, 1000); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	// Nor does a long pause hold anybody.
	tune := quick()
	tune.pause, tune.longest = time.Hour, time.Hour
	ctx, cancel = context.WithCancel(t.Context())
	f = fileServer(t, tune, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		time.AfterFunc(time.Millisecond, cancel)
	})
	if _, err := f.all(ctx, 1000); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// At most four requests run at once, and a busy answer to some of them pauses
// all of them once.
func TestInFlight(t *testing.T) {
	content := random(1000)
	var now, most, asked atomic.Int32
	f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(2 * time.Millisecond)
		now.Add(-1)
		if asked.Add(1)%7 == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		serve(w, r, content)
	})
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := f.all(t.Context(), 1000); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() > 4 || most.Load() < 2 {
		t.Errorf("%d requests in flight", most.Load())
	}
}

func TestThrottlePausesTogether(t *testing.T) {
	now := time.Unix(0, 0)
	tune := defaults()
	g := newThrottle(tune, func() time.Time { return now })
	var rounds []uint64
	for range 4 {
		r, err := g.enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		rounds = append(rounds, r)
	}
	for _, r := range rounds {
		g.bad(r)
		g.leave()
	}
	if g.level != 1 || g.round != 1 {
		t.Errorf("four failures of one round made level %d, round %d", g.level, g.round)
	}
	if wait := g.shutTill.Sub(now); wait < tune.pause/2 || wait > tune.pause {
		t.Errorf("pause %s", wait)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := g.enter(ctx); err == nil {
		t.Error("entered during the pause")
	}
	now = now.Add(tune.longest)
	r, err := g.enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g.good(r)
	g.leave()
	if g.level != 0 {
		t.Errorf("level %d after an answer", g.level)
	}
	for n := range 40 {
		if d := jitter(tune.pause, tune.longest, n); d < tune.pause/2 || d > tune.longest {
			t.Errorf("pause %d is %s", n, d)
		}
	}
}

func TestReadFile(t *testing.T) {
	for _, size := range []int{0, 1, 65535, 65536, 65537, 200_000} {
		content := random(size)
		f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) { serve(w, r, content) })
		got, err := f.readFile(t.Context(), "[ds] x", 200_000)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("size %d: got %d bytes, %v", size, len(got), err)
		}
		if size == 0 {
			continue
		}
		if _, err := f.readFile(t.Context(), "[ds] x", int64(size-1)); err == nil {
			t.Errorf("size %d passes a limit of %d", size, size-1)
		}
	}
}

func TestContentRange(t *testing.T) {
	for s, ok := range map[string]bool{
		"bytes 0-0/1": true, "bytes 5-9/10": true, "bytes 5-10/10": false, "bytes 9-5/10": false, "bytes */10": false,
		"bytes 0-0/*": false, "": false, "0-0/1": false, "bytes -1-0/1": false, "bytes 0-99999999999999999999/1": false,
	} {
		if _, _, _, got := parseContentRange(s); got != ok {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 0-9/10")
	f.Add("bytes */10")
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, ok := parseContentRange(s)
		if ok && (first < 0 || last < first || size <= last) {
			t.Errorf("%q: %d-%d/%d", s, first, last, size)
		}
	})
}

// The pin holds for every connection, and a wrong certificate is no reason to
// try again.
func TestCertificateChanges(t *testing.T) {
	var asked atomic.Int32
	f := fileServer(t, quick(), func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		serve(w, r, make([]byte, 1000))
	})
	if _, err := f.all(t.Context(), 1000); err != nil {
		t.Fatal(err)
	}
	got := f.session.transport.TLSClientConfig
	other := strings.Repeat("AB:", 31) + "AB"
	f.session.transport.CloseIdleConnections()
	f.session.transport.TLSClientConfig = pinned("lab", f.addr, other)
	_, err := f.all(t.Context(), 1000)
	if !errors.Is(err, ErrThumbprint) || !strings.Contains(err.Error(), other) || asked.Load() != 1 {
		t.Errorf("error %v, %d requests", err, asked.Load())
	}
	f.session.transport.TLSClientConfig = got
}
