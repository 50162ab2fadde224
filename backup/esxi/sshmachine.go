package esxi

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"hikae/backup/esxi/internal/vimcmd"
	"hikae/backup/vmx"
)

// register registers a VM and finds it again by its file.
func (c *sshControl) register(ctx context.Context, vmxPath, name string) (string, error) {
	file, err := hostPath(vmxPath)
	if err != nil {
		return "", err
	}
	words := []string{"solo/registervm", file, name}
	if name == "" || strings.HasPrefix(name, "-") {
		words = words[:2] // the name in the .vmx counts; this one would pass for an option
	}
	r, err := c.sh.vim(ctx, false, words...)
	if err != nil {
		return "", c.doubtful("", "registerVm", err)
	}
	if err := r.fault(); err != nil {
		return "", err
	}
	for range appear {
		vms, err := c.h.inv.vms(ctx)
		if err != nil {
			return "", &lost{err}
		}
		if i := slices.IndexFunc(vms, func(v VM) bool { return v.ConfigPath == vmxPath }); i >= 0 {
			return vms[i].ID, nil
		}
		if err := sleep(ctx, c.h.t.poll); err != nil {
			return "", &lost{err}
		}
	}
	return "", &lost{fmt.Errorf("the VM does not appear (%s)", r.text())}
}

func (c *sshControl) unregister(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	r, err := c.sh.vim(ctx, false, "vmsvc/unregister", num)
	if err != nil {
		return err
	}
	return r.fault()
}

func (c *sshControl) reload(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	r, err := c.sh.vim(ctx, true, "vmsvc/reload", num)
	if err != nil {
		return err
	}
	return r.fault()
}

// state is a VM's power: on, off or suspended.
func (c *sshControl) state(ctx context.Context, num string) (string, error) {
	r, err := c.sh.vim(ctx, true, "vmsvc/power.getstate", num)
	if err != nil {
		return "", err
	}
	state, perr := vimcmd.ParsePowerState(r.out)
	if perr == nil {
		return state, nil
	}
	if err := r.fault(); err != nil {
		return "", err
	}
	return "", perr
}

// powerOn starts a VM and answers the one question that a restored VM may ask.
// vim-cmd waits until that is answered, so it runs beside the looks.
func (c *sshControl) powerOn(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	if state, err := c.state(ctx, num); err != nil || state == "on" {
		return err
	}
	starting, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		r   *reply
		err error
	}
	done := make(chan outcome, 1)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel() // before waiting
	running.Go(func() {
		r, err := c.sh.vim(starting, false, "vmsvc/power.on", num)
		done <- outcome{r, err}
	})
	answered := map[string]bool{}
	var said *outcome
	for pause, look := c.h.t.poll, 0; ; pause = min(pause*3/2, 10*c.h.t.poll) {
		select {
		case o := <-done:
			said = &o
		case <-time.After(pause):
		case <-ctx.Done():
			return &lost{context.Cause(ctx)}
		}
		state, err := c.state(ctx, num)
		switch {
		case err != nil:
			return &lost{err}
		case state == "on" && said != nil:
			return nil
		case state == "on":
			continue // what else belongs to it ends with the command
		}
		if err := c.answer(ctx, vm, num, answered); err != nil {
			return err
		}
		if said == nil {
			continue
		}
		done = nil
		switch look++; {
		case said.err != nil:
			return said.err
		case said.r.fault() != nil:
			return said.r.fault()
		case strings.Contains(said.r.out+said.r.err, "Power on failed"):
			return fmt.Errorf("the host could not start it; its vmware.log says why")
		case look >= appear:
			return fmt.Errorf("the host said nothing against it, but the VM does not run (%s)", said.r.text())
		}
	}
}

// answer gives the answer that a VM waits for, once a question.
func (c *sshControl) answer(ctx context.Context, vm, num string, answered map[string]bool) error {
	r, err := c.sh.vim(ctx, true, "vmsvc/message", num)
	if err != nil {
		return err
	}
	m, perr := vimcmd.ParseMessage(r.out)
	if perr != nil {
		if err := r.fault(); err != nil {
			return err
		}
		return perr
	}
	if m == nil || answered[m.ID] {
		return nil
	}
	var labels []string
	var choice *vimcmd.Choice
	for i := range m.Choices {
		labels = append(labels, m.Choices[i].Text)
	}
	if asksMoved(m.Text) {
		keep, err := c.wantsToKeep(ctx, vm)
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(m.Choices, func(o vimcmd.Choice) bool { return saysMoved(o.Text, keep) }); i >= 0 {
			choice = &m.Choices[i]
		}
	}
	if choice == nil {
		return fmt.Errorf("the VM waits for an answer: %q (%s); give it in the host's own interface", strings.TrimSpace(m.Text), strings.Join(labels, ", "))
	}
	answered[m.ID] = true
	r, err = c.sh.vim(ctx, false, "vmsvc/message", num, m.ID, strconv.Itoa(choice.Number))
	if err != nil && ctx.Err() == nil {
		delete(answered, m.ID) // asked for again if it did not arrive
		return nil
	}
	if err != nil {
		return err
	}
	return r.fault()
}

// wantsToKeep reads uuid.action of the .vmx, as soapControl does.
func (c *sshControl) wantsToKeep(ctx context.Context, vm string) (bool, error) {
	c.h.mu.Lock()
	file := c.h.paths[vm]
	c.h.mu.Unlock()
	text, err := (&shellFiles{c.sh}).readFile(ctx, file, vmx.MaxSize)
	if err != nil {
		return false, err
	}
	config, err := vmx.Parse(text)
	if err != nil {
		return false, err
	}
	action, _ := config.Get("uuid.action")
	return strings.EqualFold(action, "keep"), nil
}

func (c *sshControl) powerOff(ctx context.Context, vm string) error {
	num, err := c.vmid(ctx, vm)
	if err != nil {
		return err
	}
	if state, err := c.state(ctx, num); err != nil || state == "off" {
		return err
	}
	r, err := c.sh.vim(ctx, false, "vmsvc/power.off", num)
	if err != nil {
		return err
	}
	said := r.fault()
	for range appear {
		state, err := c.state(ctx, num)
		switch {
		case err != nil:
			return &lost{err}
		case state == "off":
			return nil
		case said != nil:
			return said
		}
		if err := sleep(ctx, c.h.t.poll); err != nil {
			return &lost{err}
		}
	}
	return fmt.Errorf("the host said nothing against it, but the VM still runs (%s)", r.text())
}

func (c *sshControl) makeDirectory(ctx context.Context, dsPath string) error {
	dir, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	_, err = c.sh.words(ctx, false, "mkdir", dir)
	return err
}

// remove takes files and folders alike. It may run twice.
func (c *sshControl) remove(ctx context.Context, dsPath string) error {
	_, inside, err := splitPath(dsPath)
	if err != nil {
		return err
	}
	file, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	if inside == "" || path.Dir(file) == "/vmfs/volumes" {
		return fmt.Errorf("%q is a whole datastore", dsPath)
	}
	_, err = c.sh.words(ctx, true, "rm", "-rf", file)
	return err
}
