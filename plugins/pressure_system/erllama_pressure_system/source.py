"""The pressure source: the host, and the cgroup where it has a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from erllama_core.interfaces.pressure import PressureReading
from erllama_pressure_system.cgroup import PROC_SELF, read_cgroup_memory
from erllama_pressure_system.host_memory import read_host_memory


class SystemPressure:
    """Readings ``"host"`` and, under a limit, ``"cgroup"``. Thread-safe.

    ``proc_self`` is where the process's cgroup and mounts are read from.
    """

    def __init__(self, *, proc_self: Path = PROC_SELF) -> None:
        self._proc_self: Final = proc_self

    def sample(self) -> tuple[PressureReading, ...]:
        # Looked up each time: a process can be moved to another group, and limits change.
        cgroup = read_cgroup_memory(self._proc_self)
        host = read_host_memory()
        return (host,) if cgroup is None else (host, cgroup)

    def close(self) -> None:
        """Nothing to give back."""
