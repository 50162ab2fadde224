#!/usr/bin/env python3
"""hikae-read.py reads hikae repositories without hikae.

It was written from repo/FORMAT.md alone, to prove that the page is enough, and is meant to be read beside it: the
numbers in the comments are the page's sections. It changes nothing in the repository and takes no locks.

    hikae-read.py REPO --passphrase-file F list                        generations
    hikae-read.py REPO --passphrase-file F list HOST/VM@TIME           disks of one generation
    hikae-read.py REPO --passphrase-file F extract HOST/VM@TIME DISK OUT.raw
    hikae-read.py REPO verify                                          SHA-256 of every file, no passphrase

Python 3.9 is enough. What its library lacks is taken from modules where they are installed, and else done here:

    AES-256-GCM   module cryptography (Debian: python3-cryptography), else here, about 1 MB a second
    Argon2id      module argon2 (python3-argon2) or a new cryptography, else here: minutes for the default costs
    zstd          module compression.zstd or zstandard (python3-zstandard), else the program zstd (package zstd)
    X25519, HPKE, HKDF, S2   always here

It is not hardened against who measures its time on the same machine.
"""

import argparse
import array
import base64
import bisect
import functools
import hashlib
import hmac
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections import OrderedDict, namedtuple

FORMAT = 1
MIB = 1 << 20


class Error(Exception):
    """What went wrong, in one sentence."""


class Forged(Exception):
    """Sealed bytes that do not open with this key."""


# --- Ciphers and hashes (§3.3, §4) ------------------------------------------------------------------------------------

PLAIN = False  # --plain: use no module that Python does not bring along


@functools.lru_cache(None)
def module(name):
    """The module of that name, or None."""
    if PLAIN:
        return None
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        return None


def aes_gcm_open(key, nonce, sealed, associated):
    """Opens AES-256-GCM, ciphertext ‖ tag, with a nonce of 12 bytes."""
    if len(sealed) < 16:
        raise Forged
    aead = module("cryptography.hazmat.primitives.ciphers.aead")
    if aead:
        try:
            return aead.AESGCM(key).decrypt(nonce, sealed, associated)
        except Exception:  # InvalidTag lives in yet another module
            raise Forged from None
    text, tag = sealed[:-16], sealed[-16:]
    pad = lambda b: b + bytes(-len(b) % 16)
    mac = ghash(key, pad(associated) + pad(text) + struct.pack(">QQ", 8 * len(associated), 8 * len(text)))
    stream = aes_ctr(key, nonce, 1, 1 + (len(text) + 15) // 16)
    if not hmac.compare_digest(xor(mac, stream[:16]), tag):
        raise Forged
    return xor(text, stream[16:16 + len(text)])


def xor(a, b):
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def xtime(b):
    return b << 1 ^ (0x11B if b & 0x80 else 0)


@functools.lru_cache(1)
def aes_tables():
    """The S-box, and the S-box times 2 and times 3: made from their definition rather than typed in."""
    exp, log, x = [0] * 256, [0] * 256, 1
    for i in range(255):  # 3 generates the field
        exp[i], log[x] = x, i
        x ^= xtime(x)
    sbox = []
    for b in range(256):
        inverse = exp[(255 - log[b]) % 255] if b else 0
        v = inverse * 0x101  # so that a shift to the right rotates
        sbox.append((v ^ v >> 4 ^ v >> 5 ^ v >> 6 ^ v >> 7) & 0xFF ^ 0x63)
    return bytes(sbox), bytes(xtime(s) for s in sbox), bytes(xtime(s) ^ s for s in sbox)


@functools.lru_cache(64)
def aes_round_keys(key):
    sbox, rcon = aes_tables()[0], 1
    words = [key[i:i + 4] for i in range(0, 32, 4)]
    while len(words) < 60:
        w = words[-1]
        if len(words) % 8 == 0:
            w = xor((w[1:] + w[:1]).translate(sbox), bytes([rcon, 0, 0, 0]))
            rcon = xtime(rcon)
        elif len(words) % 8 == 4:
            w = w.translate(sbox)
        words.append(xor(words[-8], w))
    return [b"".join(words[i:i + 4]) for i in range(0, 60, 4)]


def aes_ctr(key, nonce, counter, n):
    """n blocks of key stream. All blocks go through AES side by side: lane i holds byte i of each of them, so that the
    S-box is one bytes.translate and additions are of large integers."""
    sbox, sbox2, sbox3 = aes_tables()
    counters = b"".join(i.to_bytes(4, "big") for i in range(counter, counter + n))
    ones = int.from_bytes(b"\1" * n, "big")
    number = lambda lane: int.from_bytes(lane, "big")
    keys = aes_round_keys(key)
    lanes = [number(bytes([b]) * n) for b in nonce] + [number(counters[i::4]) for i in range(4)]
    lanes = [x ^ k * ones for x, k in zip(lanes, keys[0])]
    for r in range(1, 15):
        rows = [x.to_bytes(n, "big") for x in lanes]
        rows = [rows[(i + 4 * (i % 4)) % 16] for i in range(16)]  # ShiftRows
        s1 = [number(x.translate(sbox)) for x in rows]
        if r < 14:
            s2, s3 = [number(x.translate(sbox2)) for x in rows], [number(x.translate(sbox3)) for x in rows]
            at = lambda i, j: i & ~3 | (i + j) & 3  # the byte j below, in the same column
            s1 = [s2[i] ^ s3[at(i, 1)] ^ s1[at(i, 2)] ^ s1[at(i, 3)] for i in range(16)]
        lanes = [x ^ k * ones for x, k in zip(s1, keys[r])]
    out = bytearray(16 * n)
    for i, x in enumerate(lanes):
        out[i::16] = x.to_bytes(n, "big")
    return bytes(out)


@functools.lru_cache(16)
def ghash_tables(key):
    """For each place of a byte in a block, and each value of it: the product with the hash key."""
    h = int.from_bytes(aes_ctr(key, bytes(12), 0, 1), "big")
    tables = []
    for _ in range(16):
        t = [0] * 256
        for bit in (128, 64, 32, 16, 8, 4, 2, 1):
            t[bit] = h
            h = h >> 1 ^ (0xE1 << 120 if h & 1 else 0)
        for b in range(256):
            if b & (b - 1):
                t[b] = t[b & (b - 1)] ^ t[b & -b]
        tables.append(t)
    return tables


def ghash(key, data):
    tables, y = ghash_tables(key), 0
    for i in range(0, len(data), 16):
        x, y = y ^ int.from_bytes(data[i:i + 16], "big"), 0
        for t, b in zip(tables, x.to_bytes(16, "big")):
            y ^= t[b]
    return y.to_bytes(16, "big")


def mac256(key, message):
    return hmac.new(key, message, hashlib.sha256).digest()


def hkdf(secret, salt, info, size=32):
    """RFC 5869 with SHA-256; at most 32 bytes are ever asked for."""
    return mac256(mac256(salt, secret), info + b"\1")[:size]


def x25519(scalar, point):
    """RFC 7748."""
    p = 2**255 - 19
    k = int.from_bytes(scalar, "little") & ~7 & (2**255 - 1) | 2**254
    u = int.from_bytes(point, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, u, 1
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a, c * b, a * a % p, b * b % p
        x3, z3 = (da + cb) ** 2 % p, u * (da - cb) ** 2 % p
        x2, z2 = aa * bb % p, (aa - bb) * (aa + 121665 * (aa - bb)) % p
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def hpke_open(private, public, info, wrapped):
    """RFC 9180, base mode, one message: DHKEM(X25519, HKDF-SHA256) 0x20, HKDF-SHA256 1, AES-256-GCM 2."""
    kem, suite = b"KEM\0\x20", b"HPKE\0\x20\0\1\0\2"
    extract = lambda s, salt, label, secret: mac256(salt, b"HPKE-v1" + s + label + secret)
    expand = lambda s, key, label, text, n: mac256(
        key, n.to_bytes(2, "big") + b"HPKE-v1" + s + label + text + b"\1")[:n]
    enc, sealed = wrapped[:32], wrapped[32:]
    dh = x25519(private, enc)
    if dh == bytes(32):
        raise Forged
    shared = expand(kem, extract(kem, b"", b"eae_prk", dh), b"shared_secret", enc + public, 32)
    context = b"\0" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    secret = extract(suite, shared, b"secret", b"")
    return aes_gcm_open(expand(suite, secret, b"key", context, 32), expand(suite, secret, b"base_nonce", context, 12),
                        sealed, b"")


def argon2id(passphrase, salt, passes, memory, lanes):
    """RFC 9106, version 0x13, 32 bytes; memory in KiB."""
    low = module("argon2.low_level")
    if low:
        return low.hash_secret_raw(passphrase, salt, passes, memory, lanes, 32, low.Type.ID, 0x13)
    new = module("cryptography.hazmat.primitives.kdf.argon2")
    if new:
        return new.Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(passphrase)
    if passes * memory > 4096:
        print("Deriving the key in plain Python takes minutes; python3-argon2 would take a second.", file=sys.stderr)
    return argon2id_plain(passphrase, salt, passes, memory, lanes)


def argon2id_plain(passphrase, salt, passes, memory, lanes):
    u32 = lambda *n: struct.pack("<%dI" % len(n), *n)
    blake = lambda data, n: hashlib.blake2b(data, digest_size=n).digest()

    def long_hash(data, n):  # H' of §3.3 there
        v = blake(u32(n) + data, min(n, 64))
        out = v[:32] if n > 64 else v
        while len(out) < n:
            v = blake(v, min(n - len(out), 64))
            out += v[:32] if n - len(out) > 64 else v
        return out

    seed = blake(u32(lanes, 32, memory, passes, 0x13, 2) + b"".join(
        u32(len(s)) + s for s in (passphrase, salt, b"", b"")), 64)
    segment = memory // (4 * lanes)
    length = 4 * segment
    block = lambda data: array.array("Q", struct.unpack("<128Q", data))
    rows = [[None] * length for _ in range(lanes)]
    for lane, row in enumerate(rows):
        row[0] = block(long_hash(seed + u32(0, lane), 1024))
        row[1] = block(long_hash(seed + u32(1, lane), 1024))
    zero = block(bytes(1024))
    for n in range(passes):
        for part in range(4):
            for lane, row in enumerate(rows):
                chosen = n == 0 and part < 2  # places that do not depend on the passphrase
                for i in range(2 if n == 0 and part == 0 else 0, segment):
                    here = part * segment + i
                    before = row[here - 1]
                    if chosen:
                        if i % 128 == 0 or i == 2:
                            z = array.array("Q", [n, lane, part, lanes * length, passes, 2, i // 128 + 1] + [0] * 121)
                            places = argon2_mix(zero, argon2_mix(zero, z))
                        j = places[i % 128]
                    else:
                        j = before[0]
                    other = lane if n == 0 and part == 0 else (j >> 32) % lanes
                    area = part * segment if n == 0 else length - segment
                    area += i - 1 if other == lane else -(i == 0)
                    j &= 0xFFFFFFFF
                    back = area - 1 - (area * (j * j >> 32) >> 32)
                    start = 0 if n == 0 else (part + 1) * segment
                    new = argon2_mix(before, rows[other][(start + back) % length])
                    if n:
                        new = array.array("Q", map(int.__xor__, new, row[here]))
                    row[here] = new
    last = rows[0][-1]
    for row in rows[1:]:
        last = map(int.__xor__, last, row[-1])
    return long_hash(struct.pack("<128Q", *last), 32)


def argon2_mix(x, y):
    """The compression function G."""
    r = list(map(int.__xor__, x, y))
    q = r[:]
    for i in range(0, 128, 16):
        argon2_permute(q, range(i, i + 16))
    for i in range(0, 16, 2):
        argon2_permute(q, [i + 16 * (j // 2) + j % 2 for j in range(16)])
    return array.array("Q", map(int.__xor__, q, r))


def argon2_permute(q, places):
    m64, m32 = 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF
    v = [q[i] for i in places]
    for a, b, c, d in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
                       (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
        va, vb, vc, vd = v[a], v[b], v[c], v[d]
        for right_d, right_b in ((32, 24), (16, 63)):
            va = va + vb + 2 * (va & m32) * (vb & m32) & m64
            vd ^= va
            vd = vd >> right_d | vd << 64 - right_d & m64
            vc = vc + vd + 2 * (vc & m32) * (vd & m32) & m64
            vb ^= vc
            vb = vb >> right_b | vb << 64 - right_b & m64
        v[a], v[b], v[c], v[d] = va, vb, vc, vd
    for i, w in zip(places, v):
        q[i] = w


# --- Compression (§3.2) -----------------------------------------------------------------------------------------------


def zstd(data, limit):
    """Decompresses one frame; ValueError when it is bad or gives more than limit bytes."""
    out = None
    if sys.version_info >= (3, 14):
        from compression import zstd as own
        d = own.ZstdDecompressor()
        try:
            out = d.decompress(data, limit + 1)
        except own.ZstdError as e:
            raise ValueError(e) from None
        if not d.eof and len(out) <= limit:
            raise ValueError("the zstd frame is cut off")
    elif module("zstandard"):
        import zstandard
        try:
            out = zstandard.ZstdDecompressor(max_window_size=max(limit, 1024)).stream_reader(data).read(limit + 1)
        except zstandard.ZstdError as e:
            raise ValueError(e) from None
    else:
        program = shutil.which("zstd")
        if not program:
            raise Error("zstd data needs the Debian package python3-zstandard or zstd, and neither is installed.")
        p = subprocess.Popen([program, "-q", "-d", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)

        def feed():  # beside the reading, for pipes are short; the plaintext touches no disk
            try:
                with p.stdin:
                    p.stdin.write(data)
            except BrokenPipeError:
                pass

        feeder = threading.Thread(target=feed)
        feeder.start()
        with p.stdout:
            out = p.stdout.read(limit + 1)
        feeder.join()
        if p.wait() and len(out) <= limit:
            raise ValueError("zstd refuses the frame")
    if len(out) > limit:
        raise ValueError("it decompresses to more than %d bytes" % limit)
    return out


def s2(data, limit):
    """Decompresses an S2 block: Snappy's block format, where a copy with a one-byte offset of zero means the offset of
    the copy before. ValueError when it is bad or gives more than limit bytes."""
    at = 0

    def take(n):
        nonlocal at
        at += n
        if at > len(data):
            raise ValueError("the S2 block is cut off")
        return int.from_bytes(data[at - n:at], "little")

    size = shift = 0
    while True:  # varint
        b = take(1)
        size |= (b & 0x7F) << shift
        shift += 7
        if b < 0x80:
            break
        if shift > 63:
            raise ValueError("the S2 block's length is no number")
    if size > limit:
        raise ValueError("the S2 block decompresses to more than %d bytes" % limit)
    out, offset = bytearray(), 0
    while at < len(data):
        tag = take(1)
        n = tag >> 2
        if tag & 3 == 0:  # literal
            n = take(n - 59) if n >= 60 else n
            n += 1
            if n > size - len(out):
                raise ValueError("the S2 block is too long")
            take(n)
            out += data[at - n:at]
            continue
        if tag & 3 == 1:
            far = (tag >> 5) << 8 | take(1)
            n &= 7
            if far:
                offset = far
            elif n >= 5:  # the repeat's length follows, in one to three bytes
                n = take(n - 4) + (4, 1 << 8, 1 << 16)[n - 5]
            n += 4
        else:
            offset = take(2 if tag & 3 == 2 else 4)
            n += 1
        if not 0 < offset <= len(out) or n > size - len(out):
            raise ValueError("the S2 block copies from nowhere, or too much")
        while n > 0:  # source and target may overlap
            start = len(out) - offset
            piece = out[start:start + n]
            out += piece
            n -= len(piece)
    if len(out) != size:
        raise ValueError("the S2 block is too short")
    return bytes(out)


# --- Small things -----------------------------------------------------------------------------------------------------


def field(obj, name, kind, where):
    """A field that must be there, of its type."""
    v = obj.get(name) if isinstance(obj, dict) else None
    if not isinstance(v, kind) or isinstance(v, bool) or kind is str and re.search("[\ud800-\udfff]", v):
        raise Error("%s is damaged: its field %s is missing or of another type." % (where, name))
    return v


def unhex(obj, name, size, where):
    v = field(obj, name, str, where)
    if not re.fullmatch("[0-9a-f]{%d}" % (2 * size), v):
        raise Error("%s is damaged: its field %s is not %d bytes in hexadecimal." % (where, name, size))
    return bytes.fromhex(v)


def unbase64(obj, name, where):
    try:
        return base64.b64decode(field(obj, name, str, where), validate=True)
    except ValueError:
        raise Error("%s is damaged: its field %s is not base64." % (where, name)) from None


def parse(text, where):
    try:
        v = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Error("%s is damaged: it is not JSON." % where) from None
    if not isinstance(v, dict):
        raise Error("%s is damaged: it is not a JSON object." % where)
    return v


def check_version(version, where):
    if version > FORMAT:
        raise Error("%s has format version %d, and this reader knows %d only." % (where, version, FORMAT))
    if version != FORMAT:
        raise Error("%s is damaged: there is no format version %d." % (where, version))


def counted(b):
    """str of §4.1: length u16 ‖ bytes."""
    if len(b) > 0xFFFF:
        raise Error("A key file is damaged: one of its texts has more than 65,535 bytes.")
    return struct.pack("<H", len(b)) + b


def shown(name):
    """A name that somebody else chose, safe on a terminal."""
    return "".join(c if c.isprintable() else "\\x%02x" % ord(c) for c in name)


# 3.2
class Record(namedtuple("Record", "id pack offset length kind")):
    HOLE = bytes(48)
    BLOCKS, NODES = (0x01, 0x02, 0x03), (0x11, 0x12)

    @classmethod
    def parse(cls, b, kinds, raw, where):
        """None for a hole. What a record says is checked against what its kind allows; place against file: Pack."""
        if b == cls.HOLE:
            return None
        ident, pack, low, middle, high, kind = struct.unpack("<32sQIHBB", b)
        r = cls(ident, pack, low, middle | high << 16, kind)
        sealed = raw + 16
        fits = r.length == sealed if kind in (0x01, 0x11) else 16 < r.length < sealed
        if kind not in kinds or r.pack == 0 or not fits:
            raise Error("%s is damaged: it has an impossible record (kind %#04x, length %d)." % (where, kind, r.length))
        return r


NODE = 256 * 48


# --- The repository ---------------------------------------------------------------------------------------------------


class Repository:
    def __init__(self, root):
        self.root = root
        self.files = OrderedDict()  # open packs, the one used last at the end
        self.segments = {}  # by name; None is one that cannot be read
        self.footers = {}  # id: record, from the footers of packs
        self.scanned = set()
        self.read_config()

    def path(self, name):
        return os.path.join(self.root, *name.split("/"))

    def names(self, directory, pattern):
        """Names of a directory that match. All others are passed over (§2)."""
        try:
            return sorted(n for n in os.listdir(self.path(directory)) if re.fullmatch(pattern, n))
        except FileNotFoundError:
            return []

    def slurp(self, name, limit):
        with open(self.path(name), "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size > limit:
                raise Error("%s is damaged: it has %d bytes, and %d are allowed." % (name, size, limit))
            return f.read(limit)

    def read_config(self):  # 3.1
        try:
            text = self.slurp("config", 64 << 10)
        except FileNotFoundError:
            raise Error("%s is no hikae repository: it has no file config." % self.root) from None
        self.config_text, _, mac = text.partition(b"\n")
        c = parse(self.config_text, "config")
        check_version(field(c, "format", int, "config"), "config")
        self.id = unhex(c, "id", 16, "config")
        self.block_size = field(c, "block_size", int, "config")
        self.config_mac = mac
        if self.block_size not in (65536, 131072, 262144):
            raise Error("config is damaged: there are no blocks of %d bytes." % self.block_size)

    # -- 4. Keys --

    def unlock(self, kind, secret):
        slots, reasons = [], []
        for name in self.names("keys", "[0-9a-f]{16}"):
            try:
                slot = self.load_slot("keys/" + name)
                if slot["kind"] == kind:
                    slots.append((math.prod(slot_costs(slot["kdf"])[:2]), name, slot))
            except (Error, OSError) as e:
                reasons.append(why(e))
        for _, name, slot in sorted(slots, key=lambda s: s[:2]):  # the cheapest first: a stranger may have added others
            try:
                if self.open_slot("keys/" + name, slot, secret):
                    break
            except (Error, OSError) as e:
                reasons.append(why(e))
        else:
            raise Error(" ".join(["No key slot opens with this %s." % kind] + reasons))
        want = mac256(self.id_subkey("config"), self.config_text + b"\n").hex().encode() + b"\n"
        if not hmac.compare_digest(want, self.config_mac):
            raise Error("config is damaged or was changed: its HMAC is wrong.")

    def id_subkey(self, label):
        return hkdf(self.id_seed, b"", b"hikae/1 id " + label.encode())

    def subkey(self, epoch, label, salt, where=""):
        if not 1 <= epoch <= len(self.masters):
            raise Error("%s was sealed in key epoch %d, and this secret opens epochs 1 to %d." % (
                where, epoch, len(self.masters)))
        return hkdf(self.masters[epoch - 1], salt, b"hikae/1 " + label.encode())

    def load_slot(self, where):
        """A slot whose every field is what it may be; nothing is proved yet."""
        slot = parse(self.slurp(where, 64 << 10), where)
        check_version(field(slot, "format", int, where), where)
        header, mac, body = slot_parts(slot, where)
        if unhex(slot, "checksum", 32, where) != hashlib.sha256(header + mac + body).digest():
            raise Error("%s is damaged: its checksum is wrong." % where)
        if unhex(slot, "repository", 16, where) != self.id or unhex(slot, "id", 8, where).hex() != where[5:]:
            raise Error("%s belongs to another repository, or has another's name." % where)
        t, m, p = slot_costs(slot["kdf"])
        if slot["kind"] == "passphrase":
            fits = slot["kdf"]["name"] == "argon2id" and 1 <= t <= 100 and 1 <= p <= 64 and 8 * p <= m <= MIB
        else:
            fits = slot["kdf"]["name"] == "hkdf-sha256" and t == m == p == 0
        if not fits or slot["epoch"] < 1 or len(body) != 68 + 32 * slot["epoch"] + 16:
            raise Error("%s is damaged: its key derivation or its body is not what its kind allows." % where)
        return slot

    def open_slot(self, where, slot, secret):  # 4.1
        """Takes the ring out of a slot. False when the secret is another slot's."""
        header, mac, body = slot_parts(slot, where)
        salt = bytes.fromhex(slot["kdf"]["salt"])
        if slot["kind"] == "passphrase":
            key = argon2id(secret, salt, *slot_costs(slot["kdf"]))
        else:
            key = hkdf(secret, salt, b"hikae/1 slot " + slot["kind"].encode())
        epoch = slot["epoch"]
        try:
            b = aes_gcm_open(key, bytes(12), body, header + mac)
        except Forged:
            return False
        private, public = b[:32], unhex(slot, "public", 32, where)
        self.id_seed, count = b[32:64], struct.unpack("<I", b[64:68])[0]
        self.masters = [b[i:i + 32] for i in range(68, len(b), 32)]
        if count != epoch or x25519(private, (9).to_bytes(32, "little")) != public:
            raise Error("%s contradicts itself." % where)
        if not hmac.compare_digest(mac256(self.subkey(epoch, "slot", b""), header), mac):
            raise Error("%s was changed: its HMAC is wrong." % where)
        self.open_epochs(unhex(slot, "id", 8, where), hashlib.sha256(header + mac).digest(), private, public)
        return True

    def open_epochs(self, slot_id, slot_hash, private, public):  # 4.2
        there = {int(n[6:]) for n in self.names("keys", "epoch-[0-9]{8}")}
        for epoch in range(len(self.masters) + 1, max(there, default=0) + 1):
            where = "keys/epoch-%08d" % epoch
            if epoch not in there:
                raise Error("%s is missing, and a later epoch is there." % where)
            e = parse(self.slurp(where, MIB), where)
            check_version(field(e, "format", int, where), where)
            statement, link, mac = epoch_parts(e, where)
            if unhex(e, "checksum", 32, where) != hashlib.sha256(statement + link + mac).digest():
                raise Error("%s is damaged: its checksum is wrong." % where)
            if unhex(e, "repository", 16, where) != self.id or e["epoch"] != epoch:
                raise Error("%s belongs to another repository, or has another's name." % where)
            if not hmac.compare_digest(mac256(self.subkey(epoch - 1, "epoch link", b""), statement), link):
                raise Error("%s was not made by somebody who held the key before." % where)
            mine = [s for s in e["slots"] if unhex(s, "id", 8, where) == slot_id]
            if len(mine) != 1 or unhex(mine[0], "slot", 32, where) != slot_hash:
                raise Error("%s has no key for the slot %s." % (where, slot_id.hex()))
            info = b"hikae/1 epoch\0" + self.id + struct.pack("<I", epoch) + slot_id + slot_hash
            try:
                master = hpke_open(private, public, info, unbase64(mine[0], "wrapped", where))
            except Forged:
                raise Error("%s does not open for the slot %s." % (where, slot_id.hex())) from None
            self.masters.append(master)
            if not hmac.compare_digest(mac256(self.subkey(epoch, "epoch", b""), statement + link), mac):
                raise Error("%s was changed: its HMAC is wrong." % where)

    # -- 3.5 Sealed files --

    def sealed_file(self, name, kind):
        data = self.slurp(name, 129 * MIB + 4096)
        if len(data) < 64 + 16 + 32:
            raise Error("%s is damaged: it is too short." % name)
        epoch, salt = self.check_header(data[:64], b"hikaesf\x01", kind, name)
        try:
            frame = aes_gcm_open(self.subkey(epoch, "file", salt, name), bytes(12), data[64:-32],
                                 data[:64] + name.encode())
        except Forged:
            raise Error("%s is damaged or was changed: it does not open." % name) from None
        try:
            return parse(zstd(frame, 128 * MIB), name)
        except ValueError as e:
            raise Error("%s is damaged: %s." % (name, e)) from None

    def check_header(self, header, magic, kind, where):
        """The 64 bytes that packs, segments and sealed files begin with: epoch and salt."""
        m, version, k, zero, epoch, repository, salt = struct.unpack("<8sHBBI16s32s", header)
        if m != magic:
            raise Error("%s is damaged: it does not begin as it should." % where)
        check_version(version, where)
        if k != kind or zero:
            raise Error("%s is damaged: it is of another type than its place asks for." % where)
        if repository != self.id:
            raise Error("%s belongs to another repository." % where)
        return epoch, salt

    MANIFEST = r"([0-9]{10}|[1-9][0-9]{10,19})-([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}-[0-9]{2}-[0-9]{2}Z)(-imported)?"

    def directory(self, host, vm):
        mac = mac256(self.id_subkey("name"), host.encode() + b"\0" + vm.encode())
        return "generations/" + mac[:16].hex()

    def generations(self, directory):
        """(sequence, time, file name) of each, by file names alone (§5.1)."""
        found = (re.fullmatch(self.MANIFEST, n) for n in self.names(directory, self.MANIFEST))
        return sorted((int(m[1]), m[2], m[0]) for m in found)

    def vms(self):
        """(directory, host, VM) of each; an Error in place of the host where the identity cannot be read."""
        for d in self.names("generations", "[0-9a-f]{32}"):
            d = "generations/" + d
            try:
                vm = field(self.sealed_file(d + "/identity", 2), "vm", dict, d + "/identity")
                host, name = field(vm, "host", str, d), field(vm, "name", str, d)
                if self.directory(host, name) != d:
                    raise Error("%s is not the directory of the VM that its identity names." % d)
                yield d, host, name
            except (Error, OSError) as e:
                yield d, e, None

    def manifest(self, selector):
        head, _, time = selector.rpartition("@")
        host, _, vm = head.partition("/")
        if not host or not vm or not time:
            raise Error("A generation is named HOST/VM@TIME, as list shows it.")
        d = self.directory(host, vm)
        found = [g for g in self.generations(d) if g[1] == time.replace(":", "-")]
        if len(found) != 1:
            raise Error("There %s %s." % ("are two generations" if found else "is no generation", shown(selector)))
        seq, time, name = found[0]
        name = "%s/%s" % (d, name)
        m = self.sealed_file(name, 1)
        check_version(field(m, "format", int, name), name)
        same = field(m, "sequence", int, name) == seq and field(m, "time", str, name) == rfc3339(time)
        if not same or m.get("vm") != {"host": host, "name": vm}:
            raise Error("%s contradicts its name." % name)
        files = field(m, "files", list, name) if "files" in m else []
        names = [field(f, "name", str, name) for f in files]
        for disk in field(m, "disks", list, name):
            self.check_disk(disk, name)
            names += [disk["name"], disk["name"] + "-flat.vmdk"]
        if len(set(names)) != len(names) or any(set(n) & set("/\n\0") for n in names):
            raise Error("%s is damaged: names of its files are not allowed, or not different." % name)
        return m, name

    # -- 3.4 Block tree --

    def check_disk(self, disk, where):
        field(disk, "name", str, where)
        capacity, blocks, levels = field(disk, "capacity", int, where), 0, 1
        if capacity >= 0:
            blocks = -(-capacity // self.block_size)
            while 256**levels < blocks:
                levels += 1
        if capacity < 0 or levels > 6 or field(disk, "levels", int, where) != levels:
            raise Error("%s is damaged: capacity and levels of a disk contradict each other." % where)
        root = unbase64(disk, "root", where)
        if len(root) != 48:
            raise Error("%s is damaged: the root of a disk is no record." % where)
        return blocks, levels, Record.parse(root, Record.NODES, NODE, where)

    def blocks(self, disk, where):
        """(number, record) of each block that is no hole, ascending."""
        blocks, levels, root = self.check_disk(disk, where)
        return self.walk(root, levels, 0, blocks) if root else iter(())

    def walk(self, record, level, first, blocks):
        node, cover = self.read(record, NODE), 256**(level - 1)
        where = "The node at %s" % place(record)
        for i in range(256):
            b = node[48 * i:48 * i + 48]
            kinds, raw = (Record.BLOCKS, self.block_size) if level == 1 else (Record.NODES, NODE)
            entry, block = Record.parse(b, kinds, raw, where), first + i * cover
            if entry is None:
                continue
            if block >= blocks:
                raise Error("%s has an entry beyond the end of the disk." % where)
            if level == 1:
                yield block, entry
            else:
                yield from self.walk(entry, level - 1, block, blocks)

    # -- 3.3 Packs --

    def read(self, record, raw):
        """What a record leads to. The record's place is tried first; then the index; then all footers of packs."""
        try:
            return self.pack(record).open(record, raw)
        except (Error, OSError) as e:
            first = why(e)
        for places in (self.in_index, self.in_footers):
            for other in places(record):
                try:
                    other = Record.parse(other, Record.NODES if record.kind & 0x10 else Record.BLOCKS, raw, "")
                    if other and other.id == record.id and other != record:
                        return self.pack(other).open(other, raw)
                except (Error, OSError):
                    continue
        raise Error("Stored bytes are lost at %s, and no other place is known for them: %s" % (place(record), first))

    def pack(self, record):
        directory, kind = ("meta", 2) if record.kind & 0x10 else ("packs", 1)
        handle = "%016x" % record.pack
        name = "%s/%s/%s" % (directory, handle[:2], handle)
        p = self.files.get(name)
        if p is None:
            p = self.files[name] = Pack(self, name, kind, record.pack)
            if len(self.files) > 64:
                self.files.popitem(last=False)[1].file.close()
        self.files.move_to_end(name)
        return p

    def in_index(self, record):
        """Records of that id, from the newest segment to the oldest. The directory is read again each time."""
        for name in self.names("index", "[0-9a-f]{16}"):
            if name not in self.segments:
                try:
                    self.segments[name] = Segment(self, name)
                except (Error, OSError):
                    self.segments[name] = None  # a damaged segment costs no data
        alive = [s for s in self.segments.values() if s]
        old = {n for s in alive for n in s.supersedes}
        for s in sorted(alive, key=lambda s: -s.sequence):
            if s.name not in old:
                yield from s.find(record.id)

    def in_footers(self, record):
        """The same, from what packs say about themselves: slow, for all of them are opened, once."""
        directory, kind = ("meta", 2) if record.kind & 0x10 else ("packs", 1)
        for sub in self.names(directory, "[0-9a-f]{2}"):
            for handle in self.names("%s/%s" % (directory, sub), sub + "[0-9a-f]{14}"):
                name = "%s/%s/%s" % (directory, sub, handle)
                if name in self.scanned:
                    continue
                self.scanned.add(name)
                try:
                    p = Pack(self, name, kind, int(handle, 16))
                    with p.file:
                        for b in p.footer():
                            self.footers.setdefault(b[:32], []).append(b)
                except (Error, OSError):
                    continue
        yield from self.footers.get(record.id, [])


class Pack:
    def __init__(self, repository, name, kind, handle):
        self.repository, self.name, self.handle = repository, name, handle
        self.file = open(repository.path(name), "rb")
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            if not 64 + 16 + 48 <= self.size < 1 << 32:
                raise Error("%s is damaged: it has %d bytes." % (name, self.size))
            epoch, self.salt = repository.check_header(self.file.read(64), b"hikaepk\x01", kind, name)
            if int.from_bytes(self.salt[:8], "little") != handle:
                raise Error("%s is damaged: its salt belongs to another pack." % name)
            self.key = repository.subkey(epoch, "pack", self.salt, name)
        except BaseException:
            self.file.close()
            raise

    def unseal(self, offset, length, kind, raw, ident):
        if offset < 64 or offset + length > self.size - 48:
            raise Error("%s has no %d bytes at %d." % (self.name, length, offset))
        self.file.seek(offset)
        sealed = self.file.read(length)
        associated = struct.pack("<H16s32sQBI32s", FORMAT, self.repository.id, self.salt, offset, kind, raw, ident)
        try:
            return aes_gcm_open(self.key, bytes(4) + offset.to_bytes(8, "big"), sealed, associated)
        except Forged:
            raise Error("%s is damaged or was changed: what lies at %d does not open." % (self.name, offset)) from None

    def open(self, r, raw):
        b = self.unseal(r.offset, r.length, r.kind, raw, r.id)
        try:
            b = zstd(b, raw) if r.kind in (0x02, 0x12) else s2(b, raw) if r.kind == 0x03 else b
        except ValueError as e:
            raise Error("%s is damaged at %d: %s." % (self.name, r.offset, e)) from None
        if len(b) != raw:
            raise Error("%s is damaged: what lies at %d has %d bytes." % (self.name, r.offset, len(b)))
        return b

    def footer(self):
        """The pack's records."""
        self.file.seek(self.size - 48)
        offset, length, magic = struct.unpack("<II8s", self.file.read(16))
        if magic != b"hikaeend" or offset + length != self.size - 48 or (length - 16) % 48 or length > 48 * 65536 + 16:
            raise Error("%s is damaged: its trailer is wrong." % self.name)
        b = self.unseal(offset, length, 0xFF, length - 16, bytes(32))
        records, at = [b[i:i + 48] for i in range(0, len(b), 48)], 64
        for r in records:
            pack, start, low, high = struct.unpack("<QIHB", r[32:47])
            if pack != self.handle or start != at:
                raise Error("%s is damaged: its footer has gaps." % self.name)
            at += low | high << 16
        if at != offset:
            raise Error("%s is damaged: its footer has gaps." % self.name)
        return records


# 3.6. The filter pages only save time for what is not there; this reader knows that it is, and passes them over.
class Segment:
    PAGE, GROUP, PER = 16384, 638864, 341

    def __init__(self, repository, name):
        self.repository, self.name, self.path = repository, name, "index/" + name
        with open(repository.path(self.path), "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size < 64 + 56:
                raise Error("%s is damaged: it is too short." % self.path)
            self.header = f.read(64)
            epoch, salt = repository.check_header(self.header, b"hikaeix\x01", 3, self.path)
            f.seek(size - 56)
            offset, length, zero, magic = struct.unpack("<QII8s", f.read(24))
            if (salt[:8].hex() != name or magic != b"hikaeix\x01" or zero or offset + length != size - 56
                    or not 40 <= length <= 40 + 8 * 65536 + 8 * MIB):
                raise Error("%s is damaged: its trailer is wrong." % self.path)
            self.key = repository.subkey(epoch, "index", salt, self.path)
            b = self.unseal(f, offset, length, 3)
        self.count, self.sequence, s, pages = struct.unpack("<QQII", b[:24])
        last = self.count - self.PER * (pages - 1)  # records of the last page
        inside = (pages - 1) % 38 * self.PER + last  # and of its group
        if not (pages and 0 < last <= self.PER and len(b) == 24 + 8 * s + 8 * pages and offset == self.page(pages - 1)
                + 48 * last + 16 + 64 * math.ceil(10 * inside / 512) + 16):
            raise Error("%s is damaged: its footer contradicts its length." % self.path)
        self.last, self.pages = last, pages
        self.supersedes = [b[i:i + 8].hex() for i in range(24, 24 + 8 * s, 8)]
        self.fences = [b[i:i + 8] for i in range(24 + 8 * s, len(b), 8)]

    def page(self, p):
        return 64 + p // 38 * self.GROUP + p % 38 * self.PAGE

    def unseal(self, file, offset, length, what):
        file.seek(offset)
        try:
            return aes_gcm_open(self.key, bytes(4) + offset.to_bytes(8, "big"), file.read(length),
                                self.header + struct.pack("<QB", offset, what))
        except Forged:
            raise Error("%s is damaged or was changed: what lies at %d does not open." % (self.path, offset)) from None

    def find(self, ident):
        """Records of that id. Those of one id may go on over several pages."""
        p = max(bisect.bisect_left(self.fences, ident[:8]) - 1, 0)
        try:
            with open(self.repository.path(self.path), "rb") as f:
                while p < self.pages and self.fences[p] <= ident[:8]:
                    n = self.last if p == self.pages - 1 else self.PER
                    b = self.unseal(f, self.page(p), 48 * n + 16, 1)
                    yield from (b[i:i + 48] for i in range(0, len(b), 48) if b[i:i + 32] == ident)
                    p += 1
        except (Error, OSError):
            return


def place(r):
    handle = "%016x" % r.pack
    return "%s/%s/%s, offset %d" % ("meta" if r.kind & 0x10 else "packs", handle[:2], handle, r.offset)


def why(e):
    """An Error or OSError, as a sentence."""
    if isinstance(e, OSError):
        return "%s: %s." % (e.filename, e.strerror) if e.filename else "%s." % e
    return str(e)


def rfc3339(time):
    return time[:11] + time[11:].replace("-", ":")


def slot_costs(kdf):
    """time, memory_kib, threads: zeros where there is no Argon2id."""
    return [kdf.get(n, 0) for n in ("time", "memory_kib", "threads")]


def slot_parts(slot, where):
    """Header, mac and body of a slot (§4.1)."""
    text = lambda obj, name: counted(field(obj, name, str, where).encode())
    kdf = field(slot, "kdf", dict, where)
    known = "format repository id kind label created epoch kdf public mac body checksum".split()
    if set(slot) - set(known) or set(kdf) - {"name", "salt", "time", "memory_kib", "threads"}:
        raise Error("%s is damaged or was changed: it has fields that a slot has not." % where)
    try:
        header = b"".join([
            b"hikae/1 key slot\0", struct.pack("<H", slot["format"]), unhex(slot, "repository", 16, where),
            unhex(slot, "id", 8, where), text(slot, "kind"), text(slot, "label"), text(slot, "created"),
            struct.pack("<I", field(slot, "epoch", int, where)), text(kdf, "name"),
            struct.pack("<IIB", *slot_costs(kdf)), unhex(kdf, "salt", 32, where), unhex(slot, "public", 32, where)])
    except struct.error:
        raise Error("%s is damaged: one of its numbers is impossible." % where) from None
    return header, unhex(slot, "mac", 32, where), unbase64(slot, "body", where)


def epoch_parts(e, where):
    """Statement, link and mac of an epoch (§4.2)."""
    slots = field(e, "slots", list, where)
    try:
        statement = [b"hikae/1 key epoch\0", struct.pack("<H", e["format"]), unhex(e, "repository", 16, where),
                     struct.pack("<I", field(e, "epoch", int, where)),
                     counted(field(e, "created", str, where).encode()), struct.pack("<I", len(slots))]
    except struct.error:
        raise Error("%s is damaged: one of its numbers is impossible." % where) from None
    for s in slots:
        wrapped = unbase64(s, "wrapped", where)
        if len(wrapped) != 80:
            raise Error("%s is damaged: a wrapped key has %d bytes." % (where, len(wrapped)))
        statement += [unhex(s, "id", 8, where), unhex(s, "slot", 32, where), counted(wrapped)]
    return b"".join(statement), unhex(e, "link", 32, where), unhex(e, "mac", 32, where)


# --- Commands ---------------------------------------------------------------------------------------------------------


def cmd_list(repository, args):
    if args.generation:
        m, where = repository.manifest(args.generation)
        for d in m["disks"]:
            print("%s  capacity %d  data %d" % (shown(d["name"]), d["capacity"], field(d, "data_bytes", int, where)))
        return 0
    bad = 0
    for directory, host, vm in repository.vms():
        if vm is None:
            print(why(host), file=sys.stderr)
            bad = 1
            continue
        for sequence, time, _ in repository.generations(directory):
            print("%s/%s@%s  sequence %d" % (shown(host), shown(vm), time, sequence))
    return bad


def cmd_extract(repository, args):
    m, where = repository.manifest(args.generation)
    disk = next((d for d in m["disks"] if d["name"] == args.disk), None)
    if disk is None:
        raise Error("%s has no disk %s, but: %s." % (
            args.generation, args.disk, ", ".join(shown(d["name"]) for d in m["disks"]) or "none"))
    if os.path.lexists(args.out):
        raise Error("%s is there already." % args.out)
    # Nothing gets the name asked for before all of it is proved.
    unfinished = args.out + ".unfinished"
    size, capacity = repository.block_size, disk["capacity"]
    with open(unfinished, "xb") as out:
        try:
            out.truncate(capacity)  # all holes
            for number, record in repository.blocks(disk, where):
                block = repository.read(record, size)
                out.seek(number * size)
                out.write(block[:capacity - number * size])
            out.flush()
            os.fsync(out.fileno())
            os.rename(unfinished, args.out)
        except BaseException:
            os.unlink(unfinished)
            raise
    return 0


def cmd_verify(repository, args):
    """Without keys: the SHA-256 of whole files, and whose they say they are. Finds accidents, not forgers."""
    good, bad = 0, []
    work = []
    for directory, kind in (("packs", 1), ("meta", 2)):
        for sub in repository.names(directory, "[0-9a-f]{2}"):
            for n in repository.names("%s/%s" % (directory, sub), sub + "[0-9a-f]{14}"):
                # The salt's first bytes are the handle, lowest first; the name has its highest first.
                work.append(("%s/%s/%s" % (directory, sub, n), b"hikaepk\x01", kind, bytes.fromhex(n)[::-1]))
    for n in repository.names("index", "[0-9a-f]{16}"):
        work.append(("index/" + n, b"hikaeix\x01", 3, bytes.fromhex(n)))
    for d in repository.names("generations", "[0-9a-f]{32}"):
        for n in repository.names("generations/" + d, repository.MANIFEST + "|identity|forgotten-[0-9]+"):
            kind = {"i": 2, "f": 3}.get(n[0], 1)
            work.append(("generations/%s/%s" % (d, n), b"hikaesf\x01", kind, b""))
    for name, magic, kind, salt in work:
        try:
            check_sum(repository, name, magic, kind, salt)
            good += 1
        except FileNotFoundError:
            continue  # moved or pruned meanwhile
        except (Error, OSError) as e:
            bad.append(why(e))
    for n in repository.names("keys", "[0-9a-f]{16}|epoch-[0-9]{8}"):
        name = "keys/" + n
        try:
            k = parse(repository.slurp(name, MIB), name)
            check_version(field(k, "format", int, name), name)
            parts = (epoch_parts if n.startswith("epoch") else slot_parts)(k, name)
            if unhex(k, "checksum", 32, name) != hashlib.sha256(b"".join(parts)).digest():
                raise Error("%s is damaged: its checksum is wrong." % name)
            good += 1
        except (Error, OSError) as e:
            bad.append(why(e))
    for e in bad:
        print(e, file=sys.stderr)
    print("%d files are whole, %d are damaged." % (good, len(bad)))
    return 1 if bad else 0


def check_sum(repository, name, magic, kind, salt):
    with open(repository.path(name), "rb") as f:
        left = os.fstat(f.fileno()).st_size - 32
        if left < 64:
            raise Error("%s is damaged: it is too short." % name)
        header = f.read(64)
        if not repository.check_header(header, magic, kind, name)[1].startswith(salt):
            raise Error("%s is damaged: its salt belongs to another name." % name)
        digest = hashlib.sha256(header)
        left -= 64
        while left:
            b = f.read(min(left, MIB))
            if not b:
                raise Error("%s became shorter while it was read." % name)
            digest.update(b)
            left -= len(b)
        if digest.digest() != f.read(32):
            raise Error("%s is damaged: its SHA-256 is wrong." % name)


def read_secret(args):
    """Kind and bytes of the secret."""
    for kind, path in (("passphrase", args.passphrase_file), ("key-file", args.key_file),
                       ("recovery", args.recovery_file)):
        if path is None:
            continue
        with open(path, "rb") as f:
            text = f.read(64 << 10)
        if kind == "passphrase":  # as it is, but for the line end of the file
            return kind, re.sub(rb"\r?\n\Z", b"", text)
        text = text.decode("ascii", "replace").strip()
        if kind == "key-file":
            if not re.fullmatch("[0-9A-Fa-f]{64}", text):
                raise Error("%s is no key file: it must have 64 hexadecimal digits." % path)
            return kind, bytes.fromhex(text)
        alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
        code = re.sub(r"[\s-]", "", text.upper()).translate(str.maketrans("OIL", "011"))
        if len(code) != 40 or set(code) - set(alphabet):
            raise Error("%s is no recovery code: it must have 40 characters of %s." % (path, alphabet))
        bits = functools.reduce(lambda n, c: n << 5 | alphabet.index(c), code, 0)
        secret, check = bits.to_bytes(25, "big")[:22], bits.to_bytes(25, "big")[22:]
        if hashlib.sha256(b"hikae/1 recovery\0" + secret).digest()[:3] != check:
            raise Error("The recovery code in %s has a slip of the pen." % path)
        return kind, secret
    raise Error("This needs --passphrase-file, --key-file or --recovery-file.")


def main():
    global PLAIN
    parser = argparse.ArgumentParser(description="Reads hikae repositories without hikae.")
    parser.error = lambda message: parser.exit(2, "hikae-read: %s; --help tells more.\n" % message)
    parser.add_argument("repository", metavar="REPO", help="the repository's directory")
    parser.add_argument("--passphrase-file", metavar="F", help="file with the passphrase")
    parser.add_argument("--key-file", metavar="F", help="key file, in place of a passphrase")
    parser.add_argument("--recovery-file", metavar="F", help="file with a recovery code, in place of a passphrase")
    parser.add_argument("--plain", action="store_true", help="use no modules beyond Python's own: slow")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    c = commands.add_parser("list", help="list generations, or the disks of one")
    c.add_argument("generation", nargs="?", metavar="HOST/VM@TIME")
    c = commands.add_parser("extract", help="write a disk to a raw image with holes")
    c.add_argument("generation", metavar="HOST/VM@TIME")
    c.add_argument("disk", metavar="DISK")
    c.add_argument("out", metavar="OUT.raw")
    commands.add_parser("verify", help="prove the SHA-256 of every file; needs no passphrase")
    args = parser.parse_args()
    PLAIN = args.plain
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")
    try:
        repository = Repository(args.repository)
        if args.command == "verify":
            return cmd_verify(repository, args)
        repository.unlock(*read_secret(args))
        return (cmd_list if args.command == "list" else cmd_extract)(repository, args)
    except (Error, OSError) as e:
        message = why(e)
    except UnicodeError:
        message = "Names must be in UTF-8."
    except KeyboardInterrupt:
        message = "Interrupted."
    print("hikae-read: " + message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
