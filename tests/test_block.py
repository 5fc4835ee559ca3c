"""The format of stored objects: what is written is read, and damage is never taken for state."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.block import (
    ALIGNMENT,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    PRELUDE_BYTES,
    Header,
    ObjectId,
    ObjectKind,
    checksum,
    decode_header,
    encode_header,
    header_length,
    verify_object,
)
from erllama_core.prompt import pack, unpack

FORMAT_PAGE = Path(__file__).parents[1] / "docs" / "format.md"

# A reply of one token, 105, behind 100 to 104, with aligned positions every 4 tokens. Changing
# a byte of this means a new format version.
GOLDEN_TOKENS = [100, 101, 102, 103, 104, 105]
GOLDEN = bytes.fromhex(
    "45524c4c414d4100010001004001000008000000000000001091326082692926"
    "48f5b211952e549f05000000060000009359f3bb2efa7aabd0264fb67fb1d99f"
    "91871778e9b887179d6b2debaa251ec643abd8c7a9b6b28e821057d04a9e6bb2"
    "e1056e2f87e320efe0a9056afa5894c143fdc3c53d775cfec25af643c0bdd8ad"
    "6ad2cb33354e2e1a3c90bb4967cd332901000000040000004900000000000000"
    "68000000690000007b22637265617465645f6e73223a31373030303030303030"
    "3030303030303030302c226e6f7465223a225c7530306539222c22736176655f"
    "726561736f6e223a2266696e697368227dc0da88b728ffbb3e6a3b5cdd27f0f0"
    "c100000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000"
    "6b762063656c6c73"
)
GOLDEN_PAYLOAD = b"kv cells"
GOLDEN_INFO = {
    "save_reason": "finish",
    "created_ns": 1_700_000_000_000_000_000,
    "note": "\u00e9",
}
NAMESPACE = hashlib.sha256(b"namespace").digest()


def key(n: int) -> bytes:
    return hashlib.sha256(NAMESPACE + pack(GOLDEN_TOKENS[:n])).digest()


def golden_fields() -> dict[str, Any]:
    return {
        "kind": ObjectKind.KV,
        "start": 5,
        "end": 6,
        "namespace": NAMESPACE,
        "key": key(6),
        "segment_key": key(4),
        "lead_tokens": pack([104]),
        "tokens": pack([105]),
        "align_tokens": 4,
        "payload": GOLDEN_PAYLOAD,
        "info": GOLDEN_INFO,
    }


GOLDEN_ID = ObjectId(ObjectKind.KV, 5, key(6))
GOLDEN_HEADER_BYTES = len(GOLDEN) - len(GOLDEN_PAYLOAD)
GOLDEN_USED_BYTES = PRELUDE_BYTES + 8 + 73 + 16


def forge(body: bytes, header_bytes: int) -> bytes:
    """A header whose checksum is right, whatever ``body`` says."""
    return (body + checksum(body)).ljust(header_bytes, b"\0")


def patched(offset: int, field: bytes) -> bytes:
    """The golden header with one field changed and a right checksum."""
    body = bytearray(GOLDEN[: GOLDEN_USED_BYTES - 16])
    body[offset : offset + len(field)] = field
    return forge(bytes(body), GOLDEN_HEADER_BYTES)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=8,
)
u32 = st.integers(0, 2**32 - 1)
digests = st.binary(min_size=32, max_size=32)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(ObjectKind))
    runs = kind in (ObjectKind.KV, ObjectKind.REPLAY)
    tokens = draw(st.lists(u32, max_size=40 if runs else 0))
    start = draw(st.integers(0, 2**32 - 1 - len(tokens)))
    return {
        "kind": kind,
        "start": start,
        "end": start + len(tokens),
        "namespace": draw(digests),
        "key": draw(digests),
        "segment_key": draw(digests),
        "lead_tokens": pack(draw(st.lists(u32, max_size=20))),
        "tokens": pack(tokens),
        "align_tokens": draw(u32),
        "payload": draw(st.binary(max_size=200)),
        "info": draw(st.dictionaries(st.text(max_size=8), json_values, max_size=4)),
    }


# ---------------------------------------------------------------- round trips


@given(given_fields=fields())
def test_what_is_encoded_is_decoded(given_fields: dict[str, Any]) -> None:
    """Every field comes back, from the header alone and from the whole object."""
    payload = given_fields.pop("payload")
    head = encode_header(payload=payload, **given_fields)
    assert len(head) % ALIGNMENT == 0
    assert header_length(head[:16]) == len(head)
    header = decode_header(head)
    for name, value in given_fields.items():
        assert getattr(header, name) == value
    assert header.payload_bytes == len(payload)
    assert header.size_bytes == len(head) + len(payload)
    assert header.version == FORMAT_VERSION
    assert decode_header(memoryview(bytearray(head + payload))) == header
    assert verify_object(head + payload, header.object_id) == header
    assert verify_object(memoryview(bytearray(head + payload)), header.object_id) == header


@given(kind=st.sampled_from(ObjectKind), start=u32, key=digests)
def test_names_round_trip(kind: ObjectKind, start: int, key: bytes) -> None:
    """An object's name says all of its identity, in characters that any file system takes."""
    object_id = ObjectId(kind, start, key)
    assert ObjectId.parse(str(object_id)) == object_id
    assert re.fullmatch(r"[0-9a-f]{64}\.[0-9]+\.[a-z]+", str(object_id))


GOOD = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        f"{GOOD}.0",
        f"{GOOD}.0.kv.",
        f"{GOOD}.0.KV",
        f"{GOOD}.0.other",
        f"{GOOD}.00.kv",
        f"{GOOD}.-1.kv",
        f"{GOOD}.+1.kv",
        f"{GOOD}. 1.kv",
        f"{GOOD}.1_0.kv",
        f"{GOOD}.\u0661.kv",
        f"{GOOD}.\u00b2.kv",
        f"{GOOD}.4294967296.kv",
        f"{GOOD}.{'9' * 5000}.kv",
        f"{GOOD}..kv",
        f"{GOOD[:-2]}.0.kv",
        f"{GOOD}ab.0.kv",
        f"{GOOD.upper()}.0.kv",
        f"{GOOD[:-3]} ab.0.kv",
        f"{GOOD[:-1]}g.0.kv",
    ],
)
def test_nothing_else_is_a_name(text: str) -> None:
    """Exactly one text names an object, so a file has one place and no alias."""
    with pytest.raises(ValueError):  # noqa: PT011 - several messages, one meaning
        ObjectId.parse(text)


@given(text=st.text(max_size=90))
def test_any_text_is_a_name_or_a_value_error(text: str) -> None:
    """Foreign file names end in ValueError alone, or name what they are parsed to."""
    try:
        object_id = ObjectId.parse(text)
    except ValueError:
        return
    assert str(object_id) == text


# --------------------------------------------------------------------- golden


def test_version_1_is_pinned() -> None:
    """Objects stored by any release that writes version 1 are readable, byte for byte."""
    assert encode_header(**golden_fields()) + GOLDEN_PAYLOAD == GOLDEN
    assert verify_object(GOLDEN, GOLDEN_ID) == Header(
        kind=ObjectKind.KV,
        start=5,
        end=6,
        namespace=NAMESPACE,
        key=key(6),
        segment_key=key(4),
        lead_tokens=pack([104]),
        tokens=pack([105]),
        align_tokens=4,
        payload_bytes=8,
        payload_checksum=checksum(GOLDEN_PAYLOAD),
        header_bytes=320,
        info=GOLDEN_INFO,
        version=1,
    )


def test_the_format_page_reads_the_golden_object() -> None:
    """The reader in docs/format.md, which shares no code with the core, agrees with it."""
    (source,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text("utf-8"), re.DOTALL)
    page: dict[str, Any] = {}
    exec(compile(source, str(FORMAT_PAGE), "exec"), page)
    read: Callable[[bytes], Mapping[str, Any]] = page["read_object"]
    found = read(GOLDEN)
    assert found == {
        "version": 1,
        "kind": 1,
        "start": 5,
        "end": 6,
        "namespace": NAMESPACE,
        "key": key(6),
        "segment_key": key(4),
        "align_tokens": 4,
        "lead_tokens": (104,),
        "tokens": (105,),
        "info": GOLDEN_INFO,
        "payload": GOLDEN_PAYLOAD,
    }
    with pytest.raises(ValueError, match="checksum"):
        read(GOLDEN[:-1] + b"x")
    # The page's own arithmetic of keys: namespace, then the tokens.
    assert found["key"] == hashlib.sha256(NAMESPACE + pack(GOLDEN_TOKENS)).digest()


def test_the_format_page_has_the_offsets_of_the_codec() -> None:
    """The table of docs/format.md lists the fields of the prelude without gap or overlap."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ", FORMAT_PAGE.read_text("utf-8"), re.MULTILINE)
    position = 0
    for offset, size in rows:
        assert int(offset) == position
        position += int(size)
    assert position == PRELUDE_BYTES


# --------------------------------------------------------------------- damage


def test_every_flipped_bit_is_detected_or_harmless() -> None:
    """In the header or the payload: CorruptBlock. In the padding: the same object is read."""
    original = verify_object(GOLDEN, GOLDEN_ID)
    harmless = set()
    for bit in range(8 * len(GOLDEN)):
        damaged = bytearray(GOLDEN)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            header = verify_object(damaged, GOLDEN_ID)
        except CorruptBlock:
            continue
        assert header == original
        harmless.add(bit // 8)
    assert harmless == set(range(GOLDEN_USED_BYTES, GOLDEN_HEADER_BYTES))


def test_every_flipped_bit_of_a_header_is_detected_without_the_payload() -> None:
    """An index can be built from headers alone."""
    original = decode_header(GOLDEN)
    for bit in range(8 * GOLDEN_HEADER_BYTES):
        damaged = bytearray(GOLDEN[:GOLDEN_HEADER_BYTES])
        damaged[bit // 8] ^= 1 << bit % 8
        if bit // 8 < GOLDEN_USED_BYTES:
            with pytest.raises(CorruptBlock):
                decode_header(damaged)
        else:
            assert decode_header(damaged) == original


def test_every_truncation_is_detected() -> None:
    """No prefix of an object passes for it; a header may be read without its payload."""
    for length in range(len(GOLDEN)):
        with pytest.raises(CorruptBlock):
            verify_object(GOLDEN[:length], GOLDEN_ID)
        if length < GOLDEN_HEADER_BYTES:
            with pytest.raises(CorruptBlock):
                decode_header(GOLDEN[:length])
        else:
            decode_header(GOLDEN[:length])


@given(tail=st.binary(min_size=1, max_size=100))
def test_every_extension_is_detected(tail: bytes) -> None:
    """An object with something behind it is not that object."""
    with pytest.raises(CorruptBlock, match="belong"):
        verify_object(GOLDEN + tail, GOLDEN_ID)


@pytest.mark.parametrize(
    "other",
    [
        ObjectId(ObjectKind.KV, 5, key(5)),
        ObjectId(ObjectKind.KV, 4, key(6)),
        ObjectId(ObjectKind.REPLAY, 5, key(6)),
    ],
)
def test_a_swapped_object_is_detected(other: ObjectId) -> None:
    """A whole, undamaged object under another one's name is refused."""
    with pytest.raises(CorruptBlock, match=str(other)):
        verify_object(GOLDEN, other)


def test_a_swapped_payload_is_detected() -> None:
    """A header does not accept the payload of another object of the same size."""
    with pytest.raises(CorruptBlock, match="payload"):
        verify_object(GOLDEN[:GOLDEN_HEADER_BYTES] + b"KV CELLS", GOLDEN_ID)


@given(data=st.binary(max_size=400))
def test_random_bytes_are_corrupt_blocks(data: bytes) -> None:
    """Nothing but CorruptBlock is ever raised, with or without a plausible start."""
    for candidate in (data, GOLDEN[:16] + data, GOLDEN[:PRELUDE_BYTES] + data):
        for read in (decode_header, header_length, lambda d: verify_object(d, GOLDEN_ID)):
            try:
                read(candidate)
            except CorruptBlock:
                continue
            assert read is header_length


@given(
    kind=st.integers(0, 6),
    header_units=st.integers(3, 8),
    payload_bytes=st.integers(0, 2**64 - 1),
    start=st.integers(0, 3) | u32,
    end=st.integers(0, 3) | u32,
    lead=u32 | st.integers(0, 4),
    align=u32,
    text_bytes=u32 | st.integers(0, 64) | st.just(2),
    rest=st.binary(max_size=300) | st.integers(0, 8).map(lambda n: bytes(4 * n) + b"{}"),
)
def test_forged_fields_are_corrupt_blocks_or_consistent(
    kind: int,
    header_units: int,
    payload_bytes: int,
    start: int,
    end: int,
    lead: int,
    align: int,
    text_bytes: int,
    rest: bytes,
) -> None:
    """Behind a right checksum, too, contradictions end in CorruptBlock and allocate nothing."""
    header_bytes = header_units * ALIGNMENT
    prelude = struct.pack(
        "<8sHHIQ16sII32s32s32sIIII",
        b"ERLLAMA\0", 1, kind, header_bytes, payload_bytes, bytes(16), start, end,
        bytes(32), bytes(32), bytes(32), lead, align, text_bytes, 0,
    )  # fmt: skip
    tokens = 4 * lead + 4 * max(0, end - start)
    body = prelude + rest.ljust(min(tokens + text_bytes, 400), b"\0")
    data = forge(body, header_bytes)
    tracemalloc.start()
    try:
        header = decode_header(data)
    except CorruptBlock:
        pass
    else:
        assert len(header.tokens) == 4 * (header.end - header.start)
        assert len(header.lead_tokens) == 4 * lead
        assert isinstance(header.info, dict)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("version", [0, 2, 0xFFFF])
def test_another_version_is_refused_by_its_number(version: int) -> None:
    """An object of a later release is refused before its fields are looked at, and says why."""
    data = patched(8, version.to_bytes(2, "little"))
    for read in (header_length, decode_header, lambda d: verify_object(d, GOLDEN_ID)):
        with pytest.raises(CorruptBlock, match=rf"version {version};.* reads 1"):
            read(data)


@pytest.mark.parametrize(
    "length", [0, 64, PRELUDE_BYTES, 176, 191, 193, MAX_HEADER_BYTES + 64, 0xFFFFFFC0, 0xFFFFFFFF]
)
def test_impossible_header_lengths_are_refused(length: int) -> None:
    """A reader that trusts ``header_length`` reads no more than the limit."""
    with pytest.raises(CorruptBlock, match="header length"):
        header_length(GOLDEN[:12] + length.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a":"\xff"}', "not JSON"),
        ('{"a":1}'.encode("utf-16-le"), "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
        (b'{"a":' + b"9" * 100_000 + b"}", "not JSON"),
    ],
)
def test_text_that_is_no_json_object_is_refused(text: bytes, reason: str) -> None:
    """The description is UTF-8 and a JSON object; hostile nesting does not end the process."""
    prelude = bytearray(GOLDEN[:PRELUDE_BYTES])
    used = PRELUDE_BYTES + 8 + len(text) + 16
    header_bytes = -(-used // ALIGNMENT) * ALIGNMENT
    struct.pack_into("<I", prelude, 12, header_bytes)
    struct.pack_into("<I", prelude, 152, len(text))
    data = forge(bytes(prelude) + GOLDEN[PRELUDE_BYTES : PRELUDE_BYTES + 8] + text, header_bytes)
    with pytest.raises(CorruptBlock, match=reason):
        decode_header(data)


def test_the_reserved_field_is_ignored() -> None:
    """A later writer of version 1 may use it without shutting out this reader."""
    assert decode_header(patched(156, b"\1\2\3\4")) == decode_header(GOLDEN)


@pytest.mark.parametrize("code", [0, 5, 0xFFFF])
def test_an_unknown_kind_is_refused(code: int) -> None:
    """A right checksum does not make a kind that this version has no word for."""
    with pytest.raises(CorruptBlock, match=f"unknown kind {code}"):
        decode_header(patched(10, code.to_bytes(2, "little")))


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    """Positions in reverse order are a contradiction, not an empty range."""
    prelude = bytearray(GOLDEN[:PRELUDE_BYTES])
    struct.pack_into("<II", prelude, 40, 6, 5)
    struct.pack_into("<I", prelude, 144, 0)
    struct.pack_into("<I", prelude, 152, 2)
    with pytest.raises(CorruptBlock, match="contradict"):
        decode_header(forge(bytes(prelude) + b"{}", GOLDEN_HEADER_BYTES))


def test_a_body_longer_than_its_header_is_refused() -> None:
    """Fields never reach into the payload, even if a checksum there were right."""
    prelude = bytearray(GOLDEN[:PRELUDE_BYTES])
    struct.pack_into("<I", prelude, 12, 192)
    body = bytes(prelude) + GOLDEN[PRELUDE_BYTES : GOLDEN_USED_BYTES - 16]
    with pytest.raises(CorruptBlock, match="contradict"):
        decode_header(forge(body, GOLDEN_HEADER_BYTES))


def test_a_mark_or_snapshot_over_a_run_is_refused() -> None:
    """What stands at one position has no length; who reads an index may rely on it."""
    for code in (2, 3):
        with pytest.raises(CorruptBlock, match="contradict"):
            decode_header(patched(10, code.to_bytes(2, "little")))


# ------------------------------------------------------------- refused writing


@pytest.mark.parametrize(
    "changes",
    [
        {"start": -1, "end": 0},
        {"start": 7},
        {"end": 7},
        {"end": 2**32, "start": 2**32 - 1},
        {"tokens": b"123"},
        {"tokens": b""},
        {"lead_tokens": b"12345"},
        {"namespace": bytes(31)},
        {"key": bytes(33)},
        {"segment_key": b""},
        {"align_tokens": -1},
        {"align_tokens": 2**32},
        {"kind": ObjectKind.SNAPSHOT},
        {"kind": ObjectKind.LOGITS},
        {"lead_tokens": bytes(MAX_HEADER_BYTES)},
        {"info": {"note": "x" * MAX_HEADER_BYTES}},
        {"info": {"seconds": math.nan}},
        {"info": {"seconds": math.inf}},
    ],
)
def test_what_could_not_be_read_is_not_written(changes: dict[str, Any]) -> None:
    """Fields that contradict each other, or do not fit, are a ValueError of the writer."""
    encode_header(**golden_fields())
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - one message per field
        encode_header(**{**golden_fields(), **changes})
    assert str(caught.value)


def test_info_without_words_in_json_is_a_type_error() -> None:
    """A description that JSON cannot say is the writer's mistake."""
    with pytest.raises(TypeError):
        encode_header(**{**golden_fields(), "info": {"when": object()}})


def test_the_longest_header_is_readable() -> None:
    """A header of exactly the limit is written and read."""
    used = PRELUDE_BYTES + 8 + len(json.dumps({"note": ""}, separators=(",", ":"))) + 16
    info = {"note": "x" * (MAX_HEADER_BYTES - used)}
    head = encode_header(**{**golden_fields(), "info": info})
    assert len(head) == MAX_HEADER_BYTES
    assert unpack(decode_header(head).tokens) == [105]


def test_views_are_released() -> None:
    """Checking a buffer leaves no export behind, so that its owner can give it back."""
    buffer = bytearray(GOLDEN)
    verify_object(buffer, GOLDEN_ID)
    buffer.append(0)
    with pytest.raises(CorruptBlock):
        verify_object(buffer, GOLDEN_ID)
    buffer.append(0)
