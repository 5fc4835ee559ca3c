"""What the monitor says of itself."""

from __future__ import annotations

from typing import Literal

import attrs

from erllama_core.interfaces.pressure import Reading
from erllama_core.pressure.thresholds import Thresholds

SourceState = Literal["new", "ok", "failing", "hanging"]


@attrs.frozen(kw_only=True)
class SourceStatus:
    """One source, as it answered last."""

    name: str
    state: SourceState
    """``new``: not asked yet. ``failing``: it raised. ``hanging``: it has not answered."""
    error: str | None
    """What is wrong with it."""
    readings: tuple[Reading, ...]
    """Its last answer; empty when that was none."""


@attrs.frozen(kw_only=True)
class Release:
    """Memory that was given back at one time."""

    wanted_bytes: int
    """What the readings asked for."""
    freed_bytes: int
    """What came of it: idle buffers, and objects that left their tiers. Sequences and models that
    went are not in it, as their size is not known to the byte."""
    rows: int = 0
    """Objects that left their tiers."""
    residents: int = 0
    """Idle sequences that gave back their cells."""
    unloaded: str | None = None
    """The model that was unloaded."""

    def __bool__(self) -> bool:
        """Whether anything was given back."""
        return bool(self.freed_bytes or self.rows or self.residents or self.unloaded is not None)


@attrs.frozen(kw_only=True)
class PressureStatus:
    """The monitor at one moment."""

    enabled: bool
    thresholds: Thresholds
    sources: tuple[SourceStatus, ...]
    """Empty until the monitor was enabled, or a check was asked for, for the first time."""
    tightest: Reading | None
    """Of the last check, the reading of the highest usage."""
    checks: int
    releases: int
    """Checks that gave memory back."""
    freed_bytes: int
    """By all of them together."""
    last_release: Release | None
    last_release_at: float | None
    """When that was, in seconds since the epoch."""
