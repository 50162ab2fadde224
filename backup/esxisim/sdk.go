package esxisim

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxisim/internal/hv"
)

// Every SOAP call comes through here first. What a method of this host's own
// answers (handlers) never reaches govmomi's simulator; of the rest only what
// reads does: property collectors, views, searches, sessions. Everything else
// is refused, so that no call can change the simulator's idea of a VM behind
// the back of the files.

// maxCall bounds a SOAP request, in bytes.
const maxCall = 8 << 20

// call is one SOAP call to a handler.
type call struct {
	h    *Host
	ctx  *simulator.Context // one a call: it holds the simulator's object locks
	name string
	this types.ManagedObjectReference
	task taskFault // what an injected fault does to the task
}

type taskFault struct {
	err   error
	delay time.Duration
}

// handler answers a call with a pointer to the method's Response type.
type handler func(c *call, body any) (any, error)

// passing are the methods that change nothing of a VM, a disk or a file, and
// that the simulator answers; reading adds those known by their first word.
var passing = map[string]bool{
	"Login": true, "Logout": true, "CurrentTime": true, "SessionIsActive": true, "Fetch": true,
	"ContinueRetrievePropertiesEx": true, "CancelRetrievePropertiesEx": true,
	"CreateFilter": true, "DestroyPropertyFilter": true, "CreatePropertyCollector": true, "DestroyPropertyCollector": true,
	"WaitForUpdates": true, "WaitForUpdatesEx": true, "CheckForUpdates": true, "CancelWaitForUpdates": true,
	"CreateContainerView": true, "CreateListView": true, "CreateListViewFromView": true, "CreateInventoryView": true,
	"DestroyView": true, "ModifyListView": true, "ResetListView": true, "ResetListViewFromView": true,
	"OpenInventoryViewFolder": true, "CloseInventoryViewFolder": true,
	"CreateCollectorForEvents": true, "CreateCollectorForTasks": true, "DestroyCollector": true, "ResetCollector": true,
	"RewindCollector": true, "SetCollectorPageSize": true, "HasPrivilegeOnEntities": true,
}

// readers are methods of this host's own that the free licence allows too.
var readers = map[string]bool{
	"SearchDatastore_Task": true, "SearchDatastoreSubFolders_Task": true, "RefreshDatastore": true,
	"RefreshStorageInfo": true, "QueryChangedDiskAreas": true, "QueryVirtualDiskUuid": true,
}

// licensed are methods the simulator answers that the free licence refuses.
var licensed = map[string]bool{"TerminateSession": true, "UpdateOptions": true}

// own are the types of objects that only this host's own methods serve.
var own = map[string]bool{
	"VirtualMachine": true, "VirtualMachineSnapshot": true, "FileManager": true, "VirtualDiskManager": true,
	"HostDatastoreBrowser": true, "HostDatastoreSystem": true,
}

func reading(method string) bool {
	if passing[method] || readers[method] {
		return true
	}
	for _, word := range []string{"Retrieve", "Query", "Find", "Read"} {
		if strings.HasPrefix(method, word) {
			return true
		}
	}
	return false
}

// serveSDK is POST /sdk.
func (h *Host) serveSDK(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "POST only", http.StatusMethodNotAllowed)
		return
	}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxCall))
	if err != nil {
		http.Error(w, "cannot read the request", http.StatusBadRequest)
		return
	}
	m, err := simulator.UnmarshalBody(types.TypeFunc(), text)
	if err != nil {
		h.fail(w, soapError{&types.InvalidRequest{}, err.Error()})
		return
	}
	fault, hit := h.faults.call(m.Name)
	if hit {
		h.log.Info("injected fault", "method", m.Name, "fault", fault.Fault, "delay", fault.Delay, "lost", fault.Lost, "in_task", fault.InTask)
		if !fault.InTask {
			h.pause(fault.Delay)
			if err := injected(fault); err != nil {
				h.fail(w, err)
				return
			}
		}
	}
	if fault.Lost { // carried out, but nobody hears of it
		h.dispatch(httptest.NewRecorder(), r, m, text, fault)
		panic(http.ErrAbortHandler)
	}
	h.dispatch(w, r, m, text, fault)
}

func (h *Host) dispatch(w http.ResponseWriter, r *http.Request, m *simulator.Method, text []byte, fault Fault) {
	cookie := sessionCookie(r)
	in := cookie != "" && h.sessions.valid(cookie, true)
	if !in || m.Name == "Login" {
		r = r.Clone(r.Context())
		r.Header.Del("Cookie") // the simulator would believe it
		switch m.Name {
		case "Login", "RetrieveServiceContent", "RetrieveProperties", "RetrievePropertiesEx":
		default:
			h.fail(w, notAuthenticated(m.This))
			return
		}
	}
	if h.o.Free && !reading(m.Name) {
		h.fail(w, restricted())
		return
	}
	if serve, ok := handlers[m.Name]; ok {
		c := &call{h: h, ctx: h.context(), name: m.Name, this: m.This}
		if fault.InTask {
			c.task = taskFault{injected(fault), fault.Delay}
		}
		res, err := serve(c, m.Body)
		if err != nil {
			h.fail(w, err)
			return
		}
		h.answer(w, m.Name, res)
		return
	}
	if own[m.This.Type] || !reading(m.Name) && !licensed[m.Name] {
		h.fail(w, unsupported(m.Name))
		return
	}
	switch m.Name {
	case "Login":
		h.login(w, r, m.Body.(*types.Login), text)
	case "Logout":
		h.delegate(w, r, text)
		h.sessions.remove(cookie)
	case "WaitForUpdates", "WaitForUpdatesEx":
		h.wait(w, r, m, cookie, text)
		h.sessions.valid(cookie, true) // a client that waits is not idle
	default:
		if err := h.exists(m); err != nil {
			h.fail(w, err)
			return
		}
		h.world.RLock()
		defer h.world.RUnlock()
		h.delegate(w, r, text)
	}
}

// exists refuses calls to objects and methods there are not, which the
// simulator would write to the process's log.
func (h *Host) exists(m *simulator.Method) error {
	if strings.Contains(m.This.Value, "session[") {
		return nil // kept with the session, out of sight
	}
	obj := h.model.Map().Get(m.This)
	if obj == nil {
		return gone(m.This)
	}
	if m.Name != "Fetch" && !reflect.ValueOf(obj).MethodByName(strings.Replace(m.Name, "_Task", "Task", 1)).IsValid() {
		return soapError{&types.MethodNotFound{Receiver: m.This, Method: m.Name}, fmt.Sprintf("%s does not implement %s", m.This, m.Name)}
	}
	return nil
}

// delegate lets the simulator answer.
func (h *Host) delegate(w http.ResponseWriter, r *http.Request, text []byte) {
	r = r.Clone(r.Context())
	r.URL.Path = vim25.Path
	r.Body = io.NopCloser(bytes.NewReader(text))
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	h.model.Service.ServeSDK(w, r)
}

func sessionCookie(r *http.Request) string {
	c, err := r.Cookie(soap.SessionCookieName)
	if err != nil {
		return ""
	}
	return strings.Trim(c.Value, `"`)
}

// login checks the password and lets the simulator make the session.
func (h *Host) login(w http.ResponseWriter, r *http.Request, req *types.Login, text []byte) {
	if !h.sessions.check(req.UserName, req.Password, h.o.User, h.o.Password) {
		h.fail(w, soapError{&types.InvalidLogin{}, "Cannot complete login due to an incorrect user name or password."})
		return
	}
	rec := httptest.NewRecorder()
	h.delegate(rec, r, text)
	res := rec.Result()
	for _, c := range res.Cookies() {
		if c.Name == soap.SessionCookieName {
			h.sessions.add(c.Value)
			http.SetCookie(w, &http.Cookie{Name: c.Name, Value: c.Value, Path: "/", HttpOnly: true, Secure: true})
		}
	}
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.WriteHeader(res.StatusCode)
	io.Copy(w, res.Body) //nolint:errcheck // a client that hung up needs no answer
}

// newSession makes a session for a login that was no SOAP call.
func (h *Host) newSession() (string, error) {
	text, err := encodeCall("Login", &types.Login{This: *h.content().SessionManager, UserName: h.o.User, Password: h.o.Password})
	if err != nil {
		return "", err
	}
	rec := httptest.NewRecorder()
	h.delegate(rec, httptest.NewRequest(http.MethodPost, vim25.Path, nil), text)
	for _, c := range rec.Result().Cookies() {
		if c.Name == soap.SessionCookieName {
			h.sessions.add(c.Value)
			return c.Value, nil
		}
	}
	return "", fmt.Errorf("no session: %d", rec.Code)
}

// endSession makes the simulator forget a session, and those who wait in it stop.
func (h *Host) endSession(key string) {
	h.waits.mu.Lock()
	stops := h.waits.stops[key]
	for _, stop := range stops {
		close(stop)
	}
	delete(h.waits.stops, key)
	h.waits.mu.Unlock()
	if len(stops) == 0 {
		h.terminate(key)
	} // else the last of them does it: without the session a wait could not be cancelled
}

func (h *Host) terminate(key string) {
	ctx := h.context()
	ctx.Session = &simulator.Session{UserSession: types.UserSession{Key: "esxisim"}, Registry: simulator.NewRegistry(), Map: ctx.Map}
	ctx.Map.SessionManager().TerminateSession(ctx, &types.TerminateSession{SessionId: []string{key}})
}

// waits are the calls that stay open until something changes, by session.
type waits struct {
	mu    sync.Mutex
	stops map[string][]chan struct{}
}

func (w *waits) begin(key string) chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	stop := make(chan struct{})
	w.stops[key] = append(w.stops[key], stop)
	return stop
}

// end tells whether the session ended meanwhile.
func (w *waits) end(key string, stop chan struct{}) (ended bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(w.stops[key], stop)
	if i < 0 {
		return true
	}
	w.stops[key] = slices.Delete(w.stops[key], i, i+1)
	if len(w.stops[key]) == 0 {
		delete(w.stops, key)
	}
	return false
}

// wait passes on a call that stays open until something changes. The simulator
// notices neither a client that hung up, nor a session that ended, nor a host
// that closes: then it is told to cancel.
func (h *Host) wait(w http.ResponseWriter, r *http.Request, m *simulator.Method, key string, text []byte) {
	stop := h.waits.begin(key)
	done := make(chan struct{})
	var mu sync.Mutex // while a cancel is on its way this wait does not return: it would hit the next one
	cookie := r.Header.Get("Cookie")
	h.running.Go(func() {
		select {
		case <-done:
			return
		case <-stop:
		case <-r.Context().Done():
		case <-h.ctx.Done():
		}
		cancel, err := encodeCall("CancelWaitForUpdates", &types.CancelWaitForUpdates{This: m.This})
		if err != nil {
			h.log.Error("cannot cancel a wait", "err", err)
			return
		}
		for { // the wait may be just about to begin
			mu.Lock()
			select {
			case <-done:
				mu.Unlock()
				return
			default:
			}
			req := httptest.NewRequest(http.MethodPost, vim25.Path, nil)
			req.Header.Set("Cookie", cookie)
			h.delegate(httptest.NewRecorder(), req, cancel)
			mu.Unlock()
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	rec := httptest.NewRecorder()
	h.delegate(rec, r, text)
	mu.Lock()
	close(done)
	mu.Unlock()
	if h.waits.end(key, stop) {
		h.terminate(key)
		h.fail(w, notAuthenticated(m.This))
		return
	}
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.WriteHeader(rec.Code)
	w.Write(rec.Body.Bytes())
}

// encodeCall makes the text of a SOAP request.
func encodeCall(name string, req any) ([]byte, error) {
	b := body{value: req}
	b.name.Space, b.name.Local = "urn:vim25", name
	return encode(b)
}

func (h *Host) context() *simulator.Context { return h.model.Service.Context.For(vim25.Path) }

func (h *Host) content() types.ServiceContent {
	return h.model.Map().Get(vim25.ServiceInstance).(*simulator.ServiceInstance).Content
}

// vm is the VM a call is for.
func (c *call) vm() (*hv.VM, error) { return c.h.vmOf(c.this) }

func (h *Host) vmOf(ref types.ManagedObjectReference) (*hv.VM, error) {
	if ref.Type != "VirtualMachine" {
		return nil, unsupported(ref.Type)
	}
	id, err := strconv.Atoi(ref.Value)
	if err == nil {
		if vm := h.hv.VM(id); vm != nil {
			return vm, nil
		}
	}
	return nil, gone(ref)
}

// snapshotOf finds a snapshot and its VM.
func (h *Host) snapshotOf(ref types.ManagedObjectReference) (*hv.VM, int, error) {
	vmID, id, ok := strings.Cut(ref.Value, "-snapshot-")
	n, err := strconv.Atoi(id)
	if ref.Type != "VirtualMachineSnapshot" || !ok || err != nil || h.model.Map().Get(ref) == nil {
		return nil, 0, gone(ref)
	}
	vm, err := h.vmOf(types.ManagedObjectReference{Type: "VirtualMachine", Value: vmID})
	return vm, n, err
}

func snapshotRef(vm, id int) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: fmt.Sprintf("%d-snapshot-%d", vm, id)}
}

func vmRef(id int) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachine", Value: strconv.Itoa(id)}
}
