"""The pressure source that never reports anything."""

from __future__ import annotations

from erllama_core.interfaces.pressure import PressureReading


class NoopPressure:
    """No readings: a monitor with this source alone evicts nothing."""

    def sample(self) -> tuple[PressureReading, ...]:
        return ()

    def close(self) -> None:
        """Nothing to give back."""
