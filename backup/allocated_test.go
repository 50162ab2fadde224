package backup

import (
	"strings"
	"testing"

	"hikae/backup/esxi"
	"hikae/backup/esxisim"
	"hikae/repo"
)

// Without change tracking the datastore's own map still says what is allocated, so
// holes never cross the wire: in a first backup and in a scan.
func TestAllocatedWithoutTracking(t *testing.T) {
	w := newWorld(t, esxisim.Options{SSH: &esxisim.SSHOptions{}})
	must(t, w.host.Close(t.Context()))
	password := func() (string, error) { return w.sim.Password(), nil }
	var err error
	w.host, err = esxi.Connect(t.Context(), esxi.Config{
		Name: "esx1", Address: w.sim.Address(), User: w.sim.User(), Password: password, Thumbprint: w.sim.Thumbprint(),
		SSH: &esxi.SSHConfig{Address: w.sim.SSHAddress(), Fingerprint: w.sim.SSHFingerprint()},
	})
	must(t, err)
	t.Cleanup(func() { must(t, w.host.Close(t.Context())) })
	w.addVM("web01", esxisim.VMOptions{PowerOn: true, Thin: true}, image(t, 256*mib, 1, area0(0, 8*mib), area0(200*mib, 8*mib)))

	first := w.backup()
	if first.Mode != repo.ModeFull || !strings.Contains(first.Reason, "all that is allocated was read") {
		t.Errorf("first: %s, %s", first.Mode, first.Reason)
	}
	if first.BytesRead > 16*mib*105/100 {
		t.Errorf("the first backup read %d bytes of 16 MiB", first.BytesRead)
	}
	w.sameAsGuest(first.Ref)

	w.write(0, 9*mib, 4096, 3)
	w.write(0, 0, 4096, 4)
	second := w.backup()
	if second.Mode != repo.ModeScan || second.Reason != "change tracking is off" {
		t.Errorf("second: %s, %s", second.Mode, second.Reason)
	}
	if second.BytesRead > 20*mib || second.BytesStored > mib {
		t.Errorf("the scan read %d bytes and stored %d", second.BytesRead, second.BytesStored)
	}
	w.sameAsGuest(second.Ref)
	w.checkRepo()
}
