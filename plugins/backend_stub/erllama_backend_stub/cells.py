"""KV cells: what they hold, and the memory they are in.

A cell is ``cell_bytes`` bytes::

    offset  bytes
    0       4      token (u32, little-endian)
    4       4      position (u32, little-endian)
    8       …      SHAKE-128 of the model's key, the token and the position

It says nothing of the tokens before it, as a wrong neighbour is the sequence's business: a
cell from another place shows by its position, a stale one by its token.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from typing import Final

from erllama_backend_stub.options import CELL_HEAD_BYTES


def no_cells() -> array[int]:
    """An empty list of cell numbers."""
    return array("I")


class CellMaker:
    """Computes cells. Thread-safe."""

    def __init__(self, key: bytes, cell_bytes: int) -> None:
        self.key: Final = key
        self._fill_bytes = cell_bytes - CELL_HEAD_BYTES
        self.cell_bytes: Final = cell_bytes

    def make(self, start: int, tokens: Sequence[int]) -> bytes:
        """The cells of ``tokens`` at the positions from ``start`` on."""
        count = len(tokens)
        flat = [0] * (2 * count)
        flat[0::2] = tokens
        flat[1::2] = range(start, start + count)
        heads = struct.pack(f"<{2 * count}I", *flat)
        key, fill, shake = self.key, self._fill_bytes, hashlib.shake_128
        return b"".join(
            [
                (head := heads[at : at + CELL_HEAD_BYTES]) + shake(key + head).digest(fill)
                for at in range(0, len(heads), CELL_HEAD_BYTES)
            ]
        )


class CellPool:
    """A number of cells in one buffer, free or taken, by one or by several. Used by one thread.

    A cell that is given back keeps its bytes until it is taken and written again: whoever
    reads it meanwhile reads something stale, as with a real buffer.
    """

    def __init__(self, n_cells: int, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self._data = bytearray(n_cells * cell_bytes)
        self._free = array("I", range(n_cells - 1, -1, -1))
        self._sharers: dict[int, int] = {}
        """How many have a cell besides the first; cells that one alone has are not in it."""

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> array[int]:
        """Take so many cells, of which there must be enough."""
        left = len(self._free) - count
        taken = self._free[left:]
        taken.reverse()
        del self._free[left:]
        return taken

    def share(self, cells: array[int]) -> None:
        """Somebody else has these cells too; each must be given back by both."""
        for cell in cells:
            self._sharers[cell] = self._sharers.get(cell, 0) + 1

    def give_back(self, cells: array[int]) -> None:
        if self._sharers:
            cells = array("I", filter(self._is_last, cells))
        self._free.extend(reversed(cells))

    def _is_last(self, cell: int) -> bool:
        others = self._sharers.pop(cell, 0)
        if others > 1:
            self._sharers[cell] = others - 1
        return not others

    def write(self, cells: array[int], data: bytes | memoryview) -> None:
        """Write consecutive cells' bytes to ``cells``."""
        size, store = self._cell_bytes, self._data
        for offset, cell in zip(range(0, len(data), size), cells, strict=True):
            store[cell * size : (cell + 1) * size] = data[offset : offset + size]

    def read(self, cells: array[int]) -> bytes:
        """The bytes of ``cells``, one after the other."""
        size, store = self._cell_bytes, self._data
        return b"".join([store[cell * size : (cell + 1) * size] for cell in cells])
