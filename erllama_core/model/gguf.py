"""Where the parts of a GGUF file lie: enough to find its first tensor, nothing more.

The format is that of ``docs/gguf.md`` in the ggml repository, versions 2 and 3, little-endian::

    magic, version, number of tensors, number of key-values
    key-values       the metadata: key, type, value
    tensor infos     name, dimensions, type, offset of the data
    padding          up to a multiple of general.alignment
    tensor data      offsets count from here

A file is input from anywhere, so nothing in it is believed: a count or a length is compared with
the bytes that are left before anything is read or skipped for it. No value is kept, so memory is
constant, and MAX_HEADER_BYTES bounds the time.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, Final

import attrs

from erllama_core.errors import ModelLoadError

MAX_HEADER_BYTES: Final = 128 << 20
"""Metadata and tensor infos, at most. Vocabularies of 262,144 tokens take about 15 MiB."""

_MAX_KEY_BYTES: Final = (1 << 16) - 1  # docs/gguf.md
_MAX_DIMENSIONS: Final = 4  # GGML_MAX_DIMS in ggml.h
_MAX_NESTING: Final = 4  # arrays in arrays; llama.cpp refuses any, the format sets no limit
_DEFAULT_ALIGNMENT: Final = 32  # GGUF_DEFAULT_ALIGNMENT in gguf.h

# enum gguf_type in gguf.h. The sizes, in bytes, are of those that have a fixed one.
_UINT32: Final = 4
_STRING: Final = 8
_ARRAY: Final = 9
_SCALAR_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

# The fewest bytes that one of these can take.
_LEAST_STRING: Final = 8
_LEAST_ARRAY: Final = 4 + 8
_LEAST_KEY_VALUE: Final = _LEAST_STRING + 4 + 1
_LEAST_TENSOR_INFO: Final = _LEAST_STRING + 4 + 4 + 8

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_COUNTS: Final = struct.Struct("<QQ")


@attrs.frozen(kw_only=True)
class GgufLayout:
    """Positions are bytes from the start of the file."""

    version: int
    tensors: int
    key_values: int
    alignment: int
    data_start: int
    """Where the tensors' data begins; past the file's end only if there are no tensors."""
    first_tensor_end: int
    """Where the next tensor's data begins; the file's end if there is no next tensor."""


def read_layout(file: BinaryIO, size: int, name: str) -> GgufLayout:
    """Read the header of a GGUF file of ``size`` bytes, from its start on.

    ``name`` is what errors call the file. The data's own length is not compared with the tensors'
    types and dimensions: that is the backend's to do. Raises ModelLoadError, and OSError where
    the file cannot be read.
    """
    return _Header(file, size, name).layout()


class _Header:
    """One pass over a header; ``position`` is how far it has come."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file = file
        self.size = size
        self.name = name
        self.position = 0

    def layout(self) -> GgufLayout:
        self.file.seek(0)
        version = self.version()
        tensors, key_values = _COUNTS.unpack(self.take(_COUNTS.size, "the header"))
        least = key_values * _LEAST_KEY_VALUE + tensors * _LEAST_TENSOR_INFO
        self.expect(least, f"the {key_values} key-values and {tensors} tensors it announces")
        alignment = self.metadata(key_values)
        first, following = self.tensor_offsets(tensors, alignment)
        data_start = -(-self.position // alignment) * alignment
        if first is not None:
            if first != 0:
                raise self.malformed(f"its first tensor's data is at offset {first}, not 0")
            last = following[1] if following is not None else 0
            if data_start + last > self.size:
                raise self.malformed(
                    f"a tensor's data begins at byte {data_start + last}, but the file has "
                    f"{self.size}; it may be cut short"
                )
        return GgufLayout(
            version=version,
            tensors=tensors,
            key_values=key_values,
            alignment=alignment,
            data_start=data_start,
            first_tensor_end=self.size if following is None else data_start + following[0],
        )

    def version(self) -> int:
        if self.size < 4 or self.take(4, "the magic") != b"GGUF":
            raise self.malformed("it does not begin with the bytes GGUF")
        raw = self.take(_U32.size, "the version")
        (version,) = _U32.unpack(raw)
        if version in {2, 3}:
            return int(version)
        if int.from_bytes(raw, "big") in {2, 3}:
            raise self.malformed("it is big-endian; only little-endian files are read")
        raise self.malformed(f"it is of version {version}; versions 2 and 3 are read")

    def metadata(self, count: int) -> int:
        """Pass the key-values; the alignment that they ask for."""
        alignment = None
        for _ in range(count):
            length = self.u64("a key's length")
            if length > _MAX_KEY_BYTES:
                raise self.malformed(f"a key has {length} bytes; {_MAX_KEY_BYTES} is the most")
            key = self.take(length, "a key")
            kind = self.u32("a value's type")
            if key != b"general.alignment":
                self.skip_value(kind)
                continue
            if alignment is not None:
                raise self.malformed("general.alignment is there twice")
            if kind != _UINT32:
                raise self.malformed(f"general.alignment is of type {kind}, not {_UINT32}")
            alignment = self.u32("general.alignment")
            if alignment.bit_count() != 1:
                raise self.malformed(f"general.alignment is {alignment}, not a power of two")
        return _DEFAULT_ALIGNMENT if alignment is None else alignment

    def tensor_offsets(
        self, count: int, alignment: int
    ) -> tuple[int | None, tuple[int, int] | None]:
        """Pass the tensor infos.

        Returns the smallest offset (None: no tensors), and the smallest and the largest of those
        above 0 (None: there are none).
        """
        smallest: int | None = None
        above: tuple[int, int] | None = None
        for _ in range(count):
            self.skip(self.u64("a tensor name's length"), "a tensor's name")
            dimensions = self.u32("a number of dimensions")
            if dimensions > _MAX_DIMENSIONS:
                raise self.malformed(
                    f"a tensor has {dimensions} dimensions; {_MAX_DIMENSIONS} is the most"
                )
            self.skip(dimensions * _U64.size + _U32.size, "a tensor's dimensions and type")
            offset = self.u64("a tensor's offset")
            if offset % alignment:
                raise self.malformed(f"a tensor's offset {offset} is no multiple of {alignment}")
            smallest = offset if smallest is None else min(smallest, offset)
            if offset > 0:
                above = (
                    (offset, offset)
                    if above is None
                    else (min(above[0], offset), max(above[1], offset))
                )
        return smallest, above

    def skip_value(self, kind: int, nesting: int = 0) -> None:
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind], "a value")
        elif kind == _STRING:
            self.skip(self.u64("a string's length"), "a string")
        elif kind == _ARRAY:
            self.skip_array(nesting + 1)
        else:
            raise self.malformed(f"a value is of the unknown type {kind}")

    def skip_array(self, nesting: int) -> None:
        if nesting > _MAX_NESTING:
            raise self.malformed(f"arrays are nested more than {_MAX_NESTING} deep")
        kind = self.u32("an array's type")
        count = self.u64("an array's length")
        what = f"an array of {count} values"
        if kind in _SCALAR_BYTES:
            self.skip(count * _SCALAR_BYTES[kind], what)
        elif kind == _STRING:
            self.expect(count * _LEAST_STRING, what)
            for _ in range(count):
                self.skip(self.u64("a string's length"), "a string")
        elif kind == _ARRAY:
            self.expect(count * _LEAST_ARRAY, what)
            for _ in range(count):
                self.skip_array(nesting + 1)
        else:
            raise self.malformed(f"an array is of the unknown type {kind}")

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(_U32.size, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(_U64.size, what), "little")

    def take(self, count: int, what: str) -> bytes:
        self.expect(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.malformed(f"it became shorter while it was read, at byte {self.position}")
        self.position += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.expect(count, what)
        self.file.seek(count, os.SEEK_CUR)
        self.position += count

    def expect(self, count: int, what: str) -> None:
        """Refuse ``count`` bytes that are not in the file, or more than a header may have."""
        end = self.position + count
        if end > self.size:
            raise self.malformed(
                f"{what} at byte {self.position}, of at least {count} bytes, would end beyond the "
                f"file's {self.size} bytes"
            )
        if end > MAX_HEADER_BYTES:
            raise self.malformed(
                f"{what} at byte {self.position}, of at least {count} bytes, would end beyond the "
                f"{MAX_HEADER_BYTES} bytes that metadata and tensor infos may take"
            )

    def malformed(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"the model file {self.name} is not read as GGUF: {what}")
