package esxi

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"hikae/backup/esxi/internal/vimcmd"
)

// Names of ways to a host, for Ways.Control and Ways.Reading.
const (
	WaySOAP  = "soap"
	WayHTTPS = "https"
	WaySSH   = "ssh"
)

// Ways is what is known of how a host can be reached, changed and read.
type Ways struct {
	HTTPS   Way // port 443: the API and /folder
	SSH     Way
	About   About
	Licence Licence
	// Control is how the host is changed: WaySOAP, WaySSH, or "" when neither
	// works, and ControlWhy the reason in one sentence, with what to do about it
	// where something is to be done.
	Control    string
	ControlWhy string
	// Reading is how disks are read: WayHTTPS or WaySSH.
	Reading    string
	ReadingWhy string
}

// Way is one way to a host.
type Way struct {
	Configured bool
	Address    string // host:port
	Reachable  bool   // and logged in
	Err        error  // why it is not reachable, a sentence
}

// Licence is what the host says of its own. The key itself is not fetched into it.
type Licence struct {
	Name    string // e.g. "vSphere 7 Hypervisor"; "" when it could not be read
	Edition string // the host's word for it, e.g. "esxBasic"
	// API is whether it allows changes through the API: yes, no, or unknown. It
	// is a reading of the names above until a call has shown it.
	API string
}

// Values of Licence.API.
const (
	APIAllowed   = "yes"
	APIForbidden = "no"
	APIUnknown   = "unknown"
)

// finding is what Host knows of its ways. Host.mu guards it.
type finding struct {
	closed     error // why port 443 is not used
	licence    Licence
	overSSH    bool   // changes go over SSH
	why        string // of the choice
	restricted bool   // a call answered RestrictedVersion
	shellTried bool
	shellErr   error
	shellOK    bool // a login over SSH succeeded
	noRanges   bool // /folder ignores Range
	rangesOK   bool
}

// Ways tells what was found, and first tries the ways that were not needed so
// far. It changes nothing on the host.
func (h *Host) Ways(ctx context.Context) (Ways, error) {
	if h.shell != nil {
		_ = h.tryShell(ctx) // its error is part of the finding
	}
	if h.files != nil && h.shell != nil {
		if err := h.tryRanges(ctx); err != nil {
			return Ways{}, err
		}
	}
	if ctx.Err() != nil {
		return Ways{}, fmt.Errorf("%s: look for ways to the host: %w", h.name, context.Cause(ctx))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	f := &h.found
	w := Ways{About: h.about, Licence: f.licence, ControlWhy: f.why, Control: WaySOAP, Reading: WayHTTPS}
	w.HTTPS = Way{Configured: h.session != nil || f.closed != nil, Reachable: h.session != nil, Err: f.closed}
	if w.HTTPS.Configured {
		w.HTTPS.Address = h.addr
	}
	if h.shell != nil {
		w.SSH = Way{Configured: true, Address: h.shell.addr, Reachable: f.shellOK, Err: f.shellErr}
	}
	if f.overSSH {
		w.Control = WaySSH
		if f.shellErr != nil {
			w.Control = ""
		}
	} else if f.licence.API == APIForbidden {
		w.Control = ""
	}
	switch {
	case h.files == nil:
		w.Reading, w.ReadingWhy = WaySSH, "port 443 is not used"
	case f.noRanges:
		w.Reading, w.ReadingWhy = WaySSH, "the host's file server ignores ranges"
	default:
		w.ReadingWhy = "the host's file server answers on port 443"
	}
	return w, nil
}

// choose decides how the host is changed: through the API when its licence does
// not forbid that, else over SSH.
func (h *Host) choose(ctx context.Context) {
	l, err := h.soapLicence(ctx)
	if err != nil {
		h.log.Debug("the licence cannot be read", "host", h.name, "error", err)
	}
	h.mu.Lock()
	h.found.licence = l
	switch {
	case l.API != APIForbidden:
		h.found.why = "the licence allows changes through the API"
		if l.API == APIUnknown {
			h.found.why = "nothing is known to forbid changes through the API"
		}
	case h.shell == nil:
		h.found.why = fmt.Sprintf("the licence (%s) forbids changes through the API, and SSH is not configured: add it (hikae host add --ssh)", l.Name)
	default:
		h.found.overSSH = true
		h.found.why = fmt.Sprintf("the licence (%s) forbids changes through the API", l.Name)
	}
	over := h.found.overSSH
	h.mu.Unlock()
	if over {
		// Its error is met again, and told, by the first change.
		if err := h.tryShell(ctx); err != nil {
			h.log.Warn("the licence forbids changes through the API, and SSH does not work", "host", h.name, "error", err)
		}
	}
}

// openShell makes SSH the only way. closed is why port 443 is not one.
func (h *Host) openShell(ctx context.Context, closed error) error {
	if err := h.tryShell(ctx); err != nil {
		return errors.Join(closed, err)
	}
	out, err := h.shell.words(ctx, true, "vmware", "-vl")
	if err != nil {
		return h.explain(ctx, "ask for the version", err)
	}
	version, build, err := vimcmd.ParseVersion(out)
	if err != nil {
		return fmt.Errorf("%s (%s) answers, but is no ESXi host: %w", h.name, h.shell.addr, err)
	}
	h.about = About{Product: "VMware ESXi", Version: version, Build: build, APIType: "HostAgent"}
	h.inv, h.soap = &shellInventory{h: h, sh: h.shell}, nil
	l, err := h.shellLicence(ctx)
	if err != nil {
		h.log.Debug("the licence cannot be read", "host", h.name, "error", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.found.closed, h.found.overSSH, h.found.licence, h.found.why = closed, true, l, "port 443 is not used"
	if closed != nil {
		h.found.why = "port 443 does not answer"
	}
	return nil
}

// tryShell logs in over SSH unless that worked before. A refused login, a wrong
// key and the like are remembered and not tried again; a host that did not
// answer is asked again.
func (h *Host) tryShell(ctx context.Context) error {
	h.mu.Lock()
	ok, failed := h.found.shellOK, h.found.shellErr
	h.mu.Unlock()
	if ok || failed != nil && !errors.Is(failed, ErrUnreachable) {
		return failed
	}
	err := h.explain(ctx, "log in over SSH", h.shell.client.Connect(ctx))
	if ctx.Err() != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.found.shellTried, h.found.shellOK, h.found.shellErr = true, err == nil, err
	return err
}

func (h *Host) shellWorked() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.found.shellOK
}

// change lets the chosen way make a change. When the licence turns out to forbid
// it (it expired meanwhile, or says other than it does), nothing was changed,
// and from then on SSH is the way, if there is one.
func (h *Host) change(ctx context.Context, call func(control) error) error {
	h.mu.Lock()
	over := h.found.overSSH
	h.mu.Unlock()
	if over {
		return call(h.ssh)
	}
	err := call(h.soap)
	if !fault.Is(err, &types.RestrictedVersion{}) {
		return err
	}
	h.mu.Lock()
	f := &h.found
	f.restricted, f.licence.API = true, APIForbidden
	if h.ssh == nil {
		f.why = "the licence forbids changes through the API, and SSH is not configured: add it (hikae host add --ssh)"
		h.mu.Unlock()
		return err
	}
	if !f.overSSH {
		h.log.Info("the licence forbids changes through the API, going on over SSH", "host", h.name)
	}
	f.overSSH, f.why = true, "the licence forbids changes through the API, as a call has shown"
	h.mu.Unlock()
	if terr := h.tryShell(ctx); terr != nil {
		return terr
	}
	return call(h.ssh)
}

// overSSH tells whether changes go over SSH now.
func (h *Host) overSSH() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.found.overSSH
}

// soapLicence reads the licence through the API.
func (h *Host) soapLicence(ctx context.Context) (Licence, error) {
	ref := h.session.vc.ServiceContent.LicenseManager
	if ref == nil {
		return Licence{API: APIUnknown}, nil
	}
	m, err := fetchOne[mo.LicenseManager](ctx, h, *ref, "licenses")
	if err != nil || len(m.Licenses) == 0 {
		return Licence{API: APIUnknown}, err
	}
	l := m.Licenses[0]
	props := map[string]string{}
	for _, p := range l.Properties {
		props[p.Key] = fmt.Sprint(p.Value)
	}
	return judgeLicence(l.Name, l.EditionKey, props), nil
}

// shellLicence reads the licence through the shell.
func (h *Host) shellLicence(ctx context.Context) (Licence, error) {
	r, err := h.shell.vim(ctx, true, "vimsvc/license", "--show")
	if err != nil {
		return Licence{API: APIUnknown}, err
	}
	l, err := vimcmd.ParseLicence(r.out)
	if err != nil {
		return Licence{API: APIUnknown}, err
	}
	return judgeLicence(l.Name, l.Edition, l.Properties), nil
}

// judgeLicence reads the licence's names. The free edition is called esxBasic,
// or something with hypervisor, in all releases whose licence was published; an
// evaluation allows everything until it has expired.
func judgeLicence(name, edition string, props map[string]string) Licence {
	l := Licence{Name: name, Edition: edition, API: APIAllowed}
	key, text := strings.ToLower(edition), strings.ToLower(name)
	switch {
	case strings.Contains(key, "basic"), strings.Contains(key, "hypervisor"), strings.Contains(text, "hypervisor"):
		l.API = APIForbidden
	case strings.Contains(key, "eval"), strings.Contains(text, "evaluation"):
		if hours, told := props["expirationHours"]; told && strings.TrimSpace(hours) == "0" && strings.TrimSpace(props["expirationMinutes"]) == "0" {
			l.API = APIForbidden
			l.Name = strings.TrimSpace(name + " (expired)")
		}
	case key == "" && text == "":
		l.API = APIUnknown
	}
	return l
}

// shellCall bounds a command over SSH that has no business taking long.
func (h *Host) shellCall(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, h.t.call, errTooSlow)
}

var errTooSlow = fmt.Errorf("the host took too long: %w", context.DeadlineExceeded)
