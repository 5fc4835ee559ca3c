"""The limit on this process's address space (``ulimit -v``), which some use for want of cgroups."""

from __future__ import annotations

import sys

import psutil

from erllama_core.interfaces.pressure import PressureReading


def read_address_space() -> PressureReading | None:
    """Mapped memory against ``RLIMIT_AS``, or None when there is no such limit.

    Raises OSError.
    """
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = psutil.Process().memory_info().vms
    except psutil.Error as error:
        raise OSError(f"psutil cannot read this process's memory: {error}") from error
    return PressureReading("address_space", used, limit)
