"""The provider ``system``."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.providers import Available, NoOptions, PressureProvider, Unavailable


def _make(_options: NoOptions) -> PressureSource:
    from erllama_pressure_system.source import SystemPressure

    return SystemPressure()


def _probe() -> Available | Unavailable:
    try:
        from erllama_pressure_system.host_memory import read_host_memory

        read_host_memory()
    except (ImportError, OSError) as error:
        return Unavailable(f"psutil cannot read this machine's memory: {error}")
    return Available()


@hookimpl
def erllama_pressure_sources() -> Sequence[PressureProvider]:
    """``system``."""
    return [
        PressureProvider(
            name="system",
            summary="Memory of the host, and of the process's cgroup if that has a limit.",
            factory=_make,
            probe=_probe,
        )
    ]
