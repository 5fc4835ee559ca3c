"""A pressure source that a test sets, registered as a plugin's."""

from __future__ import annotations

import attrs

from erllama_core import Engine, PluginHost, load_config
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureReading
from erllama_core.interfaces.telemetry import PressureSampled
from erllama_core.providers import PressureProvider


class Gauge:
    """The source ``gauge``; a plugin, and a listener to what the monitor tells."""

    def __init__(self, used: int = 0, total: int = 1000) -> None:
        self.reading = PressureReading("gauge", used, total)
        self.told: list[PressureSampled] = []

    @property
    def used(self) -> int:
        return self.reading.used_bytes

    @used.setter
    def used(self, value: int) -> None:
        self.reading = attrs.evolve(self.reading, used_bytes=value)

    def sample(self) -> tuple[PressureReading, ...]:
        return (self.reading,)

    def close(self) -> None:
        """Nothing to give back."""

    @hookimpl
    def erllama_pressure_sources(self) -> list[PressureProvider]:
        return [PressureProvider("gauge", "Says what it was told.", lambda _: self)]

    @hookimpl
    def erllama_pressure_sampled(self, event: PressureSampled) -> None:
        self.told.append(event)


def gauged_engine(gauge: Gauge, **sections: object) -> Engine:
    """An engine that reads this gauge; checks are forced, as the interval is an hour."""
    host = PluginHost()
    host.register(gauge)
    pressure = {
        "source": "gauge",
        "interval_ms": 3_600_000,
        "high_watermark": 0.8,
        "low_watermark": 0.5,
        "min_evict_bytes": 1,
    }
    given = sections.pop("pressure", {})
    assert isinstance(given, dict)
    table = {**sections, "pressure": pressure | given}
    return Engine(load_config(table, environ={}), plugins=host)
