package repo

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"

	"github.com/zeebo/blake3"

	"hikae/repo/internal/block"
	"hikae/repo/internal/keys"
)

// hasher names blocks and tree nodes, by different keys: what is a node can never
// pass for a block. One goroutine at a time.
type hasher struct{ blocks, nodes *blake3.Hasher }

func newHasher(ring *keys.Ring) *hasher {
	keyed := func(key [32]byte) *blake3.Hasher {
		h, err := blake3.NewKeyed(key[:])
		if err != nil {
			panic("repo: " + err.Error()) // the key's length is a constant
		}
		return h
	}
	return &hasher{blocks: keyed(ring.IDKey()), nodes: keyed(ring.IDSubkey("node"))}
}

func sum(h *blake3.Hasher, p []byte) (id block.ID) {
	h.Reset()
	_, _ = h.Write(p) // never fails
	h.Sum(id[:0])
	return id
}

func (h *hasher) block(p []byte) block.ID { return sum(h.blocks, p) }
func (h *hasher) node(p []byte) block.ID  { return sum(h.nodes, p) }

// isZero tells whether all bytes are zero: the first is, and each equals the one
// before. The comparison runs at the speed of memory.
func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[:len(p)-1], p[1:])
}

// vmDir is the directory of a VM's generations. The name tells nothing to those
// without the keys.
func (r *Repository) vmDir(vm VMID) string {
	key := r.ring.IDSubkey("name")
	defer clear(key[:])
	h := hmac.New(sha256.New, key[:])
	h.Write([]byte(vm.Host + "\x00" + vm.Name))
	return "generations/" + hex.EncodeToString(h.Sum(nil)[:16])
}

// randomName is a name that nobody has used.
func randomName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: the program ends if the system has no randomness
	return hex.EncodeToString(b[:])
}
