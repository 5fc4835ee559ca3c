"""What a fault is: rounds, each of which ends in a tally. And which ones there are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final, Protocol

import attrs

from torture.tally import Tally


@attrs.frozen(kw_only=True)
class Setup:
    """What a fault is opened with."""

    model_path: Path | None = None
    """A GGUF file for faults that need a real model; None: the demo's."""
    scale: float = 1.0
    """How much a round does: 1.0 takes some seconds."""

    def times(self, count: int) -> int:
        """``count`` at this scale, at least 1."""
        return max(1, round(count * self.scale))


class Fault(Protocol):
    """Open in one process at a time, used by one thread. May keep things from round to round."""

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Break something, and see what came of it.

        ``chance`` decides on all that is left to chance; ``folder`` is empty and the round's own.
        What it raises counts as wrong.
        """
        ...

    def close(self) -> None:
        """Give back what was kept."""
        ...


@attrs.frozen
class Known:
    """A fault by its name; importing its module imports the engine."""

    name: str
    summary: str
    module: str
    """Has a function ``open_fault(setup: Setup) -> Fault``."""
    unprivileged: bool = False
    """Whether it is to run as a user whom permissions concern."""
    most_s: float = 120.0
    """Seconds that a round may take before it counts as hanging."""


FAULTS: Final = (
    Known(
        "kill",
        "SIGKILL of processes that serve a real model from a shared root",
        "torture.kill",
        most_s=300.0,
    ),
    Known("damage", "files of the root damaged while it serves", "torture.damage", True),
    Known("full-disk", "a device that is full now and then", "torture.full_disk"),
    Known("slow-disk", "a tier that is slow, fails and hangs", "torture.slow_disk"),
    Known("backend", "a backend that fails and hangs", "torture.failing_backend"),
    Known("no-numbers", "llama.cpp computes NaN, or fails", "torture.no_numbers"),
    Known("cancel", "requests cancelled in every phase, by other threads", "torture.cancel_storm"),
    Known("pressure", "memory pressure from none to all, and back", "torture.pressure_storm"),
    Known("soak", "everything a little, for long", "torture.soak"),
)
