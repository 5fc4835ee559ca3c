"""The cost gate: whether stored state is restored, or computed again because that is sooner.

It knows tokens, bytes and seconds, and no backend and no tier. What things cost is a prior at
first, then what was measured last: medians of a few measurements, so that one that is far off
changes nothing. Reads of what was used lately, which the system may still have in memory, are
measured apart from reads of what was not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from erllama_core.interfaces.backend import CostPrior
from erllama_core.results import GateEstimate

MARGIN: Final = 2.0
"""Computing must take less than restoring by this factor."""
WORTH_S: Final = 0.005
"""And by so many seconds more: what costs next to nothing is not worth a surprise."""
PROBE_EVERY: Final = 16
"""Of so many withheld restores one is let through, a portion of it, to be measured."""
LATELY_NS: Final = 600 * 10**9
"""What was used within this time may still be in the system's memory."""

_MEASURED: Final = 9
_LEAST: Final = 3
"""Measurements that are kept, and how many of them it takes to replace a prior."""
_STEP_TOKENS: Final = 64
"""Shorter steps cost what a step costs, and say little about its tokens."""
_RECENT_READ: Final = (0.0005, 1e-9)
_OLD_READ: Final = (0.001, 2e-9)
"""Seconds, and seconds per byte, of a read until reads were measured: a solid-state disk."""


class Rate:
    """Seconds per unit. Thread-safe; ``value`` is read without a lock."""

    def __init__(self, prior: float) -> None:
        self.value = prior
        self._last: Final[deque[float]] = deque(maxlen=_MEASURED)
        self._lock: Final = threading.Lock()

    def observe(self, units: float, seconds: float) -> None:
        """Take note of a measurement; one of no duration says nothing."""
        if units <= 0 or seconds <= 0:
            return
        with self._lock:
            self._last.append(seconds / units)
            if len(self._last) >= _LEAST:
                self.value = _median(self._last)


class Line:
    """Seconds by size: what every operation takes, and so much per unit. Thread-safe."""

    def __init__(self, fixed_s: float, per_unit_s: float) -> None:
        self._line = (fixed_s, per_unit_s)
        self._last: Final[deque[tuple[float, float]]] = deque(maxlen=_MEASURED)
        self._lock: Final = threading.Lock()

    def seconds(self, size: float) -> float:
        """What an operation of this size is expected to take."""
        fixed, per_unit = self._line
        return fixed + per_unit * size

    def observe(self, size: float, seconds: float) -> None:
        """Take note of a measurement.

        The least of the last ones bounds what every operation takes. The rest goes by size,
        so that for sizes like those measured the line gives their median.
        """
        if size <= 0 or seconds < 0:
            return
        with self._lock:
            self._last.append((size, seconds))
            if len(self._last) >= _LEAST:
                fixed = min(seconds for _, seconds in self._last)
                per_unit = _median((seconds - fixed) / size for size, seconds in self._last)
                self._line = (fixed, per_unit)


def _median(values: Iterable[float]) -> float:
    """The lower one, where there are two."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


class ReadCosts:
    """What reading from one tier takes. Thread-safe."""

    def __init__(self) -> None:
        self._recent: Final = Line(*_RECENT_READ)
        self._old: Final = Line(*_OLD_READ)

    def line(self, last_used_ns: int, now_ns: int) -> Line:
        """For an object that was last used, by whichever process, at ``last_used_ns``."""
        return self._recent if now_ns - last_used_ns < LATELY_NS else self._old


@attrs.frozen
class Portion:
    """A part of what is stored of a prompt that is restored as a whole or not at all."""

    tokens: int
    n_bytes: int
    reads_s: tuple[float, ...] = ()
    """What its reads are expected to take; none for what is in memory."""


@attrs.frozen
class Stage:
    """The first few portions of a restore, together."""

    tokens: int
    restore_s: float


def stages(portions: Iterable[Portion], imports: Line, readers: int) -> list[Stage]:
    """What restoring the first, the first two, ... all portions is expected to take.

    ``readers`` objects are read at a time; all that is restored is imported in one call.
    """
    found: list[Stage] = []
    tokens = n_bytes = 0
    reading = longest = 0.0
    for portion in portions:
        tokens += portion.tokens
        n_bytes += portion.n_bytes
        reading += sum(portion.reads_s)
        longest = max(longest, *portion.reads_s, 0.0)
        read_s = max(longest, reading / readers)
        found.append(Stage(tokens, read_s + imports.seconds(n_bytes)))
    return found


def worthwhile(restores: Sequence[Stage], compute_s_per_token: float) -> int:
    """How many portions to restore: all but the last ones that are clearly sooner computed."""
    kept, most = len(restores), WORTH_S
    for count in range(len(restores)):
        left = _rest(restores, count)
        gain = left.restore_s - MARGIN * left.tokens * compute_s_per_token
        if gain > most:
            kept, most = count, gain
    return kept


def _rest(restores: Sequence[Stage], count: int) -> Stage:
    """What comes after the first ``count`` portions."""
    if not count:
        return restores[-1]
    whole, first = restores[-1], restores[count - 1]
    return Stage(whole.tokens - first.tokens, whole.restore_s - first.restore_s)


@attrs.frozen
class Decision:
    """What the gate says of one restore."""

    portions: int
    """How many of the first portions are restored."""
    estimate: GateEstimate


class CostGate:
    """One model's gate. Thread-safe, but for :meth:`admit`, which is its worker's."""

    def __init__(self, prior: CostPrior, readers: int) -> None:
        self._compute: Final = Rate(prior.compute_s_per_token)
        self._imports: Final = Line(0.0, prior.import_s_per_byte)
        self._readers: Final = readers
        self._withheld = 0

    def observe_step(self, tokens: int, seconds: float) -> None:
        """A step was computed; those of running replies alone are too short to count."""
        if tokens >= _STEP_TOKENS:
            self._compute.observe(tokens, seconds)

    def observe_import(self, n_bytes: int, seconds: float) -> None:
        """Stored state was imported."""
        self._imports.observe(n_bytes, seconds)

    def judge(self, portions: Sequence[Portion]) -> Decision:
        """What is expected of a restore, and what had better be computed."""
        restores = stages(portions, self._imports, self._readers)
        return self._decision(restores, worthwhile(restores, self._compute.value))

    def admit(self, portions: Sequence[Portion]) -> Decision:
        """What :meth:`judge` says, for a restore that is about to begin.

        Now and then it lets one portion more through than it should, or a gate that has
        closed would never learn that a tier is quick again.
        """
        restores = stages(portions, self._imports, self._readers)
        kept = worthwhile(restores, self._compute.value)
        if kept < len(restores):
            self._withheld += 1
            if self._withheld % PROBE_EVERY == 0:
                kept += 1
        return self._decision(restores, kept)

    def _decision(self, restores: Sequence[Stage], kept: int) -> Decision:
        withheld = kept < len(restores)
        about = _rest(restores, kept) if withheld else restores[-1]
        compute_s = about.tokens * self._compute.value
        tokens = about.tokens if withheld else 0
        return Decision(kept, GateEstimate(tokens, about.restore_s, compute_s))
