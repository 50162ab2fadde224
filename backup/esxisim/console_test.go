package esxisim

import (
	"crypto/sha1"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestRestoreByShell is what a restore over SSH does: a thin disk, its non-zero
// ranges, the .vmx last, registering, the question answered by its text.
func TestRestoreByShell(t *testing.T) {
	for _, edition := range Editions() {
		h := sshHost(t, Options{Edition: edition, Free: true, VMFS: map[string]int{"6.5": 5}[edition]})
		must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 8*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true}))
		c := dial(t, h)
		cd := "cd /vmfs/volumes/datastore1; "
		want(t, c, cd+"mkdir copy")
		if _, errs, status := sh(t, c, cd+"mkdir copy"); status != 1 || errs != "mkdir: can't create directory 'copy': File exists\n" {
			t.Errorf("%d %s", status, errs)
		}
		if out := want(t, c, cd+"vmkfstools -c 8192K -d thin copy/vm.vmdk"); out != "Create: 100% done.\n" {
			t.Error(out)
		}
		content := disk(t, h, "vm", 0)
		for _, off := range []int{0, 4, 7} {
			if _, errs, status := sh(t, c, fmt.Sprintf("dd of='/vmfs/volumes/datastore1/copy/vm-flat.vmdk' bs=1M seek=%d conv=notrunc", off), string(content[off*mib:(off+1)*mib])); status != 0 || !strings.Contains(errs, "1048576 bytes (1.0MB) copied") {
				t.Errorf("%d %s", status, errs)
			}
		}
		if out := want(t, c, cd+"sha1sum copy/vm-flat.vmdk"); !strings.HasPrefix(out, fmt.Sprintf("%x", sha1.Sum(content))) {
			t.Error(out)
		}
		if out := want(t, c, cd+"du -k copy/vm-flat.vmdk | cut -f1"); out != "3072\n" {
			t.Errorf("thin was not kept: %s", out)
		}
		vmx := want(t, c, cd+"cat vm/vm.vmx")
		want(t, c, cd+"cat >copy/vm.vmx", vmx)
		if out := want(t, c, `vim-cmd solo/registervm "/vmfs/volumes/datastore1/copy/vm.vmx" "the 'copy'"`); out != "2\n" {
			t.Error(out)
		}
		out, _, status := sh(t, c, "vim-cmd solo/registervm /vmfs/volumes/datastore1/copy/vm.vmx")
		if status != h.edition.shell.faultStatus || !strings.HasPrefix(out, "(vim.fault.AlreadyExists) {") || !strings.Contains(out, `name = "2"`) {
			t.Errorf("%d %s", status, out)
		}
		// Starting blocks at a question.
		s, err := c.NewSession()
		must(t, err)
		must(t, s.Start("vim-cmd vmsvc/power.on 2"))
		var id, choice string
		for id == "" {
			out := want(t, c, "vim-cmd vmsvc/message 2")
			m := regexp.MustCompile(`(?s)^Virtual machine message (\w+):\nmsg\.uuid\.altered:.*\n(\d)\. I _copied it \(I _copied it\) \[default\]\n`).FindStringSubmatch(out)
			if m != nil {
				id, choice = m[1], m[2]
			} else if out != "No message.\n" {
				t.Fatal(out)
			}
		}
		if summary := want(t, c, "vim-cmd vmsvc/get.summary 2"); !strings.Contains(summary, "question = (vim.vm.QuestionInfo) {") {
			t.Error(summary)
		}
		want(t, c, "vim-cmd vmsvc/message 2 "+id+" "+choice)
		must(t, s.Wait())
		if out := want(t, c, "vim-cmd vmsvc/power.getstate 2"); !strings.Contains(out, "Powered on") {
			t.Error(out)
		}
		same(t, "restored", disk(t, h, "the 'copy'", 0), content)
		out, _, status = sh(t, c, "vim-cmd vmsvc/power.on 2")
		if h.edition.shell.powerText != strings.Contains(out, "Power on failed") || status != h.edition.shell.faultStatus ||
			!h.edition.shell.powerText && !strings.Contains(out, `existingState = "poweredOn"`) {
			t.Errorf("%d %s", status, out)
		}
		if _, errs, status := sh(t, c, cd+"echo x >>copy/vm-flat.vmdk; rm -rf copy"); status != 1 || !strings.Contains(errs, "can't create copy/vm-flat.vmdk: Device or resource busy") ||
			!strings.Contains(errs, "rm: can't remove 'copy': Device or resource busy") {
			t.Errorf("%d %s", status, errs)
		}
		want(t, c, "vim-cmd vmsvc/power.shutdown 2 && vim-cmd vmsvc/unregister 2 && "+cd+"vmkfstools -U copy/vm.vmdk && rm -r copy")
		if out := want(t, c, "ls /vmfs/volumes/datastore1"); out != "vm\n" {
			t.Error(out)
		}
	}
}

func TestVmkfstools(t *testing.T) {
	qemu := judge(t, "qemu-img")
	h := sshHost(t, Options{})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 16*mib, 1)}, VMOptions{ChangeTracking: true, Thin: true, PowerOn: true}))
	c := dial(t, h)
	cd := "cd /vmfs/volumes/datastore1/vm; "
	must(t, h.Snapshot("vm", "a"))
	must(t, h.WriteAt("vm", 0, noise(3*mib, 5), 2*mib+777))
	must(t, h.Snapshot("vm", "b"))
	frozen := disk(t, h, "vm", 0)
	if out := want(t, c, cd+"vmkfstools -t0 vm.vmdk"); out != "Mapping for file vm.vmdk (16777216 bytes in size):\n"+
		"[           0:     1048576] --> [VMFS -- LVID:5e0026d9-a647150e-d8a8-4cedfb76e9d5/5e0026d9-a647150e-d8a8-4cedfb76e9d5/1:(   4294967296 -->    4296015872)]\n"+
		"[     1048576:     7340032] --> [NOMP -- :(            0 -->       7340032)]\n"+
		"[     8388608:     1048576] --> [VMFS -- LVID:5e0026d9-a647150e-d8a8-4cedfb76e9d5/5e0026d9-a647150e-d8a8-4cedfb76e9d5/1:(   4296015872 -->    4297064448)]\n"+
		"[     9437184:     6291456] --> [NOMP -- :(            0 -->       6291456)]\n"+
		"[    15728640:     1048576] --> [VMFS -- LVID:5e0026d9-a647150e-d8a8-4cedfb76e9d5/5e0026d9-a647150e-d8a8-4cedfb76e9d5/1:(   4297064448 -->    4298113024)]\n" {
		t.Error(out)
	}
	// A clone of a frozen link is the whole chain's content.
	if out := want(t, c, cd+"vmkfstools -i vm-000001.vmdk -d thin clone.vmdk"); !strings.HasSuffix(out, "Clone: 55% done.\rClone: 100% done.\n") {
		t.Errorf("%q", out)
	}
	raw := filepath.Join(t.TempDir(), "raw")
	if msg, err := ask(t, nil, qemu, "convert", "-O", "raw", filepath.Join(h.o.Dir, "vm", "clone.vmdk"), raw); err != nil {
		t.Fatal(msg)
	}
	got, err := os.ReadFile(raw)
	must(t, err)
	same(t, "clone", got, frozen)
	if out := want(t, c, cd+"vmkfstools -e vm-000001.vmdk"); out != "Disk chain is consistent.\n" {
		t.Error(out)
	}
	want(t, c, cd+"vmkfstools -E clone.vmdk other.vmdk && ls other-flat.vmdk && vmkfstools -X 20m other.vmdk && grep -c '^RW 40960 VMFS' other.vmdk && vmkfstools -P .")
	want(t, c, cd+"vmkfstools -c 4m lazy.vmdk; vmkfstools -c 4m -d eagerzeroedthick eager.vmdk; vmkfstools --createvirtualdisk=4m --diskformat thin thin.vmdk")
	for name, mark := range map[string]string{"lazy": "VMFS Z- LVID:", "eager": "VMFS -- LVID:", "thin": "NOMP -- :"} {
		if out := want(t, c, cd+"vmkfstools -t0 "+name+".vmdk"); strings.Count(out, "\n") != 2 || !strings.Contains(out, mark) {
			t.Errorf("%s: %s", name, out)
		}
	}
	for line, text := range map[string]string{
		"vmkfstools -i vm-000002.vmdk x.vmdk":      "Failed to clone disk: Failed to lock the file (16392).",
		"vmkfstools -c 4m lazy.vmdk":               "Failed to create virtual disk: The file already exists (39).",
		"vmkfstools -c 9t -d zeroedthick x.vmdk":   "There is not enough space on the file system for the selected operation (13).",
		"vmkfstools -U none.vmdk":                  "Failed to delete virtual disk: The system cannot find the file specified (25).",
		"vmkfstools -U vm.vmx":                     "The file specified is not a virtual disk (15).",
		"vmkfstools -X 1g vm.vmdk":                 "Failed to extend the disk:",
		"vmkfstools -c 4m -d 2gbsparse x.vmdk":     "Invalid disk format '2gbsparse'",
		"vmkfstools -e none.vmdk":                  "(25).",
		"vmkfstools -c nonsense x.vmdk":            "invalid size",
		"vmkfstools -i lazy.vmdk /none/there.vmdk": "(25).",
	} {
		if _, errs, status := sh(t, c, cd+line); status != vmkStatus || !strings.Contains(errs, text) {
			t.Errorf("%s: %d %s", line, status, errs)
		}
	}
	text, err := os.ReadFile(filepath.Join(h.o.Dir, "vm", "vm-000001.vmdk"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(h.o.Dir, "vm", "bad.vmdk"), regexp.MustCompile("parentCID=.*").ReplaceAll(text, []byte("parentCID=12345678")), 0o600))
	if _, errs, status := sh(t, c, cd+"vmkfstools -e -v10 bad.vmdk"); status != vmkStatus || !strings.Contains(errs, "Content ID mismatch") {
		t.Errorf("%d %s", status, errs)
	}
	if out := want(t, c, cd+"vmkfstools -D vm-flat.vmdk"); !strings.Contains(out, "mode 1, owner 5e0026d9") {
		t.Error(out)
	}
}

func TestHostileNames(t *testing.T) {
	name := `a'; $(touch pwned) "b" \ [c]`
	h := sshHost(t, Options{})
	must(t, h.ImportVM(t.Context(), name, []string{image(t, 4*mib, 1)}, VMOptions{}))
	must(t, h.Annotate(name, "first line\n2      fake   [datastore1] x/x.vmx   other   vmx-08   \nlast \"line\""))
	must(t, h.ImportVM(t.Context(), "b", []string{image(t, 4*mib, 1)}, VMOptions{}))
	c := dial(t, h)
	out := want(t, c, "vim-cmd vmsvc/getallvms")
	file := "[datastore1] " + name + "/" + name + ".vmx"
	lines := strings.Split(out, "\n")
	if len(lines) != 6 || !strings.HasPrefix(lines[1], "1      "+name+"   "+file+"   debian11_64Guest   vmx-21    first line") ||
		lines[3] != `last "line"` || !strings.HasPrefix(lines[4], "2      b  ") || strings.Index(lines[0], "File") != 10+len(name)+(len(file)-4)/2 {
		t.Error(out)
	}
	if out := want(t, c, "vim-cmd vmsvc/get.config 1"); !strings.Contains(out, `name = "`+name+`",`) || !strings.Contains(out, "annotation = \"first line\n2      fake") {
		t.Error(out)
	}
	want(t, c, `test ! -e /pwned`)
}

func TestInvalidVM(t *testing.T) {
	h := sshHost(t, Options{})
	must(t, h.ImportVM(t.Context(), "a", []string{image(t, 4*mib, 1)}, VMOptions{}))
	must(t, h.ImportVM(t.Context(), "b", []string{image(t, 4*mib, 1)}, VMOptions{}))
	c := dial(t, h)
	want(t, c, "rm /vmfs/volumes/datastore1/a/a.vmx")
	if out := want(t, c, "vim-cmd vmsvc/getallvms"); !strings.HasPrefix(out, "Skipping invalid VM '1'\nVmid   Name") || !strings.Contains(out, "\n2      b") {
		t.Error(out)
	}
	// An edited configuration counts when it is reloaded, or when the VM starts.
	want(t, c, `cd /vmfs/volumes/datastore1/b; sed -e 's/^displayName = .*/displayName = "edited"/' b.vmx >/tmp/n && cat /tmp/n >b.vmx && vim-cmd vmsvc/reload 2`)
	if out := want(t, c, "vim-cmd vmsvc/getallvms"); !strings.Contains(out, "2      edited   ") {
		t.Error(out)
	}
}

func TestBackgroundCommandsOutliveTheirConnection(t *testing.T) {
	h := sshHost(t, Options{})
	c := dial(t, h)
	pid := strings.TrimSpace(want(t, c, `nohup sh -c 'sleep 1000; echo $? >/tmp/end' >/dev/null 2>&1 & echo $!`))
	c.Close()
	c = dial(t, h)
	if out := want(t, c, "ps | grep sleep | grep -v grep; kill -0 "+pid); !strings.Contains(out, pid) {
		t.Error(out)
	}
	want(t, c, "kill "+pid)
	for range 1000 {
		if _, _, status := sh(t, c, "kill -0 "+pid); status != 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Error("it lives")
}

func TestTasksAreForgotten(t *testing.T) {
	clock := newTestClock()
	h := sshHost(t, Options{Edition: "6.5", Clock: clock.now})
	must(t, h.ImportVM(t.Context(), "vm", []string{image(t, 4*mib, 1)}, VMOptions{}))
	c := dial(t, h)
	if out := want(t, c, "vim-cmd vmsvc/get.tasklist 1"); out != "(ManagedObjectReference) []\n" {
		t.Error(out)
	}
	want(t, c, "vim-cmd vmsvc/power.on 1")
	out := want(t, c, "vim-cmd vmsvc/get.tasklist 1")
	if out != "(ManagedObjectReference) [\n   'vim.Task:haTask-1-vim.VirtualMachine.powerOn-1', \n]\n" {
		t.Errorf("%q", out)
	}
	if out := want(t, c, "vim-cmd vimsvc/task_info haTask-1-vim.VirtualMachine.powerOn-1"); !strings.HasPrefix(out, "(vim.TaskInfo) {\n   dynamicType = <unset>, \n   key = \"haTask-1-vim.VirtualMachine.powerOn-1\", \n") ||
		!strings.Contains(out, `state = "success"`) || !strings.Contains(out, "entity = 'vim.VirtualMachine:1'") {
		t.Error(out)
	}
	clock.add(taskMemory + time.Second)
	if out, _, _ := sh(t, c, "vim-cmd vimsvc/task_info haTask-1-vim.VirtualMachine.powerOn-1"); !strings.HasPrefix(out, "(vmodl.fault.ManagedObjectNotFound) {") {
		t.Error(out)
	}
}

func TestEsxcli(t *testing.T) {
	h := sshHost(t, Options{Edition: "6.7", VMFS: 5, DatastoreBytes: 1 << 40})
	must(t, h.ImportVM(t.Context(), "web, 01", []string{image(t, 4*mib, 1)}, VMOptions{Thin: true, PowerOn: true}))
	c := dial(t, h)
	_, free := h.hv.Space()
	out := want(t, c, "esxcli --formatter=csv storage filesystem list")
	if !strings.HasPrefix(out, "Free,MountPoint,Mounted,Size,Type,UUID,VolumeName,\n"+
		fmt.Sprintf("%d,/vmfs/volumes/5e0026d9-a647150e-d8a8-4cedfb76e9d5,true,1099511627776,VMFS-5,5e0026d9-a647150e-d8a8-4cedfb76e9d5,datastore1,\n", free)) {
		t.Error(out)
	}
	if out := want(t, c, "esxcli storage filesystem list"); !strings.HasPrefix(out, "Mount Point                                        Volume Name  UUID    ") || !strings.Contains(out, "true     VMFS-5  1099511627776") {
		t.Error(out)
	}
	if out := want(t, c, "esxcli vm process list"); !strings.HasPrefix(out, "web, 01\n   World ID: 2097010\n") || !strings.Contains(out, "   Config File: /vmfs/volumes/5e0026d9-a647150e-d8a8-4cedfb76e9d5/web, 01/web, 01.vmx\n") {
		t.Error(out)
	}
	if out := want(t, c, "esxcli vm process list --formatter=csv"); !strings.Contains(out, `"web, 01",`) {
		t.Error(out)
	}
	if out := want(t, c, "esxcli --formatter=keyvalue system version get"); !strings.Contains(out, "VersionGet.Build.string=Releasebuild-14320388\n") {
		t.Error(out)
	}
	want(t, c, "esxcli network ip interface ipv4 get; esxcli network ip interface list; esxcli software profile get; esxcli --formatter=json system version get; df -h; df; vmware -l")
	if _, errs, status := sh(t, c, "esxcli no such thing"); status != 1 || errs != "Error: Unknown command or namespace no such thing\n" {
		t.Errorf("%d %s", status, errs)
	}
	want(t, c, "esxcli vm process kill -t=force -w=2097010")
	if _, errs, status := sh(t, c, "esxcli vm process kill --type=force --world-id=2097010"); status != 1 || !strings.HasPrefix(errs, "Error: ") {
		t.Errorf("%d %s", status, errs)
	}
}

func TestShellOnAFullDatastore(t *testing.T) {
	h := sshHost(t, Options{DatastoreBytes: 64 * mib})
	c := dial(t, h)
	cd := "cd /vmfs/volumes/datastore1; "
	want(t, c, cd+"vmkfstools -c 8m -d zeroedthick thick.vmdk; vmkfstools -c 8m -d thin thin.vmdk")
	if _, errs, status := sh(t, c, cd+"dd of=thin-flat.vmdk bs=1M seek=3 conv=notrunc", string(noise(mib, 1))); status != 0 {
		t.Error(errs)
	}
	_, err := h.Inject(Fault{Kind: FaultSpace})
	must(t, err)
	for line, ok := range map[string]bool{
		"dd of=thick-flat.vmdk bs=1M seek=5 conv=notrunc": true,  // it has its blocks
		"dd of=thin-flat.vmdk bs=1M seek=3 conv=notrunc":  true,  // this one is there
		"dd of=thin-flat.vmdk bs=1M seek=4 conv=notrunc":  false, // this one is not
		"cat >new": false,
	} {
		if _, errs, status := sh(t, c, cd+line, string(noise(mib, 2))); (status == 0) != ok || !ok && !strings.Contains(errs, "No space left on device") {
			t.Errorf("%s: %d %s", line, status, errs)
		}
	}
	h.ClearFaults()
	want(t, c, cd+"cat >new", string(noise(mib, 2)))
}
