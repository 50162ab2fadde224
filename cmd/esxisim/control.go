package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"hikae/backup/esxisim"
)

// The control socket speaks HTTP: bodies stream, errors are a status and
// {"error": …}. A disk is read as frames {offset, length, data}, big endian, 8
// bytes each number, so that holes cost nothing; the last one has no data and
// stands at the disk's end.

const frameHead = 16

// ioStep is how much is written or read at a time.
const ioStep = 1 << 20

type control struct {
	h       *esxisim.Host
	path    string
	server  *http.Server
	serving sync.WaitGroup
}

// listenControl serves the control socket. It is made in a directory of its own
// first, where nobody else can open it before its mode is set.
func listenControl(h *esxisim.Host, path string) (*control, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close() //nolint:errcheck // it only knocked
		return nil, fmt.Errorf("another simulated host listens on %s", path)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".c")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "s")
	l, err := net.Listen("unix", tmp)
	if err != nil {
		return nil, fmt.Errorf("control socket (its path may have some hundred bytes at most; --control gives another): %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	c := &control{h: h, path: path}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /write", c.write)
	mux.HandleFunc("POST /become", c.become)
	mux.HandleFunc("GET /read", c.read)
	mux.HandleFunc("GET /stats", c.stats)
	mux.HandleFunc("POST /vm", c.vm)
	mux.HandleFunc("POST /crash", c.crash)
	mux.HandleFunc("POST /fault", c.fault)
	mux.HandleFunc("DELETE /fault", c.clear)
	c.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	c.serving.Go(func() { c.server.Serve(l) }) //nolint:errcheck // it ends with close
	return c, nil
}

func (c *control) close() error {
	err := c.server.Close()
	c.serving.Wait()
	return errors.Join(err, os.Remove(c.path))
}

func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusConflict)
		v = map[string]string{"error": err.Error()}
	}
	json.NewEncoder(w).Encode(v) //nolint:errcheck // the client hung up
}

func target(r *http.Request) (vm string, disk int, err error) {
	vm = r.URL.Query().Get("vm")
	if disk, err = strconv.Atoi(r.URL.Query().Get("disk")); err != nil {
		err = fmt.Errorf("a disk is a number, counted from 0 in the order of the controllers")
	}
	return vm, disk, err
}

func (c *control) write(w http.ResponseWriter, r *http.Request) {
	vm, disk, err := target(r)
	off, err2 := strconv.ParseInt(r.URL.Query().Get("offset"), 10, 64)
	if err = errors.Join(err, err2); err == nil {
		_, err = c.h.DiskSize(vm, disk) // for a write of nothing too
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	buf := make([]byte, ioStep)
	var done int64
	for {
		n, rerr := io.ReadFull(r.Body, buf)
		if n > 0 {
			if err := c.h.WriteAt(vm, disk, buf[:n], off+done); err != nil {
				reply(w, nil, fmt.Errorf("after %d bytes: %w", done, err))
				return
			}
			done += int64(n)
		}
		if rerr != nil {
			break
		}
	}
	reply(w, map[string]int64{"written": done}, nil)
}

func (c *control) become(w http.ResponseWriter, r *http.Request) {
	vm, disk, err := target(r)
	var n int64
	if err == nil {
		n, err = c.h.Become(r.Context(), vm, disk, r.URL.Query().Get("image"))
	}
	reply(w, map[string]any{"vm": vm, "disk": disk, "bytes_changed": n}, err)
}

func (c *control) read(w http.ResponseWriter, r *http.Request) {
	vm, disk, err := target(r)
	var size int64
	if err == nil {
		size, err = c.h.DiskSize(vm, disk)
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	buf := make([]byte, frameHead+ioStep)
	for off := int64(0); ; {
		start, end, err := c.h.NextData(r.Context(), vm, disk, off)
		if errors.Is(err, io.EOF) {
			break
		}
		n := min(end-start, ioStep)
		if err == nil {
			err = c.h.ReadAt(vm, disk, buf[frameHead:frameHead+n], start)
		}
		if err != nil {
			panic(http.ErrAbortHandler) // the client misses the last frame
		}
		putFrame(buf, start, n)
		if _, err := w.Write(buf[:frameHead+n]); err != nil {
			return
		}
		off = start + n
	}
	putFrame(buf, size, 0)
	w.Write(buf[:frameHead])
}

func putFrame(p []byte, off, n int64) {
	binary.BigEndian.PutUint64(p, uint64(off))
	binary.BigEndian.PutUint64(p[8:], uint64(n))
}

func (c *control) stats(w http.ResponseWriter, r *http.Request) {
	s := c.h.Stats()
	if r.URL.Query().Get("reset") == "true" {
		c.h.ResetStats()
	}
	reply(w, s, nil)
}

func (c *control) fault(w http.ResponseWriter, r *http.Request) {
	var f esxisim.Fault
	if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
		reply(w, nil, err)
		return
	}
	id, err := c.h.Inject(f)
	reply(w, map[string]string{"fault": id}, err)
}

func (c *control) clear(w http.ResponseWriter, _ *http.Request) {
	c.h.ClearFaults()
	reply(w, map[string]string{}, nil)
}
