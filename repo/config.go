package repo

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

// configName is the file that makes a directory a repository.
const configName = "config"

// DefaultBlockSize is the block size of new repositories, in bytes.
const DefaultBlockSize = 128 << 10

// config is what every reader must know before it has a key. The file is one
// line of JSON and one line with the HMAC of the first, so that nobody without
// the keys can change it, whatever fields it will have one day.
type config struct {
	Format    int       `json:"format"`
	ID        string    `json:"id"`         // 32 hexadecimal digits
	BlockSize int       `json:"block_size"` // bytes
	Created   time.Time `json:"created"`
	Parity    int       `json:"parity,omitempty"` // per cent, of what writers store

	id   [16]byte
	line []byte // the authenticated line, with its line feed
	mac  []byte
}

func newConfig(blockSize, parity int, now time.Time) (*config, error) {
	c := &config{Format: FormatVersion, BlockSize: blockSize, Parity: parity, Created: now.UTC().Truncate(time.Second)}
	_, _ = rand.Read(c.id[:]) // never fails: the program ends if the system has no randomness
	c.ID = hex.EncodeToString(c.id[:])
	line, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	c.line = append(line, '\n')
	return c, nil
}

// parity is how much parity writers make, in per cent. Whatever a later program may
// allow there, a repository must not become unreadable by it.
func (c *config) parity() int { return max(0, min(c.Parity, MaxParity)) }

func validBlockSize(n int) bool { return n == 64<<10 || n == 128<<10 || n == 256<<10 }

func (c *config) sum(ring *keys.Ring) []byte {
	key := ring.IDSubkey("config")
	defer clear(key[:])
	h := hmac.New(sha256.New, key[:])
	h.Write(c.line)
	return h.Sum(nil)
}

// encode returns the file's content.
func (c *config) encode(ring *keys.Ring) []byte {
	return append(hex.AppendEncode(bytes.Clone(c.line), c.sum(ring)), '\n')
}

// verify proves that the holder of the keys wrote the config.
func (c *config) verify(ring *keys.Ring) error {
	if !hmac.Equal(c.mac, c.sum(ring)) {
		return &DamageError{What: configName, Err: errors.New("it was changed by somebody without the keys; restore the file from a copy")}
	}
	return nil
}

func decodeConfig(b []byte) (*config, error) {
	bad := func(format string, a ...any) (*config, error) {
		return nil, &DamageError{What: configName, Err: fmt.Errorf(format, a...)}
	}
	line, rest, ok := bytes.Cut(b, []byte("\n"))
	if !ok {
		return bad("it has no second line")
	}
	c := &config{line: append(bytes.Clone(line), '\n')}
	// The format comes first: nothing else may be taken for granted.
	var v struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(line, &v); err != nil {
		return bad("%w", err)
	}
	if v.Format > FormatVersion {
		return nil, fmt.Errorf("%w: it has version %d, this program knows %d; upgrade hikae", ErrVersion, v.Format, FormatVersion)
	}
	if err := json.Unmarshal(line, c); err != nil {
		return bad("%w", err)
	}
	id, err := hex.DecodeString(c.ID)
	switch {
	case c.Format < 1:
		return bad("format version %d", c.Format)
	case err != nil || len(id) != len(c.id):
		return bad("id %q", c.ID)
	case !validBlockSize(c.BlockSize):
		return bad("blocks of %d bytes", c.BlockSize)
	}
	copy(c.id[:], id)
	if c.mac, err = hex.DecodeString(string(bytes.TrimSuffix(rest, []byte("\n")))); err != nil || len(c.mac) != sha256.Size {
		return bad("its second line is no HMAC")
	}
	return c, nil
}

func readConfig(fsys fsx.FS, dir string) (*config, error) {
	b, err := fsx.ReadFile(fsys, configName, 64<<10)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: %w: it has no file called %s; make a repository with hikae init", dir, ErrNotRepository, configName)
	case errors.Is(err, fsx.ErrTooLarge):
		return nil, fmt.Errorf("%s: %w: %w", dir, ErrNotRepository, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	c, err := decodeConfig(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return c, nil
}
