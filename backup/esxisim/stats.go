package esxisim

import (
	"errors"
	"io"
	"net/http"
	"sync/atomic"
)

// way counts one way in, at the network's edge.
type way struct{ requests, out, in atomic.Int64 }

func (w *way) read() Way {
	return Way{Requests: w.requests.Load(), BytesOut: w.out.Load(), BytesIn: w.in.Load()}
}

func (w *way) reset() {
	w.requests.Store(0)
	w.out.Store(0)
	w.in.Store(0)
}

// Stats are the counters since the start or the last ResetStats.
func (h *Host) Stats() Stats {
	s := Stats{Folder: h.folderWay.read(), SOAP: h.soapWay.read()}
	if h.ssh != nil {
		s.SSH = h.ssh.way.read()
	}
	return s
}

// ResetStats sets the counters to zero.
func (h *Host) ResetStats() {
	h.folderWay.reset()
	h.soapWay.reset()
	if h.ssh != nil {
		h.ssh.way.reset()
	}
}

// count wraps a handler so that what passes is counted.
func (w *way) count(next http.HandlerFunc) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		w.requests.Add(1)
		r.Body = &countedBody{ReadCloser: r.Body, n: &w.in}
		next(&countedWriter{ResponseWriter: rw, n: &w.out}, r)
	}
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

type countedWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w *countedWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.n.Add(int64(n))
	return n, err
}

// ReadFrom copies in larger pieces than io.Copy would.
func (w *countedWriter) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, 256<<10))
}

// Unwrap lets http.ResponseController find what it needs.
func (w *countedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// errDropped ends a transfer that a fault cuts.
var errDropped = errors.New("connection dropped by an injected fault")

// cutWriter lets so many bytes of a body pass.
type cutWriter struct {
	http.ResponseWriter
	left int64
}

func (w *cutWriter) Write(p []byte) (int, error) {
	if int64(len(p)) < w.left {
		w.left -= int64(len(p))
		return w.ResponseWriter.Write(p)
	}
	n, err := w.ResponseWriter.Write(p[:w.left])
	w.left = 0
	if err == nil {
		err = errDropped
	}
	return n, err
}

func (w *cutWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// cutBody is the same for a body that comes in.
type cutBody struct {
	io.ReadCloser
	left int64
}

func (b *cutBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errDropped
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}
