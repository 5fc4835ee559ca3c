"""Memories with a part that cannot be cut: attention cells in ranges, the rest in snapshots.

The rest is the recurrent state of a hybrid model, or the cells of a sliding window that are not
kept. What was measured for the pinned release:

* Attention cells may be exported at any time. The rest must be exported while the sequence
  stands where it is to be restored: later exports carry a later one, and are accepted.
* Ranges whose rest is that of an empty sequence, imported one after another, and then the rest
  alone on top compute the very logits that the original does.
* While its rest is missing a sequence has no last position, so what shows that a chain is
  complete is its size.
* A rest that is empty takes a recurrent state away from a copy, and does nothing to a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from erllama_backend_llama.cell_check import CellCheck
from erllama_backend_llama.layout import HEAD_BYTES, BlobLayout
from erllama_backend_llama.state import PooledRanges, RangeSizes, SequenceState
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import RangeExport, RangeImport


class Rest:
    """What sequences have beside their attention cells. One thread.

    ``window``: positions that a sliding window looks back over; 0: the rest is a recurrent state.
    """

    def __init__(self, state: SequenceState, *, empty_seq: int, window: int) -> None:
        self._state = state
        self._window = window
        blob = bytearray(state.size(empty_seq, rest=True))
        state.read(empty_seq, memoryview(blob), rest=True)
        self._nothing = memoryview(bytes(blob))
        self._cells = CellCheck(())
        self.none: Final = bytes(blob[HEAD_BYTES:])
        """How a whole state ends whose rest is empty."""

    def learn(self, seq: int, cells: Callable[[bytearray], CellCheck]) -> None:
        """Take note of how the rest is laid out that ``seq`` has now."""
        blob = bytearray(self.size(seq))
        self.read(seq, memoryview(blob))
        self._cells = cells(blob)

    def bytes_in_state(self, seq: int) -> int:
        """Bytes at the end of the whole state that are the rest."""
        return self._state.size(seq, rest=True) - HEAD_BYTES

    def take_away(self, seq: int) -> None:
        """Leave ``seq``, a copy, its attention cells alone, as far as llama.cpp can do that."""
        self._state.load(seq, self._nothing, rest=True)

    def copy(self, source: int, target: int) -> None:
        """Give ``target`` a rest of its own, equal to that of ``source``."""
        data = memoryview(bytearray(self.size(source)))
        self.read(source, data)
        self._state.load(target, data, rest=True)

    @property
    def is_window(self) -> bool:
        return self._window > 0

    # As the snapshots of a context; see Snapshots.

    def size(self, seq: int) -> int:
        return self._state.size(seq, rest=True)

    def read(self, seq: int, into: memoryview) -> None:
        self._state.read(seq, into, rest=True)

    def write(self, seq: int, length: int, data: memoryview) -> None:
        """Put the rest on top of ``length`` attention cells. Raises StateRejected."""
        self._cells.check(data, None, length)
        self._state.load(seq, data, rest=True)
        problem = self.problem_at(seq, length)
        if problem is not None:
            raise StateRejected(f"with this snapshot {problem}")
        if self.size(seq) != data.nbytes:
            raise StateRejected(
                f"the snapshot has {data.nbytes} bytes, but {self.size(seq)} once it was restored"
            )

    def problem_at(self, seq: int, length: int) -> str | None:
        """Why a sequence cannot go on from ``length`` tokens with the rest that it has."""
        first, last = self._state.positions(seq)
        if last != length - 1:
            return f"the sequence ends at position {last}, not {length - 1}"
        if not self._window:
            # Of both parts' positions a hybrid memory tells the later first and the earlier last.
            return None if first == last else f"its two parts end at {first} and {last}"
        # The next token looks back to here. llama.cpp gives cells before it to whoever needs them.
        if first > max(0, length - self._window + 1):
            return f"the window begins at position {first} only"
        return None


class CheckpointRanges(PooledRanges):
    """Ranges of attention cells in one pool, in and out through a sequence that is else empty."""

    def __init__(
        self,
        state: SequenceState,
        *,
        scratch: int,
        layout: BlobLayout,
        rest: Rest,
    ) -> None:
        super().__init__(state, scratch)
        self._layout = layout
        self._rest = rest
        self.sizes: Final = RangeSizes(layout.range_bytes + len(rest.none), layout.bytes_per_token)

    def export(self, seq: int, length: int, ranges: Sequence[RangeExport]) -> None:
        del length
        for item in ranges:
            with self._using_scratch() as scratch:
                self._state.share(seq, scratch, item.start, item.end)
                self._rest.take_away(scratch)
                self._read(scratch, item)

    def _read(self, scratch: int, item: RangeExport) -> None:
        none = self._rest.none
        whole, rest = self._state.size(scratch), self._rest.bytes_in_state(scratch)
        cells = item.into.nbytes - len(none)
        if whole - rest != cells:
            raise StateRejected(
                f"the cells [{item.start}, {item.end}) have {whole - rest} bytes where {cells} "
                f"were expected"
            )
        if rest == len(none):
            self._state.read(scratch, item.into)
        else:  # those of a window, which cannot be taken away
            data = np.empty(whole, dtype=np.uint8)
            self._state.read(scratch, data.data)
            item.into[:cells] = data[:cells].data
            item.into[cells:] = none

    def restore(self, seq: int, length: int, ranges: Sequence[RangeImport]) -> None:
        """See the protocol. While a range is imported all of it, what lies behind ``stop`` too,
        needs free cells. What it leaves behind has no rest.
        """
        del length
        none = self._rest.none
        for item in ranges:
            cells = item.data[: max(0, item.data.nbytes - len(none))]
            if item.data[len(cells) :] != none:
                raise StateRejected("a range ends otherwise than ranges of this model do")
            self._layout.check_range(RangeImport(item.start, item.end, item.stop, cells))
            with self._using_scratch() as scratch:
                self._state.load(scratch, item.data)
                if self._state.size(scratch) != item.data.nbytes:
                    raise StateRejected("a range has another size once it was restored")
                self._state.share(scratch, seq, item.start, item.stop)

    def can_stand_at(self, seq: int, length: int) -> bool:
        """Whether there is a cell for each of ``length`` tokens and no more."""
        cells = self._state.size(seq) - self._rest.bytes_in_state(seq)
        return cells + len(self._rest.none) == self.sizes.of(length)

    def share(self, source: int, target: int, length: int) -> bool:
        """See the protocol. Attention cells are the same for both, and so is a recurrent state
        until one goes on; a window is copied, since llama.cpp has no cells left for the next step
        once two sequences have the same.
        """
        if not self.can_stand_at(source, length):
            return False
        self._state.copy_all(source, target)
        try:
            if self._rest.is_window:
                self._rest.copy(source, target)
        except StateRejected:
            return False  # and the target is empty
        if self.can_stand_at(target, length) and not self._rest.problem_at(target, length):
            return True
        self._state.empty(target)
        return False
