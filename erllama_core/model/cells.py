"""How many KV cells the sequences of a context hold, those that they share counted once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final


class _Run:
    """Cells that one sequence filled in a row; others may hold a first part of them too."""

    __slots__ = ("held", "owner", "size")

    def __init__(self, owner: int) -> None:
        self.owner: Final = owner
        """The sequence that filled them: it alone goes on filling."""
        self.held: dict[int, int] = {}
        """By sequence: how many of the cells, counted from the first."""
        self.size = 0
        """Cells that any sequence holds: the most of these."""


class CellLedger:
    """Books of a pool of cells. The worker's alone.

    llama.cpp does not tell how many cells are free, and a step that finds too few fails whole.
    ``capacity`` None: every sequence has cells of its own, and none has to be booked.
    """

    def __init__(self, capacity: int | None) -> None:
        self._capacity: Final = capacity
        self._sequences: dict[int, list[_Run]] = {}
        self._used = 0

    @property
    def is_pooled(self) -> bool:
        """Whether sequences can take each other's cells away."""
        return self._capacity is not None

    @property
    def used(self) -> int:
        """Cells that any sequence holds."""
        return self._used

    @property
    def free(self) -> int:
        """Cells that none holds; more than can be needed where they are not pooled."""
        return 1 << 62 if self._capacity is None else self._capacity - self._used

    def exclusive(self, seqs: Collection[int]) -> int:
        """Cells that would be free if all of these sequences were dropped."""
        runs = {id(run): run for seq in seqs for run in self._sequences.get(seq, ())}
        total = 0
        for run in runs.values():
            others = max((n for seq, n in run.held.items() if seq not in seqs), default=0)
            total += run.size - min(others, run.size)
        return total

    def grow(self, seq: int, tokens: int) -> None:
        """The sequence got so many tokens more."""
        if self._capacity is None or not tokens:
            return
        runs = self._sequences.setdefault(seq, [])
        last = runs[-1] if runs else None
        if last is None or last.owner != seq or last.held[seq] < last.size:
            last = _Run(seq)
            last.held[seq] = 0
            runs.append(last)
        last.held[seq] += tokens
        last.size += tokens
        self._used += tokens

    def cut(self, seq: int, length: int) -> None:
        """The sequence keeps its first ``length`` tokens."""
        kept: list[_Run] = []
        for run in self._sequences.get(seq, ()):
            if length > 0:
                run.held[seq] = min(length, run.held[seq])
                length -= run.held[seq]
                kept.append(run)
            else:
                del run.held[seq]
            left = max(run.held.values(), default=0)
            self._used += left - run.size
            run.size = left
        self._sequences[seq] = kept

    def drop(self, seq: int) -> None:
        """The sequence is empty."""
        self.cut(seq, 0)
        self._sequences.pop(seq, None)

    def share(self, source: int, target: int, length: int) -> None:
        """The empty ``target`` has the first ``length`` cells of ``source`` too."""
        if self._capacity is None:
            return
        runs = self._sequences.setdefault(target, [])
        for run in self._sequences.get(source, ()):
            if length <= 0:
                break
            run.held[target] = min(length, run.held[source])
            length -= run.held[target]
            runs.append(run)
