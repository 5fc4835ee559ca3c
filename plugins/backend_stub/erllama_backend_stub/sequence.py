"""One sequence: its cells, and what they amount to."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Items
from typing import Final

from erllama_backend_stub.cells import CellMaker, CellPool, no_cells

STATE_BYTES: Final = 64
"""Size of the recurrent state of a checkpoint sequence."""
_NEW_STATE: Final = bytes(STATE_BYTES)


class Sequence:
    """Cells in the order of positions, in a pool that others may share. Used by one thread.

    What a sequence amounts to is a digest of the bytes in its cells, all of them, as they
    stand in the pool. The digest runs along as cells are added, and starts over when some
    are cut off; it is never fed from anything but the pool.

    A recurrent sequence has a state besides, which each *computed* cell advances. Nothing
    but a snapshot brings it back, so ``state`` is None after an import of ranges.
    """

    def __init__(self, pool: CellPool, maker: CellMaker, *, recurrent: bool, keeps_tape: bool):
        self._pool = pool
        self.maker = maker
        """Computes its cells; another one only while there are none."""
        self._recurrent = recurrent
        self._keeps_tape = keeps_tape
        self.cells = no_cells()
        self.state: bytes | None = None
        self.must_drop = False
        """Set when a failed call left the sequence undefined."""
        self._start_over()
        self.clear()

    def __len__(self) -> int:
        return len(self.cells)

    def _start_over(self) -> None:
        self._hash = hashlib.blake2b(digest_size=32)
        self._n_read = 0
        self._tape: list[str] = []

    # ------------------------------------------------------------- changes

    def clear(self) -> None:
        """Empty and sound again."""
        self._pool.give_back(self.cells)
        self.cells = no_cells()
        self.state = _NEW_STATE if self._recurrent else None
        self.must_drop = False
        self._start_over()

    def cut(self, length: int) -> None:
        """Keep the first ``length`` cells; the recurrent state is the caller's concern."""
        self._pool.give_back(self.cells[length:])
        del self.cells[length:]
        if self._n_read > length:
            self._start_over()

    def put(self, data: bytes | memoryview) -> None:
        """Append cells from elsewhere; the pool must have room for them."""
        cells = self._pool.take(len(data) // self.maker.cell_bytes)
        self._pool.write(cells, data)
        self.cells.extend(cells)
        self.state = None

    def share(self, source: Sequence, length: int) -> None:
        """Get the first ``length`` cells of another one: the cells, or copies in another pool.

        All of a recurrent one: its state comes along.
        """
        if source._pool is self._pool:
            cells = source.cells[:length]
            self._pool.share(cells)
            self.cells.extend(cells)
        else:
            self.put(source.read(0, length))
        self.state = source.state

    def compute(self, tokens: Items[int]) -> None:
        """Compute and append the cells of ``tokens``; the pool must have room for them."""
        length, state = len(self), self.state
        self.put(self.maker.make(length, tokens))
        if state is not None:
            size = self.maker.cell_bytes
            data = self.read(length, len(self))
            for at in range(0, len(data), size):
                state = hashlib.blake2b(data[at : at + size], key=state).digest()
            self.state = state

    # ------------------------------------------------------------- reading

    def read(self, start: int, end: int) -> bytes:
        """The bytes of the cells at positions [start, end)."""
        return self._pool.read(self.cells[start:end])

    def _catch_up(self) -> None:
        if self._n_read == len(self):
            return
        data = self.read(self._n_read, len(self))
        self._hash.update(data)
        if self._keeps_tape:
            words = struct.unpack(f"<{len(data) // 4}I", data)
            self._tape.append("".join(map(_character, words[:: self.maker.cell_bytes // 4])))
        self._n_read = len(self)

    def digest(self) -> bytes:
        """32 bytes that depend on every byte of every cell, and on the recurrent state."""
        self._catch_up()
        digest = self._hash.copy()
        if self.state is not None:
            digest.update(self.state)
        return digest.digest()

    def tape(self) -> str:
        """The tokens that the cells name, one character each; U+FFFD for what is no token.

        Only for a sequence that keeps its tape.
        """
        self._catch_up()
        if len(self._tape) > 1:
            self._tape = ["".join(self._tape)]
        return self._tape[0] if self._tape else ""


def _character(word: int) -> str:
    # A damaged cell can name anything.
    return chr(word) if word <= 0xFFFD else "\N{REPLACEMENT CHARACTER}"
