package main

import (
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/repo"
)

// versionInfo is what the build left in the program.
type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Time     string `json:"time,omitempty"` // of the revision
	Modified bool   `json:"modified"`       // built from a changed work tree
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Format   int    `json:"repository_format"`
}

func newVersion(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "print the program's version",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return runVersion(a) },
	}
	jsonFlag(a, cmd)
	return cmd
}

func runVersion(a *app.App) error {
	v := readVersion()
	if a.UI.JSON {
		return a.UI.Object(v)
	}
	a.UI.Printf("hikae %s\n", toolVersion())
	if v.Time != "" {
		a.UI.Printf("made from the revision of %s\n", v.Time)
	}
	a.UI.Printf("%s, %s, repository format %d\n", v.Go, v.Platform, v.Format)
	return nil
}

func readVersion() versionInfo {
	v := versionInfo{Version: "devel", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Format: repo.FormatVersion}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if main := info.Main.Version; main != "" && main != "(devel)" {
		v.Version = main
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.time":
			v.Time = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

// toolVersion is the version in one word, as generations record it.
func toolVersion() string {
	v := readVersion()
	s := v.Version
	if len(v.Revision) >= 12 && !strings.Contains(s, v.Revision[:12]) {
		s += "-" + v.Revision[:12]
	}
	if v.Modified && !strings.Contains(s, "dirty") {
		s += "+dirty"
	}
	return s
}
