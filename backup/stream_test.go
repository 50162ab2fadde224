package backup

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
)

// memSource is a disk in memory; fail, when set, decides per read.
type memSource struct {
	data []byte
	fail func(off int64) error
	read atomic.Int64
}

func (m *memSource) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if m.fail != nil {
		if err := m.fail(off); err != nil {
			return 0, err
		}
	}
	m.read.Add(int64(len(p)))
	return bytes.NewReader(m.data).ReadAt(p, off)
}

func TestStreamsShareAPoolInOrder(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	const capacity = 9*pieceSize + 1000
	data := make([]byte, capacity)
	rand.NewChaCha8([32]byte{}).Read(data)
	areas := []area{{Offset: 0, Length: 700}, {Offset: 3 * pieceSize / 2, Length: 5 * pieceSize}, {Offset: capacity - 5, Length: 5}}
	bufs := newPool(3)
	var g errgroup.Group
	for range 4 {
		g.Go(func() error {
			got := make([]byte, capacity)
			for i := range got {
				got[i] = 0xee
			}
			var at int64
			var late sync.WaitGroup
			err := stream(context.Background(), &memSource{data: data}, steps(areas, []area{{Offset: 0, Length: capacity}}), bufs,
				func(_ context.Context, s step, p []byte, release func()) error {
					if s.Offset != at || (s.zero != (p == nil)) {
						t.Errorf("step %+v out of order at %d", s, at)
					}
					at = s.End()
					if s.zero {
						clear(got[s.Offset:s.End()])
						return nil
					}
					late.Add(1)
					go func() { // as the repository does: released later, elsewhere
						defer late.Done()
						copy(got[s.Offset:], p)
						release()
					}()
					return nil
				})
			late.Wait()
			want := make([]byte, capacity)
			for _, a := range areas {
				copy(want[a.Offset:a.End()], data[a.Offset:a.End()])
			}
			if !bytes.Equal(got, want) {
				t.Error("the stream carried other bytes than the disk has")
			}
			if at != capacity {
				t.Errorf("ended at %d", at)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(bufs.free)+bufs.left != 3 {
		t.Error("buffers were lost")
	}
}

func TestSteps(t *testing.T) {
	const p = pieceSize
	for _, c := range []struct {
		areas, within []area
		want          []step
	}{
		{[]area{{Offset: p / 2, Length: p}}, nil, []step{{area{Offset: p / 2, Length: p / 2}, false}, {area{Offset: p, Length: p / 2}, false}}},
		{
			[]area{{Offset: 10, Length: 5}, {Offset: 20, Length: 5}, {Offset: 40, Length: 2}},
			[]area{{Offset: 0, Length: 25}, {Offset: 30, Length: 5}, {Offset: 40, Length: 10}},
			[]step{{area{Offset: 0, Length: 10}, true}, {area{Offset: 10, Length: 5}, false}, {area{Offset: 15, Length: 5}, true}, {area{Offset: 20, Length: 5}, false}, {area{Offset: 30, Length: 5}, true}, {area{Offset: 40, Length: 2}, false}, {area{Offset: 42, Length: 8}, true}},
		},
		{nil, []area{{Offset: 0, Length: 9 * p}}, []step{{area{Offset: 0, Length: 9 * p}, true}}},
		{nil, nil, nil},
	} {
		if got := slices.Collect(steps(c.areas, c.within)); !slices.Equal(got, c.want) {
			t.Errorf("steps(%v, %v) = %v, want %v", c.areas, c.within, got, c.want)
		}
	}
}

func TestStreamEndsOnErrors(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	bad := errors.New("bad sector")
	whole := []area{{Offset: 0, Length: 40 * pieceSize}}
	data := make([]byte, 40*pieceSize)
	ok := func(_ context.Context, _ step, _ []byte, release func()) error { release(); return nil }
	for name, c := range map[string]struct {
		src  *memSource
		take taker
		ctx  func() context.Context
		want error
	}{
		"read": {src: &memSource{data: data, fail: func(off int64) error {
			if off == 2*pieceSize {
				return bad
			}
			return nil
		}}, take: ok, want: bad},
		"take": {src: &memSource{data: data}, take: func(_ context.Context, s step, _ []byte, release func()) error {
			release()
			if s.Offset == 3*pieceSize {
				return bad
			}
			return nil
		}, want: bad},
		"short": {src: &memSource{data: data[:5*pieceSize+3]}, take: ok, want: io.ErrUnexpectedEOF},
		"cancelled": {src: &memSource{data: data}, take: func(_ context.Context, _ step, _ []byte, release func()) error {
			time.Sleep(time.Millisecond)
			release()
			return nil
		}, want: context.Canceled, ctx: func() context.Context {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(3*time.Millisecond, cancel)
			return ctx
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			if c.ctx != nil {
				ctx = c.ctx()
			}
			bufs := newPool(4)
			err := stream(ctx, c.src, steps(whole, nil), bufs, c.take)
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if c.src.read.Load() > 20*pieceSize {
				t.Errorf("it went on reading: %d bytes", c.src.read.Load())
			}
			if len(bufs.free)+bufs.left != 4 {
				t.Error("buffers were lost")
			}
		})
	}
}

func TestIncomparable(t *testing.T) {
	const a, b = "52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62", "52 00 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62"
	for _, c := range []struct {
		then, now string
		ok        bool
	}{
		{a + "/2", a + "/3", true},
		{a + "/2", a + "/2", true},
		{a + "/2", " " + a + "/18446744073709551615", true},
		{a + "/3", a + "/2", false},
		{a + "/2", b + "/3", false},
		{"", a + "/3", false},
		{a + "/2", "", false},
		{a, a + "/3", false},
		{a + "/2", a + "/x", false},
		{"/2", "/3", false},
	} {
		if why := incomparable(c.then, c.now); (why == "") != c.ok {
			t.Errorf("%s -> %s: %q", c.then, c.now, why)
		}
	}
}
