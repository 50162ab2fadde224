package busybox

import (
	"compress/gzip"
	"context"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"strings"

	"hikae/backup/esxisim/internal/shell"
)

// sum is md5sum and its sisters, with -c for a list.
func (b *Box) sum(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "csw")
	if !ok {
		return 1
	}
	kind := map[string]func() hash.Hash{"md5sum": md5.New, "sha1sum": sha1.New, "sha256sum": sha256.New, "sha512sum": sha512.New}[path.Base(p.Args[0])]
	digest := func(r io.Reader) (string, error) {
		h := kind()
		err := copyFile(ctx, h, r)
		return hex.EncodeToString(h.Sum(nil)), err
	}
	if opts['c'] == nil {
		return b.inputs(p, rest, func(name string, r io.Reader) error {
			text, err := digest(r)
			if err == nil {
				fmt.Fprintf(p.Out, "%s  %s\n", text, name)
			}
			return err
		})
	}
	failed := 0
	status := b.inputs(p, rest, func(_ string, r io.Reader) error {
		return lines(r, func(line string) bool {
			want, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
			if !ok {
				return true
			}
			got := ""
			if f, err := b.fs.Open(p.Path(name), os.O_RDONLY); err == nil {
				got, _ = digest(f)
				f.Close()
			}
			verdict := "OK"
			if got != want {
				verdict = "FAILED"
				failed++
			}
			if opts['s'] == nil {
				fmt.Fprintf(p.Out, "%s: %s\n", name, verdict)
			}
			return true
		})
	})
	if failed > 0 {
		return 1
	}
	return status
}

// gzip -c [-d] [-1…9], gunzip -c, zcat: from standard input or a file, always to
// standard output.
func (b *Box) gzip(ctx context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "cd123456789")
	if !ok {
		return 1
	}
	name := path.Base(p.Args[0])
	if len(rest) > 0 && opts['c'] == nil && name != "zcat" {
		p.Errorf("replacing files is not there: use -c")
		return 1
	}
	return b.inputs(p, rest, func(_ string, r io.Reader) error {
		if name != "gzip" || opts['d'] != nil {
			z, err := gzip.NewReader(r)
			if err != nil {
				return err
			}
			return copyFile(ctx, p.Out, z)
		}
		level := 6
		for c := byte('1'); c <= '9'; c++ {
			if opts[c] != nil {
				level = int(c - '0')
			}
		}
		z, err := gzip.NewWriterLevel(p.Out, level)
		if err != nil {
			return err
		}
		if err := copyFile(ctx, z, r); err != nil {
			return err
		}
		return z.Close()
	})
}

// hexdump -C
func (b *Box) hexdump(_ context.Context, p *shell.Proc) int {
	opts, rest, ok := flags(p, "Cvn:s:")
	if !ok {
		return 1
	}
	if opts['C'] == nil {
		p.Errorf("only -C is there")
		return 1
	}
	limit := int64(maxTail)
	if v := last(opts, 'n'); v != "" {
		n, err := size(v)
		if err != nil {
			p.Errorf("%v", err)
			return 1
		}
		limit = n
	}
	return b.inputs(p, rest, func(_ string, r io.Reader) error {
		d := hex.Dumper(p.Out)
		n, err := io.Copy(d, io.LimitReader(r, limit))
		if cerr := d.Close(); err == nil {
			err = cerr
		}
		if n > 0 {
			fmt.Fprintf(p.Out, "%08x\n", n)
		}
		return err
	})
}
