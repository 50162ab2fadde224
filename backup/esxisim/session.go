package esxisim

import (
	"crypto/subtle"
	"sync"
	"time"
)

// As on ESXi: so many wrong passwords in a row lock the account for a while,
// for the right one too.
const (
	lockAfter = 5
	lockFor   = 15 * time.Minute
)

// sessions knows which cookies are good. govmomi's simulator has sessions too,
// but tells nobody whether one is alive, and its idle time counts from the
// login; both then follow this table.
type sessions struct {
	clock   func() time.Time
	timeout time.Duration
	ended   func(key string) // tells the simulator; called without the lock

	mu       sync.Mutex
	seen     map[string]time.Time // by cookie: last SOAP call
	basic    string               // cookie of the session that Basic logins share
	failures int
	lastFail time.Time
}

// add takes a new session in.
func (s *sessions) add(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[key] = s.clock()
}

// remove ends a session that logged out.
func (s *sessions) remove(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.seen, key)
}

// valid tells whether a cookie's session is alive, and, with use, keeps it so.
func (s *sessions) valid(key string, use bool) bool {
	s.mu.Lock()
	last, ok := s.seen[key]
	now := s.clock()
	expired := ok && now.Sub(last) > s.timeout
	switch {
	case expired:
		delete(s.seen, key)
	case ok && use:
		s.seen[key] = now
	}
	s.mu.Unlock()
	if expired {
		s.ended(key)
	}
	return ok && !expired
}

// expireAll ends every session at once.
func (s *sessions) expireAll() {
	s.mu.Lock()
	var keys []string
	for key := range s.seen {
		keys = append(keys, key)
	}
	clear(s.seen)
	s.mu.Unlock()
	for _, key := range keys {
		s.ended(key)
	}
}

// check compares a login with the account, at the cost of a lock after too many
// wrong ones.
func (s *sessions) check(user, password, wantUser, wantPassword string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	if s.failures >= lockAfter && now.Sub(s.lastFail) < lockFor {
		return false
	}
	ok := subtle.ConstantTimeCompare([]byte(user), []byte(wantUser))&subtle.ConstantTimeCompare([]byte(password), []byte(wantPassword)) == 1
	if ok {
		s.failures = 0
		return true
	}
	s.failures++
	s.lastFail = now
	return false
}

// shared is the cookie of the session for Basic logins while it is alive.
func (s *sessions) shared() (string, bool) {
	s.mu.Lock()
	key := s.basic
	s.mu.Unlock()
	return key, key != "" && s.valid(key, true)
}

func (s *sessions) share(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.basic = key
}
