"""The providers ``system`` and ``psi``."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.providers import Available, NoOptions, PressureProvider, Unavailable
from erllama_pressure_system.options import PsiOptions


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


def _make_psi(options: PsiOptions) -> PressureSource:
    from erllama_pressure_system.stalls import PsiPressure

    return PsiPressure(options)


def _probe_psi() -> Available | Unavailable:
    from erllama_pressure_system.stalls import PROC_PRESSURE, read_psi, why_unavailable

    try:
        read_psi(PROC_PRESSURE, "some")
    except (OSError, ValueError, KeyError) as error:
        return Unavailable(why_unavailable(PROC_PRESSURE, error))
    return Available()


@hookimpl
def erllama_pressure_sources() -> Sequence[PressureProvider]:
    """``system`` and ``psi``."""
    return [
        PressureProvider(
            name="system",
            summary="Memory of the host, and of the process's cgroup if that has a limit.",
            factory=_make,
            probe=_probe,
        ),
        PressureProvider(
            name="psi",
            summary="Time lost for want of memory, as the Linux kernel tells it.",
            factory=_make_psi,
            config=PsiOptions,
            probe=_probe_psi,
        ),
    ]
