"""What a pressure source is: something that can say how full a memory is."""

from __future__ import annotations

from typing import Protocol

import attrs


@attrs.frozen
class PressureReading:
    """One reading of one memory."""

    resource: str
    """What was read, for a person: ``"host"``, ``"cgroup"``, ``"gpu:0"``."""
    used_bytes: int
    total_bytes: int

    @property
    def usage(self) -> float:
        """Used over total, 0.0 to 1.0; 0.0 where the total is unknown."""
        return self.used_bytes / self.total_bytes if self.total_bytes > 0 else 0.0


class PressureSource(Protocol):
    """Sampled by one thread, never a model's; may block for some milliseconds."""

    def sample(self) -> tuple[PressureReading, ...]:
        """Current readings, one per memory watched; empty when there is nothing to say.

        Raises OSError or ErllamaError when no reading can be had; the source is then
        skipped until the next interval.
        """
        ...

    def close(self) -> None:
        """Give back every resource. Idempotent."""
        ...
