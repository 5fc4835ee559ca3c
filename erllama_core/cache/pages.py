"""Page-aligned buffers that state is copied into: anonymous, pre-faulted, counted, reused."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from erllama_core.cache.budget import MemoryBudget
from erllama_core.errors import MemoryBudgetExceeded

_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14 and later (madvise(2)); the mmap module has no name for it."""


_HUGE_PAGE: Final = 2 << 20
_WASTE: Final = 8
"""A mapping may be larger than what was asked for by one part in so many."""
_MAX_IDLE: Final = 256
"""Mappings that wait: few enough to look through."""


def _capacity(size: int) -> int:
    """Whole pages for ``size`` bytes; whole huge pages where that wastes little."""
    huge = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    if 0 < huge <= size + size // _WASTE:
        return huge
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def _map(size: int) -> mmap.mmap:
    """Anonymous pages, all present where the system can do that at once.

    Faulting 46 MB in page by page takes 15 ms, in huge pages 2 ms (measured): as long as
    everything else a restore does. Where either is missing, the first write faults.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):
            pages.madvise(_MADV_POPULATE_WRITE)
    return pages


class PooledPages:
    """Some pages of a :class:`PagePool` and the number of their holders; thread-safe.

    Implements ``interfaces.tier.Pages``. Nobody unmaps pages by hand: a view that outlives
    the last holder may see another holder's bytes, but never memory that is gone.
    """

    __slots__ = ("_lock", "_map", "_pool", "_references", "_view", "size")

    def __init__(self, pool: PagePool, pages: mmap.mmap, size: int) -> None:
        self._pool = pool
        self._map = pages
        self._lock = threading.Lock()
        self._references = 1
        self.size: Final = size
        self._view = memoryview(pages)[:size]

    @property
    def view(self) -> memoryview:
        """The ``size`` bytes asked for. Valid while the caller holds a reference."""
        return self._view

    def retain(self) -> None:
        with self._lock:
            if self._references < 1:
                raise ValueError("pages were used after their release")
            self._references += 1

    def release(self) -> None:
        with self._lock:
            if self._references < 1:
                raise ValueError("pages were released twice")
            self._references -= 1
            if self._references:
                return
        self._view.release()
        self._pool._give_back(self._map)  # noqa: SLF001 - the pool's other half


class PagePool:
    """Gives out pages and keeps some of those that come back; thread-safe.

    Of what is kept the oldest goes first, back to the system. Whatever is mapped is counted in
    ``budget``, kept or not.
    """

    def __init__(self, max_idle_bytes: int, budget: MemoryBudget | None = None) -> None:
        self._max_idle_bytes: Final = max_idle_bytes
        self.budget: Final = MemoryBudget() if budget is None else budget
        self.reclaim: Callable[[int], object] = _nothing
        """Called for so many bytes that the budget lacks; may make holders release theirs."""
        self._lock = threading.Lock()
        self._idle: deque[mmap.mmap] = deque()
        self._idle_bytes = 0

    @property
    def idle_bytes(self) -> int:
        """Mapped and waiting."""
        return self._idle_bytes

    def acquire(self, size: int) -> PooledPages:
        """Writable pages for ``size`` bytes; their contents are arbitrary.

        Raises MemoryBudgetExceeded, and OSError when the system has none.
        """
        needed = _capacity(size)
        pages = self._take(needed)
        if pages is None and not self.budget.take(needed):
            pages = self._make_room(needed)
        return PooledPages(self, self._map(needed) if pages is None else pages, size)

    def _make_room(self, needed: int) -> mmap.mmap | None:
        """Pages that came back, or room in the budget for new ones.

        What waits is given up first, then what the pages' holders can do without.
        """
        self.clear()
        if self.budget.take(needed):
            return None
        self.reclaim(self.budget.missing(needed))
        pages = self._take(needed)
        if pages is not None:
            return pages
        self.clear()
        if self.budget.take(needed):
            return None
        raise MemoryBudgetExceeded(f"no room for {needed} bytes of state: {self.budget}")

    def _map(self, counted: int) -> mmap.mmap:
        try:
            return _map(counted)
        except BaseException:
            self.budget.give(counted)
            raise

    def prepare(self, sizes: Iterable[int]) -> None:
        """Map pages for requests of these sizes ahead of time, as far as the pool keeps them."""
        for size in sizes:
            needed = _capacity(size)
            if self._idle_bytes + needed > self._max_idle_bytes or not self.budget.take(needed):
                return
            self._give_back(self._map(needed))

    def _take(self, needed: int) -> mmap.mmap | None:
        most = needed + needed // _WASTE
        with self._lock:
            for index, pages in enumerate(self._idle):
                if needed <= len(pages) <= most:
                    del self._idle[index]
                    self._idle_bytes -= len(pages)
                    return pages
        return None

    def _give_back(self, pages: mmap.mmap) -> None:
        if len(pages) > self._max_idle_bytes:
            self.budget.give(len(pages))
            return
        unmapped = 0
        with self._lock:
            self._idle.append(pages)
            self._idle_bytes += len(pages)
            while self._idle_bytes > self._max_idle_bytes or len(self._idle) > _MAX_IDLE:
                size = len(self._idle.popleft())
                self._idle_bytes -= size
                unmapped += size
        self.budget.give(unmapped)

    def clear(self) -> int:
        """Return the idle pages to the system; their bytes."""
        with self._lock:
            unmapped, self._idle_bytes = self._idle_bytes, 0
            self._idle.clear()
        self.budget.give(unmapped)
        return unmapped


def _nothing(_: int) -> None:
    """Nobody has pages to spare."""
