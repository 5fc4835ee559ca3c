r"""Stored objects: their identity, and the header that describes one by itself.

An object is a header, padded to :data:`ALIGNMENT`, followed by its payload::

    offset  bytes
    0       8      magic  b"ERLLAMA\0"
    8       2      format version (u16)
    10      2      kind (u16): 1 kv, 2 snapshot, 3 logits, 4 replay
    12      4      header length, padding included (u32)
    16      8      payload length (u64)
    24      16     XXH3-128 of the payload
    40      4      start, in tokens (u32)
    44      4      end, in tokens (u32)
    48      32     namespace
    80      32     key(end)
    112     32     segment key: key of the last aligned position before the object's last token
    144     4      lead: tokens between that position and start (u32)
    148     4      alignment: tokens between two aligned positions; 0: an explicit save (u32)
    152     4      length of the JSON that follows the tokens (u32)
    156     4      zero
    160     4·n    the lead tokens, then the tokens [start, end), u32 each
    …       m      JSON, UTF-8: save reason, creation time, what a person wants to know
    …       16     XXH3-128 of everything before it
    …              zeros up to the header length

All integers are little-endian. The header's checksum covers the payload's, so one checksum
over a header is enough to trust what an index is built from; the payload is verified when it
is loaded. XXH3 finds damage, not malice: who can write to a tier can forge an object.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import attrs
import xxhash

from erllama_core.errors import CorruptBlock, UnknownFormat
from erllama_core.prompt import TOKEN_BYTES as TOKEN_BYTES  # noqa: PLC0414 - plugins have it from here

MAGIC: Final = b"ERLLAMA\0"
FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 64
"""Payloads start at a multiple of this many bytes, a cache line and the widest vector load."""

KEY_BYTES: Final = 32
MAX_HEADER_BYTES: Final = 1 << 20

_PRELUDE: Final = struct.Struct("<8sHHIQ16sII32s32s32sIIII")
PRELUDE_BYTES: Final = _PRELUDE.size
_CHECKSUM_BYTES: Final = 16
_MAX_U32: Final = (1 << 32) - 1

assert PRELUDE_BYTES == 160

Bytes = bytes | bytearray | memoryview
"""What the codec reads from and writes to; every memoryview has format "B"."""


class ObjectKind(enum.Enum):
    """What a stored object holds."""

    KV = "kv"
    """KV cells of the tokens [start, end)."""
    SNAPSHOT = "snapshot"
    """The state at one position that cannot be cut; start == end."""
    LOGITS = "logits"
    """The logits after the token before one position (a mark); start == end."""
    REPLAY = "replay"
    """Exact bytes and tokens of what a model said, under a caller's id."""


_KIND_CODES: Final = {
    ObjectKind.KV: 1,
    ObjectKind.SNAPSHOT: 2,
    ObjectKind.LOGITS: 3,
    ObjectKind.REPLAY: 4,
}
_KINDS: Final = {code: kind for kind, code in _KIND_CODES.items()}
_AT_ONE_POSITION: Final = (ObjectKind.SNAPSHOT, ObjectKind.LOGITS)


@attrs.frozen(slots=True)
class ObjectId:
    """The name of a stored object; equal names mean equal contents, whoever wrote them."""

    kind: ObjectKind
    start: int
    key: bytes
    """key(end), 32 bytes."""

    def __str__(self) -> str:
        return f"{self.key.hex()}.{self.start}.{self.kind.value}"

    @classmethod
    def parse(cls, text: str) -> ObjectId:
        """The inverse of ``str``; ValueError if the text is not such a name."""
        try:
            digest, start, kind = text.split(".")
            object_id = cls(ObjectKind(kind), int(start), bytes.fromhex(digest))
        except ValueError as error:
            raise ValueError(f"not an object name: {text!r}") from error
        in_bounds = len(object_id.key) == KEY_BYTES and 0 <= object_id.start <= _MAX_U32
        if not in_bounds or str(object_id) != text:
            raise ValueError(f"not an object name: {text!r}")
        return object_id


@attrs.frozen(slots=True)
class Header:
    """A decoded header. Token fields are packed little-endian u32."""

    kind: ObjectKind
    start: int
    end: int
    namespace: bytes
    key: bytes
    segment_key: bytes
    lead_tokens: bytes
    tokens: bytes
    align_tokens: int
    payload_bytes: int
    payload_checksum: bytes
    header_bytes: int
    info: Mapping[str, Any]
    version: int = FORMAT_VERSION

    @property
    def object_id(self) -> ObjectId:
        return ObjectId(self.kind, self.start, self.key)

    @property
    def size_bytes(self) -> int:
        """Header and payload together: the size of the whole object."""
        return self.header_bytes + self.payload_bytes


def checksum(data: Bytes) -> bytes:
    """XXH3-128, big-endian as the algorithm's canonical form (https://xxhash.com)."""
    return xxhash.xxh3_128_digest(data)


def encode_header(
    *,
    kind: ObjectKind,
    start: int,
    end: int,
    namespace: bytes,
    key: bytes,
    segment_key: bytes,
    lead_tokens: bytes,
    tokens: bytes,
    align_tokens: int,
    payload: Bytes,
    info: Mapping[str, Any],
) -> bytes:
    """The header of an object, padded so that the payload follows it directly.

    Reads all of ``payload`` for its checksum. Raises ValueError for fields that contradict
    each other or do not fit their place, TypeError for an ``info`` that JSON has no words for:
    what is written must be readable.
    """
    if not 0 <= start <= end <= _MAX_U32:
        raise ValueError(f"not a token range: [{start}, {end})")
    if kind in _AT_ONE_POSITION and start != end:
        raise ValueError(f"a {kind.value} stands at one position, not at [{start}, {end})")
    if not 0 <= align_tokens <= _MAX_U32:
        raise ValueError(f"not an alignment: {align_tokens} tokens")
    if len(tokens) != TOKEN_BYTES * (end - start):
        raise ValueError(f"{len(tokens)} bytes of tokens for the range [{start}, {end})")
    if any(len(digest) != KEY_BYTES for digest in (namespace, key, segment_key)):
        raise ValueError("namespace and keys are 32 bytes each")
    if len(lead_tokens) % TOKEN_BYTES or len(tokens) % TOKEN_BYTES:
        raise ValueError("tokens are packed u32")
    # NaN and infinities are Python's own extension of JSON; other readers would refuse them.
    text = json.dumps(dict(info), separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    used = PRELUDE_BYTES + len(lead_tokens) + len(tokens) + len(text) + _CHECKSUM_BYTES
    header_bytes = -(-used // ALIGNMENT) * ALIGNMENT
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes; {MAX_HEADER_BYTES} at most")
    body = b"".join(
        (
            _PRELUDE.pack(
                MAGIC,
                FORMAT_VERSION,
                _KIND_CODES[kind],
                header_bytes,
                len(payload),
                checksum(payload),
                start,
                end,
                namespace,
                key,
                segment_key,
                len(lead_tokens) // TOKEN_BYTES,
                align_tokens,
                len(text),
                0,
            ),
            lead_tokens,
            tokens,
            text,
        )
    )
    return (body + checksum(body)).ljust(header_bytes, b"\0")


def header_length(prefix: Bytes) -> int:
    """The length of the header that starts with ``prefix`` (at least 16 bytes of it).

    For a tier that wants to read a header without its payload. Raises CorruptBlock if the
    bytes are not the start of an object of a version that this code reads.
    """
    if len(prefix) < 16:
        raise CorruptBlock(f"{len(prefix)} bytes are too few for an object")
    magic, version, _, length = struct.unpack_from("<8sHHI", prefix)
    if magic != MAGIC:
        raise CorruptBlock("not a stored object (wrong magic)")
    if version != FORMAT_VERSION:
        raise UnknownFormat(f"format version {version}; this erllama reads {FORMAT_VERSION}")
    if not PRELUDE_BYTES < length <= MAX_HEADER_BYTES or length % ALIGNMENT:
        raise CorruptBlock(f"impossible header length {length}")
    return int(length)


def decode_header(data: Bytes) -> Header:
    """The header at the start of ``data``, checked; the payload is not looked at.

    Raises CorruptBlock, which names what is wrong. Never raises anything else, whatever the
    bytes are.
    """
    header_bytes = header_length(data)
    if len(data) < header_bytes:
        raise CorruptBlock(f"truncated: {len(data)} of {header_bytes} header bytes")
    (
        _magic,
        version,
        kind_code,
        _length,
        payload_bytes,
        payload_checksum,
        start,
        end,
        namespace,
        key,
        segment_key,
        lead,
        align_tokens,
        text_bytes,
        _zero,
    ) = _PRELUDE.unpack_from(data)
    kind = _KINDS.get(kind_code)
    if kind is None:
        raise CorruptBlock(f"unknown kind {kind_code}")
    with memoryview(data) as view:
        # A run carries its own tokens; what stands at one position has start == end.
        token_bytes = TOKEN_BYTES * max(0, end - start)
        lead_end = PRELUDE_BYTES + TOKEN_BYTES * lead
        token_end = lead_end + token_bytes
        text_end = token_end + text_bytes
        if (
            start > end
            or (kind in _AT_ONE_POSITION and start != end)
            or text_end + _CHECKSUM_BYTES > header_bytes
        ):
            raise CorruptBlock("header fields contradict each other")
        if checksum(view[:text_end]) != bytes(view[text_end : text_end + _CHECKSUM_BYTES]):
            raise CorruptBlock("header checksum differs")
        try:
            # Decoded here: given bytes, json.loads guesses between UTF-8, UTF-16 and UTF-32.
            info = json.loads(str(view[token_end:text_end], "utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptBlock("header text is not JSON") from error
        if not isinstance(info, dict):
            raise CorruptBlock("header text is not a JSON object")
        return Header(
            kind=kind,
            start=start,
            end=end,
            namespace=namespace,
            key=key,
            segment_key=segment_key,
            lead_tokens=bytes(view[PRELUDE_BYTES:lead_end]),
            tokens=bytes(view[lead_end:token_end]),
            align_tokens=align_tokens,
            payload_bytes=payload_bytes,
            payload_checksum=payload_checksum,
            header_bytes=header_bytes,
            info=info,
            version=version,
        )


def verify_object(data: Bytes, expected: ObjectId) -> Header:
    """Check a whole stored object: length, both checksums, and that it is ``expected``.

    Raises CorruptBlock. ``data`` must hold exactly the object, header and payload.
    """
    header = decode_header(data)
    if len(data) != header.size_bytes:
        raise CorruptBlock(f"{len(data)} bytes where {header.size_bytes} belong")
    if header.object_id != expected:
        raise CorruptBlock(f"this is {header.object_id}, not {expected}")
    with memoryview(data) as view, view[header.header_bytes :] as payload:
        if checksum(payload) != header.payload_checksum:
            raise CorruptBlock("payload checksum differs")
    return header
