package keys

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"golang.org/x/crypto/argon2"
)

// Kind says what kind of secret opens a slot.
type Kind string

// Kinds of slots.
const (
	KindPassphrase Kind = "passphrase"
	KindKeyFile    Kind = "key-file"
	KindRecovery   Kind = "recovery"
)

// Params are the costs of Argon2id. The zero value stands for the default.
type Params struct {
	Time      uint32 // passes, 1…100
	MemoryKiB uint32 // 8·Threads…1048576
	Threads   uint8  // 1…64
}

// DefaultParams cost about a fifth of a second and 64 MiB.
func DefaultParams() Params { return Params{Time: 3, MemoryKiB: 64 << 10, Threads: 4} }

func (p Params) check() error {
	if p.Time < 1 || p.Time > 100 || p.Threads < 1 || p.Threads > 64 ||
		p.MemoryKiB < 8*uint32(p.Threads) || p.MemoryKiB > 1<<20 {
		return fmt.Errorf("%w: time %d (1 to 100), memory %d KiB (8 per thread to 1048576), threads %d (1 to 64)",
			ErrParams, p.Time, p.MemoryKiB, p.Threads)
	}
	return nil
}

// Secret is what a person or a file holds to open a repository.
type Secret struct {
	kind Kind
	key  []byte
}

// Passphrase is a secret that a person chose. The bytes count as they are: drop
// the line end of a file first. The secret keeps its own copy.
func Passphrase(p []byte) Secret {
	return Secret{kind: KindPassphrase, key: append([]byte(nil), p...)}
}

// KeyFile is the secret in a key file's content: 64 hexadecimal digits and
// white space around them.
func KeyFile(content []byte) (Secret, error) {
	text := strings.TrimSpace(string(content))
	key, err := hex.DecodeString(text)
	if err != nil || len(key) != keySize {
		clear(key)
		return Secret{}, fmt.Errorf("%w: a key file holds 64 hexadecimal digits and nothing else", ErrSecret)
	}
	return Secret{kind: KindKeyFile, key: key}, nil
}

// NewKeyFile makes a random secret and the content of its key file.
func NewKeyFile() ([]byte, Secret) {
	s := Secret{kind: KindKeyFile, key: random(keySize)}
	return append(hex.AppendEncode(nil, s.key), '\n'), s
}

const (
	recoveryKey   = 22 // 176 bits: no use in guessing, and with the check eight groups of five
	recoveryCheck = 3
	// Crockford's alphabet: no letter that is taken for a digit.
	recoveryDigits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
)

// NewRecoveryCode makes a random secret and the code to print and put away:
// eight groups of five letters and digits, which stand for 22 bytes of key and
// 3 of checksum.
func NewRecoveryCode() (string, Secret) {
	s := Secret{kind: KindRecovery, key: random(recoveryKey)}
	raw := append(append([]byte(nil), s.key...), recoverySum(s.key)...)
	defer clear(raw)
	var code strings.Builder
	for i := range 40 {
		if i > 0 && i%5 == 0 {
			code.WriteByte('-')
		}
		var five byte
		for bit := i * 5; bit < i*5+5; bit++ {
			five = five<<1 | raw[bit/8]>>(7-bit%8)&1
		}
		code.WriteByte(recoveryDigits[five])
	}
	return code.String(), s
}

// RecoveryCode reads a code as a person types it: case, spaces and dashes do not
// matter, O is 0, I and L are 1. A mistyped code is told from a wrong one.
func RecoveryCode(code []byte) (Secret, error) {
	raw := make([]byte, recoveryKey+recoveryCheck)
	defer clear(raw)
	n := 0
	for _, c := range strings.ToUpper(string(code)) {
		switch c {
		case ' ', '-', '\t', '\r', '\n':
			continue
		case 'O':
			c = '0'
		case 'I', 'L':
			c = '1'
		}
		five := strings.IndexRune(recoveryDigits, c)
		if five < 0 {
			return Secret{}, fmt.Errorf("%w: a recovery code has no %q", ErrSecret, c)
		}
		if n == 40 {
			n++
			break
		}
		for i := range 5 {
			bit := n*5 + i
			raw[bit/8] |= byte(five>>(4-i)&1) << (7 - bit%8)
		}
		n++
	}
	if n != 40 {
		return Secret{}, fmt.Errorf("%w: a recovery code has 40 letters and digits", ErrSecret)
	}
	key := append([]byte(nil), raw[:recoveryKey]...)
	if string(recoverySum(key)) != string(raw[recoveryKey:]) {
		clear(key)
		return Secret{}, fmt.Errorf("%w: the recovery code is mistyped", ErrSecret)
	}
	return Secret{kind: KindRecovery, key: key}, nil
}

func recoverySum(key []byte) []byte {
	h := sha256.New()
	h.Write([]byte("hikae/1 recovery\x00"))
	h.Write(key)
	return h.Sum(nil)[:recoveryCheck]
}

// Kind is the kind of slot that the secret opens.
func (s Secret) Kind() Kind { return s.kind }

// Wipe overwrites the secret. It must not be used any more.
func (s Secret) Wipe() { clear(s.key) }

// Format keeps secrets out of logs and error messages, whatever the verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[secret]") }

// MarshalText keeps secrets out of what is encoded as text.
func (s Secret) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }

func (s Secret) usable() error {
	switch {
	case len(s.key) == 0 && s.kind == KindPassphrase:
		return fmt.Errorf("%w: the passphrase is empty", ErrSecret)
	case len(s.key) == 0:
		return fmt.Errorf("%w: none given", ErrSecret)
	}
	return nil
}

// slotKey derives the key of a slot's body; p counts for passphrases only.
func (s Secret) slotKey(salt []byte, p Params) [keySize]byte {
	if s.kind != KindPassphrase {
		return derive(s.key, salt, "hikae/1 slot "+string(s.kind))
	}
	b := argon2.IDKey(s.key, salt, p.Time, p.MemoryKiB, p.Threads, keySize)
	defer clear(b)
	return [keySize]byte(b)
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: the program ends if the system has no randomness
	return b
}
