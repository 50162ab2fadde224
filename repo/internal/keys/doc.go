// Package keys holds the secrets of a repository: the ring of master keys, and
// the slots by which a passphrase, a key file or a recovery code opens it.
//
// Promises:
//
//   - no secret leaves this package except as a subkey or sealed; the types that
//     hold one print as "[secret]";
//   - a slot that opens is whole: every field of its file is authenticated, so a
//     changed, swapped or renamed slot file opens nothing;
//   - costs named in a file are checked before they are paid;
//   - files are made whole or not at all, and never changed afterwards.
//
// # The ring
//
// A ring is the repository's id (16 random bytes), an id seed (32 random bytes)
// and the master keys (32 random bytes each) of its epochs, numbered from 1
// without gaps. Rotate begins a new epoch; what is written from then on is
// sealed under its master, what is there stays readable. The id seed is the same
// for ever: blocks would not deduplicate across a rotation otherwise.
//
// All derivation is HKDF-SHA256 (RFC 5869), 32 bytes out:
//
//	what               input key          salt         info
//	subkey             master of epoch    given        "hikae/1 " + label
//	id subkey          id seed            none         "hikae/1 id " + label
//	slot key, secrets  the secret bytes   slot's salt  "hikae/1 slot " + kind
//	of 22 or 32 bytes
//
// A passphrase's slot key is Argon2id(passphrase, salt, time, memory, threads),
// 32 bytes (RFC 9106, version 0x13). The passphrase is taken as the bytes it is.
//
// # Slot files: keys/<id>
//
// The name is the slot's id, 16 lower-case hexadecimal digits, random. The content
// is one JSON object of at most 64 KiB without other fields. hex is lower case;
// base64 is standard, padded.
//
//	format      number  1
//	repository  hex     the repository's id, 16 bytes
//	id          hex     the slot's id, 8 bytes, as in the name
//	kind        string  "passphrase", "key-file" or "recovery"
//	label       string  what its owner calls it, at most 256 bytes
//	created     string  RFC 3339, UTC, whole seconds
//	epoch       number  the newest epoch in the body
//	kdf         object  {"name", "salt": hex 32 bytes} and for "argon2id"
//	                    "time" 1…100, "memory_kib" 8·threads…1048576,
//	                    "threads" 1…64; the other kinds have name "hkdf-sha256"
//	                    and no costs
//	public      hex     the slot's X25519 public key, 32 bytes
//	mac         hex     32 bytes: HMAC-SHA256 of the header below, key: subkey of
//	                    epoch, label "slot", no salt
//	body        base64  the sealed body
//	checksum    hex     SHA-256 of header ‖ mac ‖ body: tells a damaged file
//	                    from a wrong passphrase; it proves nothing
//
// The header is, in this order, numbers little endian, str = u16 length ‖ bytes:
//
//	"hikae/1 key slot\x00" ‖ format u16 ‖ repository 16 ‖ id 8 ‖ str kind ‖
//	str label ‖ str created ‖ epoch u32 ‖ str kdf name ‖ time u32 ‖
//	memory_kib u32 ‖ threads u8 ‖ salt 32 ‖ public 32
//
// The body is AES-256-GCM with the slot key, a nonce of 12 zero bytes (each slot
// key seals one body, ever: its salt is random and slots are never changed) and
// associated data header ‖ mac. Its plaintext:
//
//	X25519 private key 32 ‖ id seed 32 ‖ epochs u32 (= epoch) ‖
//	master of epoch 1, 32 ‖ … ‖ master of epoch n, 32
//
// # Epoch files: keys/epoch-<number, 8 digits>
//
// Epoch 1 has none. Later epochs reach the slots that were there before them:
//
//	format      number  1
//	repository  hex     16 bytes
//	epoch       number  as in the name, 2 or more
//	created     string  RFC 3339, UTC, whole seconds
//	slots       array   ascending by id, of {"id": hex 8 bytes, "slot": hex 32
//	                    bytes, SHA-256 of that slot's header ‖ mac, "wrapped":
//	                    base64 of the new master, wrapped to its public key}
//	link        hex     HMAC-SHA256 of the statement below, key: subkey of the
//	                    epoch before, label "epoch link", no salt
//	mac         hex     HMAC-SHA256 of statement ‖ link, key: subkey of this
//	                    epoch, label "epoch", no salt
//	checksum    hex     SHA-256 of statement ‖ link ‖ mac
//
// wrapped is 80 bytes: HPKE (RFC 9180) base mode, single shot, without associated
// data; DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM; encapsulated key 32
// ‖ ciphertext 48; info "hikae/1 epoch\x00" ‖ repository 16 ‖ epoch u32 ‖ slot id
// 8 ‖ slot 32. The statement is
//
//	"hikae/1 key epoch\x00" ‖ format u16 ‖ repository 16 ‖ epoch u32 ‖
//	str created ‖ count u32 ‖ for each slot: id 8 ‖ slot 32 ‖ str wrapped
//
// Anyone can wrap to a public key, so an epoch is believed only for its link: it
// shows that whoever made it held the master before. A new epoch is wrapped only
// to slots that the newest one vouches for: those listed in its file, and those
// made in it, by their mac.
//
// # Opening
//
// Take each slot file of the secret's kind, cheapest first; derive the slot key;
// open the body. Then for each epoch file after the slot's own epoch, in order:
// check link with the master before, unwrap, check mac. A gap is an error.
//
// # What rotation protects
//
// Who learnt a master key can read what that epoch sealed, and earlier epochs if
// the ring was learnt whole; nothing undoes that. After Rotate such a reader
// cannot read what is written from then on, nor can slots left out of it. It does
// not hold against one who knows the ring AND can write to the storage: that one
// can forge slots and epochs as long as slot files of the old epoch are in use.
// Make new slots (their bodies carry the new epoch) and remove the old ones.
package keys
