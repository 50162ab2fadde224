package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const thumbprint = "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF"

func host(name string) Host {
	return Host{Name: name, Address: "192.0.2.7:443", User: "root", PasswordFile: "/etc/hikae/" + name, Thumbprint: thumbprint}
}

func TestErrorsNameTheLine(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "[[repository]]\nname = \"main\"\npath = \"/r\"\npasphrase_file = \"/p\"\n", "f.toml:4: unknown key repository.pasphrase_file (did you mean passphrase_file?)"},
		{"unknown table", "# a\n\n[daemons]\nmetrics = 1\n", "f.toml:3: unknown key daemons"},
		{"unknown key in the second block", hostBlock(host("a")) + strings.Replace(hostBlock(host("b")), "user", "username", 1), "f.toml:10: unknown key host.username"},
		{"key after a multi-line string", "[[repository]]\nname = \"main\"\npath = \"\"\"\n[[host]]\n\"quoted\" \\\\\"\"\"\nwrong = 1\n", "f.toml:6: unknown key repository.wrong"},
		{"syntax", "[[repository]]\nname = main\n", "f.toml:2: "},
		{"wrong type", "[[repository]]\nname = 5\n", "f.toml"},
		{"no path", "\n[[repository]]\nname = \"main\"\n", "f.toml:2: repository main has no path"},
		{"two of one name", hostBlock(host("a")) + hostBlock(host("a")), "f.toml:7: two hosts are called a"},
		{"slash in a name", hostBlock(host("a/b")), "f.toml:1: host name"},
		{"thumbprint", strings.Replace(hostBlock(host("a")), "FF\"", "F\"", 1), "is not a SHA-256 thumbprint"},
		{"two secrets", "[[repository]]\nname = \"m\"\npath = \"/r\"\npassphrase_file=\"a\"\npassphrase_command=\"b\"\n", "f.toml:1: repository m has passphrase_file and passphrase_command"},
		{"not text", "\xff\xfe", "is not UTF-8 text"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f.toml", []byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error is %v, want one that says %q", err, c.want)
			}
			if !errors.Is(err, ErrConfig) {
				t.Errorf("%v is not ErrConfig", err)
			}
		})
	}
}

func TestPathsStartAtTheFile(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", "/home/op")
	path := filepath.Join(dir, "hikae.toml")
	text := "[[repository]]\nname = \"main\"\npath = \"~/backup\"\npassphrase_file = \"pass\"\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := Repository{Name: "main", Path: "/home/op/backup", PassphraseFile: filepath.Join(dir, "pass")}
	if d := cmp.Diff(want, f.Repositories[0]); d != "" {
		t.Error(d)
	}
}

// commented is what a person's file looks like: every comment in it has to
// survive every edit that does not remove what it speaks of.
const commented = `# my hikae

[[repository]]          # the NAS
name = "main"
path = "/mnt/nas/hikae"
# tested 2026-11-01

# --- hosts -------------------------------------------
# esx1 is the old one
[[host]]
name = "esx1"
address = "192.0.2.7:443"
user = "root"
password_file = "/etc/hikae/esx1"
thumbprint = "` + thumbprint + `"
# the password changes in spring

# esx2 is new
[[host]] # rack 2
"name" = 'esx2'
address = "192.0.2.8"
user = "backup"
password_file = "/etc/hikae/esx2"
thumbprint = "` + thumbprint + `"

# the end
`

func TestAddThenRemoveGivesTheSameFile(t *testing.T) {
	for _, text := range []string{commented, strings.TrimSuffix(commented, "\n"), ""} {
		path := filepath.Join(t.TempDir(), "sub", "hikae.toml")
		if text != "" {
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
				t.Fatal(err)
			}
		}
		h := host("esx3")
		h.User = "strange \"user\"\\\n\t√"
		if err := AddHost(path, h); err != nil {
			t.Fatal(err)
		}
		f, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := f.Host("esx3")
		if d := cmp.Diff(h, got); d != "" {
			t.Errorf("the host that was added reads back differently: %s", d)
		}
		if err := AddHost(path, h); err == nil {
			t.Error("the same host could be added twice")
		}
		if found, err := RemoveHost(path, "esx3"); !found || err != nil {
			t.Fatalf("remove: %v, %v", found, err)
		}
		after, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(strings.TrimRight(text, "\n"), strings.TrimRight(string(after), "\n")); d != "" {
			t.Errorf("file changed by adding and removing a host: %s", d)
		}
		if text != "" {
			if info, _ := os.Stat(path); info.Mode().Perm() != 0o640 {
				t.Errorf("mode became %v", info.Mode())
			}
		}
	}
}

func TestRemoveCutsOneBlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hikae.toml")
	if err := os.WriteFile(path, []byte(commented), 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := RemoveHost(path, "esx9"); found || err != nil {
		t.Fatalf("removing an unknown host: %v, %v", found, err)
	}
	if found, err := RemoveHost(path, "esx1"); !found || err != nil {
		t.Fatalf("remove: %v, %v", found, err)
	}
	after, _ := os.ReadFile(path)
	start := strings.Index(commented, "[[host]]\nname = \"esx1\"")
	end := strings.Index(commented, "# esx2 is new")
	if d := cmp.Diff(commented[:start]+commented[end:], string(after)); d != "" {
		t.Error(d)
	}
	// A comment that directly follows the last key, with no blank line before
	// the next header, may speak of either: it stays.
	tight := hostBlock(host("a")) + "# about b\n" + hostBlock(host("b"))
	if err := os.WriteFile(path, []byte(tight), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := RemoveHost(path, "a"); err != nil {
		t.Fatal(err)
	}
	after, _ = os.ReadFile(path)
	if d := cmp.Diff("# about b\n"+hostBlock(host("b")), string(after)); d != "" {
		t.Error(d)
	}
}

func TestUnusualStyleIsRefusedNotDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hikae.toml")
	text := `host = [{name="a", address="x", user="u", password_file="/p", thumbprint="` + thumbprint + `"}]` + "\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := RemoveHost(path, "a"); err == nil {
		t.Error("an inline host was removed")
	}
	if err := AddHost(path, host("b")); err == nil {
		t.Error("a block was added beside inline hosts")
	}
	after, _ := os.ReadFile(path)
	if string(after) != text {
		t.Errorf("file became %q", after)
	}
}

func TestEditFollowsSymlink(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real.toml"), filepath.Join(dir, "hikae.toml")
	if err := os.WriteFile(real, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real.toml", link); err != nil {
		t.Fatal(err)
	}
	if err := AddHost(link, host("a")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v, %v", info, err)
	}
	if f, err := Load(real); err != nil || len(f.Hosts) != 1 {
		t.Errorf("the file behind the link has %v, %v", f, err)
	}
}

// FuzzParse: whatever the bytes, parsing and finding lines end without panic,
// and a file that parses can be edited or is refused untouched.
func FuzzParse(f *testing.F) {
	f.Add([]byte(commented))
	f.Add([]byte("a = '''\n''''\nb = \"\\\"\"\n[x.'y]'.\"z\"]\n[[host]]\n"))
	f.Add([]byte("[[repository]]\nname=\"m\"\npath=[1,\n#]\n\"]\"]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		scan(text)
		old, err := Parse("f.toml", text)
		if err != nil {
			return
		}
		if _, taken := old.Host("fuzz"); taken {
			return
		}
		added := appendBlock(text, hostBlock(host("fuzz")))
		got, err := Parse("f.toml", added)
		if err != nil {
			return // refused by edit
		}
		cut, err := cutBlock(added, "host", len(got.Hosts)-1)
		if err != nil {
			t.Fatalf("the block just added cannot be cut: %v", err)
		}
		back, err := Parse("f.toml", cut)
		if err != nil || !sameMeaning(back, old) {
			t.Fatalf("adding and cutting changed the meaning: %v", err)
		}
	})
}
