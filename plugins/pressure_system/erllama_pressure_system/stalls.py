"""Pressure stall information: how much of the time work stood still for want of memory.

Source: the kernel's accounting/psi.rst. A file has a line ``some`` (at least one task stood still)
and a line ``full`` (all of them did), with averages in percent and a total in microseconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from erllama_core.errors import PluginUnavailable
from erllama_core.interfaces.pressure import StallReading
from erllama_pressure_system.cgroup import PROC_SELF, pressure_file
from erllama_pressure_system.options import PsiOptions

PROC_PRESSURE: Final = Path("/proc/pressure/memory")
Kind = Literal["some", "full"]
_WINDOW_S: Final = 1.0
"""Less time than this says nothing: tasks stand still for milliseconds, now and then."""


def read_psi(file: Path, kind: Kind) -> tuple[float, int]:
    """The share of the last ten seconds that was lost, and microseconds lost since ever.

    Raises OSError, and ValueError for a file that is not what the kernel writes.
    """
    for line in file.read_text().splitlines():
        name, *fields = line.split()
        if name == kind:
            values = dict(field.split("=", 1) for field in fields)
            return float(values["avg10"]) / 100, int(values["total"])
    raise ValueError(f"{file} has no line {kind!r}")


class _Stalls:
    """One file, read again and again."""

    def __init__(self, resource: str, file: Path) -> None:
        self.resource: Final = resource
        self.file: Final = file
        self._before: deque[tuple[float, int]] = deque()
        """When it was read, and the total; none but the last is older than a window."""

    def share(self, kind: Kind, now_s: float) -> float:
        """The share of the time since it was read before that was lost; at first, of ten seconds.

        The kernel's averages go on saying for a while that there was pressure once memory has
        been given back, and more would be, for nothing.
        """
        average, total_us = read_psi(self.file, kind)
        before = self._before
        while len(before) > 1 and before[1][0] <= now_s - _WINDOW_S:
            before.popleft()
        share = average
        if before and before[0][0] <= now_s - _WINDOW_S:
            then_s, then_us = before[0]
            share = min(1.0, max(0.0, (total_us - then_us) / 1e6 / (now_s - then_s)))
        before.append((now_s, total_us))
        return share


class PsiPressure:
    """Readings ``"psi:host"`` and, in a group of its own, ``"psi:cgroup"``. For one thread.

    ``host`` and ``proc_self`` are where the kernel's files are; ``clock`` is in seconds.
    """

    def __init__(
        self,
        options: PsiOptions,
        *,
        host: Path = PROC_PRESSURE,
        proc_self: Path = PROC_SELF,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options: Final = options
        self._host: Final = _Stalls("psi:host", host)
        self._proc_self: Final = proc_self
        self._clock: Final = clock
        self._cgroup: _Stalls | None = None

    def sample(self) -> tuple[StallReading, ...]:
        """Raises PluginUnavailable when the kernel tells nothing."""
        readings = []
        failure: Exception | None = None
        for stalls in (self._host, self._current_group()):
            if stalls is None:
                continue
            try:
                share = stalls.share(self._options.stalled, self._clock())
            except (OSError, ValueError, KeyError) as error:
                failure = error
            else:
                readings.append(StallReading(stalls.resource, share, self._options.limit))
        if not readings:
            raise PluginUnavailable(why_unavailable(self._host.file, failure))
        return tuple(readings)

    def _current_group(self) -> _Stalls | None:
        """Looked up each time: a process can be moved to another group."""
        file = pressure_file(self._proc_self)
        if file is None:
            self._cgroup = None
        elif self._cgroup is None or self._cgroup.file != file:
            self._cgroup = _Stalls("psi:cgroup", file)
        return self._cgroup

    def close(self) -> None:
        """Nothing to give back."""


def why_unavailable(file: Path, error: Exception | None) -> str:
    """What is missing where no stalls can be read."""
    return (
        f"the kernel tells no memory stalls ({error}); {file} needs Linux 4.20 or later, built "
        f"with CONFIG_PSI, and started with psi=1 where the distribution switches it off"
    )
