package esxisim

import (
	"errors"
	"fmt"
	"html"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/soap"

	"hikae/backup/esxisim/internal/hv"
)

const (
	folderPath     = "/folder"
	datacenterName = "ha-datacenter"
)

// serve is everything on the host's port. Paths are taken as they come: no
// cleaning, no redirects.
func (h *Host) serve(w http.ResponseWriter, r *http.Request) {
	if !h.enter() {
		panic(http.ErrAbortHandler)
	}
	defer h.leave()
	switch p := r.URL.Path; {
	case p == "/sdk" || p == "/sdk/" || p == "/sdk/vimService":
		h.soapWay.count(h.serveSDK)(w, r)
	case p == "/sdk/vimServiceVersions.xml":
		h.model.Service.ServiceVersions(w, r)
	case p == folderPath || strings.HasPrefix(p, folderPath+"/"):
		h.folderWay.count(h.serveFolder)(w, r)
	case p == "/" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintln(w, "<html><head><title>hikae simulated ESXi host</title></head></html>")
	default:
		http.NotFound(w, r)
	}
}

// serveFolder is /folder: the datastore over HTTPS, for the free licence too.
func (h *Host) serveFolder(w http.ResponseWriter, r *http.Request) {
	if !h.admit(w, r) {
		return
	}
	rel := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, folderPath), "/")
	for part := range strings.SplitSeq(rel, "/") {
		if part == ".." {
			http.Error(w, "a path must not lead upwards", http.StatusBadRequest)
			return
		}
	}
	q := r.URL.Query()
	dc, ds := q.Get("dcPath"), q.Get("dsName")
	if dc != "" && strings.Trim(dc, "/") != datacenterName || ds != "" && ds != datastoreName || ds == "" && rel != "" {
		http.Error(w, "no such datacenter or datastore", http.StatusNotFound)
		return
	}
	if ds == "" {
		h.listTop(w, r, dc)
		return
	}
	rel, err := h.hv.Clean(rel)
	if err != nil {
		h.refuse(w, err)
		return
	}
	h.log.Debug("folder", "method", r.Method, "path", rel, "range", r.Header.Get("Range"))
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		h.get(w, r, rel)
	case http.MethodPut:
		h.put(w, r, rel)
	case http.MethodDelete:
		err := h.hv.Remove(rel)
		h.refreshDatastore()
		if err != nil {
			h.refuse(w, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	default:
		w.Header().Set("Allow", "GET, HEAD, PUT, DELETE")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	}
}

// admit asks for a session's cookie or, at the cost of a new session, for the
// password. Using /folder does not keep a session alive.
func (h *Host) admit(w http.ResponseWriter, r *http.Request) bool {
	if key := sessionCookie(r); key != "" && h.sessions.valid(key, false) {
		return true
	}
	if user, password, ok := r.BasicAuth(); ok && h.sessions.check(user, password, h.o.User, h.o.Password) {
		key, alive := h.sessions.shared()
		if !alive {
			var err error
			if key, err = h.newSession(); err != nil {
				h.log.Error("cannot make a session", "err", err)
				http.Error(w, "cannot make a session", http.StatusServiceUnavailable)
				return false
			}
			h.sessions.share(key)
		}
		http.SetCookie(w, &http.Cookie{Name: soap.SessionCookieName, Value: key, Path: "/", HttpOnly: true, Secure: true})
		return true
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="VMware HTTP server"`)
	http.Error(w, "authentication required", http.StatusUnauthorized)
	return false
}

// refuse answers an error of the datastore's.
func (h *Host) refuse(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError // what ESXi answers to nearly everything, locked files among them
	switch {
	case errors.Is(err, hv.ErrNotFound):
		status = http.StatusNotFound
	case errors.Is(err, hv.ErrNoSpace):
		status = http.StatusInsufficientStorage
	case errors.Is(err, hv.ErrPath):
		status = http.StatusBadRequest
	case errors.Is(err, hv.ErrNotEmpty), errors.Is(err, hv.ErrExists):
		status = http.StatusConflict
	}
	http.Error(w, err.Error(), status)
}

// occupy takes one of the places for transfers; without one the answer is 503.
func (h *Host) occupy(w http.ResponseWriter, r *http.Request, rel string) (release func(), ok bool) {
	if f, hit := h.faults.transfer(FaultBusy, r.Method, rel); hit {
		status := f.Status
		if status == 0 {
			status = http.StatusServiceUnavailable
		}
		http.Error(w, "injected fault: busy", status)
		return nil, false
	}
	select {
	case h.transfer <- struct{}{}:
		return func() { <-h.transfer }, true
	default:
		http.Error(w, "too many requests in flight", http.StatusServiceUnavailable)
		return nil, false
	}
}

func (h *Host) get(w http.ResponseWriter, r *http.Request, rel string) {
	fi, err := h.hv.Stat(rel)
	if err != nil {
		h.refuse(w, err)
		return
	}
	if fi.IsDir() {
		h.listDir(w, r, rel)
		return
	}
	if r.Method == http.MethodGet {
		release, ok := h.occupy(w, r, rel)
		if !ok {
			return
		}
		defer release()
	}
	f, err := h.hv.Open(rel)
	if err != nil {
		h.refuse(w, err)
		return
	}
	defer f.Close()
	var cut *cutWriter
	if r.Method == http.MethodGet {
		if fault, hit := h.faults.transfer(FaultDrop, r.Method, rel); hit {
			cut = &cutWriter{w, fault.After}
			w = cut
		}
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", fi.ModTime(), f)
	if cut != nil && cut.left == 0 {
		h.hangUp(w, rel)
	}
}

// hangUp cuts the connection after what was sent.
func (h *Host) hangUp(w http.ResponseWriter, rel string) {
	h.log.Info("injected fault: connection dropped", "path", rel)
	if err := http.NewResponseController(w).Flush(); err != nil {
		h.log.Debug("flush", "err", err)
	}
	panic(http.ErrAbortHandler)
}

func (h *Host) put(w http.ResponseWriter, r *http.Request, rel string) {
	release, ok := h.occupy(w, r, rel)
	if !ok {
		return
	}
	defer release()
	body := r.Body
	if fault, hit := h.faults.transfer(FaultDrop, r.Method, rel); hit {
		body = &cutBody{body, fault.After}
	}
	created, err := h.hv.Put(rel, body, r.ContentLength)
	h.refreshDatastore()
	switch {
	case errors.Is(err, errDropped):
		h.hangUp(w, rel)
	case err != nil:
		h.refuseBody(w, r, err)
	case created:
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusOK)
	}
}

// refuseBody refuses an upload while it comes in. Closing the connection with
// bytes of it unread would reset it, and the sender might never see the answer:
// so the answer goes out first, and the rest is read, for a while.
func (h *Host) refuseBody(w http.ResponseWriter, r *http.Request, err error) {
	c := http.NewResponseController(w)
	if e := c.EnableFullDuplex(); e != nil {
		h.log.Debug("refusing an upload", "err", e)
	}
	enough := time.AfterFunc(5*time.Second, func() { c.SetReadDeadline(time.Unix(1, 0)) }) //nolint:errcheck // then it ends by itself
	defer enough.Stop()
	w.Header().Set("Connection", "close")
	h.refuse(w, err)
	if e := c.Flush(); e == nil {
		io.Copy(io.Discard, r.Body) //nolint:errcheck // whatever ends it
	}
}

// listTop lists the datacenters, or, below the only one, the datastores.
func (h *Host) listTop(w http.ResponseWriter, r *http.Request, dc string) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	if dc == "" {
		listing(w, "Datacenters", "", []link{{datacenterName, "/folder?dcPath=" + datacenterName, "", ""}})
		return
	}
	listing(w, "Datastores in "+datacenterName, "/folder",
		[]link{{datastoreName, "/folder?" + query(), "", ""}})
}

func query() string {
	return url.Values{"dcPath": {datacenterName}, "dsName": {datastoreName}}.Encode()
}

func (h *Host) listDir(w http.ResponseWriter, r *http.Request, rel string) {
	list, err := h.hv.List(rel)
	if err != nil {
		h.refuse(w, err)
		return
	}
	href := func(rel string) string {
		if rel == "." {
			return folderPath + "?" + query()
		}
		return (&url.URL{Path: folderPath + "/" + rel}).EscapedPath() + "?" + query()
	}
	up := folderPath + "?dcPath=" + datacenterName
	if rel != "." {
		up = href(path.Dir(rel))
	}
	var links []link
	for _, fi := range list {
		links = append(links, newLink(fi, href(path.Join(rel, fi.Name()))))
	}
	listing(w, "Index of "+strings.TrimPrefix(rel, ".")+" on datastore "+datastoreName, up, links)
}

type link struct{ name, href, time, size string }

func newLink(fi fs.FileInfo, href string) link {
	l := link{fi.Name(), href, fi.ModTime().UTC().Format("02-Jan-2006 15:04"), "-"}
	if fi.IsDir() {
		l.name += "/"
	} else {
		l.size = fmt.Sprint(fi.Size())
	}
	return l
}

// listing writes a directory as ESXi does: HTML, a line an entry.
func listing(w http.ResponseWriter, title, up string, links []link) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	title = html.EscapeString(title)
	fmt.Fprintf(w, "<!DOCTYPE html>\n<html><head><title>%s</title></head>\n<body><h1>%s</h1>\n<table>\n"+
		"<tr><th>Name</th><th>Last modified</th><th>Size</th></tr>\n", title, title)
	if up != "" {
		fmt.Fprintf(w, "<tr><td><a href=\"%s\">Parent Directory</a></td><td></td><td>-</td></tr>\n", html.EscapeString(up))
	}
	for _, l := range links {
		fmt.Fprintf(w, "<tr><td><a href=\"%s\">%s</a></td><td align=\"right\">%s</td><td align=\"right\">%s</td></tr>\n",
			html.EscapeString(l.href), html.EscapeString(l.name), l.time, l.size)
	}
	fmt.Fprintln(w, "</table></body></html>")
}
