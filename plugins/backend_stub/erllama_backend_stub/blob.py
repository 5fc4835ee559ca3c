"""The form of exported state: a head that says what and how much, then the bytes.

::

    offset  bytes
    0       4      magic  b"stub"
    4       4      kind (u32): 1 range, 2 recurrent state, 3 whole sequence
    8       4      bytes of one unit (u32): of a cell, or of the recurrent state
    12      4      number of units (u32)
    16      …      the units

The head is checked on import and nothing else is, least of all whose tokens these are: state
in the wrong place must come to light in the output, or by the checks of whoever stored it.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from erllama_core.errors import StateRejected

MAGIC: Final = b"stub"
_HEAD: Final = struct.Struct("<4sIII")
HEAD_BYTES: Final = _HEAD.size


class BlobKind(enum.IntEnum):
    """What a blob holds."""

    RANGE = 1
    STATE = 2
    WHOLE = 3


def blob_bytes(unit_bytes: int, count: int) -> int:
    """The size of a blob."""
    return HEAD_BYTES + unit_bytes * count


def write_blob(
    into: memoryview, kind: BlobKind, unit_bytes: int, units: bytes, *, short: bool = False
) -> None:
    """Fill ``into``, which has exactly the blob's size. Raises StateRejected if it has not.

    ``short``: leave the last unit out, and zeros in its place.
    """
    size = HEAD_BYTES + len(units)
    if into.nbytes != size:
        raise StateRejected(
            f"export of a {kind.name.lower()}: the buffer has {into.nbytes} bytes, "
            f"the state needs {size}"
        )
    count = len(units) // unit_bytes
    if short and count:
        count -= 1
        units = units[: count * unit_bytes].ljust(len(units), b"\0")
    into[:HEAD_BYTES] = _HEAD.pack(MAGIC, kind, unit_bytes, count)
    into[HEAD_BYTES:] = units


def read_blob(data: memoryview, kind: BlobKind, unit_bytes: int, count: int) -> memoryview:
    """The units of a blob that must hold ``count`` of them. Raises StateRejected."""
    what = f"import of a {kind.name.lower()}"
    if data.nbytes != blob_bytes(unit_bytes, count):
        raise StateRejected(
            f"{what}: {data.nbytes} bytes where {count} units of {unit_bytes} need "
            f"{blob_bytes(unit_bytes, count)}"
        )
    expected = (MAGIC, kind, unit_bytes, count)
    found = _HEAD.unpack_from(data)
    if found != expected:
        raise StateRejected(f"{what}: the head says {found}, expected {expected}")
    return data[HEAD_BYTES:]
