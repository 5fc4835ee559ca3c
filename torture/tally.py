"""What came of a round: every reply and every stored object is right, lost, or wrong."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Self

import attrs


@attrs.define
class Tally:
    """Counts of one round, or of several. Thread-safe."""

    survived: int = 0
    """Replies that were right, objects that were whole."""
    lost: int = 0
    """Requests that ended with an error that the fault explains, stored objects that are gone."""
    wrong: list[str] = attrs.field(factory=list)
    """What must not be: in words, one for each case."""
    notes: Counter[str] = attrs.field(factory=Counter)
    """What else happened, by name; how hard it was."""
    point: dict[str, float] = attrs.field(factory=dict)
    """What was measured at the end of the round, for a fault that is watched over time."""
    _lock: threading.Lock = attrs.field(factory=threading.Lock, repr=False, eq=False)

    @property
    def tried(self) -> int:
        """Everything that was looked at."""
        return self.survived + self.lost + len(self.wrong)

    def survive(self, note: str | None = None, count: int = 1) -> None:
        """So many were right."""
        with self._lock:
            self.survived += count
            if note is not None:
                self.notes[note] += count

    def lose(self, note: str, count: int = 1) -> None:
        """So many are gone, as they may be."""
        with self._lock:
            self.lost += count
            self.notes[note] += count

    def accuse(self, what: str) -> None:
        """Something is wrong."""
        with self._lock:
            self.wrong.append(what)

    def check(self, what: str, *, holds: bool) -> None:
        """Something is wrong unless it holds; what holds is not counted."""
        if not holds:
            self.accuse(what)

    def note(self, name: str, count: int = 1) -> None:
        """Something happened that is neither right nor wrong."""
        with self._lock:
            self.notes[name] += count

    def add(self, other: Tally) -> None:
        """Another round's."""
        with self._lock:
            self.survived += other.survived
            self.lost += other.lost
            self.wrong += other.wrong
            self.notes += other.notes

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "survived": self.survived,
            "lost": self.lost,
            "wrong": self.wrong,
            "notes": dict(self.notes),
            "point": self.point,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`as_json`."""
        return cls(
            survived=values["survived"],
            lost=values["lost"],
            wrong=list(values["wrong"]),
            notes=Counter(values["notes"]),
            point=dict(values["point"]),
        )
