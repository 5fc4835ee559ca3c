"""Objects for tiers to store: what the core would store, small and large."""

from __future__ import annotations

import hashlib
from typing import Final

import attrs

from erllama_core.interfaces.block import ObjectId, ObjectKind, encode_header

_AT_ONE_POSITION: Final = {ObjectKind.SNAPSHOT, ObjectKind.LOGITS}


@attrs.frozen
class StoredObject:
    """An object's name, and all of its bytes."""

    object_id: ObjectId
    head: bytes
    payload: bytes

    @property
    def data(self) -> bytes:
        """Header and payload."""
        return self.head + self.payload

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        return len(self.head) + len(self.payload)


def make_object(
    number: int, size: int = 300, *, kind: ObjectKind = ObjectKind.KV, start: int = 0
) -> StoredObject:
    """Object ``number``, with a payload of ``size`` bytes; the same one each time."""
    seed = f"{number} {kind.value} {start}".encode()
    payload = hashlib.shake_128(seed).digest(size)
    key = hashlib.sha256(f"key {number}".encode()).digest()
    end = start if kind in _AT_ONE_POSITION else start + 2
    head = encode_header(
        kind=kind,
        start=start,
        end=end,
        namespace=hashlib.sha256(b"namespace").digest(),
        key=key,
        segment_key=hashlib.sha256(b"segment").digest(),
        lead_tokens=b"",
        tokens=bytes(4 * (end - start)),
        align_tokens=256,
        payload=payload,
        info={"save_reason": "cold"},
    )
    return StoredObject(ObjectId(kind, start, key), head, payload)
