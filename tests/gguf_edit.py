"""Other metadata for a GGUF file: what a test changes in one that works.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

_SCALARS: Final = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}
_NAMES: Final = {number: name for name, (number, _) in _SCALARS.items()}
_STRING: Final = 8
_ARRAY: Final = 9
_ALIGNMENT: Final = 32


@attrs.frozen
class Entry:
    """A value of the metadata; ``kind`` is such as ``"u32"``, ``"string"`` or ``"array u32"``."""

    kind: str
    value: Any

    def encoded(self) -> bytes:
        if self.kind.startswith("array "):
            element = self.kind.removeprefix("array ")
            number = _STRING if element == "string" else _SCALARS[element][0]
            items = b"".join(_encoded(element, item) for item in self.value)
            return struct.pack("<IIQ", _ARRAY, number, len(self.value)) + items
        number = _STRING if self.kind == "string" else _SCALARS[self.kind][0]
        return struct.pack("<I", number) + _encoded(self.kind, self.value)


def _encoded(kind: str, value: Any) -> bytes:
    if kind == "string":
        data: bytes = value.encode()
        return struct.pack("<Q", len(data)) + data
    form: str = _SCALARS[kind][1]
    return struct.pack(form, value)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, number: int) -> Any:
        return self.text() if number == _STRING else self.take(_SCALARS[_NAMES[number]][1])

    def entry(self) -> Entry:
        number = self.take("<I")
        if number != _ARRAY:
            return Entry(_NAMES.get(number, "string"), self.value(number))
        element, length = self.take("<I"), self.take("<Q")
        values = [self.value(element) for _ in range(length)]
        return Entry(f"array {_NAMES.get(element, 'string')}", values)


@attrs.frozen
class Gguf:
    """A file in memory."""

    n_tensors: int
    metadata: Mapping[str, Entry]
    records: bytes
    """Of the tensors."""
    tensors: bytes

    @classmethod
    def read(cls, path: Path) -> Gguf:
        reader = _Reader(path.read_bytes())
        reader.at = 8
        n_tensors, n_entries = reader.take("<Q"), reader.take("<Q")
        metadata = {}
        for _ in range(n_entries):
            key = reader.text()
            metadata[key] = reader.entry()
        start = reader.at
        for _ in range(n_tensors):
            reader.text()
            dimensions = reader.take("<I")
            reader.at += 8 * dimensions + 4 + 8
        end = reader.at
        data = -(-end // _ALIGNMENT) * _ALIGNMENT
        return cls(n_tensors, metadata, reader.data[start:end], reader.data[data:])

    def write(
        self,
        path: Path,
        changes: Mapping[str, Entry | None],
        *,
        alignment: int = _ALIGNMENT,
    ) -> Path:
        """Write it with other entries; None leaves one out."""
        metadata = {**self.metadata, **changes}
        kept = {key: entry for key, entry in metadata.items() if entry is not None}
        head = struct.pack("<4sIQQ", b"GGUF", 3, self.n_tensors, len(kept))
        for key, entry in kept.items():
            head += _encoded("string", key) + entry.encoded()
        head += self.records
        head += bytes(-len(head) % alignment)
        path.write_bytes(head + self.tensors)
        return path
