"""Ranges of sequences that have cells of their own each.

llama.cpp copies cells between such sequences only as a whole, and only when it next computes,
by when either may have changed. So whole states are exported, and cut and joined here.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np

from erllama_backend_llama.checkpoint import Rest
from erllama_backend_llama.layout import BlobLayout, Bytes
from erllama_backend_llama.state import RangeSizes, SequenceState
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import RangeExport, RangeImport

_KEPT_BYTES: Final = 64 << 20
"""Memory for a whole state that is kept for the next one: fresh pages cost as much again."""


class SeparateRanges:
    """Ranges in a pool of ``n_cells`` cells for each sequence. One thread.

    ``rest``: what sequences have beside these cells, and what ranges are without; None: nothing.
    """

    exports_whole: Final = True

    def __init__(
        self, state: SequenceState, *, layout: BlobLayout, n_cells: int, rest: Rest | None = None
    ) -> None:
        self._state = state
        self._rest = rest
        self._layout = layout
        self._n_cells = n_cells
        self._kept = _pages(mmap.PAGESIZE)
        self.sizes: Final = RangeSizes(layout.range_bytes, layout.bytes_per_token)

    def export(self, seq: int, length: int, ranges: Sequence[RangeExport]) -> None:
        """See the protocol. ValueError for memory that cannot be written to."""
        self._layout.cut(self._read(seq, length), seq, length, ranges)

    def restore(self, seq: int, length: int, ranges: Sequence[RangeImport]) -> None:
        """See the protocol. What ``seq`` has is taken out and put back with the rest."""
        if not ranges:
            return
        if length:
            data = _pages(self.sizes.of(length)).data
            self.export(seq, length, [RangeExport(0, length, data)])
            self._state.empty(seq)
            ranges = [RangeImport(0, length, length, data), *ranges]
        stop = ranges[-1].stop
        none = b"" if self._rest is None else self._rest.none
        cells = self._layout.whole_bytes(stop)
        whole = self._memory(cells + len(none))
        self._layout.join(ranges, whole[:cells])
        whole[cells:] = np.frombuffer(none, dtype=np.uint8)
        if self._rest is None:
            self._state.write(seq, whole.data, 0, stop)
        else:  # without its rest it has no last position yet
            self._state.load(seq, whole.data)

    def can_stand_at(self, seq: int, length: int) -> bool:
        """See the protocol. Cells are kept; with a rest there must be one for each token."""
        if self._rest is None:
            return True
        cells = self._state.size(seq) - self._rest.bytes_in_state(seq)
        return cells == self._layout.whole_bytes(length)

    def share(self, source: int, target: int, length: int) -> bool:
        """See the protocol. The cells are copied."""
        whole = self._memory(self._state.size(source))
        start = 0 if self._rest is None else None  # a window begins later, a recurrent state last
        try:
            self._state.read(source, whole.data)
            self._state.write(target, whole.data, start, self._state.positions(source)[1] + 1)
        except StateRejected:
            return False
        if self._rest is not None or self._state.cut(target, length):
            return True
        self._state.empty(target)
        return False

    def zero(self, seq: int) -> bool:
        # Pages that are read and never written cost no memory, however large the state is.
        none = b"" if self._rest is None else self._rest.none
        cells = self._layout.whole_bytes(self._n_cells)
        zeros = _pages(cells + len(none))
        self._layout.zeros(self._n_cells, zeros[:cells])
        zeros[cells:] = np.frombuffer(none, dtype=np.uint8)
        try:
            self._state.load(seq, zeros.data)
        except StateRejected:
            return False
        self._state.empty(seq)
        return True

    def _read(self, seq: int, length: int) -> Bytes:
        rest = 0 if self._rest is None else self._rest.bytes_in_state(seq)
        cells = self._layout.whole_bytes(length)
        whole = self._memory(cells + rest)
        self._state.read(seq, whole.data)
        return whole[:cells]

    def _memory(self, size: int) -> Bytes:
        """Memory for a state, until it is asked for again."""
        if size > _KEPT_BYTES:
            return _pages(size)
        if size > self._kept.size:
            self._kept = _pages(min(_KEPT_BYTES, 2 * size))
        return self._kept[:size]


def _pages(size: int) -> Bytes:
    """Zeros that go back to the system when nobody has them any more."""
    pages: Bytes = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    return pages
