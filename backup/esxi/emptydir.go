package esxi

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// ErrNotEmpty: a folder that was to be removed has something in it.
var ErrNotEmpty = errors.New("folder is not empty")

// DeleteEmpty removes a folder in which nothing is; one that is gone is no
// error. ErrNotEmpty when something is in it, and then nothing was done.
func (h *Host) DeleteEmpty(ctx context.Context, dsPath string) error {
	what := "remove the empty folder " + dsPath
	err := h.change(ctx, func(c control) error { return c.removeEmpty(ctx, dsPath) })
	var failed *commandError
	if errors.As(err, &failed) && failed.says("Directory not empty") {
		err = ErrNotEmpty
	}
	if errors.Is(err, ErrNotEmpty) {
		return errf(ErrNotEmpty, nil, "%s: %s: something is in it", h.name, what)
	}
	if err = h.explain(ctx, what, err); errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

func (c *sshControl) removeEmpty(ctx context.Context, dsPath string) error {
	_, inside, err := splitPath(dsPath)
	if err != nil {
		return err
	}
	if inside == "" {
		return fmt.Errorf("%q is a whole datastore", dsPath)
	}
	dir, err := hostPath(dsPath)
	if err != nil {
		return err
	}
	_, err = c.sh.words(ctx, true, "rmdir", dir)
	return err
}

// removeEmpty looks first, because the API's own way takes folders with all in
// them.
func (c *soapControl) removeEmpty(ctx context.Context, dsPath string) error {
	name, inside, err := splitPath(dsPath)
	if err != nil {
		return err
	}
	if inside == "" {
		return fmt.Errorf("%q is a whole datastore", dsPath)
	}
	stores, err := collect[mo.Datastore](ctx, c.h, "Datastore", "name", "browser")
	if err != nil {
		return err
	}
	for _, s := range stores {
		if s.Name != name {
			continue
		}
		info, err := c.run(ctx, func(ctx context.Context) (types.ManagedObjectReference, error) {
			res, err := methods.SearchDatastore_Task(ctx, c.h.session.vc, &types.SearchDatastore_Task{This: s.Browser, DatastorePath: dsPath})
			if err != nil {
				return types.ManagedObjectReference{}, err
			}
			return res.Returnval, nil
		})
		if err != nil {
			return err
		}
		found, ok := info.Result.(types.HostDatastoreBrowserSearchResults)
		if !ok {
			return fmt.Errorf("the host lists %s as %T", dsPath, info.Result)
		}
		if len(found.File) > 0 {
			return ErrNotEmpty
		}
		return c.remove(ctx, dsPath)
	}
	return errf(ErrNotFound, nil, "%s has no datastore called %q", c.h.name, name)
}
