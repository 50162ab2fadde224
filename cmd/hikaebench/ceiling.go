package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
)

// ceiling measures what no backup tool on this machine could pass with the same
// algorithms when it stores: the pipeline with nothing written.
func (b *bench) ceiling(ctx context.Context) error {
	r, err := b.pipeline(ctx)
	if err == nil {
		b.out.add(r)
	}
	return err
}

const blockSize = 128 << 10

// pipeline reads the first state, hashes, compresses and seals every block
// that is not zero, on all processors, and throws the result away.
func (b *bench) pipeline(ctx context.Context) (row, error) {
	b.dropCaches()
	f, err := os.Open(b.states[0].path)
	if err != nil {
		return row{}, err
	}
	defer f.Close()
	var offsets []int64
	last := int64(-1)
	for _, a := range b.states[0].data {
		for off := a.start / blockSize * blockSize; off < a.start+a.length; off += blockSize {
			if off > last {
				offsets = append(offsets, off)
				last = off
			}
		}
	}
	var next, sealed atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	begin := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			if n, err := seal(ctx, f, offsets, &next); err != nil {
				failed.Store(&err)
			} else {
				sealed.Add(n)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return row{}, *err
	}
	return row{
		Step: stepFull, Tool: "pipeline alone", Seconds: time.Since(begin).Seconds(),
		Bytes: total(b.states[0].data), Stored: sealed.Load(), Note: "nothing written",
	}, nil
}

func seal(ctx context.Context, f *os.File, offsets []int64, next *atomic.Int64) (n int64, err error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		return 0, err
	}
	hash, err := blake3.NewKeyed(make([]byte, 32))
	if err != nil {
		return 0, err
	}
	cipherBlock, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		return 0, err
	}
	aead, err := cipher.NewGCM(cipherBlock)
	if err != nil {
		return 0, err
	}
	buf, zero := make([]byte, blockSize), make([]byte, blockSize)
	var id, nonce, packed, out []byte
	nonce = make([]byte, aead.NonceSize())
	for ctx.Err() == nil {
		i := next.Add(1) - 1
		if i >= int64(len(offsets)) {
			return n, nil
		}
		// The last block of a disk may be short; a short read is all of it.
		k, _ := f.ReadAt(buf, offsets[i])
		if bytes.Equal(buf[:k], zero[:k]) {
			continue
		}
		hash.Reset()
		_, _ = hash.Write(buf[:k]) // a hash takes everything
		id = hash.Sum(id[:0])
		packed = enc.EncodeAll(buf[:k], packed[:0])
		binary.LittleEndian.PutUint64(nonce, uint64(i))
		out = aead.Seal(out[:0], nonce, packed, id)
		n += int64(len(out))
	}
	return n, ctx.Err()
}
