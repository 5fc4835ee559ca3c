"""The pressure source that never reports anything."""

from __future__ import annotations

from erllama_core.interfaces.pressure import Reading


class NoopPressure:
    """No readings: a monitor with this source alone evicts nothing."""

    def sample(self) -> tuple[Reading, ...]:
        return ()

    def close(self) -> None:
        """Nothing to give back."""
