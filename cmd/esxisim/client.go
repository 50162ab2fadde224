package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// controlFlag adds --control and returns how to reach the socket.
func controlFlag(cmd *cobra.Command) func() (*client, error) {
	path := cmd.PersistentFlags().String("control", "", "control socket of the running host (default $ESXISIM_CONTROL)")
	return func() (*client, error) {
		p := *path
		if p == "" {
			p = os.Getenv("ESXISIM_CONTROL")
		}
		if p == "" {
			return nil, usage("--control SOCKET is required: \"esxisim serve\" prints it")
		}
		return newClient(p), nil
	}
}

type client struct{ http *http.Client }

func newClient(path string) *client {
	return &client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
			if err != nil {
				return nil, fmt.Errorf("no simulated host listens on %s: %w", path, errors.Unwrap(err))
			}
			return c, nil
		},
		DisableKeepAlives: true,
	}}}
}

// do sends a request; the caller closes the body.
func (c *client) do(ctx context.Context, method, path string, q url.Values, body io.Reader) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://esxisim"+path+"?"+q.Encode(), body)
	if err != nil {
		return nil, err
	}
	res, err := c.http.Do(req)
	var ue *url.Error
	if errors.As(err, &ue) {
		return nil, ue.Err
	}
	if err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusOK {
		return res.Body, nil
	}
	defer res.Body.Close()
	var e struct{ Error string }
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&e); err != nil || e.Error == "" {
		return nil, fmt.Errorf("the host answered %s", res.Status)
	}
	return nil, errors.New(e.Error)
}

// print is do, and prints the answer.
func (c *client) print(cmd *cobra.Command, method, path string, q url.Values, body io.Reader) error {
	res, err := c.do(cmd.Context(), method, path, q, body)
	if err != nil {
		return err
	}
	defer res.Close()
	_, err = io.Copy(cmd.OutOrStdout(), res)
	return err
}

func writeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "write VM DISK OFFSET < bytes",
		Short: "Write as the guest: standard input to its end, at a byte offset of a disk",
		Args:  exactArgs(3),
	}
	dial := controlFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := dial()
		if err != nil {
			return err
		}
		q := url.Values{"vm": args[:1], "disk": args[1:2], "offset": args[2:]}
		// Without the type the client could not tell an empty body's length.
		return c.print(cmd, http.MethodPost, "/write", q, io.NopCloser(cmd.InOrStdin()))
	}
	return cmd
}

func becomeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "become VM DISK image.raw",
		Short: "Guest writes that turn a disk into an image; what is equal is not written",
		Args:  exactArgs(3),
	}
	dial := controlFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := dial()
		if err != nil {
			return err
		}
		image, err := absolute(args[2])
		if err != nil {
			return err
		}
		q := url.Values{"vm": args[:1], "disk": args[1:2], "image": {image}}
		return c.print(cmd, http.MethodPost, "/become", q, nil)
	}
	return cmd
}

func readCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "read VM DISK > image.raw",
		Short: "What the guest sees now, as a raw image; into a file with holes",
		Args:  exactArgs(2),
	}
	dial := controlFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := dial()
		if err != nil {
			return err
		}
		body, err := c.do(cmd.Context(), http.MethodGet, "/read", url.Values{"vm": args[:1], "disk": args[1:]}, nil)
		if err != nil {
			return err
		}
		defer body.Close()
		return unframe(body, cmd.OutOrStdout())
	}
	return cmd
}

// unframe writes a framed disk as a raw image. Holes are skipped in a regular
// file and written as zeros anywhere else.
func unframe(r io.Reader, w io.Writer) error {
	sparse, _ := w.(*os.File)
	if sparse != nil {
		fi, err := sparse.Stat()
		flags, ferr := unix.FcntlInt(sparse.Fd(), unix.F_GETFL, 0)
		if err != nil || ferr != nil || !fi.Mode().IsRegular() || flags&unix.O_APPEND != 0 {
			sparse = nil
		}
	}
	zeros := make([]byte, 64<<10)
	var head [frameHead]byte
	for off := int64(0); ; {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("the host stopped in the middle of the disk: %w", err)
		}
		start, n := int64(binary.BigEndian.Uint64(head[:])), int64(binary.BigEndian.Uint64(head[8:]))
		if start < off || n < 0 {
			return errors.New("the host sent areas out of order")
		}
		if sparse != nil {
			pos, err := sparse.Seek(start-off, io.SeekCurrent)
			if err == nil && n == 0 {
				err = sparse.Truncate(pos)
			}
			if err != nil {
				return err
			}
		} else {
			for gap := start - off; gap > 0; {
				m, err := w.Write(zeros[:min(gap, int64(len(zeros)))])
				if err != nil {
					return err
				}
				gap -= int64(m)
			}
		}
		if n == 0 {
			return nil
		}
		if _, err := io.CopyN(w, r, n); err != nil {
			return err
		}
		off = start + n
	}
}

func statsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Requests and bytes of bodies out and in, for each way into the host, as JSON",
		Args:  exactArgs(0),
	}
	dial := controlFlag(cmd)
	reset := cmd.Flags().Bool("reset", false, "start counting anew")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := dial()
		if err != nil {
			return err
		}
		return c.print(cmd, http.MethodGet, "/stats", url.Values{"reset": {fmt.Sprint(*reset)}}, nil)
	}
	return cmd
}

// post sends JSON and prints the answer.
func (c *client) post(cmd *cobra.Command, path string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.print(cmd, http.MethodPost, path, nil, bytes.NewReader(text))
}
