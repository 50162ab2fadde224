package esxisim

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// web is a plain HTTPS client of the host, without govmomi.
type web struct {
	t      *testing.T
	h      *Host
	client *http.Client
}

func browse(t *testing.T, h *Host) *web {
	jar, err := cookiejar.New(nil)
	must(t, err)
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 16}
	t.Cleanup(tr.CloseIdleConnections)
	return &web{t, h, &http.Client{Transport: tr, Jar: jar}}
}

func (w *web) url(path string) string {
	u := url.URL{Scheme: "https", Host: w.h.Address(), Path: "/folder" + path, RawQuery: "dcPath=ha-datacenter&dsName=datastore1"}
	return u.String()
}

// do sends a request and returns status and body; header is key, value, key, value…
func (w *web) do(method, address string, body io.Reader, header ...string) (*http.Response, []byte, error) {
	req, err := http.NewRequestWithContext(w.t.Context(), method, address, body)
	must(w.t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := w.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	p, err := io.ReadAll(res.Body)
	return res, p, err
}

func (w *web) want(status int, method, address string, body io.Reader, header ...string) (*http.Response, []byte) {
	w.t.Helper()
	res, p, err := w.do(method, address, body, header...)
	must(w.t, err)
	if res.StatusCode != status {
		w.t.Fatalf("%s %s: %s, not %d: %s", method, address, res.Status, status, p)
	}
	return res, p
}

// enter logs in by Basic; the cookie serves from then on.
func (w *web) enter() {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodHead, w.url("/"), nil)
	must(w.t, err)
	req.SetBasicAuth(w.h.User(), w.h.Password())
	res, err := w.client.Do(req)
	must(w.t, err)
	res.Body.Close()
	if res.StatusCode != http.StatusOK || len(res.Cookies()) != 1 {
		w.t.Fatalf("login: %s, %v", res.Status, res.Cookies())
	}
}

func TestFolderReads(t *testing.T) {
	h := start(t, Options{})
	raw := image(t, 8*mib, 3)
	must(t, h.ImportVM(t.Context(), "a b#c", []string{raw}, VMOptions{}))
	data, err := os.ReadFile(raw)
	must(t, err)
	w := browse(t, h)
	flat := w.url("/a b#c/a b#c-flat.vmdk")

	res, _ := w.want(http.StatusUnauthorized, http.MethodGet, flat, nil)
	if !strings.HasPrefix(res.Header.Get("WWW-Authenticate"), "Basic ") {
		t.Error("no way to log in is named")
	}
	w.want(http.StatusUnauthorized, http.MethodGet, flat, nil, "Cookie", "vmware_soap_session=made-up")
	w.enter()
	res, _ = w.want(http.StatusOK, http.MethodHead, flat, nil)
	if res.ContentLength != 8*mib || res.Header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("head: %d bytes, %s", res.ContentLength, res.Header.Get("Content-Type"))
	}
	_, p := w.want(http.StatusOK, http.MethodGet, flat, nil)
	same(t, "whole", p, data)
	res, p = w.want(http.StatusPartialContent, http.MethodGet, flat, nil, "Range", "bytes=100-299999")
	same(t, "range", p, data[100:300_000])
	if got := res.Header.Get("Content-Range"); got != "bytes 100-299999/8388608" {
		t.Error(got)
	}
	_, p = w.want(http.StatusPartialContent, http.MethodGet, flat, nil, "Range", "bytes=8388600-")
	same(t, "tail", p, data[8388600:])
	w.want(http.StatusRequestedRangeNotSatisfiable, http.MethodGet, flat, nil, "Range", "bytes=8388608-")
	w.want(http.StatusNotFound, http.MethodGet, w.url("/a b#c/none.vmdk"), nil)
	w.want(http.StatusNotFound, http.MethodGet, strings.Replace(flat, "datastore1", "datastore2", 1), nil)
	w.want(http.StatusNotFound, http.MethodGet, strings.Replace(flat, "ha-datacenter", "dc", 1), nil)
	w.want(http.StatusNotFound, http.MethodGet, w.url("/.esxisim/host.pem"), nil)
	w.want(http.StatusMethodNotAllowed, http.MethodPost, flat, nil)
	for _, path := range []string{"/../x", "/a/../../../../etc/passwd", "/a b#c/.."} {
		w.want(http.StatusBadRequest, http.MethodGet, w.url(path), nil)
	}
	// A symbolic link is no way out either.
	must(t, os.Symlink("/etc", filepath.Join(h.o.Dir, "out")))
	if res, p, err := w.do(http.MethodGet, w.url("/out/passwd"), nil); err != nil || res.StatusCode < 400 {
		t.Errorf("through a link: %v %s", res.Status, p)
	}

	_, p = w.want(http.StatusOK, http.MethodGet, "https://"+h.Address()+"/folder", nil)
	if !bytes.Contains(p, []byte(`<a href="/folder?dcPath=ha-datacenter">`)) {
		t.Errorf("datacenters: %s", p)
	}
	_, p = w.want(http.StatusOK, http.MethodGet, "https://"+h.Address()+"/folder?dcPath=ha-datacenter", nil)
	if !bytes.Contains(p, []byte("dsName=datastore1")) {
		t.Errorf("datastores: %s", p)
	}
	_, p = w.want(http.StatusOK, http.MethodGet, w.url(""), nil)
	if !bytes.Contains(p, []byte("a%20b%23c?dcPath=ha-datacenter&amp;dsName=datastore1")) || bytes.Contains(p, []byte("esxisim/")) {
		t.Errorf("top: %s", p)
	}
	res, p = w.want(http.StatusOK, http.MethodGet, w.url("/a b#c"), nil)
	if !bytes.Contains(p, []byte(">a b#c-flat.vmdk</a>")) || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/html") {
		t.Errorf("directory: %s", p)
	}
}

func TestFolderWrites(t *testing.T) {
	h := start(t, Options{DatastoreBytes: 10 * mib})
	w := browse(t, h)
	w.enter()
	w.want(http.StatusNotFound, http.MethodPut, w.url("/new/x"), strings.NewReader("x"))
	must(t, os.Mkdir(filepath.Join(h.o.Dir, "new"), 0o700))
	data := append(append(noise(300_001, 1), make([]byte, 500_000)...), noise(5, 2)...)
	w.want(http.StatusCreated, http.MethodPut, w.url("/new/x-flat.vmdk"), bytes.NewReader(data))
	_, p := w.want(http.StatusOK, http.MethodGet, w.url("/new/x-flat.vmdk"), nil)
	same(t, "uploaded", p, data)
	w.want(http.StatusOK, http.MethodPut, w.url("/new/x-flat.vmdk"), io.MultiReader(bytes.NewReader(data[:7000]))) // no length
	_, p = w.want(http.StatusOK, http.MethodGet, w.url("/new/x-flat.vmdk"), nil)
	same(t, "overwritten", p, data[:7000])

	// What cannot fit is refused at once; what turns out not to fit, when it does.
	w.want(http.StatusInsufficientStorage, http.MethodPut, w.url("/new/big"), bytes.NewReader(make([]byte, 11*mib)))
	w.want(http.StatusInsufficientStorage, http.MethodPut, w.url("/new/big-flat.vmdk"), io.MultiReader(bytes.NewReader(make([]byte, 30*mib))))
	fi, err := os.Stat(filepath.Join(h.o.Dir, "new/big-flat.vmdk"))
	if err != nil || fi.Size() == 0 || fi.Size() > 10*mib {
		t.Errorf("a full datastore left %v bytes: %v", fi.Size(), err)
	}
	w.want(http.StatusNoContent, http.MethodDelete, w.url("/new/big-flat.vmdk"), nil)
	w.want(http.StatusNotFound, http.MethodDelete, w.url("/new/big-flat.vmdk"), nil)
	w.want(http.StatusConflict, http.MethodDelete, w.url("/new"), nil)

	// An upload that breaks off leaves what came.
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, w.url("/new/short"), pr)
	must(t, err)
	req.ContentLength = 2 * mib
	broken := errors.New("the sender broke off")
	go func() {
		pw.Write(noise(mib, 9))
		pw.CloseWithError(broken)
	}()
	if _, err := w.client.Do(req); !errors.Is(err, broken) {
		t.Error(err)
	}
	short := filepath.Join(h.o.Dir, "new/short")
	for range 100 {
		if fi, err = os.Stat(short); err == nil && fi.Size() > 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil || fi.Size() == 0 || fi.Size() > mib {
		t.Errorf("a broken upload left %v: %v", fi, err)
	}
}

func TestFolderLocks(t *testing.T) {
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{ChangeTracking: true, PowerOn: true}))
	w := browse(t, h)
	w.enter()
	w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm.vmdk"), nil)
	w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm.vmx"), nil)
	for _, file := range []string{"vm-flat.vmdk", "vm-ctk.vmdk"} {
		w.want(http.StatusInternalServerError, http.MethodGet, w.url("/vm/"+file), nil)
		w.want(http.StatusInternalServerError, http.MethodPut, w.url("/vm/"+file), strings.NewReader("x"))
		w.want(http.StatusInternalServerError, http.MethodDelete, w.url("/vm/"+file), nil)
	}
	w.want(http.StatusInternalServerError, http.MethodPut, w.url("/vm/vm.vmx"), strings.NewReader("x"))
	c := login(t, h)
	vm, _ := vmOf(t, c, "vm")
	s := snapshot(t, c, vm, "s")
	_, before := w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm-flat.vmdk"), nil)
	must(t, h.WriteAt("vm", 0, noise(mib, 5), 0))
	_, after := w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm-flat.vmdk"), nil)
	same(t, "frozen", after, before)
	w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm-ctk.vmdk"), nil)
	w.want(http.StatusInternalServerError, http.MethodGet, w.url("/vm/vm-000001-sesparse.vmdk"), nil)
	w.want(http.StatusInternalServerError, http.MethodPut, w.url("/vm/vm-flat.vmdk"), strings.NewReader("x"))
	remove(t, vm, s, false)
	w.want(http.StatusInternalServerError, http.MethodGet, w.url("/vm/vm-flat.vmdk"), nil)
	must(t, h.PowerOff("vm"))
	_, p := w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm-flat.vmdk"), nil)
	same(t, "off", p, disk(t, h, "vm", 0))
}

func TestTransfersAtOnce(t *testing.T) {
	h := start(t, Options{MaxInFlight: 2})
	w := browse(t, h)
	w.enter()
	must(t, os.Mkdir(filepath.Join(h.o.Dir, "d"), 0o700))
	// Two uploads that do not end take both places.
	var uploads sync.WaitGroup
	var pipes []*io.PipeWriter
	for _, name := range []string{"a", "b"} {
		pr, pw := io.Pipe()
		pipes = append(pipes, pw)
		uploads.Go(func() {
			if res, p, err := w.do(http.MethodPut, w.url("/d/"+name), pr); err != nil || res.StatusCode != http.StatusCreated {
				t.Error(res, p, err)
			}
		})
		_, err := pw.Write(noise(600_000, 1))
		must(t, err)
	}
	w.want(http.StatusServiceUnavailable, http.MethodGet, w.url("/d/a"), nil)
	w.want(http.StatusOK, http.MethodHead, w.url("/d/a"), nil)
	for _, pw := range pipes {
		pw.Close()
	}
	uploads.Wait()
	_, p := w.want(http.StatusOK, http.MethodGet, w.url("/d/a"), nil)
	same(t, "a", p, noise(600_000, 1))
}

func TestTransferFaults(t *testing.T) {
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{}))
	w := browse(t, h)
	w.enter()
	flat := w.url("/vm/vm-flat.vmdk")
	inject := func(f Fault) {
		t.Helper()
		if _, err := h.Inject(f); err != nil {
			t.Fatal(err)
		}
	}
	want := disk(t, h, "vm", 0)
	inject(Fault{Kind: FaultDrop, After: 100_000, Count: 2, Skip: 1, Verb: "get", Path: "-flat"})
	w.want(http.StatusOK, http.MethodGet, w.url("/vm/vm.vmdk"), nil)
	w.want(http.StatusOK, http.MethodGet, flat, nil)
	h.ResetStats()
	for range 2 {
		_, p, err := w.do(http.MethodGet, flat, nil, "Range", "bytes=1000-999999")
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a dropped transfer ended with %v", err)
		}
		same(t, "until the drop", p, want[1000:101_000])
	}
	if s := h.Stats().Folder; s.BytesOut != 200_000 || s.Requests != 2 {
		t.Errorf("counted %+v", s)
	}
	w.want(http.StatusOK, http.MethodGet, flat, nil)

	inject(Fault{Kind: FaultDrop, After: 50_000, Verb: "PUT"})
	if _, _, err := w.do(http.MethodPut, w.url("/vm/up"), bytes.NewReader(noise(mib, 1))); err == nil {
		t.Error("a dropped upload was answered")
	}
	if fi, err := os.Stat(filepath.Join(h.o.Dir, "vm/up")); err != nil || fi.Size() != 50_000 {
		t.Errorf("a dropped upload left %v: %v", fi, err)
	}
	inject(Fault{Kind: FaultBusy, Count: 2})
	inject(Fault{Kind: FaultBusy, Status: 500})
	w.want(http.StatusServiceUnavailable, http.MethodGet, flat, nil)
	w.want(http.StatusServiceUnavailable, http.MethodGet, flat, nil)
	w.want(http.StatusInternalServerError, http.MethodGet, flat, nil)
	w.want(http.StatusOK, http.MethodGet, flat, nil)
	inject(Fault{Kind: FaultBusy, Count: -1})
	for range 3 {
		w.want(http.StatusServiceUnavailable, http.MethodGet, flat, nil)
	}
	h.ClearFaults()
	w.want(http.StatusOK, http.MethodGet, flat, nil)
	inject(Fault{Kind: FaultExpire})
	w.want(http.StatusUnauthorized, http.MethodGet, flat, nil)
	for _, f := range []Fault{{Kind: "nonsense"}, {Kind: FaultCall}, {Kind: FaultCall, Method: "*", Fault: "NoFault"}, {Kind: FaultDrop, Verb: "HEAD"}, {Kind: FaultCall, Method: "*", Fault: "VirtualDisk"}} {
		if _, err := h.Inject(f); err == nil {
			t.Errorf("%+v was taken", f)
		}
	}
}

func TestWrongPasswordsLockTheAccount(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	h := start(t, Options{Clock: clock, Password: "right"})
	w := browse(t, h)
	try := func(password string, want int) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, w.url("/"), nil)
		must(t, err)
		req.SetBasicAuth("root", password)
		res, err := w.client.Transport.RoundTrip(req) // without the cookies
		must(t, err)
		res.Body.Close()
		if res.StatusCode != want {
			t.Fatalf("%s: %s", password, res.Status)
		}
	}
	for range 4 {
		try("wrong", 401)
	}
	try("right", 200)
	for range 5 {
		try("wrong", 401)
	}
	try("right", 401)
	mu.Lock()
	now = now.Add(16 * time.Minute)
	mu.Unlock()
	try("right", 200)
}
