package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"hikae/sched/history"
)

// askTimeout is for one request; the daemon answers all of them at once.
const askTimeout = 30 * time.Second

// Client asks a daemon. It may be used by many goroutines.
type Client struct {
	path string
	http *http.Client
}

// NewClient makes a client for the daemon that listens at path. It connects when
// it is asked something. Without a daemon all methods fail with ErrNoDaemon.
func NewClient(path string) *Client {
	return &Client{path: path, http: &http.Client{
		Timeout: askTimeout,
		Transport: &http.Transport{
			MaxIdleConns: 1, IdleConnTimeout: 10 * time.Second,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				if err := checkPath(path); err != nil {
					return nil, err
				}
				return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", path)
			},
		},
	}}
}

// Close gives up connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks how things stand.
func (c *Client) Status(ctx context.Context) (st Status, err error) {
	return st, c.ask(ctx, http.MethodGet, "/v1/status", nil, &st)
}

// Jobs asks for the jobs.
func (c *Client) Jobs(ctx context.Context) (j Jobs, err error) {
	return j, c.ask(ctx, http.MethodGet, "/v1/jobs", nil, &j)
}

// Runs asks for a page of runs; q.VM is not looked at.
func (c *Client) Runs(ctx context.Context, q Query) (p history.RunPage, err error) {
	q.VM = ""
	return p, c.ask(ctx, http.MethodGet, "/v1/history?"+q.values().Encode(), nil, &p)
}

// Tasks asks for a page of what was done with the VM q.VM.
func (c *Client) Tasks(ctx context.Context, q Query) (p history.TaskPage, err error) {
	return p, c.ask(ctx, http.MethodGet, "/v1/history?"+q.values().Encode(), nil, &p)
}

func (q Query) values() url.Values {
	v := url.Values{}
	for key, value := range map[string]string{"job": q.Job, "vm": q.VM, "state": q.State} {
		if value != "" {
			v.Set(key, value)
		}
	}
	if q.Page > 0 {
		v.Set("page", strconv.FormatUint(q.Page, 10))
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// Run asks for a run in full.
func (c *Client) Run(ctx context.Context, id uint64) (d RunDetail, err error) {
	return d, c.ask(ctx, http.MethodGet, fmt.Sprintf("/v1/runs/%d", id), nil, &d)
}

// Start starts a run of a job and returns its number; when one is under way
// already the error is ErrActive, with the number of that one.
func (c *Client) Start(ctx context.Context, job string, now bool) (uint64, error) {
	var s started
	err := c.ask(ctx, http.MethodPost, "/v1/jobs/"+url.PathEscape(job)+"/run", runRequest{Now: now}, &s)
	var e *Error
	if errors.As(err, &e) {
		return e.Run, err
	}
	return s.Run, err
}

// Cancel ends a run, or with vm (HOST/VM) only that of it.
func (c *Client) Cancel(ctx context.Context, id uint64, vm string) error {
	return c.ask(ctx, http.MethodPost, fmt.Sprintf("/v1/runs/%d/cancel", id), cancelRequest{VM: vm}, &struct{}{})
}

func (c *Client) ask(ctx context.Context, method, path string, in, out any) error {
	var send io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("ask the daemon: %w", err)
		}
		send = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://hikae"+path, send)
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s: start it with hikae daemon (systemctl start hikae), or say where it listens with --socket", ErrNoDaemon, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the daemon at %s belongs to another user; be that user: %w", c.path, fs.ErrPermission)
	case err != nil:
		return fmt.Errorf("ask the daemon at %s: %w", c.path, err)
	}
	defer resp.Body.Close()
	d := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode != http.StatusOK {
		var e Error
		if d.Decode(&e) != nil || e.Text == "" {
			return fmt.Errorf("the daemon at %s answers %s", c.path, resp.Status)
		}
		return &e
	}
	if err := d.Decode(out); err != nil {
		return fmt.Errorf("read the answer of the daemon at %s: %w", c.path, err)
	}
	return nil
}
