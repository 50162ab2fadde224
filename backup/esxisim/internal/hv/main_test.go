package hv

import (
	"testing"

	"go.uber.org/goleak"

	"hikae/backup/vmdk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openRaw(t *testing.T, name string) *vmdk.Image {
	t.Helper()
	i, err := vmdk.OpenImage(name)
	if err != nil {
		t.Fatal(err)
	}
	return i
}
