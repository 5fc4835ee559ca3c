"""Options of the RAM tier, apart from the tier so that listing it imports nothing else."""

from __future__ import annotations

import os
from typing import Final

import attrs

from erllama_core.providers import ByteSize

_MOST_BYTES: Final = 2 << 30
_FALLBACK_BYTES: Final = 256 << 20


@attrs.frozen
class RamOptions:
    """A tier of kind ``ram``."""

    quota_bytes: ByteSize | None = None
    """Payload bytes that it keeps. None: 2 GiB or a tenth of memory, whichever is less."""


def default_quota_bytes() -> int:
    """The smaller of 2 GiB and a tenth of this machine's memory; 256 MiB if that is unknown."""
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return _FALLBACK_BYTES
    return min(_MOST_BYTES, memory_bytes // 10) if memory_bytes > 0 else _FALLBACK_BYTES
