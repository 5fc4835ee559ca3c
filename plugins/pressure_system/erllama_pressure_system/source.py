"""The pressure source ``system``: the host, and what limits the process within it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from erllama_core.interfaces.pressure import PressureReading
from erllama_pressure_system.address_space import read_address_space
from erllama_pressure_system.cgroup import PROC_SELF, read_cgroup_memory
from erllama_pressure_system.host_memory import read_host_memory


class SystemPressure:
    """Readings ``"host"`` and, under such limits, ``"cgroup"`` and ``"address_space"``.

    Thread-safe. ``proc_self`` is where the process's cgroup and mounts are read from.
    """

    def __init__(self, *, proc_self: Path = PROC_SELF) -> None:
        self._proc_self: Final = proc_self

    def sample(self) -> tuple[PressureReading, ...]:
        # Looked up each time: a process can be moved to another group, and limits change.
        limited = (read_cgroup_memory(self._proc_self), read_address_space())
        return (read_host_memory(), *(reading for reading in limited if reading is not None))

    def close(self) -> None:
        """Nothing to give back."""
