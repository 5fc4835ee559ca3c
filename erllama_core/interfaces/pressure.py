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
    is_device: bool = False
    """Whether it is the memory of a device. Tiers are in the host's memory: where a device's
    does not follow when they give way, they are left alone."""

    @property
    def usage(self) -> float:
        """Used over total, 0.0 to 1.0; 0.0 where the total is unknown."""
        return self.used_bytes / self.total_bytes if self.total_bytes > 0 else 0.0


@attrs.frozen
class StallReading:
    """How much of the time work stood still for want of memory: a share, with no bytes in it."""

    resource: str
    """What was read, for a person: ``"psi:host"``."""
    stalled: float
    """Time over time, 0.0 to 1.0."""
    limit: float
    """The share that counts as a memory that is full; above 0.0."""

    @property
    def usage(self) -> float:
        """Stalled over the limit, 0.0 to 1.0."""
        return min(self.stalled / self.limit, 1.0) if self.limit > 0 else 0.0


Reading = PressureReading | StallReading
"""Both have a ``resource`` and a ``usage``."""


class PressureSource(Protocol):
    """Used by one thread of its own: it may block, and delays no other source."""

    def sample(self) -> tuple[Reading, ...]:
        """Current readings, one per memory watched; empty when there is nothing to say.

        Raises OSError or ErllamaError when no reading can be had; the source is then skipped
        until the next interval, and the words are in the monitor's status. One that does not
        answer within five seconds is skipped too, and asked again when it has.
        """
        ...

    def close(self) -> None:
        """Give back every resource. Idempotent."""
        ...
