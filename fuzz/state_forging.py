"""State of llama.cpp that is forged: what is changed in it, as bytes that a fuzzer can change.

An input names a kind of memory, one of the objects that hold a context's state there, and the
changes made to it::

    u8 kind, u8 object, then for each change u8 what, u32 where, u64 value

Fields are found without knowing the layout: the bytes that are the same in the state of two
contexts of one length are no numbers of the model's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs

from tiny_gguf import Arch

_CHANGE: Final = struct.Struct("<BIQ")
_MOST_CHANGES: Final = 16
_MOST_MORE: Final = 1 << 16
"""Bytes that an object may become longer by."""


@attrs.frozen(kw_only=True)
class Kind:
    """A memory of llama.cpp, as a context has it."""

    arch: Arch
    context: dict[str, Any]
    weights: dict[str, Any] = attrs.field(factory=dict)

    @property
    def name(self) -> str:
        more = {**self.context, **self.weights}
        return "-".join([self.arch, *(f"{key}={value}" for key, value in more.items())])


KINDS: Final = (
    *(
        Kind(arch=arch, context={"kv_unified": unified})
        for arch in ("llama", "gemma3", "mamba", "lfm2", "qwen35")
        for unified in (True, False)
    ),
    Kind(arch="gemma3", context={"swa_full": False}),
    Kind(arch="llama", context={"flash_attn": True}),
    Kind(arch="llama", context={"type_k": "q8_0"}),
    Kind(arch="lfm2", context={}, weights={"hybrid_window": 32}),
)


@attrs.frozen
class Good:
    """A good object, and where its fields are."""

    data: bytes
    fields: tuple[int, ...]

    @classmethod
    def between(cls, data: bytes, other: bytes) -> Good:
        """``other``: the same part of another context of the same length."""
        words = range(0, min(len(data), len(other)) - 3, 4)
        same = tuple(at for at in words if data[at : at + 4] == other[at : at + 4])
        return cls(data, same or (0,))


@attrs.frozen
class Change:
    """One change of an object."""

    what: int
    where: int
    value: int

    def __bytes__(self) -> bytes:
        return _CHANGE.pack(self.what, self.where, self.value)

    def apply(self, data: bytearray, fields: Sequence[int]) -> None:
        """Make it, in place."""
        field = min(fields[self.where % len(fields)], max(0, len(data) - 4))
        place = self.where % (len(data) + 1)
        number, size = self.value, 4
        match self.what % 10:
            case 0:
                number &= 0xFFFFFFFF
            case 1:
                size = 8
            case 2:  # a little more or less
                number = int.from_bytes(data[field : field + 4], "little") + number % 9 - 4
                number %= 1 << 32
            case 3:
                number = int.from_bytes(data[field : field + 4], "little") ^ 1 << number % 32
            case 4:
                data[place : place + 1] = bytes([number & 0xFF])
                return
            case 5:
                del data[place:]
                return
            case 6:
                data[len(data) :] = bytes([number >> 56]) * (number % _MOST_MORE)
                return
            case 7:
                del data[field : field + 4 * (1 + number % 64)]
                return
            case 8:
                data[field:field] = number.to_bytes(8, "little") * (1 + number % 64)
                return
            case 9:  # one field's value in another's place
                other = fields[number % len(fields)]
                number = int.from_bytes(data[other : other + 4], "little")
        data[field : field + size] = number.to_bytes(size, "little")


def changes_of(data: bytes) -> Iterator[Change]:
    """Those of an input, without its first two bytes."""
    for at in range(0, min(len(data), _MOST_CHANGES * _CHANGE.size), _CHANGE.size):
        part = data[at : at + _CHANGE.size]
        if len(part) == _CHANGE.size:
            yield Change(*_CHANGE.unpack(part))


def forged(good: Good, data: bytes) -> bytes:
    """The object after an input's changes."""
    made = bytearray(good.data)
    for change in changes_of(data[2:]):
        change.apply(made, good.fields)
    return bytes(made)


_NUMBERS: Final = (
    *(0, 1, 2, 3, 7, 1 << 16, 1 << 24, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(0x7FC00000, 0x7C007C00, 1 << 32, 1 << 62, (1 << 64) - 1),
)
WORDS: Final = (
    *(bytes(Change(0, field, number)) for field in range(6) for number in _NUMBERS[:11]),
    *(bytes(Change(1, field, number)) for field in range(6, 20) for number in _NUMBERS),
    *(bytes(Change(what, 5 * what + 1, 77 * what)) for what in range(10)),
)
"""Changes, of the first fields more than of others: heads and counts are there."""


def seeds(objects: Sequence[int], sorts: Sequence[int]) -> dict[str, bytes]:
    """These objects of each kind untouched, and with a change of each of these sorts."""
    made = {}
    for number, kind in enumerate(KINDS):
        for which in objects:
            head = bytes([number, which])
            made[f"{kind.name}-{which}"] = head
            for what in sorts:
                change = bytes(Change(what, 3 + number + which, 1 << 31 | 50 * which))
                made[f"{kind.name}-{which}-{what}"] = head + change
    return made
