"""What a measurement gives: figures beside their targets, and lines beside those."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Literal

import attrs


@attrs.frozen(kw_only=True)
class Figure:
    """One number. Without a target it is only context for the others."""

    name: str
    measured: float
    unit: str = ""
    target: float | None = None
    bound: Literal["at most", "at least"] = "at most"
    digits: int = 3

    @property
    def is_met(self) -> bool:
        """Whether the target is reached; always, where there is none."""
        if self.target is None:
            return True
        if self.bound == "at most":
            return self.measured <= self.target
        return self.measured >= self.target

    def __str__(self) -> str:
        number = f"{self.measured:,.{self.digits}f} {self.unit}".rstrip()
        line = f"  {self.name:<66} {number:>18}"
        if self.target is None:
            return line
        verdict = "ok" if self.is_met else "MISSED"
        return f"{line}   {self.bound} {self.target:,.{self.digits}f}: {verdict}"


@attrs.frozen(kw_only=True)
class Sizes:
    """How much is measured. The targets hold for the defaults."""

    runs: int = 5
    """A figure of time is the median of so many."""
    conversations: int = 10
    turns: int = 10
    index_objects: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    memory_objects: int = 100_000
    branches: int = 100_000
    prompt_tokens: int = 32_000
    scanned_objects: int = 10_000
    decoded_tokens: int = 256
    restored_blocks: int = 8
    trace_requests: int | None = None
    """None: all of the file."""


QUICK = Sizes(
    runs=2,
    conversations=2,
    turns=2,
    index_objects=(300, 600),
    memory_objects=500,
    branches=300,
    prompt_tokens=2_048,
    scanned_objects=50,
    decoded_tokens=8,
    restored_blocks=2,
    trace_requests=60,
)
"""Sizes to see that everything runs; the numbers then mean nothing."""


def median_of(runs: int, measure: Callable[[], float]) -> float:
    """The median of ``runs`` measurements, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(runs))
