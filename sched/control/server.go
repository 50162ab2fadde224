package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"hikae/repo"
	"hikae/sched"
	"hikae/sched/history"
)

// Options of NewHandler. All but Logger are required.
type Options struct {
	Scheduler Scheduler
	History   *history.DB
	Daemon    func() Daemon // says who answers
	Logger    *slog.Logger  // nil is silence
}

// server answers requests.
type server struct {
	o Options
}

// NewHandler answers the requests that the package's documentation lists.
func NewHandler(o Options) http.Handler {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &server{o}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.answer(s.status))
	mux.HandleFunc("GET /v1/jobs", s.answer(s.jobs))
	mux.HandleFunc("GET /v1/history", s.answer(s.history))
	mux.HandleFunc("GET /v1/runs/{id}", s.answer(s.run))
	mux.HandleFunc("POST /v1/jobs/{name}/run", s.answer(s.start))
	mux.HandleFunc("POST /v1/runs/{id}/cancel", s.answer(s.cancel))
	mux.HandleFunc("/", s.answer(func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return nil, &Error{Code: codeNotFound, Text: fmt.Sprintf("there is no %s %s", r.Method, r.URL.Path)}
	}))
	return mux
}

// Serve answers on l until ctx ends; requests under way then have five seconds.
// It closes l.
func Serve(ctx context.Context, l *Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: time.Minute, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // of clients that went away
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	var err error
	select {
	case err = <-ended:
		err = fmt.Errorf("answer on %s: %w", l.path, err)
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
		if e := <-ended; !errors.Is(e, http.ErrServerClosed) {
			err = e
		}
	}
	return errors.Join(err, l.Close())
}

// answer turns what a request came to into an answer.
func (s *server) answer(f func(http.ResponseWriter, *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := f(w, r)
		status := http.StatusOK
		if err != nil {
			e := errorOf(err)
			status = map[string]int{
				codeBad: http.StatusBadRequest, codeNotFound: http.StatusNotFound, codeActive: http.StatusConflict,
				codeTooLong: http.StatusRequestEntityTooLarge, codeStopping: http.StatusServiceUnavailable,
			}[e.Code]
			if status == 0 {
				status = http.StatusInternalServerError
				s.o.Logger.Error("a request failed", "request", r.Method+" "+r.URL.Path, "error", err)
			}
			v = e
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v) // fails when the client went away
	}
}

// errorOf finds the code of an error.
func errorOf(err error) *Error {
	var e *Error
	var long *http.MaxBytesError
	code := codeInternal
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &long):
		code = codeTooLong
	case errors.Is(err, sched.ErrStopped):
		code = codeStopping
	case errors.Is(err, sched.ErrNoJob), errors.Is(err, sched.ErrNoRun), errors.Is(err, history.ErrNotFound):
		code = codeNotFound
	case errors.Is(err, sched.ErrActive):
		code = codeActive
	}
	return &Error{Code: code, Text: err.Error()}
}

func bad(format string, args ...any) error {
	return &Error{Code: codeBad, Text: fmt.Sprintf(format, args...)}
}

func (s *server) status(http.ResponseWriter, *http.Request) (any, error) {
	st, err := s.o.Scheduler.Status()
	return Status{Daemon: s.o.Daemon(), Status: st}, err
}

func (s *server) jobs(http.ResponseWriter, *http.Request) (any, error) {
	st, err := s.o.Scheduler.Status()
	return Jobs{Jobs: st.Jobs}, err
}

func (s *server) history(_ http.ResponseWriter, r *http.Request) (any, error) {
	v := r.URL.Query()
	q := history.Query{Job: v.Get("job"), State: v.Get("state")}
	var err error
	if page := v.Get("page"); page != "" {
		if q.Before, err = strconv.ParseUint(page, 10, 64); err != nil {
			return nil, bad("page %q is no number", page)
		}
	}
	if limit := v.Get("limit"); limit != "" {
		if q.Limit, err = strconv.Atoi(limit); err != nil || q.Limit < 1 || q.Limit > maxPage {
			return nil, bad("limit %q is no number from 1 to %d", limit, maxPage)
		}
	}
	vm := v.Get("vm")
	if vm == "" {
		page, err := s.o.History.Runs(q)
		if page.Runs == nil {
			page.Runs = []history.Run{}
		}
		return page, err
	}
	id, err := repo.ParseVMID(vm)
	if err != nil {
		return nil, bad("vm: %v", err)
	}
	q.Host, q.VM = id.Host, id.Name
	page, err := s.o.History.TasksOf(q)
	if page.Tasks == nil {
		page.Tasks = []history.Task{}
	}
	return page, err
}

func runID(r *http.Request) (uint64, error) {
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 64)
	if err != nil || id == 0 {
		return 0, bad("%q is not the number of a run", r.PathValue("id"))
	}
	return id, nil
}

func (s *server) run(_ http.ResponseWriter, r *http.Request) (any, error) {
	id, err := runID(r)
	if err != nil {
		return nil, err
	}
	d := RunDetail{Active: []sched.TaskStatus{}}
	if d.Run, err = s.o.History.Run(id); err != nil {
		if errors.Is(err, history.ErrNotFound) {
			err = &Error{Code: codeNotFound, Text: fmt.Sprintf("there is no run %d", id)}
		}
		return nil, err
	}
	if d.Tasks, err = s.o.History.Tasks(id); err != nil {
		return nil, err
	}
	if d.Tasks == nil {
		d.Tasks = []history.Task{}
	}
	if history.Ended(d.Run.State) {
		return d, nil
	}
	st, err := s.o.Scheduler.Status()
	if errors.Is(err, sched.ErrStopped) {
		return d, nil
	}
	for _, run := range st.Running {
		if run.ID == id {
			d.Active = run.Active
		}
	}
	return d, err
}

// body reads a request's JSON; none leaves v as it is.
func body(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	var long *http.MaxBytesError
	switch {
	case err == nil && d.More():
		return bad("the request has more than one JSON object")
	case err == nil, errors.Is(err, io.EOF):
		return nil
	case errors.As(err, &long):
		return &Error{Code: codeTooLong, Text: fmt.Sprintf("the request is longer than %d bytes", maxBody)}
	}
	return bad("the request cannot be read: %v", err)
}

func (s *server) start(w http.ResponseWriter, r *http.Request) (any, error) {
	var req runRequest
	if err := body(w, r, &req); err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	id, err := s.o.Scheduler.Run(name, req.Now)
	switch {
	case errors.Is(err, sched.ErrActive):
		return nil, &Error{Code: codeActive, Text: fmt.Sprintf("job %s is already under way, as run %d", name, id), Run: id}
	case errors.Is(err, sched.ErrNoJob):
		return nil, &Error{Code: codeNotFound, Text: fmt.Sprintf("there is no job %q", name)}
	}
	return started{Run: id}, err
}

func (s *server) cancel(w http.ResponseWriter, r *http.Request) (any, error) {
	id, err := runID(r)
	if err != nil {
		return nil, err
	}
	var req cancelRequest
	if err := body(w, r, &req); err != nil {
		return nil, err
	}
	var vm *repo.VMID
	what := fmt.Sprintf("run %d", id)
	if req.VM != "" {
		v, err := repo.ParseVMID(req.VM)
		if err != nil {
			return nil, bad("vm: %v", err)
		}
		vm, what = &v, what+" of "+req.VM
	}
	err = s.o.Scheduler.Cancel(id, vm)
	if errors.Is(err, sched.ErrNoRun) {
		return nil, &Error{Code: codeNotFound, Text: what + " is not queued or under way"}
	}
	return struct{}{}, err
}
