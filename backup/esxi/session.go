package esxi

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"reflect"
	"sync"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// tuning is what tests shorten.
type tuning struct {
	keepalive  time.Duration // between signs of life; ESXi drops a session idle for 30 minutes
	call       time.Duration // limit of one SOAP call
	stall      time.Duration // a transfer without a byte for so long is broken
	tries      int           // of one request before giving up
	lockTries  int           // of one request answered 500: a locked file stays locked
	pause      time.Duration // first pause between tries; doubles
	longest    time.Duration // longest pause
	poll       time.Duration // first pause between looks at a task; grows tenfold
	inFlight   int           // data requests at once
	request    int           // bytes of one data request at most
	settleTime time.Duration // how long a removal waits for others at work on the same VM
	doubt      time.Duration // from a command's start over SSH to the task it asks for, at most
}

// defaults: ten tries with pauses 0.25 s, 0.5 s … 30 s give a host about a
// minute and a half to come back.
func defaults() tuning {
	return tuning{
		keepalive: 5 * time.Minute, call: 5 * time.Minute, stall: time.Minute,
		tries: 10, lockTries: 4, pause: 250 * time.Millisecond, longest: 30 * time.Second,
		poll: 100 * time.Millisecond, inFlight: 4, request: 16 << 20, settleTime: 10 * time.Minute, doubt: 10 * time.Second,
	}
}

// session is one login, shared by SOAP and /folder through one cookie. It is
// the soap.RoundTripper under every govmomi call: it renews an expired session
// and repeats reads when the way to the host fails.
type session struct {
	name, addr, user string
	password         func() (string, error)
	log              *slog.Logger
	t                tuning

	soap      *soap.Client
	vc        *vim25.Client
	jar       *jar
	transport *http.Transport

	// login is held while logging in; epoch counts logins, so that of many
	// requests that found the session expired only the first renews it.
	login   chan struct{}
	mu      sync.Mutex
	epoch   uint64
	refused error // a refused login is final: accounts lock after a few

	stop context.CancelFunc
	done chan struct{}
}

func newSession(c Config, addr, pin string, t tuning) (*session, error) {
	j, err := newJar()
	if err != nil {
		return nil, err
	}
	s := &session{
		name: c.Name, addr: addr, user: c.User, password: c.Password, log: c.Logger, t: t,
		jar: j, login: make(chan struct{}, 1), done: make(chan struct{}),
	}
	s.soap = soap.NewClient(&url.URL{Scheme: "https", Host: addr, Path: vim25.Path}, false)
	s.soap.UserAgent = "hikae"

	// govmomi's transport checks thumbprints only where no authority signed,
	// with two handshakes and without ctx. Ours checks always, in the one
	// handshake. No proxy: a host is spoken to directly or not at all.
	tr := s.soap.DefaultTransport()
	tr.DialTLSContext = nil
	tr.Proxy = nil
	tr.DialContext = (&net.Dialer{Timeout: probeTimeout, KeepAlive: 15 * time.Second}).DialContext
	tr.TLSHandshakeTimeout = probeTimeout
	tr.TLSClientConfig = pinned(s.name, addr, pin)
	tr.ForceAttemptHTTP2 = false // HTTP/1.1: each transfer its own connection, as every ESXi since 6.5 speaks it
	tr.MaxIdleConnsPerHost = 2 * t.inFlight
	tr.IdleConnTimeout = time.Minute
	tr.DisableCompression = true
	tr.ReadBufferSize, tr.WriteBufferSize = 256<<10, 256<<10
	s.transport = tr
	s.soap.Transport = soapStatus{tr}
	s.soap.Jar = j
	return s, nil
}

// soapStatus gives HTTP answers that carry no SOAP a type.
type soapStatus struct{ next http.RoundTripper }

func (r soapStatus) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := r.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusInternalServerError {
		res.Body.Close()
		return nil, &httpStatus{res.StatusCode, res.Status}
	}
	return res, nil
}

// jar is a cookie jar that can be emptied: a host refuses a login that comes
// with the cookie of a session it still knows.
type jar struct {
	mu   sync.Mutex
	jar  http.CookieJar
	make func() (http.CookieJar, error)
}

func newJar() (*jar, error) {
	fresh := func() (http.CookieJar, error) { return cookiejar.New(nil) }
	j, err := fresh()
	return &jar{jar: j, make: fresh}, err
}

func (j *jar) SetCookies(u *url.URL, c []*http.Cookie) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.jar.SetCookies(u, c)
}

func (j *jar) Cookies(u *url.URL) []*http.Cookie {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.jar.Cookies(u)
}

func (j *jar) clear() error {
	fresh, err := j.make()
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.jar = fresh
	return nil
}

// RoundTrip carries out one SOAP call.
func (s *session) RoundTrip(ctx context.Context, req, res soap.HasFault) error {
	renewals := 0
	for try := 1; ; try++ {
		epoch := s.current()
		// govmomi decodes into res and keeps what was there before.
		reflect.ValueOf(res).Elem().SetZero()
		err := s.once(ctx, req, res)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case fault.Is(err, &types.NotAuthenticated{}) && renewals < 2:
			// Not carried out, whatever it was: nobody was logged in.
			renewals++
			if err := s.renewPatiently(ctx, epoch); err != nil {
				return err
			}
		case transient(err) && repeatable(req) && try < s.t.tries:
			s.log.Debug("host does not answer, trying again", "host", s.name, "try", try, "error", err)
			if err := sleep(ctx, s.pause(try)); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// once makes one attempt, with its own time limit: a host that vanished
// without a word must not hold a backup for ever.
func (s *session) once(ctx context.Context, req, res soap.HasFault) error {
	ctx, cancel := context.WithTimeout(ctx, s.t.call)
	defer cancel()
	return s.soap.RoundTrip(ctx, req, res)
}

// repeatable tells the calls that change nothing.
func repeatable(req soap.HasFault) bool {
	switch req.(type) {
	case *methods.RetrievePropertiesExBody, *methods.RetrieveServiceContentBody,
		*methods.CurrentTimeBody, *methods.QueryChangedDiskAreasBody:
		return true
	}
	return false
}

func (s *session) pause(try int) time.Duration { return jitter(s.t.pause, s.t.longest, try) }

func (s *session) current() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.epoch
}

// renew logs in again unless someone did since epoch.
func (s *session) renew(ctx context.Context, epoch uint64) error {
	select {
	case s.login <- struct{}{}:
		defer func() { <-s.login }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s.mu.Lock()
	refused, now := s.refused, s.epoch
	s.mu.Unlock()
	if refused != nil {
		return refused
	}
	if now != epoch {
		return nil
	}
	if epoch > 0 {
		s.log.Debug("session expired, logging in again", "host", s.name)
	}
	if err := s.jar.clear(); err != nil {
		return err
	}
	err := s.authenticate(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if said(err) {
			s.refused = err
		}
		return err
	}
	s.epoch++
	return nil
}

// renewPatiently renews over a way to the host that may fail meanwhile. Only
// for a password that was accepted before.
func (s *session) renewPatiently(ctx context.Context, epoch uint64) error {
	for try := 1; ; try++ {
		err := s.renew(ctx, epoch)
		if err == nil || ctx.Err() != nil || !transient(err) || try >= s.t.tries {
			return err
		}
		if err := sleep(ctx, s.pause(try)); err != nil {
			return err
		}
	}
}

// authenticate sends one Login, once.
func (s *session) authenticate(ctx context.Context) error {
	pw, err := s.password()
	if err != nil {
		return fmt.Errorf("%s: password of user %s: %w", s.name, s.user, err)
	}
	ctx, cancel := context.WithTimeout(ctx, s.t.call)
	defer cancel()
	var res methods.LoginBody
	err = s.soap.RoundTrip(ctx, &methods.LoginBody{Req: &types.Login{
		This: *s.vc.ServiceContent.SessionManager, UserName: s.user, Password: pw, Locale: "en_US",
	}}, &res)
	if fault.Is(err, &types.InvalidLogin{}) {
		return errf(ErrLogin, err, "%s (%s) refuses the login of user %s: the user name or password is wrong, or the account is locked; "+
			"it is not tried again because ESXi locks accounts after a few failures", s.name, s.addr, s.user)
	}
	if fault.Is(err, &types.NoPermission{}) {
		return errf(ErrLogin, err, "%s (%s) refuses the login of user %s: the user has no role on the host; give it the Administrator role",
			s.name, s.addr, s.user)
	}
	return err
}

// keep sends a sign of life now and then until Close: reading data does not
// count as one to ESXi.
func (s *session) keep(ctx context.Context) {
	defer close(s.done)
	tick := time.NewTicker(s.t.keepalive)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.alive(ctx); err != nil && ctx.Err() == nil {
				s.log.Debug("keepalive failed", "host", s.name, "error", err)
			}
		}
	}
}

// alive makes sure that the session is valid and the way to the host open.
func (s *session) alive(ctx context.Context) error {
	_, err := methods.GetCurrentTime(ctx, s)
	return err
}

// close logs out, within a few seconds; a session it cannot say goodbye to
// expires by itself.
func (s *session) close(ctx context.Context) error {
	s.stop()
	<-s.done
	defer s.transport.CloseIdleConnections()
	if s.current() == 0 {
		return nil
	}
	// Also for who is being interrupted: a host has few sessions to give.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	var res methods.LogoutBody
	err := s.soap.RoundTrip(ctx, &methods.LogoutBody{Req: &types.Logout{This: *s.vc.ServiceContent.SessionManager}}, &res)
	if fault.Is(err, &types.NotAuthenticated{}) {
		return nil
	}
	return err
}
