package esxisim

import (
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// Fault rules are the host's own: those of govmomi's simulator change counters
// under a read lock, and match neither prefixes of a transfer nor lost answers.

type rule struct {
	Fault
	id   string
	left int // how often it still happens; below 0: always
}

type rules struct {
	mu   sync.Mutex
	next int
	list []*rule
}

// Inject makes something go wrong. The id names the fault in the host's log.
func (h *Host) Inject(f Fault) (id string, err error) {
	switch f.Kind {
	case FaultExpire:
		h.sessions.expireAll()
		return f.Kind, nil
	case FaultSpace:
		h.hv.LimitSpace(max(f.Free, 0))
		h.refreshDatastore()
		return f.Kind, nil
	case FaultLie:
		return f.Kind, h.lie(f)
	case FaultCall:
		if f.Method == "" {
			return "", fmt.Errorf("a call fault needs the name of a method, or *")
		}
		if f.Fault != "" {
			if _, err := newFault(f.Fault); err != nil {
				return "", err
			}
		}
	case FaultDrop, FaultBusy:
		if f.Verb = strings.ToUpper(f.Verb); f.Verb != "" && f.Verb != http.MethodGet && f.Verb != http.MethodPut {
			return "", fmt.Errorf("a %s fault is for GET or PUT, not %s", f.Kind, f.Verb)
		}
	case FaultSSHRefuse, FaultSSHDrop, FaultSSHCommand, FaultSSHHang:
		if h.ssh == nil {
			return "", fmt.Errorf("a fault %s needs a host with SSH", f.Kind)
		}
		if f.Fault != "" {
			if _, err := newFault(f.Fault); err != nil {
				return "", err
			}
		}
	default:
		return "", fmt.Errorf("there is no fault called %q; there are drop, call, space, expire, busy, lie, ssh-refuse, ssh-drop, ssh-command and ssh-hang", f.Kind)
	}
	h.faults.mu.Lock()
	defer h.faults.mu.Unlock()
	h.faults.next++
	r := &rule{Fault: f, id: fmt.Sprintf("%s-%d", f.Kind, h.faults.next), left: f.Count}
	if r.left == 0 {
		r.left = 1
	}
	h.faults.list = append(h.faults.list, r)
	return r.id, nil
}

// ClearFaults ends all faults, a limit on space too. Sessions that ended stay so.
func (h *Host) ClearFaults() {
	h.faults.mu.Lock()
	h.faults.list = nil
	h.faults.mu.Unlock()
	h.hv.LimitSpace(-1)
	h.refreshDatastore()
}

// lie marks disks whose tracking will miss the next write.
func (h *Host) lie(f Fault) error {
	if f.VM != "" {
		vm, err := h.hv.Find(f.VM)
		if err != nil {
			return err
		}
		return vm.LieNextWrite(f.Disk)
	}
	for _, vm := range h.hv.VMs() {
		if !vm.On() {
			continue
		}
		for i := range vm.Disks() {
			if err := vm.LieNextWrite(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// take finds the first rule that matches and counts its occasion.
func (r *rules) take(match func(*Fault) bool) (Fault, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, f := range r.list {
		if !match(&f.Fault) {
			continue
		}
		if f.Skip > 0 {
			f.Skip--
			continue
		}
		if f.left > 0 {
			if f.left--; f.left == 0 {
				r.list = append(r.list[:i:i], r.list[i+1:]...)
			}
		}
		return f.Fault, true
	}
	return Fault{}, false
}

func (r *rules) transfer(kind, verb, path string) (Fault, bool) {
	return r.take(func(f *Fault) bool {
		return f.Kind == kind && (f.Verb == "" || f.Verb == verb) && strings.Contains(path, f.Path)
	})
}

func (r *rules) ssh(kind, line string) (Fault, bool) {
	return r.take(func(f *Fault) bool { return f.Kind == kind && strings.Contains(line, f.Command) })
}

func (r *rules) call(method string) (Fault, bool) {
	return r.take(func(f *Fault) bool { return f.Kind == FaultCall && (f.Method == "*" || f.Method == method) })
}

// newFault makes a fault of the vSphere API by its type's name.
func newFault(name string) (types.BaseMethodFault, error) {
	t, ok := types.TypeFunc()(name)
	if !ok {
		return nil, fmt.Errorf("the vSphere API has no fault called %q", name)
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	f, ok := reflect.New(t).Interface().(types.BaseMethodFault)
	if !ok {
		return nil, fmt.Errorf("%s is no fault of the vSphere API", name)
	}
	return f, nil
}

// injected is a call fault as the client sees it; nil when the call succeeds.
func injected(f Fault) error {
	if f.Fault == "" {
		return nil
	}
	fault, err := newFault(f.Fault)
	if err != nil {
		return err
	}
	if rv, ok := fault.(*types.RestrictedVersion); ok && f.Message == "" {
		return soapError{rv, restrictedText}
	}
	text := f.Message
	if text == "" {
		text = "injected fault: " + f.Fault
	}
	return soapError{fault, text}
}

// pause waits, or until the host closes.
func (h *Host) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-h.ctx.Done():
	}
}
