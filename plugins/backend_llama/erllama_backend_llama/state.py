"""State of a sequence, in and out of llama.cpp.

What llama.cpp checks, and what it does not, was measured for the pinned release:

* A failed or partial import leaves cells behind, even where it says 0. So state is only ever
  put into an empty sequence, and that one is emptied on any failure.
* It accepts a blob that describes other positions than it should. So positions and size are
  compared with what was asked for.
* Numbers inside a blob are never checked. That is for the checksum of whoever stored it.

A memory may have a part beside its attention cells, here called the *rest*: a recurrent state,
or the cells of a sliding window. llama.cpp exports it alone when it is asked for
``LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY``.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import attrs
import numpy as np
from llama_cpp import llama_cpp

from erllama_backend_llama.cell_check import CellCheck
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import RangeExport, RangeImport

_BYTES: Final = ctypes.POINTER(ctypes.c_uint8)
_SEQUENCE: Final = slice(4, 8)
"""Where the head of an exported state names its sequence."""


@attrs.frozen
class RangeSizes:
    """Bytes of an exported range: so many, and so many more for each token."""

    fixed: int
    per_token: int

    def of(self, tokens: int) -> int:
        return self.fixed + self.per_token * tokens


class SequenceState:
    """Whole states of sequences, and cells copied between them. One thread."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._memory: Any = llama_cpp.llama_get_memory(context)

    def size(self, seq: int, *, rest: bool = False) -> int:
        """Bytes of the state as it is now; ``rest``: of that part of it, with a head of its own."""
        return int(llama_cpp.llama_state_seq_get_size_ext(self._context, seq, _flags(rest)))

    def positions(self, seq: int) -> tuple[int, int]:
        """First and last position; (-1, -1) when the sequence is empty."""
        return (
            int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq)),
            int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq)),
        )

    def empty(self, seq: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, seq, -1, -1)

    def cut(self, seq: int, length: int) -> bool:
        """Keep positions below ``length``; whether llama.cpp could."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, seq, length, -1))

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Let ``target`` have the cells [start, end) of ``source`` too; nothing is copied."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, end)

    def clear(self) -> None:
        """Empty every sequence and zero the cells."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def copy_all(self, source: int, target: int) -> None:
        """Let the empty ``target`` have all that ``source`` has; nothing is copied in one pool."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def read(self, seq: int, into: memoryview, *, rest: bool = False) -> None:
        """Copy the state out, without the number of the sequence that it was in.

        Raises StateRejected unless it fills ``into`` exactly.
        """
        buffer = np.frombuffer(into, dtype=np.uint8)
        if not buffer.flags.writeable:
            raise ValueError("a state is exported into writable memory, got a read-only view")
        written = llama_cpp.llama_state_seq_get_data_ext(
            self._context, ctypes.cast(buffer.ctypes.data, _BYTES), buffer.size, seq, _flags(rest)
        )
        if written != buffer.size:
            raise StateRejected(
                f"llama.cpp exported {written} bytes of state where {buffer.size} were expected"
            )
        buffer[_SEQUENCE] = 0  # llama.cpp does not look at it, and equal states are equal bytes

    def write(self, seq: int, data: memoryview, start: int | None, end: int) -> None:
        """Put exported state into the empty sequence ``seq``.

        It must turn out to stand at [start, end); ``start`` None leaves the first position
        open. Raises StateRejected, with the sequence empty.
        """
        self.load(seq, data)
        problem = self._problem(seq, data.nbytes, start, end)
        if problem is not None:
            self.empty(seq)
            raise StateRejected(problem)

    def load(self, seq: int, data: memoryview, *, rest: bool = False) -> None:
        """Have llama.cpp read a state, or the rest of one, as far as it checks anything itself.

        The part that is read replaces what ``seq`` had of it. Raises StateRejected, with the
        sequence empty, unless all of ``data`` was taken.
        """
        buffer = np.frombuffer(data, dtype=np.uint8)
        taken = llama_cpp.llama_state_seq_set_data_ext(
            self._context, ctypes.cast(buffer.ctypes.data, _BYTES), buffer.size, seq, _flags(rest)
        )
        if taken != buffer.size:
            self.empty(seq)
            raise StateRejected(
                f"llama.cpp took {taken} of {buffer.size} bytes of state: they are of another "
                f"layout, damaged, or too many for the free cells"
            )

    def _problem(self, seq: int, size: int, start: int | None, end: int) -> str | None:
        first, last = self.positions(seq)
        if last != end - 1 or (start is not None and first != start):
            return f"the state holds positions {first} to {last}, not {start or 0} to {end - 1}"
        now = self.size(seq)
        if now != size:
            return f"the state has {size} bytes, but {now} once it was restored"
        return None


def _flags(rest: bool) -> int:
    return int(llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) if rest else 0


class Snapshots(Protocol):
    """What only exists while a sequence stands where it stands, in and out. One thread."""

    def size(self, seq: int) -> int:
        """Bytes of it as it is now."""
        ...

    def read(self, seq: int, into: memoryview) -> None:
        """Copy it out. Raises StateRejected unless it fills ``into`` exactly."""
        ...

    def write(self, seq: int, length: int, data: memoryview) -> None:
        """Put a sequence at ``length`` tokens. Raises StateRejected; it must then be emptied."""
        ...


class WholeSnapshots:
    """Snapshots that are all of a state; they are put into sequences that are empty."""

    def __init__(self, state: SequenceState, cells: CellCheck) -> None:
        self._state = state
        self._cells = cells

    def size(self, seq: int) -> int:
        return self._state.size(seq)

    def read(self, seq: int, into: memoryview) -> None:
        self._state.read(seq, into)

    def write(self, seq: int, length: int, data: memoryview) -> None:
        self._cells.check(data, None, length)
        self._state.write(seq, data, None, length)


class Ranges(Protocol):
    """Ranges of tokens, in and out of sequences, and from one to another. One thread."""

    @property
    def sizes(self) -> RangeSizes: ...

    @property
    def exports_whole(self) -> bool:
        """Whether an export reads the whole sequence."""
        ...

    def export(self, seq: int, length: int, ranges: Sequence[RangeExport]) -> None:
        """Copy out of a sequence of ``length`` tokens.

        Raises StateRejected when not all is there; what was copied is then garbage.
        """
        ...

    def restore(self, seq: int, length: int, ranges: Sequence[RangeImport]) -> None:
        """Append to a sequence of ``length`` tokens. Raises StateRejected; ``seq`` must then
        be emptied.
        """
        ...

    def can_stand_at(self, seq: int, length: int) -> bool:
        """Whether every cell that the token at ``length`` looks back to is there."""
        ...

    def share(self, source: int, target: int, length: int) -> bool:
        """Give the empty ``target`` the first tokens of ``source``; False, and it is empty,
        when it cannot be done.
        """
        ...

    def zero(self, seq: int) -> bool:
        """Zero every cell that the empty ``seq`` could get; False where that cannot be done."""
        ...


class PooledRanges:
    """What all ranges in one pool of cells share: they go in and out through ``scratch``, a
    sequence that is otherwise empty.
    """

    exports_whole: Final = False

    def __init__(self, state: SequenceState, scratch: int) -> None:
        self._state: Final = state
        self._scratch: Final = scratch

    def zero(self, seq: int) -> bool:
        """See the protocol. It could get any cell of the pool, so it cannot be done."""
        del seq
        return False

    @contextlib.contextmanager
    def _using_scratch(self) -> Iterator[int]:
        try:
            yield self._scratch
        finally:
            self._state.empty(self._scratch)


class UnifiedRanges(PooledRanges):
    """Ranges in one pool of cells, in and out through one sequence that is otherwise empty.

    ``window``: positions that a sliding window looks back over, 0 where there is none.
    llama.cpp gives cells that lie behind a sequence's window to whoever needs cells, even
    when it keeps them (``swa_full``). They do not matter where the sequence stands, but an
    export or a cut that reaches back to them must be refused; only the size shows it.
    """

    def __init__(
        self,
        state: SequenceState,
        *,
        scratch: int,
        sizes: RangeSizes,
        window: int,
        cells: CellCheck,
    ) -> None:
        super().__init__(state, scratch)
        self._cells: Final = cells
        self._window = window
        self.sizes: Final = sizes

    def export(self, seq: int, length: int, ranges: Sequence[RangeExport]) -> None:
        del length
        for item in ranges:
            with self._using_scratch() as scratch:
                self._state.share(seq, scratch, item.start, item.end)
                self._state.read(scratch, item.into)

    def restore(self, seq: int, length: int, ranges: Sequence[RangeImport]) -> None:
        """See the protocol. While a range is imported all of it, what lies behind ``stop`` too,
        needs free cells.
        """
        del length
        for item in ranges:
            tokens = item.end - item.start
            expected = self.sizes.of(tokens)
            if item.data.nbytes != expected:
                raise StateRejected(
                    f"a range of {tokens} tokens has {expected} bytes here, got {item.data.nbytes}"
                )
            self._cells.check(item.data, item.start, item.end)
            with self._using_scratch() as scratch:
                self._state.write(scratch, item.data, item.start, item.end)
                self._state.share(scratch, seq, item.start, item.stop)

    def can_stand_at(self, seq: int, length: int) -> bool:
        start = max(0, length - self._window + 1) if self._window else 0
        if start >= length:
            return True
        with self._using_scratch() as scratch:
            self._state.share(seq, scratch, start, length)
            return self._state.size(scratch) == self.sizes.of(length - start)

    def share(self, source: int, target: int, length: int) -> bool:
        """See the protocol. Nothing is copied, both have the same cells."""
        self._state.share(source, target, 0, length)
        if self.can_stand_at(target, length):
            return True
        self._state.empty(target)
        return False
