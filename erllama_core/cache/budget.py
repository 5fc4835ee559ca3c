"""The memory that an engine may take: what of it is taken, and by whom."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

import attrs


@attrs.frozen(kw_only=True)
class MemoryUse:
    """What an engine counts of its memory at one moment."""

    budget_bytes: int | None
    """None: there is no bound, and models are not estimated."""
    pages_bytes: int
    """State in memory: rows of tiers that keep pages, save and load buffers."""
    idle_bytes: int
    """Of these, buffers that wait to be used again."""
    holders: Mapping[str, int]
    """What was set aside: for each model its estimate, for each tier on a tmpfs its quota."""

    @property
    def used_bytes(self) -> int:
        """All of it together."""
        return self.pages_bytes + sum(self.holders.values())


class MemoryBudget:
    """Counts pages as they are mapped, and what is set aside under a name. Thread-safe.

    ``limit_bytes`` None: everything is counted, and nothing is refused.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes: Final = limit_bytes
        self._lock: Final = threading.Lock()
        self._pages = 0
        self._holders: dict[str, int] = {}

    @property
    def pages_bytes(self) -> int:
        """Of all pages that are mapped."""
        return self._pages

    def holders(self) -> dict[str, int]:
        """What was set aside, by its name."""
        with self._lock:
            return dict(self._holders)

    def missing(self, n_bytes: int) -> int:
        """How many of so many bytes are beyond the limit; 0: there is room for all."""
        with self._lock:
            return self._missing(n_bytes)

    def _missing(self, n_bytes: int) -> int:
        if self.limit_bytes is None:
            return 0
        used = self._pages + sum(self._holders.values())
        return min(n_bytes, max(0, used + n_bytes - self.limit_bytes))

    def take(self, n_bytes: int) -> bool:
        """Count pages that are about to be mapped; False, and they must not be, beyond the limit."""
        with self._lock:
            if self._missing(n_bytes):
                return False
            self._pages += n_bytes
            return True

    def give(self, n_bytes: int) -> None:
        """Pages were unmapped."""
        with self._lock:
            self._pages -= n_bytes

    def hold(self, name: str, n_bytes: int, *, beyond: bool = False) -> bool:
        """Set memory aside, on top of what has that name; False, and nothing is, beyond the limit.

        ``beyond``: in any case, for what cannot be refused any more.
        """
        with self._lock:
            if not beyond and self._missing(n_bytes):
                return False
            self._holders[name] = self._holders.get(name, 0) + n_bytes
            return True

    def release(self, name: str) -> None:
        """Nothing is set aside under that name any more. Idempotent."""
        with self._lock:
            self._holders.pop(name, None)

    def __str__(self) -> str:
        """What is in use, in a sentence for errors."""
        with self._lock:
            parts = [f"{name} {in_words(size)}" for name, size in self._holders.items()]
            parts.append(f"state in memory {in_words(self._pages)}")
            limit = "no limit" if self.limit_bytes is None else in_words(self.limit_bytes)
        return f"memory_budget_bytes is {limit}, and in use are: {', '.join(parts)}"


def in_words(n_bytes: int) -> str:
    """A number of bytes as a person reads it."""
    size, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n_bytes} {unit}" if unit == "B" else f"{size:.1f} {unit}"
