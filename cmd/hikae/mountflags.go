package main

import (
	"fmt"
	"os/user"
	"strconv"
	"time"

	"github.com/spf13/pflag"

	"hikae/cmd/hikae/internal/app"
	"hikae/fs"
	"hikae/repo/retention"
)

// mountOptions are the flags of mount, as they were given.
type mountOptions struct {
	foreground bool
	handoff    bool

	allowOther      bool
	uid, gid, umask string
	hosts, vms      []string
	since           string
}

func (o *mountOptions) register(f *pflag.FlagSet) {
	f.BoolVar(&o.foreground, "foreground", false, "do not go to the background")
	f.BoolVar(&o.allowOther, "allow-other", false, "let other users read it too (needs user_allow_other in /etc/fuse.conf unless root)")
	f.StringVar(&o.uid, "uid", "", "user who owns what is shown, by name or number (default: the calling user)")
	f.StringVar(&o.gid, "gid", "", "group that owns it, by name or number (default: the calling group)")
	f.StringVar(&o.umask, "umask", "", "permission bits to take away, octal: of files 0444, of folders 0555")
	f.StringArrayVar(&o.hosts, "host", nil, "show the VMs of this host only; may be given several times")
	f.StringVar(&o.since, "since", "", "show only generations made since then: a time, or an age as 30d or 6m")
	f.StringArrayVar(&o.vms, "vm", nil, "show this VM only, VM or HOST/VM; may be given several times")
}

// args gives the flags on to the process in the background.
func (o *mountOptions) args() []string {
	var out []string
	if o.allowOther {
		out = append(out, "--allow-other")
	}
	for name, value := range map[string]string{"uid": o.uid, "gid": o.gid, "umask": o.umask, "since": o.since} {
		if value != "" {
			out = append(out, "--"+name+"="+value)
		}
	}
	for name, values := range map[string][]string{"host": o.hosts, "vm": o.vms} {
		for _, v := range values {
			out = append(out, "--"+name+"="+v)
		}
	}
	return out
}

// options are the mount's.
func (o *mountOptions) options(a *app.App) (fs.Options, error) {
	out := fs.Options{
		AllowOther: o.allowOther, Filter: fs.Filter{Hosts: o.hosts, VMs: o.vms}, Logger: a.Logger(), Clock: a.Clock,
	}
	var err error
	if out.UID, err = owner("--uid", o.uid, func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	}); err != nil {
		return out, err
	}
	if out.GID, err = owner("--gid", o.gid, func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	}); err != nil {
		return out, err
	}
	if o.umask != "" {
		bits, err := strconv.ParseUint(o.umask, 8, 32)
		if err != nil || bits > 0o777 {
			return out, app.Usagef("--umask %q is not a umask: write it octal, for example 027", o.umask)
		}
		out.Umask = uint32(bits)
	}
	out.Filter.Since, err = parseSince(o.since, a.Clock())
	return out, err
}

// owner reads a number, or a name that find knows.
func owner(flag, s string, find func(string) (string, error)) (*uint32, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		number, ferr := find(s)
		if ferr != nil {
			return nil, app.Usagef("%s %q: %v", flag, s, ferr)
		}
		if n, err = strconv.ParseUint(number, 10, 32); err != nil {
			return nil, fmt.Errorf("%s %q: %w", flag, s, err)
		}
	}
	id := uint32(n)
	return &id, nil
}

// parseSince reads a time, or an age seen from now.
func parseSince(s string, now time.Time) (time.Time, error) {
	if t, err := parseTime(s); err == nil {
		return t, nil
	}
	span, err := retention.ParseSpan(s)
	if err != nil {
		return time.Time{}, app.Usagef("--since %q is neither a time, as 2026-10-01T02:00:00Z or '2026-10-01 02:00', nor an age, as 30d, 1y6m or 36h", s)
	}
	return span.Before(now), nil
}
