"""A number that was measured, beside its target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, Self

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
    spread: tuple[float, float] | None = None
    """The least and the most of the runs of which ``measured`` is the median."""

    @classmethod
    def of_runs(
        cls,
        name: str,
        runs: Sequence[float],
        *,
        unit: str = "",
        target: float | None = None,
        bound: Literal["at most", "at least"] = "at most",
        digits: int = 3,
    ) -> Self:
        """The median of some runs, with their spread."""
        return cls(
            name=name,
            measured=statistics.median(runs),
            unit=unit,
            target=target,
            bound=bound,
            digits=digits,
            spread=(min(runs), max(runs)),
        )

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
        if self.spread is not None:
            least, most = (f"{value:,.{self.digits}f}" for value in self.spread)
            line += f"   ({least} to {most})"
        if self.target is None:
            return line
        verdict = "ok" if self.is_met else "MISSED"
        return f"{line}   {self.bound} {self.target:,.{self.digits}f}: {verdict}"


def median_of(runs: int, measure: Callable[[], float]) -> float:
    """The median of ``runs`` measurements, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(runs))
