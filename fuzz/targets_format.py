"""Stored objects, their names, and the payloads that the core reads itself."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from target import Run, Target

from erllama_core.cache.anchors import DIGEST_BYTES, MAX_ANCHORS
from erllama_core.cache.marks import decode_mark, encode_mark
from erllama_core.cache.scan import entry_of
from erllama_core.errors import CorruptBlock, StateRejected
from erllama_core.interfaces.block import (
    Header,
    ObjectId,
    checksum,
    decode_header,
    encode_header,
    header_length,
    verify_object,
)
from erllama_core.model import replay

_LENGTHS = struct.Struct("<III")  # lead tokens, alignment, bytes of JSON
_CHECKSUM = 16


def resealed(data: bytes) -> bytes:
    """The same object with the checksums that belong to it, as far as it has room for them.

    Without this no change would get past a reader's first look.
    """
    if len(data) < 160:
        return data
    (header_bytes,) = struct.unpack_from("<I", data, 12)
    start, end = struct.unpack_from("<II", data, 40)
    n_lead, _, n_text = _LENGTHS.unpack_from(data, 144)
    text_end = 160 + 4 * n_lead + 4 * max(0, end - start) + n_text
    if text_end + _CHECKSUM > len(data):
        return data
    sealed = bytearray(data)
    if header_bytes <= len(data):
        sealed[24:40] = checksum(bytes(data[header_bytes:]))
        sealed[16:24] = struct.pack("<Q", len(data) - header_bytes)
    sealed[text_end : text_end + _CHECKSUM] = checksum(bytes(sealed[:text_end]))
    return bytes(sealed)


@contextmanager
def _objects() -> Iterator[Run]:
    def run(data: bytes) -> None:
        for form in (data, resealed(data)):
            with suppress(CorruptBlock):
                assert header_length(form[:16]) <= 1 << 20
            with suppress(CorruptBlock):
                _check_again(decode_header(form))
            with suppress(CorruptBlock):
                header = decode_header(form)
                verify_object(form, header.object_id)
                assert header.size_bytes == len(form)

    yield run


def _check_again(header: Header) -> None:
    """What was accepted can be written, and reads the same."""
    written = encode_header(
        kind=header.kind,
        start=header.start,
        end=header.end,
        namespace=header.namespace,
        key=header.key,
        segment_key=header.segment_key,
        lead_tokens=header.lead_tokens,
        tokens=header.tokens,
        align_tokens=header.align_tokens,
        payload=b"payload",
        info=header.info,
    )
    again = decode_header(written)
    for name in ("object_id", "end", "namespace", "segment_key", "lead_tokens", "tokens", "info"):
        assert getattr(again, name) == getattr(header, name), name
    assert ObjectId.parse(str(header.object_id)) == header.object_id
    assert len(entry_of(header).anchors) in range(0, MAX_ANCHORS * DIGEST_BYTES + 1, DIGEST_BYTES)


@contextmanager
def _names() -> Iterator[Run]:
    from erllama_tier_disk.layout import parse_object_name, parse_temporary_name

    def run(data: bytes) -> None:
        name = data.decode("utf-8", "surrogateescape")
        with suppress(ValueError):
            assert str(ObjectId.parse(name)) == name
        with suppress(ValueError):
            assert f"{parse_object_name(name)}.kvc" == name
        owner = parse_temporary_name(name)
        if owner is not None:
            assert name.startswith(f".{owner}.")
            owner.may_live(0.0)

    yield run


@contextmanager
def _marks() -> Iterator[Run]:
    def run(data: bytes) -> None:
        with suppress(CorruptBlock):
            mark = decode_mark(data)
            assert 0 < mark.size <= mark.n_vocab
            assert len(mark.tokens) == len(mark.logits) == 4 * mark.size
            assert encode_mark(mark) == data or math.isnan(mark.logsumexp)

    yield run


@contextmanager
def _replays() -> Iterator[Run]:
    def run(data: bytes) -> None:
        with suppress(CorruptBlock):
            assert replay.encode(replay.decode(data)) == data

    yield run


@contextmanager
def _stub_state() -> Iterator[Run]:
    from erllama_backend_stub.blob import BlobKind, read_blob

    def run(data: bytes) -> None:
        for kind in BlobKind:
            with suppress(StateRejected):
                assert len(read_blob(memoryview(data), kind, 16, len(data) // 16)) <= len(data)

    yield run


TARGETS = (
    Target(name="object", open=_objects, words=(b'{"a":', b"[", b"NaN", b'"anchors":"')),
    Target(
        name="object_name", open=_names, words=(b".kv.kvc", b".tmp", b"unknown", b".", b"0" * 64)
    ),
    Target(name="mark", open=_marks),
    Target(name="replay", open=_replays),
    Target(name="stub_state", open=_stub_state),
)
