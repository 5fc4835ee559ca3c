"""The form in which llama.cpp exports a sequence: read, cut into ranges, and joined again.

That of the pinned release, for one pool of cells or one for each sequence (a *stream*)::

    u32 magic, i32 sequence, u32 streams
    for each stream: u32 cells, and if there are any
        for each cell: i32 position, u32 number of ids, with M-RoPE three more i32, the ids
        u32 "V is transposed", u32 layers
        for each layer K:  i32 type, u64 bytes of a row, a row for each cell
        for each layer V:  the same; or transposed: i32 type, u32 bytes of an element, u32 width,
                           and width runs of an element for each cell

It is private to llama.cpp. So every field is compared with what a proof found at load, and
whoever cuts proves by a round trip that cutting works.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import RangeExport, RangeImport

Bytes = npt.NDArray[np.uint8]

_HEAD: Final = struct.Struct("<IiI")
HEAD_BYTES: Final = 8
"""Magic and sequence, which each of a state's parts has too when it is exported alone."""
_COUNT: Final = struct.Struct("<I")
_TAIL: Final = struct.Struct("<II")
_PART_HEAD_BYTES: Final = 12
_MOST_LAYERS: Final = 4096


def v_transposed(
    blob: bytes | bytearray, *, tokens: int, streams: int, has_more_positions: bool
) -> bool | None:
    """Whether V is transposed in the state of sequence 0 with ``tokens`` tokens; None if unclear.

    Memories with further parts begin like this one, so it is known of them too.
    """
    found = _tail(blob, tokens=tokens, streams=streams, cell=_cell(has_more_positions))
    return None if found is None else found[0]


@attrs.frozen
class _Part:
    """K or V of a layer: ``width`` runs with ``element`` bytes for each cell; rows are one run."""

    head: Bytes
    width: int
    element: int

    def bytes_of(self, tokens: int) -> int:
        return self.width * self.element * tokens


@attrs.frozen(eq=False)
class BlobLayout:
    """How states of one context are laid out. Immutable."""

    magic: int
    streams: int
    cell: np.dtype[Any]
    tail: bytes
    parts: tuple[_Part, ...]

    @classmethod
    def read(
        cls, blob: bytes | bytearray, *, tokens: int, streams: int, has_more_positions: bool
    ) -> BlobLayout:
        """The layout of the state of sequence 0, which has ``tokens`` tokens.

        Raises StateRejected where a field is not what it should be, or bytes are left over.
        """
        layout, at = cls.read_pool(
            blob, tokens=tokens, streams=streams, has_more_positions=has_more_positions
        )
        if at != len(blob):
            raise StateRejected("an exported state goes on behind its last layer")
        return layout

    @classmethod
    def read_pool(
        cls, blob: bytes | bytearray, *, tokens: int, streams: int, has_more_positions: bool
    ) -> tuple[BlobLayout, int]:
        """The same of a state's first pool of cells, and where whatever follows it begins."""
        cell = _cell(has_more_positions)
        found = _tail(blob, tokens=tokens, streams=streams, cell=cell)
        if found is None:
            raise StateRejected("an exported state begins otherwise than is known")
        transposed, layers, at = found
        data = np.frombuffer(blob, dtype=np.uint8)
        parts = []
        for number in range(2 * layers):
            if at + _PART_HEAD_BYTES > data.size:
                raise StateRejected(f"an exported state ends before part {number} of its layers")
            as_runs = transposed and number >= layers
            if as_runs:
                _, element, width = struct.unpack_from("<iII", blob, at)
            else:
                (_, element), width = struct.unpack_from("<iQ", blob, at), 1
            part = _Part(data[at : at + _PART_HEAD_BYTES].copy(), width, element)
            at += _PART_HEAD_BYTES + part.bytes_of(tokens)
            parts.append(part)
        end = at + _COUNT.size * (streams - 1)
        if bytes(data[at:end]) != bytes(end - at):
            raise StateRejected("an exported state has more than one sequence")
        (magic, _, _) = _HEAD.unpack_from(blob)
        return cls(magic, streams, cell, _TAIL.pack(transposed, layers), tuple(parts)), end

    # --------------------------------------------------------------- sizes

    @property
    def bytes_per_token(self) -> int:
        return self.cell.itemsize + sum(part.bytes_of(1) for part in self.parts)

    @property
    def range_bytes(self) -> int:
        """Bytes of a range beside those of its tokens."""
        return _HEAD.size + _COUNT.size + _TAIL.size + _PART_HEAD_BYTES * len(self.parts)

    def whole_bytes(self, tokens: int) -> int:
        """Bytes of a sequence's state."""
        fixed = self.range_bytes + _COUNT.size * (self.streams - 1)
        return fixed + self.bytes_per_token * tokens

    # ------------------------------------------------------------- cutting

    def cut(self, whole: Bytes, stream: int, length: int, ranges: Sequence[RangeExport]) -> None:
        """Copy ranges of the exported state of a sequence with ``length`` tokens.

        A range has the form of a state in one pool. Raises StateRejected for a state that is
        not what a sequence of that length has.
        """
        if whole.size != self.whole_bytes(length):
            raise StateRejected(
                f"the state of {length} tokens has {whole.size} bytes, not "
                f"{self.whole_bytes(length)}"
            )
        # Streams without cells before and behind it are a zero each.
        at = _HEAD.size + _COUNT.size * stream
        self._check_count(whole, at, length)
        at += _COUNT.size
        cells = self._cells(whole, at, 0, length)
        at += cells.nbytes
        self._check_tail(whole, at)
        for item in ranges:
            self._cut_range(whole, at + _TAIL.size, cells, item)

    def _cut_range(
        self, whole: Bytes, at: int, cells: npt.NDArray[np.void], item: RangeExport
    ) -> None:
        start, end, length = item.start, item.end, cells.size
        into = np.frombuffer(item.into, dtype=np.uint8)
        to = self._put_head(into, 1, end - start)
        records = into[to : to + self.cell.itemsize * (end - start)]
        records[:] = cells[start:end].view(np.uint8)
        records.view(self.cell)["id"] = 0  # whose they were is not what they are
        to = self._put_tail(into, to + records.size)
        for part in self.parts:
            to = _put(into, to, part.head)
            source = part.bytes_of(length)
            target = part.bytes_of(end - start)
            runs = whole[at + _PART_HEAD_BYTES : at + _PART_HEAD_BYTES + source]
            _runs(into[to : to + target], part)[:] = _runs(runs, part)[
                :, start * part.element : end * part.element
            ]
            at += _PART_HEAD_BYTES + source
            to += target

    # ------------------------------------------------------------- joining

    def join(self, ranges: Sequence[RangeImport], into: Bytes) -> None:
        """Put ranges that follow each other from position 0 on together to a whole state.

        ``into`` has :meth:`whole_bytes`. Raises StateRejected for bytes that are no such range.
        """
        length = ranges[-1].stop
        starts = self._put_head(into, self.streams, length)
        tail = starts + self.cell.itemsize * length
        first = self._put_tail(into, tail)
        for item in ranges:
            self._join_range(item, into, starts, first, length)
        into[into.size - _COUNT.size * (self.streams - 1) :] = 0

    def check_range(self, item: RangeImport) -> None:
        """Raise StateRejected unless a range from one pool holds the positions that it should."""
        self._open_range(item, np.frombuffer(item.data, dtype=np.uint8), in_order=False)

    def _open_range(
        self, item: RangeImport, data: Bytes, *, in_order: bool
    ) -> tuple[npt.NDArray[np.void], int]:
        """The cells of a range, and where its first layer begins."""
        tokens = item.end - item.start
        expected = self.range_bytes + self.bytes_per_token * tokens
        if data.size != expected:
            raise StateRejected(
                f"a range of {tokens} tokens has {expected} bytes here, got {data.size}"
            )
        if _HEAD.unpack_from(data.data) != (self.magic, 0, 1):
            raise StateRejected("a range begins otherwise than ranges of this model do")
        at = _HEAD.size
        self._check_count(data, at, tokens)
        at += _COUNT.size
        cells = self._cells(data, at, item.start, item.end, in_order=in_order)
        at += cells.nbytes
        self._check_tail(data, at)
        return cells, at + _TAIL.size

    def check_pool(self, data: Bytes, at: int, start: int | None, end: int) -> int:
        """Raise StateRejected unless a pool at ``at`` holds the cells of positions [start, end).

        ``start`` None: of some up to ``end``, as a window's are. The offset behind it.
        """
        if _count(data, at) != self.streams:
            raise StateRejected("a state is of another number of streams")
        at += _COUNT.size
        found = None
        for _ in range(self.streams):
            count = _count(data, at)
            at += _COUNT.size
            if not count:
                continue
            if found is not None or (start is not None and count != end - start):
                raise StateRejected(f"a state says that it has {count} cells")
            # Compared before anybody sets memory aside for so many.
            behind = at + count * self.bytes_per_token + self._between
            if count > end or behind > data.size:
                raise StateRejected(f"a state says that it has {count} cells, for {end} tokens")
            found = self._cells(data, at, end - count, end, in_order=False)
            self._check_tail(data, at + found.nbytes)
            at = behind
        if found is None:
            raise StateRejected("a state has no cells")
        return at

    @property
    def _between(self) -> int:
        """Bytes of a stream behind its count that are of no cell."""
        return _TAIL.size + _PART_HEAD_BYTES * len(self.parts)

    def _join_range(
        self, item: RangeImport, into: Bytes, records_at: int, to: int, length: int
    ) -> None:
        data = np.frombuffer(item.data, dtype=np.uint8)
        tokens, used = item.end - item.start, item.stop - item.start
        cells, at = self._open_range(item, data, in_order=True)
        records = cells[:used].view(np.uint8)
        records_at += self.cell.itemsize * item.start
        into[records_at : records_at + records.size] = records
        for part in self.parts:
            if not np.array_equal(data[at : at + _PART_HEAD_BYTES], part.head):
                raise StateRejected("a range has layers of other types or sizes than the model")
            at += _PART_HEAD_BYTES
            to = _put(into, to, part.head)
            size = part.bytes_of(tokens)
            room = _runs(into[to : to + part.bytes_of(length)], part)
            room[:, item.start * part.element : item.stop * part.element] = _runs(
                data[at : at + size], part
            )[:, : used * part.element]
            at += size
            to += part.bytes_of(length)

    def zeros(self, tokens: int, into: Bytes) -> None:
        """Lay out a whole state of zeros in ``into``, which is all zero."""
        at = self._put_head(into, self.streams, tokens)
        cells = into[at : at + self.cell.itemsize * tokens].view(self.cell)
        cells["position"] = np.arange(tokens)
        cells["ids"] = 1
        at = self._put_tail(into, at + cells.nbytes)
        for part in self.parts:
            at = _put(into, at, part.head) + part.bytes_of(tokens)

    # -------------------------------------------------------------- fields

    def _put_head(self, into: Bytes, streams: int, tokens: int) -> int:
        _HEAD.pack_into(into.data, 0, self.magic, 0, streams)
        _COUNT.pack_into(into.data, _HEAD.size, tokens)
        return _HEAD.size + _COUNT.size

    def _put_tail(self, into: Bytes, at: int) -> int:
        into[at : at + _TAIL.size] = np.frombuffer(self.tail, dtype=np.uint8)
        return at + _TAIL.size

    def _check_count(self, data: Bytes, at: int, tokens: int) -> None:
        (found,) = _COUNT.unpack_from(data.data, at)
        if found != tokens:
            raise StateRejected(f"a state of {tokens} tokens says that it has {found}")

    def _check_tail(self, data: Bytes, at: int) -> None:
        if bytes(data[at : at + _TAIL.size]) != self.tail:
            raise StateRejected("a state has another layout of V, or another number of layers")

    def _cells(
        self, data: Bytes, at: int, start: int, end: int, *, in_order: bool = True
    ) -> npt.NDArray[np.void]:
        """The cells at ``at``, which must be those of positions [start, end), in this order.

        llama.cpp writes cells as they lie, which in one pool may be in any order.
        """
        size = self.cell.itemsize * (end - start)
        cells: npt.NDArray[np.void] = data[at : at + size].view(self.cell)
        positions = cells["position"] if in_order else np.sort(cells["position"])
        as_expected = np.array_equal(positions, np.arange(start, end, dtype=np.int32))
        if not as_expected or (cells["ids"] != 1).any():
            raise StateRejected(f"a state does not hold the positions {start} to {end - 1}")
        return cells


def _cell(has_more_positions: bool) -> np.dtype[Any]:
    more: list[Any] = [("more", "<i4", 3)] if has_more_positions else []
    return np.dtype([("position", "<i4"), ("ids", "<u4"), *more, ("id", "<i4")])


def _tail(
    blob: bytes | bytearray, *, tokens: int, streams: int, cell: np.dtype[Any]
) -> tuple[bool, int, int] | None:
    """Whether V is transposed, the number of layers, and where the first begins."""
    at = _HEAD.size + _COUNT.size
    behind = at + tokens * cell.itemsize
    if len(blob) < behind + _TAIL.size:
        return None
    _, _, found_streams = _HEAD.unpack_from(blob)
    (found_tokens,) = _COUNT.unpack_from(blob, _HEAD.size)
    if (found_streams, found_tokens) != (streams, tokens):
        return None
    cells = np.frombuffer(blob, dtype=cell, count=tokens, offset=at)
    if (cells["position"] != np.arange(tokens)).any() or (cells["ids"] != 1).any():
        return None
    transposed, layers = _TAIL.unpack_from(blob, behind)
    if transposed not in (0, 1) or layers >= _MOST_LAYERS:
        return None
    return bool(transposed), layers, behind + _TAIL.size


def _count(data: Bytes, at: int) -> int:
    if at + _COUNT.size > data.size:
        raise StateRejected("a state ends early")
    (found,) = _COUNT.unpack_from(data.data, at)
    return int(found)


def _put(into: Bytes, at: int, data: Bytes) -> int:
    into[at : at + data.size] = data
    return at + data.size


def _runs(data: Bytes, part: _Part) -> Bytes:
    return data.reshape(part.width, -1)
