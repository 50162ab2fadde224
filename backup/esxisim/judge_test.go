package esxisim

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// judge finds a program that judges this package from outside. Without it a
// test is skipped by its name; in CI, which installs them, it fails.
func judge(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is not installed", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// ask runs it and returns what it printed.
func ask(t *testing.T, env []string, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	t.Logf("%s %s\n%s", filepath.Base(name), strings.Join(args, " "), out)
	return string(out), err
}

// TestQemuReadsTheChain compares qemu-img's view of the files during a snapshot
// with the guest's.
func TestQemuReadsTheChain(t *testing.T) {
	qemu := judge(t, "qemu-img")
	for _, vmfs := range []int{5, 6} {
		h := start(t, Options{VMFS: vmfs})
		must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 32*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
		c := login(t, h)
		vm, _ := vmOf(t, c, "vm")
		for i, top := range []string{"vm-000001.vmdk", "vm-000002.vmdk"} {
			frozen := disk(t, h, "vm", 0)
			snapshot(t, c, vm, fmt.Sprint(i))
			must(t, h.WriteAt("vm", 0, noise(3*mib, uint64(i)), int64(5+i)*mib+999))
			must(t, h.WriteAt("vm", 0, make([]byte, 700_000), int64(9+i)*mib+3))
			parent := []string{"vm.vmdk", "vm-000001.vmdk"}[i]
			for name, want := range map[string][]byte{top: disk(t, h, "vm", 0), parent: frozen} {
				out := filepath.Join(t.TempDir(), "out.raw")
				if msg, err := ask(t, nil, qemu, "convert", "-U", "-O", "raw", filepath.Join(h.o.Dir, "vm", name), out); err != nil {
					t.Fatal(msg)
				}
				got, err := os.ReadFile(out)
				must(t, err)
				same(t, fmt.Sprintf("VMFS %d, %s", vmfs, name), got, want)
			}
		}
	}
}

func TestCurlUsesFolder(t *testing.T) {
	curl := judge(t, "curl")
	h := start(t, Options{Password: "s3cret"})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{}))
	must(t, os.Mkdir(filepath.Join(h.o.Dir, "up"), 0o700))
	w := browse(t, h)
	dir := t.TempDir()
	netrc, jar, file := filepath.Join(dir, "netrc"), filepath.Join(dir, "jar"), filepath.Join(dir, "file")
	must(t, os.WriteFile(netrc, []byte("machine 127.0.0.1 login root password s3cret\n"), 0o600))
	run := func(args ...string) string {
		t.Helper()
		out, err := ask(t, nil, curl, append([]string{"-ksS", "-o", file, "-w", "%{http_code}"}, args...)...)
		must(t, err)
		return out
	}
	if code := run(w.url("/vm/vm-flat.vmdk")); code != "401" {
		t.Error(code)
	}
	if code := run("--netrc-file", netrc, "-c", jar, "-r", "1000-1999", w.url("/vm/vm-flat.vmdk")); code != "206" {
		t.Error(code)
	}
	got, err := os.ReadFile(file)
	must(t, err)
	same(t, "range", got, disk(t, h, "vm", 0)[1000:2000])
	if code := run("-b", jar, w.url("/vm")); code != "200" {
		t.Error(code)
	}
	if code := run("-b", jar, "-T", file, w.url("/up/listing.html")); code != "201" {
		t.Error(code)
	}
	if code := run("-b", jar, "-X", "DELETE", w.url("/up/listing.html")); code != "204" {
		t.Error(code)
	}
}

func TestGovcRunsTheHost(t *testing.T) {
	govc := judge(t, "govc")
	h := start(t, Options{})
	must(t, h.ImportVM(t.Context(), "web01", []string{image(t, 8*mib, 1)}, VMOptions{ChangeTracking: true, PowerOn: true}))
	before := disk(t, h, "web01", 0)
	env := []string{
		"GOVC_URL=https://" + h.Address(), "GOVC_USERNAME=" + h.User(), "GOVC_PASSWORD=" + h.Password(), "GOVC_INSECURE=1",
		"GOVC_PERSIST_SESSION=false", "HOME=" + t.TempDir(),
	}
	local := filepath.Join(t.TempDir(), "local")
	must(t, os.WriteFile(local, noise(5000, 1), 0o600))
	back := filepath.Join(t.TempDir(), "back")
	for _, step := range []struct{ args, want string }{ // want "!" is failure
		{"about", "VMware ESXi"},
		{"ls vm", "/ha-datacenter/vm/web01"},
		{"vm.info web01", "poweredOn"},
		{"datastore.info", "VMFS"},
		{"datastore.ls -l web01", "8.0MB"},
		{"device.info -vm web01 disk-1000-0", "[datastore1] web01/web01.vmdk"},
		{"snapshot.create -vm web01 -m=false -q one", ""},
		{"snapshot.create -vm web01 -m=false two", ""},
		{"snapshot.tree -vm web01", "two"},
		{"device.info -vm web01 disk-1000-0", "web01-000002.vmdk"},
		{"snapshot.revert -vm web01 one", ""},
		{"vm.info web01", "poweredOff"},
		{"snapshot.create -vm web01 -m=false three", ""},
		{"snapshot.remove -vm web01 one", ""},
		{"snapshot.tree -vm web01", "three"},
		{"snapshot.remove -vm web01 *", ""},
		{"vm.power -on web01", "OK"},
		{"vm.power -on web01", "!"},
		{"vm.change -vm web01 -e note=x -name web02", ""},
		{"vm.power -off web02", "OK"},
		{"vm.unregister web02", ""},
		{"vm.register web01/web01.vmx", ""},
		{"vm.register web01/web01.vmx", "!"},
		{"datastore.mkdir new", ""},
		{"datastore.mkdir new", "!"},
		{"datastore.upload " + local + " new/a", "OK"},
		{"datastore.mv new/a new/b", "OK"},
		{"datastore.download new/b " + back, "OK"},
		{"datastore.rm new/b", ""},
		{"datastore.rm new/b", "!"},
		{"datastore.disk.create -size 20M new/d.vmdk", "OK"},
		{"vm.disk.attach -vm web02 -link=false -disk new/d.vmdk", ""},
		{"device.ls -vm web02", "disk-1000-1"},
		{"vm.create -on=false -disk 32M -c 2 -m 512 fresh", ""},
		{"vm.power -on fresh", "OK"},
		{"vm.power -off fresh", "OK"},
		{"vm.destroy fresh", ""},
		{"datastore.ls", "new"},
		{"tasks", "CreateVM"},
		{"vm.clone -vm web02 copy", "!"},
	} {
		out, err := ask(t, env, govc, strings.Fields(step.args)...)
		if step.want == "!" {
			if err == nil {
				t.Errorf("govc %s succeeded", step.args)
			}
			continue
		}
		if err != nil || !strings.Contains(out, step.want) {
			t.Errorf("govc %s: %v\n%s\nlacks %q", step.args, err, out, step.want)
		}
	}
	same(t, "after all that", disk(t, h, "web02", 0), before)
	got, err := os.ReadFile(back)
	if err != nil || !bytes.Equal(got, noise(5000, 1)) {
		t.Error("what was uploaded came back different", err)
	}
}
