package esxi

import (
	"errors"
	"testing"

	"hikae/backup/esxisim"
)

// A folder is removed when nothing is in it, and only then, by either way.
func TestDeleteEmpty(t *testing.T) {
	for name, o := range map[string]labOptions{
		"SOAP": {},
		"SSH":  {sim: esxisim.Options{Free: true, SSH: &esxisim.SSHOptions{}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := start(t, o)
			ctx, h := t.Context(), l.host
			const dir = "[datastore1] " + hostile
			if err := h.MakeDirectory(ctx, dir); err != nil {
				t.Fatal(err)
			}
			if err := h.MakeDirectory(ctx, dir+"/inside"); err != nil {
				t.Fatal(err)
			}
			if err := h.DeleteEmpty(ctx, dir); !errors.Is(err, ErrNotEmpty) {
				t.Errorf("with a folder in it: %v", err)
			}
			if err := h.DeleteEmpty(ctx, dir+"/inside"); err != nil {
				t.Error(err)
			}
			if err := h.DeleteEmpty(ctx, dir); err != nil {
				t.Error(err)
			}
			if err := h.DeleteEmpty(ctx, dir); err != nil {
				t.Errorf("one that is gone: %v", err)
			}
			if there, err := h.Exists(ctx, dir); there || err != nil {
				t.Errorf("%v, %v", there, err)
			}
			if err := h.DeleteEmpty(ctx, "[datastore1] web01"); !errors.Is(err, ErrNotEmpty) {
				t.Errorf("a VM's folder: %v", err)
			}
			if err := h.DeleteEmpty(ctx, "[datastore1]"); err == nil || errors.Is(err, ErrNotEmpty) {
				t.Errorf("a datastore: %v", err)
			}
			l.find("web01")
		})
	}
}
