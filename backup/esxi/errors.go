package esxi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxi/internal/sshx"
)

// What can go wrong with a host, in kinds that a program can act on. Every
// error of this package that belongs to a kind wraps it; its text is a whole
// sentence of its own, with the remedy.
var (
	ErrUnreachable = errors.New("host cannot be reached")
	ErrLogin       = errors.New("login refused")
	ErrThumbprint  = errors.New("certificate is not the pinned one")
	ErrRestricted  = errors.New("licence forbids changes through the host's API")
	ErrDenied      = errors.New("user lacks a permission")
	ErrNotFound    = errors.New("not found")
	ErrExists      = errors.New("exists already")
	ErrNotProvable = errors.New("changed areas cannot be proved")
	ErrBusy        = errors.New("host is busy")
	ErrLocked      = errors.New("file is locked on the host")
	ErrNoSpace     = errors.New("datastore is full")
	ErrQuiesce     = errors.New("guest cannot be quiesced")
	ErrUnsupported = errors.New("cannot be backed up")
	// Of SSH: ErrLogin, ErrUnreachable and the others above serve too.
	ErrHostKey     = errors.New("SSH host key is not the pinned one")
	ErrSSHDisabled = errors.New("SSH service is switched off") // also ErrUnreachable
	ErrNoShell     = errors.New("SSH is needed")               // for what has no other way, and it is not configured
	// Of change tracking.
	ErrSnapshots = errors.New("VM has snapshots")
	ErrRunning   = errors.New("VM is running")
)

// sentence is an error whose text is written for the operator, with what it is
// and what caused it behind it for errors.Is and errors.As.
type sentence struct {
	text  string
	kind  error
	cause error
}

func (e *sentence) Error() string { return e.text }

func (e *sentence) Unwrap() []error {
	var all []error
	for _, err := range []error{e.cause, e.kind} { // the cause first: govmomi's fault.Is looks no further
		if err != nil {
			all = append(all, err)
		}
	}
	return all
}

func errf(kind, cause error, format string, args ...any) error {
	return &sentence{text: fmt.Sprintf(format, args...), kind: kind, cause: cause}
}

// said tells whether an error is one of ours already, or the caller's own
// cancellation: neither is explained again.
func said(err error) bool {
	var s *sentence
	return errors.As(err, &s)
}

// explain turns whatever a call to the host came back with into a sentence.
// what names the attempt: "create a snapshot of web01".
func (h *Host) explain(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %s: %w", h.name, what, context.Cause(ctx))
	}
	var own *sentence
	var way *url.Error
	switch {
	case errors.As(err, &way) && errors.As(err, &own):
		return own // a certificate that changed, without net/http's words around it
	case said(err):
		return err
	}
	if err := h.explainShell(what, err); err != nil {
		return err
	}
	var status *httpStatus
	if errors.As(err, &status) && status.busy() {
		return errf(ErrBusy, err, "%s: %s: the host stays busy (HTTP %s); try again when fewer programs use it", h.name, what, status.status)
	}
	if transient(err) {
		return h.unreachable(what, err)
	}
	say := func(kind error, format string, args ...any) error {
		return errf(kind, err, "%s: %s: "+format, append([]any{h.name, what}, args...)...)
	}
	switch {
	case fault.Is(err, &types.RestrictedVersion{}):
		return say(ErrRestricted, "the host's licence (the free edition, or an expired evaluation) forbids changes through its API; "+
			"assign a licence key to the host, or let hikae control it over SSH (hikae host add --ssh)")
	case fault.Is(err, &types.InvalidLogin{}), fault.Is(err, &types.NotAuthenticated{}):
		return say(ErrLogin, "the host does not accept the session of user %s", h.user)
	case fault.Is(err, &types.MethodDisabled{}), fault.Is(err, &types.HostAccessRestrictedToManagementServer{}):
		return say(ErrDenied, "a vCenter Server manages this host and has disabled it (%s); wait for its own backup or migration, "+
			"or take the host out of lockdown", faultText(err))
	case fault.Is(err, &types.NoPermission{}):
		return say(ErrDenied, "user %s lacks the permission; give it the Administrator role on the host", h.user)
	case fault.Is(err, &types.NoDiskSpace{}):
		return say(ErrNoSpace, "the datastore is full (%s); free some room and run it again", faultText(err))
	case fault.Is(err, &types.FileAlreadyExists{}), fault.Is(err, &types.AlreadyExists{}), fault.Is(err, &types.DuplicateName{}):
		return say(ErrExists, "it exists already (%s)", faultText(err))
	case fault.Is(err, &types.FileNotFound{}), fault.Is(err, &types.ManagedObjectNotFound{}), fault.Is(err, &types.NotFound{}):
		return say(ErrNotFound, "it is not there, or not any more (%s)", faultText(err))
	case fault.Is(err, &types.FileLocked{}):
		return say(ErrLocked, "a file is locked by a running VM or another program (%s)", faultText(err))
	case fault.Is(err, &types.ApplicationQuiesceFault{}), fault.Is(err, &types.FilesystemQuiesceFault{}):
		return say(ErrQuiesce, "the guest could not be quiesced (%s); VMware Tools must run in it", faultText(err))
	case fault.Is(err, &types.ResourceInUse{}), fault.Is(err, &types.TaskInProgress{}):
		return say(ErrBusy, "something else is at work on it (%s); try again later", faultText(err))
	}
	return say(nil, "%s", faultText(err))
}

func (h *Host) unreachable(what string, err error) error {
	return errf(ErrUnreachable, err, "%s (%s): %s: the host cannot be reached: %s", h.name, h.addr, what, root(err))
}

// root strips net/http's "Get "https://…": " from a network error.
func root(err error) string {
	s := err.Error()
	if i := strings.LastIndex(s, `": `); i >= 0 {
		s = s[i+3:]
	}
	return s
}

// faultText is the host's own words, with its code stripped.
func faultText(err error) string {
	var f types.BaseMethodFault
	if text, ok := fault.As(err, &f); ok && text != "" {
		return strings.TrimSpace(text)
	}
	s := strings.TrimPrefix(err.Error(), "ServerFaultCode: ")
	return strings.TrimSpace(s)
}

// httpStatus is an HTTP answer other than the one asked for.
type httpStatus struct {
	code   int
	status string
}

func (e *httpStatus) Error() string { return "it answers HTTP " + e.status }

// busy tells whether the status asks to come again later.
func (e *httpStatus) busy() bool {
	switch e.code {
	case http.StatusTooManyRequests, http.StatusRequestTimeout,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// transient tells a failure on the way to the host from an answer of the host.
// It is worth another try, and says nothing about whether the request was
// carried out.
func transient(err error) bool {
	if err == nil || said(err) || soap.IsSoapFault(err) || soap.IsVimFault(err) {
		return false
	}
	var status *httpStatus
	if errors.As(err, &status) {
		return status.busy()
	}
	var way *url.Error
	var op net.Error
	var broke *sshx.LostError
	return errors.As(err, &broke) || errors.As(err, &way) || errors.As(err, &op) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, context.DeadlineExceeded) // one call's own limit; the caller's context is looked at before
}
