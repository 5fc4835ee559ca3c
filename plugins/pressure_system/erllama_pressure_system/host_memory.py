"""The host's memory, as psutil sees it."""

from __future__ import annotations

import psutil

from erllama_core.interfaces.pressure import PressureReading


def read_host_memory() -> PressureReading:
    """Physical memory: used is total less available, so page cache is not in it.

    Raises OSError.
    """
    try:
        memory = psutil.virtual_memory()
    except psutil.Error as error:
        raise OSError(f"psutil cannot read this machine's memory: {error}") from error
    return PressureReading("host", memory.total - memory.available, memory.total)
