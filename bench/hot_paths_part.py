"""A part of the work, beside the least that it could take on this machine."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Part:
    """One line: what it takes, and its floor, where there is one."""

    name: str
    seconds: float
    floor_s: float | None = None
    floor: str = ""
    """What the floor is made of."""

    @property
    def ratio(self) -> float | None:
        """How often the floor goes into what it takes."""
        return None if self.floor_s is None else self.seconds / self.floor_s

    def __str__(self) -> str:
        line = f"  {self.name:<58} {_readable(self.seconds):>11}"
        if self.floor_s is None:
            return line
        return f"{line} {_readable(self.floor_s):>11} {self.ratio:>7.2f}   {self.floor}"


def _readable(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{1e3 * seconds:,.2f} ms"
    return f"{1e6 * seconds:,.2f} us"
