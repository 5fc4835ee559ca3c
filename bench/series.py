"""Curves that were measured, and the plot that shows several of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, Self

import attrs


@attrs.frozen
class Axis:
    """What a plot's numbers are."""

    name: str
    unit: str = ""
    scale: Literal["linear", "log"] = "linear"

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


@attrs.frozen(kw_only=True)
class Series:
    """One curve. Points are in the order of ``x``."""

    who: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    least: tuple[float, ...] | None = None
    most: tuple[float, ...] | None = None
    """What the runs of each point lie between, where ``y`` is their median."""

    def __attrs_post_init__(self) -> None:
        lengths = {
            len(part) for part in (self.x, self.y, self.least, self.most) if part is not None
        }
        if len(lengths) != 1:
            raise ValueError(f"the curve {self.who!r} has parts of unequal lengths")
        if (self.least is None) != (self.most is None):
            raise ValueError(f"the curve {self.who!r} has one end of its spread only")

    @classmethod
    def of_runs(cls, who: str, runs: Iterable[tuple[float, Sequence[float]]]) -> Self:
        """The medians of each point's runs, with their spread."""
        points = sorted((x, tuple(values)) for x, values in runs)
        return cls(
            who=who,
            x=tuple(x for x, _ in points),
            y=tuple(statistics.median(values) for _, values in points),
            least=tuple(min(values) for _, values in points),
            most=tuple(max(values) for _, values in points),
        )

    def joined(self, other: Self) -> Self:
        """With the points of ``other``, which count where both have one."""
        points = {**_points(self), **_points(other)}
        spread = self.least is not None and other.least is not None
        ordered = sorted(points)
        return attrs.evolve(
            self,
            x=tuple(ordered),
            y=tuple(points[x][0] for x in ordered),
            least=tuple(points[x][1] for x in ordered) if spread else None,
            most=tuple(points[x][2] for x in ordered) if spread else None,
        )


def _points(series: Series) -> dict[float, tuple[float, float, float]]:
    least, most = series.least or series.y, series.most or series.y
    parts = zip(series.x, series.y, least, most, strict=True)
    return {x: (y, low, high) for x, y, low, high in parts}


@attrs.frozen(kw_only=True)
class Plot:
    """Curves over the same axes. ``name`` names its file, and never changes."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]

    def joined(self, other: Self) -> Self:
        """With the curves of ``other``, which was measured at another time or elsewhere."""
        curves = {one.who: one for one in self.series}
        for one in other.series:
            curves[one.who] = curves[one.who].joined(one) if one.who in curves else one
        return attrs.evolve(other, series=tuple(curves.values()))
