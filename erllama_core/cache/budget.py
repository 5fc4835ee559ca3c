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
    """What was set aside: for each model its estimate, for each adapter its file's size, for each
    tier on a tmpfs its quota, and contexts that were given up and are not freed."""

    @property
    def used_bytes(self) -> int:
        """All of it together."""
        return self.pages_bytes + sum(self.holders.values())


@attrs.frozen(eq=False)
class Hold:
    """Memory that is set aside in a budget, until it is released."""

    _budget: MemoryBudget
    name: str
    n_bytes: int

    def release(self) -> None:
        """It is free again. Idempotent; any thread."""
        self._budget.let_go(self)


class MemoryBudget:
    """Counts pages as they are mapped, and what is set aside under a name. Thread-safe.

    ``limit_bytes`` None: everything is counted, and nothing is refused. ``headroom_bytes``: what
    rows of tiers should leave to buffers, or a quarter of what there is if that is less.
    """

    def __init__(self, limit_bytes: int | None = None, headroom_bytes: int = 0) -> None:
        self.limit_bytes: Final = limit_bytes
        self._headroom_bytes: Final = headroom_bytes
        self._lock: Final = threading.Lock()
        self._pages = 0
        self._holds: set[Hold] = set()

    @property
    def pages_bytes(self) -> int:
        """Of all pages that are mapped."""
        return self._pages

    def holders(self) -> dict[str, int]:
        """What is set aside, by its name."""
        with self._lock:
            return self._by_name()

    def missing(self, n_bytes: int) -> int:
        """How many of so many bytes are beyond the limit; 0: there is room for all."""
        with self._lock:
            return self._missing(n_bytes)

    def _missing(self, n_bytes: int) -> int:
        if self.limit_bytes is None:
            return 0
        used = self._pages + sum(hold.n_bytes for hold in self._holds)
        return min(n_bytes, max(0, used + n_bytes - self.limit_bytes))

    def crowded(self, idle_bytes: int) -> int:
        """How many bytes of rows should give way to buffers; ``idle_bytes`` wait to be used."""
        if self.limit_bytes is None:
            return 0
        with self._lock:
            room = max(0, self.limit_bytes - sum(hold.n_bytes for hold in self._holds))
            headroom = min(self._headroom_bytes, room // 4)
            return max(0, self._pages - idle_bytes - (room - headroom))

    def take(self, n_bytes: int) -> bool:
        """Count pages that are to be mapped; False, and they must not be, beyond the limit."""
        with self._lock:
            if self._missing(n_bytes):
                return False
            self._pages += n_bytes
            return True

    def give(self, n_bytes: int) -> None:
        """Pages were unmapped."""
        with self._lock:
            self._pages -= n_bytes

    def hold(self, name: str, n_bytes: int, *, beyond: bool = False) -> Hold | None:
        """Set memory aside; None, and nothing is, beyond the limit.

        ``beyond``: in any case, for what cannot be refused any more.
        """
        with self._lock:
            if not beyond and self._missing(n_bytes):
                return None
            hold = Hold(self, name, n_bytes)
            self._holds.add(hold)
            return hold

    def let_go(self, hold: Hold) -> None:
        """See :meth:`Hold.release`."""
        with self._lock:
            self._holds.discard(hold)

    def _by_name(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for hold in self._holds:
            sizes[hold.name] = sizes.get(hold.name, 0) + hold.n_bytes
        return dict(sorted(sizes.items()))

    def __str__(self) -> str:
        """What is in use, in a sentence for errors."""
        with self._lock:
            parts = [f"{name} {in_words(size)}" for name, size in self._by_name().items()]
            parts.append(f"state in memory {in_words(self._pages)}")
            limit = "no limit" if self.limit_bytes is None else in_words(self.limit_bytes)
        return f"memory_budget_bytes is {limit}, and in use are: {', '.join(parts)}"


def in_words(n_bytes: int) -> str:
    """A number of bytes as a person reads it: ``1536`` as ``1.5 KiB``."""
    size, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n_bytes} {unit}" if unit == "B" else f"{size:.1f} {unit}"
