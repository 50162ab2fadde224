package esxi

import (
	"fmt"
	"net/url"
	"path"
	"strings"
)

// splitPath takes "[datastore1] web01/web01.vmx" apart.
func splitPath(dsPath string) (datastore, file string, err error) {
	rest, ok := strings.CutPrefix(dsPath, "[")
	if ok {
		datastore, file, ok = strings.Cut(rest, "]")
	}
	if !ok || datastore == "" {
		return "", "", fmt.Errorf("%q is not a datastore path like \"[datastore1] web01/web01.vmx\"", dsPath)
	}
	file = path.Clean("/" + strings.TrimPrefix(file, " "))[1:]
	if strings.ContainsRune(file, 0) {
		return "", "", fmt.Errorf("datastore path %q contains a zero byte", dsPath)
	}
	return datastore, file, nil
}

func joinPath(datastore, file string) string {
	return "[" + datastore + "] " + file
}

// beside resolves a file that a descriptor at dsPath names: relative to it, or
// absolute below /vmfs/volumes. stores maps the volumes' names and ids there to
// datastore names.
func beside(dsPath, name string, stores map[string]string) (string, error) {
	ds, p, err := splitPath(dsPath)
	if err != nil {
		return "", err
	}
	if name == "" {
		return "", fmt.Errorf("%s names an extent without a name", dsPath)
	}
	if abs, ok := strings.CutPrefix(path.Clean(name), "/vmfs/volumes/"); ok {
		volume, file, _ := strings.Cut(abs, "/")
		store, known := stores[volume]
		if !known || file == "" {
			return "", fmt.Errorf("%s refers to %s, which is on no datastore the host knows", dsPath, name)
		}
		return joinPath(store, file), nil
	}
	if strings.HasPrefix(name, "/") {
		return "", fmt.Errorf("%s refers to %s, which is on no datastore", dsPath, name)
	}
	rel := path.Join(path.Dir(p), name)
	if rel == ".." || strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("%s refers to %s, outside of its datastore", dsPath, name)
	}
	return joinPath(ds, rel), nil
}

// folderURL is a datastore path as the host's file server takes it:
// https://host/folder/PATH?dcPath=DC&dsName=DS (vSphere Web Services SDK
// Programming Guide, "HTTP Access to vSphere Server Files").
func folderURL(addr, datacenter, datastore, file string) *url.URL {
	var escaped []string
	for _, s := range strings.Split(file, "/") {
		escaped = append(escaped, escape(s))
	}
	return &url.URL{
		Scheme:  "https",
		Host:    addr,
		Path:    "/folder/" + file,
		RawPath: "/folder/" + strings.Join(escaped, "/"),
		// Not url.Values: it writes a blank as "+", which the host takes for a plus.
		RawQuery: "dcPath=" + escape(datacenter) + "&dsName=" + escape(datastore),
	}
}

// escape percent-encodes every byte that is not unreserved (RFC 3986).
func escape(s string) string {
	const upper = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0 {
			b.WriteByte(c)
			continue
		}
		b.WriteByte('%')
		b.WriteByte(upper[c>>4])
		b.WriteByte(upper[c&15])
	}
	return b.String()
}
