"""When memory is given back, and how much: the arithmetic of the watermarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

import attrs

from erllama_core.interfaces.pressure import Reading, StallReading


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


_TYPES: Final[dict[str, tuple[str, Callable[[object], bool]]]] = {
    "interval_ms": ("an integer", _is_integer),
    "high_watermark": ("a number", _is_number),
    "low_watermark": ("a number", _is_number),
    "min_evict_bytes": ("an integer", _is_integer),
    "evict_tiers": ("names of tiers", _are_names),
    "unload_idle_models": ("true or false", _is_truth),
}


@attrs.frozen(kw_only=True)
class Thresholds:
    """What decides when memory is given back, and of what. Can be changed at run time."""

    interval_ms: int
    """Milliseconds between two checks."""
    high_watermark: float
    """Usage at which memory is given back."""
    low_watermark: float
    """Usage down to which it is given back."""
    min_evict_bytes: int
    """The least that is given back at a time."""
    evict_tiers: tuple[str, ...]
    """Names or kinds of the tiers that give way."""
    unload_idle_models: bool
    """Whether the least recently used idle model goes when the tiers freed too little."""

    def problems(self) -> list[tuple[str, str]]:
        """Fields, and what is wrong with their values; empty when nothing is."""
        found = self._type_problems()
        if found:
            return found
        if self.interval_ms < 1:
            found.append(("interval_ms", f"{self.interval_ms} is too small; at least 1"))
        for name in ("high_watermark", "low_watermark"):
            if not 0.0 < getattr(self, name) <= 1.0:
                found.append((name, f"{getattr(self, name)} is not above 0 and at most 1"))
        if not found and self.low_watermark >= self.high_watermark:
            message = f"{self.low_watermark} is not below high_watermark ({self.high_watermark})"
            found.append(("low_watermark", message))
        if self.min_evict_bytes < 0:
            message = f"{self.min_evict_bytes} is too small; at least 0"
            found.append(("min_evict_bytes", message))
        repeated = {name for name in self.evict_tiers if self.evict_tiers.count(name) > 1}
        found += [("evict_tiers", f"{name!r} is there twice") for name in sorted(repeated)]
        return found

    def _type_problems(self) -> list[tuple[str, str]]:
        """They may be anything: a configuration is checked before, what a program gives is not."""
        return [
            (name, f"expected {expected}, got {getattr(self, name)!r}")
            for name, (expected, is_right) in _TYPES.items()
            if not is_right(getattr(self, name))
        ]

    def is_high(self, reading: Reading) -> bool:
        """Whether a reading asks for memory to be given back."""
        return reading.usage >= self.high_watermark

    def excess_bytes(self, reading: Reading, held_bytes: int) -> int:
        """How much must be given back for a reading to be at the low watermark.

        A stall says nothing of bytes: of the ``held_bytes`` that can be given back, it asks for
        the part by which it is above the low watermark.
        """
        if isinstance(reading, StallReading):
            wanted = held_bytes * (1 - self.low_watermark / reading.usage)
        else:
            wanted = reading.used_bytes - self.low_watermark * reading.total_bytes
        return max(self.min_evict_bytes, math.ceil(wanted))


def tightest(readings: Iterable[Reading]) -> Reading | None:
    """The reading of the highest usage; None when there are none."""
    return max(readings, key=lambda reading: reading.usage, default=None)
