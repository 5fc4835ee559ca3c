"""Getting rid of NaN that belongs to nobody any more.

What was measured for the pinned release: cells and recurrent states keep their numbers when their
sequence is dropped. Without flash attention one NaN in a pool of cells makes every sequence's next
step NaN, as masked cells are multiplied by zero, and NaN times zero is NaN. For the same reason a
sequence that begins in a recurrent state of NaN is NaN from its first token on: llama.cpp starts
it by multiplying the state with zero. Only writing other numbers there helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from erllama_backend_llama.kv_class import MemoryClass
from erllama_backend_llama.state import SequenceState
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import KVClass, Row


class Healer:
    """Writes over what sequences of NaN have left behind. One thread.

    ``n_seq``: native sequences, of which the context's callers use the first.
    """

    def __init__(self, state: SequenceState, memory: MemoryClass, *, n_seq: int) -> None:
        self._state: Final = state
        self._memory: Final = memory
        self._n_seq: Final = n_seq
        # The V cache is transposed without flash attention, which would leave masked cells out.
        self._masks_by_zero: Final = memory.v_transposed is not False
        self._cells: set[int] = set()
        """Sequences that left attention cells with NaN behind."""
        self._states_spoilt = False
        """Whether a free recurrent state may hold NaN."""
        self._shared: set[int] = set()
        """Sequences that may have one recurrent state together, which leaves more of them free
        than there are empty sequences to fill them with."""

    def note_spoilt(self, seq: int) -> None:
        """A step came out as NaN for a sequence, which is dropped next."""
        if self._memory.has_cells:
            self._cells.add(seq)
        if self._memory.recurrent_state is not None:
            self._states_spoilt = True

    @property
    def reaches_others(self) -> bool:
        """Whether what is computed in the same cells from now on comes out as NaN, whoever it is
        for; in one pool that is everybody.
        """
        return bool(self._cells) and self._masks_by_zero

    def note_shared(self, *seqs: int) -> None:
        """These have equal states now; until one goes on it may be the same state."""
        self._shared.update(seqs)

    def before_step(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """These rows are about to be computed; some may begin in a state that was left behind."""
        if self._states_spoilt and any(not row.start for row in rows):
            self._heal_states(lengths)
        if self._shared:
            self._shared.difference_update(row.seq for row in rows)

    def after_drop(self, seq: int, lengths: Sequence[int]) -> None:
        """A sequence is empty now; ``lengths`` of all that callers use, 0 where empty."""
        self._shared.discard(seq)
        if self._states_spoilt:
            self._heal_states(lengths)
        if not self._cells:
            return
        ranges = self._memory.ranges
        if seq in self._cells and ranges is not None and ranges.zero(seq):
            self._cells.discard(seq)
        if self._cells and not any(lengths):
            self._state.clear()
            self._cells.clear()

    def _heal_states(self, lengths: Sequence[int]) -> None:
        """Fill every free recurrent state with numbers, by way of the sequences that are empty."""
        numbers = self._memory.recurrent_state
        assert numbers is not None
        empty = [seq for seq in range(self._n_seq) if seq >= len(lengths) or not lengths[seq]]
        rest = self._memory.kv_class is KVClass.CHECKPOINT
        try:
            for seq in empty:
                self._state.load(seq, memoryview(numbers), rest=rest)
        except StateRejected:
            return  # tried again at the next occasion
        finally:
            for seq in empty:
                self._state.empty(seq)
        self._states_spoilt = bool(self._shared)
