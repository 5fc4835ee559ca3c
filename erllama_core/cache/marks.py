"""Marks as payloads: the largest logits at a position, stored beside the state."""

from __future__ import annotations

import struct
from typing import Final

from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.backend import Mark
from erllama_core.interfaces.block import Bytes

MARK_SIZE: Final = 1024
"""Logits kept of a mark: 8 KB, enough for every top_k up to about a thousand."""

_HEAD: Final = struct.Struct("<IId")


def encode_mark(mark: Mark) -> bytes:
    """``u32`` entries, ``u32`` vocabulary, ``f64`` logsumexp, then tokens and logits."""
    return _HEAD.pack(mark.size, mark.n_vocab, mark.logsumexp) + mark.tokens + mark.logits


def decode_mark(payload: Bytes) -> Mark:
    """The inverse. Raises CorruptBlock for a payload of another length than it says."""
    if len(payload) < _HEAD.size:
        raise CorruptBlock(f"{len(payload)} bytes are too few for a mark")
    size, n_vocab, logsumexp = _HEAD.unpack_from(payload)
    if not 0 < size <= n_vocab or len(payload) != _HEAD.size + 8 * size:
        raise CorruptBlock(f"a mark of {size} logits of {n_vocab} in {len(payload)} bytes")
    middle = _HEAD.size + 4 * size
    return Mark(bytes(payload[_HEAD.size : middle]), bytes(payload[middle:]), logsumexp, n_vocab)
