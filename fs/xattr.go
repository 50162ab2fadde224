package fs

import (
	"context"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	xattrPrefix = "user.hikae."
	// verifiedAt is the only attribute that may change: when the generation was last
	// verified. It is not there while it never was.
	verifiedAt = "verified-at"
)

// xattrs returns the attributes of a file or folder; only, if not "", is the one
// that is asked for.
func (t *tree) xattrs(cancel <-chan struct{}, in *fuse.InHeader, only string) ([]xattr, syscall.Errno) {
	return attempt(t, in.Unique, cancel, "reading attributes failed", func(ctx context.Context) ([]xattr, error) {
		n, err := t.node(ctx, in.NodeId)
		if err != nil || n.gen == nil {
			return nil, err
		}
		var attrs []xattr
		if n.content != nil {
			attrs = n.content.attrs
		} else {
			o, err := t.shelf.open(ctx, n.gen)
			if err != nil {
				return nil, err
			}
			attrs = o.attrs
		}
		if only != "" && only != verifiedAt {
			return attrs, nil
		}
		at, err := t.verified(ctx, n.gen.ref)
		if err != nil {
			return nil, err
		}
		return joined(attrs, filled(xattr{verifiedAt, at})), nil
	})
}

// verdicts are what generations were last said about being verified, by sequence
// number: programs that copy attributes ask for those of every file.
type verdicts struct {
	mu sync.Mutex
	of map[uint64]verdict
}

type verdict struct {
	verified string
	asked    time.Time
}

const maxVerdicts = 1024

// verified is when a generation was last found good, as an attribute has it; "" for
// never. It may be as old as names may be.
func (t *tree) verified(ctx context.Context, r ref) (string, error) {
	now := t.cat.now()
	t.verdicts.mu.Lock()
	v, ok := t.verdicts.of[r.sequence]
	t.verdicts.mu.Unlock()
	if ok && now.Sub(v.asked) < t.ttl {
		return v.verified, nil
	}
	return once(ctx, t.cat.asking, "verified "+r.String(), func(ctx context.Context) (string, error) {
		at, err := t.src.Verified(ctx, r)
		if err != nil {
			return "", err
		}
		v := verdict{asked: now}
		if !at.IsZero() {
			v.verified = at.UTC().Format(time.RFC3339)
		}
		t.verdicts.mu.Lock()
		defer t.verdicts.mu.Unlock()
		if t.verdicts.of == nil || len(t.verdicts.of) >= maxVerdicts {
			t.verdicts.of = map[uint64]verdict{}
		}
		t.verdicts.of[r.sequence] = v
		return v.verified, nil
	})
}

func (t *tree) GetXAttr(cancel <-chan struct{}, in *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	short, ok := strings.CutPrefix(name, xattrPrefix)
	if !ok { // ls asks for access lists and labels of every file
		return 0, fuse.ENODATA
	}
	attrs, errno := t.xattrs(cancel, in, short)
	if errno != 0 {
		return 0, fuse.Status(errno)
	}
	for _, a := range attrs {
		if a.name == short {
			return answer(a.value, dest)
		}
	}
	return 0, fuse.ENODATA
}

func (t *tree) ListXAttr(cancel <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	attrs, errno := t.xattrs(cancel, in, "")
	if errno != 0 {
		return 0, fuse.Status(errno)
	}
	var b strings.Builder
	for _, a := range attrs {
		b.WriteString(xattrPrefix + a.name + "\x00")
	}
	return answer(b.String(), dest)
}

// answer tells the size when there is not room enough, which is also how the
// size is asked for.
func answer(s string, dest []byte) (uint32, fuse.Status) {
	if len(s) > len(dest) {
		return uint32(len(s)), fuse.ERANGE
	}
	return uint32(copy(dest, s)), fuse.OK
}
