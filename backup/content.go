package backup

import (
	"context"
	"errors"
	"io"

	"hikae/repo"
)

// content is a disk as one long stream, read ahead in parallel: what an upload
// sends. Close must be called, and no Read after it.
type content struct {
	cancel context.CancelCauseFunc
	chunks chan chunk
	end    chan struct{} // closed when err is set
	err    error
	told   func(int64)

	at   chunk
	sent int64
}

// chunk is a piece of the stream: data, or so many zeros.
type chunk struct {
	data    []byte
	zeros   int64
	release func()
}

var errUploadEnded = errors.New("the upload ended")

// newContent begins to read. told is called with the bytes of each Read.
func newContent(ctx context.Context, d *repo.Disk, bufs *pool, told func(int64)) *content {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &content{cancel: cancel, chunks: make(chan chunk), end: make(chan struct{}), told: told}
	go func() {
		defer close(c.end)
		defer close(c.chunks)
		var walkErr error
		c.err = stream(ctx, d, dataSteps(ctx, d, 0, true, &walkErr), bufs, func(ctx context.Context, s step, data []byte, release func()) error {
			next := chunk{data: data, release: release}
			if s.zero {
				next = chunk{zeros: s.Length, release: release}
			}
			select {
			case c.chunks <- next:
				return nil
			case <-ctx.Done():
				release()
				return context.Cause(ctx)
			}
		})
		if walkErr != nil {
			c.err = walkErr
		}
	}()
	return c
}

func (c *content) Read(p []byte) (n int, err error) {
	for len(c.at.data) == 0 && c.at.zeros == 0 {
		c.drop()
		next, ok := <-c.chunks
		if !ok {
			<-c.end
			if c.err != nil {
				return 0, c.err
			}
			return 0, io.EOF
		}
		c.at = next
	}
	if c.at.zeros > 0 {
		n = int(min(int64(len(p)), c.at.zeros))
		clear(p[:n])
		c.at.zeros -= int64(n)
	} else {
		n = copy(p, c.at.data)
		c.at.data = c.at.data[n:]
	}
	c.sent += int64(n)
	c.told(int64(n))
	return n, nil
}

func (c *content) drop() {
	if c.at.release != nil {
		c.at.release()
	}
	c.at = chunk{}
}

// Close ends the reading, gives all buffers back and tells how many bytes were
// read.
func (c *content) Close() (sent int64) {
	c.cancel(errUploadEnded)
	c.drop()
	for next := range c.chunks {
		next.release()
	}
	<-c.end
	return c.sent
}
